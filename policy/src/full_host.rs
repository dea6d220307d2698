//! Where the host is full, room for requests that wait is made in this order: idle containers of their own account; machines
//! that run nothing (empty ones, warming ones, those with idle containers), of another account only if the one that waits
//! runs nothing itself or would have no more for its share than that one has; at last, of the account with the most for its share, the
//! machine that runs the least: it takes nothing new and goes when what runs in it is done.

use std::sync::Arc;
use std::time::Duration;

use crate::gather::PATIENCE;
use crate::host::Step;
use crate::world::{Group, HostRoom, LOOKED_AT, RestClass, TRIED};
use crate::{Amount, Command, ContainerState, MachineId, Mono, Reason, RequestId, Shape, World};

/// How long a machine serves its account at least where others wait that have none; for each unit of the account's share.
const TURN: Duration = Duration::from_secs(5);

/// What a request that waits needs of the host.
pub(crate) struct Claim {
    pub(crate) load: u64,
    /// Since when its account waits.
    pub(crate) since: Mono,
    pub(crate) account: Arc<str>,
    pub(crate) runtime: Arc<str>,
    pub(crate) request: RequestId,
    pub(crate) needs: Amount,
    pub(crate) shape: Shape,
    pub(crate) machines: u32,
    /// How many boot or come free for it already.
    pub(crate) coming: u32,
}

impl Claim {
    /// What the account would have for its share with one machine more than those that come.
    pub(crate) fn load_after(&self, world: &World) -> u64 {
        let machines = u64::from(self.coming) + 1;
        world.load_with(&self.account, machines * u64::from(self.shape.memory_mib))
    }
}

impl Step<'_> {
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
    pub(crate) fn claims(&self) -> Vec<Claim> {
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

    pub(crate) fn claim(&self, id: RequestId, load: u64, machines: u32) -> Option<Claim> {
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

    /// Stops idle containers of the account, the longest idle first, where that makes room in a machine of its own.
    pub(crate) fn evict(&mut self, claim: &Claim) -> bool {
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
    pub(crate) fn take_at_rest(&mut self, claim: &Claim, soon: HostRoom) -> Option<HostRoom> {
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
    pub(crate) fn close(&mut self, claim: &Claim, soon: HostRoom) -> Option<HostRoom> {
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
    pub(crate) fn take_turn(&mut self, claim: &Claim, soon: HostRoom) -> Option<HostRoom> {
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

    pub(crate) fn destroy_for(&mut self, claim: &Claim, machines: Vec<MachineId>) {
        for machine in machines {
            let reason = Reason::Room {
                request: claim.request,
                needs: claim.needs,
            };
            self.decide(Command::DestroyMachine { machine, gently: false }, reason);
        }
    }
}
