//! How machines come to their ends, and what they are kept for.

use std::collections::BTreeSet;
use std::sync::Arc;

use stoker_credits::Class;

use super::{ContainerState, Cpu, HostRoom, Machine, MachineState, RequestState, Rest, RestClass, Timer, Touch, World};
use crate::{Amount, MachineId, Mono, RequestId, Shape};

impl World {
    /// A machine as it begins.
    pub(super) fn new_machine(&self, id: MachineId, runtime: &Arc<str>, shape: Shape, state: MachineState) -> Machine {
        let capacity = self.rules.capacity(shape);
        // One whose file system has no room for anything is as good as none.
        let growth_mib = match capacity.scratch_mib {
            0 => 0,
            _ => self.rules.max_drive_mib.saturating_sub(shape.drive_mib),
        };
        Machine {
            id,
            runtime: runtime.clone(),
            shape,
            state,
            account: None,
            allocated: Amount::default(),
            containers: BTreeSet::new(),
            // As every cgroup begins.
            cpu: Some(Cpu {
                class: Class::Normal,
                allowed_millis: shape.vcpus.saturating_mul(1000),
            }),
            credits: self.balance(shape, None),
            launched: None,
            created: self.now,
            ready: None,
            capacity,
            growth_mib,
            reserved: None,
            running: 0,
            assigned: self.now.mono,
            last_used: self.now.mono,
            rest: None,
            timed: false,
            weight: 0,
        }
    }

    pub(super) fn insert_machine(&mut self, machine: Machine) {
        self.used = self.used.plus(HostRoom::of(machine.shape));
        self.machines.insert(machine.id, machine);
    }

    /// A machine of a runtime boots.
    pub(super) fn boot_begun(&mut self, runtime: &Arc<str>, for_anyone: bool) {
        let entry = self.runtimes.entry(runtime.clone()).or_default();
        entry.all_booting += 1;
        entry.booting += u32::from(for_anyone);
        self.booting += 1;
    }

    /// A machine that was booted for a request of an account is for anyone now.
    pub(super) fn release(&mut self, id: MachineId, account: &Arc<str>) {
        let Some(machine) = self.machines.get_mut(&id) else {
            return;
        };
        machine.reserved = None;
        let (runtime, shape) = (machine.runtime.clone(), machine.shape);
        self.count_reserved(account, shape, false);
        let Some(machine) = self.machines.get(&id) else {
            return;
        };
        match machine.state {
            MachineState::Booting => self.runtimes.entry(runtime.clone()).or_default().booting += 1,
            MachineState::Warming => {
                let entry = self.runtimes.entry(runtime.clone()).or_default();
                entry.warming.insert(machine.room(), id);
                self.touched.push_back(Touch::Warming(runtime.clone()));
                self.watch_surplus(&runtime);
            }
            _ => {}
        }
        self.unsettled.insert(runtime);
    }

    /// The machine that boots for a request alone is not to be had: it needs another.
    pub(super) fn unreserve(&mut self, id: RequestId) {
        if let Some(request) = self.requests.get_mut(&id) {
            request.reserved = None;
            if request.state == RequestState::Waiting {
                let account = request.demand.account.clone();
                self.unsettled.insert(request.demand.runtime.clone());
                let order = request.order;
                self.change_large(&account, |requests| {
                    requests.insert(order, id);
                });
            }
        }
    }

    /// A machine of an account takes nothing new: its room is its account's no longer, and what is idle in it stops.
    pub(super) fn withdraw(&mut self, id: MachineId, state: MachineState) {
        let Some(machine) = self.machines.get_mut(&id) else {
            return;
        };
        machine.state = state;
        self.serving.remove(&(machine.assigned, id));
        let (free, runtime) = (machine.free(), machine.runtime.clone());
        let containers: Vec<_> = machine.containers.iter().copied().collect();
        let Some(name) = machine.account.clone() else {
            return;
        };
        let room = HostRoom::of(machine.shape);
        self.count(&name, |account| {
            account.ending = account.ending.plus(room);
            if account.launched.remove(&id) {
                account.launched_mib -= room.memory_mib;
            }
        });
        for id in containers {
            let Some(container) = self.containers.get(&id) else {
                continue;
            };
            if container.state == ContainerState::Idle {
                self.stop(id);
            } else if container.state == ContainerState::Stopping
                && let Some(group) = self.accounts.get_mut(&name).and_then(|a| a.groups.get_mut(&runtime))
            {
                group.stopping.subtract(container.kind.amount);
            }
        }
        if let Some(group) = self.group_mut(&name, &runtime) {
            group.gathering.take_if(|gathering| gathering.machine == id);
            group.rooms.remove(free, id);
        }
        self.refresh_group(&name, &runtime);
    }

