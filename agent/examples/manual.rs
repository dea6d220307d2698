//! Writes the manual pages and shell completion of the programs into the folders `man` and `completion` of a folder:
//! `cargo run --example manual -- FOLDER`. `cargo xtask dist` packages them.

use std::fs;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Command, CommandFactory as _, Parser};
use clap_complete::Shell;
use clap_mangen::Man;
use stoker_agent::arguments::{StokerController, Stokerd};
use stoker_agent::cli::Cli;

/// The shells that Debian packages bring completion for.
const SHELLS: [Shell; 3] = [Shell::Bash, Shell::Fish, Shell::Zsh];

#[derive(Parser)]
struct Args {
    /// Where to write.
    folder: PathBuf,
}

fn main() -> anyhow::Result<()> {
    let folder = Args::parse().folder;
    let (man, completion) = (folder.join("man"), folder.join("completion"));
    for folder in [&man, &completion] {
        fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    }
    let programs: [(Command, &str); 3] = [
        (Cli::command(), "1"),
        (Stokerd::command(), "8"),
        (StokerController::command(), "8"),
    ];
    for (mut program, section) in programs {
        let name = program.get_name().to_owned();
        for shell in SHELLS {
            clap_complete::generate_to(shell, &mut program, &name, &completion)
                .with_context(|| format!("write the completion of {name} for {shell}"))?;
        }
        if section == "1" {
            clap_mangen::generate_to(without_help(program), &man)
        } else {
            Man::new(program).section(section).generate_to(&man).map(drop)
        }
        .with_context(|| format!("write the manual pages of {name}"))?;
    }
    Ok(())
}

/// Without the subcommands `help`, which need no pages, at any depth.
fn without_help(command: Command) -> Command {
    command.disable_help_subcommand(true).mut_subcommands(without_help)
}
