//! How soon who wakes up runs among others that compute without pause: machines by what they have saved of CPU time, and plain
//! processes by each way in which Linux can be told who runs first.

mod figures;
mod machines;
mod payloads;
mod ways;

use std::path::Path;

use anyhow::Result;
use clap::{Args, ValueEnum};

use super::{Bar, Options};
use crate::cache::Cache;

/// What of it is measured.
#[derive(Debug, Args)]
pub(super) struct PartOptions {
    /// What `credits` measures.
    #[arg(long, value_enum, default_value_t = Part::Machines)]
    part: Part,
    #[command(flatten)]
    role: ways::RoleOptions,
}

/// A part of the bench.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Part {
    /// Machines and the agent: what credits do for one that wakes up, and what becomes of one without; and `payloads`, where
    /// machines are in the lab.
    Machines,
    /// Guests without a kernel on this machine, as far as its KVM runs them: the same, without an agent.
    Payloads,
    /// Plain processes in place of machines: what each way in which Linux can be told who runs first would do.
    Ways,
}

// === impl PartOptions ===

impl PartOptions {
    /// Does what this process is for, if it is one of the bench's own, and says so.
    pub(super) fn run(&self) -> Result<bool> {
        self.role.run()
    }

    pub(super) fn part(&self) -> Part {
        self.part
    }

    /// The same on a command line.
    pub(super) fn arguments(&self) -> [String; 1] {
        let name = match self.part {
            Part::Machines => "machines",
            Part::Payloads => "payloads",
            Part::Ways => "ways",
        };
        [format!("--part={name}")]
    }
}

/// Measures on this very machine.
pub(super) fn bars(cache: &Cache, binaries: &Path, options: &Options) -> Result<Vec<Bar>> {
    match options.credits.part {
        Part::Machines => machines::bars(cache, binaries, options),
        Part::Payloads => payloads(binaries, options),
        Part::Ways => ways(options, options.sched_ext.then_some(binaries)),
    }
}

/// Guests that need the VMM alone.
pub(super) fn payloads(binaries: &Path, options: &Options) -> Result<Vec<Bar>> {
    payloads::bars(binaries, options)
}

/// Plain processes, which need nothing that is built, but for our scheduler.
pub(super) fn ways(options: &Options, binaries: Option<&Path>) -> Result<Vec<Bar>> {
    ways::bars(options.quick, binaries)
}
