//! What the host takes back of the memory of machines that accounts launched, by their balloons, while it is short itself.
//!
//! Balloons are empty on a host that has memory enough. Where something waits for memory there, and less is available than should
//! be kept, guests are asked for what is missing, each in proportion to what it does not use. They have it back once the host has
//! had enough for a time, step by step; a guest that is short itself has half of it at least back at once. What a balloon has still
//! counts as its machine's: nothing of it is promised to anybody else.
//!
//! | the host is | where |
//! |---|---|
//! | pressed | something waited for memory for at least [`PRESSED`] of the time, and less than the reserve is available |
//! | eased | something waited for less than [`EASED`] of it, or the reserve would be available without any balloon |
//! | tight | neither: all stays as it is |
//!
//! Waiting alone says little: a cgroup that reaches its own limit waits too, on a host that has memory enough. So does what is
//! available: a host that works with little is not to be disturbed.
//!
//! | file | holds |
//! |---|---|
//! | `measure` | what is measured of host and guests |
//! | `target` | how much a balloon should have |
//! | `cause` | why, in words and figures |

mod cause;
mod measure;
mod target;

use std::collections::BTreeSet;
use std::time::Duration;

pub use cause::{Cause, Inflation};
pub use measure::{Balloon, BalloonMeasures, GuestMemory, HostMemory};

use self::target::{Guest, Level, balloon_targets};
use crate::host::Step;
use crate::scale::{Resource, part};
use crate::{Command, MachineId, MachineState, Mono, Reason, World};

/// The host is pressed where something waited for memory for so much of the time, in hundredths of a percent.
pub const PRESSED: u64 = 1000;

/// It is eased where something waited for less than that.
pub const EASED: u64 = 200;

/// How long it has to be eased before anything is given back. Where it is pressed again within as long after that it takes twice as
/// long the next time, up to the second: so what the host turns out to need is not taken and given back over and over. What it does
/// not need by its reserve does not wait for longer.
const CALM: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(60 * 60));

/// How long it takes from one step of giving back to the next.
const NEXT_STEP: Duration = Duration::from_secs(5);

/// What is known of the host's memory.
#[derive(Clone, Debug)]
pub(crate) struct Pressure {
    /// Since when the host is eased, and how long it has to be.
    eased: Option<Mono>,
    patience: Duration,
    /// When something was given back last for that.
    gave: Option<Mono>,
    /// Machines whose guests were asked for something and have not taken all of it back.
    inflated: BTreeSet<MachineId>,
    /// It was pressed when it was looked at last.
    is_pressed: bool,
}

// === impl Step ===

impl Step<'_> {
    /// The host's memory was looked at, and the balloons of some machines.
    pub(crate) fn host_memory(&mut self, memory: &HostMemory, balloons: &[(MachineId, BalloonMeasures)]) {
        let now = self.world.now.mono;
        let mut guests: Vec<_> = balloons
            .iter()
            .filter_map(|(machine, measures)| self.world.ballooned(*machine, measures))
            .collect();
        let level = self.world.note_memory(memory);
        guests.extend(self.world.unanswered(balloons));
        let calm = self.world.pressure.calm(level, now);
        for (machine, inflation, short) in balloon_targets(level, calm, &guests, now) {
            if short && let Some(launched) = self.world.running_mut(machine) {
                launched.balloon.short = Some(now);
            }
            let mib = inflation.after_mib;
            let is_decided = self.decide(Command::SetBalloon { machine, mib }, Reason::Balloon(inflation));
            if is_decided && matches!(inflation.cause, Cause::Eased { .. }) {
                self.world.pressure.gave = Some(now);
            }
        }
    }
}

// === impl World ===

impl World {
    /// Whether the host's memory and balloons ([`Self::watches_balloon`]) are to be looked at again, a second later or so: it is pressed,
    /// or some balloon has something. Else there is nothing to do before the host is pressed.
    #[must_use]
    pub fn watches_memory(&self) -> bool {
        !self.draining && (self.pressure.is_pressed || !self.pressure.inflated.is_empty())
    }

    /// Whether the balloon of a machine that was launched is to be looked at with the host's memory: any while the host is pressed, else
    /// only one that has something.
    #[must_use]
    pub fn watches_balloon(&self, machine: MachineId) -> bool {
        self.pressure.is_pressed || self.pressure.inflated.contains(&machine)
    }

