//! Where a request runs (R4 pools): in an idle container of an acceptable kind; else in a new container in an active
//! machine of its account with room; else in one in a machine from the warming pool, which is the account's from then on.
//! Else it waits, and what becomes free goes to those that wait: room in a machine of an account to its oldest request that
//! fits, a warming machine to the account that has the least for its share.

use std::sync::Arc;
use std::time::Duration;

use ulid::Ulid;

use crate::host::Step;
use crate::world::{ATTEMPTS, TRIED, Touch};
use crate::{
    Amount, Command, ContainerId, ContainerState, Kind, Machine, MachineId, MachineState, Purpose, Reason, Refusal,
    Request, RequestId, RequestState,
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
            }
        }
    }

    pub(crate) fn refuse(&mut self, request: RequestId, refusal: Refusal) {
        self.decide(Command::Refuse { request, refusal }, Reason::Refused);
    }

    pub(crate) fn caller_left(&mut self, id: RequestId) {
        let state = self.world.request(id).map(|request| request.state);
        if let Some(RequestState::New | RequestState::Waiting | RequestState::Starting(_)) = state {
            self.refuse(id, Refusal::CallerLeft);
        } else {
            self.world.withdraw_request(id, Refusal::CallerLeft);
        }
    }

    /// Makes a container ahead of requests, where there is room for it without taking any from those that wait.
    pub(crate) fn prepare(&mut self, account: &Arc<str>, runtime: &Arc<str>, kind: Kind) {
        if self.world.draining {
            return;
        }
        let group = self.world.group(account, runtime);
        let room = group.and_then(|group| group.rooms.tightest(kind.amount, &[]));
        if let Some(machine) = room {
            let free = self
                .world
                .machine(machine)
                .map(|found| found.free())
                .unwrap_or_default();
            self.create(machine, kind, Purpose::Ahead, Reason::RoomInMachine { free });
        } else if let Some(machine) = self.warming_for(account, runtime, kind, None) {
            self.create(machine.0, kind, Purpose::Ahead, machine.1);
        }
    }

    pub(crate) fn function_deleted(&mut self, uid: Ulid) {
        for request in self.world.waiting_for(uid) {
            self.refuse(request, Refusal::FunctionDeleted);
        }
        for id in self.world.delete_function(uid) {
            let Some(container) = self.world.container(id) else {
                continue;
            };
            match container.state {
                ContainerState::Idle => {
                    let machine = container.machine;
                    let command = Command::StopContainer { machine, container: id };
                    self.decide(command, Reason::FunctionDeleted);
                }
                ContainerState::Starting(Purpose::Serve(request)) => self.refuse(request, Refusal::FunctionDeleted),
                ContainerState::Busy(request) => self.world.withdraw_request(request, Refusal::FunctionDeleted),
                ContainerState::Starting(Purpose::Ahead) | ContainerState::Stopping => {}
            }
        }
    }

    // --- what was touched ---

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

    fn arrived(&mut self, id: RequestId) {
        if self.world.draining {
            return self.refuse(id, Refusal::Draining);
        }
        let Some(request) = self.world.request(id) else {
            return;
        };
        let account = request.demand.account.clone();
        let rules = &self.world.rules;
        let limits = rules.limits(&account);
        let shape = request.first().and_then(|kind| rules.shape_for(kind.amount));
        let most = u32::try_from(limits.memory_mib).unwrap_or(u32::MAX);
        if shape.is_none_or(|shape| shape.memory_mib > most) {
            let mut largest = rules.largest_amount();
            largest.memory_mib = largest.memory_mib.min(most.saturating_sub(rules.reserve_mib));
            return self.refuse(id, Refusal::TooLarge { largest });
        }
        if !self.placed(id) && self.make_way(&account, id) {
            self.wait(id);
        }
    }

    /// A request that did not begin where it was placed.
    fn again(&mut self, id: RequestId) {
        let Some(request) = self.world.request(id) else {
            return;
        };
        if let Some(why) = request.withdrawn.clone() {
            self.refuse(id, why);
        } else if request.attempts >= ATTEMPTS {
            self.refuse(id, Refusal::MachineLost);
        } else if self.world.draining {
            self.refuse(id, Refusal::Draining);
        } else if !self.placed(id) {
            self.wait(id);
        }
    }

    fn wait(&mut self, id: RequestId) {
        let Some(request) = self.world.request(id) else {
            return;
        };
        let account = &request.demand.account;
        let reason = if self.world.may_run(account) {
            Reason::NoPlace {
                waiting: self.world.waiting() + 1,
                booting: self.world.booting,
            }
        } else {
            Reason::Concurrency {
                limit: self.world.rules.limits(account).concurrency,
            }
        };
        self.decide(Command::Wait { request: id }, reason);
    }

    /// Sees to it that one more of the account may wait. On a full host the account with the most waiting for its share
    /// loses its youngest.
    fn make_way(&mut self, account: &Arc<str>, id: RequestId) -> bool {
        let limit = self.world.rules.limits(account).waiting;
        let waiting = self.world.account(account).map_or(0, |found| found.line.len());
        if u32::try_from(waiting).unwrap_or(u32::MAX) >= limit {
            self.refuse(id, Refusal::AccountQueueFull { limit });
            return false;
        }
        // Those that come again wait beyond the limit: there may be more than one too many.
        loop {
            let waiting = self.world.waiting();
            if usize::try_from(waiting).unwrap_or(usize::MAX) < self.world.rules.queue_limit {
                return true;
            }
            let own = self.world.line_with(account, 1);
            let longest = self.world.lines.last().filter(|(weight, _)| *weight > own);
            let youngest = longest
                .and_then(|(_, other)| self.world.account(other)?.line.last_key_value())
                .map(|(_, request)| *request);
            self.refuse(youngest.unwrap_or(id), Refusal::QueueFull { waiting });
            // It was the one that came.
            if self.world.waiting() == waiting {
                return false;
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
    fn room(&mut self, id: MachineId) {
        self.weigh(id);
        while let Some(machine) = self.world.machine(id) {
            if machine.state != MachineState::Active {
                return;
            }
            let free = machine.free();
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
            let mut candidates = candidates.into_iter();
            let fitting = candidates.find_map(|request| {
                let request = self.world.request(request)?;
                let kind = request.first()?;
                let may_run = self.world.slots(&request.demand.account, Some(request.id)) > 0;
                (may_run && kind.amount.fits(free) && !request.lost.contains(&id)).then_some((request.id, kind))
            });
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

    /// Starts a request in the machine that was booted for it, if that is ready.
    fn reserved_machine(&mut self, id: RequestId) -> bool {
        let Some(request) = self.world.request(id) else {
            return false;
        };
        let Some((machine, kind)) = request.reserved.zip(request.first()) else {
            return false;
        };
        let (account, waited) = (request.demand.account.clone(), self.since(request.arrived.mono));
        let ready = self
            .world
            .machine(machine)
            .filter(|found| found.state == MachineState::Warming);
        let Some(shape) = ready.map(|found| found.shape) else {
            return false;
        };
        if self.world.slots(&account, Some(id)) == 0 {
            return false;
        }
        if !self.world.may_have(&account, shape) {
            // What keeps it from that may end later than it waits.
            self.decide(Command::ReleaseMachine { machine }, Reason::Limits { account });
            return false;
        }
        let reason = Reason::NewMachine { waited };
        let started = self.decide(Command::AssignMachine { machine, account }, reason.clone())
            && self.create(machine, kind, Purpose::Serve(id), reason);
        if started {
            self.room(machine);
        }
        started
    }

    // --- where ---

    /// Puts a request where it can run now; says whether there was such a place.
    fn placed(&mut self, id: RequestId) -> bool {
        let Some(request) = self.world.request(id) else {
            return false;
        };
        let Some(first) = request.first() else { return false };
        let demand = &request.demand;
        let (account, runtime) = (demand.account.clone(), demand.runtime.clone());
        if self.world.slots(&account, Some(id)) == 0 {
            return false;
        }
        while let Some((container, command, reason)) = self.idle_for(id) {
            let Some(room) = self.gives_way(container) else {
                return self.decide(command, reason);
            };
            let Some(machine) = command.machine() else { break };
            if !self.decide(Command::StopContainer { machine, container }, room) {
                break;
            }
        }
        if let Some((group, request)) = self.world.group(&account, &runtime).zip(self.world.request(id)) {
            let free = |machine| self.world.machine(machine).map_or_else(Amount::default, Machine::free);
            let kept = group
                .gathering
                .filter(|gathering| gathering.request == id)
                .map(|kept| kept.machine);
            let kept = kept.filter(|machine| first.amount.fits(free(*machine)));
            if let Some(machine) = kept.or_else(|| group.rooms.tightest(first.amount, &request.lost)) {
                let free = free(machine);
                return self.create(machine, first, Purpose::Serve(id), Reason::RoomInMachine { free });
            }
        }
        match self.warming_for(&account, &runtime, first, Some(id)) {
            Some((machine, reason)) => self.create(machine, first, Purpose::Serve(id), reason),
            None => false,
        }
    }

    /// The idle container that suits a request best, as it is given to it.
    fn idle_for(&self, id: RequestId) -> Option<(ContainerId, Command, Reason)> {
        let demand = &self.world.request(id)?.demand;
        let group = self.world.group(&demand.account, &demand.runtime)?;
        let mut choices = demand.kinds.iter().zip(0..);
        choices.find_map(|(kind, choice)| {
            let (since, container) = group.idle.get(kind)?.last().copied()?;
            let machine = self.world.container(container)?.machine;
            let idle = self.since(since);
            let command = Command::Dispatch {
                machine,
                container,
                request: id,
            };
            Some((container, command, Reason::IdleContainer { idle, choice }))
        })
    }

    /// Takes a machine from the warming pool for an account, where there is one that can hold this and its limits allow it.
    fn warming_for(
        &mut self,
        account: &Arc<str>,
        runtime: &Arc<str>,
        kind: Kind,
        request: Option<RequestId>,
    ) -> Option<(MachineId, Reason)> {
        let next = self.world.account(account).and_then(|found| found.next);
        if next != request && !self.world.may_go_first(account, runtime) {
            return None;
        }
        let entry = self.world.runtime(runtime)?;
        let machine = entry.warming.tightest(kind.amount, &[])?;
        let left = u32::try_from(entry.warming.len() - 1).unwrap_or(u32::MAX);
        let found = self.world.machine(machine)?;
        if !self.world.may_have(account, found.shape) {
            return None;
        }
        let ready = found.ready.map_or(self.world.now.mono, |ready| ready.mono);
        let arrived = request
            .and_then(|id| self.world.request(id))
            .map(|request| request.arrived.mono);
        let reason = match arrived {
            Some(arrived) if ready >= arrived && arrived < self.world.now.mono => Reason::NewMachine {
                waited: self.since(arrived),
            },
            _ => Reason::WarmingMachine {
                ready: self.since(ready),
                left,
            },
        };
        let command = Command::AssignMachine {
            machine,
            account: account.clone(),
        };
        self.decide(command, reason.clone()).then_some((machine, reason))
    }

    fn create(&mut self, machine: MachineId, kind: Kind, purpose: Purpose, reason: Reason) -> bool {
        let container = ContainerId(self.ids.next(self.world.now.wall));
        let command = Command::CreateContainer {
            machine,
            container,
            kind,
            purpose,
        };
        let created = self.decide(command, reason);
        self.weigh(machine);
        created
    }

    /// Gives a machine the weight of what its containers have, where that changed.
    fn weigh(&mut self, id: MachineId) {
        let Some(machine) = self.world.machine(id) else {
            return;
        };
        let amount = machine.allocated;
        if machine.state == MachineState::Active && machine.weighed != amount.cpu_millis {
            let command = Command::WeighMachine {
                machine: id,
                cpu_millis: amount.cpu_millis,
            };
            self.decide(command, Reason::Given { amount });
        }
    }

    pub(crate) fn since(&self, then: Duration) -> Duration {
        self.world.now.mono.saturating_sub(then)
    }
}
