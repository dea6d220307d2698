//! That what is foretold comes.

use super::{HOUR_NS, MINUTE_NS, account, terms};
use crate::t3::Size;
use crate::{Account, Credits, Mode};
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

/// When something was told to come, and whether it has.
type Goal<'a> = (Option<u64>, &'a dyn Fn(&Account) -> bool);

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// It has come when it was told to, and at no time before, where the time passes step by step.
    #[test]
    fn it_agrees_with_stepping(
        terms in terms(),
        share in prop_oneof![0_u64..=1000, 990_u64..=1000],
        launch in 0_u64..1400,
        owed in 0_u64..20_000,
        rate in prop_oneof![0_u32..10_000, Just(0)],
        steps in 1_u64..1000,
    ) {
        let mut account = Account::open(&terms, 0);
        account.settle(&terms, 0, account.launch_ps() / 1000);
        account.settle(&terms, (terms.cap_ps() / 1000 * share) / u64::from(terms.baseline_millis()), 0);
        account.grant(&terms, terms.cap_ps() / 1_000_000 * launch * launch);
        if share == 0 {
            account.settle(&terms, account.settled_ns(), owed * 1_000_000);
        }
        let (level, full) = (account.level(), terms.cap_ps());
        let goals: [Goal; 3] = [
            (account.until_crossing(&terms, rate), &|account| account.level() != level),
            (account.until_empty(&terms, rate), &|account| account.spendable_ps() == 0),
            (account.until_full(&terms, rate), &|account| account.balance_ps() == full),
        ];
        let (earns, uses) = (u64::from(terms.baseline_millis()), u64::from(rate));
        // Where what is left goes another way: a step across would set off one against the other.
        let bends = [account.launch_ps().checked_div(uses), (full - account.balance_ps()).checked_div(earns)];
        for (goal, (told, met)) in goals.into_iter().enumerate() {
            let until = told.unwrap_or(HOUR_NS);
            let mut moments: Vec<u64> = (0..=steps).map(|step| until / steps * step).collect();
            moments.extend(bends.into_iter().flatten().flat_map(|bend| [bend, bend.saturating_add(1)]));
            moments.extend([until.saturating_sub(1), until]);
            moments.retain(|moment| *moment <= until);
            moments.sort_unstable();
            let (mut stepped, mut passed) = (account, 0);
            for moment in moments {
                let ns = moment - passed;
                // Of what takes centuries only the begin is looked at.
                let (Some(earned), Some(used)) = (ns.checked_mul(earns), ns.checked_mul(uses)) else {
                    break;
                };
                stepped.book(&terms, earned, used);
                stepped.grant(&terms, 0);
                passed = moment;
                prop_assert_eq!(met(&stepped), told == Some(moment), "goal {} at {} of {:?}", goal, moment, told);
            }
        }
    }
}
