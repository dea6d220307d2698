//! What went wrong, as people read it: what it was, each detail on a line, and what to do.

use std::error::Error as _;
use std::fmt;
use std::process::ExitCode;

use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::address::Address;
use crate::error_chain;
use crate::render::plain;

/// Why a command failed.
#[derive(Debug)]
pub enum Failure {
    /// Something on this side: a file, an argument.
    Local(String),
    /// Nobody answers where the agent should be.
    Unreachable {
        /// Where it was looked for.
        address: Address,
        /// The error of the connection.
        source: Box<tonic::transport::Error>,
    },
    /// The agent's answer.
    Refused(Box<Status>),
    /// What was done on this side, without the agent, failed or found something wrong.
    Failed(String),
    /// The function's own error; its answer was printed.
    Function(String),
}

// === impl Failure ===

impl Failure {
    pub(super) fn local(message: impl Into<String>) -> Self {
        Self::Local(message.into())
    }

    pub(super) fn unreachable(address: &Address, source: tonic::transport::Error) -> Self {
        Self::Unreachable {
            address: address.clone(),
            source: Box::new(source),
        }
    }

    /// As listed in the command's help.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Refused(_) | Self::Failed(_) => 1,
            Self::Local(_) => 2,
            Self::Unreachable { .. } => 3,
            Self::Function(_) => 4,
        })
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Self::Refused(Box::new(status))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local(message) | Self::Failed(message) => write!(f, "error: {}", plain(message)),
            Self::Unreachable { address, source } => {
                write!(f, "error: can't reach stokerd at {address}")?;
                let cause = error_chain::innermost(source);
                write!(f, "\n  {cause}")?;
                let hint = match io_kind(source) {
                    Some(std::io::ErrorKind::PermissionDenied) => {
                        "only the socket's owner and group may use it: run as root or join its group"
                    }
                    _ => {
                        "is it running? `systemctl status stokerd`, or start it; name another socket by --socket or STOKER_SOCKET"
                    }
                };
                write!(f, "\nhint: {hint}")
            }
            Self::Refused(status) => refused(f, status),
            Self::Function(kind) => write!(f, "error: the function failed ({})", plain(kind)),
        }
    }
}

fn refused(f: &mut fmt::Formatter<'_>, status: &Status) -> fmt::Result {
    let details = status.get_error_details();
    match details.bad_request() {
        Some(bad) if !bad.field_violations.is_empty() => {
            write!(f, "error: the request is not valid")?;
            for violation in &bad.field_violations {
                write!(f, "\n  {}: {}", violation.field, plain(&violation.description))?;
            }
        }
        _ if status.message().is_empty() => write!(f, "error: {}", status.code())?,
        _ => write!(f, "error: {}", plain(status.message()))?,
    }
    let reason = details.error_info().map_or("", |info| info.reason.as_str());
    let kind = details.resource_info().map_or("", |info| info.resource_type.as_str());
    let hint = match status.code() {
        // The message says what to do.
        _ if reason.starts_with("DATABASE_") || reason.starts_with("DISK_") || reason == "REGISTRY_NOT_ALLOWED" => {
            return Ok(());
        }
        _ if reason == "BOOT_FAILING" => {
            "it is the host's fault, not the function's: mend what the message says; `stoker machine list --ended` shows the \
             machines that failed, the agent's log what else they said"
        }
        _ if reason == "NOT_KEPT" => "see to it that machines.run_dir can be written and has room; then try again",
        _ if reason == "REGISTRY_LOGIN" => {
            "give --username and --password-stdin, if the registry knows you; some say this too of what they do not have"
        }
        _ if reason == "MACHINE_ENDED" => "`stoker machine list --ended` shows why",
        _ if reason == "NOT_LISTENING" => "see that the program listens on that port: `stoker machine logs`",
        _ if reason == "NOT_LAUNCHED" => "`stoker machine list` shows which were launched from an image",
        _ if reason == "GUEST_FAILED" => {
            "see what the machine says of it: `stoker machine show`, `stoker machine logs`"
        }
        _ if reason.starts_with("REGISTRY_") => "see that this host reaches the registry, and try again",
        Code::NotFound if kind == "image" => "`stoker image list` shows what there is",
        Code::NotFound if kind == "registry" => "see that the name is right: REGISTRY/REPOSITORY:TAG",
        Code::NotFound => "`stoker function list` and `stoker machine list --ended` show what there is",
        Code::Unavailable => "the agent is stopping or was just restarted; try again",
        Code::ResourceExhausted if details.quota_failure().is_none() => {
            "the host is full; try again later or with a smaller amount"
        }
        Code::Unimplemented => "this agent is older than this command; update it",
        Code::DeadlineExceeded => "try again; if it stays, look at the agent's log",
        _ => return Ok(()),
    };
    write!(f, "\nhint: {hint}")
}

