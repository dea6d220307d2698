//! How the level follows the balance: the fall, the way back, and that it does not flap.

use super::{HOUR_NS, MINUTE_NS, account, check, terms};
use crate::t3::Size;
use crate::{Account, Class, Credits, Level, Mode, Plan};
use proptest::prelude::*;

const MS_NS: u64 = 1_000_000;

#[test]
fn a_new_machine_without_launch_credits_is_held_to_its_baseline() {
    let terms = Size::Small.plan(Mode::Standard).terms().unwrap();
    let account = Account::open(&terms, 0);
    assert_eq!((account.level(), account.crossings()), (Level::EXHAUSTED, 0));
    assert_eq!(account.allowed_millis(&terms), terms.baseline_millis());
    let terms = Size::Small.plan(Mode::Unlimited).terms().unwrap();
    let account = Account::open(&terms, 0);
    assert_eq!((account.level(), account.crossings()), (Level::FULL, 0));
    assert_eq!(account.allowed_millis(&terms), 2000);
}

/// A busy machine, held to what it is allowed, goes down through every level, in about a quarter of an hour from where the fall
/// begins, and then has its baseline without a break.
#[test]
fn a_busy_machine_falls_step_by_step_to_its_baseline() {
    for size in [Size::Micro, Size::Large, Size::X2Large] {
        let terms = size.plan(Mode::Standard).terms().unwrap();
        let mut account = account(&terms, Credits::from_ps(terms.cap_ps()));
        assert_eq!(account.level(), Level::HIGH);
        let mut seen = vec![Level::HIGH.number()];
        let mut rates = vec![];
        let (mut now, mut fell, mut ended) = (account.settled_ns(), 0, 0);
        let start = now;
        while account.level() != Level::EXHAUSTED {
            assert!(now - start < 48 * HOUR_NS, "it never comes to its baseline");
            now += 10 * MS_NS;
            let rate = account.allowed_millis(&terms);
            rates.push(rate);
            if let Some(crossing) = account.settle(&terms, now, 10 * MS_NS / 1000 * u64::from(rate)) {
                seen.push(crossing.to.number());
                if crossing.from == Level::FULL {
                    fell = now;
                }
                ended = now;
            }
        }
        assert_eq!(seen, [9, 8, 7, 6, 5, 4, 3, 2, 1, 0], "{}", size.name());
        assert!(rates.is_sorted_by(|a, b| a >= b));
        let took = (ended - fell) / MINUTE_NS;
        assert!((12..=16).contains(&took), "{}: {took} min", size.name());
        let until = now + HOUR_NS;
        while now < until {
            now += 10 * MS_NS;
            let rate = account.allowed_millis(&terms);
            assert_eq!(rate, terms.baseline_millis());
            assert_eq!(account.settle(&terms, now, 10 * MS_NS / 1000 * u64::from(rate)), None);
        }
    }
}

/// A machine that rests has more than its baseline again at `recover`, all its vCPUs at `low`, and is of the high class at
/// `high_enter`.
#[test]
fn a_machine_that_rests_comes_back_where_its_plan_says() {
    let [recover, low, high] = [7_000, 14_000, 50_000];
    let plan = Plan {
        recover: Some(Credits::from_millis(recover)),
        low: Some(Credits::from_millis(low)),
        high_enter: Some(Credits::from_millis(high)),
        ..Size::Micro.plan(Mode::Standard)
    };
    let terms = plan.terms().unwrap();
    let at = |millis| account(&terms, Credits::from_millis(millis)).level();
    assert_eq!(at(recover - 1), Level::EXHAUSTED);
    assert_eq!(at(recover).number(), 4, "half of what is above the baseline");
    assert_eq!(at(low - 1).number(), 7);
    assert_eq!((at(low), at(high - 1)), (Level::FULL, Level::FULL));
    assert_eq!(at(high), Level::HIGH);
}

