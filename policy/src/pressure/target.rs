//! How much balloons should have.

use std::cmp::Reverse;
use std::time::Duration;

use super::cause::{Cause, Inflation};
use super::measure::{Balloon, GuestMemory, HostMemory};
use super::{EASED, NEXT_STEP, PRESSED, needed_mib, stalled};
use crate::{Launched, MachineId, Mono};

/// Balloons have multiples of so many MiB, and are not changed for less.
pub(super) const STEP_MIB: u32 = 16;

/// What a guest is left beside its head room when it is asked, in MiB: it may use so much more before it is short.
pub(super) const BAND_MIB: u32 = 32;

/// A fourth of what a balloon has is given back at a time, and no less than so many MiB.
const LEAST_BACK_MIB: u32 = 64;

/// How long a guest that was short is left alone.
const REST: Duration = Duration::from_secs(60);

/// What a guest was asked for is expected of it for so long. Then others are asked, and it is not asked for more before it has
/// given that.
const GIVES_WITHIN: Duration = Duration::from_secs(10);

/// A guest that was asked for something and has said nothing for so long counts as short.
const SILENCE: Duration = Duration::from_secs(15);

/// How it is with the host's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Level {
    /// Something waits for it, and `missing_mib` of the reserve are not available.
    Pressed {
        stalled: u64,
        available_mib: u64,
        missing_mib: u64,
    },
    /// Neither nor.
    Tight,
    /// There is enough: without any balloon too, or as far as anybody can tell.
    Eased { available_mib: u64, without: bool },
}

/// A machine that has a balloon.
#[derive(Clone, Copy, Debug)]
pub(super) struct Guest {
    pub(super) machine: MachineId,
    /// Its memory in MiB, what its balloon has included; without what its kernel keeps for itself, where it says so.
    pub(super) has_mib: u32,
    pub(super) balloon: Balloon,
    /// What its guest could not give up, in MiB; nothing where it does not say, or has not for a while.
    pub(super) used_mib: Option<u32>,
}

/// Which balloons are to have something else, and whether because their guests are short.
pub(super) fn balloon_targets(
    level: Level,
    calm: Option<Duration>,
    guests: &[Guest],
    now: Mono,
) -> Vec<(MachineId, Inflation, bool)> {
    let told = |guest: &Guest, after_mib, cause| {
        let before_mib = guest.balloon.asked_mib;
        let inflation = Inflation {
            before_mib,
            after_mib,
            cause,
        };
        let is_short = matches!(cause, Cause::Short { .. } | Cause::Silent { .. });
        (guest.machine, inflation, is_short)
    };
    let mut targets = Vec::new();
    for guest in guests {
        if let Some((mib, cause)) = guest.short(now) {
            targets.push(told(guest, mib, cause));
        } else if let (Some(calm), Level::Eased { available_mib, .. }) = (calm, level)
            && guest.balloon.asked_mib > 0
        {
            let cause = Cause::Eased { calm, available_mib };
            // It may have become smaller.
            let mib = guest.balloon.given_back().min(whole(guest.has_mib));
            targets.push(told(guest, mib, cause));
        }
    }
    if let Level::Pressed {
        stalled,
        available_mib,
        missing_mib,
    } = level
    {
        for (guest, mib, unused_mib) in shares(missing_mib, guests, now) {
            let cause = Cause::Pressed {
                stalled,
                available_mib,
                missing_mib,
                unused_mib,
            };
            targets.push(told(guest, mib, cause));
        }
    }
    targets
}

/// What guests are asked for where the host misses so much: of each what its balloon is to have then, and what it does not use.
fn shares(missing_mib: u64, guests: &[Guest], now: Mono) -> Vec<(&Guest, u32, u32)> {
    let expected: u64 = guests.iter().map(|guest| u64::from(guest.balloon.expected(now))).sum();
    let wanted = missing_mib.saturating_sub(expected);
    let mut able: Vec<_> = guests
        .iter()
        .filter(|guest| guest.may_be_asked(now))
        .filter_map(|guest| Some((guest, guest.unused_mib()?)))
        .filter(|(_, unused)| *unused > 0)
        .collect();
    able.sort_by_key(|(guest, unused)| (Reverse(*unused), guest.machine));
    let all: u64 = able.iter().map(|(_, unused)| u64::from(*unused)).sum();
    let mut left = wanted;
    let mut asked = Vec::new();
    for (guest, unused) in able {
        if left == 0 {
            break;
        }
        // No more than is not used, so it fits.
        let part = (u128::from(wanted) * u128::from(unused)).div_ceil(u128::from(all));
        let share = u32::try_from(part)
            .unwrap_or(unused)
            .next_multiple_of(STEP_MIB)
            .min(unused);
        left = left.saturating_sub(u64::from(share));
        asked.push((guest, guest.balloon.asked_mib.saturating_add(share), unused));
    }
    asked
}

// === impl Level ===

