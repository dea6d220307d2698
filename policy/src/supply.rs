//! Which machines are booted: first for requests that wait, then for the warming pool.

use std::sync::Arc;

use crate::host::Step;
use crate::world::{HostRoom, TRIED};
use crate::{Command, MachineId, Mono, Reason, Refusal, Request, RequestId, Shape};

/// What keeps a machine from being booted now.
enum Held {
    /// Something that comes to an end: a boot, the time after one that failed, a machine that ends.
    Later,
    /// The host is full.
    Room,
}

/// Who comes first where a machine can be booted: the account that has the least for its share, then the one that waits
/// longest, then the oldest request.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Need {
    load: u64,
    since: Mono,
    order: u64,
}

impl Need {
    /// After all others.
    const LAST: Self = Self {
        load: u64::MAX,
        since: Mono::MAX,
        order: u64::MAX,
    };
}

/// A request that needs a machine larger than the standard one.
struct Large {
    need: Need,
    request: RequestId,
    runtime: Arc<str>,
    shape: Shape,
}

impl Step<'_> {
    /// Looks at the runtimes whose supply may have to change.
    pub(crate) fn supply(&mut self) {
        if self.world.draining {
            return;
        }
        let runtimes = std::mem::take(&mut self.world.unsettled);
        if runtimes.is_empty() {
            return;
        }
        // The one whose neediest account has the least comes first; of those of one account the one that waits longest.
        let mut order: Vec<_> = runtimes
            .into_iter()
            .map(|runtime| (self.neediest(&runtime), runtime))
            .collect();
        order.sort_unstable();
        for (_, runtime) in &order {
            self.refuse_hopeless(runtime);
        }
        // Room that comes free for a large machine is not given away piece by piece to accounts that have more.
        let (mut full, mut held) = (false, HostRoom::default());
        if !self.world.large.is_empty() {
            let first = order.iter().map(|(_, runtime)| self.neediest(runtime)).min();
            (full, held) = self.boot_large(first.unwrap_or(Need::LAST));
        }
        for (_, runtime) in &order {
            full |= self.boot_wanted(runtime, held);
        }
        if !self.world.large.is_empty() {
            full |= self.boot_large(Need::LAST).0;
        }
        self.live_within_limits(order.iter().map(|(_, runtime)| runtime));
        let mut spare = self.make_room(full);
        for (_, runtime) in &order {
            self.top_up(runtime, &mut spare);
        }
    }

    /// The first of those that want standard machines of a runtime.
    fn neediest(&self, runtime: &str) -> Need {
        let claimants = self.world.runtime(runtime).into_iter();
        let claimants = claimants.flat_map(|entry| &entry.claimants).take(TRIED);
        let groups = claimants.filter_map(|(_, _, account)| self.world.group(account, runtime));
        let mut wanting = groups.filter(|group| group.wanted > 0);
        let need = wanting.find_map(|group| self.need(self.world.request(group.queue.oldest_standard()?)?));
        need.unwrap_or(Need::LAST)
    }

    fn need(&self, request: &Request) -> Option<Need> {
        let account = &request.demand.account;
        let without_since = self.world.account(account)?.without_since;
        Some(Need {
            load: self.world.load(account),
            since: request.arrived.mono.max(without_since),
            order: request.order,
        })
    }

    /// Boots what requests that wait want, beside what is `held` for others; says whether the host is too full for it.
    fn boot_wanted(&mut self, runtime: &Arc<str>, held: HostRoom) -> bool {
        let shape = self.world.rules.standard;
        while let Some((wanted, booting)) = self.world.runtime(runtime).map(|entry| (entry.wanted, entry.booting)) {
            if wanted <= booting {
                return false;
            }
            if !HostRoom::of(shape).plus(held).fits(self.world.free()) {
                self.world.lacking.insert(runtime.clone());
                return true;
            }
            let reason = Reason::RequestsWait { wanted, booting };
            match self.boot(runtime, shape, None, reason) {
                Ok(()) => {}
                Err(held) => {
                    self.world.lacking.insert(runtime.clone());
                    return matches!(held, Held::Room);
                }
            }
        }
        false
    }

    /// Boots a machine of its own for each request that needs more than a standard one and comes before `others`. Says
    /// whether the host is too full for it, and what is to be held for the first: what it lacks comes free without more being
    /// decided.
    fn boot_large(&mut self, others: Need) -> (bool, HostRoom) {
        // One for each account at a time, the one with the least for its share first.
        loop {
            let mut waiting: Vec<_> = self.world.first_large().filter_map(|id| self.large_shape(id)).collect();
            waiting.sort_unstable_by_key(|large| large.need);
            let (mut booted, mut full, mut held) = (false, false, HostRoom::default());
            for large in waiting.into_iter().take_while(|large| large.need < others).take(TRIED) {
                let booting = self.world.runtime(&large.runtime).map_or(0, |entry| entry.all_booting);
                let reason = Reason::RequestsWait { wanted: 1, booting };
                match self.boot(&large.runtime, large.shape, Some(large.request), reason) {
                    Ok(()) => booted = true,
                    Err(why) => {
                        let (room, soon) = (HostRoom::of(large.shape), self.world.free().plus(self.world.ending));
                        if matches!(why, Held::Room) && held == HostRoom::default() && room.fits(soon) {
                            held = room;
                        }
                        self.world.lacking.insert(large.runtime);
                        full |= matches!(why, Held::Room);
                    }
                }
            }
            if !booted {
                return (full, held);
            }
        }
    }

    /// The machine that a request needs, where its account may have it.
    fn large_shape(&self, id: RequestId) -> Option<Large> {
        let request = self.world.request(id)?;
        let account = &request.demand.account;
        let shape = self.world.rules.shape_for(request.first()?.amount)?;
        let need = self.need(request)?;
        self.world.may_reserve(account, shape).then(|| Large {
            need,
            request: id,
            runtime: request.demand.runtime.clone(),
            shape,
        })
    }

    /// Boots what the warming pool lacks, out of what requests that wait do not need.
    fn top_up(&mut self, runtime: &Arc<str>, spare: &mut HostRoom) {
        let shape = self.world.rules.standard;
        let target = self.world.rules.warming.get(runtime).copied().unwrap_or(0);
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        while let Some(entry) = self.world.runtimes.get(runtime).or(Some(&Default::default())) {
            // Machines that boot go to requests that wait first.
            let coming = entry.booting.saturating_sub(entry.wanted);
            let (warming, booting) = (count(entry.warming.len()), entry.booting);
            if warming.saturating_add(coming) >= count(target) {
                return;
            }
            let reason = Reason::BelowTarget {
                warming,
                booting,
                target: count(target),
            };
            let room = HostRoom::of(shape);
            if !room.fits(*spare) || self.boot(runtime, shape, None, reason).is_err() {
                self.world.lacking.insert(runtime.clone());
                return;
            }
            *spare = spare.minus(room);
        }
    }

    fn boot(
        &mut self,
        runtime: &Arc<str>,
        shape: Shape,
        reserved: Option<RequestId>,
        reason: Reason,
    ) -> Result<(), Held> {
        let world = &self.world;
        if let Some(entry) = world.runtime(runtime) {
            let backs_off = entry.failures > 0 && (entry.not_before > world.now.mono || entry.all_booting > 0);
            if backs_off {
                return Err(Held::Later);
            }
        }
        if usize::try_from(world.booting).unwrap_or(usize::MAX) >= world.rules.concurrent_boots {
            return Err(Held::Later);
        }
        if !HostRoom::of(shape).fits(world.free()) {
            return Err(Held::Room);
        }
        let machine = MachineId(self.ids.next(world.now.wall));
        let command = Command::BootMachine {
            machine,
            runtime: runtime.clone(),
            shape,
            reserved,
        };
        if self.decide(command, reason) {
            Ok(())
        } else {
            Err(Held::Later)
        }
    }

    /// Where machines of a runtime fail to boot time and again, nobody is left waiting for one.
    fn refuse_hopeless(&mut self, runtime: &Arc<str>) {
        let Some(entry) = self.world.runtime(runtime) else {
            return;
        };
        let hopeless = entry.failures >= self.world.rules.boot_failures
            && entry.failures > 0
            && entry.all_booting == 0
            && entry.not_before > self.world.now.mono;
        if !hopeless {
            return;
        }
        let accounts: Vec<_> = entry
            .claimants
            .iter()
            .chain(&entry.limited)
            .map(|(_, _, name)| name.clone())
            .collect();
        for account in accounts {
            let requests = self.world.group(&account, runtime).map(|group| {
                // Those for which a container that stops will make room need no machine.
                let covered = group.wanted == 0 && group.stopping != Default::default();
                if covered { Vec::new() } else { group.queue.all() }
            });
            for request in requests.unwrap_or_default() {
                self.refuse(request, Refusal::BootFailing);
            }
        }
    }
}
