//! What is known of how functions use their amounts, and the amounts that were determined for them: `place` reads these, and
//! `resize` alone sets them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ulid::Ulid;

use super::apply::ApplyError;
use super::{Touch, World};
use crate::resize::{Change, Sizer};
use crate::{
    Amount, Code, ContainerId, Demand, Kept, Kind, Mono, Purpose, RequestId, Resize, ResizeMode, Sample, Shape,
};

/// How many versions of functions are remembered: those that were asked for last. Each takes two kilobytes at most. What was
/// determined for one that is forgotten comes again with its next request, from who keeps it.
pub(crate) const REMEMBERED: usize = 4096;

/// What is known of versions of functions.
#[derive(Clone, Debug, Default)]
pub(crate) struct Amounts {
    entries: BTreeMap<Code, Sizing>,
    /// The one that was asked for longest ago first.
    by_use: BTreeSet<(u64, Code)>,
    uses: u64,
}

/// What is known of one version of a function.
#[derive(Clone, Debug)]
pub(crate) struct Sizing {
    pub(crate) account: Arc<str>,
    pub(crate) runtime: Arc<str>,
    settings: Arc<Resize>,
    sizer: Sizer,
    /// What containers are to have now.
    pub(crate) amount: Amount,
    /// What they had before.
    before: Option<Amount>,
    /// The container that is being made to take the place of one of another amount.
    pub(crate) ahead: Option<ContainerId>,
    /// How many such are ready while what they replace has not been stopped.
    pub(crate) owed: u32,
    used: u64,
}

// === impl Amounts ===

impl Amounts {
    /// What is known of one whose amount is looked after.
    pub(crate) fn get(&self, code: Code) -> Option<&Sizing> {
        self.entries.get(&code)
    }

    /// What is known of the version before it whose amount changes by itself.
    fn before(&self, code: Code) -> Option<&Sizing> {
        let older = Code { version: 0, ..code }..code;
        let mut older = self.entries.range(older).rev().map(|(_, entry)| entry);
        older.next().filter(|entry| entry.is_auto())
    }

    /// Takes an execution into account; says what follows.
    pub(crate) fn take(&mut self, code: Code, limit: Amount, sample: &Sample, now: Mono) -> Option<Change> {
        let entry = self.entries.get_mut(&code)?;
        entry.sizer.take(&entry.settings, limit, sample, now)
    }

    /// Starting a container took so much; says what follows.
    pub(crate) fn started(&mut self, kind: Kind, limit: Amount, sample: &Sample, now: Mono) -> Option<Change> {
        let entry = self.entries.get_mut(&kind.code)?;
        if sample.oom_killed && (entry.amount == kind.amount || entry.is_stale(kind.amount)) {
            return entry.sizer.take(&entry.settings, limit, sample, now);
        }
        entry.sizer.started(sample);
        None
    }

    /// A container could not start; says what follows.
    pub(crate) fn start_failed(&mut self, kind: Kind, now: Mono) -> Option<Change> {
        let entry = self.entries.get_mut(&kind.code).filter(|entry| entry.is(kind.amount))?;
        entry.sizer.start_failed(&entry.settings, kind.amount, now)
    }

    /// A function is no more.
    pub(crate) fn forget_function(&mut self, uid: Ulid) {
        let versions = Code { uid, version: 0 }..=Code { uid, version: u64::MAX };
        let codes: Vec<_> = self.entries.range(versions).map(|(code, _)| *code).collect();
        codes.into_iter().for_each(|code| self.forget(code));
    }

    /// What is known of a version is of no use any more.
    pub(crate) fn forget(&mut self, code: Code) {
        if let Some(entry) = self.entries.remove(&code) {
            self.by_use.remove(&(entry.used, code));
        }
    }

    /// A version was asked for with these settings, and has this amount without more being decided.
    fn note(&mut self, demand: &Demand, first: Kind, settings: &Arc<Resize>, kept: Option<Kept>, now: Mono) {
        let code = first.code;
        if settings.mode == ResizeMode::Off {
            return self.forget(code);
        }
        self.uses += 1;
        let used = self.uses;
        let known = self.entries.get_mut(&code);
        let known = known.filter(|known| known.settings.same(settings) && known.sizer.first() == first.amount);
        match known {
            Some(entry) => {
                self.by_use.remove(&(entry.used, code));
                entry.used = used;
            }
            None => {
                self.forget(code);
                self.entries
                    .insert(code, Sizing::new(demand, first, settings, kept, used, now));
            }
        }
        self.by_use.insert((used, code));
        if self.entries.len() > REMEMBERED
            && let Some((_, code)) = self.by_use.first().copied()
        {
            self.forget(code);
        }
    }

