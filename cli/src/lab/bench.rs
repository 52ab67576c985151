//! `bench`: one step on GPU and CPU, beside what the memory of each device allows.
//!
//! Every path is checked against the oracle before it is timed. The paths are timed in turn, round by round,
//! because the memory bandwidth of a shared machine drifts: only what was measured side by side compares.

mod comparison;
mod elementwise;
mod page;
mod paths;
mod plot;
mod report;
mod stream;
mod timing;
mod wide_copy;
mod wide_stream;

use std::path::Path as FilePath;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use serde::{Deserialize, Serialize};
use wgpu_optim::{AnyRule, Rule as _, StorageType};

use crate::args::CommonArgs;
use crate::backend::{Adapter, Choice, Opened};
use crate::interrupt::Interrupt;
use crate::lab::args::BenchArgs;
use crate::lab::csv;
use crate::lab::memory::check_memory;
use crate::lab::problem::Problem;
use crate::progress::Progress;
use crate::{Failure, print, to_run_again, warn};
use comparison::Comparison;
use paths::{Path, Rig, Setup};
use report::{Case, Report, Row, System};
use timing::Median;
use wgpu_optim_files::{Model, Outputs, read_whole};

/// Rounds are added until each median is known as well as this.
const UNCERTAINTY: f64 = 0.02;

/// Fewer rounds than these have no confidence interval.
const MIN_ROUNDS: usize = 6;

/// The report, and how it compares.
#[derive(Serialize)]
struct Document<'a> {
    #[serde(flatten)]
    report: &'a Report,
    #[serde(skip_serializing_if = "Option::is_none")]
    comparison: Option<Comparison>,
}

