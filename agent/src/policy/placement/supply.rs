//! Machines for those that wait, and for the warming pool.

use std::collections::HashMap;
use std::sync::Arc;

use super::{
    Action, Container, ContainerId, ContainerState, Demand, DestroyReason, Machine, MachineId, MachineState, Placement,
    Refusal, StopReason, Waiting, refuse,
};
use crate::policy::{Amount, Shape, Time};

/// What will be there if nothing more is done, less what those before in the queue will take of it. Made anew at each
/// step, so that nothing promised to a request that has gone is kept.
struct Outlook {
    /// Machines and memory that may still be started now.
    slots_now: i64,
    memory_now: i64,
    /// The same once machines that are stopping have ended.
    slots_soon: i64,
    memory_soon: i64,
    boots: usize,
    /// Machines that boot and are nobody's yet.
    booting: Vec<(Arc<str>, Amount)>,
    /// What is left of machines that will be someone's.
    taken: Vec<(Arc<str>, Arc<str>, Amount)>,
    /// What was promised of active machines.
    promised: HashMap<MachineId, Amount>,
}

enum Cover {
    /// It will have a place without more being done, or must wait until it can be done.
    Wait,
    Boot(Shape),
    Evict(Vec<ContainerId>),
    Reclaim(Vec<MachineId>),
    Refuse,
}

impl Placement {
    pub(super) fn boot_failed(&mut self, runtime: Arc<str>) {
        let boots = self.boots.entry(runtime).or_default();
        boots.failures = boots.failures.saturating_add(1);
        let doublings = (boots.failures - 1).min(16);
        let backoff = self.rules.boot_backoff.saturating_mul(1 << doublings);
        boots.not_before = self.now.saturating_add(backoff.min(self.rules.boot_backoff_max));
    }

    pub(super) fn supply(&mut self, actions: &mut Vec<Action>) {
        if self.draining {
            return;
        }
        let mut outlook = self.outlook();
        let queue: Vec<_> = self.queue.iter().cloned().collect();
        for waiting in queue {
            match self.cover(&waiting, &mut outlook) {
                Cover::Wait => {}
                Cover::Boot(shape) => self.boot(waiting.demand.runtime, shape, actions),
                Cover::Evict(containers) => {
                    for id in containers {
                        self.stop_container(id, StopReason::Room, actions);
                    }
                }
                Cover::Reclaim(machines) => {
                    for id in machines {
                        self.destroy(id, DestroyReason::Room, actions);
                    }
                }
                Cover::Refuse => {
                    self.queue.retain(|other| other.request != waiting.request);
                    refuse(waiting.request, Refusal::BootFailing, actions);
                }
            }
        }
        self.top_up(&mut outlook, actions);
    }

    /// When a boot that failed may be tried again.
    pub(super) fn supply_wakes(&self) -> impl Iterator<Item = Time> {
        self.boots
            .values()
            .map(|boots| boots.not_before)
            .filter(|at| *at > self.now)
    }

    fn boot(&mut self, runtime: Arc<str>, shape: Shape, actions: &mut Vec<Action>) {
        let id = MachineId(self.new_id());
        let machine = Machine {
            runtime: runtime.clone(),
            shape,
            capacity: shape.capacity(self.rules.reserve_mib),
            state: MachineState::Booting,
            allocated: Amount::default(),
            containers: Default::default(),
            ready_at: self.now,
            last_used: self.now,
        };
        self.machines.insert(id, machine);
        actions.push(Action::BootMachine {
            machine: id,
            runtime,
            shape,
        });
    }

    fn outlook(&self) -> Outlook {
        let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        let memory = |shape: Shape| i64::from(shape.memory_mib);
        let stopping = |machine: &&Machine| matches!(machine.state, MachineState::Stopping { .. });
        let all = || self.machines.values();
        let booting: Vec<_> = all()
            .filter(|machine| machine.state == MachineState::Booting)
            .map(|machine| (machine.runtime.clone(), machine.capacity))
            .collect();
        let slots_now = count(self.rules.max_machines) - count(self.machines.len());
        let memory_now = i64::try_from(self.rules.host_memory_mib).unwrap_or(i64::MAX)
            - all().map(|machine| memory(machine.shape)).sum::<i64>();
        Outlook {
            slots_now,
            memory_now,
            slots_soon: slots_now + count(all().filter(stopping).count()),
            memory_soon: memory_now + all().filter(stopping).map(|machine| memory(machine.shape)).sum::<i64>(),
            boots: self.rules.concurrent_boots.saturating_sub(booting.len()),
            booting,
            taken: Vec::new(),
            promised: HashMap::new(),
        }
    }

