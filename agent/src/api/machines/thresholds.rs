//! Thresholds as they come in.

use std::time::Duration;

use stoker_policy::scale::{
    self, Bounds, ChangeSpec, Comparison, Direction, Fault, MAX_THRESHOLDS, Resource, ThresholdError, ThresholdSpec,
    Thresholds,
};
use stoker_proto::v1;
use tonic::Status;
use v1::threshold;

use crate::api::errors::{Violations, invalid};

/// Checks thresholds for a machine within bounds.
///
/// # Errors
/// INVALID_ARGUMENT with what is wrong, and with which of them.
pub(super) fn checked(given: &[v1::Threshold], bounds: &Bounds) -> Result<Thresholds, Status> {
    let mut violations = Violations::default();
    // Of more than a machine may have no more than that is looked at.
    let specs = given.iter().take(MAX_THRESHOLDS + 1).enumerate();
    let specs: Vec<_> = specs
        .filter_map(|(index, threshold)| spec(&format!("thresholds[{index}]"), threshold, &mut violations))
        .collect();
    violations.check()?;
    scale::check(&specs, bounds).map_err(|error| match &error {
        ThresholdError::Fault { index, fault } => invalid(&at(*index, fault), fault.to_string()),
        ThresholdError::Contradiction { other, .. } => invalid(&format!("thresholds[{other}]"), error.to_string()),
        ThresholdError::TooMany(_) => invalid(
            "thresholds",
            format!(
                "{} are more than the {MAX_THRESHOLDS} that a machine may have",
                given.len()
            ),
        ),
    })
}

/// The field that something is wrong with.
fn at(index: usize, fault: &Fault) -> String {
    let field = match fault {
        Fault::UnknownMetric { .. } | Fault::NoCredits => "metric",
        Fault::NeverCrossed { .. } => "value",
        Fault::NoNumber { what, .. } | Fault::Negative { what, .. } | Fault::TooMuch { what, .. } => match *what {
            "by" => "by_percent",
            _ => "value",
        },
        Fault::Time { what, .. } => match *what {
            "a cooldown" => "cooldown",
            _ => "held",
        },
        Fault::Blocks { what, .. } | Fault::TooLarge { what, .. } | Fault::TooSmall { what, .. } => *what,
        Fault::LeastAboveMost { .. } => "least",
        Fault::ToOutside { .. } => "to",
        // What it changes as a whole.
        Fault::NoChange(_) | Fault::NothingLeft(_) | Fault::Backwards { .. } => "",
    };
    match field {
        "" => format!("thresholds[{index}]"),
        field => format!("thresholds[{index}].{field}"),
    }
}

fn spec(field: &str, given: &v1::Threshold, violations: &mut Violations) -> Option<ThresholdSpec> {
    let mut wrong = |part: &str, problem: &str| violations.add(format!("{field}.{part}"), problem);
    let comparison = match given.comparison() {
        threshold::Comparison::Above => Some(Comparison::Above),
        threshold::Comparison::Below => Some(Comparison::Below),
        threshold::Comparison::Unspecified => {
            wrong("comparison", "must be ABOVE or BELOW");
            None
        }
    };
    let resource = match given.resource() {
        threshold::Resource::Vcpus => Some(Resource::Vcpus),
        threshold::Resource::CpuShare => Some(Resource::CpuShare),
        threshold::Resource::Memory => Some(Resource::Memory),
        threshold::Resource::Unspecified => {
            wrong("resource", "must be VCPUS, CPU_SHARE or MEMORY");
            None
        }
    };
    let direction = match given.direction() {
        threshold::Direction::Grow => Some(Direction::Grow),
        threshold::Direction::Shrink => Some(Direction::Shrink),
        threshold::Direction::Unspecified => {
            wrong("direction", "must be GROW or SHRINK");
            None
        }
    };
    let change = match given.change {
        Some(threshold::Change::By(by)) => Some(ChangeSpec::By(by)),
        Some(threshold::Change::ByPercent(by)) => Some(ChangeSpec::ByPercent(by)),
        Some(threshold::Change::To(to)) => Some(ChangeSpec::To(to)),
        None => {
            wrong("change", "one of `by`, `by_percent` and `to` is needed");
            None
        }
    };
    let mut time = |part: &str, given: Option<prost_types::Duration>| match given.map(Duration::try_from) {
        None => None,
        Some(Ok(time)) => Some(time),
        Some(Err(_)) => {
            wrong(part, "must not be negative");
            None
        }
    };
    let (held, cooldown) = (time("held", given.held), time("cooldown", given.cooldown));
    Some(ThresholdSpec {
        metric: given.metric.clone(),
        comparison: comparison?,
        value: given.value,
        held,
        resource: resource?,
        direction: direction?,
        change: change?,
        least: given.least,
        most: given.most,
        cooldown,
    })
}