pub fn run(common: &CommonArgs, args: &BenchArgs) -> Result<(), Failure> {
    let interrupt = Interrupt::catch()?;
    let rules = args.rules()?;
    let (grid, notes) = grid(args)?;
    let old = args.compare.as_deref().map(read_report).transpose()?;
    if let Some(path) = &args.plot {
        plot::check_extension(path)?;
    }
    let mut outputs = Outputs::default();
    let mut stage =
        |role, path: Option<&FilePath>| path.map(|path| outputs.stage(role, path)).transpose();
    let table_file = stage("--csv", args.csv.as_deref())?;
    let picture_file = stage("--plot", args.plot.as_deref())?;
    let page_path = args.report.as_deref().map(page::place).transpose()?;
    let page_file = stage("--report", page_path.as_deref())?;
    let (opened, reason) = Choice::all_for_measurements(common, args.all_adapters)?;
    let about = |opened: &Opened| match opened {
        Ok(open) => Adapter::clone(&open.about),
        Err(about) => Adapter::clone(about),
    };
    let adapters = opened.iter().map(about).collect();
    let mut rigs: Vec<_> = opened.into_iter().flatten().map(Rig::new).collect();
    let mut findings = Findings {
        rows: Vec::new(),
        notes,
        failure: None,
        // Where others were to be measured, too, one device that fails is no failure.
        insists: common.insists_on_gpu() && !args.all_adapters,
    };
    findings.measure_all(args, &rules, &grid, &mut rigs, &interrupt)?;
    let Findings {
        rows,
        notes,
        failure,
        ..
    } = findings;

    let mut report = Report {
        format: Report::format(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        date: jiff::Timestamp::now()
            .strftime("%Y-%m-%d %H:%M UTC")
            .to_string(),
        command: command(),
        system: system(),
        adapters,
        reason,
        hot_caches: args.hot_caches,
        rows,
        break_even: Vec::new(),
        notes,
    };
    report.conclude();

    if let Some(file) = table_file {
        let table = csv(report.rows.iter()).map_err(Failure::Failed)?;
        outputs.get(file).write_all_at(&table, 0)?;
    }
    if let (Some(file), Some(path)) = (picture_file, &args.plot) {
        let picture = plot::draw(&report, path).map_err(Failure::Failed)?;
        outputs.get(file).write_all_at(&picture, 0)?;
    }
    if let Some(file) = page_file {
        let page = page::draw(&report).map_err(Failure::Failed)?;
        outputs.get(file).write_all_at(page.as_bytes(), 0)?;
    }
    interrupt.check()?;
    outputs
        .replace_targets()?
        .iter()
        .for_each(|lost| warn(lost));
    let comparison = old.map(|old| Comparison::new(&old, &report));
    let text = report.to_text()
        + &comparison
            .as_ref()
            .map_or_else(String::new, Comparison::to_text)
        + &page_path.map_or_else(
            || what_next(args),
            |path| format!("written: {}\n", path.display()),
        );
    let report = &report;
    print(common, &Document { report, comparison }, text)?;
    failure.map_or(Ok(()), Err)
}

/// Two lines on what to try after a first look; nothing where somebody has chosen rules or a model.
fn what_next(args: &BenchArgs) -> String {
    if !(args.rule.is_empty() && args.form.is_empty()) || args.model.is_some() {
        return String::new();
    }
    let run = to_run_again();
    format!(
        "\nnext: `{run} bench --model FILE --rule lion,adamw` measures a safetensors model of yours, by other rules\n\
         next: `{run} bench --report DIR` writes a page of all this to send, `{run} step --help` says how to step a model\n"
    )
}

/// The rows of a measurement so far, and why others are missing.
struct Findings {
    rows: Vec<Row>,
    notes: Vec<String>,
    /// The first of a device that somebody insists on, or what has ended the measurement before its time.
    failure: Option<Failure>,
    insists: bool,
}

impl Findings {
    /// Measures every rule at every size. Returns a failure where there is nothing that could be reported before it.
    fn measure_all(
        &mut self,
        args: &BenchArgs,
        rules: &[(String, AnyRule)],
        grid: &Grid,
        rigs: &mut [Rig],
        interrupt: &Interrupt,
    ) -> Result<(), Failure> {
        let cases = grid.len() * rules.len();
        let mut progress = Progress::new((cases * STEPS_PER_CASE) as u64);
        for (rule, config) in rules {
            for (of, sizes) in grid {
                let stored = args.storage.stored(*of);
                let name = format!("{rule}{}", stored.suffix(&config.slots()));
                let case = Case {
                    rule: &name,
                    tensors: sizes.tensors(),
                    numel: sizes.numel(),
                };
                if let Err(shortage) = check_memory(Problem::bytes(case.tensors, case.numel)) {
                    self.give_up(&case, "all devices", Failure::Refused(shortage))?;
                    continue;
                }
                let problem = Problem::new(config.clone(), sizes.to_vec()).stored(stored);
                let setup = Setup {
                    problem: &problem,
                    hot: args.hot_caches,
                    controlled: args.control,
                };
                let budget = Duration::from_secs_f64(args.seconds);
                let mut failed = Vec::new();
                let mut give_up = |device: &str, failure: Failure| {
                    failed.push(device.to_owned());
                    self.give_up(&case, device, failure)
                };
                let paths = measure(&setup, rigs, budget, interrupt, &mut progress, &mut give_up);
                match paths.map(|paths| report::rows(&case, &paths)) {
                    Ok(rows) => self.rows.extend(rows),
                    Err(failure @ Failure::Interrupted(_)) => return Err(failure),
                    Err(failure) if self.rows.is_empty() => return Err(failure),
                    Err(failure) => {
                        self.failure = Some(failure);
                        return Ok(());
                    }
                }
                let has_failed = |rig: &&mut Rig| failed.contains(&rig.open.name());
                rigs.iter_mut().filter(has_failed).for_each(Rig::renew);
            }
        }
        if self.rows.is_empty() {
            let nothing = || anyhow!("nothing was measured: {}", self.notes.join("; "));
            let failure = self.failure.take();
            return Err(failure.unwrap_or_else(|| Failure::Failed(nothing())));
        }
        Ok(())
    }

    /// Leaves a device out of a case in which it has failed, or for which there is no memory.
    fn give_up(&mut self, case: &Case<'_>, device: &str, why: Failure) -> Result<(), Failure> {
        let has_failed = matches!(why, Failure::Failed(_));
        let note = case.without(device, why)?;
        if has_failed && self.insists {
            self.failure
                .get_or_insert(Failure::Failed(anyhow!("{note}")));
        }
        self.notes.push(note);
        Ok(())
    }
}

/// The storage and the elements of each tensor, for every problem.
type Grid = Vec<(StorageType, Sizes)>;

/// The elements of each tensor. They are listed when there is memory for the problem.
enum Sizes {
    /// The tensors of a model, one by one.
    Listed(Vec<usize>),
    /// So many, divided among as many tensors.
    Divided { numel: usize, tensors: usize },
}

impl Sizes {
    fn tensors(&self) -> usize {
        match self {
            Self::Listed(sizes) => sizes.len(),
            Self::Divided { tensors, .. } => *tensors,
        }
    }

    fn numel(&self) -> usize {
        match self {
            Self::Listed(sizes) => sizes
                .iter()
                .fold(0, |sum, numel| sum.saturating_add(*numel)),
            Self::Divided { numel, .. } => *numel,
        }
    }

    fn to_vec(&self) -> Vec<usize> {
        match self {
            Self::Listed(sizes) => sizes.clone(),
            Self::Divided { numel, tensors } => {
                // The first tensors take what does not divide.
                let size = |index| numel / tensors + usize::from(index < numel % tensors);
                (0..*tensors).map(size).collect()
            }
        }
    }
}

/// Sizes by numbers of tensors, or a model's by dtype; and what is to be said of it.
fn grid(args: &BenchArgs) -> Result<(Grid, Vec<String>), Failure> {
    if let Some(path) = &args.model {
        let model = Model::open(path)?.steppable();
        let sizes = |tensors: Vec<(String, Vec<usize>)>| -> Vec<usize> {
            let shapes = tensors.iter().map(|(_, shape)| shape.iter().product());
            shapes.collect()
        };
        let by_type = model.by_type.into_iter();
        let grid: Grid = by_type
            .map(|(of, tensors)| (of, Sizes::Listed(sizes(tensors))))
            .filter(|(_, sizes)| sizes.numel() > 0)
            .collect();
        let path = path.display();
        if grid.is_empty() {
            let refusal = anyhow!("{path} has no tensors of F32, BF16 or F16 to step");
            return Err(refusal.into());
        }
        let left_out = model.left_out;
        let note = format!("{left_out} tensors of {path} are left out: not F32, BF16 or F16");
        return Ok((grid, (left_out > 0).then_some(note).into_iter().collect()));
    }
    let mut grid = Vec::new();
    for tensors in &args.tensors {
        let numels = match args.numel_each {
            Some(numel) => vec![numel.saturating_mul(*tensors)],
            None => args.numel.clone(),
        };
        for numel in numels {
            if numel < *tensors {
                let refusal = anyhow!("{numel} elements do not make {tensors} tensors");
                return Err(refusal.into());
            }
            let sizes = Sizes::Divided {
                numel,
                tensors: *tensors,
            };
            grid.push((StorageType::F32, sizes));
        }
    }
    Ok((grid, Vec::new()))
}

/// Units of progress that a problem is worth.
const STEPS_PER_CASE: usize = 100;

/// Takes note of a device, by name, that has failed.
type GiveUp<'g> = dyn FnMut(&str, Failure) -> Result<(), Failure> + 'g;

/// Checks all paths, then runs them in rounds until the medians are known or the time is up.
fn measure<'a>(
    setup: &Setup<'a>,
    rigs: &'a [Rig],
    budget: Duration,
    interrupt: &Interrupt,
    progress: &mut Progress,
    give_up: &mut GiveUp<'_>,
) -> Result<Vec<Path<'a>>, Failure> {
    progress.advance("check", 0);
    let mut paths = Vec::new();
    for rig in rigs {
        interrupt.check()?;
        match setup.gpu_paths(rig) {
            Ok(found) => paths.extend(found),
            Err(failure) => give_up(&rig.open.name(), failure)?,
        }
    }
    interrupt.check()?;
    match setup.cpu_paths() {
        Ok(found) => paths.extend(found),
        Err(no_room @ Failure::Refused(_)) => give_up("CPU", no_room)?,
        Err(failure) => return Err(failure),
    }
    let warm_up = paths.iter().map(Path::warm_up).max().unwrap_or(0);
    for _ in 0..warm_up {
        interrupt.check()?;
        run_all(&mut paths, false, give_up)?;
    }
    let started = Instant::now();
    let mut done = 0;
    for round in 1.. {
        interrupt.check()?;
        run_all(&mut paths, true, give_up)?;
        let known = |path: &Path<'_>| {
            let median = Median::of(path.samples.iter().map(|sample| sample.wall_ms));
            median.is_some_and(|median| median.uncertainty() < UNCERTAINTY)
        };
        let spent = started.elapsed();
        if round >= MIN_ROUNDS && (spent >= budget || paths.iter().all(known)) {
            break;
        }
        let share = spent.as_secs_f64() / budget.as_secs_f64().max(f64::MIN_POSITIVE);
        let reached = ((share * STEPS_PER_CASE as f64) as usize).min(STEPS_PER_CASE);
        progress.advance("time", reached.saturating_sub(done) as u64);
        done = reached.max(done);
    }
    progress.advance("time", (STEPS_PER_CASE - done) as u64);
    Ok(paths)
}

