//! Machines that an earlier agent left: they count from the moment that they are found, and are taken over once their guests
//! have answered.

use std::sync::Arc;
use std::time::Duration;

use super::{ContainerState, Machine, MachineState, RequestState, Touch, World};
use crate::{Demand, FoundContainer, MachineId, Now, Refusal, Shape};

impl World {
    /// A machine counts like one that serves its account, or, if it has none, like one that boots for anyone. It need not be
    /// within the rules, which may be others by now.
    pub(super) fn machine_found(
        &mut self,
        id: MachineId,
        runtime: &Arc<str>,
        shape: Shape,
        account: Option<Arc<str>>,
        created: Duration,
    ) {
        if self.machines.contains_key(&id) {
            return;
        }
        self.insert_machine(Machine {
            account: account.clone(),
            created: self.then(created),
            ..self.new_machine(id, runtime, shape, MachineState::Found)
        });
        if let Some(account) = account {
            self.count_machine(&account, shape, true);
            let found = self.accounts.entry(account).or_default();
            found.groups.entry(runtime.clone()).or_default();
        } else {
            self.boot_begun(runtime, true);
        }
        self.refresh_rest(id);
    }

    /// Takes over a machine that was found, and what is in it.
    pub(super) fn machine_adopted(&mut self, id: MachineId, containers: Vec<FoundContainer>) {
        let now = self.now;
        let Some(machine) = self.machines.get_mut(&id) else {
            return;
        };
        if machine.state != MachineState::Found {
            return;
        }
        let Some(account) = machine.account.clone() else {
            return self.make_warming(id);
        };
        machine.state = MachineState::Active;
        machine.ready = Some(now);
        (machine.assigned, machine.last_used) = (now.mono, now.mono);
        self.serving.insert((now.mono, id));
        let (free, runtime) = (machine.free(), machine.runtime.clone());
        if let Some(group) = self.group_mut(&account, &runtime) {
            group.rooms.insert(free, id);
        }
        for found in containers {
            self.take_over(id, &account, &runtime, found);
        }
        // Those that are idle have been noted, and come before what there is room for.
        self.touched.push_back(Touch::Room(id));
        self.unsettled.append(&mut self.lacking);
        self.refresh_rest(id);
    }

    fn take_over(&mut self, machine: MachineId, account: &Arc<str>, runtime: &Arc<str>, found: FoundContainer) {
        let FoundContainer {
            container,
            kind,
            created,
            request,
        } = found;
        let known = self.containers.contains_key(&container);
        if known || request.is_some_and(|id| self.requests.contains_key(&id)) {
            return;
        }
        let created = self.then(created);
        let Some(id) = request else {
            self.insert_container(container, machine, kind, ContainerState::Idle, created);
            return self.make_idle(container);
        };
        let demand = Demand {
            account: account.clone(),
            runtime: runtime.clone(),
            kinds: vec![kind],
        };
        self.insert_request(id, demand, RequestState::Running(container));
        self.withdraw_request(id, Refusal::CallerLeft);
        self.insert_container(container, machine, kind, ContainerState::Busy(id), created);
        self.count_running(account, true);
    }

    /// A time that was told by the host's clock; what is measured from it begins now.
    fn then(&self, wall: Duration) -> Now {
        Now { wall, ..self.now }
    }
}
