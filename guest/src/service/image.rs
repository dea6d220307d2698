//! What the agent asks of the image that the machine was launched from.

use std::time::Duration;

use stoker_linux::users::User;
use stoker_proto::guest::{
    ContainerEnd, ContainerUse, RunImageRequest, RunImageResponse, StopImageRequest, StopImageResponse,
};
use stoker_proto::limits::{LONGEST_STOP_GRACE, PROGRAM_BYTES, STOP_GRACE, program_bytes};
use tokio::sync::oneshot;
use tonic::Status;

use super::answers::{function_error, into_usage};
use super::checks::{at_most, identifier};
use crate::container::Workload;
use crate::container::workload::{Ended, NotRunning, Program, RunError};

/// Linux's.
const SIGNALS: std::ops::RangeInclusive<i32> = 1..=64;
/// The longest host name (`HOST_NAME_MAX` of limits.h).
const HOSTNAME_BYTES: usize = 64;

/// Runs the image. Its caller has `here` as long as it waits.
pub(super) async fn run(
    workload: &Workload,
    request: RunImageRequest,
    here: oneshot::Sender<()>,
) -> Result<RunImageResponse, Status> {
    let program = program(request)?;
    match workload.run(program, || here.is_closed()).await {
        Ok(()) => Ok(RunImageResponse { error: None }),
        Err(RunError::Failed(failure)) => Ok(RunImageResponse {
            error: Some(function_error(failure)),
        }),
        Err(error @ RunError::NoImage) => Err(Status::failed_precondition(error.to_string())),
        Err(error @ RunError::Again(_)) => Err(Status::already_exists(error.to_string())),
    }
}

pub(super) async fn stop(workload: &Workload, request: StopImageRequest) -> Result<StopImageResponse, Status> {
    let signal = signal(request.signal)?;
    let grace = grace(request.grace)?;
    workload
        .stop(signal, grace)
        .await
        .map_err(|error| not_running(&error))?;
    Ok(StopImageResponse {})
}

/// What it has used, while it runs.
pub(super) fn used(workload: &Workload) -> Option<ContainerUse> {
    let (id, used) = workload.used()?;
    Some(ContainerUse {
        id,
        usage: Some(into_usage(used)),
    })
}

pub(super) fn end(ended: &Ended) -> ContainerEnd {
    ContainerEnd {
        id: ended.id.clone(),
        error: Some(function_error(ended.failure.clone())),
        exit_status: ended.exit_status,
    }
}

pub(super) fn not_running(error: &NotRunning) -> Status {
    Status::failed_precondition(error.to_string())
}

/// A signal that can be sent.
pub(super) fn signal(number: i32) -> Result<i32, Status> {
    if SIGNALS.contains(&number) {
        Ok(number)
    } else {
        Err(Status::invalid_argument("`signal` is to be 1 to 64"))
    }
}

fn grace(grace: Option<prost_types::Duration>) -> Result<Duration, Status> {
    let grace = match grace {
        Some(grace) => Duration::try_from(grace).ok(),
        None => Some(STOP_GRACE),
    };
    grace
        .filter(|grace| *grace <= LONGEST_STOP_GRACE)
        .ok_or_else(|| Status::invalid_argument("`grace` is to be a time up to 10 min"))
}

fn program(request: RunImageRequest) -> Result<Program, Status> {
    command(&request.command)?;
    let of_environment = request.environment.iter();
    if let Some(wrong) = of_environment
        .clone()
        .find(|variable| variable.find('=').is_none_or(|at| at == 0))
    {
        return Err(Status::invalid_argument(format!(
            "{wrong:?} is not an environment variable"
        )));
    }
    working_dir(&request.working_dir)?;
    let others = [&request.working_dir, &request.home, &request.hostname];
    texts(request.command.iter().chain(of_environment).chain(others))?;
    if request.hostname.is_empty() || request.hostname.len() > HOSTNAME_BYTES {
        return Err(Status::invalid_argument("`hostname` is to have 1 to 64 bytes"));
    }
    // The kernel takes the highest number for "leave it as it is".
    let ids = [request.uid, request.gid];
    if ids.iter().chain(&request.groups).any(|id| *id == u32::MAX) {
        return Err(Status::invalid_argument("4294967295 is no user and no group"));
    }
    Ok(Program {
        id: identifier("id", request.id)?,
        command: request.command,
        environment: request.environment,
        working_dir: request.working_dir,
        user: User {
            uid: request.uid,
            gid: request.gid,
            groups: request.groups,
            home: request.home,
        },
        hostname: request.hostname,
    })
}