/// One round. A device that fails drops out with all its paths.
fn run_all(
    paths: &mut Vec<Path<'_>>,
    timed: bool,
    give_up: &mut GiveUp<'_>,
) -> Result<(), Failure> {
    let mut failed = Vec::new();
    for path in paths.iter_mut() {
        if failed.contains(&path.device) {
            continue;
        }
        if let Err(failure) = path.run(timed) {
            if !path.kind.is_gpu() {
                return Err(failure);
            }
            give_up(&path.device, failure)?;
            failed.push(path.device.clone());
        }
    }
    paths.retain(|path| !failed.contains(&path.device));
    Ok(())
}

/// A report that `bench --json` printed before.
fn read_report(path: &FilePath) -> anyhow::Result<Report> {
    #[derive(Deserialize)]
    struct OfAnyFormat {
        format: u32,
    }
    let bytes = read_whole(path)?;
    let no_report = || format!("{} is not a report of bench --json", path.display());
    // First, because another format has other fields.
    let OfAnyFormat { format } = serde_json::from_slice(&bytes).with_context(no_report)?;
    anyhow::ensure!(
        format == Report::format(),
        "{} has format {format}, and this version compares format {}",
        path.display(),
        Report::format()
    );
    serde_json::from_slice(&bytes).with_context(no_report)
}

