//! How containers come to their ends.

use ulid::Ulid;

use super::{Container, ContainerState, MachineState, Timer, Touch, World};
use crate::{ContainerId, Kind, MachineId, Mono, Now};

impl World {
    /// Puts a container in an active machine, which is not kept for a request; `created` is when it was made.
    pub(super) fn insert_container(
        &mut self,
        id: ContainerId,
        machine: MachineId,
        kind: Kind,
        state: ContainerState,
        created: Now,
    ) {
        let Some(found) = self.machines.get_mut(&machine) else {
            return;
        };
        let container = Container {
            id,
            machine,
            kind,
            state,
            created,
            invocations: 0,
            usage: None,
            since: self.now.mono,
            deleted: false,
            ended: false,
            timed: false,
        };
        let before = found.free();
        found.allocated = found.allocated.plus(kind.amount);
        found.containers.insert(id);
        found.running += u32::from(container.is_running());
        let after = found.room();
        if let Some(name) = found.account.clone() {
            let account = self.accounts.entry(name).or_default();
            account.given_millis += u64::from(kind.amount.cpu_millis);
            let group = account.groups.entry(found.runtime.clone()).or_default();
            group.rooms.remove(before, machine);
            group.rooms.insert(after, machine);
        }
        self.containers.insert(id, container);
        self.functions.entry(kind.code.uid).or_default().containers.insert(id);
    }

    /// Takes a container out of the world and gives back what it had.
    pub(super) fn remove_container(&mut self, id: ContainerId) -> Option<Container> {
        let container = self.containers.remove(&id)?;
        self.amounts.made(container.kind.code, id, false);
        let uid = container.kind.code.uid;
        if let Some(function) = self.functions.get_mut(&uid) {
            function.containers.remove(&id);
            if function.is_empty() {
                self.functions.remove(&uid);
            }
        }
        self.forget_idle(&container);
        let mono = self.now.mono;
        let machine = self.machines.get_mut(&container.machine)?;
        machine.containers.remove(&id);
        let before = machine.free();
        machine.allocated = machine.allocated.minus(container.kind.amount);
        machine.last_used = mono;
        if container.is_running() {
            machine.running = machine.running.saturating_sub(1);
        }
        let after = machine.room();
        if let Some(name) = machine.account.clone() {
            let (state, runtime) = (machine.state, machine.runtime.clone());
            if let Some(account) = self.accounts.get_mut(&name) {
                account.given_millis = account
                    .given_millis
                    .saturating_sub(container.kind.amount.cpu_millis.into());
                let group = account.groups.entry(runtime.clone()).or_default();
                if state == MachineState::Active {
                    if container.state == ContainerState::Stopping {
                        group.stopping.subtract(container.kind.amount);
                    }
                    if group
                        .gathering
                        .is_none_or(|gathering| gathering.machine != container.machine)
                    {
                        group.rooms.remove(before, container.machine);
                        group.rooms.insert(after, container.machine);
                    }
                    self.touched.push_back(Touch::Room(container.machine));
                }
            }
            self.refresh_group(&name, &runtime);
        }
        self.refresh_rest(container.machine);
        Some(container)
    }

    /// An idle container is so no longer.
    pub(super) fn forget_idle(&mut self, container: &Container) {
        if container.state != ContainerState::Idle {
            return;
        }
        let Some(machine) = self.machines.get(&container.machine) else {
            return;
        };
        let Some(account) = machine.account.as_ref().and_then(|name| self.accounts.get_mut(name)) else {
            return;
        };
        if let Some(group) = account.groups.get_mut(&machine.runtime) {
            group.remove_idle(container.kind, container.since, container.id);
        }
    }

    /// A container begins to stop, whatever it does: what it has will be free.
    pub(crate) fn stop(&mut self, id: ContainerId) {
        let mono = self.now.mono;
        let Some(container) = self.containers.get(&id).cloned() else {
            return;
        };
        if container.state == ContainerState::Stopping {
            return;
        }
        self.forget_idle(&container);
        if let Some(container) = self.containers.get_mut(&id) {
            container.state = ContainerState::Stopping;
            container.since = mono;
        }
        let Some(machine) = self.machines.get_mut(&container.machine) else {
            return;
        };
        if container.is_running() {
            machine.running = machine.running.saturating_sub(1);
        }
        if let (MachineState::Active, Some(name)) = (machine.state, machine.account.clone()) {
            let runtime = machine.runtime.clone();
            if let Some(account) = self.accounts.get_mut(&name) {
                let group = account.groups.entry(runtime.clone()).or_default();
                group.stopping.add(container.kind.amount);
            }
            self.refresh_group(&name, &runtime);
        }
        self.refresh_rest(container.machine);
    }

    /// Where an idle container is and for how long it has been idle, if that is too long; else it is looked at later.
    pub(crate) fn idle_container_due(&mut self, id: ContainerId) -> Option<(MachineId, Mono)> {
        let (now, limit) = (self.now.mono, self.rules.container_idle);
        let container = self.containers.get_mut(&id)?;
        container.timed = false;
        if container.state != ContainerState::Idle {
            return None;
        }
        let due = container.since.saturating_add(limit);
        if due <= now {
            return Some((container.machine, now.saturating_sub(container.since)));
        }
        container.timed = true;
        self.timers.set(due, Timer::ContainerIdle(id));
        None
    }

    /// Containers of a function that is no more take no further request; which they are.
    pub(crate) fn delete_function(&mut self, uid: Ulid) -> Vec<ContainerId> {
        let Some(function) = self.functions.get(&uid) else {
            return Vec::new();
        };
        for id in &function.containers {
            if let Some(container) = self.containers.get_mut(id) {
                container.deleted = true;
            }
        }
        function.containers.iter().copied().collect()
    }
}
