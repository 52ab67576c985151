//! `completions` and `man`: what shells and manual readers know of the command, made of its arguments.

use anyhow::{Context as _, ensure};
use clap::CommandFactory as _;
use clap_mangen::Man;

use crate::args::{Args, CommonArgs, CompletionsArgs, ManArgs};
use crate::{Failure, print_text};

/// Prints the script by which a shell completes the command.
pub fn completions(common: &CommonArgs, args: &CompletionsArgs) -> Result<(), Failure> {
    refuse_json(common, "completions")?;
    let mut command = Args::command();
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, &name, &mut script);
    let mut script = String::from_utf8(script).map_err(Failure::failed)?;
    if args.shell == clap_complete::Shell::Bash {
        // clap_complete 4.6.12 takes the hyphen of a program's name for a command's in some places, and not in others.
        script = script.replace(&name.replace('-', "__subcmd__"), &name.replace('-', "__"));
    }
    print_text(script.as_bytes())
}

/// Prints the manual page of the command, or of one of its commands.
pub fn man(common: &CommonArgs, args: &ManArgs) -> Result<(), Failure> {
    refuse_json(common, "man")?;
    let mut command = Args::command();
    // Gives its commands the options that all of them take.
    command.build();
    let page = match &args.command {
        None => command,
        Some(name) => {
            let commands = command.get_subcommands().map(clap::Command::get_name);
            let commands = commands.collect::<Vec<_>>().join(", ");
            let found = command.find_subcommand(name).cloned();
            found.with_context(|| format!("there is no command {name:?}, but {commands}"))?
        }
    };
    let mut roff = Vec::new();
    let rendered = Man::new(page.version(env!("CARGO_PKG_VERSION"))).render(&mut roff);
    rendered.map_err(Failure::failed)?;
    print_text(&roff)
}

fn refuse_json(common: &CommonArgs, command: &str) -> anyhow::Result<()> {
    ensure!(!common.json, "{command} prints text, which is no JSON");
    Ok(())
}
