//! What may be asked of a guest.

use std::ops::RangeInclusive;
use std::time::Duration;

use stoker_proto::guest::CreateContainerRequest;
use stoker_proto::limits::{self, CPU_MILLIS, MEMORY_MIB, SCRATCH_MIB};
use stoker_proto::runtimes;
use stoker_proto::v1::Amount;
use tonic::Status;

use crate::container::{Function, Runtime};

pub(super) const WATCH_INTERVALS: RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_secs(3600);

pub(super) fn function(request: CreateContainerRequest) -> Result<Function, Status> {
    let runtime = runtime(&request.runtime)?;
    for (name, value) in &request.environment {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(Status::invalid_argument(format!(
                "{name:?} cannot be an environment variable"
            )));
        }
    }
    if request.handler.contains('\0') || request.function_name.contains('\0') {
        return Err(Status::invalid_argument(
            "there is a zero byte in the name or handler of the function",
        ));
    }
    if request.layers_sha256.len() > limits::LAYERS {
        let message = format!("`layers_sha256` is to be at most {} layers", limits::LAYERS);
        return Err(Status::invalid_argument(message));
    }
    Ok(Function {
        name: request.function_name,
        account: identifier("account", request.account)?,
        runtime,
        handler: request.handler,
        environment: request.environment.into_iter().collect(),
        amount: amount(request.amount)?,
        init_timeout: duration("init_timeout", request.init_timeout)?,
        freeze: request.freeze.unwrap_or(true),
    })
}

pub(super) fn runtime(name: &str) -> Result<Runtime, Status> {
    name.parse()
        .map_err(|()| Status::invalid_argument(format!("no runtime {name:?}: there are {}", runtimes::ALL.join(", "))))
}

pub(super) fn amount(amount: Option<Amount>) -> Result<Amount, Status> {
    match amount {
        Some(amount) if CPU_MILLIS.contains(&amount.cpu_millis) && MEMORY_MIB.contains(&amount.memory_mib) => {
            Ok(amount)
        }
        _ => Err(Status::invalid_argument(
            "`amount` is to be 10 to 64000 mCPU and 16 to 1048576 MiB",
        )),
    }
}

/// What `/tmp` is to hold.
pub(super) fn tmp_mib(mib: u32) -> Result<u32, Status> {
    match mib {
        0 => Ok(*SCRATCH_MIB.start()),
        mib if SCRATCH_MIB.contains(&mib) => Ok(mib),
        _ => Err(Status::invalid_argument("`scratch_mib` is to be 512 to 10240 MiB")),
    }
}

pub(super) fn at_most(limit: usize, what: &str, bytes: usize) -> Result<(), Status> {
    if bytes > limit {
        let message = format!("{what} has {bytes} bytes; at most {limit} are taken");
        return Err(Status::invalid_argument(message));
    }
    Ok(())
}

/// Ids become names of cgroups and HTTP headers.
pub(super) fn identifier(field: &'static str, id: String) -> Result<String, Status> {
    let allowed = |c: u8| c.is_ascii_alphanumeric() || c == b'-' || c == b'_';
    if id.is_empty() || id.len() > 64 || !id.bytes().all(allowed) {
        return Err(Status::invalid_argument(format!(
            "`{field}` is to be 1 to 64 letters, digits, `-` and `_`"
        )));
    }
    Ok(id)
}

pub(super) fn duration(field: &'static str, duration: Option<prost_types::Duration>) -> Result<Duration, Status> {
    duration
        .and_then(|duration| Duration::try_from(duration).ok())
        .filter(|duration| !duration.is_zero() && *duration <= limits::TIMEOUT.max(*WATCH_INTERVALS.end()))
        .ok_or_else(|| Status::invalid_argument(format!("`{field}` is to be a time above 0 and up to 1 h")))
}