    /// A container of this kind is made ahead of requests.
    pub(super) fn made_ahead(&mut self, kind: Kind, id: ContainerId) {
        if let Some(entry) = self.entries.get_mut(&kind.code).filter(|entry| entry.is(kind.amount)) {
            entry.ahead = Some(id);
        }
    }

    /// A container is ready, or gone (`false`).
    pub(super) fn made(&mut self, code: Code, id: ContainerId, ready: bool) {
        if let Some(entry) = self.entries.get_mut(&code)
            && entry.ahead.take_if(|ahead| *ahead == id).is_some()
        {
            entry.owed += u32::from(ready);
        }
    }

    /// An idle container of this kind is stopped.
    pub(super) fn stopped(&mut self, kind: Kind) {
        if let Some(entry) = self
            .entries
            .get_mut(&kind.code)
            .filter(|entry| entry.is_stale(kind.amount))
        {
            entry.owed = entry.owed.saturating_sub(1);
        }
    }

    #[cfg(test)]
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Code, &Sizing)> {
        assert_eq!(self.by_use.len(), self.entries.len());
        self.entries.iter()
    }
}

// === impl Sizing ===

impl Sizing {
    fn new(demand: &Demand, first: Kind, settings: &Arc<Resize>, kept: Option<Kept>, used: u64, now: Mono) -> Self {
        let sizer = Sizer::new(first.amount, now);
        let sizer = match kept {
            Some(kept) => sizer.with(kept.amount, kept.killed_mib),
            None => sizer,
        };
        let amount = sizer.target();
        Self {
            account: demand.account.clone(),
            runtime: demand.runtime.clone(),
            settings: settings.clone(),
            sizer,
            amount,
            before: (amount != first.amount).then_some(first.amount),
            ahead: None,
            owed: 0,
            used,
        }
    }

    /// Containers have what is determined.
    pub(crate) fn is_auto(&self) -> bool {
        self.settings.mode == ResizeMode::Auto
    }

    /// Containers are to have this amount.
    fn is(&self, amount: Amount) -> bool {
        self.is_auto() && self.amount == amount
    }

    /// Containers had this amount, and are to have another.
    pub(crate) fn is_stale(&self, amount: Amount) -> bool {
        let had = self.before == Some(amount) || self.first() == amount;
        self.is_auto() && had && self.amount != amount
    }

    /// A container of this amount will do until there is one of the present amount.
    pub(crate) fn accepts(&self, amount: Amount) -> bool {
        self.amount == amount || amount.memory_mib > self.sizer.kept().killed_mib
    }

    /// What its user asked for.
    pub(crate) fn first(&self) -> Amount {
        self.sizer.first()
    }

    /// What is to be kept of it.
    pub(crate) fn kept(&self) -> Kept {
        self.sizer.kept()
    }

    /// What it had, of which there may be containers.
    pub(crate) fn stale(&self) -> impl Iterator<Item = Amount> {
        let before = self.before.filter(|before| *before != self.first());
        let had = before.into_iter().chain([self.first()]);
        had.filter(|amount| self.is_stale(*amount))
    }

    /// The amounts that a container for it may have, the best first.
    fn amounts(&self) -> impl Iterator<Item = Amount> {
        let had = self.stale().filter(|amount| self.accepts(*amount));
        [self.amount].into_iter().chain(had)
    }
}

// === impl World ===

impl World {
    /// What was determined for a version of a function whose amount changes by itself; `None` where it has what was asked for.
    #[must_use]
    pub fn amount_for(&self, code: Code) -> Option<Amount> {
        let entry = self.amounts.get(code).filter(|entry| entry.is_auto())?;
        (entry.amount != entry.first()).then_some(entry.amount)
    }

    /// The most that one container of an account can be given.
    pub(crate) fn most_for(&self, account: &str) -> Amount {
        let limits = self.rules.limits(account);
        let account_mib = u32::try_from(limits.memory_mib).unwrap_or(u32::MAX);
        let account_vcpus = u32::try_from(limits.cpu_millis / 1000).unwrap_or(u32::MAX);
        let mut most = self.rules.largest_amount();
        most.memory_mib = most.memory_mib.min(account_mib.saturating_sub(self.rules.reserve_mib));
        most.cpu_millis = most.cpu_millis.min(account_vcpus.saturating_mul(1000));
        most
    }

    /// Whether a machine that an account may have could hold a container of this amount.
    pub(crate) fn is_possible(&self, account: &str, amount: Amount) -> bool {
        let limits = self.rules.limits(account);
        let within = |shape: Shape| {
            u64::from(shape.memory_mib) <= limits.memory_mib && u64::from(shape.vcpus) <= limits.cpu_millis / 1000
        };
        self.rules.shape_for(amount).is_some_and(within)
    }

