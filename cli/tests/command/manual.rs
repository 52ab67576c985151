//! What `completions` and `man` print.

use std::fs;
use std::process::Command as Process;

use crate::model::Workspace;
use crate::refusals::assert_refused;
use crate::wgpu_optim;

fn printed(args: &[&str]) -> String {
    let output = wgpu_optim().args(args).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && stderr.is_empty(),
        "{args:?}: {stderr}"
    );
    String::from_utf8(output.stdout).unwrap()
}

/// The long options that the help of a command lists.
fn options(command: &str) -> Vec<String> {
    let help = printed(&[command, "--help"]);
    let lines = help.lines().map(str::trim_start);
    let options = lines.filter_map(|line| line.trim_start_matches("-h, ").strip_prefix("--"));
    let name = |option: &str| {
        let end = option.find(|c: char| !c.is_ascii_alphanumeric() && c != '-');
        option[..end.unwrap_or(option.len())].to_owned()
    };
    options.map(name).collect()
}

#[test]
fn every_shell_completes_commands_and_options() {
    let options = options("step");
    assert!(options.contains(&"clip-norm".to_owned()), "{options:?}");
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = printed(&["completions", shell]);
        for word in options
            .iter()
            .map(String::as_str)
            .chain(["bench", "round", "info"])
        {
            assert!(script.contains(word), "{shell} does not complete {word}");
        }
    }
    let output = wgpu_optim().args(["completions", "tcsh"]).output().unwrap();
    assert_refused(&output, &["tcsh", "bash, elvish, fish, powershell, zsh"]);
}

#[test]
fn bash_runs_its_script() {
    let workspace = Workspace::new();
    let script = workspace.path("wgpu-optim.bash");
    fs::write(&script, printed(&["completions", "bash"])).unwrap();
    for (typed, expected) in [
        ("st", "step"),
        ("step --clip-t", "--clip-tensor-norm"),
        ("--device c", "cpu"),
    ] {
        let before = typed.rsplit(' ').nth(1).unwrap_or("wgpu-optim");
        let word = typed.rsplit(' ').next().unwrap();
        let ask = format!(
            "source '{}'; COMP_WORDS=(wgpu-optim {typed}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); \
             _wgpu__optim wgpu-optim {word} {before}; echo \"${{COMPREPLY[*]}}\"",
            script.display()
        );
        let Ok(bash) = Process::new("bash").args(["-c", &ask]).output() else {
            eprintln!("not run: this machine has no bash");
            return;
        };
        let stderr = String::from_utf8_lossy(&bash.stderr);
        let answer = String::from_utf8_lossy(&bash.stdout);
        assert_eq!(answer.trim_end(), expected, "{typed}: {stderr}");
    }
}

#[test]
fn each_command_has_a_page_with_all_its_options() {
    // A hyphen that is typed is escaped in roff.
    let page = |args: &[&str]| printed(&[&["man"], args].concat()).replace("\\-", "-");
    let whole = page(&[]);
    assert!(whole.contains(".TH wgpu-optim 1"), "{whole}");
    let commands = [
        "step",
        "round",
        "bench",
        "accuracy",
        "experiments",
        "info",
        "completions",
        "man",
    ];
    for command in commands {
        assert!(whole.contains(&format!("wgpu-optim-{command}(1)")));
        let page = page(&[command]);
        assert!(
            page.contains(&format!(".TH wgpu-optim-{command} 1")),
            "{page}"
        );
        for option in options(command) {
            assert!(page.contains(&format!("--{option}")), "{command} {option}");
        }
    }
    let output = wgpu_optim().args(["man", "stride"]).output().unwrap();
    assert_refused(&output, &["\"stride\"", "step, round"]);
}

#[test]
fn text_is_no_json() {
    for args in [&["completions", "bash"][..], &["man"]] {
        let output = wgpu_optim().args(args).arg("--json").output().unwrap();
        assert_refused(&output, &[args[0], "no JSON"]);
        assert!(output.stdout.is_empty());
    }
}
