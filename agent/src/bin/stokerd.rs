//! `stokerd`, the agent of one host.
//!
//! It ends with 0 where it was told to stop, with 2 where the configuration or the command line is wrong, so that another
//! start is of no use before somebody has changed it, and with 1 where anything else went wrong.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use stoker_agent::arguments::Stokerd;
use stoker_agent::boot_files;
use stoker_agent::config::{Config, DEFAULT_PATH, DEFAULT_TOML};
use stoker_agent::daemon::{self, DaemonError};
use stoker_agent::host::journal::recording::{self, Replayed};
use stoker_agent::logs::{self, Level};

/// The exit code where the configuration or the command line is wrong; clap's own.
const WRONG: u8 = 2;

/// One thread for so many CPUs of the host, up to so many threads.
const CPUS_PER_THREAD: usize = 8;
const MOST_THREADS: usize = 8;

fn main() -> ExitCode {
    let args = Stokerd::parse();
    if args.print_config {
        print!("{DEFAULT_TOML}");
        return ExitCode::SUCCESS;
    }
    if let Some(recording) = args.replay {
        return replay(&recording);
    }
    let default = PathBuf::from(DEFAULT_PATH);
    let file = args.config.or_else(|| default.exists().then_some(default));
    let config = match file.as_deref().map_or_else(|| Ok(Config::default()), Config::load) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("stokerd: {error}");
            return ExitCode::from(WRONG);
        }
    };
    if args.check_config {
        // Not an error: the configuration may be meant for another host.
        if let Err(error) = boot_files::check(&config.machines) {
            eprintln!("warning: {error}");
        }
        println!(
            "{} is right",
            file.map_or_else(
                || "the default configuration".to_owned(),
                |file| file.display().to_string()
            )
        );
        return ExitCode::SUCCESS;
    }
    let level = match logs::start(&config.log) {
        Ok(level) => level,
        Err(error) => {
            eprintln!("stokerd: can't log: {error}");
            return ExitCode::from(WRONG);
        }
    };
    match run(config, file, level) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            let error = error.downcast_ref::<DaemonError>();
            if error.is_some_and(DaemonError::is_of_configuration) {
                ExitCode::from(WRONG)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}

fn replay(recording: &Path) -> ExitCode {
    match recording::replay(recording) {
        Ok(Replayed { events, decisions }) => {
            println!("{events} events, {decisions} decisions: the same as recorded");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("stokerd: {}: {error}", recording.display());
            ExitCode::FAILURE
        }
    }
}

/// How many threads serve: the CPUs are the guests', and threads that have little to do only wake each other.
fn threads() -> usize {
    let cpus = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    (cpus / CPUS_PER_THREAD).clamp(1, MOST_THREADS)
}

/// As many open files as this process may have: each connection and each machine takes some, and the usual 1,024 are few.
fn raise_open_files() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most).map(|()| most));
    match raised {
        Ok(most) => tracing::debug!(most, "open files"),
        Err(error) => tracing::warn!(%error, "can't raise the limit of open files"),
    }
}

fn run(config: Config, file: Option<PathBuf>, level: Level) -> anyhow::Result<()> {
    raise_open_files();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads())
        .enable_all()
        .build()?;
    // In a task, so that a panic is an error as any other.
    let running = runtime.spawn(daemon::run(config, file, level));
    let ended = runtime.block_on(running);
    // Its tasks are not ended before the process is: one that sees another's connection go would end a machine.
    std::mem::forget(runtime);
    Ok(ended.context("the agent panicked")??)
}
