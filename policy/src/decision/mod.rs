//! What is decided: commands, each with its reason in figures.

mod command;
mod reason;
mod refusal;

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use command::{Command, Purpose};
pub use reason::Reason;
pub use refusal::Refusal;

/// What is to be done, and why. The command has changed the world already; executors carry it out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// The change to carry out.
    pub command: Command,
    /// What led to it, in figures.
    pub reason: Reason,
}

/// A time as people read it: whole microseconds or milliseconds, or tenths of a second.
pub(crate) struct Rounded(pub(crate) Duration);

impl fmt::Display for Rounded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_nanos() {
            0..1_000_000 => write!(f, "{} us", self.0.as_micros()),
            1_000_000..1_000_000_000 => write!(f, "{} ms", self.0.as_millis()),
            _ => write!(f, "{:.1} s", self.0.as_secs_f64()),
        }
    }
}