    /// How a request that has no place now will come to one.
    fn cover(&self, waiting: &Waiting, outlook: &mut Outlook) -> Cover {
        let Demand {
            account,
            runtime,
            amount,
            ..
        } = &waiting.demand;
        let stopping = |state: &ContainerState| matches!(state, ContainerState::Stopping);
        if self.promise(waiting, outlook, stopping).is_some()
            || outlook.share(account, runtime, *amount)
            || outlook.claim(account, runtime, *amount)
        {
            return Cover::Wait;
        }
        if let Some(boots) = self.boots.get(runtime) {
            let booting = self.boots_now(runtime);
            if boots.not_before > self.now || booting {
                let hopeless = boots.failures >= self.rules.boot_failures && !booting;
                return if hopeless { Cover::Refuse } else { Cover::Wait };
            }
        }
        let Some(shape) = self.rules.shape_for(*amount) else {
            return Cover::Wait;
        };
        let memory = i64::from(shape.memory_mib);
        let cover = if outlook.fits_now(memory) {
            if outlook.boots == 0 {
                return Cover::Wait;
            }
            outlook.boots -= 1;
            Cover::Boot(shape)
        } else if outlook.fits_soon(memory) {
            Cover::Wait
        } else {
            let spare =
                |state: &ContainerState| matches!(state, ContainerState::Stopping | ContainerState::Idle { .. });
            if let Some(machine) = self.promise(waiting, outlook, spare) {
                return Cover::Evict(self.oldest_idle(machine, outlook));
            }
            let Some(victims) = self.victims(memory, outlook) else {
                return Cover::Wait;
            };
            for machine in victims.iter().filter_map(|id| self.machines.get(id)) {
                outlook.slots_soon += 1;
                outlook.memory_soon += i64::from(machine.shape.memory_mib);
            }
            Cover::Reclaim(victims)
        };
        outlook.take(memory);
        let left = shape.capacity(self.rules.reserve_mib).minus(*amount);
        outlook.taken.push((account.clone(), runtime.clone(), left));
        cover
    }

    /// Finds an active machine of the account that has the room once its containers in a state that `counts` have
    /// ended, and promises the room.
    fn promise(
        &self,
        waiting: &Waiting,
        outlook: &mut Outlook,
        counts: impl Fn(&ContainerState) -> bool,
    ) -> Option<MachineId> {
        let demand = &waiting.demand;
        let machines = self.active.get(&demand.account)?;
        machines.iter().copied().find(|id| {
            let Some(machine) = self.machines.get(id) else {
                return false;
            };
            if machine.runtime != demand.runtime || waiting.lost.contains(id) {
                return false;
            }
            let spare = self.containers_of(machine).filter(|container| counts(&container.state));
            let room = spare.fold(machine.free(), |sum, container| sum.plus(container.amount));
            let promised = outlook
                .promised
                .get(id)
                .copied()
                .unwrap_or_default()
                .plus(demand.amount);
            let fits = promised.fits(room);
            if fits {
                outlook.promised.insert(*id, promised);
            }
            fits
        })
    }

    /// Idle containers of a machine, those unused for longest, as many as what was promised of it takes.
    fn oldest_idle(&self, id: MachineId, outlook: &Outlook) -> Vec<ContainerId> {
        let Some(machine) = self.machines.get(&id) else {
            return Vec::new();
        };
        let promised = outlook.promised.get(&id).copied().unwrap_or_default();
        let mut room = self
            .containers_of(machine)
            .filter(|container| matches!(container.state, ContainerState::Stopping))
            .fold(machine.free(), |sum, container| sum.plus(container.amount));
        let mut idle: Vec<_> = machine
            .containers
            .iter()
            .filter_map(|id| {
                let container = self.containers.get(id)?;
                let ContainerState::Idle { since } = container.state else {
                    return None;
                };
                Some((since, *id, container.amount))
            })
            .collect();
        idle.sort_unstable();
        let mut stop = Vec::new();
        for (_, id, amount) in idle {
            if promised.fits(room) {
                break;
            }
            room = room.plus(amount);
            stop.push(id);
        }
        stop
    }

