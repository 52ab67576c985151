//! The report of a benchmark: as a document and as a table.

use std::fmt::{self, Write as _};

use comfy_table::{CellAlignment, Table};
use serde::{Deserialize, Serialize};

use super::paths::{Kind, Path};
use super::timing::Median;
use crate::Failure;
use crate::backend::Adapter;

/// Version of the report's format, see `cli/schema/bench.json`.
const FORMAT: u32 = 2;

/// Wall clock and timestamps that differ by more than this are worth a line.
const CLOCKS_DIFFER: f64 = 0.2;

#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    pub format: u32,
    pub version: String,
    /// When it was made, in UTC.
    pub date: String,
    pub command: String,
    pub system: System,
    pub adapters: Vec<Adapter>,
    /// Why these.
    pub reason: String,
    /// Whether buffers were left in the caches; else copies of them are cycled.
    pub hot_caches: bool,
    pub rows: Vec<Row>,
    pub break_even: Vec<BreakEven>,
    pub notes: Vec<String>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct System {
    pub os: String,
    pub arch: String,
    pub cpu: String,
    pub threads: usize,
}

/// One path through one problem.
#[derive(Debug, Serialize, Deserialize)]
pub struct Row {
    /// The rule that was stepped: a form of momentum, or a rule as it was typed.
    pub rule: String,
    pub tensors: usize,
    /// Elements of all tensors.
    pub numel: usize,
    pub device: String,
    pub path: Kind,
    pub rounds: usize,
    /// Wall clock, with the 95% confidence interval of the median.
    pub ms_median: f64,
    pub ms_low: f64,
    pub ms_high: f64,
    /// Median of the time between the timestamps at the two ends of the pass.
    pub pass_ms: Option<f64>,
    /// Medians of the CPU time of recording and of submitting.
    pub record_us: Option<f64>,
    pub submit_us: Option<f64>,
    pub dispatches: Option<usize>,
    pub bytes_per_elem: u64,
    pub gb_per_s: f64,
    /// Time of the roof (copy kernel or stream) over this one's, round by round, with its interval.
    pub share_of_roof: Option<f64>,
    pub share_low: Option<f64>,
    pub share_high: Option<f64>,
    /// Time of the CPU twin over this one's, round by round.
    pub speedup_over_cpu: Option<f64>,
    /// Largest error of three checked steps.
    pub worst_ulp: Option<f64>,
}

/// The number of elements from which on a step is faster on an adapter than on the CPU.
#[derive(Debug, Serialize, Deserialize)]
pub struct BreakEven {
    pub rule: String,
    pub tensors: usize,
    pub device: String,
    /// Whether the gradients are uploaded before and the parameters downloaded after each step.
    pub with_transfers: bool,
    /// None if it is not within the sizes measured.
    pub numel: Option<f64>,
}

/// The measurements of one problem.
pub struct Case<'a> {
    pub rule: &'a str,
    pub tensors: usize,
    pub numel: usize,
}

impl Case<'_> {
    /// A note in place of the rows of a device that has failed in this case, or of those of all.
    ///
    /// # Errors
    /// By name, where it has computed something wrong.
    pub fn without(&self, device: &str, failure: Failure) -> Result<String, Failure> {
        let what = format!("{device}, {} of {} elements", self.rule, self.numel);
        match failure {
            Failure::Failed(error) | Failure::Refused(error) => {
                Ok(format!("{what}: not measured, {error:#}"))
            }
            failure => Err(failure.context(&what)),
        }
    }
}

/// The rows of a case's paths, which were run in turn.
pub fn rows(case: &Case<'_>, paths: &[Path<'_>]) -> Vec<Row> {
    let find = |kind: Kind, device: Option<&str>| {
        let mut paths = paths.iter();
        paths.find(|path| path.kind == kind && device.is_none_or(|d| path.device == d))
    };
    // Round by round, so that a drift of the machine cancels.
    let ratio = |of: Option<&Path<'_>>, path: &Path<'_>| {
        let pairs = of?.samples.iter().zip(&path.samples);
        Median::of(pairs.map(|(of, path)| of.wall_ms / path.wall_ms))
    };
    let row = |path: &Path<'_>| {
        let ms = Median::of(path.samples.iter().map(|sample| sample.wall_ms))?;
        let gpu = || path.samples.iter().filter_map(|sample| sample.gpu);
        let median = |values: Option<Median>| values.map(|values| values.median);
        let roof = path
            .kind
            .roof()
            .and_then(|roof| find(roof, Some(&path.device)));
        let share = ratio(roof, path);
        let step = path.kind.is_step() && path.kind != Kind::CpuTwin;
        let cpu = find(Kind::CpuTwin, None).filter(|_| step);
        Some(Row {
            rule: case.rule.to_owned(),
            tensors: case.tensors,
            numel: case.numel,
            device: path.device.clone(),
            path: path.kind,
            rounds: path.samples.len(),
            ms_median: ms.median,
            ms_low: ms.low,
            ms_high: ms.high,
            pass_ms: median(Median::of(gpu().filter_map(|sample| sample.pass_ms))),
            record_us: median(Median::of(gpu().map(|sample| sample.record_us))),
            submit_us: median(Median::of(gpu().map(|sample| sample.submit_us))),
            dispatches: path.dispatches,
            bytes_per_elem: path.bytes_per_elem,
            gb_per_s: (path.bytes_per_elem * case.numel as u64) as f64 / (ms.median * 1e6),
            share_of_roof: share.map(|share| share.median),
            share_low: share.map(|share| share.low),
            share_high: share.map(|share| share.high),
            speedup_over_cpu: median(ratio(cpu, path)),
            worst_ulp: path.worst_ulp,
        })
    };
    paths.iter().filter_map(row).collect()
}

