//! The place for one request or container: an idle container, room in a machine, a warming machine.

use std::sync::Arc;

use crate::host::Step;
use crate::rules::{MAX_WEIGHT, WEIGHT};
use crate::{Amount, Command, ContainerId, Kind, Machine, MachineId, MachineState, Purpose, Reason, RequestId};

impl Step<'_> {
    /// Starts a request in the machine that was booted for it, if that is ready.
    pub(crate) fn reserved_machine(&mut self, id: RequestId) -> bool {
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
        let Some((shape, has)) = ready.map(|found| (found.shape, self.world.room(found))) else {
            return false;
        };
        if !kind.amount.fits(has) {
            let needs = kind.amount;
            self.decide(Command::ReleaseMachine { machine }, Reason::TooSmall { has, needs });
            return false;
        }
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

    /// Puts a request where it can run now; says whether there was such a place.
    pub(crate) fn placed(&mut self, id: RequestId) -> bool {
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
            let room = |machine| {
                self.world
                    .machine(machine)
                    .map_or_else(Amount::default, |found| self.world.room(found))
            };
            let spare = self.world.spare_disk(&account);
            let kept = group
                .gathering
                .filter(|gathering| gathering.request == id)
                .map(|kept| kept.machine);
            let kept = kept.filter(|machine| first.amount.fits(room(*machine)));
            if let Some(machine) = kept.or_else(|| group.rooms.tightest(first.amount, spare, &request.lost)) {
                let free = free(machine);
                return self.create(machine, first, Purpose::Serve(id), Reason::RoomInMachine { free });
            }
        }
        match self.warming_for(&account, &runtime, first, Some(id)) {
            Some((machine, reason)) => self.create(machine, first, Purpose::Serve(id), reason),
            None => {
                self.world.found_no_place(&account, first.amount);
                false
            }
        }
    }

    /// The idle container that suits a request best, as it is given to it.
    pub(crate) fn idle_for(&self, id: RequestId) -> Option<(ContainerId, Command, Reason)> {
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
    pub(crate) fn warming_for(
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
        let spare = self.world.spare_disk(account);
        let machine = entry.warming.tightest(kind.amount, spare, &[])?;
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

    pub(crate) fn create(&mut self, machine: MachineId, kind: Kind, purpose: Purpose, reason: Reason) -> bool {
        let container = ContainerId(self.ids.next(self.world.now.wall));
        let found = self.world.machine(machine);
        let command = Command::CreateContainer {
            machine,
            container,
            kind,
            drive_mib: found.map_or(0, |found| found.drive_for(kind.amount.scratch_mib)),
            purpose,
        };
        let created = self.decide(command, reason);
        self.weigh(machine);
        created
    }

    /// Gives a machine the part of its account's weight that its containers have of what all of the account's were given. So one
    /// with many machines has no more of contended CPUs than one with few. Where what all have has doubled, or fallen to a
    /// quarter, all are weighed.
    pub(crate) fn weigh(&mut self, id: MachineId) {
        let machine = self.world.machine(id);
        let name = machine.and_then(|machine| machine.account.clone());
        let Some((name, account)) = name.and_then(|name| Some((name.clone(), self.world.account(&name)?))) else {
            return;
        };
        let (given, of_millis) = (account.given_millis, account.weighed_of);
        if given <= of_millis && given.saturating_mul(4) >= of_millis {
            return self.give_weight(id, &name, of_millis);
        }
        self.weigh_machines(&name, given.next_power_of_two());
    }

    /// Gives each machine of an account its part anew: of another weight.
    pub(crate) fn weigh_all(&mut self, name: &Arc<str>) {
        if let Some(of_millis) = self.world.account(name).map(|account| account.weighed_of) {
            self.weigh_machines(name, of_millis);
        }
    }

    fn weigh_machines(&mut self, name: &Arc<str>, of_millis: u64) {
        let account = self.world.account(name).into_iter();
        let machines = account.flat_map(|account| account.active().chain(account.launched.iter().copied()));
        for id in machines.collect::<Vec<_>>() {
            self.give_weight(id, name, of_millis);
        }
    }

    fn give_weight(&mut self, id: MachineId, account: &Arc<str>, of_millis: u64) {
        let whole = u64::from(WEIGHT) * u64::from(self.world.rules.limits(account).share);
        let Some(machine) = self.world.machine(id) else {
            return;
        };
        let amount = machine.allocated;
        let weight = whole.saturating_mul(amount.cpu_millis.into()) / of_millis.max(1);
        let weight = u32::try_from(weight).unwrap_or(u32::MAX).clamp(1, MAX_WEIGHT);
        // One that an account launched is its own as it boots.
        let serves = machine.state == MachineState::Active
            || (machine.launched.is_some() && machine.state == MachineState::Booting);
        if serves && machine.weight != weight {
            let command = Command::WeighMachine {
                machine: id,
                weight,
                of_millis,
            };
            self.decide(command, Reason::Given { amount, weight, whole });
        }
    }

    /// Makes a container ahead of requests, where there is room for it without taking any from those that wait.
    pub(crate) fn prepare(&mut self, account: &Arc<str>, runtime: &Arc<str>, kind: Kind) {
        if self.world.draining {
            return;
        }
        let kind = self.world.present(kind);
        let group = self.world.group(account, runtime);
        let spare = self.world.spare_disk(account);
        let room = group.and_then(|group| group.rooms.tightest(kind.amount, spare, &[]));
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
}
