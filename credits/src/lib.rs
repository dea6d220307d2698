#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]
//! The rules of CPU credits.
//!
//! A machine earns credits at its *baseline* all the time and spends them by using CPU time. What it does not spend is kept, up to
//! a cap, and lets it run faster than its baseline later. The rules are those of AWS's burstable instances ("CPU credits and
//! baseline utilization for burstable performance instances", in the EC2 user guide); where they say nothing, or where ours
//! differ, the function says so.
//!
//! They stand here and nowhere else: the eBPF programs, the agent's policies, the guest (for the containers of a machine) and the
//! simulator call the same functions. So there is no clock, no allocation and no floating point; nothing panics, whatever is in a
//! map; a settlement has no loop without bound, no division and no 128-bit number, and is all inlined.
//!
//! | type | is |
//! |---|---|
//! | [`Plan`] | what an account is to have, in the units of people; checked, it makes [`Terms`] |
//! | [`Terms`] | the same as integers that settlements go by |
//! | [`Account`] | the state: what is left, what is owed, since when, and the sums of all that happened |
//! | [`Share`] | what a container of the machine has of all that |
//! | [`Level`] | how fast the machine may run now, and the [`Class`] of its priority; a change of it is a [`Crossing`] |
//!
//! # The unit
//!
//! Amounts are in ps (picoseconds, 1e-12 s) of one CPU's time. A baseline of one millicore earns 1 ps in each ns, so earning is a
//! multiplication, and nothing is ever rounded. A credit is one CPU for one minute, 6e13 ps ([`Credits`]). One amount is at most
//! [`MAX_PS`], 106 CPUs for a day; sums over the life of a machine take two words ([`Sum`]).
//!
//! # Nothing is lost
//!
//! At all times, to the last ps, by the fields of [`Totals`] and what [`Account`] has left:
//!
//! ```text
//! earned + granted + billed + forgiven + owed = spent + balance + launch + discarded
//! borrowed = repaid + owed + billed + forgiven
//! ```

mod account;
mod class;
mod error;
mod plan;
mod settle;
// Not for the kernel, whose processors divide no numbers of 128 bits.
#[cfg(not(target_arch = "bpf"))]
mod share;
pub mod t3;
mod terms;
#[cfg(test)]
mod tests;
mod units;
mod until;

pub use account::{Account, Totals};
pub use class::{Class, Crossing, Level};
pub use error::{Amount, TermsError};
pub use plan::Plan;
#[cfg(not(target_arch = "bpf"))]
pub use share::{Share, Thresholds};
pub use terms::{Mode, Terms};
pub use units::{Credits, MAX_PS, PS_PER_CREDIT, PS_PER_NS, Sum};

/// Which meaning the types here have that are in maps and files: [`Terms`], [`Account`], [`Crossing`]. Raise it with each change of
/// one of them.
pub const LAYOUT: u32 = 1;
