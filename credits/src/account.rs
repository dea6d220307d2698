//! What an account has.

use crate::class::Level;
use crate::terms::Terms;
use crate::units::{PS_PER_NS, Sum};

/// The state of one account. A value of a map: every pattern of bytes is one, and no function panics on any.
///
/// It is changed by [`settle`](Self::settle) and its like alone, each of them by one writer at a time.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Account {
    pub(crate) balance_ps: u64,
    pub(crate) launch_ps: u64,
    pub(crate) owed_ps: u64,
    pub(crate) settled_ns: u64,
    pub(crate) level: Level,
    pub(crate) crossings: u32,
    pub(crate) totals: Totals,
}

/// Sums over the life of an account. The crate's page says how they add up.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Totals {
    /// Baseline times the time that was settled.
    pub earned: Sum,
    /// What it was given: launch credits, and by [`Account::grant`].
    pub granted: Sum,
    /// CPU time used.
    pub spent: Sum,
    /// What was earned with the balance at its cap, or was above a cap that became lower.
    pub discarded: Sum,
    /// What was spent that it did not have.
    pub borrowed: Sum,
    /// Of that, what was never paid back, in [`Mode::Unlimited`](crate::Mode::Unlimited): its owner pays money for it.
    pub billed: Sum,
    /// The same in [`Mode::Standard`](crate::Mode::Standard): nobody pays for it.
    pub forgiven: Sum,
}

impl Account {
    /// A new account, at `now_ns` of the clock that it is settled by.
    #[inline(always)]
    pub fn open(terms: &Terms, now_ns: u64) -> Self {
        let mut account = Self {
            settled_ns: now_ns,
            ..Self::default()
        };
        account.grant(terms, terms.launch_ps);
        account.crossings = 0;
        account
    }

    /// What is left of what was earned, in ps; at most the cap.
    #[inline(always)]
    pub const fn balance_ps(&self) -> u64 {
        self.balance_ps
    }

    /// What is left of what was given, in ps.
    #[inline(always)]
    pub const fn launch_ps(&self) -> u64 {
        self.launch_ps
    }

    /// All that can be spent before it borrows, in ps.
    #[inline(always)]
    pub const fn spendable_ps(&self) -> u64 {
        self.balance_ps.wrapping_add(self.launch_ps)
    }

    /// What was borrowed and is not paid back, in ps; at most the limit. Where it is not 0 nothing else is left.
    #[inline(always)]
    pub const fn owed_ps(&self) -> u64 {
        self.owed_ps
    }

    /// Up to when it is settled, by the caller's clock.
    #[inline(always)]
    pub const fn settled_ns(&self) -> u64 {
        self.settled_ns
    }

    /// Where the balance stands.
    #[inline(always)]
    pub const fn level(&self) -> Level {
        self.level
    }

    /// How often the level changed, modulo 2^32: who was told of fewer has missed one.
    #[inline(always)]
    pub const fn crossings(&self) -> u32 {
        self.crossings
    }

    /// Sums over its life.
    #[inline(always)]
    pub const fn totals(&self) -> &Totals {
        &self.totals
    }

    /// The CPU time in ns that can be used in whatever time without the level falling; `u64::MAX` where none is below it. So long a
    /// settlement may be put off. That it rises then is noticed late, as it is of a machine that uses nothing.
    #[inline(always)]
    pub const fn slack_ns(&self, terms: &Terms) -> u64 {
        let below = terms.falls_below(self.level.number());
        if below == 0 {
            return u64::MAX;
        }
        self.spendable_ps().saturating_sub(below) / PS_PER_NS
    }

    /// The most CPU that the machine may use now, in millicores of one CPU. Never below its baseline.
    #[inline(always)]
    pub const fn allowed_millis(&self, terms: &Terms) -> u32 {
        let full = Level::FULL.number();
        let level = self.level.number();
        let level = if level > full { full } else { level };
        let above = terms.full_millis.saturating_sub(terms.baseline_millis);
        // At most 2^22 millicores: `Plan` sees to it.
        terms.baseline_millis.saturating_add(above.wrapping_mul(level) / full)
    }
}
