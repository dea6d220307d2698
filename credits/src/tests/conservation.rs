//! Nothing is lost and nothing comes of nothing, whatever happens.

use super::{HOUR_NS, check, terms};
use crate::t3::Size;
use crate::{Account, Mode, Plan, Terms};
use proptest::prelude::*;

/// One thing that happens to an account.
#[derive(Clone, Debug)]
enum Op {
    /// Time passes, the machine uses so many thousandths of what its vCPUs can, and it is settled.
    Run {
        ns: u64,
        permille: u64,
    },
    /// The same with a use that has nothing to do with the time.
    Use {
        ns: u64,
        used_ns: u64,
    },
    /// The clock goes back.
    Back {
        ns: u64,
    },
    /// Other terms, after some time and use.
    Resize {
        to: usize,
        ns: u64,
        used_ns: u64,
    },
    /// The host crashed; its clock starts anew at some time.
    Restore {
        now_ns: u64,
        unsaved_ns: u64,
    },
    Grant {
        ps: u64,
    },
    Close {
        ns: u64,
    },
}

/// From a few ns to a few days, as often short as long.
fn span() -> impl Strategy<Value = u64> {
    (0_u32..49).prop_flat_map(|bits| 0..=1_u64 << bits)
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (span(), 0_u64..=1100).prop_map(|(ns, permille)| Op::Run { ns, permille }),
        2 => (span(), span()).prop_map(|(ns, used_ns)| Op::Use { ns, used_ns }),
        1 => (any::<u64>(), any::<u64>()).prop_map(|(ns, used_ns)| Op::Use { ns, used_ns }),
        2 => span().prop_map(|ns| Op::Back { ns }),
        2 => (0_usize..4, span(), span()).prop_map(|(to, ns, used_ns)| Op::Resize { to, ns, used_ns }),
        1 => (span(), span()).prop_map(|(now_ns, unsaved_ns)| Op::Restore { now_ns, unsaved_ns }),
        1 => prop_oneof![span(), any::<u64>()].prop_map(|ps| Op::Grant { ps }),
        1 => span().prop_map(|ns| Op::Close { ns }),
    ]
}

/// An account, its terms, its clock, and what it may have earned at the most.
struct Bench {
    terms: Vec<Terms>,
    current: usize,
    now: u64,
    account: Account,
    most_earned: u128,
    most_granted: u128,
}

impl Bench {
    fn new(terms: Vec<Terms>) -> Self {
        let account = Account::open(&terms[0], 7);
        let most_granted = account.launch_ps().into();
        Self {
            terms,
            current: 0,
            now: 7,
            account,
            most_earned: 0,
            most_granted,
        }
    }

    fn pass(&mut self, ns: u64) {
        self.now = self.now.saturating_add(ns);
        let ahead = self.now.saturating_sub(self.account.settled_ns());
        self.most_earned += u128::from(ahead) * u128::from(self.terms[self.current].baseline_millis());
    }

