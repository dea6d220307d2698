//! How amounts of functions are fitted to their use: what each goes by, and what was determined for it.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use stoker_policy::resize::Thresholds;
use stoker_policy::{Amount, Kept, Resize, ResizeMode};
use stoker_proto::v1;

use crate::config::Config;
use crate::store::FunctionRecord;

/// What is done for functions that say nothing of it themselves, by account.
#[derive(Clone, Debug, Default)]
pub struct ResizingDefaults {
    any: ResizeMode,
    named: BTreeMap<String, ResizeMode>,
}

/// What one function goes by.
#[derive(Debug)]
pub(super) struct Resizing {
    /// As its account has it.
    by_default: ResizeMode,
    now: RwLock<Now>,
}

#[derive(Debug)]
struct Now {
    /// What it says itself.
    own: Option<Resize>,
    /// All that it goes by, with what was determined.
    all: Arc<Resize>,
}

// === impl ResizingDefaults ===

impl ResizingDefaults {
    /// As it is configured.
    #[must_use]
    pub fn of(config: &Config) -> Self {
        let named = config.accounts.iter();
        let named = named.filter_map(|(name, account)| Some((name.clone(), account.resizing?.into())));
        Self {
            any: config.account.resizing.map(ResizeMode::from).unwrap_or_default(),
            named: named.collect(),
        }
    }

    pub(super) fn mode(&self, account: &str) -> ResizeMode {
        self.named.get(account).copied().unwrap_or(self.any)
    }
}

// === impl Resizing ===

impl Resizing {
    pub(super) fn new(record: &FunctionRecord, by_default: ResizeMode) -> Self {
        let now = Now::new(record.resizing, by_default, record.amount, record.kept);
        Self {
            by_default,
            now: RwLock::new(now),
        }
    }

    pub(super) fn own(&self) -> Option<Resize> {
        self.now.read().unwrap_or_else(PoisonError::into_inner).own
    }

    pub(super) fn all(&self) -> Arc<Resize> {
        let now = self.now.read().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&now.all)
    }

    /// It goes by these from now on; what was determined before stays known.
    pub(super) fn set(&self, own: Option<Resize>, first: v1::Amount) {
        let mut now = self.now.write().unwrap_or_else(PoisonError::into_inner);
        *now = Now::new(own, self.by_default, first, now.all.kept);
    }

    /// Another amount was determined.
    pub(super) fn keep(&self, kept: Kept) {
        let mut now = self.now.write().unwrap_or_else(PoisonError::into_inner);
        now.all = Arc::new(Resize {
            kept: Some(kept),
            ..*now.all
        });
    }
}

// === impl Now ===

impl Now {
    fn new(own: Option<Resize>, by_default: ResizeMode, first: v1::Amount, kept: Option<Kept>) -> Self {
        let all = own.unwrap_or_else(|| settings(by_default, first, None, None, Thresholds::default()));
        Self {
            own,
            all: Arc::new(Resize { kept, ..all }),
        }
    }
}

/// Settings of a function that was deployed with an amount. A bound that is not given is the default, or what the function has where
/// that lies beyond it.
pub(crate) fn settings(
    mode: ResizeMode,
    first: v1::Amount,
    least: Option<v1::Amount>,
    most: Option<v1::Amount>,
    thresholds: Thresholds,
) -> Resize {
    let default = Resize::default();
    let bound = |given: Option<v1::Amount>, default: Amount, which: fn(u32, u32) -> u32| match given {
        Some(given) => cpu_and_memory(given),
        None => Amount {
            cpu_millis: which(default.cpu_millis, first.cpu_millis),
            memory_mib: which(default.memory_mib, first.memory_mib),
            ..default
        },
    };
    Resize {
        mode,
        least: bound(least, default.least, u32::min),
        most: bound(most, default.most, u32::max),
        thresholds,
        kept: None,
    }
}

