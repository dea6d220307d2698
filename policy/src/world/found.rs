//! Machines that an earlier agent left: they count from the moment that they are found, and are taken over once their guests
//! have answered.

use std::sync::Arc;
use std::time::Duration;

use stoker_credits::Mode;

use super::{ContainerState, Machine, MachineState, RequestState, Timer, Touch, World};
use crate::{Demand, FoundContainer, Launch, MachineId, Now, Refusal, Shape};

/// How long requests of an account wait for guests of its machines that were found, in which warm containers may be.
const AWAITED: Duration = Duration::from_secs(2);

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
        mode: Option<Mode>,
    ) {
        if self.machines.contains_key(&id) {
            return;
        }
        // Before there were credits it was promised nothing.
        let shape = match shape.baseline_millis {
            0 => self.rules.with_baseline(shape),
            _ => shape,
        };
        let credits = self.balance(shape, mode);
        self.insert_machine(Machine {
            account: account.clone(),
            created: self.then(created),
            cpu: None,
            credits,
            ..self.new_machine(id, runtime, shape, MachineState::Found)
        });
        if let Some(account) = account {
            let until = self.now.mono.saturating_add(AWAITED);
            let found = self.accounts.entry(account.clone()).or_default();
            found.groups.entry(runtime.clone()).or_default();
            found.found += 1;
            if found.awaited.is_none() {
                found.awaited = Some(until);
                self.timers.set(until, Timer::Awaited(account.clone()));
            }
            self.count_machine(&account, shape, true);
        } else {
            self.boot_begun(runtime, true);
        }
        self.refresh_rest(id);
    }

    /// A machine that an account launched counts likewise. Nobody waits for it.
    pub(super) fn launch_found(
        &mut self,
        id: MachineId,
        account: &Arc<str>,
        launch: &Launch,
        shape: Shape,
        created: Duration,
        mode: Option<Mode>,
    ) {
        if self.machines.contains_key(&id) {
            return;
        }
        let shape = match shape.baseline_millis {
            0 => self.rules.with_baseline(shape),
            _ => shape,
        };
        self.launched_found(id, account, launch, shape, self.then(created), mode);
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
        if machine.launched.is_some() {
            return self.launched_ready(id);
        }
        let Some(account) = machine.account.clone() else {
            return self.make_warming(id);
        };
        machine.state = MachineState::Active;
        machine.ready = Some(now);
        (machine.assigned, machine.last_used) = (now.mono, now.mono);
        self.serving.insert((now.mono, id));
        let (room, runtime) = (machine.room(), machine.runtime.clone());
        if let Some(group) = self.group_mut(&account, &runtime) {
            group.rooms.insert(room, id);
        }
        for found in containers {
            self.take_over(id, &account, &runtime, found);
        }
        self.found_no_longer(&account);
        // Those that are idle have been noted, and come before what there is room for.
        self.touched.push_back(Touch::Room(id));
        self.unsettled.append(&mut self.lacking);
        self.refresh_rest(id);
    }

    /// Requests of an account wait for guests of its machines that were found.
    pub(crate) fn awaits(&self, account: &str) -> bool {
        self.account(account).is_some_and(|found| found.awaited.is_some())
    }

    /// One of an account's machines that were found has answered, or ends.
    pub(super) fn found_no_longer(&mut self, account: &Arc<str>) {
        let Some(found) = self.accounts.get_mut(account) else {
            return;
        };
        found.found = found.found.saturating_sub(1);
        if found.found == 0 {
            self.stop_awaiting(account);
        }
    }

    /// Requests of an account go on with what of its machines there is.
    pub(crate) fn stop_awaiting(&mut self, account: &Arc<str>) {
        let Some(found) = self.accounts.get_mut(account) else {
            return;
        };
        let Some(until) = found.awaited.take() else { return };
        // For those that need a larger machine than the standard one.
        self.unsettled.extend(found.groups.keys().cloned());
        self.timers.clear(until, Timer::Awaited(account.clone()));
        self.may_run_others(account);
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
            resize: None,
            own_amount: false,
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
