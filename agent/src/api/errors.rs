//! What callers are told: `google.rpc.Status` with details (google.rpc.BadRequest, ResourceInfo, ErrorInfo ...), every
//! message saying what was wrong and what to do.

use std::collections::HashMap;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::error_chain;
use crate::store::{Failure, StoreError};

/// The `domain` of `google.rpc.ErrorInfo`.
pub const DOMAIN: &str = "stoker";

/// All that is wrong with a request, gathered before it is refused.
#[derive(Debug, Default)]
pub struct Violations {
    found: Vec<(String, String)>,
}

// === impl Violations ===

impl Violations {
    /// Adds what is wrong with a field; fields are named as in the proto, `function.timeout`.
    pub fn add(&mut self, field: impl Into<String>, problem: impl Into<String>) {
        self.found.push((field.into(), problem.into()));
    }

    /// The problems so far, as `(field, problem)`.
    pub fn found(&self) -> &[(String, String)] {
        &self.found
    }

    /// INVALID_ARGUMENT with every problem in a `google.rpc.BadRequest`, where there is any.
    ///
    /// # Errors
    ///
    /// The status.
    pub fn check(self) -> Result<(), Status> {
        if self.found.is_empty() {
            return Ok(());
        }
        let message = self
            .found
            .iter()
            .map(|(field, problem)| format!("{field}: {problem}"))
            .collect::<Vec<_>>()
            .join("; ");
        let mut details = ErrorDetails::new();
        for (field, problem) in self.found {
            details.add_bad_request_violation(field, problem);
        }
        Err(Status::with_error_details(Code::InvalidArgument, message, details))
    }
}

/// INVALID_ARGUMENT for one field.
pub fn invalid(field: &str, problem: impl Into<String>) -> Status {
    let mut violations = Violations::default();
    violations.add(field, problem);
    match violations.check() {
        Err(status) => status,
        Ok(()) => Status::invalid_argument(field),
    }
}

/// NOT_FOUND for a resource; `kind` as in `function`.
pub fn not_found(kind: &str, name: &str) -> Status {
    about(Code::NotFound, kind, name, format!("there is no {kind} {name}"))
}

/// ALREADY_EXISTS for a resource; `kind` as in `function`.
pub fn already_exists(kind: &str, name: &str) -> Status {
    about(
        Code::AlreadyExists,
        kind,
        name,
        format!("there is a {kind} {name} already; delete it first or choose another name"),
    )
}

/// A status about a resource; `kind` as in `function`.
pub fn about(code: Code, kind: &str, name: &str, message: String) -> Status {
    let details = ErrorDetails::with_resource_info(kind, name, "", message.as_str());
    Status::with_error_details(code, message, details)
}

/// RESOURCE_EXHAUSTED: something is over a limit.
pub fn exhausted(subject: &str, message: impl Into<String>) -> Status {
    let message = message.into();
    let details = ErrorDetails::with_quota_failure_violation(subject, message.as_str());
    Status::with_error_details(Code::ResourceExhausted, message, details)
}

/// RESOURCE_EXHAUSTED for the moment: to be tried again after a while.
pub fn busy(subject: &str, message: impl Into<String>, retry_after: Duration) -> Status {
    let message = message.into();
    let mut details = ErrorDetails::with_quota_failure_violation(subject, message.as_str());
    details.set_retry_info(Some(retry_after));
    Status::with_error_details(Code::ResourceExhausted, message, details)
}

/// PERMISSION_DENIED: not for this caller.
pub fn denied(message: impl Into<String>) -> Status {
    let details = ErrorDetails::with_error_info("NOT_AN_ADMINISTRATOR", DOMAIN, HashMap::new());
    Status::with_error_details(Code::PermissionDenied, message, details)
}

/// FAILED_PRECONDITION: not as things are; `reason` is `google.rpc.ErrorInfo`'s.
pub fn precondition(reason: &str, message: impl Into<String>) -> Status {
    let details = ErrorDetails::with_error_info(reason, DOMAIN, HashMap::new());
    Status::with_error_details(Code::FailedPrecondition, message, details)
}

/// ABORTED: somebody else changed it meanwhile; to be read again, and tried again with what is there then. `reason` is
/// `google.rpc.ErrorInfo`'s.
pub fn aborted(reason: &str, message: impl Into<String>) -> Status {
    let details = ErrorDetails::with_error_info(reason, DOMAIN, HashMap::new());
    Status::with_error_details(Code::Aborted, message, details)
}

/// UNAVAILABLE: something that is needed is not there now; `reason` is `google.rpc.ErrorInfo`'s.
pub fn unavailable(reason: &str, message: impl Into<String>) -> Status {
    let details = ErrorDetails::with_error_info(reason, DOMAIN, HashMap::new());
    Status::with_error_details(Code::Unavailable, message, details)
}

/// The database failed: RESOURCE_EXHAUSTED for a full disk, UNAVAILABLE where another program holds it and trying again may
/// do, FAILED_PRECONDITION where it can't be written, DATA_LOSS where it is damaged, else INTERNAL.
pub fn database(error: &StoreError) -> Status {
    let (code, reason) = match error.failure() {
        Some(Failure::Full) => (Code::ResourceExhausted, "DISK_FULL"),
        Some(Failure::Busy) => (Code::Unavailable, "DATABASE_BUSY"),
        Some(Failure::ReadOnly) => (Code::FailedPrecondition, "DATABASE_READ_ONLY"),
        Some(Failure::Damaged) => (Code::DataLoss, "DATABASE_DAMAGED"),
        Some(Failure::Disk | Failure::Unopenable | Failure::Other) | None => {
            return internal("use its database", error);
        }
    };
    tracing::error!(error = error_chain::whole(error), "a call failed");
    let details = ErrorDetails::with_error_info(reason, DOMAIN, HashMap::new());
    Status::with_error_details(code, error.to_string(), details)
}

/// INTERNAL: the agent's own fault. The caller is told in short, the log has it whole.
pub fn internal(operation: &str, error: &(dyn std::error::Error + 'static)) -> Status {
    tracing::error!(operation, error = error_chain::whole(error), "a call failed");
    let details = ErrorDetails::with_error_info(
        "INTERNAL",
        DOMAIN,
        HashMap::from([("operation".to_owned(), operation.to_owned())]),
    );
    Status::with_error_details(
        Code::Internal,
        format!("the agent failed to {operation}: {error}; its log says more"),
        details,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_violation_is_in_the_details() {
        let mut violations = Violations::default();
        violations.add("a.b", "is wrong");
        violations.add("c", "is missing");
        let status = violations.check().unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(status.message(), "a.b: is wrong; c: is missing");
        let details = status.get_error_details();
        let fields: Vec<_> = details
            .bad_request()
            .unwrap()
            .field_violations
            .iter()
            .map(|violation| violation.field.as_str())
            .collect();
        assert_eq!(fields, ["a.b", "c"]);
        Violations::default().check().unwrap();
    }
}
