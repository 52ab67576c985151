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

/// The targets of inline links and images, spans of code left out.
fn targets(text: &str) -> Vec<&str> {
    let outside_code = prose(text).flat_map(|line| line.split('`').step_by(2));
    // A link's text may be code: then the part behind it begins with its end.
    let starts = outside_code.flat_map(|part| part.split("](").skip(1));
    starts
        .filter_map(|rest| rest.split_once(')'))
        .map(|(target, _)| target)
        .collect()
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
        for target in targets(&text) {
            links += 1;
            let fault = fault(file, target);
            faults.extend(fault.map(|fault| format!("{}: {target} {fault}", file.display())));
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
    let text = "a [b](c.md), ![d](e.svg) and [`f`](g.md#h), not `i[j](k)`\n```rust\n[l](m)\n```\n";
    assert_eq!(targets(text), ["c.md", "e.svg", "g.md#h"]);
    assert_eq!(anchors("# A `b`, c\n## A b c\n"), ["a-b-c", "a-b-c-1"]);
}

#[test]
fn the_readme_links_every_page_of_the_guide() {
    let root = crate::root();
    let readme = fs::read_to_string(root.join("README.md")).unwrap();
    let linked = targets(&readme);
    for page in markdown_files(&root.join("docs")) {
        let page = page.strip_prefix(&root).unwrap().to_str().unwrap();
        assert!(linked.contains(&page), "{page}");
    }
    assert!(readme.lines().count() <= 200);
}
