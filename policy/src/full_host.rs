//! Where the host is full, room for requests that wait is made in this order: idle containers of their own account; machines
//! that run nothing (empty ones, warming ones, those with idle containers), of another account only if the one that waits
//! runs nothing itself or would have no more for its share than that one has; at last, of the account with the most for its share, the
//! machine that runs the least: it takes nothing new and goes when what runs in it is done.

use std::sync::Arc;
use std::time::Duration;

use crate::gather::{PATIENCE, runs_nothing};
use crate::host::Step;
use crate::world::{HostRoom, LOOKED_AT, RestClass, SHARE_SCALE, TRIED};
use crate::{Amount, Command, MachineId, Mono, Reason, RequestId, Shape, World};

/// How long a machine serves its account at least where others wait that have none; for each unit of the account's share.
const TURN: Duration = Duration::from_secs(5);

/// What a request that waits needs of the host.
#[derive(Clone)]
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
    /// What its account itself is to give up for it, and how many containers run something there.
    pub(crate) given: HostRoom,
    pub(crate) given_running: u32,
}

impl Claim {
    /// What the account would have for its share with one machine more than those that come, without what it gives up.
    pub(crate) fn load_after(&self, world: &World) -> u64 {
        let machines = i64::from(self.coming) + 1;
        let more = machines.saturating_mul(self.shape.memory_mib.into());
        world.load_with(&self.account, self.given.memory_mib, more)
    }
}

