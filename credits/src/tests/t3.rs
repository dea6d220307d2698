//! AWS's table, row by row, and what the guide says of launch credits and of surplus.

use super::{HOUR_NS, MINUTE_NS, account};
use crate::t3::{Size, T2_LAUNCH_PER_VCPU};
use crate::{Account, Class, Credits, Mode, PS_PER_CREDIT, Plan, Terms};

/// "Key concepts for burstable performance instances", EC2 user guide: size, credits earned an hour, the most that can be accrued,
/// vCPUs, baseline of each in percent.
const TABLE: [(Size, &str, u64, u64, u32, u32); 7] = [
    (Size::Nano, "t3.nano", 6, 144, 2, 5),
    (Size::Micro, "t3.micro", 12, 288, 2, 10),
    (Size::Small, "t3.small", 24, 576, 2, 20),
    (Size::Medium, "t3.medium", 24, 576, 2, 20),
    (Size::Large, "t3.large", 36, 864, 2, 30),
    (Size::XLarge, "t3.xlarge", 96, 2304, 4, 40),
    (Size::X2Large, "t3.2xlarge", 192, 4608, 8, 40),
];

fn terms(size: Size, mode: Mode) -> Terms {
    size.plan(mode).terms().unwrap()
}

#[test]
fn each_row_earns_and_keeps_what_is_published() {
    assert_eq!(TABLE.map(|row| row.0), Size::ALL);
    for (size, name, hourly, cap, vcpus, percent) in TABLE {
        let terms = terms(size, Mode::Standard);
        assert_eq!(size.name(), name);
        assert_eq!(terms.full_millis(), vcpus * 1000);
        assert_eq!(terms.baseline_millis(), vcpus * percent * 10);
        assert_eq!(terms.cap_ps(), cap * PS_PER_CREDIT, "{name}");
        assert_eq!(terms.launch_ps(), 0, "T3 instances have no launch credits");

        let mut account = Account::open(&terms, 0);
        for hour in 1..=30 {
            // By the ms, as AWS accounts; here with what is left of an hour in one.
            for ms in 1..=10 {
                account.settle(&terms, (hour - 1) * HOUR_NS + ms * 1_000_000, 0);
            }
            account.settle(&terms, hour * HOUR_NS, 0);
            assert_eq!(
                account.balance_ps(),
                (hour * hourly).min(cap) * PS_PER_CREDIT,
                "{name} after {hour} h"
            );
        }
        assert_eq!(account.totals().earned.get(), u128::from(30 * hourly * PS_PER_CREDIT));
        assert_eq!(
            account.totals().discarded.get(),
            u128::from((30 * hourly - cap) * PS_PER_CREDIT)
        );
        // The baseline is where as much is earned as is spent.
        account.settle(&terms, 31 * HOUR_NS, vcpus as u64 * HOUR_NS * u64::from(percent) / 100);
        assert_eq!(account.balance_ps(), cap * PS_PER_CREDIT, "{name}");
    }
}

#[test]
fn a_credit_is_one_vcpu_for_a_minute_or_as_much_of_several() {
    let terms = terms(Size::XLarge, Mode::Standard);
    for (vcpus, percent, minutes) in [(1, 100, 1), (1, 50, 2), (2, 25, 2), (4, 25, 1)] {
        let mut account = account(&terms, Credits::new(100));
        let before = account.balance_ps();
        account.settle(
            &terms,
            account.settled_ns(),
            vcpus * minutes * MINUTE_NS * percent / 100,
        );
        assert_eq!(before - account.balance_ps(), PS_PER_CREDIT);
    }
}

/// The guide's example: a t3.nano at 2% for an hour accrues 3.6 credits.
#[test]
fn below_its_baseline_a_nano_accrues_what_the_guide_reckons() {
    let terms = terms(Size::Nano, Mode::Standard);
    let mut account = Account::open(&terms, 0);
    account.settle(&terms, HOUR_NS, 2 * HOUR_NS * 2 / 100);
    assert_eq!(Credits::from_ps(account.balance_ps()), Credits::from_millis(3_600));
}