    /// Notes what a machine's balloon has; nothing of one that does not run, or was not launched.
    fn ballooned(&mut self, machine: MachineId, measures: &BalloonMeasures) -> Option<Guest> {
        let now = self.now.mono;
        let said = measures.guest.filter(GuestMemory::is_fresh);
        let launched = self.running_mut(machine)?;
        let balloon = &mut launched.balloon;
        balloon.asked_mib = measures.asked_mib;
        let is_watched = balloon.is_watched(measures.taken_mib, now);
        balloon.taken_mib = if is_watched { measures.taken_mib } else { 0 };
        if said.is_some() || balloon.heard.is_none() {
            balloon.heard = Some(now);
        }
        let guest = Guest::of(machine, launched, said);
        match is_watched {
            true => self.pressure.inflated.insert(machine),
            false => self.pressure.inflated.remove(&machine),
        };
        Some(guest)
    }

    /// The machines whose balloons have something, and whose VMMs did not answer: as they were last, and silent.
    fn unanswered(&self, answered: &[(MachineId, BalloonMeasures)]) -> Vec<Guest> {
        let answered: BTreeSet<_> = answered.iter().map(|(machine, _)| *machine).collect();
        let others = self.pressure.inflated.difference(&answered);
        let guests = others.filter_map(|machine| Some(Guest::of(*machine, self.launched(*machine)?, None)));
        guests.collect()
    }

    /// How it is with the host. What has ended since has no balloon any more.
    fn note_memory(&mut self, memory: &HostMemory) -> Level {
        let runs = |id: &MachineId| {
            self.machine(*id)
                .is_some_and(|machine| machine.state == MachineState::Active)
        };
        let inflated: BTreeSet<_> = self.pressure.inflated.iter().copied().filter(runs).collect();
        let taken = inflated.iter().filter_map(|id| self.launched(*id));
        let taken_mib = taken.map(|launched| u64::from(launched.balloon.has_mib())).sum();
        let level = Level::of(memory, self.rules.host_reserve_mib, taken_mib);
        self.pressure.inflated = inflated;
        self.pressure.note(level, self.now.mono);
        level
    }

    /// A balloon is to have something else: it is looked at until its VMM says that nothing is left to do.
    pub(crate) fn watch_balloon(&mut self, machine: MachineId) {
        self.pressure.inflated.insert(machine);
    }
}

// === impl Pressure ===

impl Default for Pressure {
    fn default() -> Self {
        Self {
            eased: None,
            patience: CALM.0,
            gave: None,
            inflated: BTreeSet::new(),
            is_pressed: false,
        }
    }
}

impl Pressure {
    /// The host is so now.
    fn note(&mut self, level: Level, now: Mono) {
        let was_pressed = std::mem::replace(&mut self.is_pressed, matches!(level, Level::Pressed { .. }));
        self.eased = match level {
            Level::Eased { .. } => self.eased.or(Some(now)),
            Level::Pressed { .. } | Level::Tight => None,
        };
        if self.is_pressed && !was_pressed {
            let too_early = self.gave.is_some_and(|gave| now.saturating_sub(gave) < self.patience);
            self.patience = match too_early {
                true => self.patience.saturating_mul(2).min(CALM.1),
                false => CALM.0,
            };
        }
    }

    /// For how long the host is eased, where a part is to be given back for that now.
    fn calm(&self, level: Level, now: Mono) -> Option<Duration> {
        let calm = now.saturating_sub(self.eased?);
        let patience = match level {
            Level::Eased { without: true, .. } => CALM.0,
            _ => self.patience,
        };
        let is_next = self.gave.is_none_or(|gave| gave.saturating_add(NEXT_STEP) <= now);
        (calm >= patience && is_next).then_some(calm)
    }
}

/// The part of the time in which something waited, in hundredths of a percent.
fn stalled(memory: &HostMemory) -> u64 {
    let us = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    part(us(memory.stalled), us(memory.passed)).min(10_000)
}

/// The least that a guest which uses so much is left with, in MiB: what a machine that is made smaller is left with.
fn needed_mib(used_mib: u32) -> u32 {
    let used = crate::scale::Use {
        cpu_millis: 0,
        memory_mib: Some(used_mib),
    };
    crate::scale::needed(Resource::Memory, used).unwrap_or(u32::MAX)
}
