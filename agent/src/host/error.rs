//! What can go wrong with an invocation, and with the start.

use std::time::Duration;

use stoker_ebpf::LoadError;
use stoker_policy::{Amount, PlanError, RulesError};

use super::memory::MemoryFull;
use crate::error_chain;
use crate::machines::MachinesError;
use crate::store::StoreError;

/// Why a machine's credits were not changed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CreditsError {
    /// They can't be.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The account was not changed.
    #[error(
        "the machine or the agent ended meanwhile, or the kernel did not take the change: the agent's log says why"
    )]
    Failed,
}

/// Why an invocation has no answer, not even an error of the function.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvokeError {
    /// As many wait on this host as may.
    #[error("the host is full and {waiting} invocations wait already; try again later{}", also(.boot))]
    QueueFull {
        /// How many wait.
        waiting: u32,
        /// Why the last boot failed, if it did.
        boot: Option<String>,
    },
    /// As many of its account wait as may.
    #[error("{limit} invocations of the account wait already, as many as may; try again later{}", also(.boot))]
    AccountQueueFull {
        /// The account's limit.
        limit: u32,
        /// Why the last boot failed, if it did.
        boot: Option<String>,
    },
    /// There is no memory for its message.
    #[error(transparent)]
    MemoryFull(#[from] MemoryFull),
    /// It waited too long.
    #[error("no place became free within {waited:?}; try again later{}", also(.boot))]
    QueueTimeout {
        /// How long it waited.
        waited: Duration,
        /// Why the last boot failed, if it did.
        boot: Option<String>,
    },
    /// No machine of this host, or that its account may have, is that large.
    #[error("no machine of this host could hold {asked}; the largest could hold {largest}{}", lacks_disk(*.asked, *.largest))]
    TooLarge {
        /// What was wanted.
        asked: Amount,
        /// The most there can be.
        largest: Amount,
    },
    /// Machines don't boot.
    #[error("machines with the runtime {runtime} fail to boot; the last one: {detail}")]
    BootFailing {
        /// Which runtime.
        runtime: String,
        /// Why the last boot failed.
        detail: String,
    },
    /// The machine ended under it. It may have run.
    #[error("the machine ended before the invocation had its answer: {detail}")]
    MachineLost {
        /// Why it ended.
        detail: String,
    },
    /// It ran before, for who streamed its answer.
    #[error("the invocation of this request id has run and is over; its answer was streamed and is not kept")]
    Streamed,
    /// A container could not be made, through no fault of the function.
    #[error("no container could be made: {detail}")]
    Container {
        /// Why the last attempt failed.
        detail: String,
    },
    /// The function was deleted before the invocation ran.
    #[error("the function was deleted before the invocation could run")]
    FunctionDeleted,
    /// Its caller gave the id of a request with other content.
    #[error("the request id was used for a request with other content; use a new one")]
    RequestReused,
    /// It can't be kept that it runs, so that it could not be told from one that asks again. It did not run.
    #[error("can't keep the request id, so the invocation was not begun: {detail}")]
    NotKept {
        /// What is wrong.
        detail: String,
    },
    /// The agent takes no more.
    #[error("the agent is shutting down; try again later")]
    Draining,
    /// The caller left.
    #[error("the caller left before the invocation could run")]
    CallerLeft,
}

/// Why machines could not be put to work.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// Machines can't be run.
    #[error(transparent)]
    Machines(#[from] MachinesError),
    /// Machines can't be measured.
    #[error("can't measure machines: {}", error_chain::whole(.0))]
    Telemetry(#[from] LoadError),
    /// The configuration does not work out on this host.
    #[error(transparent)]
    Rules(#[from] RulesError),
    /// The size of this host is unknown.
    #[error("can't find out how large this host is: {0}")]
    Size(#[source] std::io::Error),
    /// It is not known how much disk there is for machines.
    #[error("can't find out how much is free in machines.scratch_dir ({}): {source}; or set pool.scratch_gib", path.display())]
    Disk {
        /// The folder.
        path: std::path::PathBuf,
        /// The underlying error.
        source: std::io::Error,
    },
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The answers that are kept for callers who ask again can't be used.
    #[error("can't use the answers kept in {}: {source}", path.display())]
    Answers {
        /// The folder.
        path: std::path::PathBuf,
        /// The underlying error.
        source: std::io::Error,
    },
    /// A part of starting panicked; the log says where.
    #[error("a part of the agent panicked: {0}")]
    Panicked(#[source] tokio::task::JoinError),
    /// The file that events are recorded to can't be written.
    #[error("can't record events to {}: {source}", path.display())]
    Recording {
        /// The file.
        path: std::path::PathBuf,
        /// The underlying error.
        source: std::io::Error,
    },
}

/// What to do where nothing but disk is missing.
fn lacks_disk(asked: Amount, largest: Amount) -> &'static str {
    match asked.scratch_mib > largest.scratch_mib {
        true => "; for more scratch disk raise pool.scratch_gib, or set machines.scratch_dir to a larger disk",
        false => "",
    }
}

fn also(boot: &Option<String>) -> String {
    boot.as_ref()
        .map(|detail| format!(" (machines fail to boot: {detail})"))
        .unwrap_or_default()
}
