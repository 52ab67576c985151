//! `variants`: candidates for the momentum kernel side by side, on adapters and in machine code.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::Args;

use crate::adapter::{self, Measured, NUMELS};
use crate::candidates::{self, Candidate};
use crate::figures::Figures;
use crate::kernels::Kernel;
use crate::radv;

#[derive(Debug, Args)]
pub struct VariantsArgs {
    /// Put the table into docs/kernels.md, in place of the one that is there; else it is printed
    #[arg(long)]
    update: bool,
    /// Measure on the adapter of another Vulkan driver too, by its description for the loader
    #[arg(long, value_name = "JSON")]
    also: Vec<PathBuf>,
    /// Measure only the candidates with this text in their names
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        conflicts_with = "update"
    )]
    only: String,
}

/// The families whose figures are in the table.
const FAMILIES: [&str; 2] = ["navi21", "vega20"];

/// The marks around the generated part of a file.
const BEGIN: &str = "<!-- cargo xtask variants -->\n";
const END: &str = "<!-- end of cargo xtask variants -->\n";

pub fn run(args: &VariantsArgs) -> Result<()> {
    let mut measured = vec![adapter::measure(None, &args.only)?];
    for driver in &args.also {
        measured.push(adapter::measure(Some(driver), &args.only)?);
    }
    let candidates = candidates::containing(&args.only)?;
    let machine_code = MachineCode::new(&candidates)?;
    let report = report(&candidates, &measured, machine_code.as_ref());
    if args.update {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/kernels.md");
        let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        let text = with_report(&text, &report)
            .with_context(|| format!("{} has no {BEGIN:?} and {END:?}", file.display()))?;
        fs::write(file, text)?;
    } else {
        write!(io::stdout(), "{report}")?;
    }
    Ok(())
}

/// The figures of every candidate on each of [`FAMILIES`].
struct MachineCode {
    driver: String,
    figures: Vec<Vec<Figures>>,
}

impl MachineCode {
    fn new(candidates: &[Candidate]) -> Result<Option<Self>> {
        let Some(driver_file) = radv::driver_file() else {
            return Ok(None);
        };
        let kernels: Vec<Kernel> = candidates.iter().map(|it| it.kernel.clone()).collect();
        let mut driver = String::new();
        let mut figures = Vec::new();
        for family in FAMILIES {
            let Some(compiled) = radv::compile(&driver_file, family, &kernels)? else {
                return Ok(None);
            };
            driver = compiled.driver;
            figures.push(
                compiled
                    .executables
                    .iter()
                    .map(Figures::new)
                    .collect::<Result<_>>()?,
            );
        }
        Ok(Some(Self { driver, figures }))
    }
}

/// `text` with the generated part replaced.
fn with_report(text: &str, report: &str) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}\n{report}\n{END}{after}"))
}

fn report(
    candidates: &[Candidate],
    measured: &[Measured],
    machine_code: Option<&MachineCode>,
) -> String {
    let mut header = vec!["workgroup x vec4 per invocation".to_owned()];
    for adapter in measured {
        let name = adapter.adapter.split(" (").next().unwrap_or_default();
        for numel in NUMELS {
            header.push(format!("{name}, {}M", numel >> 20));
        }
    }
    if machine_code.is_some() {
        header.extend(FAMILIES.map(str::to_owned));
    }
    let mut table = row(&header);
    table += &row(&vec!["---".to_owned(); header.len()]);
    for (index, candidate) in candidates.iter().enumerate() {
        let mut cells = vec![candidate.kernel.name.clone()];
        for adapter in measured {
            match adapter.shares.get(&candidate.kernel.name) {
                Some(shares) => cells.extend(shares.iter().map(|share| format!("{share:.2}"))),
                None => cells.extend(NUMELS.map(|_| "–".to_owned())),
            }
        }
        for family in machine_code.iter().flat_map(|code| &code.figures) {
            let figures = family[index];
            let per_vec4 =
                |value: u64| value as f64 * 4.0 / f64::from(candidate.elems_per_invocation);
            cells.push(format!(
                "{:.0} / {:.1} / {}",
                per_vec4(figures.instructions),
                per_vec4(figures.inverse_throughput),
                figures.vgprs,
            ));
        }
        table += &row(&cells);
    }
    format!("{}\n{table}", preface(measured, machine_code))
}

/// The lines above the table: command, date, and what was measured where.
fn preface(measured: &[Measured], machine_code: Option<&MachineCode>) -> String {
    let mut text = format!(
        "`cargo xtask variants --update`, {}, version {}, heavy ball:\n\n",
        jiff::Timestamp::now().strftime("%Y-%m-%d"),
        env!("CARGO_PKG_VERSION"),
    );
    for adapter in measured {
        let sizes: Vec<_> = NUMELS
            .iter()
            .zip(adapter.rounds.iter().zip(&adapter.copy_millis))
            .map(|(numel, (rounds, millis))| {
                format!("{}M: {rounds} rounds, copy {millis:.2} ms", numel >> 20)
            })
            .collect();
        text += &format!(
            "- {} ({}): share of the copy kernel, median of the rounds; {}\n",
            adapter.adapter,
            adapter.driver.trim(),
            sizes.join("; ")
        );
    }
    if let Some(code) = machine_code {
        text += &format!(
            "- {} ({}): instructions / inverse throughput in cycles / VGPRs, the first two per four elements\n",
            FAMILIES.join(", "),
            code.driver
        );
    }
    text
}

/// A row in Markdown.
fn row(cells: &[String]) -> String {
    format!("| {} |\n", cells.join(" | "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_takes_the_place_of_the_old_one() {
        let text = |report: &str| format!("# Kernels\n\n{BEGIN}\n{report}\n{END}\nWhat follows.\n");
        let old = text("old\n");
        assert_eq!(with_report(&old, "new\n"), Some(text("new\n")));
        assert_eq!(with_report("# Kernels\n", "new\n"), None);
    }

    #[test]
    fn a_candidate_that_an_adapter_cannot_run_is_shown_as_such() {
        let candidates = candidates::containing("512 x 1").unwrap_or_default();
        let measured = Measured {
            adapter: "Small (x)".to_owned(),
            driver: "y".to_owned(),
            rounds: vec![5, 5],
            copy_millis: vec![1.0, 16.0],
            shares: Default::default(),
        };
        let report = report(&candidates, &[measured], None);
        assert!(report.contains("| Small, 1M | Small, 16M |"), "{report}");
        assert!(report.contains("| 512 x 1 vec4 | – | – |"), "{report}");
    }
}
