//! What the tests share.

mod conservation;
mod levels;
mod plans;
mod share;
mod t3;
mod until;

use proptest::prelude::*;

use crate::{Account, Credits, MAX_PS, Mode, Plan, Terms};

const MINUTE_NS: u64 = 60_000_000_000;
const HOUR_NS: u64 = 60 * MINUTE_NS;

/// An account that has earned so much, at some time of its clock.
fn account(terms: &Terms, balance: Credits) -> Account {
    let mut account = Account::open(terms, 0);
    let ns = balance.ps() / u64::from(terms.baseline_millis());
    account.settle(terms, ns, 0);
    account
}

/// That all adds up, by what the crate's page says, and is within its bounds.
fn check(account: &Account, terms: &Terms) {
    let totals = account.totals();
    let (owed, balance, launch) = (account.owed_ps(), account.balance_ps(), account.launch_ps());
    let written_off = totals.billed.get() + totals.forgiven.get();
    assert_eq!(
        totals.earned.get() + totals.granted.get() + written_off + u128::from(owed),
        totals.spent.get() + u128::from(balance) + u128::from(launch) + totals.discarded.get(),
    );
    assert!(
        totals.borrowed.get() >= written_off + u128::from(owed),
        "it paid back less than nothing"
    );
    assert!(balance <= terms.cap_ps(), "the cap");
    assert!(owed <= terms.limit_ps(), "the limit");
    assert!(launch <= MAX_PS);
    assert!(owed == 0 || balance + launch == 0, "it owes, and has");
    let allowed = account.allowed_millis(terms);
    assert!(
        (terms.baseline_millis()..=terms.full_millis()).contains(&allowed),
        "nobody starves"
    );
    assert!(terms.mode() == Mode::Standard || allowed == terms.full_millis());
}

/// Plans that are possible, and the terms they make.
fn terms() -> impl Strategy<Value = Terms> {
    let vcpus = prop_oneof![1_u32..=8, Just(64), Just(256)];
    (vcpus, 0_u32..=1000, any::<bool>(), 0_u32..200, any::<[u8; 5]>()).prop_filter_map(
        "impossible",
        |(vcpus, permille, unlimited, launch, shares)| {
            let baseline = (vcpus * permille).max(1);
            let mut cap = Credits::from_ps(u64::from(baseline).saturating_mul(24 * HOUR_NS));
            if cap > Credits::MAX || shares[0] % 4 == 0 {
                cap = Credits::new(vcpus * (1 + u32::from(shares[0])));
            }
            let part = |of: Credits, share: u8| Credits::from_millis(of.millis() * u64::from(share) / 256);
            let mut plan = Plan {
                launch: Credits::new(launch),
                cap: Some(cap),
                ..Plan::new(
                    vcpus,
                    baseline,
                    if unlimited { Mode::Unlimited } else { Mode::Standard },
                )
            };
            if shares[1] % 2 == 0 {
                let high = part(cap, shares[1]);
                plan.high_enter = Some(high);
                plan.high_leave = Some(part(high, shares[2]));
            }
            if shares[3] % 4 == 0 {
                plan.limit = Some(part(cap, shares[3]));
            }
            if shares[4] % 4 == 0 {
                plan.low = Some(part(cap, shares[4] / 4));
            }
            plan.terms().ok()
        },
    )
}