    /// Takes a machine from those that serve or boot; it counts until it has ended.
    pub(super) fn retire(&mut self, id: MachineId) {
        let Some(machine) = self.machines.get_mut(&id) else {
            return;
        };
        let (was, runtime, capacity) = (machine.state, machine.runtime.clone(), machine.capacity);
        let (shape, reserved, account) = (machine.shape, machine.reserved.take(), machine.account.clone());
        let room = HostRoom::of(shape);
        if was == MachineState::Stopping {
            return;
        }
        self.await_nothing(id);
        let Some(machine) = self.machines.get_mut(&id) else {
            return;
        };
        if account.is_some() && was != MachineState::Closing {
            self.withdraw(id, MachineState::Stopping);
        } else {
            machine.state = MachineState::Stopping;
        }
        if was != MachineState::Closing {
            self.ending = self.ending.plus(room);
        }
        self.touched.push_back(Touch::Credits(id));
        if self.launched(id).is_some() {
            return self.refresh_rest(id);
        }
        let entry = self.runtimes.entry(runtime.clone()).or_default();
        match was {
            MachineState::Booting => self.boot_over(&runtime, reserved.is_none()),
            MachineState::Found => match account {
                Some(account) => self.found_no_longer(&account),
                None => self.boot_over(&runtime, true),
            },
            MachineState::Warming => entry.warming.remove(capacity, id),
            _ => {}
        }
        self.unsettled.insert(runtime);
        if let Some(request) = reserved {
            if let Some(account) = self
                .requests
                .get(&request)
                .map(|request| request.demand.account.clone())
            {
                self.count_reserved(&account, shape, false);
            }
            self.unreserve(request);
        }
        self.refresh_rest(id);
    }

    /// A machine of a runtime boots no longer.
    pub(super) fn boot_over(&mut self, runtime: &Arc<str>, for_anyone: bool) {
        let entry = self.runtimes.entry(runtime.clone()).or_default();
        entry.all_booting = entry.all_booting.saturating_sub(1);
        if for_anyone {
            entry.booting = entry.booting.saturating_sub(1);
        }
        self.booting = self.booting.saturating_sub(1);
        self.unsettled.insert(runtime.clone());
        self.unsettled.append(&mut self.lacking);
    }

    /// Sets a machine's place among those that run nothing, and says so where it waits for that.
    pub(super) fn refresh_rest(&mut self, id: MachineId) {
        let Some(machine) = self.machines.get_mut(&id) else {
            return;
        };
        let class = match machine.state {
            _ if machine.launched.is_some() => None,
            MachineState::Warming => Some(RestClass::Warming),
            MachineState::Active if machine.running > 0 => None,
            MachineState::Active if machine.containers.is_empty() => Some(RestClass::Empty),
            MachineState::Active => Some(RestClass::Idle),
            MachineState::Booting | MachineState::Found | MachineState::Closing | MachineState::Stopping => None,
        };
        let rest: Option<Rest> = class.map(|class| (class, machine.last_used));
        if rest != machine.rest {
            if let Some((class, since)) = machine.rest {
                self.at_rest.remove(&(class, since, id));
            }
            if let Some((class, since)) = rest {
                self.at_rest.insert((class, since, id));
                // It may be given up for what others lack.
                self.unsettled.append(&mut self.lacking);
            }
            machine.rest = rest;
        }
        if class == Some(RestClass::Empty) && !machine.timed {
            machine.timed = true;
            let at = machine.last_used.saturating_add(self.rules.machine_idle);
            self.timers.set(at, Timer::MachineIdle(id));
        }
        let goes = machine.state == MachineState::Closing || (self.draining && machine.state != MachineState::Stopping);
        if goes && machine.running == 0 {
            self.touched.push_back(Touch::Quiet(id));
        }
    }

    /// For how long an account's machine has been empty, if that is too long; else it is looked at later.
    pub(crate) fn idle_machine_due(&mut self, id: MachineId) -> Option<Mono> {
        let (now, limit) = (self.now.mono, self.rules.machine_idle);
        let machine = self.machines.get_mut(&id)?;
        machine.timed = false;
        if machine.state != MachineState::Active || !machine.containers.is_empty() {
            return None;
        }
        let due = machine.last_used.saturating_add(limit);
        if due <= now {
            return Some(now.saturating_sub(machine.last_used));
        }
        machine.timed = true;
        self.timers.set(due, Timer::MachineIdle(id));
        None
    }

    /// Watches whether the warming pool of a runtime keeps more than it should.
    pub(super) fn watch_surplus(&mut self, runtime: &Arc<str>) {
        let target = self.rules.warming.get(runtime).copied().unwrap_or(0);
        if self
            .runtimes
            .get(runtime)
            .is_some_and(|entry| entry.warming.len() > target)
        {
            let at = self.now.mono.saturating_add(self.rules.machine_idle);
            self.timers.set(at, Timer::Surplus(runtime.clone()));
        }
    }
}
