//! What the scheduler of machines (`sched_ext`) keeps, and what it goes by.

use stoker_credits::Class;

use crate::account::AccountEntry;
use crate::allowance::Allowance;

/// Machines that the scheduler has room for.
pub const MACHINES: u32 = 1 << 14;

/// CPUs that it keeps something of. On a host with more the others take no part in who is preempted.
pub const CPUS: u32 = 1 << 10;

/// How long a thread runs at a time, in ns.
pub const SLICE_NS: u64 = 5_000_000;

/// How long one that has something to use again waits behind others that do, in ns; from then on it comes before them.
pub const PATIENCE_NS: u64 = 20_000_000;

/// The most that a machine can be behind the others, in ns by weight: what it did not want it does not get later. One that was woken has
/// no more than a turn before others.
pub const LAG_NS: u64 = 10 * SLICE_NS;

/// The least that one is given, in ns: less is not worth the switch.
const LEAST_SLICE_NS: u64 = 1_000_000;

/// The longest that one waits for what its machine may use, in ns: each has something in every second.
const LONGEST_PAUSE_NS: u64 = 1_000_000_000;

/// The weight of a machine that nobody gave one, as of a cgroup.
pub const WEIGHT: u32 = 100;

/// A period of a limit, in ns: what a machine may use in each, its vCPUs do.
pub const PERIOD_NS: u64 = 50_000_000;

/// How a machine is to be scheduled: written by user space. One that has an account in the ledger may be [less](Self::narrowed) by that,
/// which changes without anybody writing this.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Whether its threads run ahead of others', within its [`Allowance`].
    pub high: u32,
    /// What its vCPUs may use, in thousandths of one CPU. All of them are no limit.
    pub allowed_millis: u32,
    /// Its vCPUs.
    pub vcpus: u32,
    /// How contended CPUs are shared, 1 to 10,000.
    pub weight: u32,
    /// The slot of its account in the ledger.
    pub slot: u32,
    /// The generation of that slot's owner; where it has no account, 0.
    pub generation: u32,
}

/// What the map `MACHINES` holds for a process, the machine's VMM.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Machine {
    /// How it is to be scheduled.
    pub share: Share,
    /// What it ran, in ns by its weight: who has least runs next.
    pub vtime: u64,
    /// What its vCPUs may use still in this period, in ns; below 0 where they used too much.
    pub left_ns: i64,
    /// The number of the period that `left_ns` is of.
    pub period: u64,
    /// What it may use ahead of others, in ns.
    pub urgent_ns: i64,
    /// Up to when that was earned: the clock's time in ns.
    pub urgent_at: u64,
}

/// The one element of the map `HOST`: written by user space.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// The host's CPUs.
    pub cpus: u64,
    /// vCPUs of all machines that may be urgent.
    pub urgent_vcpus: u64,
}

/// The one element of the map `PROGRESS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// The `vtime` of the machine that ran last.
    pub vtime: u64,
    /// When the timer is due: the clock's time in ns.
    pub timer_at: u64,
}

/// What the map `RUNS` holds for a CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Runs {
    /// The CPU time of the thread as it began, in ns.
    pub from_ns: u64,
    /// Which kind of thread: a number of [`Kind`].
    pub kind: u64,
}

/// What runs on a CPU.
#[repr(u64)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// None of a machine's, or nothing.
    Other = 0,
    /// One that makes way for an urgent one.
    Ordinary = 1,
    /// An urgent one.
    Urgent = 2,
    /// An ordinary one that was told to make way.
    Leaving = 3,
}

/// Told when the scheduler has ended: a record of `ENDED`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// The kernel's number of why (`enum scx_exit_kind`).
    pub kind: u64,
    /// Why, in the kernel's words, ended by a 0.
    pub reason: [u8; 64],
    /// More of it.
    pub message: [u8; 128],
}

// === impl Share ===

impl Default for Share {
    fn default() -> Self {
        Self {
            high: 0,
            allowed_millis: u32::MAX,
            vcpus: 1,
            weight: WEIGHT,
            slot: 0,
            generation: 0,
        }
    }
}