impl Row {
    /// Everything but the numbers: what two reports have in common.
    pub fn key(&self) -> (&str, usize, usize, &str, Kind) {
        (
            &self.rule,
            self.tensors,
            self.numel,
            &self.device,
            self.path,
        )
    }

    fn same_case(&self, other: &Self) -> bool {
        (&self.rule, self.tensors, self.numel) == (&other.rule, other.tensors, other.numel)
    }
}

impl Report {
    pub const fn format() -> u32 {
        FORMAT
    }

    /// Fills in what follows from the rows.
    pub fn conclude(&mut self) {
        self.break_even = self.break_evens();
        self.notes.extend(self.clock_notes());
    }

    fn clock_notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        for adapter in &self.adapters {
            let device = &adapter.full_name;
            let fused = || {
                let rows = self.rows.iter();
                rows.filter(|row| row.device == *device && row.path == Kind::Fused)
            };
            if fused().next().is_none() {
                continue;
            }
            if fused().all(|row| row.pass_ms.is_none()) {
                notes.push(format!("{device} has no timestamps: wall clock only"));
            } else if fused().all(|row| row.pass_ms == Some(0.0)) {
                notes.push(format!(
                    "{device} writes timestamps of zero: wall clock only"
                ));
            } else {
                let far = |row: &&Row| {
                    let pass = row.pass_ms.unwrap_or(0.0);
                    (row.ms_median - pass).abs() > CLOCKS_DIFFER * row.ms_median
                };
                for row in fused().filter(far) {
                    notes.push(format!(
                        "{device}, {} of {} elements: {:.3} ms by timestamps, {:.3} ms by the wall clock",
                        row.rule,
                        row.numel,
                        row.pass_ms.unwrap_or(0.0),
                        row.ms_median
                    ));
                }
            }
        }
        notes
    }

    fn break_evens(&self) -> Vec<BreakEven> {
        let ms = |like: &Row, path: Kind, device: Option<&str>| {
            let mut rows = self.rows.iter().filter(|row| row.same_case(like));
            rows.find(|row| row.path == path && device.is_none_or(|d| row.device == d))
                .map(|row| row.ms_median)
        };
        let mut found: Vec<BreakEven> = Vec::new();
        for first in self.rows.iter().filter(|row| row.path == Kind::Fused) {
            for with_transfers in [false, true] {
                let known = found.iter().any(|known| {
                    (
                        &known.rule,
                        known.tensors,
                        &known.device,
                        known.with_transfers,
                    ) == (&first.rule, first.tensors, &first.device, with_transfers)
                });
                // Elements, and by how much the GPU is ahead, of each size.
                let mut sizes: Vec<(f64, f64)> = Vec::new();
                for row in &self.rows {
                    let same = row.path == Kind::Fused
                        && (&row.rule, row.tensors, &row.device)
                            == (&first.rule, first.tensors, &first.device);
                    let device = Some(first.device.as_str());
                    let transfers = [Kind::UploadGrads, Kind::DownloadParams]
                        .into_iter()
                        .filter_map(|path| ms(row, path, device).filter(|_| with_transfers))
                        .sum::<f64>();
                    if let Some(cpu) = ms(row, Kind::CpuTwin, None).filter(|_| same) {
                        sizes.push((row.numel as f64, cpu / (row.ms_median + transfers)));
                    }
                }
                if !known && sizes.len() > 1 {
                    found.push(BreakEven {
                        rule: first.rule.clone(),
                        tensors: first.tensors,
                        device: first.device.clone(),
                        with_transfers,
                        numel: crossing(sizes),
                    });
                }
            }
        }
        found
    }

    /// The machine, line by line: GPU or CPU, and what is known of it.
    pub fn machine(&self) -> Vec<(&'static str, String)> {
        let mut lines = Vec::new();
        for adapter in &self.adapters {
            let Adapter {
                number,
                name,
                backend,
                device_type,
                driver,
                ..
            } = adapter;
            let about = format!("{number}: {name} ({backend}, {device_type}), {driver}");
            lines.push(("GPU", about));
            if let Some(error) = &adapter.error {
                lines.push(("", format!("not measured: {error}")));
            }
        }
        let System {
            os,
            arch,
            cpu,
            threads,
        } = &self.system;
        lines.push(("CPU", format!("{cpu}, {threads} threads, {arch} {os}")));
        lines.push(("", format!("({})", self.reason)));
        lines
    }

    /// The rows of each case, under a heading.
    pub fn cases(&self) -> impl Iterator<Item = (String, &[Row])> {
        self.rows.chunk_by(Row::same_case).map(|case| {
            let Row {
                rule,
                numel,
                tensors,
                rounds,
                ..
            } = &case[0];
            let plural = if *tensors == 1 { "" } else { "s" };
            let caches = if self.hot_caches { "hot" } else { "cold" };
            let heading = format!(
                "{rule}, {numel} elements in {tensors} tensor{plural}; medians of {rounds} rounds, {caches} caches"
            );
            (heading, case)
        })
    }

    pub fn to_text(&self) -> String {
        let mut text = format!(
            "wgpu-optim {}, {}: {}\n",
            self.version, self.date, self.command
        );
        // Writing to a string cannot fail.
        for (of, about) in self.machine() {
            let _ = writeln!(text, "{of:<5}{about}");
        }
        for (heading, rows) in self.cases() {
            let _ = writeln!(text, "\n{heading}\n{}", table(rows));
        }
        for verdict in &self.break_even {
            let _ = writeln!(text, "{verdict}");
        }
        for note in &self.notes {
            let _ = writeln!(text, "note: {note}");
        }
        text
    }
}

