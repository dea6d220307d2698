//! Which plans are possible.

use crate::{Credits, Mode, Plan};

#[test]
fn an_impossible_one_is_refused_and_the_error_says_why() {
    let good = Plan::new(2, 200, Mode::Standard);
    let credits = |millis| Some(Credits::from_millis(millis));
    for (plan, says) in [
        (
            Plan { vcpus: 0, ..good },
            "a machine without vCPUs has no credits: give it at least one",
        ),
        (
            Plan { vcpus: 5000, ..good },
            "a machine can't have 5000 vCPUs: give it at most 4096",
        ),
        (
            Plan {
                baseline_millis: 0,
                ..good
            },
            "with a baseline of 0 a machine without credits would never run: give it at least 1 millicore",
        ),
        (
            Plan {
                baseline_millis: 2001,
                ..good
            },
            "a baseline of 2001 millicores is more than 2 vCPUs can use: give at most 2000, or more vCPUs",
        ),
        (
            Plan {
                cap: Some(Credits::new(u32::MAX)),
                ..good
            },
            "cap is 4294967295.000 credits, and an account holds 153722.867 credits: give a lower cap",
        ),
        (
            Plan {
                launch: Credits::from_millis(u64::MAX),
                ..good
            },
            "launch is 18446744073709551.615 credits, and an account holds 153722.867 credits: give a lower launch",
        ),
        (
            Plan::new(4096, 4_096_000, Mode::Standard),
            "cap is 307445.734 credits, and an account holds 153722.867 credits: give a lower cap",
        ),
        (
            Plan {
                cap: Some(Credits::new(5)),
                high_enter: Some(Credits::new(6)),
                ..good
            },
            "high_enter (6.000 credits) must not be above cap (5.000 credits): lower high_enter, or raise cap",
        ),
        (
            Plan {
                high_enter: Some(Credits::new(6)),
                high_leave: Some(Credits::new(6)),
                ..good
            },
            "high_leave (6.000 credits) must not be above high_enter (6.000 credits), and lie 0.004 credits below it: lower \
             high_leave, or raise high_enter",
        ),
        (
            Plan {
                low: Some(Credits::new(20)),
                ..good
            },
            "low (20.000 credits) must not be above high_leave (18.000 credits): lower low, or raise high_leave",
        ),
        (
            Plan {
                recover: Some(Credits::new(20)),
                ..good
            },
            "recover (20.000 credits) must not be above low (10.800 credits): lower recover, or raise low",
        ),
        (
            Plan {
                low: credits(40),
                recover: credits(10),
                ..good
            },
            "low is 0.040 credits, which 2 vCPUs cross in no time: give at least 0.047 credits",
        ),
        (
            Plan {
                recover: credits(3),
                ..good
            },
            "recover is 0.003 credits, which 2 vCPUs cross in no time: give at least 0.004 credits",
        ),
    ] {
        let error = plan.terms().unwrap_err();
        assert_eq!(error.to_string(), says, "{plan:?}");
    }
}

/// What an error asks for is enough, and no more than that.
#[test]
fn what_is_the_least_is_enough() {
    let good = Plan::new(2, 200, Mode::Standard);
    let recover = |millis| Plan {
        recover: Some(Credits::from_millis(millis)),
        ..good
    };
    assert!(recover(3).terms().is_err());
    assert!(recover(4).terms().is_ok());
    let low = |millis| Plan {
        low: Some(Credits::from_millis(millis)),
        ..recover(4)
    };
    assert!(low(46).terms().is_err());
    assert!(low(47).terms().is_ok());
}

/// From one millicore to all vCPUs, on the smallest machine and the largest, the defaults make possible terms.
#[test]
fn by_default_all_is_possible_that_fits() {
    for mode in [Mode::Standard, Mode::Unlimited] {
        for vcpus in [1, 2, 64, 106] {
            for baseline in (vcpus..=vcpus * 1000).step_by(37) {
                let terms = Plan::new(vcpus, baseline, mode).terms();
                assert!(terms.is_ok(), "{vcpus} vCPUs, {baseline} millicores: {terms:?}");
            }
        }
        assert!(Plan::new(64, 64_000, mode).terms().is_ok(), "a day of 64 vCPUs");
    }
}
