//! Where a request runs (R4 pools): in an idle container of an acceptable kind; else in a new container in an active
//! machine of its account with room; else in one in a machine from the warming pool, which is the account's from then on.
//! Else it waits, and what becomes free goes to those that wait: room in a machine of an account to its oldest request that
//! fits, a warming machine to the account that has the least for its share.

use std::sync::Arc;
use std::time::Duration;

use crate::host::Step;
use crate::world::{TRIED, Touch};
use crate::{
    Command, ContainerId, ContainerState, Kind, MachineId, MachineState, Purpose, Reason, Refusal, Request, RequestId,
    RequestState,
};

impl Step<'_> {
    /// Looks at all that was touched.
    pub(crate) fn place(&mut self) {
        while let Some(touch) = self.world.touched.pop_front() {
            match touch {
                Touch::Request(request) => self.request(request),
                Touch::Idle(container) => self.idle(container),
                Touch::Room(machine) => self.room(machine),
                Touch::Warming(runtime) => self.warming(&runtime),
                Touch::Slot(account) => self.slot(&account),
                Touch::Quiet(machine) => self.quiet(machine),
                Touch::Resized(code) => self.resized(code),
                Touch::Credits(machine) => self.credits(machine),
                Touch::Launched(machine) => self.launched(machine),
            }
        }
    }

    fn request(&mut self, id: RequestId) {
        let Some(request) = self.world.request(id) else {
            return;
        };
        match request.state {
            RequestState::New if request.attempts == 0 => self.arrived(id),
            RequestState::New => self.again(id),
            RequestState::Waiting => {
                self.reserved_machine(id);
            }
            RequestState::Starting(container) => {
                if let Some(machine) = self.world.container(container).map(|found| found.machine) {
                    let command = Command::Dispatch {
                        machine,
                        container,
                        request: id,
                    };
                    self.decide(command, Reason::MadeForIt);
                }
            }
            RequestState::Running(container) => {
                // Gone with its machine; it may have run.
                if self.world.container(container).is_none() {
                    self.refuse(id, Refusal::MachineLost);
                }
            }
        }
    }

    /// A container became idle.
    fn idle(&mut self, id: ContainerId) {
        let Some(container) = self.world.container(id) else {
            return;
        };
        if container.state != ContainerState::Idle {
            return;
        }
        let (machine, kind, deleted) = (container.machine, container.kind, container.deleted);
        if deleted {
            let command = Command::StopContainer { machine, container: id };
            self.decide(command, Reason::FunctionDeleted);
            return;
        }
        if self.outgrown(id) {
            return;
        }
        let Some(found) = self.world.machine(machine) else {
            return;
        };
        let Some(group) = found
            .account
            .as_ref()
            .and_then(|name| self.world.group(name, &found.runtime))
        else {
            return;
        };
        let next = group.queue.first(kind).and_then(|request| self.world.request(request));
        let next = next
            .filter(|next| self.world.slots(&next.demand.account, Some(next.id)) > 0)
            .map(|next| {
                let choice = next.demand.kinds.iter().position(|other| *other == kind);
                (next.id, choice.and_then(|at| u32::try_from(at).ok()).unwrap_or(0))
            });
        if let Some(reason) = self.gives_way(id) {
            let command = Command::StopContainer { machine, container: id };
            self.decide(command, reason);
        } else if let Some((request, choice)) = next {
            let reason = Reason::IdleContainer {
                idle: Duration::ZERO,
                choice,
            };
            let command = Command::Dispatch {
                machine,
                container: id,
                request,
            };
            self.decide(command, reason);
        } else {
            // It may be given up for one that lacks room.
            self.world.unsettled.append(&mut self.world.lacking);
        }
    }

    /// What the containers of a machine have changed.
    pub(crate) fn room(&mut self, id: MachineId) {
        self.weigh(id);
        while let Some(machine) = self.world.machine(id) {
            if machine.state != MachineState::Active {
                return;
            }
            let (free, room) = (machine.free(), self.world.room(machine));
            let Some(group) = machine
                .account
                .as_ref()
                .and_then(|name| self.world.group(name, &machine.runtime))
            else {
                return;
            };
            // What is kept for one is for no other.
            let kept = group.gathering.filter(|gathering| gathering.machine == id);
            let candidates = match kept {
                Some(gathering) => vec![gathering.request],
                None => self.world.candidates(group),
            };
            let mut short = None;
            let mut candidates = candidates.into_iter();
            let fitting = candidates.find_map(|request| {
                let request = self.world.request(request)?;
                let kind = request.first()?;
                if kind.amount.scratch_mib > room.scratch_mib {
                    short = Some((request.demand.account.clone(), kind.amount));
                }
                let may_run = self.world.slots(&request.demand.account, Some(request.id)) > 0;
                (may_run && kind.amount.fits(room) && !request.lost.contains(&id)).then_some((request.id, kind))
            });
            if let Some((account, needs)) = short {
                self.world.found_no_place(&account, needs);
            }
            let Some((request, kind)) = fitting else { return };
            if !self.create(id, kind, Purpose::Serve(request), Reason::RoomInMachine { free }) {
                return;
            }
        }
    }

    /// Gives machines of the warming pool to accounts of which requests wait, the one with the least for its share first.
    fn warming(&mut self, runtime: &Arc<str>) {
        while let Some((machine, request, kind, reason)) = self.next_claim(runtime) {
            if !self.create(machine, kind, Purpose::Serve(request), reason) {
                return;
            }
            self.room(machine);
        }
    }

    fn next_claim(&mut self, runtime: &Arc<str>) -> Option<(MachineId, RequestId, Kind, Reason)> {
        let entry = self.world.runtime(runtime)?;
        if entry.warming.len() == 0 || self.world.draining {
            return None;
        }
        let claimants: Vec<_> = entry
            .claimants
            .iter()
            .take(TRIED)
            .map(|(_, _, name)| name.clone())
            .collect();
        for account in claimants {
            let Some(group) = self.world.group(&account, runtime) else {
                continue;
            };
            for id in self.world.candidates(group) {
                let kind = self.world.request(id).and_then(Request::first)?;
                if let Some((machine, reason)) = self.warming_for(&account, runtime, kind, Some(id)) {
                    return Some((machine, id, kind, reason));
                }
                self.world.found_no_place(&account, kind.amount);
            }
        }
        None
    }

    /// An account ran as many requests as it may, and runs fewer now: the first of those that wait for which there is a place
    /// goes on.
    fn slot(&mut self, account: &Arc<str>) {
        while self.world.may_run(account) {
            let Some(found) = self.world.account(account) else {
                return;
            };
            let candidates = found.groups.values().flat_map(|group| self.world.candidates(group));
            let mut candidates: Vec<_> = candidates
                .filter_map(|id| Some((self.world.request(id)?.order, id)))
                .collect();
            candidates.sort_unstable();
            let mut candidates = candidates.into_iter();
            if !candidates.any(|(_, id)| self.reserved_machine(id) || self.placed(id)) {
                return;
            }
        }
    }

    pub(crate) fn since(&self, then: Duration) -> Duration {
        self.world.now.mono.saturating_sub(then)
    }
}
