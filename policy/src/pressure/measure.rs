//! What is measured of the host's memory, and of machines' balloons.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::Mono;
use crate::scale::MOST_LOOK;

/// The host's memory, as it is now and was since it was looked at before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostMemory {
    /// For how long something waited for memory: by how much `total` of `some` in `/proc/pressure/memory` has grown
    /// (Documentation/accounting/psi.rst). Nothing where the kernel does not count it.
    pub stalled: Duration,
    /// In how long.
    pub passed: Duration,
    /// What can be used without swapping, in MiB: `MemAvailable` of proc_meminfo(5).
    pub available_mib: u64,
}

/// What the VMM of a machine tells of its balloon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonMeasures {
    /// What its guest was asked for last, in MiB.
    pub asked_mib: u32,
    /// What the balloon has, in MiB, as the device counts it.
    pub taken_mib: u32,
    /// What its guest said last of its memory; nothing where it has not.
    pub guest: Option<GuestMemory>,
}

/// What a guest says of its memory. It may lie: it can harm nobody by that but its own machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestMemory {
    /// All of it, in MiB, what the balloon has included; without what its kernel keeps for itself from the start.
    pub total_mib: u32,
    /// What its programs could be given without swapping, in MiB.
    pub available_mib: u32,
    /// What the balloon had when it said so, in MiB.
    pub taken_mib: u32,
    /// How long ago it said so.
    pub age: Duration,
}

/// A machine's balloon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Balloon {
    /// What its guest is to give, in MiB.
    pub asked_mib: u32,
    /// What it has given and not taken back, in MiB, as it was told last; nothing of what it gives unasked.
    pub taken_mib: u32,
    /// When it was asked for that; nothing where an earlier agent asked.
    pub(crate) asked_at: Option<Mono>,
    /// When its guest was short itself.
    pub(crate) short: Option<Mono>,
    /// When its guest said something of its memory last, or was looked at first.
    pub(crate) heard: Option<Mono>,
}

// === impl GuestMemory ===

impl GuestMemory {
    /// It is not too old to go by.
    pub(super) fn is_fresh(&self) -> bool {
        self.age <= MOST_LOOK
    }

    /// What it could not give up, in MiB.
    pub(super) fn used_mib(&self) -> u32 {
        let used = self.total_mib.saturating_sub(self.available_mib);
        used.saturating_sub(self.taken_mib)
    }
}