    fn run(&mut self, op: &Op) {
        let terms = self.terms[self.current];
        let (before, crossings) = (self.account, self.account.crossings());
        let crossing = match *op {
            Op::Run { ns, permille } => {
                self.pass(ns);
                let used = u128::from(ns) * u128::from(terms.full_millis()) * u128::from(permille) / 1_000_000;
                self.account
                    .settle(&terms, self.now, used.try_into().unwrap_or(u64::MAX))
            }
            Op::Use { ns, used_ns } => {
                self.pass(ns);
                self.account.settle(&terms, self.now, used_ns)
            }
            Op::Back { ns } => {
                let earlier = before.settled_ns().saturating_sub(ns);
                let crossing = self.account.settle(&terms, earlier, 0);
                assert_eq!(self.account, before, "a clock that goes back changes nothing");
                crossing
            }
            Op::Resize { to, ns, used_ns } => {
                self.pass(ns);
                self.current = to;
                self.account.resize(&terms, &self.terms[to], self.now, used_ns)
            }
            Op::Restore { now_ns, unsaved_ns } => {
                self.now = now_ns;
                let crossing = self.account.restore(&terms, now_ns, unsaved_ns);
                assert_eq!(self.account.totals().earned, before.totals().earned);
                assert!(self.account.spendable_ps() <= before.spendable_ps());
                crossing
            }
            Op::Grant { ps } => {
                let crossing = self.account.grant(&terms, ps);
                self.most_granted += u128::from(ps);
                crossing
            }
            Op::Close { ns } => {
                self.pass(ns);
                let crossing = self.account.close(&terms, self.now, 0);
                assert_eq!(self.account.owed_ps(), 0);
                crossing
            }
        };
        match crossing {
            Some(crossing) => {
                assert_eq!((crossing.from, crossing.to), (before.level(), self.account.level()));
                assert_ne!(crossing.from, crossing.to);
                assert_eq!(self.account.crossings(), crossings.wrapping_add(1));
            }
            None => assert_eq!(
                (self.account.level(), self.account.crossings()),
                (before.level(), crossings)
            ),
        }
        check(&self.account, &self.terms[self.current]);
        assert!(
            self.account.totals().earned.get() <= self.most_earned,
            "it earned more than its baseline"
        );
        assert!(self.account.totals().granted.get() <= self.most_granted);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn whatever_happens_all_adds_up(
        terms in proptest::collection::vec(terms(), 4),
        ops in proptest::collection::vec(op(), 1..60),
    ) {
        let mut bench = Bench::new(terms);
        for op in &ops {
            bench.run(op);
        }
    }

    /// What was spent is what was used, and what was earned is the baseline in the time: not a ps is rounded away.
    #[test]
    fn sums_are_exact(terms in terms(), steps in proptest::collection::vec((0_u64..HOUR_NS, 0_u64..HOUR_NS), 1..50)) {
        let mut account = Account::open(&terms, 0);
        let (mut now, mut used) = (0, 0);
        for (ns, used_ns) in steps {
            now += ns;
            used += used_ns;
            account.settle(&terms, now, used_ns);
        }
        prop_assert_eq!(account.totals().spent.get(), u128::from(used) * 1000);
        prop_assert_eq!(account.totals().earned.get(), u128::from(now) * u128::from(terms.baseline_millis()));
        prop_assert_eq!(account.settled_ns(), now);
    }

    /// How a time is divided into settlements makes no difference where the cap and the limit are not met, and at the cap
    /// to divide it never gives more.
    #[test]
    fn many_settlements_are_as_one(
        terms in terms(),
        balance in 0_u64..1000,
        steps in proptest::collection::vec((0_u64..HOUR_NS, 0_u64..HOUR_NS), 1..50),
    ) {
        let mut many = Account::open(&terms, 0);
        let start = (terms.cap_ps() / 1000 * balance) / u64::from(terms.baseline_millis());
        many.settle(&terms, start, 0);
        let mut one = many;
        let before = many;
        let (mut now, mut used) = (start, 0);
        for (ns, used_ns) in steps {
            now += ns;
            used += used_ns;
            many.settle(&terms, now, used_ns);
        }
        one.settle(&terms, now, used);
        check(&many, &terms);
        let written_off = |account: &Account| account.totals().billed.get() + account.totals().forgiven.get();
        let worth = |account: &Account| i128::from(account.spendable_ps()) - i128::from(account.owed_ps());
        if written_off(&many) == written_off(&before) {
            prop_assert!(worth(&many) <= worth(&one), "it gained by being settled often");
            if many.totals().discarded == before.totals().discarded {
                prop_assert_eq!(many.spendable_ps(), one.spendable_ps());
                prop_assert_eq!(many.launch_ps(), one.launch_ps());
                prop_assert_eq!(many.owed_ps(), one.owed_ps());
            }
        }
    }

    /// A crash loses one second's earning at most, and no credit comes of it, where it is saved as `restore` says.
    #[test]
    fn a_crash_costs_at_most_a_seconds_earning(
        terms in terms(),
        start in 0_u64..24 * HOUR_NS,
        gaps in proptest::collection::vec((0_u64..200_000_000, 0_u64..1000), 1..40),
    ) {
        let baseline = u64::from(terms.baseline_millis());
        // Half a second's earning, in ns of CPU time.
        let unsaved = baseline * 500_000_000 / 1000;
        let mut account = Account::open(&terms, 0);
        account.settle(&terms, start, 0);
        let (mut saved, mut now, mut used) = (account, start, 0);
        for (ns, permille) in gaps {
            // It never uses more than may be unsaved before it is saved; nor does time pass.
            let used_ns = unsaved * permille / 1000;
            if now + ns - saved.settled_ns() > 500_000_000 || used + used_ns > unsaved {
                saved = account;
                used = 0;
            }
            now += ns.min(500_000_000);
            used += used_ns;
            account.settle(&terms, now, used_ns);
            let mut restored = saved;
            restored.restore(&terms, 5, unsaved);
            check(&restored, &terms);
            let worth = |account: &Account| i128::from(account.spendable_ps()) - i128::from(account.owed_ps());
            let written_off = |account: &Account| account.totals().billed.get() + account.totals().forgiven.get();
            if written_off(&restored) == written_off(&saved) {
                let lost = worth(&account) - worth(&restored);
                prop_assert!(lost >= 0, "{} ps came of a crash", -lost);
                prop_assert!(lost <= i128::from(baseline) * 1_000_000_000, "it lost {lost} ps");
            }
        }
    }
}

/// The rules may have changed while the host was down.
#[test]
fn an_account_is_restored_within_the_terms_of_now() {
    let (large, nano) = [Size::X2Large, Size::Nano]
        .map(|size| size.plan(Mode::Unlimited).terms().unwrap())
        .into();
    let mut rich = Account::open(&large, 0);
    rich.settle(&large, 10 * HOUR_NS, 0);
    let crossing = rich.restore(&nano, 3, 0);
    assert_eq!(
        (rich.balance_ps(), rich.settled_ns(), crossing),
        (nano.cap_ps(), 3, None)
    );
    check(&rich, &nano);
    let mut poor = Account::open(&large, 0);
    poor.settle(&large, 0, 10 * HOUR_NS);
    poor.restore(&nano, 3, HOUR_NS);
    assert_eq!(poor.owed_ps(), nano.limit_ps());
    assert_eq!(
        poor.totals().billed.get(),
        u128::from(11 * HOUR_NS * 1000 - nano.limit_ps())
    );
    check(&poor, &nano);
}

/// 64 vCPUs for ten years: the sums go on where one word would have overflowed.
#[test]
fn sums_hold_ten_years_of_64_vcpus() {
    let terms = Plan::new(64, 64_000, Mode::Unlimited).terms().unwrap();
    let mut account = Account::open(&terms, 0);
    let hours = 10 * 365 * 24;
    for hour in 1..=hours {
        account.settle(&terms, hour * HOUR_NS, 65 * HOUR_NS);
    }
    assert_eq!(
        account.totals().spent.get(),
        u128::from(hours) * 65 * u128::from(HOUR_NS) * 1000
    );
    assert_eq!(
        account.totals().earned.get(),
        u128::from(hours) * 64 * u128::from(HOUR_NS) * 1000
    );
    assert!(account.totals().spent.get() > u64::MAX.into());
    check(&account, &terms);
}
