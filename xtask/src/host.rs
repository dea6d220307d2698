//! Running a command where microVMs can run: on this machine itself, else in the lab.

use std::{ffi::OsString, path::PathBuf, process::Command, time::Duration};

use anyhow::{Context, Result};

use crate::{
    cache::Cache,
    lab::{self, Died, Lab},
    probe::{self, Verdict},
    setup::Step,
};

/// A command for a host, with what it gets.
#[derive(Debug)]
pub(crate) struct HostCommand {
    /// The program and its arguments.
    pub(crate) command: Vec<OsString>,
    /// Variables added to its environment.
    pub(crate) env: Vec<(String, OsString)>,
    /// The folder of this machine that it finds as `$STOKER_LAB_OUT`, for what it leaves.
    pub(crate) out: PathBuf,
    /// How long it may take in the lab.
    pub(crate) timeout: Duration,
    /// The lab's kernel. One that is not the usual takes the lab, whatever this machine can.
    pub(crate) kernel: lab::Kernel,
    /// How many labs it may use up, at least 1.
    pub(crate) labs: u32,
}

/// How many labs most commands may use up: one that dies, of a fault in QEMU's emulation, says nothing of the command.
pub(crate) const LABS: u32 = 4;

/// This machine, as results name it.
pub(crate) const HERE: &str = "this machine";

/// Where this runs, as results name it.
pub(crate) fn place() -> &'static str {
    if lab::is_inside() { "the lab" } else { HERE }
}

/// What must be made before a command can run where microVMs can.
pub(crate) fn steps(kernel: lab::Kernel) -> Vec<&'static Step> {
    match probe::probe() {
        Verdict::Native if kernel == lab::Kernel::Usual => Vec::new(),
        _ => kernel.steps(),
    }
}

/// Runs the command natively or in the lab, whichever the probe finds right, says which, and returns its exit code. Where
/// the lab itself dies the command is run again in a new one, with what it left in `$STOKER_LAB_OUT`, and that is said.
pub(crate) fn run_in_host(cache: &Cache, command: &HostCommand) -> Result<u8> {
    match probe::probe() {
        verdict @ Verdict::Native if command.kernel == lab::Kernel::Usual => {
            println!("{verdict}");
            run_natively(command)
        }
        verdict => {
            println!("{verdict}");
            let mut lab = Lab::new(command.command.clone())
                .kernel(command.kernel)
                .timeout(command.timeout)
                .out(Some(command.out.clone()));
            for (name, value) in &command.env {
                lab = lab.env(name, value);
            }
            let mut used = 1;
            loop {
                match lab.run(cache) {
                    Err(error) if error.is::<Died>() && used < command.labs => {
                        println!(
                            "{error:#}\nThe lab died, not what ran in it: once more in a new one ({used} of {} used up).",
                            command.labs
                        );
                        used += 1;
                    }
                    ended => return ended,
                }
            }
        }
    }
}

/// Runs the command on this machine, with the same environment as in the lab, and returns its exit code.
pub(crate) fn run_natively(command: &HostCommand) -> Result<u8> {
    std::fs::create_dir_all(&command.out).with_context(|| format!("make {}", command.out.display()))?;
    let (program, arguments) = command.command.split_first().context("no command was given")?;
    let status = Command::new(program)
        .args(arguments)
        .envs(command.env.iter().map(|(name, value)| (name, value)))
        .env("STOKER_LAB_OUT", &command.out)
        .status()
        .with_context(|| format!("start {}", program.to_string_lossy()))?;
    // Ended by a signal: as a shell has it.
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(128))
}