impl Step<'_> {
    /// What the host will have beside what requests that wait need, once what ends has ended. Where it is `full`, room is made
    /// for them.
    pub(crate) fn make_room(&mut self, full: bool) -> HostRoom {
        let mut soon = self.world.free().plus(self.world.ending);
        let mut held = None;
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
                        .or_else(|| self.give_up_own(&claim, soon));
                    let Some(freed) = freed else { break };
                    soon = soon.plus(freed);
                }
                // Drives that are there may not take its room piece by piece until it is whole.
                if held.is_none() && !room.fits(self.world.free()) {
                    held = Some((claim.account.clone(), claim.shape.drive_mib));
                }
                soon = soon.after(room);
                claim.coming += 1;
            }
        }
        self.world.hold_disk(held.filter(|(_, mib)| *mib > 0));
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
            given: HostRoom::default(),
            given_running: 0,
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
            .find(|machine| claim.needs.fits(self.world.room_with(machine.id, runs_nothing)))
            .map(|machine| machine.id);
        let Some(machine) = machine else { return false };
        self.stop_idle(machine, claim.request, claim.needs);
        true
    }

    /// Destroys machines that run nothing; says what that frees.
    fn take_at_rest(&mut self, claim: &Claim, soon: HostRoom) -> Option<HostRoom> {
        let machines = self.world.at_rest_for(claim, soon)?;
        let freed = self.world.room_of(&machines);
        self.destroy_for(claim, machines);
        Some(freed)
    }

    /// Closes machines of the account that has the most for its share.
    fn close(&mut self, claim: &Claim, soon: HostRoom) -> Option<HostRoom> {
        let machines = self.world.of_the_largest_for(claim, soon)?;
        Some(self.close_for(claim, machines))
    }

    /// Closes the machines that have served their accounts longest, for an account that has waited with none.
    fn take_turn(&mut self, claim: &Claim, soon: HostRoom) -> Option<HostRoom> {
        if claim.since.saturating_add(PATIENCE) > self.world.now.mono {
            return None;
        }
        let machines = self.world.turns_over_for(claim, soon)?;
        Some(self.close_for(claim, machines))
    }

    fn close_for(&mut self, claim: &Claim, machines: Vec<MachineId>) -> HostRoom {
        let freed = self.world.room_of(&machines);
        let world = &*self.world;
        let load = |id: &MachineId| Some(world.load(world.machine(*id)?.account.as_ref()?));
        let loads: Vec<_> = machines.iter().map(|id| load(id).unwrap_or(0)).collect();
        let has_mib = world.load(&claim.account) / SHARE_SCALE;
        for (machine, load) in machines.into_iter().zip(loads) {
            let reason = Reason::Share {
                account: claim.account.clone(),
                has_mib,
                other_has_mib: load / SHARE_SCALE,
            };
            self.decide(Command::CloseMachine { machine }, reason);
        }
        freed
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

/// Machines that may be ended for a request, beside the room that there is `soon`: as many as it needs, and none where they
/// would not do.
impl World {
    /// Machines of others that run something.
    pub(crate) fn busy_for(&self, claim: &Claim, soon: HostRoom) -> Option<Vec<MachineId>> {
        let largest = self.of_the_largest_for(claim, soon);
        largest.or_else(|| self.turns_over_for(claim, soon))
    }

    /// Machines that run nothing.
    pub(crate) fn at_rest_for(&self, claim: &Claim, soon: HostRoom) -> Option<Vec<MachineId>> {
        let after = claim.load_after(self);
        let running = self.account(&claim.account).map_or(0, |account| account.running);
        let runs_nothing = running <= claim.given_running;
        let allowed = |class: RestClass, machine: MachineId| {
            let machine = self.machine(machine)?;
            let own = machine.account.as_ref() == Some(&claim.account);
            if machine.reserved.is_some() || (own && claim.given.machines > 0) {
                return None;
            }
            // Only where nothing else would do, those of accounts that have less.
            let last = match (&machine.account, class) {
                (None, _) | (Some(_), RestClass::Empty) => false,
                (Some(owner), _) => !own && self.load(owner) < after,
            };
            (!last || runs_nothing).then_some((last, machine.id))
        };
        let candidates = self.at_rest.iter().take(LOOKED_AT);
        let mut candidates: Vec<_> = candidates.filter_map(|(class, _, id)| allowed(*class, *id)).collect();
        candidates.sort_by_key(|(last, _)| *last);
        self.enough(claim, soon, candidates.into_iter().map(|(_, id)| id))
    }

    /// Those that run the least of the account that has the most for its share, as long as that is more than the one that waits
    /// would have.
    fn of_the_largest_for(&self, claim: &Claim, soon: HostRoom) -> Option<Vec<MachineId>> {
        let gives = |name: &Arc<str>| *name == claim.account && claim.given.machines > 0;
        let (other_load, other) = self.loads.iter().rev().find(|(_, name)| !gives(name))?;
        let after = claim.load_after(self);
        if *other == claim.account || *other_load <= after {
            return None;
        }
        let machines = self.account(other)?.active().filter_map(|id| self.machine(id));
        let mut machines: Vec<_> = machines
            .map(|machine| (machine.running, machine.id, i64::from(machine.shape.memory_mib)))
            .collect();
        machines.sort_unstable();
        // Of what it has left it keeps more than the one that waits will have.
        let mut closed_mib = 0;
        let machines = machines.into_iter().map_while(|(_, id, memory_mib)| {
            let more = self.load_with(other, closed_mib, 0) > after;
            closed_mib += memory_mib;
            more.then_some(id)
        });
        self.enough(claim, soon, machines)
    }

    /// Those that have served their accounts longest, for an account that has none: where more accounts want machines than there
    /// are, they take turns. None before its turn of [`TURN`] for each unit of its account's share is over.
    fn turns_over_for(&self, claim: &Claim, soon: HostRoom) -> Option<Vec<MachineId>> {
        if claim.coming > 0 || self.load_with(&claim.account, claim.given.memory_mib, 0) > 0 {
            return None;
        }
        let machines = self.serving.iter().take(LOOKED_AT).filter(|(since, id)| {
            let owner = self.machine(*id).and_then(|machine| machine.account.as_ref());
            owner.filter(|owner| **owner != claim.account).is_some_and(|owner| {
                let turn = TURN.saturating_mul(self.rules.limits(owner).share);
                since.saturating_add(turn) <= self.now.mono
            })
        });
        self.enough(claim, soon, machines.map(|(_, id)| *id))
    }

    /// The first of them that give the room.
    fn enough(
        &self,
        claim: &Claim,
        soon: HostRoom,
        machines: impl Iterator<Item = MachineId>,
    ) -> Option<Vec<MachineId>> {
        let wanted = HostRoom::of(claim.shape);
        let (mut room, mut enough) = (soon, Vec::new());
        for id in machines {
            if wanted.fits(room) {
                break;
            }
            room = room.plus(self.room_of(&[id]));
            enough.push(id);
        }
        wanted.fits(room).then_some(enough)
    }

    fn room_of(&self, machines: &[MachineId]) -> HostRoom {
        let machines = machines.iter().filter_map(|id| self.machine(*id));
        machines.fold(HostRoom::default(), |sum, machine| {
            sum.plus(HostRoom::of(machine.shape))
        })
    }
}
