//! The resizer (R3): what executions used of what they were given is compared with thresholds, and where that is wrong a second
//! amount is determined. The user is told; where a function's mode is `Auto`, later executions run in containers of the second
//! amount.
//!
//! What it changes is one thing in the world, the amount of a version of a function: `place` asks for that first, and takes a
//! container of the amount before it as long as there is none. So a container of the new amount is made at once in the machine
//! where the execution ran, and each container of the old amount that falls idle later is replaced likewise, one at a time: it
//! serves on until the other is ready, and is stopped then. Where the machine has no room it is another of the account, or the
//! old one ends first, or it is a machine from the warming pool. One that was killed for memory is never used again with as
//! little.
//!
//! | file | holds |
//! |---|---|
//! | `settings` | thresholds, bounds, and all defaults |
//! | `sample` | one execution, and how long it would have taken with another amount of CPU |
//! | `peaks` | peaks of memory: a histogram |
//! | `runs` | the latest executions, and the cheapest amount of CPU for them |
//! | `sizer` | what is known of a function, and what follows |
//! | `notice` | what the user is told |

mod notice;
mod peaks;
mod runs;
mod sample;
mod settings;
mod sizer;
#[cfg(test)]
mod tests;

use std::sync::Arc;

pub use notice::{Figures, Notice, NoticeKind};
pub use sample::Sample;
pub use settings::{Kept, Resize, ResizeError, ResizeMode, Thresholds};
pub(crate) use sizer::{Change, Sizer};

use crate::host::Step;
use crate::world::TRIED;
use crate::{
    Amount, Code, Command, ContainerId, ContainerState, Kind, MachineId, MachineState, Purpose, Reason, Request,
};

