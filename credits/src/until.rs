//! How long it takes until something happens, for timers and for people.
//!
//! It compiles for the kernel too, but divides, and takes the verifier far longer than all the rest.

use crate::account::Account;
use crate::class::Level;
use crate::terms::Terms;

/// What is waited for: that what can be spent is less than `below`, or at least `least`, or that the balance has reached the cap.
#[derive(Clone, Copy)]
struct Goal {
    below: u64,
    least: u64,
    full: bool,
}

impl Account {
    /// The time in ns until the level changes, from the last settlement on, while the machine uses `rate_millis` of one CPU without
    /// a break; `None` where that is never, or after `u64::MAX` ns.
    ///
    /// After this time, settled as it passes, the level has changed, and 1 ns earlier it has not.
    #[inline]
    pub fn until_crossing(&self, terms: &Terms, rate_millis: u32) -> Option<u64> {
        let level = self.level.number();
        let goal = Goal {
            below: terms.falls_below(level),
            least: terms.rises_at(level),
            full: false,
        };
        self.until(terms, rate_millis, goal)
    }

    /// The same until all vCPUs may be used again; 0 where they may.
    #[inline]
    pub fn until_full_speed(&self, terms: &Terms, rate_millis: u32) -> Option<u64> {
        let full = Level::FULL.number();
        if self.level.number() >= full {
            return Some(0);
        }
        let goal = Goal {
            below: 0,
            least: terms.rises_at(full.saturating_sub(1)),
            full: false,
        };
        self.until(terms, rate_millis, goal)
    }

    /// The same until nothing is left to spend: from then on it is held to its baseline, or borrows.
    #[inline]
    pub fn until_empty(&self, terms: &Terms, rate_millis: u32) -> Option<u64> {
        let goal = Goal {
            below: 1,
            least: u64::MAX,
            full: false,
        };
        self.until(terms, rate_millis, goal)
    }

    /// The same until the balance is at its cap: from then on what is earned is discarded.
    #[inline]
    pub fn until_full(&self, terms: &Terms, rate_millis: u32) -> Option<u64> {
        let goal = Goal {
            below: 0,
            least: u64::MAX,
            full: true,
        };
        self.until(terms, rate_millis, goal)
    }

    fn until(&self, terms: &Terms, rate_millis: u32, goal: Goal) -> Option<u64> {
        let (earns, uses) = (u64::from(terms.baseline_millis), u64::from(rate_millis));
        let mut account = *self;
        let mut passed = 0_u64;
        // While there are launch credits, the two parts go separate ways: until the balance is at its cap, and until they are spent.
        // Each takes one round, and one more for a ns in which it happens.
        for _ in 0..5 {
            if account.meets(terms, goal) {
                return Some(passed);
            }
            if account.launch_ps == 0 {
                return passed.checked_add(account.until_straight(terms, earns, uses, goal)?);
            }
            let room = terms.cap_ps.saturating_sub(account.balance_ps);
            let lasts = account.launch_ps.checked_div(uses).unwrap_or(u64::MAX);
            let fills = if room == 0 {
                u64::MAX
            } else {
                room.checked_div(earns).unwrap_or(u64::MAX)
            };
            let meets = if goal.full {
                room.checked_add(earns.saturating_sub(1))?.checked_div(earns)
            } else {
                // With the balance at its cap the sum falls faster, but no threshold is above the cap.
                reach(account.spendable_ps(), earns, uses, goal)
            };
            let straight = lasts.min(fills);
            if let Some(ns) = meets
                && ns <= straight
            {
                return passed.checked_add(ns);
            }
            if straight == u64::MAX {
                return None;
            }
            let ns = straight.max(1);
            // At the cap what is earned may not fit, and is discarded whatever it is.
            account.book(terms, ns.wrapping_mul(earns), ns.wrapping_mul(uses));
            passed = passed.checked_add(ns)?;
        }
        None
    }

    fn meets(&self, terms: &Terms, goal: Goal) -> bool {
        let left = self.spendable_ps();
        left < goal.below || left >= goal.least || (goal.full && self.balance_ps >= terms.cap_ps)
    }

    /// Without launch credits, balance and debt are one straight line.
    fn until_straight(&self, terms: &Terms, earns: u64, uses: u64, goal: Goal) -> Option<u64> {
        if earns > uses {
            let least = if goal.full { terms.cap_ps } else { goal.least };
            if least > terms.cap_ps {
                return None;
            }
            let missing = least.checked_add(self.owed_ps)?.saturating_sub(self.balance_ps);
            return Some(missing.div_ceil(earns - uses));
        }
        reach(self.balance_ps, earns, uses, goal)
    }
}

/// When what can be spent, from `left` on, is below or at the goal.
fn reach(left: u64, earns: u64, uses: u64, goal: Goal) -> Option<u64> {
    if earns > uses {
        let missing = goal.least.saturating_sub(left);
        return (goal.least != u64::MAX).then(|| missing.div_ceil(earns - uses));
    }
    if earns == uses || goal.below == 0 {
        return None;
    }
    let above = left.saturating_sub(goal.below);
    above.checked_div(uses - earns)?.checked_add(1)
}
