//! What the guide says of the command.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::wgpu_optim;

/// The flags of cargo in the guide's command lines.
const OF_CARGO: [&str; 3] = ["--path", "--quiet", "--release"];

fn flags(text: &str) -> BTreeSet<&str> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '-');
    words
        .filter(|word| {
            word.strip_prefix("--")
                .is_some_and(|name| name.starts_with(char::is_alphabetic))
        })
        .collect()
}

#[test]
fn flags_of_the_guide_are_flags_of_the_command() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/guide/command.md");
    let page = fs::read_to_string(page).unwrap();
    let subcommands = ["step", "round", "bench", "accuracy", "experiments", "info"];
    let help = subcommands.map(|subcommand| {
        let output = wgpu_optim().args([subcommand, "--help"]).output().unwrap();
        assert!(output.status.success(), "{subcommand}");
        String::from_utf8(output.stdout).unwrap()
    });
    let help = help.concat();
    let there_are = flags(&help);

    let unknown: Vec<_> = flags(&page)
        .into_iter()
        .filter(|flag| !there_are.contains(flag) && !OF_CARGO.contains(flag))
        .collect();
    assert!(unknown.is_empty(), "{unknown:?}");
}
