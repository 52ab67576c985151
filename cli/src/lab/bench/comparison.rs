//! A report beside an older one: what has become slower or faster.

use std::collections::HashMap;
use std::fmt::Write as _;

use comfy_table::Table;
use serde::Serialize;

use super::paths::Kind;
use super::report::{Report, Row};
use super::timing::Median;

/// A report beside an older one.
#[derive(Debug, Serialize)]
pub struct Comparison {
    /// Date and command of the older one.
    with: String,
    changes: Vec<Change>,
    /// Rows that the older one does not have.
    unmatched: usize,
}

#[derive(Debug, Serialize)]
struct Change {
    rule: String,
    tensors: usize,
    numel: usize,
    device: String,
    path: Kind,
    /// Whether `before` and `now` are shares of the roof (more is better), else milliseconds (less is better).
    by_share: bool,
    before: f64,
    now: f64,
    verdict: Verdict,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Verdict {
    Slower,
    Faster,
    /// The confidence intervals meet.
    Same,
}

impl Change {
    fn new(old: &Row, new: &Row) -> Self {
        let share = |row: &Row| {
            Some(Median {
                median: row.share_of_roof?,
                low: row.share_low?,
                high: row.share_high?,
            })
        };
        let ms = |row: &Row| Median {
            median: row.ms_median,
            low: row.ms_low,
            high: row.ms_high,
        };
        let (by_share, before, now) = match (share(old), share(new)) {
            (Some(old), Some(new)) => (true, old, new),
            _ => (false, ms(old), ms(new)),
        };
        let (less, more) = (now.high < before.low, now.low > before.high);
        Self {
            rule: new.rule.clone(),
            tensors: new.tensors,
            numel: new.numel,
            device: new.device.clone(),
            path: new.path,
            by_share,
            before: before.median,
            now: now.median,
            verdict: match (by_share, less, more) {
                (true, true, _) | (false, _, true) => Verdict::Slower,
                (true, _, true) | (false, true, _) => Verdict::Faster,
                _ => Verdict::Same,
            },
        }
    }
}

impl Comparison {
    /// The changes since an older report, by share of the roof where there is one, because the speed of a shared
    /// machine drifts.
    pub fn new(old: &Report, new: &Report) -> Self {
        let older: HashMap<_, _> = old.rows.iter().map(|row| (row.key(), row)).collect();
        let mut changes = Vec::new();
        let mut unmatched = 0;
        for row in &new.rows {
            match older
                .get(&row.key())
                .filter(|_| new.hot_caches == old.hot_caches)
            {
                Some(old) => changes.push(Change::new(old, row)),
                None => unmatched += 1,
            }
        }
        Self {
            with: format!("{}: {}", old.date, old.command),
            changes,
            unmatched,
        }
    }

    pub fn to_text(&self) -> String {
        let mut table = Table::new();
        table.load_style(comfy_table::presets::UTF8_FULL_CONDENSED);
        table.set_header([
            "path", "device", "rule", "tensors", "numel", "by", "before", "now", "",
        ]);
        for change in &self.changes {
            table.add_row([
                change.path.to_string(),
                change.device.clone(),
                change.rule.clone(),
                change.tensors.to_string(),
                change.numel.to_string(),
                if change.by_share {
                    "share of roof"
                } else {
                    "ms"
                }
                .to_owned(),
                format!("{:.3}", change.before),
                format!("{:.3}", change.now),
                match change.verdict {
                    Verdict::Slower => "slower",
                    Verdict::Faster => "faster",
                    Verdict::Same => "",
                }
                .to_owned(),
            ]);
        }
        let slower = self
            .changes
            .iter()
            .filter(|c| c.verdict == Verdict::Slower)
            .count();
        let mut text = format!(
            "\ncompared with {}: {slower} of {} slower (confidence intervals apart)\n",
            self.with,
            self.changes.len()
        );
        if self.unmatched > 0 {
            let _ = writeln!(text, "{} rows have no counterpart there", self.unmatched);
        }
        if !self.changes.is_empty() {
            let _ = writeln!(text, "{table}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(path: Kind, share: [f64; 3], ms: [f64; 3]) -> Row {
        let [share_of_roof, share_low, share_high] = share.map(Some);
        Row {
            rule: "plain".to_owned(),
            tensors: 1,
            numel: 4,
            device: "d".to_owned(),
            path,
            rounds: 9,
            ms_median: ms[0],
            ms_low: ms[1],
            ms_high: ms[2],
            pass_ms: None,
            record_us: None,
            submit_us: None,
            dispatches: None,
            bytes_per_elem: 12,
            gb_per_s: 1.0,
            share_of_roof,
            share_low,
            share_high,
            speedup_over_cpu: None,
            worst_ulp: None,
        }
    }

    #[test]
    fn only_intervals_that_are_apart_make_a_difference() {
        let old = row(Kind::Fused, [0.95, 0.94, 0.96], [1.0, 0.9, 1.1]);
        for (share, verdict) in [
            ([0.93, 0.92, 0.94], Verdict::Same),
            ([0.90, 0.89, 0.93], Verdict::Slower),
            ([0.98, 0.97, 0.99], Verdict::Faster),
        ] {
            // Whatever the clock says.
            let new = row(Kind::Fused, share, [9.0, 8.0, 10.0]);
            assert_eq!(Change::new(&old, &new).verdict, verdict);
        }
        let no_share = |ms| Row {
            share_of_roof: None,
            ..row(Kind::UploadGrads, [0.0; 3], ms)
        };
        let old = no_share([1.0, 0.9, 1.1]);
        assert_eq!(
            Change::new(&old, &no_share([1.2, 1.1, 1.3])).verdict,
            Verdict::Same
        );
        assert_eq!(
            Change::new(&old, &no_share([1.3, 1.2, 1.4])).verdict,
            Verdict::Slower
        );
        assert_eq!(
            Change::new(&old, &no_share([0.7, 0.6, 0.8])).verdict,
            Verdict::Faster
        );
    }
}