#[cfg(test)]
mod tests {
    use stoker_policy::scale::Size;
    use tonic_types::StatusExt as _;

    use super::*;

    fn bounds() -> Bounds {
        Bounds {
            host: Size::whole(16, 32_768),
            account: Size::whole(8, 16_384),
            machine: Size::whole(4, 2048),
            base_mib: 256,
            credits: false,
        }
    }

    fn good() -> v1::Threshold {
        v1::Threshold {
            metric: "cpu_use".into(),
            comparison: threshold::Comparison::Above.into(),
            value: 80.0,
            resource: threshold::Resource::Vcpus.into(),
            direction: threshold::Direction::Grow.into(),
            change: Some(threshold::Change::By(1)),
            ..Default::default()
        }
    }

    fn seconds(seconds: i64) -> Option<prost_types::Duration> {
        Some(prost_types::Duration { seconds, nanos: 0 })
    }

    /// The fields that are wrong.
    fn wrong(given: &[v1::Threshold]) -> Vec<String> {
        let status = checked(given, &bounds()).unwrap_err();
        let details = status.get_error_details();
        let violations = &details.bad_request().unwrap().field_violations;
        violations.iter().map(|violation| violation.field.clone()).collect()
    }

    #[test]
    fn defaults_are_filled_in() {
        let thresholds = checked(&[good()], &bounds()).unwrap();
        assert_eq!(thresholds.len(), 1);
        assert_eq!((thresholds[0].held(), thresholds[0].most()), (scale::HELD_TO_GROW, 4));
        assert!(checked(&[], &bounds()).unwrap().is_empty());
    }

    /// The field that is wrong once a good threshold was changed so.
    type Case = (&'static str, fn(&mut v1::Threshold));

    #[test]
    fn what_is_wrong_is_told_by_its_field() {
        let cases: [Case; 17] = [
            ("metric", |t| t.metric = "load".into()),
            ("metric", |t| t.metric = "credits".into()),
            ("comparison", |t| t.comparison = 0),
            ("comparison", |t| t.comparison = 77),
            ("value", |t| t.value = f64::NAN),
            ("value", |t| t.value = -1.0),
            ("value", |t| t.value = 100.0),
            ("resource", |t| t.resource = 0),
            ("direction", |t| t.direction = 0),
            ("change", |t| t.change = None),
            ("by_percent", |t| {
                t.change = Some(threshold::Change::ByPercent(f64::INFINITY))
            }),
            ("to", |t| t.change = Some(threshold::Change::To(5))),
            ("least", |t| (t.least, t.most) = (Some(3), Some(2))),
            ("most", |t| t.most = Some(5)),
            ("held", |t| t.held = seconds(-1)),
            ("held", |t| t.held = seconds(100_000)),
            ("cooldown", |t| t.cooldown = seconds(0)),
        ];
        for (field, change) in cases {
            let mut threshold = good();
            change(&mut threshold);
            assert_eq!(
                wrong(&[good(), threshold]),
                [format!("thresholds[1].{field}")],
                "{field}"
            );
        }
        let mut shrinks = good();
        shrinks.direction = threshold::Direction::Shrink.into();
        assert_eq!(wrong(&[shrinks]), ["thresholds[0]"]);
    }

    #[test]
    fn all_that_can_be_told_at_once_is() {
        let found = wrong(&[v1::Threshold::default()]);
        let parts = ["comparison", "resource", "direction", "change"];
        assert_eq!(found, parts.map(|part| format!("thresholds[0].{part}")));
    }

    #[test]
    fn contradictions_and_too_many_are_refused() {
        let mut shrinks = good();
        shrinks.comparison = threshold::Comparison::Below.into();
        shrinks.direction = threshold::Direction::Shrink.into();
        shrinks.value = 90.0;
        assert_eq!(wrong(&[good(), shrinks]), ["thresholds[1]"]);
        assert_eq!(wrong(&vec![good(); MAX_THRESHOLDS + 1]), ["thresholds"]);
        assert_eq!(wrong(&vec![good(); 10_000]), ["thresholds"]);
    }
}
