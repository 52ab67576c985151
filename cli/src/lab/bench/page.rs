//! A report as a page that a person can send: one file, which fetches nothing.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::plot;
use super::report::{COLUMNS, Report, Row, WORDS};

/// The name of the page in its folder.
const NAME: &str = "bench.html";

const STYLE: &str = "body{font:15px/1.5 sans-serif;color:#222;background:#fff;max-width:960px;margin:2em auto;padding:0 1em}\
    h2{font-size:1em;margin:2em 0 .5em}svg{max-width:100%;height:auto}.wide{overflow-x:auto}\
    table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.2em .6em;text-align:left;white-space:nowrap}\
    td.number,th.number{text-align:right}code{background:#f3f3f3;padding:.1em .3em}";

/// The file of the page in a folder, which is created if missing.
pub fn place(folder: &Path) -> Result<PathBuf> {
    fs::create_dir_all(folder)
        .with_context(|| format!("cannot write into {}", folder.display()))?;
    Ok(folder.join(NAME))
}

/// The page: machine, command, chart and tables for people, and the report itself for programs.
pub fn draw(report: &Report) -> Result<String> {
    let title = format!("wgpu-optim {} on {}", report.version, devices(report));
    // Nothing in it may end the element that it stands in.
    let document = serde_json::to_string(report)?.replace('<', "\\u003c");
    let chart = plot::svg(report)?;
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width";
                title { (title) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                h1 { (title) }
                p { "Measured " (report.date) " by " code { (report.command) } }
                table {
                    @for (of, about) in report.machine() {
                        tr { th { (of) } td { (about) } }
                    }
                }
                (PreEscaped(chart))
                @for (heading, rows) in report.cases() {
                    h2 { (heading) }
                    div.wide { (table(rows)) }
                }
                ul {
                    @for verdict in &report.break_even { li { (verdict.to_string()) } }
                    @for note in &report.notes { li { (note) } }
                }
                script id="report" type="application/json" { (PreEscaped(document)) }
            }
        }
    };
    Ok(page.into_string())
}

/// The devices that were measured, the adapters before the CPU.
fn devices(report: &Report) -> String {
    let measured = report.adapters.iter();
    let measured = measured.filter(|adapter| adapter.error.is_none());
    let mut devices: Vec<_> = measured.map(|adapter| adapter.name.as_str()).collect();
    devices.push(&report.system.cpu);
    devices.join(", ")
}

fn table(rows: &[Row]) -> Markup {
    let class = |column: usize| (column >= WORDS).then_some("number");
    html! {
        table {
            tr {
                @for (column, head) in COLUMNS.iter().enumerate() {
                    th class=[class(column)] { (head) }
                }
            }
            @for row in rows {
                tr {
                    @for (column, cell) in row.cells().iter().enumerate() {
                        td class=[class(column)] { (cell) }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn what_a_machine_says_of_itself_is_text() {
        let hostile = "</script><b>&amp;\"";
        let report = serde_json::json!({
            "format": Report::format(),
            "version": "0", "date": hostile, "command": hostile,
            "system": {"os": hostile, "arch": hostile, "cpu": hostile, "threads": 1},
            "adapters": [{"name": hostile, "driver": hostile}],
            "reason": hostile, "hot_caches": false,
            "rows": [{
                "rule": hostile, "tensors": 1, "numel": 1024, "device": hostile, "path": "cpu-twin", "rounds": 6,
                "ms_median": 1.0, "ms_low": 1.0, "ms_high": 1.0, "bytes_per_elem": 20, "gb_per_s": 1.0,
            }],
            "break_even": [], "notes": [hostile],
        });
        let page = draw(&serde_json::from_value(report).unwrap()).unwrap();
        assert!(!page.contains("<b>"), "{page}");
        assert!(
            page.contains("<li>&lt;/script&gt;&lt;b&gt;&amp;amp;&quot;</li>"),
            "{page}"
        );
        // The report is what stands between the only tags of that name.
        let (_, script) = page.split_once("type=\"application/json\">").unwrap();
        let (script, rest) = script.split_once("</script>").unwrap();
        assert_eq!(rest, "</body></html>");
        let read: Report = serde_json::from_str(script).unwrap();
        assert_eq!(read.notes, [hostile]);
    }
}
