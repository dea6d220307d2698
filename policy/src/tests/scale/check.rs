//! Thresholds that can't be kept.

use std::time::Duration;

use super::super::SECOND;
use super::{grow, of_memory, shrink};
use crate::scale::{
    Bounds, ChangeSpec, Comparison, Direction, Fault, MAX_THRESHOLDS, Resource, Size, ThresholdError, ThresholdSpec,
    Whose, check,
};

fn bounds() -> Bounds {
    Bounds {
        host: Size::whole(8, 4096),
        account: Size::whole(6, 16_384),
        machine: Size::whole(16, 2048),
        base_mib: 256,
        credits: true,
    }
}

fn fault(spec: ThresholdSpec) -> Fault {
    match check(&[grow(99.0), spec], &bounds()) {
        Err(ThresholdError::Fault { index: 1, fault }) => fault,
        other => panic!("{other:?}"),
    }
}

fn says(spec: ThresholdSpec, words: &str) {
    let text = fault(spec).to_string();
    assert!(text.contains(words), "{text}");
}

#[test]
fn good_ones_are_kept_with_what_they_have_by_default() {
    let specs = [
        ThresholdSpec {
            held: None,
            cooldown: None,
            ..grow(80.0)
        },
        ThresholdSpec {
            held: None,
            cooldown: None,
            ..shrink(30.0)
        },
        of_memory(grow(90.005), 128),
    ];
    let thresholds = check(&specs, &bounds()).unwrap();
    let first = &thresholds[0];
    assert_eq!((first.held(), first.cooldown()), (10 * SECOND, 60 * SECOND));
    assert_eq!(
        (first.least(), first.most()),
        (1, 6),
        "as much as account, host and machine have"
    );
    assert_eq!(
        (thresholds[1].held(), thresholds[1].cooldown()),
        (300 * SECOND, 300 * SECOND)
    );
    assert_eq!((thresholds[2].least(), thresholds[2].most()), (256, 2048));
    assert_eq!(thresholds[2].value(), 9001, "to a hundredth of a percent");
    assert_eq!(
        thresholds[2].to_string(),
        "memory_use above 90.01% for 5.0 s: grow memory by 128 MiB"
    );
    assert_eq!(check(&[], &bounds()).unwrap().len(), 0);
}

#[test]
fn unknown_metrics() {
    let spec = ThresholdSpec {
        metric: "load".into(),
        ..grow(50.0)
    };
    assert_eq!(fault(spec.clone()), Fault::UnknownMetric { name: "load".into() });
    says(spec, "there are cpu_use, cpu_wait, memory_use, cpu_pressure");
    let long = ThresholdSpec {
        metric: "x".repeat(10_000),
        ..grow(50.0)
    };
    assert!(fault(long).to_string().len() < 300);
    let credits = ThresholdSpec {
        metric: "credits".into(),
        ..grow(5.0)
    };
    assert!(check(std::slice::from_ref(&credits), &bounds()).is_ok());
    let without = Bounds {
        credits: false,
        ..bounds()
    };
    let error = check(&[credits], &without).unwrap_err();
    assert_eq!(error.to_string(), "threshold 1: the machine has no account of credits");
}

#[test]
fn values_that_are_none() {
    for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        assert!(matches!(fault(grow(value)), Fault::NoNumber { .. }), "{value}");
        let percent = ThresholdSpec {
            change: ChangeSpec::ByPercent(value),
            ..grow(50.0)
        };
        assert!(matches!(fault(percent), Fault::NoNumber { .. }), "{value}");
    }
    assert!(matches!(fault(grow(-1.0)), Fault::Negative { .. }));
    says(grow(-0.5), "its value is -0.5, and can't be negative");
    let percent = ThresholdSpec {
        change: ChangeSpec::ByPercent(-10.0),
        ..grow(50.0)
    };
    assert!(matches!(fault(percent), Fault::Negative { .. }));
    for never in [grow(100.0), grow(99.999), shrink(0.0), shrink(0.004)] {
        assert!(matches!(fault(never), Fault::NeverCrossed { .. }));
    }
    assert!(matches!(fault(shrink(100.5)), Fault::TooMuch { .. }));
    assert!(matches!(
        fault(grow(1e300)),
        Fault::TooMuch { .. } | Fault::NeverCrossed { .. }
    ));
}

#[test]
fn times_that_can_not_be() {
    for time in [Duration::ZERO, SECOND / 2, 25 * 60 * 60 * SECOND, Duration::MAX] {
        let held = ThresholdSpec {
            held: Some(time),
            ..grow(50.0)
        };
        assert!(matches!(fault(held), Fault::Time { .. }), "{time:?}");
        let cooldown = ThresholdSpec {
            cooldown: Some(time),
            ..grow(50.0)
        };
        assert!(matches!(fault(cooldown), Fault::Time { .. }), "{time:?}");
    }
    let none = ThresholdSpec {
        cooldown: Some(Duration::ZERO),
        ..grow(50.0)
    };
    says(none, "a cooldown of 0 us is not within 1.0 s and 86400.0 s");
}

