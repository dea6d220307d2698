//! That what is foretold comes.

use super::{HOUR_NS, MINUTE_NS, account, terms};
use crate::t3::Size;
use crate::{Account, Credits, Mode, Terms};
use proptest::prelude::*;

#[test]
fn a_full_account_lasts_as_long_as_people_reckon() {
    let terms = Size::Micro.plan(Mode::Standard).terms().unwrap();
    let account = account(&terms, Credits::new(288));
    // 288 credits at 2 vCPUs, of which 0.2 are earned.
    assert_eq!(account.until_empty(&terms, 2000).unwrap() / MINUTE_NS, 160);
    assert_eq!(account.until_empty(&terms, 200), None, "the baseline lasts for ever");
    assert_eq!(account.until_full(&terms, 2000), Some(0));
    // 36 credits are high, 18 are not.
    assert_eq!(account.until_crossing(&terms, 2000).unwrap() / MINUTE_NS, 150);
    let empty = Account::open(&terms, 0);
    assert_eq!(empty.until_full(&terms, 0), Some(24 * HOUR_NS));
    assert_eq!(empty.until_full(&terms, 100), Some(48 * HOUR_NS));
    assert_eq!(empty.until_full(&terms, 200), None);
    assert_eq!(empty.until_empty(&terms, 0), Some(0));
}

#[test]
fn a_debt_is_paid_before_the_account_fills() {
    let terms = Size::Micro.plan(Mode::Unlimited).terms().unwrap();
    let mut account = Account::open(&terms, 0);
    account.settle(&terms, 0, 12 * MINUTE_NS);
    assert_eq!(account.until_full(&terms, 0), Some(25 * HOUR_NS));
    assert_eq!(
        account.until_crossing(&terms, 0),
        Some(4 * HOUR_NS),
        "36 credits are high"
    );
    assert_eq!(account.until_crossing(&terms, 2000), None, "it borrows on");
}

/// What a settlement after each so many ns says: in how many the goal is met for the first time.
fn step(
    mut account: Account,
    terms: &Terms,
    rate: u64,
    by: u64,
    most: u64,
    met: impl Fn(&Account) -> bool,
) -> Option<u64> {
    let start = account.settled_ns();
    let mut passed = 0;
    while passed <= most {
        if met(&account) {
            return Some(passed);
        }
        passed += by;
        account.settle(terms, start + passed, by * rate / 1000);
    }
    None
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// In steps of which each uses a whole number of ns, what comes at some time comes with the step that contains it.
    #[test]
    fn it_agrees_with_stepping(
        terms in terms(),
        share in 0_u64..=1000,
        launch in 0_u64..50_000,
        owed in 0_u64..20_000,
        rate in prop_oneof![0_u32..10_000, Just(0)],
        steps in 1_u64..3000,
    ) {
        let mut account = Account::open(&terms, 0);
        account.settle(&terms, 0, account.launch_ps() / 1000);
        account.settle(&terms, (terms.cap_ps() / 1000 * share) / u64::from(terms.baseline_millis()), 0);
        account.grant(&terms, launch * 1_000_000_000);
        if share == 0 {
            account.settle(&terms, account.settled_ns(), owed * 1_000_000);
        }
        let level = account.level();
        let rate_ns = u64::from(rate);
        let goals: [(Option<u64>, &dyn Fn(&Account) -> bool); 3] = [
            (account.until_crossing(&terms, rate), &|account| account.level() != level),
            (account.until_empty(&terms, rate), &|account| account.spendable_ps() == 0),
            (account.until_full(&terms, rate), &|account| account.balance_ps() == terms.cap_ps()),
        ];
        for (at, (told, met)) in goals.into_iter().enumerate() {
            // As many steps as make it quick, and a multiple of 1000 ns each.
            let by = (told.unwrap_or(24 * HOUR_NS) / steps / 1000).max(1) * 1000;
            let most = told.unwrap_or(24 * HOUR_NS).min(by * 4000);
            let stepped = step(account, &terms, rate_ns, by, most + by, met);
            match told {
                Some(ns) if ns <= most => prop_assert_eq!(stepped, Some(ns.div_ceil(by) * by), "goal {}", at),
                _ => prop_assert_eq!(stepped, None, "goal {}: told {:?}", at, told),
            }
        }
    }
}