fn io_kind(error: &tonic::transport::Error) -> Option<std::io::ErrorKind> {
    let mut source = error.source();
    while let Some(error) = source {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            return Some(io.kind());
        }
        source = error.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::errors::{DOMAIN, Violations, not_found};

    #[test]
    fn violations_stand_on_lines_of_their_own() {
        let mut violations = Violations::default();
        violations.add("function.timeout", "901 s is not 1 s to 900 s");
        violations.add("function.name", "is wrong");
        let failure = Failure::from(violations.check().unwrap_err());
        assert_eq!(
            failure.to_string(),
            "error: the request is not valid\n  function.timeout: 901 s is not 1 s to 900 s\n  function.name: is wrong"
        );
    }

    #[test]
    fn what_to_do_fits_why_the_agent_refuses() {
        let hint = |reason: &str| {
            let details = tonic_types::ErrorDetails::with_error_info(reason, DOMAIN, std::collections::HashMap::new());
            Failure::from(Status::with_error_details(Code::Unavailable, "it is so", details)).to_string()
        };
        assert!(hint("DRAINING").contains("the agent is stopping"));
        let booting = hint("BOOT_FAILING");
        assert!(
            booting.contains("the host's fault") && !booting.contains("stopping"),
            "{booting}"
        );
        assert!(hint("NOT_KEPT").contains("machines.run_dir"));
        assert!(!hint("DATABASE_BUSY").contains("hint"));
    }

    #[test]
    fn what_to_do_fits_what_became_of_a_machine() {
        let hint = |reason: &str| Failure::from(crate::api::errors::unavailable(reason, "it is so")).to_string();
        assert!(hint("MACHINE_ENDED").contains("stoker machine list --ended"));
        assert!(hint("NOT_LISTENING").contains("listens on that port"));
        assert!(!hint("MACHINE_ENDED").contains("the agent is stopping"));
    }

    #[test]
    fn what_to_do_fits_what_is_missing() {
        let hint = |kind: &str| Failure::from(not_found(kind, "x")).to_string();
        assert!(hint("image").contains("stoker image list"));
        assert!(hint("registry").contains("REGISTRY/REPOSITORY:TAG"));
        assert!(hint("machine").contains("stoker machine list"));
    }

    #[test]
    fn what_a_guest_says_is_no_order_to_a_terminal() {
        let status = crate::api::errors::unavailable("GUEST_FAILED", "the guest failed: \x1b]0;mine\x07");
        let text = Failure::from(status).to_string();
        assert!(
            text.contains("\\u{1b}]0;mine\\u{7}") && !text.contains('\x1b'),
            "{text}"
        );
    }

    #[test]
    fn what_to_do_is_said() {
        let failure = Failure::from(not_found("function", "accounts/a/functions/b"));
        let text = failure.to_string();
        assert!(
            text.starts_with("error: there is no function accounts/a/functions/b\nhint: "),
            "{text}"
        );
    }
}
