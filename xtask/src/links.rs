//! Checks the relative links of every Markdown file: that their targets exist, and that anchors are headings there.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The files below a folder whose names end in `.md`, those in hidden folders and build outputs left out.
fn markdown_files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    let files = entries.flat_map(|entry| {
        let name = entry.file_name().into_string().unwrap();
        let path = entry.path();
        if entry.file_type().unwrap().is_dir() {
            let is_left_out = name == "target" || name.starts_with('.');
            return if is_left_out {
                Vec::new()
            } else {
                markdown_files(&path)
            };
        }
        if name.ends_with(".md") {
            vec![path]
        } else {
            Vec::new()
        }
    });
    files.collect()
}

/// The lines that are no code.
fn prose(text: &str) -> impl Iterator<Item = &str> {
    let mut is_code = false;
    text.lines().filter(move |line| {
        let is_fence = line.trim_start().starts_with("```");
        is_code ^= is_fence;
        !is_code && !is_fence
    })
}

/// The text of no code, in parts.
fn outside_code(text: &str) -> impl Iterator<Item = &str> {
    prose(text).flat_map(|line| line.split('`').step_by(2))
}

/// The labels that a text defines, and their targets.
fn definitions(text: &str) -> HashMap<&str, &str> {
    let lines = prose(text).filter_map(|line| line.strip_prefix('['));
    lines.filter_map(|line| line.split_once("]: ")).collect()
}

/// The targets of links and images, by path or by label. A label that is not defined is an error.
fn targets(text: &str) -> Result<Vec<&str>, String> {
    let definitions = definitions(text);
    // A link's text may be code: then the part behind it begins with its end.
    let after = |start, end| {
        let starts = outside_code(text).flat_map(move |part| part.split(start).skip(1));
        starts
            .filter_map(move |rest| rest.split_once(end))
            .map(|(target, _)| target)
    };
    let by_label = after("][", ']').map(|label| {
        let target = definitions.get(label).copied();
        target.ok_or_else(|| format!("[{label}] is not defined"))
    });
    after("](", ')').map(Ok).chain(by_label).collect()
}

/// The anchors that GitHub gives the headings of a text.
fn anchors(text: &str) -> Vec<String> {
    let mut seen = HashMap::<_, usize>::new();
    let headings = prose(text).filter(|line| line.starts_with('#'));
    let anchors = headings.map(|heading| {
        let words = heading.trim_start_matches('#').trim().to_lowercase();
        let is_kept = |c: &char| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_');
        let anchor = words
            .chars()
            .filter(is_kept)
            .collect::<String>()
            .replace(' ', "-");
        let before = seen.entry(anchor.clone()).or_default();
        *before += 1;
        if *before == 1 {
            anchor
        } else {
            format!("{anchor}-{}", *before - 1)
        }
    });
    anchors.collect()
}

/// What is wrong with a link of a file.
fn fault(file: &Path, target: &str) -> Option<String> {
    if target.contains("://") {
        return None;
    }
    let (path, anchor) = target
        .split_once('#')
        .map_or((target, None), |(path, anchor)| (path, Some(anchor)));
    let path = match path {
        "" => file.to_owned(),
        path => file.parent().unwrap().join(path),
    };
    if !path.exists() {
        return Some("leads nowhere".to_owned());
    }
    let anchors = anchor.map(|anchor| (anchor, anchors(&fs::read_to_string(&path).unwrap())));
    let (anchor, anchors) = anchors?;
    let is_there = anchors.iter().any(|heading| heading == anchor);
    (!is_there).then(|| format!("names none of the headings {anchors:?}"))
}

#[test]
fn relative_links_lead_to_files_and_headings() {
    let files = markdown_files(&crate::root());
    let mut links = 0;
    let mut faults = Vec::new();
    for file in &files {
        let text = fs::read_to_string(file).unwrap();
        match targets(&text) {
            Ok(targets) => {
                links += targets.len();
                let found = targets
                    .iter()
                    .filter_map(|target| Some((target, fault(file, target)?)));
                faults.extend(
                    found.map(|(target, fault)| format!("{}: {target} {fault}", file.display())),
                );
            }
            Err(error) => faults.push(format!("{}: {error}", file.display())),
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    assert!(links > 100, "found {links} links in {} files", files.len());
}

#[test]
fn links_that_lead_nowhere_are_found() {
    let file = crate::root().join("README.md");
    assert_eq!(fault(&file, "docs/kernels.md#which-kernel"), None);
    assert_eq!(fault(&file, "https://example.com/#any"), None);
    assert!(fault(&file, "docs/no-such-page.md").is_some());
    assert!(fault(&file, "docs/kernels.md#no-such-heading").is_some());
    assert!(fault(&file, "#no-such-heading").is_some());
}

#[test]
fn links_are_read_outside_of_code() {
    let text = "a [b](c.md), ![d](e.svg) and [`f`][g], not `i[j](k)`\n```rust\n[l](m)\n```\n\n[g]: g.md#h\n";
    assert_eq!(targets(text).unwrap(), ["c.md", "e.svg", "g.md#h"]);
    assert!(targets("[f][h]\n\n[g]: g.md").unwrap_err().contains("[h]"));
    assert_eq!(anchors("# A `b`, c\n## A b c\n"), ["a-b-c", "a-b-c-1"]);
}

#[test]
fn the_readme_links_every_page_of_the_guide() {
    let root = crate::root();
    let readme = fs::read_to_string(root.join("README.md")).unwrap();
    let linked = targets(&readme).unwrap();
    for page in markdown_files(&root.join("docs")) {
        let page = page.strip_prefix(&root).unwrap().to_str().unwrap();
        assert!(linked.contains(&page), "{page}");
    }
    assert!(readme.lines().count() <= 200);
}
