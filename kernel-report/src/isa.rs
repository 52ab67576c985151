//! `isa`: the kernels as machine code for real GPUs, against the recorded figures.

use std::io::{self, Write as _};
use std::path::Path;
use std::{fs, iter, thread};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use clap::Args;
use comfy_table::{CellAlignment, Table};

use crate::figures::{Figures, Sense};
use crate::{kernels, radv};

#[derive(Debug, Args)]
pub struct IsaArgs {
    /// Compare with the recorded figures, and fail where one got worse
    #[arg(long, conflicts_with_all = ["update", "dump"])]
    check: bool,
    /// Record the figures
    #[arg(long, conflicts_with = "dump")]
    update: bool,
    /// Print the assembly of one kernel, such as `navi21 heavy_ball.vec4.immediates`
    #[arg(long, num_args = 2, value_names = ["FAMILY", "KERNEL"])]
    dump: Option<Vec<String>>,
}

pub fn run(args: &IsaArgs) -> Result<()> {
    let Some(driver) = radv::driver_file() else {
        eprintln!("isa: skipped, Mesa's RADV is not on this machine (mesa-vulkan-drivers)");
        return Ok(());
    };
    if let Some([family, kernel]) = args.dump.as_deref() {
        return dump(&driver, family, kernel);
    }
    let Some(measured) = FigureTable::measure(&driver)? else {
        eprintln!("isa: skipped, this machine's RADV has no null device of every family");
        return Ok(());
    };
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("isa.csv");
    if args.update {
        fs::write(&file, measured.to_csv()?)?;
        eprintln!("isa: {} figures in {}", measured.rows.len(), file.display());
    } else if args.check {
        let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        let recorded = FigureTable::parse(&text)?;
        if recorded.driver != measured.driver {
            eprintln!(
                "isa: skipped, the recorded figures are of {}, and this machine has {}",
                recorded.driver, measured.driver
            );
            return Ok(());
        }
        let better = recorded.check(&measured)?;
        eprintln!(
            "isa: {} kernels are no worse than recorded",
            measured.rows.len()
        );
        if better > 0 {
            eprintln!(
                "isa: {better} figures are better than recorded; `cargo xtask isa --update` records them"
            );
        }
    } else {
        writeln!(io::stdout(), "{}\n{}", measured.driver, measured.to_text())?;
    }
    Ok(())
}

fn dump(driver: &Path, family: &str, kernel: &str) -> Result<()> {
    ensure!(
        radv::FAMILIES.contains(&family),
        "{family:?} is none of {}",
        radv::FAMILIES.join(", ")
    );
    let kernels = kernels::all()?;
    let names: Vec<_> = kernels.iter().map(|kernel| kernel.name.as_str()).collect();
    let Some(index) = names.iter().position(|name| *name == kernel) else {
        bail!("{kernel:?} is none of\n{}", names.join("\n"));
    };
    let compiled = radv::compile(driver, family, &kernels[index..=index])?;
    let compiled = compiled.with_context(|| format!("RADV has no null device for {family}"))?;
    for executable in compiled.executables {
        writeln!(io::stdout(), "{}", executable.assembly)?;
    }
    Ok(())
}

/// The figures of all kernels on all families.
#[derive(Clone, Debug, PartialEq, Eq)]
struct FigureTable {
    /// Driver and version.
    driver: String,
    rows: Vec<Row>,
}

/// Family, kernel, figures.
type Row = (String, String, Figures);

impl FigureTable {
    fn measure(driver: &Path) -> Result<Option<Self>> {
        let kernels = kernels::all()?;
        let mut table = Self {
            driver: String::new(),
            rows: Vec::new(),
        };
        // Each family has a process of its own, so they need not wait for each other.
        let compile = |family| radv::compile(driver, family, &kernels);
        let of_families = thread::scope(|scope| {
            let threads = radv::FAMILIES.map(|family| scope.spawn(move || compile(family)));
            threads.map(|thread| thread.join())
        });
        for (family, compiled) in iter::zip(radv::FAMILIES, of_families) {
            let compiled = compiled.map_err(|_| anyhow!("compiling for {family} panicked"))?;
            let Some(compiled) = compiled? else {
                return Ok(None);
            };
            for executable in &compiled.executables {
                let figures = Figures::new(executable)?;
                table
                    .rows
                    .push((family.to_owned(), executable.kernel.clone(), figures));
            }
            table.driver = compiled.driver;
        }
        Ok(Some(table))
    }