impl fmt::Display for BreakEven {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tensors = match self.tensors {
            1 => String::new(),
            tensors => format!(" of {tensors} tensors"),
        };
        let data = match self.with_transfers {
            true => "gradients uploaded and parameters downloaded each step",
            false => "data on the GPU",
        };
        let verdict = match self.numel {
            Some(numel) => format!("ahead of the CPU from {numel:.0} elements on"),
            None => "not ahead of the CPU at the largest size here".to_owned(),
        };
        let (rule, device) = (&self.rule, &self.device);
        write!(f, "{rule}{tensors} on {device}, {data}: {verdict}")
    }
}

/// The size at which a ratio that grows with it crosses one for good, on logarithmic scales.
fn crossing(mut sizes: Vec<(f64, f64)>) -> Option<f64> {
    sizes.sort_by(|x, y| x.0.total_cmp(&y.0));
    let ahead = sizes
        .iter()
        .rev()
        .take_while(|(_, ratio)| *ratio >= 1.0)
        .count();
    let first = *sizes.get(sizes.len() - ahead)?;
    let Some(before) = (sizes.len() - ahead)
        .checked_sub(1)
        .map(|index| sizes[index])
    else {
        return Some(first.0);
    };
    let share = before.1.ln() / (before.1.ln() - first.1.ln());
    Some((before.0.ln() + share * (first.0.ln() - before.0.ln())).exp())
}

/// The heads of a table's columns; all but those of words are of numbers.
pub const COLUMNS: [&str; 11] = [
    "path",
    "device",
    "ms",
    "±",
    "GPU ms",
    "record µs",
    "submit µs",
    "GB/s",
    "of roof",
    "x CPU",
    "worst ULP",
];

/// The columns of words, which come first.
pub const WORDS: usize = 2;

impl Row {
    /// The row of a table.
    pub fn cells(&self) -> [String; COLUMNS.len()] {
        let cell = |value: Option<f64>, decimals: usize| {
            value.map_or_else(String::new, |value| format!("{value:.decimals$}"))
        };
        let ms = Median {
            median: self.ms_median,
            low: self.ms_low,
            high: self.ms_high,
        };
        [
            self.path.to_string(),
            self.device.clone(),
            format!("{:.3}", self.ms_median),
            format!("{:.0}%", 100.0 * ms.uncertainty()),
            cell(self.pass_ms.filter(|ms| *ms > 0.0), 3),
            cell(self.record_us, 0),
            cell(self.submit_us, 0),
            format!("{:.1}", self.gb_per_s),
            cell(self.share_of_roof, 2),
            cell(self.speedup_over_cpu, 2),
            cell(self.worst_ulp, 2),
        ]
    }
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::UTF8_FULL_CONDENSED);
    table.set_header(COLUMNS);
    for row in rows {
        table.add_row(row.cells());
    }
    for column in table.column_iter_mut().skip(WORDS) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_crossing_lies_where_the_lines_meet() {
        // Ahead by the size over 4096, then not at all, then always.
        let line = |numel: f64| (numel, numel / 4096.0);
        let sizes = [1024.0, 16384.0, 65536.0].map(line).to_vec();
        let crossing_at = crossing(sizes);
        assert!(crossing_at.is_some_and(|numel| (numel - 4096.0).abs() < 1e-6));
        assert_eq!(crossing(vec![(1024.0, 0.1), (2048.0, 0.9)]), None);
        assert_eq!(crossing(vec![(2048.0, 3.0), (1024.0, 1.5)]), Some(1024.0));
        // Ahead once, but not for good.
        assert_eq!(crossing(vec![(1024.0, 2.0), (2048.0, 0.5)]), None);
    }
}
