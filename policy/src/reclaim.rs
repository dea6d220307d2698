//! What is let go: what nobody wants for long enough, and what others need more.
//!
//! Where the host is full, room for requests that wait is made in this order: idle containers of their own account; machines
//! that run nothing (empty ones, warming ones, those with idle containers), of another account only if the one that waits
//! runs nothing itself or would have no more for its share than that one has; at last, of the account with the most for its share, the
//! machine that runs the least: it takes nothing new and goes when what runs in it is done.

use std::sync::Arc;

use crate::host::Step;
use crate::world::{HostRoom, RestClass, TRIED, Timer};
use crate::{
    Amount, Command, ContainerState, MachineId, MachineState, Purpose, Reason, Refusal, RequestId, RequestState, Shape,
    World,
};

/// How many idle containers or machines at rest, the longest unused first, are looked at for one request.
const LOOKED_AT: usize = 64;

/// What a request that waits needs of the host.
struct Claim {
    load: u64,
    account: Arc<str>,
    runtime: Arc<str>,
    request: RequestId,
    needs: Amount,
    shape: Shape,
    machines: u32,
    /// How many boot or come free for it already.
    coming: u32,
}

impl Claim {
    /// What the account would have for its share with one machine more than those that come.
    fn load_after(&self, world: &World) -> u64 {
        let machines = u64::from(self.coming) + 1;
        world.load_with(&self.account, machines * u64::from(self.shape.memory_mib))
    }
}

