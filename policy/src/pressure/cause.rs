//! Why a balloon is to have something else.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::decision::Rounded;
use crate::scale::Percent;

/// What a balloon is to have, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inflation {
    /// What it was to have before, in MiB.
    pub before_mib: u32,
    /// What it is to have, in MiB.
    pub after_mib: u32,
    /// Why.
    pub cause: Cause,
}

/// Why a balloon is to have something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cause {
    /// The host is pressed for memory.
    Pressed {
        /// The part of the time in which something waited for memory, in hundredths of a percent.
        stalled: u64,
        /// What was available, in MiB.
        available_mib: u64,
        /// What should be available beside that, in MiB.
        missing_mib: u64,
        /// What the machine could do without, in MiB.
        unused_mib: u32,
    },
    /// The host has memory enough.
    Eased {
        /// For how long.
        calm: Duration,
        /// What was available, in MiB.
        available_mib: u64,
    },
    /// The machine's guest needs it.
    Short {
        /// What the guest could not give up, in MiB.
        used_mib: u32,
        /// That and its head room.
        needed_mib: u32,
        /// All of the machine's memory that its kernel does not keep for itself, in MiB.
        has_mib: u32,
    },
    /// Nothing is heard of the machine's guest: it may be too short to speak.
    Silent {
        /// For how long.
        silence: Duration,
    },
}

// === impl Inflation ===

impl fmt::Display for Inflation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            before_mib,
            after_mib,
            cause,
        } = self;
        match cause {
            Cause::Pressed {
                stalled,
                available_mib,
                missing_mib,
                unused_mib,
            } => write!(
                f,
                "the host waited for memory {} of the time, and {available_mib} MiB were available, {missing_mib} MiB too few; the \
                 machine can do without {unused_mib} MiB",
                Percent(*stalled)
            ),
            Cause::Eased { calm, available_mib } => write!(
                f,
                "the host has had memory enough for {}, and {available_mib} MiB are available",
                Rounded(*calm)
            ),
            Cause::Short {
                used_mib,
                needed_mib,
                has_mib,
            } => write!(
                f,
                "its guest uses {used_mib} MiB and needs {needed_mib} of the {has_mib} MiB that it has"
            ),
            Cause::Silent { silence } => {
                write!(f, "its guest has said nothing of its memory for {}", Rounded(*silence))
            }
        }?;
        write!(f, ": its balloon from {before_mib} to {after_mib} MiB")
    }
}