#[test]
fn amounts_that_can_not_be() {
    let to = |change| ThresholdSpec { change, ..grow(50.0) };
    assert_eq!(fault(to(ChangeSpec::By(0))), Fault::NoChange(Resource::Vcpus));
    assert_eq!(fault(to(ChangeSpec::To(0))), Fault::NoChange(Resource::Vcpus));
    assert_eq!(fault(to(ChangeSpec::ByPercent(0.0))), Fault::NoChange(Resource::Vcpus));
    assert!(matches!(fault(to(ChangeSpec::ByPercent(1e9))), Fault::TooMuch { .. }));
    let all = ThresholdSpec {
        change: ChangeSpec::ByPercent(100.0),
        ..shrink(50.0)
    };
    assert_eq!(fault(all), Fault::NothingLeft(Resource::Vcpus));
    says(
        of_memory(grow(50.0), 3),
        "by is 3 MiB, and memory goes in blocks of 2 MiB",
    );
    let bounded = |least, most| ThresholdSpec {
        least: Some(least),
        most: Some(most),
        ..grow(50.0)
    };
    says(bounded(5, 4), "least is 5 vCPUs, which is more than most, 4 vCPUs");
    assert!(matches!(fault(bounded(0, 4)), Fault::TooSmall { least: 1, .. }));
    let small = ThresholdSpec {
        least: Some(128),
        ..of_memory(grow(50.0), 64)
    };
    says(small, "least is 128 MiB, and the machine always has 256 MiB");
    let to_5 = ThresholdSpec {
        change: ChangeSpec::To(5),
        ..bounded(1, 4)
    };
    assert!(matches!(fault(to_5), Fault::ToOutside { to: 5, .. }));
}

#[test]
fn more_than_there_is() {
    let most = |spec: ThresholdSpec, most| ThresholdSpec {
        most: Some(most),
        ..spec
    };
    says(most(grow(50.0), 9), "most is 9 vCPUs, and the host has at most 8 vCPUs");
    says(
        most(grow(50.0), 7),
        "most is 7 vCPUs, and its account has at most 6 vCPUs",
    );
    says(
        most(of_memory(grow(50.0), 64), 4096),
        "most is 4096 MiB, and the machine itself has at most 2048 MiB",
    );
    let to = ThresholdSpec {
        change: ChangeSpec::To(64),
        ..grow(50.0)
    };
    let whose = |fault| {
        matches!(
            fault,
            Fault::TooLarge {
                whose: Whose::Host,
                amount: 64,
                most: 8,
                ..
            }
        )
    };
    assert!(whose(fault(to)));
}

#[test]
fn what_makes_itself_worse() {
    let backwards = ThresholdSpec {
        direction: Direction::Grow,
        ..shrink(30.0)
    };
    says(
        backwards,
        "with more vCPUs cpu_use falls: it would be crossed ever more; let it shrink instead",
    );
    let backwards = ThresholdSpec {
        direction: Direction::Shrink,
        ..of_memory(grow(90.0), 64)
    };
    says(backwards, "with less memory memory_use rises");
    // Who has many credits may grow by them, or shrink.
    for direction in [Direction::Grow, Direction::Shrink] {
        let credits = ThresholdSpec {
            metric: "credits".into(),
            direction,
            ..grow(50.0)
        };
        assert!(check(&[credits], &bounds()).is_ok());
    }
}

#[test]
fn contradictions() {
    let error = check(&[shrink(60.0), of_memory(grow(50.0), 64), grow(50.0)], &bounds()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "threshold 3 contradicts threshold 1: a cpu_use between 50% and 60% would both grow and shrink vCPUs; let the one by which \
         it shrinks be crossed below 50%, and the one by which it grows above that"
    );
    let error = check(&[grow(50.0), shrink(50.0)], &bounds()).unwrap_err();
    assert!(error.to_string().contains("around 50%"), "{error}");
    assert!(check(&[grow(50.0), shrink(49.99)], &bounds()).is_ok());
    // Of other resources, or by other metrics, they may be crossed at once.
    let share = ThresholdSpec {
        resource: Resource::CpuShare,
        ..shrink(60.0)
    };
    assert!(check(&[grow(50.0), share], &bounds()).is_ok());
    let pressure = ThresholdSpec {
        metric: "cpu_pressure".into(),
        ..shrink(60.0)
    };
    assert!(check(&[grow(50.0), pressure], &bounds()).is_ok());
    let credits = |comparison, value, direction| ThresholdSpec {
        metric: "credits".into(),
        comparison,
        value,
        direction,
        ..grow(50.0)
    };
    let both_above = [
        credits(Comparison::Above, 10.0, Direction::Grow),
        credits(Comparison::Above, 20.0, Direction::Shrink),
    ];
    let error = check(&both_above, &bounds()).unwrap_err().to_string();
    assert!(error.contains("a credits above 20.000 credits"), "{error}");
    let both_below = [
        credits(Comparison::Below, 10.0, Direction::Grow),
        credits(Comparison::Below, 20.0, Direction::Shrink),
    ];
    assert!(matches!(
        check(&both_below, &bounds()),
        Err(ThresholdError::Contradiction { index: 0, other: 1, .. })
    ));
}

#[test]
fn too_many() {
    let specs = vec![grow(50.0); MAX_THRESHOLDS];
    assert!(check(&specs, &bounds()).is_ok());
    let specs = vec![grow(50.0); MAX_THRESHOLDS + 1];
    assert_eq!(check(&specs, &bounds()), Err(ThresholdError::TooMany(17)));
}
