//! How soon who wakes up runs among others that compute without pause: machines by what they have saved of CPU time, and plain
//! processes by each way in which Linux can be told who runs first.

mod figures;
mod machines;
mod payloads;
mod ways;

use std::path::Path;

use anyhow::{Result, bail};

use super::{Bar, Options, PartName};
use crate::cache::Cache;

pub(super) use ways::RoleOptions;

/// A part of the bench; its name says more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Machines,
    Payloads,
    Ways,
}

// === impl Part ===

impl Part {
    /// The one that is asked for.
    pub(super) fn of(options: &Options) -> Result<Self> {
        Ok(match options.part {
            None | Some(PartName::Machines) => Self::Machines,
            Some(PartName::Payloads) => Self::Payloads,
            Some(PartName::Ways) => Self::Ways,
            Some(other) => bail!("`credits` has no part {other:?}"),
        })
    }
}

/// Measures on this very machine.
pub(super) fn bars(cache: &Cache, binaries: &Path, options: &Options) -> Result<Vec<Bar>> {
    match Part::of(options)? {
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