impl Share {
    /// The same, or less where its account has fallen since this was written.
    #[inline(always)]
    pub fn narrowed(mut self, entry: &AccountEntry) -> Self {
        let is_its = self.generation != 0 && entry.generation == u64::from(self.generation);
        // One without terms is about to be restored.
        if !is_its || entry.terms.full_millis() == 0 {
            return self;
        }
        if !matches!(entry.account.level().class(), Class::High) {
            self.high = 0;
        }
        let allowed = entry.account.allowed_millis(&entry.terms);
        if allowed < self.allowed_millis {
            self.allowed_millis = allowed;
        }
        self
    }

    /// Whether its vCPUs may use less than all of them.
    #[inline(always)]
    pub fn is_limited(&self) -> bool {
        u64::from(self.allowed_millis) < u64::from(self.vcpus) * 1000
    }

    /// What its vCPUs may use in each period, in ns; never 0.
    #[inline(always)]
    pub fn quota_ns(&self) -> u64 {
        let allowed = if self.allowed_millis == 0 {
            1
        } else {
            self.allowed_millis
        };
        u64::from(allowed) * (PERIOD_NS / 1000)
    }

    /// What is left in a later period, where so much was left of an earlier: what was not used is there in the next, once.
    #[inline(always)]
    pub fn left_after(&self, left_ns: i64, periods: u64) -> i64 {
        let quota = self.quota_ns().cast_signed();
        // What more would come to is cut off below.
        let added = quota * periods.min(1000).cast_signed();
        (left_ns + added).min(2 * quota)
    }

    /// When there is something left again, where so much is missing: the start of a later period.
    #[inline(always)]
    pub fn resumes_at(&self, now: u64, left_ns: i64) -> u64 {
        let missing = left_ns.min(0).unsigned_abs();
        let periods = missing / self.quota_ns() + 1;
        let at = (period_at(now) + periods) * PERIOD_NS;
        at.min(now + LONGEST_PAUSE_NS)
    }

    /// How long a thread of its vCPUs may run at a time, in ns.
    #[inline(always)]
    pub fn slice(&self, left_ns: i64) -> u64 {
        left_ns.max(0).cast_unsigned().clamp(LEAST_SLICE_NS, SLICE_NS)
    }

    /// What it may use ahead of others, where so much was left some time ago, in ns. However much it used beyond that, as one does
    /// that has the host for itself, after a second without use there is something left again.
    #[inline(always)]
    pub fn urgent_after(&self, left_ns: i64, elapsed_ns: u64, host: &Host) -> i64 {
        let allowance = Allowance::new(self.vcpus, host.urgent_vcpus, host.cpus);
        let of_a_second = allowance.share_millis * 1_000_000;
        // Within 10 s each has earned its burst.
        let earned = elapsed_ns.min(10_000_000_000) * allowance.share_millis / 1000;
        let least = of_a_second.cast_signed().wrapping_neg();
        (left_ns.max(least) + earned.cast_signed()).min(allowance.burst_ns.cast_signed())
    }

    /// What so much time comes to by its weight.
    #[inline(always)]
    pub fn weighed(&self, used_ns: u64) -> u64 {
        used_ns * u64::from(WEIGHT) / u64::from(self.weight.max(1))
    }
}

/// The number of the period at a time in ns.
#[inline(always)]
pub fn period_at(now: u64) -> u64 {
    now / PERIOD_NS
}

#[cfg(test)]
mod tests {
    use stoker_credits::{Account, Credits, Mode, Plan};

    use super::*;

    const MS: u64 = 1_000_000;

    /// 10 ms in 50.
    fn limited() -> Share {
        Share {
            allowed_millis: 200,
            ..Share::default()
        }
    }

    fn ms(ms: i64) -> i64 {
        ms * 1_000_000
    }

    /// One that has such an account, with so many credits.
    fn narrowed(share: Share, credits: u32) -> Share {
        let plan = Plan {
            launch: Credits::new(credits),
            ..Plan::new(1, 100, Mode::Standard)
        };
        let terms = plan.terms().unwrap();
        let account = Account::open(&terms, 0);
        let entry = AccountEntry {
            generation: 7,
            terms,
            account,
            ..AccountEntry::default()
        };
        Share { generation: 7, ..share }.narrowed(&entry)
    }

