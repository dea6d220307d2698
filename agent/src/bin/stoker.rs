//! `stoker`, the command line.

use std::process::ExitCode;

use clap::Parser;
use stoker_agent::cli::{Cli, run};

fn main() -> ExitCode {
    let cli = Cli::parse();
    // One thread is enough: a command waits for one answer.
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(run(cli)),
        Err(error) => {
            eprintln!("error: can't start: {error}");
            ExitCode::FAILURE
        }
    }
}
