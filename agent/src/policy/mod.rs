//! Decisions, each a plain state machine `(state, event, now) -> actions`: no I/O, no clock, no task, no lock. The
//! daemon, the property tests and a simulator run the same code; carrying an action out is someone else's work
//! (`crate::pool`). One folder a policy.

mod amount;
pub mod placement;

pub use amount::{Amount, Shape};

/// A moment, as the time since some fixed start. Monotonic; tests make it up.
pub type Time = std::time::Duration;