    /// A request as it comes: with the amounts that its function is to have.
    pub(super) fn with_amounts(&mut self, mut demand: Demand) -> Demand {
        let first = demand.kinds.first().copied();
        // One that asks for what can't be is refused, and no other's amount changes by it.
        let is_possible = |first: &Kind| !demand.own_amount && self.is_possible(&demand.account, first.amount);
        if let Some((first, settings)) = first.filter(is_possible).zip(demand.resize.clone()) {
            // Its account may have had more when this was determined.
            let known = self.amounts.get(first.code);
            if known.is_some_and(|known| !self.is_possible(&demand.account, known.amount)) {
                self.amounts.forget(first.code);
            }
            let kept = self.kept(&demand.account, first, &settings);
            self.amounts.note(&demand, first, &settings, kept, self.now.mono);
            demand.kinds = self.kinds_for(&demand);
        }
        demand
    }

    /// What was determined for one that is not known by these settings: by others, before it was forgotten, or for an older
    /// version.
    fn kept(&self, account: &str, first: Kind, settings: &Resize) -> Option<Kept> {
        let known = self.amounts.get(first.code).filter(|known| known.is_auto());
        let kept = known.map(Sizing::kept).or(settings.kept);
        let kept = kept.or_else(|| self.amounts.before(first.code).map(Sizing::kept))?;
        let without_disk = |amount: Amount| Amount {
            scratch_mib: 0,
            ..amount
        };
        let (least, most) = (without_disk(settings.least), without_disk(settings.most));
        let amount = without_disk(kept.amount);
        let amount_may_be = least.fits(amount) && amount.fits(most);
        let of_this = kept.first == first.amount && kept.amount.scratch_mib == first.amount.scratch_mib;
        let taken = settings.mode == ResizeMode::Auto && of_this && amount_may_be;
        (taken && self.is_possible(account, kept.amount)).then_some(kept)
    }

    /// The kinds of container that may serve a request, now that amounts are what they are.
    pub(super) fn kinds_for(&self, demand: &Demand) -> Vec<Kind> {
        let auto = demand
            .resize
            .as_ref()
            .is_some_and(|settings| settings.mode == ResizeMode::Auto);
        if demand.own_amount || !auto {
            return demand.kinds.clone();
        }
        let mut kinds: Vec<Kind> = Vec::with_capacity(demand.kinds.len() + 2);
        for kind in &demand.kinds {
            let code = kind.code;
            let entry = self.amounts.get(code).filter(|entry| entry.is_auto());
            let known = entry.into_iter().flat_map(Sizing::amounts);
            let amounts: Vec<_> = known.chain(entry.is_none().then_some(kind.amount)).collect();
            for amount in amounts {
                let kind = Kind { code, amount };
                if !kinds.contains(&kind) {
                    kinds.push(kind);
                }
            }
        }
        kinds
    }

    /// The kind that a container is to be where this one is asked for.
    pub(crate) fn present(&self, kind: Kind) -> Kind {
        let entry = self.amounts.get(kind.code).filter(|entry| entry.is_stale(kind.amount));
        entry.map_or(kind, |entry| Kind {
            amount: entry.amount,
            ..kind
        })
    }

    pub(super) fn set_amount(&mut self, code: Code, kept: Kept) -> Result<(), ApplyError> {
        let unknown = ApplyError::Unknown("function");
        let Some(entry) = self.amounts.entries.get(&code) else {
            return Err(unknown);
        };
        if !entry.is_auto() || entry.first() != kept.first || kept.amount == entry.amount {
            return Err(ApplyError::State("function"));
        }
        if !self.is_possible(&entry.account, kept.amount) {
            return Err(ApplyError::Room("room for that amount"));
        }
        let entry = self.amounts.entries.get_mut(&code).ok_or(unknown)?;
        entry.before = Some(std::mem::replace(&mut entry.amount, kept.amount));
        (entry.ahead, entry.owed) = (None, 0);
        for request in self.waiting_for(code.uid) {
            self.look_again(request);
        }
        self.touched.push_back(Touch::Resized(code));
        Ok(())
    }

    /// A request that waits is in line for what it may have now.
    fn look_again(&mut self, id: RequestId) {
        let Some(request) = self.requests.get(&id) else {
            return;
        };
        let kinds = self.kinds_for(&request.demand);
        if kinds == request.demand.kinds {
            return;
        }
        self.dequeue(id);
        if let Some(request) = self.requests.get_mut(&id) {
            request.demand.kinds = kinds;
        }
        self.enqueue(id);
    }

    /// A container is made: maybe to take the place of another.
    pub(super) fn note_made(&mut self, kind: Kind, id: ContainerId, purpose: Purpose) {
        if purpose == Purpose::Ahead {
            self.amounts.made_ahead(kind, id);
        }
    }
}
