//! Runs the targets of the workspace member `fuzz`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use xshell::{Shell, cmd};

/// Coverage alone, which a stable toolchain has; sanitizers need a nightly one, and look for what `unsafe` breaks. More
/// than one codegen unit, because wgpu is built, too.
const BUILD: [&str; 6] = [
    "--sanitizer",
    "none",
    "--features",
    "libfuzzer",
    "--codegen-units",
    "16",
];

/// Where the files of a run lie if there is such a place: in memory.
const MEMORY: &str = "/dev/shm";

/// Runs every target for so many seconds.
pub fn run(shell: &Shell, seconds: u32) -> Result<()> {
    let version = cmd!(shell, "cargo fuzz --version").quiet();
    if version.ignore_stdout().ignore_stderr().run().is_err() {
        eprintln!("cargo-fuzz is not on this machine: installing it with cargo");
        cmd!(shell, "cargo install --locked cargo-fuzz").run()?;
    }
    cmd!(shell, "cargo fuzz build {BUILD...}").run()?;
    let targets = cmd!(shell, "cargo fuzz list").quiet().read()?;

    let mut found = Vec::new();
    for target in targets.lines() {
        let artifacts = format!("fuzz/artifacts/{target}");
        let before = files(shell, &artifacts);
        let done = run_one(shell, target, seconds);
        let after = files(shell, &artifacts);
        let new: Vec<_> = after.difference(&before).collect();
        if new.is_empty() {
            done?;
        }
        found.extend(new.into_iter().map(|find| (target, find.clone())));
    }
    for (target, find) in &found {
        let find = find.display();
        eprintln!("found: {find}");
        eprintln!("  once it is repaired, keep it: cp {find} fuzz/corpus/{target}/NAME");
    }
    ensure!(found.is_empty(), "finds: {}", found.len());
    Ok(())
}

fn run_one(shell: &Shell, target: &str, seconds: u32) -> Result<()> {
    // What is new goes to the first, for the next run to go on from; what is committed stays as it is.
    let corpora = [
        format!("target/fuzz-corpus/{target}"),
        format!("fuzz/corpus/{target}"),
    ];
    shell.create_dir(&corpora[0])?;
    let _threads = shell.push_env("RAYON_NUM_THREADS", "1");
    let memory = Path::new(MEMORY).is_dir();
    let _memory = memory.then(|| shell.push_env("TMPDIR", MEMORY));
    let limits = [
        format!("-max_total_time={seconds}"),
        "-max_len=4096".to_owned(),
        "-timeout=10".to_owned(),
        "-rss_limit_mb=1024".to_owned(),
    ];
    cmd!(
        shell,
        "cargo fuzz run {BUILD...} {target} {corpora...} -- {limits...} -dict=fuzz/tokens.dict -print_final_stats=1"
    )
    .run()?;
    Ok(())
}

fn files(shell: &Shell, directory: &str) -> BTreeSet<PathBuf> {
    // There is none before the first find.
    shell.read_dir(directory).into_iter().flatten().collect()
}
