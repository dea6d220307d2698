//! What is let go: what nobody wants for long enough, and what others need more.
//!
//! Where the host is full, room for requests that wait is made in this order: idle containers of their own account; machines
//! that run nothing (empty ones, warming ones, those with idle containers), of another account only if the one that waits
//! runs nothing itself or would have no more for its share than that one has; at last, of the account with the most for its share, the
//! machine that runs the least: it takes nothing new and goes when what runs in it is done.

use std::sync::Arc;
use std::time::Duration;

use crate::gather::PATIENCE;
use crate::host::Step;
use crate::world::{Group, HostRoom, LOOKED_AT, RestClass, TRIED, Timer};
use crate::{
    Amount, Command, ContainerState, MachineId, MachineState, Mono, Purpose, Reason, Refusal, RequestId, RequestState,
    Shape, World,
};

/// How long a machine serves its account at least where others wait that have none; for each unit of the account's share.
const TURN: Duration = Duration::from_secs(5);

/// What a request that waits needs of the host.
struct Claim {
    load: u64,
    /// Since when its account waits.
    since: Mono,
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
                Timer::Overdue(account, runtime) => self.overdue(&account, &runtime),
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
                next = Some(next.map_or(due, |next: Mono| next.min(due)));
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
            for (load, _, account) in entry.limited.iter().take(TRIED) {
                let group = self
                    .world
                    .group(account, runtime)
                    .filter(|group| group.need > group.wanted);
                let oldest = group.and_then(|group| group.queue.oldest_standard());
                claims.extend(oldest.and_then(|id| self.claim(id, *load, 1)));
            }
        }
        let large = self.world.first_large().take(TRIED);
        claims.extend(large.filter_map(|id| self.claim(id, 0, 1)));
        claims.retain(|claim| self.world.may_run(&claim.account) && !self.world.may_have(&claim.account, claim.shape));
        claims.sort_by_key(|claim| claim.request);
        for claim in claims {
            self.world.lacking.insert(claim.runtime.clone());
            if !self.world.will_have(&claim.account, claim.shape) && !self.evict(&claim) {
                self.give_up_own(&claim, None);
            }
        }
    }

    /// Gives up machines of its own account for a request that has waited too long, where nothing else could help it: its
    /// account's limits let it have no other machine, or all that the account may run are others.
    pub(crate) fn give_way(&mut self, request: RequestId) {
        let Some(claim) = self.claim(request, 0, 1) else {
            return;
        };
        let (account, shape) = (&claim.account, claim.shape);
        if !self.world.may_have(account, shape) {
            if !self.world.will_have(account, shape) {
                self.give_up_own(&claim, None);
            }
        } else if !self.world.may_run(account) {
            self.give_up_own(&claim, Some(self.world.free().plus(self.world.ending)));
        }
    }

    /// Gives up machines of the account itself, as many as its limits need, and the host where it has only `soon`; none where
    /// they would not do. Those that run something are closed, and only for a request that has waited too long and can't
    /// run in any. Says what that frees.
    fn give_up_own(&mut self, claim: &Claim, soon: Option<HostRoom>) -> Option<HostRoom> {
        let world = &self.world;
        let account = world.account(&claim.account)?;
        let stuck = world.is_stuck(claim.request);
        // One request comes first at a time, and after what boots for another.
        let other_first = account.next.is_some_and(|next| next != claim.request) || account.reserved > 0;
        if stuck && other_first {
            return None;
        }
        // One after the other: others may need less, and what ends may go to accounts that have less.
        if soon.is_some() && (!stuck || account.ending > 0) {
            return None;
        }
        let given = self.own_machines_for(claim, soon, stuck)?;
        if stuck && self.older_needs(claim, &given) {
            return None;
        }
        if stuck {
            self.put_first(claim.request);
        }
        let mut freed = HostRoom::default();
        for machine in given {
            let Some(found) = self.world.machine(machine) else {
                continue;
            };
            freed = freed.plus(HostRoom::of(found.shape));
            if found.running > 0 {
                let (request, needs) = (claim.request, claim.needs);
                self.decide(Command::CloseMachine { machine }, Reason::Room { request, needs });
            } else {
                self.destroy_for(claim, vec![machine]);
            }
        }
        Some(freed)
    }

    /// Whether an older request of the same account waits that could run in one of these machines, or for which machines are to
    /// be given up first.
    fn older_needs(&self, claim: &Claim, machines: &[MachineId]) -> bool {
        let world = &self.world;
        let Some((account, request)) = world.account(&claim.account).zip(world.request(claim.request)) else {
            return false;
        };
        let soon = world.free().plus(world.ending);
        let may_be_helped = |id| {
            let Some(claim) = self.claim(id, 0, 1).filter(|_| world.is_stuck(id)) else {
                return false;
            };
            let warming = world.runtime(&claim.runtime).map(|entry| &entry.warming);
            let ready = warming.is_some_and(|rooms| rooms.tightest(claim.needs, &[]).is_some());
            self.own_machines_for(&claim, (!ready).then_some(soon), true).is_some()
        };
        account.groups.iter().any(|(runtime, group)| {
            let runs = |machine| world.machine(machine).is_some_and(|found| found.runtime == *runtime);
            let machines: Vec<_> = machines.iter().copied().filter(|machine| runs(*machine)).collect();
            let heads = group.queue.heads().take(TRIED).filter_map(|(_, id)| world.request(id));
            let mut older = heads.take_while(|older| older.order < request.order);
            older.any(|older| {
                let could_run = machines.iter().any(|machine| world.may_run_in(older.id, *machine));
                could_run || may_be_helped(older.id)
            })
        })
    }

    /// The machines of an account that have to go for one of its requests, those that run the least first: as many as its
    /// limits need, and the host where it has only `soon`; `None` where all would not do. Only those that run nothing, unless
    /// others may be closed.
    fn own_machines_for(&self, claim: &Claim, soon: Option<HostRoom>, closing: bool) -> Option<Vec<MachineId>> {
        let world = &self.world;
        let limits = world.rules.limits(&claim.account);
        let account = world.account(&claim.account)?;
        let machines = account.groups.values().flat_map(Group::machines).take(LOOKED_AT);
        let machines = machines.filter_map(|id| world.machine(id));
        let mut machines: Vec<_> = machines
            .filter(|machine| machine.rest.is_some() || closing)
            .map(|machine| (machine.running, machine.rest, machine.id, machine.shape))
            .collect();
        machines.sort_unstable();
        let fits = |given: usize, freed: HostRoom| {
            let given = u32::try_from(given).unwrap_or(u32::MAX);
            let left = account.machines.saturating_sub(account.ending).saturating_sub(given);
            let memory = account.lasting_mib().saturating_sub(freed.memory_mib);
            let host = soon.is_none_or(|soon| HostRoom::of(claim.shape).fits(soon.plus(freed)));
            host && left < limits.machines && memory + u64::from(claim.shape.memory_mib) <= limits.memory_mib
        };
        let (mut freed, mut given) = (HostRoom::default(), Vec::new());
        for (_, _, machine, shape) in machines {
            if fits(given.len(), freed) {
                break;
            }
            freed = freed.plus(HostRoom::of(shape));
            given.push(machine);
        }
        fits(given.len(), freed).then_some(given)
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
        let account = self.world.account(&request.demand.account)?;
        Some(Claim {
            load,
            since: request.arrived.mono.max(account.without_since),
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
                    let freed = self
                        .take_at_rest(&claim, soon)
                        .or_else(|| self.close(&claim, soon))
                        .or_else(|| self.take_turn(&claim, soon))
                        .or_else(|| self.give_up_own(&claim, Some(soon)));
                    let Some(freed) = freed else { break };
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
            for (load, _, account) in entry.claimants.iter().take(TRIED) {
                let Some(group) = world.group(account, runtime) else {
                    continue;
                };
                let coming = group.wanted.min(booting);
                booting -= coming;
                let machines = group.wanted - coming;
                let oldest = group.queue.oldest_standard().filter(|_| machines > 0);
                let claim = oldest.and_then(|id| self.claim(id, *load, machines));
                claims.extend(claim.map(|claim| Claim { coming, ..claim }));
            }
        }
        let large = world.first_large().filter_map(|id| self.claim(id, 0, 1));
        let allowed = large.filter(|claim| world.may_reserve(&claim.account, claim.shape));
        claims.extend(allowed.take(TRIED).map(|claim| Claim {
            load: world.load(&claim.account),
            ..claim
        }));
        claims.sort_by_key(|claim| (claim.load, claim.since, claim.request));
        claims
    }

    /// Stops idle containers of the account, the longest idle first, where that makes room in a machine of its own.
    fn evict(&mut self, claim: &Claim) -> bool {
        let Some(group) = self.world.group(&claim.account, &claim.runtime) else {
            return false;
        };
        let gathered = group
            .gathering
            .is_some_and(|gathering| gathering.request == claim.request);
        if gathered || group.stopping.covers(claim.needs) {
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
                claim.needs.fits(self.world.room_with(machine.id, counts))
            })
            .map(|machine| machine.id);
        let Some(machine) = machine else { return false };
        self.stop_idle(machine, claim.request, claim.needs);
        true
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
            .flat_map(Group::machines)
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

    /// Closes the machines that have served their accounts longest, for an account that waits with none: where more accounts
    /// want machines than there are, they take turns. None is closed before its turn of [`TURN`] for each unit of its
    /// account's share is over, and none where they would not do.
    fn take_turn(&mut self, claim: &Claim, soon: HostRoom) -> Option<HostRoom> {
        let world = &self.world;
        let now = world.now.mono;
        let waits = claim.since.saturating_add(PATIENCE) <= now;
        if !waits || claim.coming > 0 || world.load(&claim.account) > 0 {
            return None;
        }
        let wanted = HostRoom::of(claim.shape);
        let (mut freed, mut closed) = (HostRoom::default(), Vec::new());
        for (since, id) in world.serving.iter().take(LOOKED_AT) {
            if wanted.fits(soon.plus(freed)) {
                break;
            }
            let Some((machine, owner)) = world
                .machine(*id)
                .and_then(|found| Some((found, found.account.as_ref()?)))
            else {
                continue;
            };
            let turn = TURN.saturating_mul(world.rules.limits(owner).share);
            if since.saturating_add(turn) <= now {
                freed = freed.plus(HostRoom::of(machine.shape));
                closed.push((*id, world.load(owner)));
            }
        }
        if !wanted.fits(soon.plus(freed)) {
            return None;
        }
        for (machine, load) in closed {
            let reason = Reason::Share {
                account: claim.account.clone(),
                has_mib: 0,
                other_has_mib: load / crate::world::SHARE_SCALE,
            };
            self.decide(Command::CloseMachine { machine }, reason);
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
            // Not a command of its own: it goes with its machine.
            self.world.stop(container);
        }
        let mut machines: Vec<_> = self.world.machines().map(|machine| machine.id).collect();
        machines.sort_unstable();
        for machine in machines {
            self.quiet(machine);
        }
    }
}
