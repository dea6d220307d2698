use std::collections::BTreeSet;
use std::sync::Arc;

use crate::{ContainerId, MachineId, Mono, RequestId};

/// What happens at a moment unless something else comes before.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Timer {
    /// A request has waited as long as it may.
    Deadline(RequestId),
    /// Requests of an account for a runtime wait; the first may have waited too long.
    Overdue(Arc<str>, Arc<str>),
    /// A container may have been idle for too long; set again where it was used since.
    ContainerIdle(ContainerId),
    /// A machine may have been empty for too long; likewise.
    MachineIdle(MachineId),
    /// The warming pool of a runtime may have had too many for too long.
    Surplus(Arc<str>),
    /// A machine that lies idle may have earned enough for its next level.
    Credits(MachineId),
    /// Guests of an account's machines have not answered an agent that started.
    Awaited(Arc<str>),
    /// Machines of a runtime may be booted again.
    Backoff(Arc<str>),
    /// The guest of a machine has had long to take what it was asked to.
    Resize(MachineId),
}

/// Timers, in order of time.
#[derive(Clone, Debug, Default)]
pub(crate) struct Timers(BTreeSet<(Mono, Timer)>);

// === impl Timers ===

impl Timers {
    pub(crate) fn set(&mut self, at: Mono, timer: Timer) {
        self.0.insert((at, timer));
    }

    pub(crate) fn clear(&mut self, at: Mono, timer: Timer) {
        self.0.remove(&(at, timer));
    }

    pub(crate) fn next(&self) -> Option<Mono> {
        self.0.first().map(|(at, _)| *at)
    }

    /// The next one that is due.
    pub(crate) fn due(&mut self, now: Mono) -> Option<Timer> {
        let (at, _) = self.0.first()?;
        if *at > now {
            return None;
        }
        self.0.pop_first().map(|(_, timer)| timer)
    }
}