impl Step<'_> {
    /// Takes the timers that are due.
    pub(crate) fn reclaim(&mut self) {
        if self.world.draining {
            return;
        }
        let now = self.world.now.mono;
        while let Some(timer) = self.world.timers.due(now) {
            match timer {
                Timer::Deadline(request) => self.deadline(request),
                Timer::ContainerIdle(container) => {
                    if let Some((machine, idle)) = self.world.idle_container_due(container) {
                        self.decide(Command::StopContainer { machine, container }, Reason::Idle { idle });
                    }
                }
                Timer::MachineIdle(machine) => {
                    if let Some(idle) = self.world.idle_machine_due(machine) {
                        let command = Command::DestroyMachine { machine, gently: true };
                        self.decide(command, Reason::Idle { idle });
                    }
                }
                Timer::Surplus(runtime) => self.surplus(&runtime),
                Timer::Backoff(runtime) => {
                    self.world.unsettled.insert(runtime);
                }
            }
        }
    }

    fn deadline(&mut self, id: RequestId) {
        let Some(request) = self.world.request(id) else {
            return;
        };
        if request.state == RequestState::Waiting {
            let waited = self.since(request.arrived.mono);
            self.refuse(id, Refusal::QueueTimeout { waited });
        }
    }

    /// The largest machines go first: the pool should hold standard ones.
    fn surplus(&mut self, runtime: &Arc<str>) {
        let target = self.world.rules.warming.get(runtime).copied().unwrap_or(0);
        let Some(entry) = self.world.runtime(runtime) else {
            return;
        };
        let warming = entry.warming.len();
        let surplus: Vec<_> = entry.warming.roomiest().take(warming.saturating_sub(target)).collect();
        let mut next = None;
        for machine in surplus {
            let ready = self.world.machine(machine).and_then(|found| found.ready);
            let due = ready.map_or(self.world.now.mono, |ready| {
                ready.mono.saturating_add(self.world.rules.machine_idle)
            });
            if due > self.world.now.mono {
                next = Some(next.map_or(due, |next: crate::Mono| next.min(due)));
                continue;
            }
            let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
            let reason = Reason::Surplus {
                warming: count(warming),
                target: count(target),
            };
            self.decide(Command::DestroyMachine { machine, gently: true }, reason);
        }
        if let Some(at) = next {
            self.world.timers.set(at, Timer::Surplus(runtime.clone()));
        }
    }

    /// Nothing runs any more in a machine that is to go.
    pub(crate) fn quiet(&mut self, machine: MachineId) {
        let Some(found) = self.world.machine(machine) else {
            return;
        };
        if found.running > 0 {
            return;
        }
        if self.world.draining && found.state != MachineState::Stopping {
            self.decide(Command::DestroyMachine { machine, gently: true }, Reason::Drain);
        } else if found.state == MachineState::Closing {
            self.decide(Command::DestroyMachine { machine, gently: false }, Reason::Closed);
        }
    }

    // --- the host is full ---

    /// Where an account's own limits keep it from another machine, room is made of what lies idle in those that it has.
    pub(crate) fn live_within_limits<'a>(&mut self, runtimes: impl Iterator<Item = &'a Arc<str>>) {
        let mut claims = Vec::new();
        for runtime in runtimes {
            let Some(entry) = self.world.runtime(runtime) else {
                continue;
            };
            for (load, account) in entry.limited.iter().take(TRIED) {
                let group = self
                    .world
                    .group(account, runtime)
                    .filter(|group| group.need > group.wanted);
                let oldest = group.and_then(|group| group.queue.oldest());
                claims.extend(oldest.and_then(|id| self.claim(id, *load, 1)));
            }
        }
        let large = self.world.first_large().take(TRIED);
        claims.extend(large.filter_map(|id| self.claim(id, 0, 1)));
        claims.retain(|claim| self.world.may_run(&claim.account) && !self.world.may_have(&claim.account, claim.shape));
        for claim in claims {
            self.world.lacking.insert(claim.runtime.clone());
            if !self.world.will_have(&claim.account, claim.shape) && !self.evict(&claim) {
                self.give_up_own(&claim);
            }
        }
    }

    /// Destroys machines of the account that run nothing, as many as its limits need; none where they would not do.
    fn give_up_own(&mut self, claim: &Claim) {
        let world = &self.world;
        let limits = world.rules.limits(&claim.account);
        let Some(account) = world.account(&claim.account) else {
            return;
        };
        let machines = account
            .groups
            .values()
            .flat_map(|group| group.rooms.iter())
            .take(LOOKED_AT);
        let mut at_rest: Vec<_> = machines
            .filter_map(|id| world.machine(id))
            .filter_map(|machine| Some((machine.rest?, machine.id, machine.shape.memory_mib)))
            .collect();
        at_rest.sort_unstable();
        let mut machines = account.machines.saturating_sub(account.ending);
        let mut memory = account.memory_mib.saturating_sub(account.ending_mib);
        let mut victims = Vec::new();
        let fits = |machines: u32, memory: u64| {
            machines < limits.machines && memory + u64::from(claim.shape.memory_mib) <= limits.memory_mib
        };
        for (_, machine, its) in at_rest {
            if fits(machines, memory) {
                break;
            }
            machines = machines.saturating_sub(1);
            memory = memory.saturating_sub(its.into());
            victims.push(machine);
        }
        if fits(machines, memory) {
            self.destroy_for(claim, victims);
        }
    }

    fn destroy_for(&mut self, claim: &Claim, machines: Vec<MachineId>) {
        for machine in machines {
            let reason = Reason::Room {
                request: claim.request,
                needs: claim.needs,
            };
            self.decide(Command::DestroyMachine { machine, gently: false }, reason);
        }
    }

    fn claim(&self, id: RequestId, load: u64, machines: u32) -> Option<Claim> {
        let request = self.world.request(id)?;
        let needs = request.first()?.amount;
        Some(Claim {
            load,
            account: request.demand.account.clone(),
            runtime: request.demand.runtime.clone(),
            request: id,
            needs,
            shape: self.world.rules.shape_for(needs)?,
            machines,
            coming: 0,
        })
    }

    /// What the host will have beside what requests that wait need, once what ends has ended. Where it is `full`, room is made
    /// for them.
    pub(crate) fn make_room(&mut self, full: bool) -> HostRoom {
        let mut soon = self.world.free().plus(self.world.ending);
        for mut claim in self.claims() {
            let room = HostRoom::of(claim.shape);
            for _ in 0..claim.machines {
                if !room.fits(soon) {
                    if !full || self.evict(&claim) {
                        break;
                    }
                    let Some(freed) = self.take_at_rest(&claim, soon).or_else(|| self.close(&claim, soon)) else {
                        break;
                    };
                    soon = soon.plus(freed);
                }
                soon = soon.minus(room);
                claim.coming += 1;
            }
        }
        soon
    }

    /// Who needs how many machines that do not boot yet, the account with the least for its share first.
    fn claims(&self) -> Vec<Claim> {
        let world = &self.world;
        let mut claims = Vec::new();
        for runtime in &world.lacking {
            let Some(entry) = world.runtime(runtime) else { continue };
            // Those that boot go to the first.
            let mut booting = entry.booting;
            for (load, account) in entry.claimants.iter().take(TRIED) {
                let Some(group) = world.group(account, runtime) else {
                    continue;
                };
                let coming = group.wanted.min(booting);
                booting -= coming;
                let machines = group.wanted - coming;
                let oldest = group.queue.oldest().filter(|_| machines > 0);
                let shape = world.rules.standard;
                let claim = oldest.and_then(|id| self.claim(id, *load, machines));
                claims.extend(claim.map(|claim| Claim { shape, coming, ..claim }));
            }
        }
        let large = world.first_large().filter_map(|id| self.claim(id, 0, 1));
        let allowed = large.filter(|claim| world.may_reserve(&claim.account, claim.shape));
        claims.extend(allowed.take(TRIED).map(|claim| Claim {
            load: world.load(&claim.account),
            ..claim
        }));
        claims.sort_by_key(|claim| (claim.load, claim.request));
        claims
    }

    /// Stops idle containers of the account, the longest idle first, where that makes room in a machine of its own.
    fn evict(&mut self, claim: &Claim) -> bool {
        let Some(group) = self.world.group(&claim.account, &claim.runtime) else {
            return false;
        };
        if group.stopping.covers(claim.needs) {
            return true;
        }
        // Machines that could not make its container are of no use to it.
        let lost = self.world.request(claim.request).map(|request| &request.lost);
        let idle = group.idle_order.iter().take(LOOKED_AT);
        let machine = idle
            .filter_map(|(_, container)| self.world.machine(self.world.container(*container)?.machine))
            .filter(|machine| lost.is_none_or(|lost| !lost.contains(&machine.id)))
            .find(|machine| {
                let counts = |state| matches!(state, ContainerState::Idle | ContainerState::Stopping);
                claim.needs.fits(self.room_with(machine.id, counts))
            })
            .map(|machine| machine.id);
        let Some(machine) = machine else { return false };
        let mut room = self.room_with(machine, |state| state == ContainerState::Stopping);
        let containers = self.world.machine(machine).map(|found| found.containers.clone());
        let mut idle: Vec<_> = containers
            .into_iter()
            .flatten()
            .filter_map(|id| self.world.container(id))
            .filter(|container| container.state == ContainerState::Idle)
            .map(|container| (container.since, container.id, container.kind.amount))
            .collect();
        idle.sort_unstable();
        for (_, container, amount) in idle {
            if claim.needs.fits(room) {
                break;
            }
            let reason = Reason::Room {
                request: claim.request,
                needs: claim.needs,
            };
            if self.decide(Command::StopContainer { machine, container }, reason) {
                room = room.plus(amount);
            }
        }
        true
    }

    /// What a machine would have free if its containers in such a state had ended.
    fn room_with(&self, machine: MachineId, counts: impl Fn(ContainerState) -> bool) -> Amount {
        let Some(machine) = self.world.machine(machine) else {
            return Amount::default();
        };
        let containers = machine.containers.iter().filter_map(|id| self.world.container(*id));
        containers
            .filter(|container| counts(container.state))
            .fold(machine.free(), |sum, container| sum.plus(container.kind.amount))
    }

    /// Destroys machines that run nothing, as many as give the room; none where they would not do. Says what that frees.
    fn take_at_rest(&mut self, claim: &Claim, soon: HostRoom) -> Option<HostRoom> {
        let world = &self.world;
        let after = claim.load_after(world);
        let runs_nothing = world.account(&claim.account).is_none_or(|account| account.running == 0);
        let allowed = |class: RestClass, machine: MachineId| {
            let machine = world.machine(machine)?;
            // Only where nothing else would do, those of accounts that have less.
            let last = match (&machine.account, class) {
                (None, _) if machine.reserved.is_some() => return None,
                (None, _) | (Some(_), RestClass::Empty) => false,
                (Some(owner), _) => *owner != claim.account && world.load(owner) < after,
            };
            (!last || runs_nothing).then(|| (last, machine.id, HostRoom::of(machine.shape)))
        };
        let candidates = world.at_rest.iter().take(LOOKED_AT);
        let mut candidates: Vec<_> = candidates.filter_map(|(class, _, id)| allowed(*class, *id)).collect();
        candidates.sort_by_key(|(last, ..)| *last);
        let (mut freed, mut victims) = (HostRoom::default(), Vec::new());
        for (_, machine, room) in candidates {
            freed = freed.plus(room);
            victims.push(machine);
            if HostRoom::of(claim.shape).fits(soon.plus(freed)) {
                break;
            }
        }
        if !HostRoom::of(claim.shape).fits(soon.plus(freed)) {
            return None;
        }
        self.destroy_for(claim, victims);
        Some(freed)
    }

    /// Closes the machines that run the least of the account that has the most for its share, as long as that is more than the
    /// one that waits would have; none where they would not do.
    fn close(&mut self, claim: &Claim, soon: HostRoom) -> Option<HostRoom> {
        let world = &self.world;
        let (other_load, other) = world.loads.last()?;
        let after = claim.load_after(world);
        if *other == claim.account || *other_load <= after {
            return None;
        }
        let groups = world.account(other)?.groups.values();
        let mut machines: Vec<_> = groups
            .flat_map(|group| group.rooms.iter())
            .filter_map(|id| world.machine(id))
            .map(|machine| (machine.running, machine.id, machine.shape))
            .collect();
        machines.sort_unstable();
        let wanted = HostRoom::of(claim.shape);
        let (mut freed, mut closed) = (HostRoom::default(), Vec::new());
        for (_, machine, shape) in machines {
            // Of what it has left it keeps more than the one that waits will have.
            let left = world.load_without(other, freed.memory_mib);
            if wanted.fits(soon.plus(freed)) || left <= after {
                break;
            }
            freed = freed.plus(HostRoom::of(shape));
            closed.push(machine);
        }
        if !wanted.fits(soon.plus(freed)) {
            return None;
        }
        let reason = Reason::Share {
            account: claim.account.clone(),
            has_mib: world.load(&claim.account) / crate::world::SHARE_SCALE,
            other_has_mib: other_load / crate::world::SHARE_SCALE,
        };
        for machine in closed {
            self.decide(Command::CloseMachine { machine }, reason.clone());
        }
        Some(freed)
    }

    // --- shutting down ---

    /// Refuses all that wait, and lets go of all that runs nothing.
    pub(crate) fn drain(&mut self) {
        let lines = self.world.accounts.values().flat_map(|account| account.line.values());
        let waiting: Vec<_> = lines.copied().collect();
        for request in waiting {
            self.refuse(request, Refusal::Draining);
        }
        let mut machines: Vec<_> = self.world.machines().map(|machine| machine.id).collect();
        machines.sort_unstable();
        for machine in machines {
            self.quiet(machine);
        }
    }

    /// Ends every request and every machine, whatever they are doing.
    pub(crate) fn abandon(&mut self) {
        let mut requests: Vec<_> = self
            .world
            .containers()
            .filter_map(|container| match container.state {
                ContainerState::Starting(Purpose::Serve(request)) => Some((container.id, Some(request), false)),
                ContainerState::Starting(Purpose::Ahead) => Some((container.id, None, false)),
                ContainerState::Busy(request) => Some((container.id, Some(request), true)),
                ContainerState::Idle | ContainerState::Stopping => None,
            })
            .collect();
        requests.sort_unstable();
        for (container, request, runs) in requests {
            if let Some(request) = request {
                // One that runs may have run: not the refusal that says to try again.
                let refusal = if runs { Refusal::MachineLost } else { Refusal::Draining };
                self.refuse(request, refusal);
            }
            self.world.stop(container);
        }
        let mut machines: Vec<_> = self.world.machines().map(|machine| machine.id).collect();
        machines.sort_unstable();
        for machine in machines {
            self.quiet(machine);
        }
    }
}
