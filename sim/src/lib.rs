//! What a host would do, before it is bought: the production code decides and keeps accounts, in virtual time.
//!
//! ```text
//!  load ──wants──► cpu: who gets what ──used──► stoker_credits::Account ──CreditsSettled──► stoker_policy::Host
//!                   ▲                                                                            │
//!                   └──────────────────── class, and the most that it may use ◄──── SetCpu ──────┘
//! ```
//!
//! Machines are admitted and assigned by the policies as they are on a host, and each runs as these decide. What is a model is the
//! load, and who gets how much of the CPUs where not all have what they want: the kernel's part.

mod cpu;
mod credits;
mod load;
mod random;

pub use credits::{LoadOutcome, Outcome, Setup, SetupError, credits};
pub use load::{Load, Recording, RecordingError};
