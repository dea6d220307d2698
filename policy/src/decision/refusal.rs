//! Why a request has no answer.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Rounded;
use crate::Amount;

/// Why a request has no answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// As many wait as may.
    QueueFull {
        /// How many wait on this host.
        waiting: u32,
    },
    /// As many of its account wait as may.
    AccountQueueFull {
        /// The account's limit.
        limit: u32,
    },
    /// It waited as long as it may.
    QueueTimeout {
        /// How long.
        waited: Duration,
    },
    /// No machine of this host, or that its account may have, could hold its amount.
    TooLarge {
        /// The most that one could.
        largest: Amount,
    },
    /// Machines of its runtime fail to boot.
    BootFailing,
    /// Machines ended under it before it had its answer, or could not make its container.
    MachineLost,
    /// Its function was deleted before it ran.
    FunctionDeleted,
    /// The host takes no more requests.
    Draining,
    /// Its caller has gone.
    CallerLeft,
}

// === impl Refusal ===

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::QueueFull { waiting } => write!(f, "{waiting} requests wait on this host already"),
            Self::AccountQueueFull { limit } => {
                write!(f, "{limit} requests of the account wait already, as many as may")
            }
            Self::QueueTimeout { waited } => write!(f, "no place became free within {}", Rounded(*waited)),
            Self::TooLarge { largest } => write!(f, "the largest container can have {largest}"),
            Self::BootFailing => f.write_str("machines of its runtime fail to boot"),
            Self::MachineLost => f.write_str("its machines ended or could not make its container"),
            Self::FunctionDeleted => f.write_str("its function was deleted before it ran"),
            Self::Draining => f.write_str("the agent is shutting down"),
            Self::CallerLeft => f.write_str("its caller has gone"),
        }
    }
}
