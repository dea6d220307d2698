//! The `Invocations` service.

use bytes::Bytes;
use stoker_proto::v1;
use stoker_proto::v1::invocations_server;
use tonic::{Code, Request, Response, Status};
use tonic_types::{ErrorDetails, StatusExt as _};
use ulid::Ulid;

use super::errors::{DOMAIN, Violations, exhausted, invalid, not_found};
use super::validate;
use crate::catalog::{Catalog, CatalogError};
use crate::config::Limits;
use crate::names::{FunctionName, NameError};
use crate::pool::{InvokeError, InvokeParams, Pool};

/// The most characters of a request id.
const MAX_REQUEST_ID: usize = 64;

/// Runs functions.
pub struct Invocations {
    catalog: Catalog,
    pool: Pool,
    payload_limit: usize,
}

// === impl Invocations ===

impl Invocations {
    /// A service over these functions and machines.
    pub fn new(catalog: Catalog, pool: Pool, limits: &Limits) -> Self {
        let payload_limit = usize::try_from(limits.payload_kib)
            .unwrap_or(usize::MAX)
            .saturating_mul(1024);
        Self {
            catalog,
            pool,
            payload_limit,
        }
    }

    fn check(&self, request: v1::InvokeRequest) -> Result<(FunctionName, InvokeParams), Status> {
        let mut violations = Violations::default();
        let name = request.name.parse();
        let name = name
            .map_err(|error: NameError| violations.add("name", error.to_string()))
            .ok();
        if let Some(amount) = request.amount {
            validate::amount("amount", amount, self.pool.capacity(), &mut violations);
        }
        let id = request.request_id;
        if id.len() > MAX_REQUEST_ID || !id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
            violations.add(
                "request_id",
                format!("must be at most {MAX_REQUEST_ID} of a-z, A-Z, 0-9 and `-`"),
            );
        }
        let payload = match request.payload {
            payload if payload.len() > self.payload_limit => {
                let (has, limit) = (payload.len(), self.payload_limit);
                violations.add(
                    "payload",
                    format!("has {has} bytes, at most {limit} are allowed; pass a reference to it"),
                );
                payload
            }
            // As Lambda's own clients send it where there is nothing to say.
            payload if payload.is_empty() => Bytes::from_static(b"{}"),
            payload => {
                if let Err(problem) = check_json(&payload) {
                    violations.add("payload", format!("is not JSON: {problem}"));
                }
                payload
            }
        };
        violations.check()?;
        let name = name.ok_or_else(|| invalid("name", "is missing"))?;
        let request_id = if id.is_empty() { uuid() } else { id };
        Ok((
            name,
            InvokeParams {
                payload,
                amount: request.amount,
                request_id,
            },
        ))
    }
}

#[tonic::async_trait]
impl invocations_server::Invocations for Invocations {
    async fn invoke(&self, request: Request<v1::InvokeRequest>) -> Result<Response<v1::InvokeResponse>, Status> {
        let (name, params) = self.check(request.into_inner())?;
        let function = self
            .catalog
            .get(&name)
            .ok_or_else(|| CatalogError::NotFound(name.clone()))?;
        match self.pool.invoke(function, params).await {
            Ok(response) => Ok(Response::new(response)),
            Err(error) => Err(status(&error, &name)),
        }
    }
}

/// Whether it is JSON, which is UTF-8 (RFC 8259, 8.1); of strings that it ignores `serde_json` does not ask that.
fn check_json(payload: &[u8]) -> Result<(), String> {
    let text = std::str::from_utf8(payload).map_err(|error| error.to_string())?;
    let parsed = serde_json::from_str::<serde::de::IgnoredAny>(text);
    parsed.map(drop).map_err(|error| error.to_string())
}

fn status(error: &InvokeError, function: &FunctionName) -> Status {
    let message = error.to_string();
    let with = |code, reason: &str| {
        let details = ErrorDetails::with_error_info(reason, DOMAIN, std::collections::HashMap::new());
        Status::with_error_details(code, message.clone(), details)
    };
    match error {
        InvokeError::QueueFull { .. } | InvokeError::QueueTimeout { .. } => exhausted("machines", message),
        InvokeError::PayloadsFull { .. } => exhausted("payloads", message),
        InvokeError::TooLarge { .. } => invalid("amount", message),
        InvokeError::BootFailing { .. } => with(Code::Unavailable, "BOOT_FAILING"),
        InvokeError::Draining => with(Code::Unavailable, "DRAINING"),
        // Not UNAVAILABLE, which clients try again by themselves: it may have run.
        InvokeError::MachineLost { .. } => with(Code::Aborted, "MACHINE_LOST"),
        InvokeError::Container { .. } => with(Code::Internal, "CONTAINER"),
        InvokeError::FunctionDeleted => not_found("function", &function.to_string()),
        InvokeError::Cancelled => with(Code::Cancelled, "CANCELLED"),
    }
}

/// A UUID of version 7 (RFC 9562): like a ULID it is a time in ms and randomness, with six bits that say so.
fn uuid() -> String {
    let bits = Ulid::generate().0;
    let bits = bits & !(0xf << 76) | (0x7 << 76);
    let bits = bits & !(0x3 << 62) | (0x2 << 62);
    let hex = format!("{bits:032x}");
    let part = |from: usize, to: usize| hex.get(from..to).unwrap_or_default();
    format!(
        "{}-{}-{}-{}-{}",
        part(0, 8),
        part(8, 12),
        part(12, 16),
        part(16, 20),
        part(20, 32)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_ids_are_uuids() {
        let id = uuid();
        assert_ne!(id, uuid());
        let parts: Vec<_> = id.split('-').map(str::len).collect();
        assert_eq!(parts, [8, 4, 4, 4, 12], "{id}");
        assert!(
            id.as_bytes()[14] == b'7' && b"89ab".contains(&id.as_bytes()[19]),
            "{id}"
        );
    }

    #[test]
    fn payloads_are_json_in_utf8() {
        assert!(check_json("{\"a\": [1, \"ä\"]}".as_bytes()).is_ok());
        assert!(check_json(b"\"\xff\"").is_err());
        assert!(check_json(b"{").is_err());
    }

    #[test]
    fn every_error_has_its_code() {
        let name = "accounts/a/functions/f".parse().unwrap();
        for (error, code) in [
            (InvokeError::QueueFull { queue: 1, boot: None }, Code::ResourceExhausted),
            (InvokeError::MachineLost { detail: "x".into() }, Code::Aborted),
            (InvokeError::FunctionDeleted, Code::NotFound),
            (InvokeError::Draining, Code::Unavailable),
        ] {
            assert_eq!(status(&error, &name).code(), code, "{error}");
        }
    }
}
