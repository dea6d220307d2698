//! What is kept for requests that have waited too long.

use std::sync::Arc;

use super::{MachineState, Timer, Touch, World};
use crate::gather::PATIENCE;
use crate::{Machine, MachineId, Mono, RequestId};

/// A machine whose room is kept for one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gathering {
    pub(crate) request: RequestId,
    pub(crate) machine: MachineId,
}

impl World {
    /// Sees to it that the first request of a group that waits is looked at when it has waited too long.
    pub(crate) fn watch(&mut self, account: &Arc<str>, runtime: &Arc<str>) {
        let now = self.now.mono;
        let oldest = self.group(account, runtime).and_then(|group| group.queue.oldest());
        let Some(arrived) = oldest
            .and_then(|id| self.request(id))
            .map(|request| request.arrived.mono)
        else {
            return;
        };
        let due = arrived.saturating_add(PATIENCE);
        let at = if due > now { due } else { now.saturating_add(PATIENCE) };
        self.watch_until(account, runtime, at);
    }

    fn watch_until(&mut self, account: &Arc<str>, runtime: &Arc<str>, at: Mono) {
        let Some(group) = self.group_mut(account, runtime) else {
            return;
        };
        let timer = Timer::Overdue(account.clone(), runtime.clone());
        if let Some(before) = group.watched.replace(at) {
            self.timers.clear(before, timer.clone());
        }
        self.timers.set(at, timer);
    }

    /// Whether it was for this that a timer went off.
    pub(crate) fn watch_is_over(&mut self, account: &str, runtime: &str) -> bool {
        let now = self.now.mono;
        let group = self.group_mut(account, runtime);
        group.is_some_and(|group| group.watched.take_if(|at| *at <= now).is_some())
    }

    /// Keeps what is free in a machine, and what comes free there, for one request.
    pub(super) fn gather(&mut self, account: &Arc<str>, runtime: &Arc<str>, request: RequestId, machine: MachineId) {
        self.end_gathering(account, runtime);
        let Some(free) = self.machine(machine).map(|found| found.free()) else {
            return;
        };
        if let Some(group) = self.group_mut(account, runtime) {
            group.rooms.remove(free, machine);
            group.gathering = Some(Gathering { request, machine });
        }
    }

    /// What was kept is for anyone of its account.
    pub(super) fn end_gathering(&mut self, account: &Arc<str>, runtime: &Arc<str>) {
        let gathering = self
            .group_mut(account, runtime)
            .and_then(|group| group.gathering.take());
        let Some(Gathering { machine, .. }) = gathering else {
            return;
        };
        let active = self
            .machine(machine)
            .filter(|found| found.state == MachineState::Active);
        let room = active.map(Machine::room);
        if let Some((room, group)) = room.zip(self.group_mut(account, runtime)) {
            group.rooms.insert(room, machine);
            self.touched.push_back(Touch::Room(machine));
        }
    }

    /// A request waits no longer: nothing is kept for it, and the next may have waited too long already.
    pub(super) fn no_longer_kept_for(&mut self, id: RequestId, account: &Arc<str>, runtime: &Arc<str>) {
        let gathering = self.group(account, runtime).and_then(|group| group.gathering);
        if gathering.is_some_and(|gathering| gathering.request == id) {
            self.end_gathering(account, runtime);
            self.watch_until(account, runtime, self.now.mono);
        }
        if self.account(account).is_some_and(|found| found.next == Some(id)) {
            self.set_first(account, None);
        }
    }

    /// Sets which request of an account comes before all others, if one does.
    pub(super) fn set_first(&mut self, account: &Arc<str>, request: Option<RequestId>) {
        let Some(found) = self.accounts.get_mut(account) else {
            return;
        };
        if found.next == request {
            return;
        }
        found.next = request;
        self.may_run_others(account);
    }

    /// Which of an account's requests may run, or how many, has changed: all that wait are looked at.
    pub(super) fn may_run_others(&mut self, account: &Arc<str>) {
        let Some(found) = self.account(account) else {
            return;
        };
        for runtime in found.groups.keys().cloned().collect::<Vec<_>>() {
            self.refresh_group(account, &runtime);
            self.touched.push_back(Touch::Warming(runtime));
        }
        self.touched.push_front(Touch::Slot(account.clone()));
    }

    /// The request of an account that comes first, if it is for this runtime.
    pub(crate) fn next_of(&self, account: &str, runtime: &str) -> Option<RequestId> {
        let next = self.account(account)?.next?;
        (&*self.request(next)?.demand.runtime == runtime).then_some(next)
    }

    /// Whether an account may get machines of a runtime now, as far as one that comes first goes.
    pub(crate) fn may_go_first(&self, account: &str, runtime: &str) -> bool {
        let next = self.account(account).and_then(|found| found.next);
        next.and_then(|id| self.request(id)).is_none_or(|request| {
            let standard = request.first().is_some_and(|kind| kind.amount.fits(self.capacity()));
            standard && &*request.demand.runtime == runtime
        })
    }
}