impl Level {
    /// Of a host that should have so much available, and of which balloons have so much.
    pub(super) fn of(memory: &HostMemory, reserve_mib: u64, taken_mib: u64) -> Self {
        let (stalled, available_mib) = (stalled(memory), memory.available_mib);
        let missing_mib = reserve_mib.saturating_sub(available_mib);
        if stalled >= PRESSED && missing_mib > 0 {
            return Self::Pressed {
                stalled,
                available_mib,
                missing_mib,
            };
        }
        let without = available_mib >= reserve_mib.saturating_add(taken_mib);
        match stalled < EASED || without {
            true => Self::Eased { available_mib, without },
            false => Self::Tight,
        }
    }
}

// === impl Guest ===

impl Guest {
    /// Of a machine, and what its guest says now.
    pub(super) fn of(machine: MachineId, launched: &Launched, said: Option<GuestMemory>) -> Self {
        let taken_mib = launched.taken.memory_mib;
        // Nobody can give up the kernel's image, its page structures and its hash tables, which are in no figure of its.
        let hidden_mib = said.map_or(0, |said| taken_mib.saturating_sub(said.total_mib));
        Self {
            machine,
            has_mib: launched.asked.memory_mib.min(taken_mib).saturating_sub(hidden_mib),
            balloon: launched.balloon,
            used_mib: said.map(|said| said.used_mib()),
        }
    }

    /// The most that its balloon may have, in MiB: all but what it uses and head room. Nothing where that is not known.
    fn spare_mib(&self) -> Option<u32> {
        Some(self.has_mib.saturating_sub(needed_mib(self.used_mib?)))
    }

    /// What its balloon has at most where it is asked.
    fn most_mib(&self) -> Option<u32> {
        Some(whole(self.spare_mib()?.saturating_sub(BAND_MIB)))
    }

    /// What it could be asked for beside what it was.
    fn unused_mib(&self) -> Option<u32> {
        Some(whole(self.most_mib()?.saturating_sub(self.balloon.asked_mib)))
    }

    /// What its balloon is to have where its guest was asked for more than it can do without: no more than that, and half of it at most,
    /// for a guest that has nothing left can't say how much more it would use. One that has less than nothing says nothing at all.
    fn short(&self, now: Mono) -> Option<(u32, Cause)> {
        let Some(used_mib) = self.used_mib else {
            return self.silent(now);
        };
        let has_mib = self.has_mib;
        if self.balloon.asked_mib <= self.spare_mib()? {
            return None;
        }
        let cause = Cause::Short {
            used_mib,
            needed_mib: needed_mib(used_mib),
            has_mib,
        };
        Some((self.most_mib()?.min(whole(self.balloon.has_mib() / 2)), cause))
    }

    /// What its balloon is to have where its guest has been silent for too long: half of it, at each step.
    fn silent(&self, now: Mono) -> Option<(u32, Cause)> {
        let balloon = &self.balloon;
        let silence = now.saturating_sub(balloon.heard?);
        let is_next = balloon.asked_at.is_none_or(|at| at.saturating_add(NEXT_STEP) <= now);
        let is_due = balloon.asked_mib > 0 && silence >= SILENCE && is_next;
        is_due.then(|| (whole(balloon.has_mib() / 2), Cause::Silent { silence }))
    }

    /// It has given what it was asked for, and was not short lately.
    fn may_be_asked(&self, now: Mono) -> bool {
        let rests = self.balloon.short.is_some_and(|short| short.saturating_add(REST) > now);
        self.balloon.missing() < STEP_MIB && !rests && self.short(now).is_none()
    }
}

// === impl Balloon ===

impl Balloon {
    /// What its guest was asked for and has not given, in MiB.
    fn missing(&self) -> u32 {
        self.asked_mib.saturating_sub(self.taken_mib)
    }

    /// What it is expected to give yet.
    fn expected(&self, now: Mono) -> u32 {
        if self.was_just_asked(now) { self.missing() } else { 0 }
    }

    fn was_just_asked(&self, now: Mono) -> bool {
        self.asked_at.is_some_and(|at| at.saturating_add(GIVES_WITHIN) > now)
    }

    /// Whether a balloon that has so much is to be looked at again: its guest is to give something, or to take it back yet. What a guest
    /// gives unasked is its own affair.
    pub(super) fn is_watched(&self, taken_mib: u32, now: Mono) -> bool {
        self.asked_mib > 0 || (taken_mib > 0 && self.was_just_asked(now))
    }

    /// What it was asked for and has: Linux, which may have taken pages back for want of memory, would give those again where it is asked
    /// for less than before, but more than it has given.
    pub(super) fn has_mib(&self) -> u32 {
        self.asked_mib.min(self.taken_mib)
    }

    /// What it is to have after a part was given back.
    fn given_back(&self) -> u32 {
        let has_mib = self.has_mib();
        whole(has_mib.saturating_sub((has_mib / 4).max(LEAST_BACK_MIB)))
    }
}

fn whole(mib: u32) -> u32 {
    mib - mib % STEP_MIB
}
