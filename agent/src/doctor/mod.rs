//! Whether a host is fit to run machines, and what to do where it is not.
//!
//! [`Facts`] are read from the kernel's files and the folders of the configuration; [`judge`] says what they mean, and does
//! nothing else. Nothing is changed, and an agent that runs is not disturbed.

mod facts;
mod judge;
mod read;

use serde::Serialize;

pub use facts::{Agent, Ebpf, Facts, Folder, FolderState, Kvm, SchedExt};
pub use judge::judge;

/// How a check came out, the worst last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Nothing is to be done.
    Ok,
    /// Machines run; something about them is less safe or less fast than it could be.
    Warn,
    /// The agent does not start, or runs no machines.
    Fail,
}

/// What one check found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at, as `kvm`.
    pub check: &'static str,
    /// How it came out.
    pub verdict: Verdict,
    /// What was found.
    pub detail: String,
    /// What to do, where something is to be done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}