    fn header() -> Vec<&'static str> {
        let columns = Figures::default().named().map(|(name, ..)| name);
        ["family", "kernel"].into_iter().chain(columns).collect()
    }

    /// A line that names the driver, then CSV.
    fn to_csv(&self) -> Result<String> {
        let mut csv = csv::Writer::from_writer(format!("# {}\n", self.driver).into_bytes());
        csv.write_record(Self::header())?;
        for row in &self.rows {
            csv.write_record(cells(row))?;
        }
        Ok(String::from_utf8(csv.into_inner()?)?)
    }

    fn parse(text: &str) -> Result<Self> {
        let (driver, csv) = text.split_once('\n').unwrap_or((text, ""));
        let driver = driver.strip_prefix("# ");
        let driver = driver.context("the recorded figures do not name their driver")?;
        let mut csv = csv::Reader::from_reader(csv.as_bytes());
        let header: Vec<_> = csv.headers()?.iter().map(str::to_owned).collect();
        ensure!(
            header == Self::header(),
            "the recorded figures have the columns {header:?}, and {:?} are expected",
            Self::header()
        );
        let rows = csv
            .records()
            .map(|record| Ok(record?.deserialize(None)?))
            .collect::<Result<_>>()?;
        Ok(Self {
            driver: driver.to_owned(),
            rows,
        })
    }

    /// How many figures of `measured` are better than these.
    ///
    /// An error names every kernel that only one of them has, and every figure that got worse.
    fn check(&self, measured: &Self) -> Result<usize> {
        let mut complaints = Vec::new();
        let mut better = 0;
        for (family, kernel, expected) in &self.rows {
            let Some(actual) = measured.get(family, kernel) else {
                complaints.push(format!(
                    "{family} {kernel}: recorded, and not there any more"
                ));
                continue;
            };
            for ((column, actual, sense), (_, expected, _)) in
                iter::zip(actual.named(), expected.named())
            {
                if actual > expected || (actual < expected && sense == Sense::Exact) {
                    complaints.push(format!(
                        "{family} {kernel} {column}: expected {expected}, actual {actual}"
                    ));
                } else if actual < expected {
                    better += 1;
                }
            }
        }
        for (family, kernel, _) in &measured.rows {
            if self.get(family, kernel).is_none() {
                complaints.push(format!("{family} {kernel}: not recorded"));
            }
        }
        ensure!(
            complaints.is_empty(),
            "{}\nAfter a change that is meant, `cargo xtask isa --update` records the figures.",
            complaints.join("\n")
        );
        Ok(better)
    }

    fn get(&self, family: &str, kernel: &str) -> Option<&Figures> {
        self.rows
            .iter()
            .find(|row| row.0 == family && row.1 == kernel)
            .map(|(.., figures)| figures)
    }

    fn to_text(&self) -> String {
        let mut table = Table::new();
        table.load_style(comfy_table::presets::UTF8_FULL_CONDENSED);
        table.set_header(Self::header());
        for row in &self.rows {
            table.add_row(cells(row));
        }
        for column in table.column_iter_mut().skip(2) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table.to_string()
    }
}