    /// Machines that run nothing and whose end would make room: empty ones, then warming ones, then those with idle
    /// containers, each the longest unused first. `None` where all of them would not do.
    fn victims(&self, memory: i64, outlook: &Outlook) -> Option<Vec<MachineId>> {
        let mut idle: Vec<_> = self
            .machines
            .iter()
            .filter(|(id, machine)| !outlook.promised.contains_key(id) && self.at_rest(machine))
            .filter_map(|(id, machine)| {
                let class = match machine.state {
                    MachineState::Active { .. } if machine.containers.is_empty() => 0,
                    MachineState::Warming => 1,
                    MachineState::Active { .. } => 2,
                    MachineState::Booting | MachineState::Stopping { .. } => return None,
                };
                Some((class, machine.last_used, *id, i64::from(machine.shape.memory_mib)))
            })
            .collect();
        idle.sort_unstable();
        let (mut slots, mut room) = (outlook.slots_soon, outlook.memory_soon);
        let mut victims = Vec::new();
        for (_, _, id, its) in idle {
            if slots >= 1 && room >= memory {
                break;
            }
            slots += 1;
            room += its;
            victims.push(id);
        }
        (slots >= 1 && room >= memory).then_some(victims)
    }

    /// Boots what the warming pool lacks.
    fn top_up(&mut self, outlook: &mut Outlook, actions: &mut Vec<Action>) {
        let shape = self.rules.standard;
        let memory = i64::from(shape.memory_mib);
        for (runtime, target) in self.rules.warming.clone() {
            let is_warming = |machine: &&Machine| machine.state == MachineState::Warming && machine.runtime == runtime;
            let warming = self.machines.values().filter(is_warming).count();
            let coming = outlook.booting.iter().filter(|(of, _)| *of == runtime).count();
            for _ in (warming + coming)..target {
                let held = self
                    .boots
                    .get(&runtime)
                    .is_some_and(|boots| boots.not_before > self.now || self.boots_now(&runtime));
                if held || outlook.boots == 0 || !outlook.fits_now(memory) {
                    break;
                }
                outlook.boots -= 1;
                outlook.take(memory);
                self.boot(runtime.clone(), shape, actions);
            }
        }
    }

    /// After a failure machines of a runtime are tried one at a time.
    fn boots_now(&self, runtime: &Arc<str>) -> bool {
        let mut all = self.machines.values();
        all.any(|machine| machine.state == MachineState::Booting && machine.runtime == *runtime)
    }

    fn containers_of(&self, machine: &Machine) -> impl Iterator<Item = &Container> {
        machine.containers.iter().filter_map(|id| self.containers.get(id))
    }
}

// === impl Outlook ===

impl Outlook {
    fn fits_now(&self, memory: i64) -> bool {
        self.slots_now >= 1 && self.memory_now >= memory
    }

    fn fits_soon(&self, memory: i64) -> bool {
        self.slots_soon >= 1 && self.memory_soon >= memory
    }

    /// Takes a slot and memory from what is there now and so from what will be.
    fn take(&mut self, memory: i64) {
        self.slots_now -= 1;
        self.memory_now -= memory;
        self.slots_soon -= 1;
        self.memory_soon -= memory;
    }

    /// Shares a machine that an earlier request of the same account will have.
    fn share(&mut self, account: &Arc<str>, runtime: &Arc<str>, amount: Amount) -> bool {
        let mut taken = self.taken.iter_mut();
        let fitting = taken.find(|(whose, of, left)| whose == account && of == runtime && amount.fits(*left));
        if let Some((_, _, left)) = fitting {
            *left = left.minus(amount);
            return true;
        }
        false
    }

    /// Claims a machine that boots already.
    fn claim(&mut self, account: &Arc<str>, runtime: &Arc<str>, amount: Amount) -> bool {
        let mut booting = self.booting.iter();
        let fitting = booting.position(|(of, capacity)| of == runtime && amount.fits(*capacity));
        let Some(at) = fitting else { return false };
        let (_, capacity) = self.booting.swap_remove(at);
        self.taken
            .push((account.clone(), runtime.clone(), capacity.minus(amount)));
        true
    }
}