/// Who uses more than it is allowed, until it is held back, pays for it: it is exhausted for so much longer.
#[test]
fn what_an_exhausted_machine_takes_is_owed() {
    let terms = Size::Micro.plan(Mode::Standard).terms().unwrap();
    let mut thief = Account::open(&terms, 0);
    let mut honest = thief;
    // Two vCPUs for 4 ms each, all ten ms of which it is not settled.
    for tick in 1..=1000 {
        thief.settle(&terms, tick * 10 * MS_NS, 8 * MS_NS);
        honest.settle(&terms, tick * 10 * MS_NS, 2 * MS_NS);
    }
    assert_eq!(thief.level(), Level::EXHAUSTED);
    assert_eq!(thief.owed_ps(), 1000 * 6 * MS_NS * 1000);
    assert_eq!(honest.owed_ps(), 0);
    let longer = thief.until_full(&terms, 0).unwrap() - honest.until_full(&terms, 0).unwrap();
    assert_eq!(
        longer,
        1000 * 6 * MS_NS * 5,
        "at a fifth of a CPU it takes five times as long to earn"
    );
}

#[test]
fn in_standard_no_more_is_owed_than_a_minute_of_all_vcpus() {
    let terms = Size::Micro.plan(Mode::Standard).terms().unwrap();
    let mut account = Account::open(&terms, 0);
    account.settle(&terms, HOUR_NS, 2 * HOUR_NS);
    assert_eq!(Credits::from_ps(account.owed_ps()), Credits::new(2));
    assert_eq!(
        Credits::from_ps(account.totals().forgiven.get().try_into().unwrap()),
        Credits::new(120 - 12 - 2)
    );
    assert_eq!(account.totals().billed.get(), 0);
}

#[test]
fn switching_the_mode_bills_or_keeps_what_is_owed() {
    let standard = Size::Micro.plan(Mode::Standard).terms().unwrap();
    let unlimited = Size::Micro.plan(Mode::Unlimited).terms().unwrap();
    let mut account = Account::open(&unlimited, 0);
    account.settle(&unlimited, 0, 10 * MINUTE_NS);
    let crossing = account.resize(&unlimited, &standard, 0, 0).unwrap();
    assert_eq!(crossing.class(), Some(Class::Exhausted));
    assert_eq!(account.owed_ps(), 0);
    assert_eq!(account.totals().billed.get(), u128::from(Credits::new(10).ps()));
    account.settle(&standard, 0, MINUTE_NS);
    let crossing = account.resize(&standard, &unlimited, 0, 0).unwrap();
    assert_eq!((crossing.from, crossing.to), (Level::EXHAUSTED, Level::FULL));
    assert_eq!(Credits::from_ps(account.owed_ps()), Credits::new(1));
}

