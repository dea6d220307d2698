//! What counts and settles: accounts by a clock that never goes back, and machines that use what they want and may.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use stoker_credits::{Account, Level, Mode, Terms};

use crate::MachineId;

/// The accounts of all machines. They outlive the agent.
#[derive(Clone, Debug, Default)]
pub(super) struct Kernel {
    accounts: BTreeMap<MachineId, Kept>,
    /// Those of which the agent has to be told.
    pub(super) untold: BTreeSet<MachineId>,
    /// How often an account was settled because the agent asked for it.
    pub(super) asked: u32,
}

#[derive(Clone, Debug)]
pub(super) struct Kept {
    pub(super) terms: Terms,
    pub(super) account: Account,
    /// What the machine would use, and the most that it may, in millicores.
    wants_millis: u32,
    pub(super) limit_millis: u32,
    /// What it used since it was settled, in thousandths of a ns.
    unsettled: u64,
    /// Up to when that is counted, in ns.
    counted_ns: u64,
}

impl Kernel {
    pub(super) fn open(&mut self, machine: MachineId, terms: Terms, now: Duration) {
        let kept = Kept {
            terms,
            account: Account::open(&terms, ns(now)),
            wants_millis: 0,
            limit_millis: terms.full_millis(),
            unsettled: 0,
            counted_ns: ns(now),
        };
        self.accounts.insert(machine, kept);
        self.untold.insert(machine);
    }

    /// Another agent finds the machine, and tells by which terms it goes now.
    pub(super) fn take_over(&mut self, machine: MachineId, terms: Terms, now: Duration) {
        match self.accounts.contains_key(&machine) {
            true => self.set_terms(machine, terms, now),
            false => self.open(machine, terms, now),
        }
        self.untold.insert(machine);
    }

    /// Nobody is left who was to be told.
    pub(super) fn restart(&mut self) {
        self.untold.clear();
    }

    pub(super) fn mode(&self, machine: MachineId) -> Option<Mode> {
        Some(self.accounts.get(&machine)?.terms.mode())
    }

    pub(super) fn close(&mut self, machine: MachineId, now: Duration) {
        self.count(machine, now);
        if let Some(mut kept) = self.accounts.remove(&machine) {
            kept.account.close(&kept.terms, ns(now), kept.unsettled / 1000);
            kept.check();
        }
        self.untold.remove(&machine);
    }

    /// The machine wants so much from now on.
    pub(super) fn want(&mut self, machine: MachineId, millis: u32, now: Duration) {
        self.count(machine, now);
        if let Some(kept) = self.accounts.get_mut(&machine) {
            kept.wants_millis = millis.min(kept.terms.full_millis());
        }
    }

    pub(super) fn limit(&mut self, machine: MachineId, millis: u32, now: Duration) {
        self.count(machine, now);
        if let Some(kept) = self.accounts.get_mut(&machine) {
            assert!(millis >= kept.terms.baseline_millis(), "less than its baseline");
            kept.limit_millis = millis;
        }
    }

    pub(super) fn settle(&mut self, machine: MachineId, now: Duration) {
        self.count(machine, now);
        self.asked += 1;
        if let Some(kept) = self.accounts.get_mut(&machine) {
            kept.settle(ns(now));
            self.untold.insert(machine);
        }
    }

    pub(super) fn set_terms(&mut self, machine: MachineId, terms: Terms, now: Duration) {
        self.count(machine, now);
        if let Some(kept) = self.accounts.get_mut(&machine) {
            kept.settle(ns(now));
            kept.account.resize(&kept.terms, &terms, ns(now), 0);
            kept.terms = terms;
            self.untold.insert(machine);
        }
    }

    pub(super) fn grant(&mut self, machine: MachineId, ps: u64, now: Duration) {
        self.count(machine, now);
        if let Some(kept) = self.accounts.get_mut(&machine) {
            kept.settle(ns(now));
            kept.account.grant(&kept.terms, ps);
            self.untold.insert(machine);
        }
    }

    pub(super) fn get(&self, machine: MachineId) -> Option<&Kept> {
        self.accounts.get(&machine)
    }

    pub(super) fn machines(&self) -> Vec<MachineId> {
        self.accounts.keys().copied().collect()
    }

    /// When the next account of a machine that runs crosses into another level: then it settles by itself.
    pub(super) fn next(&self) -> Option<Duration> {
        let at = |kept: &Kept| {
            let until = kept.account.until_crossing(&kept.terms, kept.rate())?;
            (kept.rate() > 0).then(|| Duration::from_nanos(kept.account.settled_ns().saturating_add(until)))
        };
        self.accounts.values().filter_map(at).min()
    }

    /// Time has passed: all that ran is settled, and what crossed is to be told.
    pub(super) fn pass(&mut self, now: Duration) {
        for machine in self.machines() {
            self.count(machine, now);
            let Some(kept) = self.accounts.get_mut(&machine) else {
                continue;
            };
            let before = kept.account.level();
            // As the kernel's programs, which run where a machine's threads do.
            if kept.rate() > 0 {
                kept.settle(ns(now));
            }
            if kept.account.level() != before {
                self.untold.insert(machine);
            }
        }
    }

    fn count(&mut self, machine: MachineId, now: Duration) {
        if let Some(kept) = self.accounts.get_mut(&machine) {
            let passed = ns(now).saturating_sub(kept.counted_ns);
            kept.unsettled += passed * u64::from(kept.rate());
            kept.counted_ns = ns(now);
        }
    }

    pub(super) fn check(&self) {
        self.accounts.values().for_each(Kept::check);
    }
}

impl Kept {
    fn rate(&self) -> u32 {
        self.wants_millis.min(self.limit_millis)
    }

    fn settle(&mut self, now_ns: u64) {
        let used = self.unsettled / 1000;
        self.unsettled %= 1000;
        self.account.settle(&self.terms, now_ns, used);
    }

    /// Nothing is lost, and nothing comes of nothing.
    fn check(&self) {
        let (account, totals) = (&self.account, self.account.totals());
        let given = totals.earned.get() + totals.granted.get() + totals.billed.get() + totals.forgiven.get();
        let left = u128::from(account.balance_ps()) + u128::from(account.launch_ps());
        let taken = totals.spent.get() + totals.discarded.get();
        assert_eq!(given + u128::from(account.owed_ps()), taken + left);
        assert!(account.level() <= Level::HIGH);
    }
}

fn ns(now: Duration) -> u64 {
    u64::try_from(now.as_nanos()).unwrap()
}