impl Step<'_> {
    /// What an execution used is known.
    pub(crate) fn executed(&mut self, container: ContainerId, code: Code, sample: &Sample) {
        let Some(found) = self.world.container(container).filter(|found| found.kind.code == code) else {
            return;
        };
        let (kind, machine, state, now) = (found.kind, found.machine, found.state, self.world.now.mono);
        let account = self.world.machine(machine).and_then(|machine| machine.account.as_ref());
        let Some(limit) = account.map(|account| self.world.most_for(account)) else {
            return;
        };
        let change = match state {
            ContainerState::Starting(_) => self.world.amounts.started(kind, limit, sample, now),
            ContainerState::Busy(request) => {
                let Some(demand) = self.world.request(request).map(|request| &request.demand) else {
                    return;
                };
                if demand.own_amount {
                    return self.compare(code, demand.resize.clone(), limit, sample);
                }
                self.world.amounts.take(code, limit, sample, now)
            }
            ContainerState::Idle | ContainerState::Stopping => None,
        };
        if let Some(change) = change {
            self.changed(code, Some(machine), &change);
        }
    }

    /// An execution that has an amount of its own.
    fn compare(&mut self, code: Code, settings: Option<Arc<Resize>>, limit: Amount, sample: &Sample) {
        let settings = settings.filter(|settings| settings.mode != ResizeMode::Off);
        if let Some((kind, figures)) = settings.and_then(|settings| sizer::compare(&settings, limit, sample)) {
            self.notify(Notice {
                code,
                kind,
                amount: sample.amount,
                own_amount: true,
                figures,
            });
        }
    }

    /// A container of this kind could not start, and its function is to blame.
    pub(crate) fn start_failed(&mut self, kind: Kind) {
        if let Some(change) = self.world.amounts.start_failed(kind, self.world.now.mono) {
            self.changed(kind.code, None, &change);
        }
    }

    /// Another amount was determined, from what ran in a machine.
    fn changed(&mut self, code: Code, machine: Option<MachineId>, change: &Change) {
        let Change { from, to, figures } = *change;
        let Some(entry) = self.world.amounts.get(code) else {
            return;
        };
        let (kept, auto) = (entry.kept(), entry.is_auto());
        // Its account may have less than it had when this ran.
        if auto && to != from && !self.world.is_possible(&entry.account, to) {
            return self.world.amounts.forget(code);
        }
        if auto && to != from && !self.decide(Command::SetAmount { code, kept }, Reason::Use { figures }) {
            return;
        }
        // What its user has: where only advice is given that is what was asked for.
        let has = if auto { from } else { kept.first };
        let (cpu, memory) = (from.cpu_millis != to.cpu_millis, from.memory_mib != to.memory_mib);
        let kind = match figures.killed {
            true if !auto || to == from => Some(NoticeKind::Increase),
            _ => NoticeKind::of(has, to, cpu, memory),
        };
        if let Some(kind) = kind {
            self.notify(Notice {
                code,
                kind,
                amount: has,
                own_amount: false,
                figures,
            });
        }
        if let Some(machine) = machine.filter(|_| auto && to != from) {
            self.replace(code, machine, None);
        }
    }

    fn notify(&mut self, notice: Notice) {
        let figures = notice.figures;
        self.decide(Command::Notify { notice }, Reason::Use { figures });
    }

    /// A version of a function is to have another amount. Those that wait for it may have a place by that, and what it was killed
    /// with is of no use.
    pub(crate) fn resized(&mut self, code: Code) {
        let Some(amount) = self.world.amounts.get(code).map(|entry| entry.amount) else {
            return;
        };
        let (kind, mut tried) = (Kind { code, amount }, 0);
        for request in self.world.waiting_for(code.uid) {
            let is_of_it = self.world.request(request).and_then(Request::first) == Some(kind);
            if is_of_it && !self.reserved_machine(request) && !self.placed(request) {
                tried += 1;
            }
            // Those behind them want the same.
            if tried >= TRIED {
                break;
            }
        }
        while let Some((container, amount)) = self.idle_of(code, |accepts| !accepts) {
            if !self.stop_stale(container, amount) {
                break;
            }
        }
    }

    /// A container fell idle: says whether it is stopped because its function is to have another amount.
    pub(crate) fn outgrown(&mut self, id: ContainerId) -> bool {
        let Some(container) = self.world.container(id) else {
            return false;
        };
        let (kind, machine) = (container.kind, container.machine);
        let Some(entry) = self.world.amounts.get(kind.code) else {
            return false;
        };
        if entry.is_stale(kind.amount) {
            if !entry.accepts(kind.amount) || entry.owed > 0 {
                return self.stop_stale(id, kind.amount);
            }
            return entry.ahead.is_none() && self.replace(kind.code, machine, Some(id));
        }
        if entry.amount == kind.amount
            && entry.owed > 0
            && let Some((other, amount)) = self.idle_of(kind.code, |_| true)
        {
            self.stop_stale(other, amount);
        }
        false
    }

    /// The longest idle container of an amount that a function had; such alone as would do, or would not.
    fn idle_of(&self, code: Code, which: impl Fn(bool) -> bool) -> Option<(ContainerId, Amount)> {
        let entry = self.world.amounts.get(code)?;
        let group = self.world.group(&entry.account, &entry.runtime)?;
        let mut amounts = entry.stale().filter(|amount| which(entry.accepts(*amount)));
        amounts.find_map(|amount| {
            let (_, container) = group.idle.get(&Kind { code, amount })?.first()?;
            Some((*container, amount))
        })
    }

    fn stop_stale(&mut self, id: ContainerId, from: Amount) -> bool {
        let Some(container) = self.world.container(id) else {
            return false;
        };
        let machine = container.machine;
        let Some(to) = self.world.amounts.get(container.kind.code).map(|entry| entry.amount) else {
            return false;
        };
        let command = Command::StopContainer { machine, container: id };
        self.decide(command, Reason::Resized { from, to })
    }

    /// Makes a container of the present amount, in this machine where that has room; says whether one that is idle is stopped so
    /// that there is room for it.
    fn replace(&mut self, code: Code, machine: MachineId, idle: Option<ContainerId>) -> bool {
        let Some(entry) = self.world.amounts.get(code).filter(|_| !self.world.draining) else {
            return false;
        };
        let (account, runtime): (Arc<str>, Arc<str>) = (entry.account.clone(), entry.runtime.clone());
        let amount = entry.amount;
        let had = idle.and_then(|id| Some(self.world.container(id)?.kind.amount));
        let (kind, from) = (Kind { code, amount }, had.unwrap_or(entry.first()));
        let reason = Reason::Resized { from, to: amount };
        if let Some(machine) = self.room_for(machine, &account, &runtime, amount) {
            self.create(machine, kind, Purpose::Ahead, reason);
            return false;
        }
        if let Some(id) = idle
            && amount.fits(self.world.room_with(machine, |container| container.id == id))
        {
            return self.stop_stale(id, from);
        }
        if let Some((machine, _)) = self.warming_for(&account, &runtime, kind, None) {
            self.create(machine, kind, Purpose::Ahead, reason);
        }
        false
    }

    /// The machine where a container is made to take the place of one in this machine.
    fn room_for(&self, machine: MachineId, account: &str, runtime: &str, amount: Amount) -> Option<MachineId> {
        let group = self.world.group(account, runtime)?;
        let found = self.world.machine(machine)?;
        let kept = group.gathering.is_some_and(|gathering| gathering.machine == machine);
        let fits = found.state == MachineState::Active && !kept && amount.fits(self.world.room(found));
        let other = || group.rooms.tightest(amount, self.world.spare_disk(account), &[]);
        fits.then_some(machine).or_else(other)
    }
}
