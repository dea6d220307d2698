//! How a machine that was launched is resized and ended: checked as it comes in, and why it could not be.

use std::ops::RangeInclusive;
use std::time::Duration;

use stoker_policy::scale::{ResizeError, SizeChange, SizeError};
use stoker_proto::v1;
use tonic::Status;

use super::launch::{check_size, of_size};
use crate::api::errors::{Violations, aborted, internal, invalid, not_found, precondition, unavailable};
use crate::host::{LaunchedError, ResizeFailure};

/// What is to be changed; what is 0 stays as it is.
pub(super) fn change(given: Option<v1::MachineSize>) -> Result<SizeChange, Status> {
    let given = given.unwrap_or_default();
    let mut violations = Violations::default();
    check_size("size", given, &mut violations);
    violations.check()?;
    let part = |value: u32| Some(value).filter(|value| *value > 0);
    let change = SizeChange {
        vcpus: part(given.vcpus),
        cpu_millis: part(given.cpu_millis),
        memory_mib: part(given.memory_mib),
    };
    match change == SizeChange::default() {
        true => Err(invalid("size", "must have `vcpus`, `cpu_millis` or `memory_mib`")),
        false => Ok(change),
    }
}

/// A time within a range, or what it is where none is given.
pub(super) fn time(
    field: &str,
    given: Option<prost_types::Duration>,
    default: Duration,
    range: RangeInclusive<Duration>,
) -> Result<Duration, Status> {
    let Some(given) = given else { return Ok(default) };
    let time = Duration::try_from(given).ok().filter(|time| range.contains(time));
    time.ok_or_else(|| {
        let [least, most] = [range.start(), range.end()].map(|time| humantime::format_duration(*time));
        invalid(field, format!("must be {least} to {most}"))
    })
}

/// Why a machine was not resized.
pub(super) fn not_resized(name: &str, error: ResizeFailure) -> Status {
    let message = error.to_string();
    match error {
        ResizeFailure::Gone => unavailable("DRAINING", message),
        ResizeFailure::Ended(_) => precondition("MACHINE_ENDED", message),
        ResizeFailure::Refused(ResizeError::Unknown) => not_found("launched machine", name),
        ResizeFailure::Refused(ResizeError::State) => precondition("MACHINE_NOT_READY", message),
        ResizeFailure::Refused(ResizeError::Size(
            size @ (SizeError::Nothing(_) | SizeError::Share { .. } | SizeError::Blocks(_)),
        )) => invalid(of_size(&size), message),
        ResizeFailure::Refused(ResizeError::Size(_) | ResizeError::Obstacle { .. }) => {
            precondition("SIZE_IN_THE_WAY", message)
        }
    }
}

/// Why something else was not done with a machine.
pub(super) fn not_done(name: &str, error: LaunchedError) -> Status {
    let message = error.to_string();
    match error {
        LaunchedError::Unknown => not_found("launched machine", name),
        LaunchedError::Starting | LaunchedError::Ending => precondition("MACHINE_NOT_READY", message),
        LaunchedError::Changed => aborted("THRESHOLDS_CHANGED", message),
        LaunchedError::Ended(_) => precondition("MACHINE_ENDED", message),
        LaunchedError::Failed => internal("change a machine", &error),
    }
}

#[cfg(test)]
mod tests {
    use stoker_policy::scale::{Obstacle, Resource};
    use tonic::Code;

    use super::*;

    #[test]
    fn what_is_0_stays_as_it_is() {
        let size = |vcpus, cpu_millis, memory_mib| {
            change(Some(v1::MachineSize {
                vcpus,
                cpu_millis,
                memory_mib,
            }))
        };
        let memory = SizeChange {
            memory_mib: Some(1024),
            ..Default::default()
        };
        assert_eq!(size(0, 0, 1024).unwrap(), memory);
        for wrong in [
            size(0, 0, 0),
            size(65, 0, 0),
            size(0, 99, 0),
            size(0, 0, 1023),
            change(None),
        ] {
            assert_eq!(wrong.unwrap_err().code(), Code::InvalidArgument);
        }
    }

    #[test]
    fn times_have_ranges() {
        let of = |seconds| {
            let given = Some(prost_types::Duration { seconds, nanos: 0 });
            time(
                "timeout",
                given,
                Duration::from_secs(10),
                Duration::ZERO..=Duration::from_secs(60),
            )
        };
        assert_eq!(of(0).unwrap(), Duration::ZERO);
        assert_eq!(of(60).unwrap(), Duration::from_secs(60));
        for wrong in [-1, 61, i64::MAX] {
            let refused = of(wrong).unwrap_err();
            assert_eq!(refused.message(), "timeout: must be 0s to 1m", "{wrong}");
        }
    }

    #[test]
    fn what_stands_in_the_way_is_a_precondition() {
        let refused = |error: ResizeError| not_resized("machines/01J", error.into());
        let obstacle = ResizeError::Obstacle {
            resource: Resource::Memory,
            wanted: 256,
            obstacle: Obstacle::Used(400),
        };
        let status = refused(obstacle);
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert!(status.message().contains("what it uses needs 400 MiB"), "{status:?}");
        let above = SizeError::AboveCeiling {
            resource: Resource::Vcpus,
            amount: 8,
            most: 4,
        };
        assert_eq!(refused(above.into()).code(), Code::FailedPrecondition);
        assert_eq!(refused(SizeError::Blocks(3).into()).code(), Code::InvalidArgument);
        assert_eq!(refused(ResizeError::Unknown).code(), Code::NotFound);
        assert_eq!(not_done("machines/01J", LaunchedError::Unknown).code(), Code::NotFound);
        assert_eq!(
            not_done("machines/01J", LaunchedError::Ending).code(),
            Code::FailedPrecondition
        );
    }
}