fn cells((family, kernel, figures): &Row) -> impl Iterator<Item = String> {
    let values = figures.named().map(|(_, value, _)| value.to_string());
    [family.clone(), kernel.clone()].into_iter().chain(values)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn recorded() -> FigureTable {
        FigureTable::parse(include_str!("../isa.csv")).unwrap()
    }

    #[test]
    fn the_recorded_momentum_kernel_keeps_its_promises() {
        let recorded = recorded();
        for (family, max_inverse_throughput) in [("navi21", 44), ("vega20", 77)] {
            let figures = recorded.get(family, "heavy_ball.vec4.immediates").unwrap();
            assert_eq!((figures.loads_16, figures.stores_16), (3, 2));
            let others = figures.loads_4 + figures.stores_4 + figures.other_accesses;
            assert_eq!((others, figures.waits, figures.spills), (0, 0, 0));
            assert!(figures.instructions <= 37, "{family} {figures:?}");
            assert!(
                figures.inverse_throughput <= max_inverse_throughput,
                "{family} {figures:?}"
            );
        }
    }

    #[test]
    fn the_recorded_adamw_kernel_keeps_its_promises() {
        let recorded = recorded();
        for family in ["navi21", "vega20"] {
            let figures = recorded.get(family, "adamw.vec4.immediates").unwrap();
            assert_eq!((figures.loads_16, figures.stores_16), (4, 3));
            let others = figures.loads_4 + figures.stores_4 + figures.other_accesses;
            assert_eq!((others, figures.waits, figures.spills), (0, 0, 0));
        }
    }

    #[test]
    fn no_recorded_kernel_spills_or_waits_between_loads_or_accesses_more_than_its_tensors() {
        let kernels = kernels::all().unwrap().into_iter();
        let accesses: HashMap<_, _> = kernels
            .map(|kernel| (kernel.name, kernel.accesses))
            .collect();
        for (family, kernel, figures) in recorded().rows {
            let row = format!("{family} {kernel} {figures:?}");
            assert_eq!(figures.spills, 0, "{row}");
            // A loop of 16-byte loads, with the ends of a run beside it, and sums to store.
            if kernel.starts_with("norm_") {
                assert!(figures.loads_16 >= 1, "{row}");
                continue;
            }
            // Ends of 16 bits read the words that they write half of.
            let is_wide = kernel.contains("f16");
            if is_wide && kernel.contains("scalar.") {
                assert_eq!((figures.loads_16, figures.stores_16), (0, 0), "{row}");
                continue;
            }
            // The tensors of a batch follow each other, with waits between them.
            let tensors = if kernel.contains(".batch") {
                kernels::BATCH as u64
            } else {
                // Parameters are unpacked in a branch of a tensor's first step, before other loads.
                let has_first_step = kernel.contains("_masters");
                assert!(figures.waits == 0 || has_first_step, "{row}");
                1
            };
            let [loads, stores] = accesses[&kernel].map(|accesses| accesses * tensors);
            let expected = if kernel.contains("_sums.") {
                // Sums are stored four at a time, and nothing else is.
                match kernel.contains("scalar.") {
                    true => [0, 1, loads, 0, 0],
                    false => [loads, 1, 0, 0, 0],
                }
            } else if kernel.contains("scalar.") {
                [0, 0, loads, stores, 0]
            } else {
                [loads, stores, 0, 0, 0]
            };
            let actual = [
                figures.loads_16,
                figures.stores_16,
                figures.loads_4,
                figures.stores_4,
                figures.other_accesses,
            ];
            assert_eq!(actual, expected, "{row}");
        }
    }

    #[test]
    fn a_table_comes_back_from_its_file() {
        let recorded = recorded();
        assert_eq!(recorded.to_csv().unwrap(), include_str!("../isa.csv"));
        assert_eq!(
            recorded.rows.len(),
            radv::FAMILIES.len() * kernels::all().unwrap().len()
        );
    }

    #[test]
    fn a_check_names_what_got_worse() {
        let recorded = recorded();
        assert_eq!(recorded.check(&recorded).unwrap(), 0);

        let mut better = recorded.clone();
        better.rows[0].2.instructions -= 1;
        assert_eq!(recorded.check(&better).unwrap(), 1);

        let mut worse = recorded.clone();
        worse.rows[0].2.latency += 1;
        let (family, kernel, figures) = worse.rows[0].clone();
        let message = recorded.check(&worse).unwrap_err().to_string();
        let (expected, actual) = (figures.latency - 1, figures.latency);
        let complaint =
            format!("{family} {kernel} latency: expected {expected}, actual {actual}\n");
        assert!(message.starts_with(&complaint), "{message}");

        // Fewer accesses are no improvement: something is not updated.
        let mut wrong = recorded.clone();
        wrong.rows[0].2.stores_16 -= 1;
        let message = recorded.check(&wrong).unwrap_err().to_string();
        assert!(
            message.contains("stores_16: expected 2, actual 1"),
            "{message}"
        );

        let mut fewer = recorded.clone();
        let (family, kernel, _) = fewer.rows.remove(0);
        let message = recorded.check(&fewer).unwrap_err().to_string();
        let complaint = format!("{family} {kernel}: recorded, and not there");
        assert!(message.contains(&complaint), "{message}");
        let message = fewer.check(&recorded).unwrap_err().to_string();
        let complaint = format!("{family} {kernel}: not recorded");
        assert!(message.contains(&complaint), "{message}");
    }

    #[test]
    fn a_file_that_is_not_a_table_is_refused() {
        let message = |text| FigureTable::parse(text).unwrap_err().to_string();
        assert!(message("family,kernel\n").contains("do not name their driver"));
        assert!(message("# radv\nfamily,kernel\n").contains("have the columns"));
    }
}
