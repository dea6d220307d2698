//! Where an account itself stands in the way of its requests, by its limits or by what else it runs: machines of its own are
//! given up for them.

use std::sync::Arc;

use crate::full_host::Claim;
use crate::host::Step;
use crate::world::{HostRoom, LOOKED_AT, TRIED};
use crate::{Command, MachineId, Reason, RequestId};

impl Step<'_> {
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
                self.give_up_own(&claim, self.world.free().plus(self.world.ending));
            }
        }
    }

    /// Gives up machines of its own account for a request that has waited too long, where nothing else could help it: its
    /// account's limits let it have no other machine, or all that the account may run are others.
    pub(crate) fn give_way(&mut self, request: RequestId) {
        let Some(claim) = self.claim(request, 0, 1) else {
            return;
        };
        let (world, account, shape) = (&*self.world, &claim.account, claim.shape);
        let alone = if world.may_have(account, shape) {
            !world.may_run(account)
        } else {
            !world.will_have(account, shape)
        };
        if alone {
            self.give_up_own(&claim, world.free().plus(world.ending));
        }
    }

    /// Gives up machines of the account itself, as many as its limits need, and the host beside what it has `soon` and what may
    /// be ended of others; none where they would not do. Those that run something are closed, and only for a request that has
    /// waited too long and can't run in any. Says what that frees.
    pub(crate) fn give_up_own(&mut self, claim: &Claim, soon: HostRoom) -> Option<HostRoom> {
        let world = &self.world;
        let account = world.account(&claim.account)?;
        let stuck = world.is_stuck(claim.request);
        // One request comes first at a time, and after what boots for another.
        let other_first = account.next.is_some_and(|next| next != claim.request) || account.reserved.machines > 0;
        if stuck && other_first {
            return None;
        }
        // One after the other: others may need less, and what ends may go to accounts that have less.
        let limited = !world.will_have(&claim.account, claim.shape);
        if !limited && (!stuck || account.ending.machines > 0) {
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
    pub(crate) fn older_needs(&self, claim: &Claim, machines: &[MachineId]) -> bool {
        let world = &self.world;
        let Some((account, request)) = world.account(&claim.account).zip(world.request(claim.request)) else {
            return false;
        };
        let soon = world.free().plus(world.ending);
        let may_be_helped = |id| {
            let Some(claim) = self.claim(id, 0, 1).filter(|_| world.is_stuck(id)) else {
                return false;
            };
            self.own_machines_for(&claim, soon, true).is_some()
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
    /// limits need, and the host beside what it has `soon` and what may be ended of others; `None` where all would not do. Only
    /// those that run nothing, unless others may be closed.
    pub(crate) fn own_machines_for(&self, claim: &Claim, soon: HostRoom, closing: bool) -> Option<Vec<MachineId>> {
        let world = &self.world;
        let limits = world.rules.limits(&claim.account);
        let account = world.account(&claim.account)?;
        let machines = account.active().take(LOOKED_AT).filter_map(|id| world.machine(id));
        let mut machines: Vec<_> = machines
            .filter(|machine| machine.rest.is_some() || closing)
            .map(|machine| (machine.running, machine.rest, machine.id, machine.shape))
            .collect();
        machines.sort_unstable();
        let needs = HostRoom::of(claim.shape);
        // What others run may take long to end: that counts only where its own have to go in any case.
        let limited = !world.will_have(&claim.account, claim.shape);
        let warming = world.runtime(&claim.runtime).map(|entry| &entry.warming);
        let spare = world.spare_disk(&claim.account);
        let ready = warming.is_some_and(|rooms| rooms.tightest(claim.needs, spare, &[]).is_some());
        // What the first of them give, for each number of them.
        let (mut given, mut given_running) = (HostRoom::default(), 0);
        let mut claims = vec![claim.clone()];
        for (running, _, _, shape) in &machines {
            (given, given_running) = (given.plus(HostRoom::of(*shape)), given_running + running);
            claims.push(Claim {
                given,
                given_running,
                ..claim.clone()
            });
        }
        let do_not = |claim: &Claim| {
            let soon = soon.plus(claim.given);
            let others =
                || world.at_rest_for(claim, soon).is_some() || (limited && world.busy_for(claim, soon).is_some());
            !account.lasting().minus(claim.given).plus(needs).within(limits) || !(ready || needs.fits(soon) || others())
        };
        if claims.last().is_none_or(do_not) {
            return None;
        }
        machines.truncate(claims.partition_point(do_not));
        Some(machines.into_iter().map(|(_, _, id, _)| id).collect())
    }
}
