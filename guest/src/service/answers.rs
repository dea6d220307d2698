//! What a guest tells, as the agent reads it.

use std::time::Duration;

use stoker_proto::excerpt::Excerpt;
use stoker_proto::guest;
use stoker_proto::guest::{ContainerEnd, FunctionError, Log, function_error};
use stoker_proto::v1::Usage;

use crate::container::{End, Execution, Failure, FailureKind};
use crate::telemetry::Use;

pub(super) fn container_end(id: String, end: &End) -> ContainerEnd {
    ContainerEnd {
        id,
        error: Some(function_error(end.failure.clone())),
        exit_status: None,
    }
}

pub(super) fn function_error(failure: Failure) -> FunctionError {
    use function_error::Kind;
    let kind = match failure.kind {
        FailureKind::Reported => Kind::Reported,
        FailureKind::Exited => Kind::Exited,
        FailureKind::OutOfMemory => Kind::OutOfMemory,
        FailureKind::TimedOut => Kind::TimedOut,
        FailureKind::ResponseTooLarge => Kind::ResponseTooLarge,
        FailureKind::Setup => Kind::Setup,
    };
    FunctionError {
        kind: kind.into(),
        r#type: failure.name,
        message: failure.message,
    }
}

pub(super) fn into_log(written: Excerpt) -> Log {
    let missing_bytes = written.missing();
    Log {
        data: written.into_bytes().into(),
        truncated: missing_bytes > 0,
        missing_bytes,
    }
}

pub(super) fn into_usage(used: Use) -> Usage {
    Usage {
        cpu_ns: used.cpu_ns,
        wait_ns: used.wait_ns,
        memory_bytes: used.memory_bytes,
        memory_peak_bytes: used.memory_peak_bytes,
        measure_time: None,
    }
}

pub(super) fn into_execution(execution: Execution) -> guest::Execution {
    let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    let Execution {
        wall,
        used,
        throttled,
        wait_ns,
    } = execution;
    guest::Execution {
        wall_ns: ns(wall),
        cpu_ns: used.cpu_ns,
        throttled_ns: ns(throttled),
        wait_ns,
        memory_peak_bytes: used.recent_peak_bytes,
    }
}
