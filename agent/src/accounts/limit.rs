//! The limits that accounts have: their names, ranges and units, and where each is in what knows of it.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use stoker_policy::AccountLimits;

use crate::config;

/// A limit of an account.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Limit {
    /// Machines.
    Machines,
    /// vCPUs of all its machines.
    Vcpus,
    /// Memory of all its machines, in MiB.
    MemoryMib,
    /// Functions.
    Functions,
    /// Invocations that run.
    Concurrency,
    /// Invocations that wait.
    Waiting,
    /// Its weight where accounts contend.
    Share,
}

/// A value for each limit of which something is said, in the limit's unit.
pub type Values = BTreeMap<Limit, u64>;

// === impl Limit ===

impl Limit {
    /// All of them, in the order in which they are shown.
    pub const ALL: [Self; 7] = [
        Self::Machines,
        Self::Vcpus,
        Self::MemoryMib,
        Self::Functions,
        Self::Concurrency,
        Self::Waiting,
        Self::Share,
    ];

    /// What it is called, in the configuration, the API and the database.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Machines => "machines",
            Self::Vcpus => "vcpus",
            Self::MemoryMib => "memory_mib",
            Self::Functions => "functions",
            Self::Concurrency => "concurrency",
            Self::Waiting => "waiting",
            Self::Share => "share",
        }
    }

    /// The one of that name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|limit| limit.name() == name)
    }

    /// What it may be: far more than any host has, and as far as the whole host's own limits may be configured.
    #[must_use]
    pub fn range(self) -> RangeInclusive<u64> {
        match self {
            Self::Machines => 1..=100_000,
            Self::Vcpus | Self::Concurrency => 1..=1_000_000,
            // A PiB.
            Self::MemoryMib => 1..=1 << 30,
            Self::Functions => 1..=10_000_000,
            // Without a place in line an invocation that can't run at once is refused.
            Self::Waiting => 0..=1_000_000,
            Self::Share => 1..=10_000,
        }
    }

    /// What is wrong with a value, if anything is.
    #[must_use]
    pub fn problem(self, value: u64) -> Option<String> {
        let range = self.range();
        (!range.contains(&value)).then(|| format!("{value} is not {} to {}", range.start(), range.end()))
    }

    /// What these limits have of it; nothing where an account has no limit of its own.
    #[must_use]
    pub fn of(self, limits: &AccountLimits) -> Option<u64> {
        let small = |value: u32| (value < u32::MAX).then(|| u64::from(value));
        match self {
            Self::Machines => small(limits.machines),
            Self::Vcpus => (limits.cpu_millis < u64::MAX).then_some(limits.cpu_millis / 1000),
            Self::MemoryMib => (limits.memory_mib < u64::MAX).then_some(limits.memory_mib),
            Self::Functions => small(limits.functions),
            Self::Concurrency => small(limits.concurrency),
            Self::Waiting => small(limits.waiting),
            Self::Share => small(limits.share),
        }
    }

    /// Sets it; a value out of its range is the nearest that there can be.
    pub fn set(self, limits: &mut AccountLimits, value: u64) {
        let small = u32::try_from(value).unwrap_or(u32::MAX);
        match self {
            Self::Machines => limits.machines = small,
            Self::Vcpus => limits.cpu_millis = value.saturating_mul(1000),
            Self::MemoryMib => limits.memory_mib = value,
            Self::Functions => limits.functions = small,
            Self::Concurrency => limits.concurrency = small,
            Self::Waiting => limits.waiting = small,
            Self::Share => limits.share = small,
        }
    }

    /// What is configured of it.
    #[must_use]
    pub fn configured(self, account: &config::Account) -> Option<u64> {
        match self {
            Self::Machines => account.machines.map(u64::from),
            Self::Vcpus => account.vcpus.map(u64::from),
            Self::MemoryMib => account.memory_mib,
            Self::Functions => account.functions.map(u64::from),
            Self::Concurrency => account.concurrency.map(u64::from),
            Self::Waiting => account.waiting.map(u64::from),
            Self::Share => account.share.map(u64::from),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_a_name_and_a_place_of_its_own() {
        let mut limits = AccountLimits {
            machines: 1,
            cpu_millis: 1000,
            memory_mib: 1,
            functions: 1,
            concurrency: 1,
            waiting: 1,
            share: 1,
        };
        for (limit, value) in Limit::ALL.into_iter().zip(7..) {
            assert_eq!(Limit::named(limit.name()), Some(limit));
            let before = limits.clone();
            limit.set(&mut limits, value);
            assert_eq!(limit.of(&limits), Some(value));
            let others = Limit::ALL.into_iter().filter(|other| *other != limit);
            for other in others {
                assert_eq!(other.of(&limits), other.of(&before), "{limit:?} and {other:?}");
            }
            let text = format!("{} = {value}", limit.name());
            let account: config::Account = toml::from_str(&text).unwrap();
            assert_eq!(limit.configured(&account), Some(value));
        }
        assert_eq!(Limit::named("cpu"), None);
        (limits.functions, limits.cpu_millis) = (u32::MAX, u64::MAX);
        assert_eq!((Limit::Functions.of(&limits), Limit::Vcpus.of(&limits)), (None, None));
    }

    #[test]
    fn zero_and_what_no_host_has_are_refused() {
        for limit in Limit::ALL {
            assert_eq!(limit.problem(1), None);
            assert_eq!(limit.problem(0).is_some(), limit != Limit::Waiting, "{limit:?}");
            let most = *limit.range().end();
            assert_eq!(limit.problem(most), None);
            let problem = limit.problem(most + 1).unwrap();
            assert!(problem.ends_with(&format!(" to {most}")), "{problem}");
        }
    }
}