/// The guide's example of a t2.micro: 174 credits after an idle day, and no more than 144 once 30 are spent.
#[test]
fn launch_credits_are_spent_first_and_are_outside_the_cap() {
    let plan = Plan {
        launch: T2_LAUNCH_PER_VCPU,
        ..Plan::new(1, 100, Mode::Standard)
    };
    let terms = plan.terms().unwrap();
    let mut account = Account::open(&terms, 0);
    assert_eq!(account.level().class(), Class::High, "30 of 144 credits");
    account.settle(&terms, 24 * HOUR_NS, 0);
    assert_eq!(account.spendable_ps(), 174 * PS_PER_CREDIT);
    account.settle(&terms, 25 * HOUR_NS, 0);
    assert_eq!(account.spendable_ps(), 174 * PS_PER_CREDIT);

    account.settle(&terms, account.settled_ns(), 29 * MINUTE_NS);
    assert_eq!(
        (account.launch_ps(), account.balance_ps()),
        (PS_PER_CREDIT, 144 * PS_PER_CREDIT)
    );
    account.settle(&terms, account.settled_ns(), 2 * MINUTE_NS);
    assert_eq!((account.launch_ps(), account.balance_ps()), (0, 143 * PS_PER_CREDIT));
    account.settle(&terms, 49 * HOUR_NS, 0);
    assert_eq!(account.spendable_ps(), 144 * PS_PER_CREDIT);
}

/// "Surplus credits can incur charges": up to a day's earning is borrowed for nothing, what is above that is charged, and so is what
/// is owed at the end.
#[test]
fn unlimited_borrows_a_days_earning_and_is_billed_for_more() {
    let terms = terms(Size::Micro, Mode::Unlimited);
    assert_eq!(terms.limit_ps(), 288 * PS_PER_CREDIT);
    let mut account = Account::open(&terms, 0);
    // Both vCPUs for two hours: 240 credits used, 24 earned.
    account.settle(&terms, 2 * HOUR_NS, 4 * HOUR_NS);
    assert_eq!(account.owed_ps(), 216 * PS_PER_CREDIT);
    assert_eq!(account.totals().billed.get(), 0);
    assert_eq!(account.allowed_millis(&terms), 2000);
    // Another: 324 owed, of which 36 are above the limit.
    account.settle(&terms, 3 * HOUR_NS, 2 * HOUR_NS);
    assert_eq!(account.owed_ps(), 288 * PS_PER_CREDIT);
    assert_eq!(account.totals().billed.get(), u128::from(36 * PS_PER_CREDIT));
    assert_eq!(account.level().class(), Class::Normal);
    // Ten idle hours pay 120 back; then it ends.
    account.settle(&terms, 13 * HOUR_NS, 0);
    assert_eq!((account.owed_ps(), account.balance_ps()), (168 * PS_PER_CREDIT, 0));
    account.close(&terms, 13 * HOUR_NS, 0);
    assert_eq!(account.owed_ps(), 0);
    assert_eq!(account.totals().billed.get(), u128::from((36 + 168) * PS_PER_CREDIT));
}

#[test]
fn a_nano_can_become_a_2xlarge_and_go_back() {
    let (nano, large) = (terms(Size::Nano, Mode::Standard), terms(Size::X2Large, Mode::Standard));
    let mut account = Account::open(&nano, 0);
    account.settle(&nano, 10 * HOUR_NS, 0);
    assert_eq!(account.level().class(), Class::High);
    let crossing = account.resize(&nano, &large, 11 * HOUR_NS, 0).unwrap();
    assert_eq!(account.balance_ps(), 66 * PS_PER_CREDIT, "what it had");
    assert_eq!(
        crossing.class(),
        Some(Class::Normal),
        "66 credits are little for eight vCPUs"
    );
    account.settle(&large, 12 * HOUR_NS, 0);
    assert_eq!(account.balance_ps(), (66 + 192) * PS_PER_CREDIT);
    account.resize(&large, &nano, 12 * HOUR_NS, 0);
    assert_eq!(account.balance_ps(), 144 * PS_PER_CREDIT);
    assert_eq!(account.totals().discarded.get(), u128::from(114 * PS_PER_CREDIT));
}