fn command() -> String {
    let args = std::env::args().skip(1);
    args.fold("wgpu-optim".to_owned(), |line, arg| line + " " + &arg)
}

fn system() -> System {
    let kind = sysinfo::RefreshKind::nothing().with_cpu(sysinfo::CpuRefreshKind::nothing());
    let brand = sysinfo::System::new_with_specifics(kind)
        .ok()
        .and_then(|system| Some(system.cpus().first()?.brand().to_owned()));
    System {
        os: sysinfo::System::long_os_version().unwrap_or_else(|_| std::env::consts::OS.to_owned()),
        arch: std::env::consts::ARCH.to_owned(),
        cpu: brand.unwrap_or_else(|| "unknown".to_owned()),
        threads: rayon::current_num_threads(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use crate::backend::tests::open_gpu;
    use crate::lab::args::BenchForm;

    /// A case with the least rounds.
    fn measured<'a>(
        setup: &Setup<'a>,
        rigs: &'a [Rig],
        interrupt: &Interrupt,
        give_up: &mut GiveUp<'_>,
    ) -> Vec<Path<'a>> {
        let mut progress = Progress::new(1);
        let budget = Duration::ZERO;
        measure(setup, rigs, budget, interrupt, &mut progress, give_up).unwrap()
    }

    fn devices(paths: &[Path<'_>]) -> Vec<String> {
        let mut devices: Vec<_> = paths.iter().map(|path| path.device.clone()).collect();
        devices.dedup();
        devices
    }

    #[test]
    fn a_device_that_fails_leaves_the_others_to_be_measured() {
        let rig = |name: &str| {
            let mut open = open_gpu();
            open.about.full_name = name.to_owned();
            Rig::new(open)
        };
        let mut rigs = [rig("sound"), rig("failing")];
        let config = BenchForm::HeavyBall.config().unwrap();
        let problem = Problem::new(config.into(), vec![4099]);
        let setup = Setup {
            problem: &problem,
            hot: true,
            controlled: false,
        };
        let interrupt = Interrupt::catch().unwrap();
        let case = Case {
            rule: "heavy-ball",
            tensors: 1,
            numel: 4099,
        };
        let mut notes = Vec::new();
        let mut give_up = |device: &str, failure| {
            notes.push(case.without(device, failure)?);
            Ok(())
        };
        let mut paths = measured(&setup, &rigs, &interrupt, &mut give_up);
        assert_eq!(devices(&paths), ["sound", "failing", "CPU"]);
        // While it is timed, and before.
        rigs[1].open.gpu.device.destroy();
        run_all(&mut paths, true, &mut give_up).unwrap();
        assert_eq!(devices(&paths), ["sound", "CPU"]);
        assert_eq!(
            devices(&measured(&setup, &rigs, &interrupt, &mut give_up)),
            ["sound", "CPU"]
        );
        // The next case finds another device.
        drop(paths);
        rigs[1].renew();
        assert_eq!(
            devices(&measured(&setup, &rigs, &interrupt, &mut give_up)),
            ["sound", "failing", "CPU"]
        );
        assert_eq!(notes.len(), 2, "{notes:?}");
        for note in &notes {
            assert!(
                note.starts_with("failing, heavy-ball of 4099 elements: not measured, "),
                "{note}"
            );
        }

        // Nobody goes on with one that is wrong.
        let wrong = case.without("sound", Failure::Wrong(anyhow!("wrong")));
        assert!(matches!(wrong, Err(Failure::Wrong(e)) if e.to_string().starts_with("sound, ")));
    }
    #[test]
    fn a_device_that_somebody_insists_on_fails_the_command_after_the_report() {
        let case = Case {
            rule: "heavy-ball",
            tensors: 1,
            numel: 4099,
        };
        let why: [fn(anyhow::Error) -> Failure; 2] = [Failure::Failed, Failure::Refused];
        for insists in [false, true] {
            for (why, is_failure) in why.into_iter().zip([true, false]) {
                let mut findings = Findings {
                    rows: Vec::new(),
                    notes: Vec::new(),
                    failure: None,
                    insists,
                };
                for reason in ["out of memory", "lost"] {
                    findings
                        .give_up(&case, "GPU", why(anyhow!(reason)))
                        .unwrap();
                }
                let said = "GPU, heavy-ball of 4099 elements: not measured, out of memory";
                assert_eq!(findings.notes.len(), 2);
                assert_eq!(findings.notes[0], said);
                let failure = findings.failure.map(|failure| failure.to_string());
                let expected = (insists && is_failure).then(|| said.to_owned());
                assert_eq!(failure, expected);
            }
        }
    }
}