/// What executions of a function are given now that name no amount of their own.
pub(super) fn effective(record: &FunctionRecord, all: &Resize) -> v1::Amount {
    let first = cpu_and_memory(record.amount);
    let without_disk = |amount: Amount| Amount {
        scratch_mib: 0,
        ..amount
    };
    let determined = all.kept.filter(|kept| {
        let amount = without_disk(kept.amount);
        let within = all.least.fits(amount) && amount.fits(all.most);
        all.mode == ResizeMode::Auto && without_disk(kept.first) == first && within
    });
    determined.map_or(record.amount, |kept| v1::Amount {
        cpu_millis: kept.amount.cpu_millis,
        memory_mib: kept.amount.memory_mib,
    })
}

pub(crate) fn cpu_and_memory(amount: v1::Amount) -> Amount {
    Amount {
        cpu_millis: amount.cpu_millis,
        memory_mib: amount.memory_mib,
        scratch_mib: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{self, Account};
    use crate::store::record;

    fn amount(cpu_millis: u32, memory_mib: u32) -> Amount {
        Amount {
            cpu_millis,
            memory_mib,
            scratch_mib: 7,
        }
    }

    fn kept(first: Amount, memory_mib: u32) -> Kept {
        Kept {
            first,
            amount: amount(250, memory_mib),
            killed_mib: 0,
        }
    }

    #[test]
    fn a_function_goes_by_what_it_says_or_else_its_account() {
        let account = |resizing| Account {
            resizing: Some(resizing),
            ..Account::default()
        };
        let config = Config {
            account: account(config::Resizing::Off),
            accounts: [("acme".to_owned(), account(config::Resizing::Auto))].into(),
            ..Config::default()
        };
        let defaults = ResizingDefaults::of(&config);
        assert_eq!(
            (defaults.mode("acme"), defaults.mode("other")),
            (ResizeMode::Auto, ResizeMode::Off)
        );
        assert_eq!(ResizingDefaults::default().mode("acme"), ResizeMode::Advise);
        let record = record("accounts/acme/functions/a");
        let resizing = Resizing::new(&record, defaults.mode("acme"));
        assert_eq!((resizing.own(), resizing.all().mode), (None, ResizeMode::Auto));
        let own = Resize {
            mode: ResizeMode::Off,
            ..Resize::default()
        };
        resizing.keep(kept(amount(250, 128), 300));
        resizing.set(Some(own), record.amount);
        assert_eq!((resizing.own(), resizing.all().mode), (Some(own), ResizeMode::Off));
        resizing.set(None, record.amount);
        // What was determined is still known.
        assert_eq!(effective(&record, &resizing.all()).memory_mib, 300);
    }

    #[test]
    fn what_was_determined_holds_for_the_same_amount_within_the_bounds() {
        let record = record("accounts/acme/functions/a");
        let with = |mode, first, memory_mib| {
            let all = Resize {
                mode,
                kept: Some(kept(first, memory_mib)),
                ..Resize::default()
            };
            effective(&record, &all).memory_mib
        };
        let (first, auto) = (amount(250, 128), ResizeMode::Auto);
        assert_eq!(with(auto, first, 300), 300);
        assert_eq!(with(ResizeMode::Advise, first, 300), 128);
        assert_eq!(with(auto, amount(250, 129), 300), 128);
        assert_eq!(with(auto, first, 20_000), 128);
    }

    #[test]
    fn bounds_that_are_not_given_hold_what_the_function_has() {
        let first = v1::Amount {
            cpu_millis: 8000,
            memory_mib: 32,
        };
        let settings = settings(ResizeMode::Auto, first, None, None, Thresholds::default());
        assert_eq!((settings.least.cpu_millis, settings.least.memory_mib), (100, 32));
        assert_eq!((settings.most.cpu_millis, settings.most.memory_mib), (8000, 10_240));
        assert_eq!(settings.check(cpu_and_memory(first)), Ok(()));
    }
}
