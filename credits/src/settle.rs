//! How an account changes.

use crate::account::Account;
use crate::class::Crossing;
use crate::terms::{Mode, Terms};
use crate::units::{MAX_PS, PS_PER_NS};

/// The most use that a settlement takes, in ns: 213 days of one CPU.
const MAX_USED_NS: u64 = u64::MAX / PS_PER_NS;

impl Account {
    /// Earns for the time since the last settlement, spends what was used, and says whether the level changed.
    ///
    /// `now_ns` is of a clock that does not stand while the machine runs and never jumps ahead (`CLOCK_MONOTONIC`); where it is
    /// not after the last settlement nothing is earned, so that a clock that goes back earns no time twice. `used_ns` is the CPU
    /// time since the last settlement, of all vCPUs and of the VMM's own threads.
    ///
    /// Use takes launch credits first. The rest and what is earned meanwhile are set off against each other: so it makes no
    /// difference into how many settlements a time is divided, unless the balance meets its cap or the debt its limit in between.
    /// At the cap many never give more than one; at the limit they write off at least as much as one.
    ///
    /// What is used without being had is borrowed, and paid back by what is earned next, in both modes: a machine that runs on for
    /// some ms until it is held back, again and again, pays for each of them. What is more than the limit is billed or forgiven at
    /// once. (AWS bills it at the end of the hour.)
    ///
    /// Of more than 213 days of one CPU's earning at once the rest is left for the next settlement.
    #[inline(always)]
    pub fn settle(&mut self, terms: &Terms, now_ns: u64, used_ns: u64) -> Option<Crossing> {
        self.advance(terms, now_ns, used_ns);
        self.cross(terms)
    }

    /// Goes over to other terms at `now_ns`: until then the old ones count, for the time and for `used_ns` since the last
    /// settlement; from then on the new ones do.
    ///
    /// A credit is one vCPU for one minute on a machine of any size, so the balance stays what it is; it lasts shorter on a larger
    /// machine, which earns more, too. What is above a cap that is lower now is discarded, and what is owed above a limit that is
    /// lower now is billed or forgiven. A machine that grows is given no launch credits: they are for its start, and would be had
    /// again and again by resizing to and fro. Whoever leaves `unlimited` is billed for all that is owed.
    ///
    /// AWS has no rule of its own for a change of size: a T3 instance must be stopped for it, keeps its balance for seven days
    /// then, is billed for what it owes, and its cap is by its size ("CPU credit accrual limit", "Accrued CPU credits life span" and
    /// "Surplus credits can incur charges"). That is the same but for the debt, which we keep: our machine runs on, and will earn
    /// to pay it back.
    #[inline(always)]
    pub fn resize(&mut self, before: &Terms, after: &Terms, now_ns: u64, used_ns: u64) -> Option<Crossing> {
        self.advance(before, now_ns, used_ns);
        let limit = match (before.mode(), after.mode()) {
            (Mode::Unlimited, Mode::Standard) => 0,
            _ => after.limit_ps,
        };
        self.fit(before, after.cap_ps, limit);
        self.cross(after)
    }

    /// Goes on, at `now_ns` of what may be another clock, with an account that was saved while its machine ran, or stopped.
    ///
    /// Nothing is earned for the time between. `unsaved_ns` is the most CPU time that may have been used since it was saved, and is
    /// spent now: so what is lost by a crash is lost by the account, and no credit comes of it. Who saves once half a second has
    /// passed, or as soon as half a second's earning was used since ([`Terms::baseline_millis`]), and tells that much here, takes at
    /// most one second's earning from the account. Nothing is unsaved where the machine had stopped.
    #[inline(always)]
    pub fn restore(&mut self, terms: &Terms, now_ns: u64, unsaved_ns: u64) -> Option<Crossing> {
        self.settled_ns = now_ns;
        self.advance(terms, now_ns, unsaved_ns);
        self.fit(terms, terms.cap_ps, terms.limit_ps);
        self.cross(terms)
    }

