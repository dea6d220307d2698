//! The `Invocations` service.

use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use stoker_proto::v1;
use stoker_proto::v1::invocations_server;
use stoker_proto::v1::invoke_with_response_stream_response::Event;
use tokio::sync::mpsc;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Code, Request, Response, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use super::errors::{DOMAIN, Violations, exhausted, invalid, not_found};
use super::response_stream::ResponseStream;
use super::validate;
use crate::catalog::{Catalog, CatalogError, Function};
use crate::host::{HostHandle, InvokeError, InvokeParams, MemoryFull, Share};
use crate::names::{FunctionName, NameError};
use crate::pacing::{Pace, Undecided};

/// The most characters of a request id.
const MAX_REQUEST_ID: usize = 64;

/// Runs functions.
pub struct Invocations {
    catalog: Catalog,
    host: HostHandle,
}

// === impl Invocations ===

impl Invocations {
    /// A service over these functions and machines. To be served within a [`Counted`](super::held::Counted), so that its
    /// messages are counted.
    pub fn new(catalog: Catalog, host: HostHandle) -> Self {
        Self { catalog, host }
    }

    fn check(
        &self,
        request: v1::InvokeRequest,
        share: Share,
        undecided: Option<Undecided>,
        parts: Option<mpsc::Sender<Event>>,
    ) -> Result<(FunctionName, InvokeParams), Status> {
        let mut violations = Violations::default();
        let name = request.name.parse();
        let name = name
            .map_err(|error: NameError| violations.add("name", error.to_string()))
            .ok();
        if let Some(amount) = request.amount {
            validate::amount("amount", amount, self.host.largest_amount(), &mut violations);
        }
        let id = request.request_id;
        if !is_request_id(&id) {
            violations.add(
                "request_id",
                format!("must be at most {MAX_REQUEST_ID} of a-z, A-Z, 0-9 and `-`"),
            );
        }
        let limit_kib = self.catalog.limits().payload_kib;
        let limit = usize::try_from(limit_kib).unwrap_or(usize::MAX).saturating_mul(1024);
        let payload = match request.payload {
            payload if payload.len() > limit => {
                let has = payload.len();
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
        Ok((
            name,
            InvokeParams {
                payload,
                amount: request.amount,
                request_id: id,
                share,
                undecided,
                parts,
            },
        ))
    }

    /// What an invocation is given, and its function. One that is not let in is counted.
    fn take(
        &self,
        request: Request<v1::InvokeRequest>,
        parts: Option<mpsc::Sender<Event>>,
    ) -> Result<(FunctionName, Arc<Function>, InvokeParams), Status> {
        let taken = self.look_up(request, parts);
        taken.inspect_err(|status| self.host.counts().not_let_in(status.code()))
    }

    fn look_up(
        &self,
        request: Request<v1::InvokeRequest>,
        parts: Option<mpsc::Sender<Event>>,
    ) -> Result<(FunctionName, Arc<Function>, InvokeParams), Status> {
        let share = request.extensions().get::<Share>().cloned();
        let share = match share {
            Some(share) => share,
            // Served without being counted on its way: counted from here.
            None => counted(self.host.memory().share(), request.get_ref().payload.len())?,
        };
        let undecided = request.extensions().get::<Pace>().map(Pace::begin);
        let (name, params) = self.check(request.into_inner(), share, undecided, parts)?;
        let function = self
            .catalog
            .get(&name)
            .ok_or_else(|| CatalogError::NotFound(name.clone()))?;
        Ok((name, function, params))
    }
}

#[tonic::async_trait]
impl invocations_server::Invocations for Invocations {
    async fn invoke(&self, request: Request<v1::InvokeRequest>) -> Result<Response<v1::InvokeResponse>, Status> {
        let (name, function, params) = self.take(request, None)?;
        match self.host.invoke(function, params).await {
            Ok(response) => Ok(Response::new(response)),
            Err(error) => Err(status(&error, &name)),
        }
    }

    type InvokeWithResponseStreamStream =
        Pin<Box<dyn Stream<Item = Result<v1::InvokeWithResponseStreamResponse, Status>> + Send>>;

    async fn invoke_with_response_stream(
        &self,
        request: Request<v1::InvokeRequest>,
    ) -> Result<Response<Self::InvokeWithResponseStreamStream>, Status> {
        let (to, parts) = mpsc::channel(1);
        let (name, function, params) = self.take(request, Some(to))?;
        let host = self.host.clone();
        let invoking = async move { host.invoke(function, params).await };
        let mut events = ResponseStream::new(invoking, parts).map(move |event| match event {
            Ok(event) => Ok(v1::InvokeWithResponseStreamResponse { event: Some(event) }),
            Err(error) => Err(status(&error, &name)),
        });
        // What is refused is no stream.
        let first = events.next().await.transpose()?;
        let first = tokio_stream::iter(first.map(Ok));
        Ok(Response::new(Box::pin(first.chain(events))))
    }
}

fn counted(share: Share, bytes: usize) -> Result<Share, Status> {
    match share.add(bytes) {
        Ok(()) => Ok(share),
        Err(full) => Err(exhausted("host", full.to_string())),
    }
}

/// Whether it is an id that a caller may give, or none.
pub(super) fn is_request_id(id: &str) -> bool {
    id.len() <= MAX_REQUEST_ID && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
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
    let account = || format!("accounts/{}", function.account());
    match error {
        InvokeError::QueueFull { .. } | InvokeError::QueueTimeout { .. } => exhausted("host", message),
        InvokeError::AccountQueueFull { .. } => exhausted(&account(), message),
        InvokeError::MemoryFull(MemoryFull::Host { .. }) => exhausted("host", message),
        InvokeError::MemoryFull(MemoryFull::Account { .. }) => exhausted(&account(), message),
        InvokeError::TooLarge { .. } => invalid("amount", message),
        InvokeError::BootFailing { .. } => with(Code::Unavailable, "BOOT_FAILING"),
        InvokeError::Draining => with(Code::Unavailable, "DRAINING"),
        // Not UNAVAILABLE, which clients try again by themselves: it may have run.
        InvokeError::MachineLost { .. } => with(Code::Aborted, "MACHINE_LOST"),
        InvokeError::Streamed => with(Code::Aborted, "STREAMED"),
        InvokeError::Container { .. } => with(Code::Internal, "CONTAINER"),
        InvokeError::RequestReused => invalid("request_id", message),
        InvokeError::NotKept { .. } => with(Code::Unavailable, "NOT_KEPT"),
        InvokeError::FunctionDeleted => not_found("function", &function.to_string()),
        InvokeError::CallerLeft => with(Code::Cancelled, "CANCELLED"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            (
                InvokeError::QueueFull { waiting: 1, boot: None },
                Code::ResourceExhausted,
            ),
            (
                InvokeError::AccountQueueFull { limit: 1, boot: None },
                Code::ResourceExhausted,
            ),
            (InvokeError::MachineLost { detail: "x".into() }, Code::Aborted),
            (InvokeError::Streamed, Code::Aborted),
            (InvokeError::FunctionDeleted, Code::NotFound),
            (InvokeError::Draining, Code::Unavailable),
        ] {
            assert_eq!(status(&error, &name).code(), code, "{error}");
        }
    }

    #[test]
    fn who_has_no_room_is_named() {
        let name = "accounts/acme/functions/f".parse().unwrap();
        for (error, subject) in [
            (InvokeError::QueueFull { waiting: 1, boot: None }, "host"),
            (InvokeError::AccountQueueFull { limit: 1, boot: None }, "accounts/acme"),
            (MemoryFull::Host { limit: 1 }.into(), "host"),
            (MemoryFull::Account { limit: 1 }.into(), "accounts/acme"),
        ] {
            let details = status(&error, &name).get_error_details();
            let violations = &details.quota_failure().unwrap().violations;
            assert_eq!(violations[0].subject, subject, "{error}");
        }
    }
}