#[test]
fn a_grant_pays_what_is_owed_and_can_be_spent_at_once() {
    let terms = Size::Micro.plan(Mode::Standard).terms().unwrap();
    let mut account = Account::open(&terms, 0);
    account.settle(&terms, 0, MINUTE_NS);
    let crossing = account.grant(&terms, Credits::new(101).ps()).unwrap();
    assert_eq!(crossing.to, Level::HIGH);
    assert_eq!((account.owed_ps(), account.launch_ps()), (0, Credits::new(100).ps()));
    check(&account, &terms);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// At its baseline, used in bursts as `cpu.max` lets a machine use it, a machine stays at its level wherever it is; it may leave
    /// it once where it had just come to it.
    #[test]
    fn at_its_baseline_a_machine_does_not_flap(
        terms in terms(),
        share in 0_u64..=1000,
        from_above in any::<bool>(),
        period_ms in 1_u64..=100,
    ) {
        let baseline = u64::from(terms.baseline_millis());
        let mut account = Account::open(&terms, 0);
        account.settle(&terms, terms.cap_ps() / baseline, account.launch_ps() / 1000);
        let target = terms.cap_ps() / 1000 * share;
        if from_above {
            account.settle(&terms, account.settled_ns(), account.spendable_ps().saturating_sub(target) / 1000);
        } else {
            account.settle(&terms, account.settled_ns(), account.spendable_ps() / 1000);
            account.settle(&terms, account.settled_ns() + target / baseline, 0);
        }
        let crossings = account.crossings();
        let mut now = account.settled_ns();
        let period = period_ms * MS_NS;
        // All that the baseline allows in a period, as fast as all vCPUs can, at its begin; then it waits.
        let used = period * baseline / 1000;
        for _ in 0..200 {
            account.settle(&terms, now, used);
            now += period / 2;
            account.settle(&terms, now, 0);
            now += period - period / 2;
            account.settle(&terms, now, 0);
        }
        prop_assert!(account.crossings() - crossings <= 1, "it crossed {} times", account.crossings() - crossings);
    }

    /// Whatever a machine does, its level changes no more often than its vCPUs can use what lies between two levels.
    #[test]
    fn nobody_can_make_it_cross_often(
        terms in terms(),
        steps in proptest::collection::vec((0_u64..50 * MS_NS, any::<bool>()), 1..200),
        share in 0_u64..=1000,
    ) {
        let mut account = Account::open(&terms, 0);
        account.settle(&terms, (terms.cap_ps() / 1000 * share) / u64::from(terms.baseline_millis()), 0);
        let mut now = account.settled_ns();
        let mut turns = vec![];
        let mut upwards = None;
        for (ns, busy) in steps {
            now += ns;
            let used = if busy { ns * u64::from(terms.full_millis()) / 1000 } else { 0 };
            if let Some(crossing) = account.settle(&terms, now, used) {
                let up = crossing.to > crossing.from;
                if upwards.replace(up).is_some_and(|before| before != up) {
                    turns.push(now);
                }
            }
        }
        for pair in turns.windows(2) {
            prop_assert!(pair[1] - pair[0] + 50 * MS_NS >= 100 * MS_NS, "two turns within {} ns", pair[1] - pair[0]);
        }
    }

    /// More on the account never means fewer rights.
    #[test]
    fn the_allowed_rate_rises_with_the_balance(terms in terms(), a in 0_u64..=1000, b in 0_u64..=1000) {
        let at = |share: u64| {
            let mut account = Account::open(&terms, 0);
            account.settle(&terms, 0, account.launch_ps() / 1000);
            account.settle(&terms, (terms.cap_ps() / 1000 * share) / u64::from(terms.baseline_millis()), 0);
            (account.level(), account.allowed_millis(&terms))
        };
        let (low, high) = (at(a.min(b)), at(a.max(b)));
        prop_assert!(low.0 <= high.0 && low.1 <= high.1);
    }

    /// A map may hold anything: nothing panics, and a level is a level.
    #[test]
    fn no_terms_and_no_state_panic(seed in terms(), other in terms(), now in any::<u64>(), used in any::<u64>()) {
        let mut account = Account::default();
        let none = crate::Terms::default();
        account.settle(&none, now, used);
        prop_assert_eq!(account.level(), Level::EXHAUSTED);
        prop_assert_eq!(account.allowed_millis(&none), 0);
        account.resize(&none, &seed, now, used);
        account.settle(&seed, used, now);
        // State of other terms.
        account.settle(&other, u64::MAX, used);
        account.restore(&other, now, 0);
        check(&account, &other);
        account.until_crossing(&none, used as u32);
    }
}

proptest! {
    /// Within its slack a level does not fall, however little time passes, and just beyond it does.
    #[test]
    fn the_slack_is_what_a_level_lasts(
        terms in super::terms(),
        balance in any::<u64>(),
        passed in 0_u64..HOUR_NS,
        part in any::<u64>(),
    ) {
        let before = account(&terms, Credits::from_ps(balance % (terms.cap_ps() + 1)));
        let slack = before.slack_ns(&terms);
        let mut within = before;
        let now = before.settled_ns() + passed;
        within.settle(&terms, now, part % slack.max(1));
        prop_assert!(within.level() >= before.level());
        let mut all = before;
        all.settle(&terms, before.settled_ns(), slack);
        prop_assert!(all.level() >= before.level());
        if slack < u64::MAX {
            let mut beyond = before;
            beyond.settle(&terms, before.settled_ns(), slack + 1);
            prop_assert!(beyond.level() < before.level());
        } else {
            prop_assert!(before.level() == Level::EXHAUSTED || terms.mode() == Mode::Unlimited);
        }
    }
}