pub(super) fn command(command: &[String]) -> Result<(), Status> {
    if command.first().is_none_or(String::is_empty) {
        return Err(Status::invalid_argument("`command` names no program"));
    }
    Ok(())
}

pub(super) fn working_dir(folder: &str) -> Result<(), Status> {
    if folder.starts_with('/') {
        Ok(())
    } else {
        Err(Status::invalid_argument("`working_dir` is to be an absolute path"))
    }
}

/// Texts that a program is to be given.
pub(super) fn texts<'a>(mut texts: impl Iterator<Item = &'a String> + Clone) -> Result<(), Status> {
    let bytes = program_bytes(texts.clone().map(String::as_str));
    at_most(PROGRAM_BYTES, "what the program is given", bytes)?;
    match texts.find(|text| text.contains('\0')) {
        Some(wrong) => Err(Status::invalid_argument(format!("{wrong:?} has a zero byte in it"))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> RunImageRequest {
        RunImageRequest {
            id: "01J".to_owned(),
            command: vec!["nginx".to_owned(), String::new()],
            environment: vec!["A=b=c".to_owned(), "E=".to_owned()],
            working_dir: "/srv".to_owned(),
            uid: 101,
            gid: 102,
            groups: vec![4],
            home: "/".to_owned(),
            hostname: "web-1".to_owned(),
        }
    }

    fn refused(change: impl FnOnce(&mut RunImageRequest)) -> String {
        let mut request = request();
        change(&mut request);
        program(request).unwrap_err().message().to_owned()
    }

    #[test]
    fn what_cannot_be_run_is_refused() {
        let whole = program(request()).unwrap();
        assert_eq!(
            (whole.user.uid, whole.user.groups, whole.command.len()),
            (101, vec![4], 2)
        );
        assert!(refused(|request| request.command.clear()).contains("command"));
        assert!(refused(|request| request.command = vec![String::new()]).contains("command"));
        for variable in ["A", "=b", ""] {
            assert!(refused(|request| request.environment = vec![variable.to_owned()]).contains("environment"));
        }
        assert!(refused(|request| request.working_dir = "srv".to_owned()).contains("working_dir"));
        assert!(refused(|request| request.working_dir.clear()).contains("working_dir"));
        assert!(refused(|request| request.command.push("a\0".to_owned())).contains("zero byte"));
        assert!(refused(|request| request.home = "\0".to_owned()).contains("zero byte"));
        assert!(refused(|request| request.id = "../x".to_owned()).contains("id"));
        assert!(refused(|request| request.hostname.clear()).contains("hostname"));
        assert!(refused(|request| request.hostname = "x".repeat(65)).contains("hostname"));
        assert!(refused(|request| request.groups.push(u32::MAX)).contains("4294967295"));
        assert!(refused(|request| request.uid = u32::MAX).contains("4294967295"));
        assert!(refused(|request| request.command.push("x".repeat(PROGRAM_BYTES))).contains("at most"));
    }

    #[test]
    fn it_has_ten_seconds_to_end_by_default() {
        assert_eq!(grace(None).unwrap(), Duration::from_secs(10));
        let of = |seconds, nanos| grace(Some(prost_types::Duration { seconds, nanos }));
        assert_eq!(of(0, 0).unwrap(), Duration::ZERO);
        assert_eq!(of(600, 0).unwrap(), LONGEST_STOP_GRACE);
        assert!(of(600, 1).is_err() && of(-1, 0).is_err());
        for wrong in [0, -1, 65] {
            assert!(signal(wrong).is_err());
        }
        assert_eq!([signal(1).unwrap(), signal(64).unwrap()], [1, 64]);
    }
}
