//! Machines' accounts of credits, all together.

use std::collections::HashMap;

use stoker_credits::{Account, Class};
use stoker_policy::{MachineId, World};

use crate::telemetry::credits::Standing;

/// All accounts, in ps of CPU time. Sums are of the accounts that are there, and of those that were closed since the agent's start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Credits {
    /// What is left of what was earned.
    pub balance: u128,
    /// What is left of what was given.
    pub launch: u128,
    /// What was borrowed and is not paid back.
    pub owed: u128,
    /// What only grows.
    pub sums: Sums,
}

/// What was earned, spent and so on, in ps of CPU time, as `stoker_credits::Totals` has it, and how often levels changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "they are those of `Totals`")]
pub struct Sums {
    pub earned: u128,
    pub granted: u128,
    pub spent: u128,
    pub discarded: u128,
    pub borrowed: u128,
    pub billed: u128,
    pub forgiven: u128,
    pub crossings: u128,
}

/// Machines by the class that they run as, those of which there is none too. One is missing until it is decided how it runs.
pub(super) fn classes(world: &World) -> Vec<(Class, u64)> {
    let mut classes = [Class::Exhausted, Class::Normal, Class::High].map(|class| (class, 0));
    for cpu in world.machines().filter_map(|machine| machine.cpu) {
        super::add(&mut classes, cpu.class);
    }
    classes.into()
}

// === impl Credits ===

impl Credits {
    /// Of these machines, beside what is closed; nothing where no account could be read.
    pub(super) fn of(machines: &[MachineId], closed: Sums, accounts: &HashMap<MachineId, Standing>) -> Option<Self> {
        if accounts.is_empty() && !machines.is_empty() {
            return None;
        }
        let mut credits = Self {
            sums: closed,
            ..Self::default()
        };
        for Standing { account, .. } in machines.iter().filter_map(|machine| accounts.get(machine)) {
            credits.balance += u128::from(account.balance_ps());
            credits.launch += u128::from(account.launch_ps());
            credits.owed += u128::from(account.owed_ps());
            credits.sums.add(account);
        }
        Some(credits)
    }
}

// === impl Sums ===

impl Sums {
    /// With one account more.
    pub(in crate::host) fn add(&mut self, account: &Account) {
        let totals = account.totals();
        let more = Self {
            earned: totals.earned.get(),
            granted: totals.granted.get(),
            spent: totals.spent.get(),
            discarded: totals.discarded.get(),
            borrowed: totals.borrowed.get(),
            billed: totals.billed.get(),
            forgiven: totals.forgiven.get(),
            crossings: account.crossings().into(),
        };
        *self = self.with(&more, u128::saturating_add);
    }

    /// Whichever is more of each.
    #[must_use]
    pub fn max(&self, other: &Self) -> Self {
        self.with(other, u128::max)
    }

    fn with(&self, other: &Self, of: fn(u128, u128) -> u128) -> Self {
        Self {
            earned: of(self.earned, other.earned),
            granted: of(self.granted, other.granted),
            spent: of(self.spent, other.spent),
            discarded: of(self.discarded, other.discarded),
            borrowed: of(self.borrowed, other.borrowed),
            billed: of(self.billed, other.billed),
            forgiven: of(self.forgiven, other.forgiven),
            crossings: of(self.crossings, other.crossings),
        }
    }
}

#[cfg(test)]
mod tests {
    use stoker_credits::{Mode, Plan};
    use ulid::Ulid;

    use super::*;

    #[test]
    fn accounts_add_up_with_those_that_are_closed() {
        let plan = Plan {
            launch: stoker_credits::Credits::new(1),
            ..Plan::new(2, 200, Mode::Standard)
        };
        let terms = plan.terms().unwrap();
        let mut account = Account::open(&terms, 0);
        // In 10 s it earns 2 s of a CPU, and uses 5.
        account.settle(&terms, 10_000_000_000, 5_000_000_000);
        let standing = Standing {
            terms,
            account,
            used_millis: 500,
        };
        let id = |number| MachineId(Ulid(number));
        let mut closed = Sums::default();
        closed.add(&account);
        let accounts = HashMap::from([1, 2, 3].map(|number| (id(number), standing)));
        let second = 1_000_000_000_000;
        // The third is not there any more.
        let credits = Credits::of(&[id(1), id(2)], closed, &accounts).unwrap();
        assert_eq!(
            (credits.sums.earned, credits.sums.spent),
            (3 * 2 * second, 3 * 5 * second)
        );
        let left = u128::from(account.balance_ps() + account.launch_ps());
        assert_eq!(credits.balance + credits.launch, 2 * left);
        assert_eq!(
            credits.sums.earned + credits.sums.granted,
            credits.sums.spent + 3 * left,
            "nothing is lost"
        );
        assert_eq!(Credits::of(&[id(1)], closed, &HashMap::new()), None);
        assert_eq!(Credits::of(&[], closed, &HashMap::new()).unwrap().sums, closed);
    }

    #[test]
    fn what_was_told_is_not_taken_back() {
        let one = Sums {
            earned: 5,
            spent: 1,
            ..Sums::default()
        };
        let other = Sums {
            earned: 3,
            spent: 2,
            crossings: 4,
            ..Sums::default()
        };
        let most = one.max(&other);
        assert_eq!((most.earned, most.spent, most.crossings), (5, 2, 4));
    }
}