    #[test]
    fn an_account_makes_it_less_and_never_more() {
        let high = Share {
            high: 1,
            ..Share::default()
        };
        let plenty = narrowed(high, 1000);
        assert!(plenty.high == 1 && !plenty.is_limited());
        assert_eq!(narrowed(high, 10).high, 0);
        let nothing = narrowed(high, 0);
        assert_eq!((nothing.high, nothing.allowed_millis), (0, 100));
        // As user space said.
        assert_eq!(narrowed(Share::default(), 1000).high, 0);
        assert_eq!(narrowed(limited(), 1000).allowed_millis, 200);
    }

    #[test]
    fn an_account_of_another_or_without_terms_does_not_count() {
        let high = Share {
            high: 1,
            generation: 7,
            ..Share::default()
        };
        let of = |generation| AccountEntry {
            generation,
            ..AccountEntry::default()
        };
        assert_eq!(high.narrowed(&of(8)), high);
        assert_eq!(high.narrowed(&of(7)), high, "it is about to be restored");
        let without = Share { generation: 0, ..high };
        assert_eq!(without.narrowed(&of(0)), without);
    }

    #[test]
    fn all_vcpus_are_no_limit() {
        let of = |allowed_millis| Share {
            allowed_millis,
            vcpus: 2,
            ..Share::default()
        };
        assert!(!of(2000).is_limited() && of(1999).is_limited());
        assert_eq!(of(0).quota_ns(), of(1).quota_ns());
        assert_eq!(of(200).quota_ns(), 10 * MS);
    }

    #[test]
    fn what_was_not_used_is_there_once_more() {
        let share = limited();
        assert_eq!(share.left_after(ms(-3), 1), ms(7));
        assert_eq!(share.left_after(ms(10), 1), ms(20));
        assert_eq!(share.left_after(ms(10), u64::MAX), ms(20));
        assert_eq!(share.left_after(ms(-35), 3), ms(-5));
    }

    #[test]
    fn what_was_used_too_much_is_waited_for() {
        let share = limited();
        let now = 1020 * MS;
        assert_eq!(share.resumes_at(now, 0), 1050 * MS);
        assert_eq!(share.resumes_at(now, ms(-9)), 1050 * MS);
        // With what is added then nothing is left yet.
        assert_eq!(share.resumes_at(now, ms(-10)), 1100 * MS);
        assert_eq!(share.left_after(ms(-10), 2), ms(10));
        // Never for longer than a second.
        assert_eq!(share.resumes_at(now, ms(-100_000)), now + 1000 * MS);
    }

    #[test]
    fn over_time_it_is_what_is_allowed() {
        let share = limited();
        let (mut now, mut left, mut period, mut used) = (0, 0, 0, 0);
        while now < 10_000 * MS {
            let reached = period_at(now);
            left = share.left_after(left, reached - period);
            period = reached;
            if left <= 0 {
                now = share.resumes_at(now, left);
                continue;
            }
            // A tick is later than the slice's end.
            let ran = share.slice(left).next_multiple_of(4 * MS);
            used += ran;
            left -= ran.cast_signed();
            now += ran;
        }
        let share = used as f64 / now as f64;
        assert!((0.198..0.202).contains(&share), "{share}");
    }

    #[test]
    fn urgent_is_a_burst_and_then_half() {
        let share = Share::default();
        let host = Host {
            cpus: 2,
            urgent_vcpus: 1,
        };
        assert_eq!(share.urgent_after(0, u64::MAX, &host), ms(25));
        assert_eq!(share.urgent_after(ms(-5), 10 * MS, &host), 0);
        assert_eq!(share.urgent_after(ms(-5), 12 * MS, &host), ms(1));
        // All of the host, for an hour.
        assert_eq!(share.urgent_after(ms(-3_600_000), 1000 * MS, &host), 0);
        assert_eq!(share.urgent_after(ms(-3_600_000), 1010 * MS, &host), ms(5));
        // Of twenty on two CPUs each has a tenth of that.
        let many = Host {
            urgent_vcpus: 20,
            ..host
        };
        assert_eq!(share.urgent_after(ms(-5), 100 * MS, &many), 0);
    }

    #[test]
    fn a_slice_is_what_is_left_within_bounds() {
        let share = limited();
        assert_eq!(share.slice(ms(3)), 3 * MS);
        assert_eq!(share.slice(ms(30)), SLICE_NS);
        assert_eq!(share.slice(1), MS);
        assert_eq!(share.slice(i64::MIN), MS);
    }
}