    /// Gives it so many ps, outside the cap. They pay what is owed first. Of more than it can hold the rest is not given.
    #[inline(always)]
    pub fn grant(&mut self, terms: &Terms, ps: u64) -> Option<Crossing> {
        let paid = min(ps, self.owed_ps);
        let kept = min(ps - paid, MAX_PS.saturating_sub(self.launch_ps));
        self.owed_ps -= paid;
        self.launch_ps = self.launch_ps.wrapping_add(kept);
        self.totals.granted.add(paid);
        self.totals.granted.add(kept);
        self.cross(terms)
    }

    /// The last settlement, at the end of the machine: what is still owed is billed or forgiven.
    #[inline(always)]
    pub fn close(&mut self, terms: &Terms, now_ns: u64, used_ns: u64) -> Option<Crossing> {
        self.advance(terms, now_ns, used_ns);
        self.fit(terms, terms.cap_ps, 0);
        self.cross(terms)
    }

    /// Earns and spends.
    #[inline(always)]
    fn advance(&mut self, terms: &Terms, now_ns: u64, used_ns: u64) {
        let elapsed = min(now_ns.saturating_sub(self.settled_ns), terms.longest_ns);
        self.settled_ns = self.settled_ns.wrapping_add(elapsed);
        let earned = elapsed.wrapping_mul(u64::from(terms.baseline_millis));
        let used = min(used_ns, MAX_USED_NS).wrapping_mul(PS_PER_NS);
        self.book(terms, earned, used);
    }

    /// Takes so many ps earned and so many used into the account.
    #[inline(always)]
    pub(crate) fn book(&mut self, terms: &Terms, earned: u64, used: u64) {
        self.totals.earned.add(earned);
        self.totals.spent.add(used);
        let of_launch = min(used, self.launch_ps);
        self.launch_ps -= of_launch;
        let used = used - of_launch;
        if earned >= used {
            self.gain(terms, earned - used);
        } else {
            self.lose(terms, used - earned);
        }
    }

    /// What was earned pays what is owed, fills the balance, and is discarded, in this order.
    #[inline(always)]
    fn gain(&mut self, terms: &Terms, ps: u64) {
        let paid = min(ps, self.owed_ps);
        let kept = min(ps - paid, terms.cap_ps.saturating_sub(self.balance_ps));
        let discarded = ps - paid - kept;
        self.owed_ps -= paid;
        self.balance_ps = self.balance_ps.wrapping_add(kept);
        if discarded != 0 {
            self.totals.discarded.add(discarded);
        }
    }

    /// What was used is taken from the balance, is borrowed, and is billed or forgiven, in this order.
    #[inline(always)]
    fn lose(&mut self, terms: &Terms, ps: u64) {
        let had = min(ps, self.balance_ps);
        self.balance_ps -= had;
        let borrowed = ps - had;
        if borrowed != 0 {
            let owed = min(borrowed, terms.limit_ps.saturating_sub(self.owed_ps));
            self.owed_ps = self.owed_ps.wrapping_add(owed);
            self.totals.borrowed.add(borrowed);
            self.write_off(terms, borrowed - owed);
        }
    }

    /// Brings it within a cap and a limit; `terms` are those that it owes by.
    #[inline(always)]
    fn fit(&mut self, terms: &Terms, cap_ps: u64, limit_ps: u64) {
        let discarded = self.balance_ps.saturating_sub(cap_ps);
        self.balance_ps -= discarded;
        self.totals.discarded.add(discarded);
        let beyond = self.owed_ps.saturating_sub(limit_ps);
        self.owed_ps -= beyond;
        self.write_off(terms, beyond);
    }

    /// What will not be paid back.
    #[inline(always)]
    fn write_off(&mut self, terms: &Terms, ps: u64) {
        match terms.mode() {
            Mode::Standard => self.totals.forgiven.add(ps),
            Mode::Unlimited => self.totals.billed.add(ps),
        }
    }

    #[inline(always)]
    fn cross(&mut self, terms: &Terms) -> Option<Crossing> {
        let from = self.level;
        let to = from.at(self.spendable_ps(), terms);
        if from == to {
            return None;
        }
        self.level = to;
        self.crossings = self.crossings.wrapping_add(1);
        Some(Crossing { from, to })
    }
}

#[inline(always)]
const fn min(a: u64, b: u64) -> u64 {
    if a < b { a } else { b }
}
