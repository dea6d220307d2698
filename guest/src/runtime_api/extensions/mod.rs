//! The Extensions API (AWS Lambda Developer Guide, "Using the Lambda Extensions API to create extensions"; version
//! 2020-01-01), for *internal* extensions, threads and processes that the runtime starts, and *external* ones, programs in
//! `/opt/extensions`, which run before it.

mod registry;

use std::sync::Arc;

use bytes::Bytes;
use hyper::StatusCode;
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use serde::{Deserialize, Serialize};
use serde_json::json;

pub(super) use registry::{Event, Registry};
use registry::{Refused, Report};

use super::body::{self, Read, RequestBody};
use super::headers::{EXTENSION_ERROR_TYPE, EXTENSION_EVENT, EXTENSION_FEATURES, EXTENSION_ID, EXTENSION_NAME, text};
use super::peer::Peer;
use super::reply::{self, Reply};
use super::session::Invocation;
use super::{ExtensionFailure, RuntimeApi, telemetry};

/// The largest body that an extension may send, in bytes.
const BODY_BYTES: usize = 64 << 10;
/// What is passed on of an extension's own words on its failure, in characters.
const MESSAGE_CHARS: usize = 1024;

/// The body of a registration.
#[derive(Default, Deserialize)]
struct Registration {
    #[serde(default)]
    events: Vec<Event>,
}

/// What one that registered is told.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Registered<'a> {
    function_name: &'a str,
    function_version: &'a str,
    handler: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    account_id: Option<&'a String>,
}

/// An error as extensions report it.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Reported {
    error_message: String,
}

/// Takes an extension in.
pub(super) async fn register(api: &RuntimeApi, headers: &HeaderMap, body: RequestBody) -> Reply {
    let Read::Whole { bytes, .. } = body::read(body, BODY_BYTES).await else {
        return reply::truncated();
    };
    let registered = serde_json::from_slice::<Registration>(&bytes)
        .map_err(|error| Refused::new("InvalidRequestFormat", error.to_string()))
        .and_then(|registration| {
            let id = new_id().map_err(|error| Refused::new("InternalServerError", error.to_string()))?;
            let name = text(headers, EXTENSION_NAME);
            let mut state = api.state();
            state.extensions.register(id.clone(), name, &registration.events)?;
            Ok(id)
        });
    // The runtime is started when all have.
    api.0.news.notify_waiters();
    match registered {
        Ok(id) => {
            let function = &api.0.identity;
            let mut features = text(headers, EXTENSION_FEATURES).split(',');
            let told = Registered {
                function_name: &function.name,
                function_version: &function.version,
                handler: &function.handler,
                account_id: features
                    .any(|feature| feature.trim() == "accountId")
                    .then_some(&function.account),
            };
            let told = serde_json::to_vec(&told).unwrap_or_default();
            with(EXTENSION_ID, &id, reply::json(StatusCode::OK, told.into()))
        }
        Err(refused) => refuse(refused),
    }
}

/// Waits for an extension's next event.
pub(super) async fn next(api: &RuntimeApi, peer: &Arc<Peer>, headers: &HeaderMap) -> Reply {
    let asked = identifier(headers).and_then(|id| {
        let event = api.state().extensions.ask(id)?;
        Ok((id, event))
    });
    let (id, event) = match asked {
        Ok(asked) => asked,
        Err(refused) => return refuse(refused),
    };
    api.note_ready();
    let event = match event {
        Some(event) => Some(event),
        None => {
            let waiting = api.wait(
                peer,
                |state| state.extensions.line(id),
                |state| state.extensions.take(id),
            );
            waiting.await
        }
    };
    match (event, new_id()) {
        (Some(event), Ok(number)) => with(EXTENSION_EVENT, &number, reply::json(StatusCode::OK, event)),
        (Some(event), Err(_)) => reply::json(StatusCode::OK, event),
        (None, _) => refuse(Refused::new(
            "Extension.InvalidExtensionState",
            "another request of this extension waits in place of this one",
        )),
    }
}

/// Takes the report of an extension that could not initialise.
pub(super) async fn init_error(api: &RuntimeApi, headers: &HeaderMap, body: RequestBody) -> Reply {
    failed(api, Report::Init, headers, body).await
}

/// Takes the report of an extension that has to end.
pub(super) async fn exit_error(api: &RuntimeApi, headers: &HeaderMap, body: RequestBody) -> Reply {
    failed(api, Report::Exit, headers, body).await
}

async fn failed(api: &RuntimeApi, report: Report, headers: &HeaderMap, body: RequestBody) -> Reply {
    let kind = text(headers, EXTENSION_ERROR_TYPE);
    if kind.is_empty() {
        let message = "Lambda-Extension-Function-Error-Type not found";
        return refuse(Refused::new("Extension.MissingHeader", message));
    }
    // Its own words are welcome; the report counts without them.
    let reported = match body::read(body, BODY_BYTES).await {
        Read::Whole { bytes, .. } => serde_json::from_slice::<Reported>(&bytes).unwrap_or_default(),
        Read::TooLarge | Read::BrokenOff => Reported::default(),
    };
    let failed = identifier(headers).and_then(|id| api.state().extensions.fail(id, report));
    match failed {
        Ok(None) => reply::accepted(),
        Ok(Some(name)) => {
            let words: String = reported.error_message.chars().take(MESSAGE_CHARS).collect();
            api.extension_has_failed(ExtensionFailure {
                kind: report.kind(),
                message: format!("The extension {name} failed: {kind} {words}")
                    .trim_end()
                    .to_owned(),
            });
            reply::accepted()
        }
        Err(refused) => refuse(refused),
    }
}

/// What extensions are told of an invocation.
pub(super) fn invoke_event(invocation: &Invocation, arn: &str) -> Bytes {
    let event = json!({
        "eventType": "INVOKE",
        "deadlineMs": invocation.deadline_ms,
        "requestId": invocation.id,
        "invokedFunctionArn": arn,
        "tracing": { "type": "X-Amzn-Trace-Id", "value": invocation.trace_id() },
    });
    event.to_string().into()
}

/// What external extensions are told when their container ends: why, in Lambda's words, and by when.
pub(super) fn shutdown_event(reason: &str, deadline_ms: u64) -> Bytes {
    let event = json!({ "eventType": "SHUTDOWN", "shutdownReason": reason, "deadlineMs": deadline_ms });
    event.to_string().into()
}

/// Subscribes an extension to telemetry or logs.
pub(super) async fn subscribe(
    api: &RuntimeApi,
    to: telemetry::Api,
    peer: &Arc<Peer>,
    headers: &HeaderMap,
    body: RequestBody,
) -> Reply {
    let name = identifier(headers).and_then(|id| api.state().extensions.name(id).map(str::to_owned));
    let name = match name {
        Ok(name) => name,
        Err(refused) => return refuse(refused),
    };
    match body::read(body, BODY_BYTES).await {
        Read::Whole { bytes, .. } => api.0.telemetry.subscribe(to, &name, &bytes, &**peer),
        Read::TooLarge => reply::too_large(BODY_BYTES),
        Read::BrokenOff => reply::truncated(),
    }
}

fn identifier(headers: &HeaderMap) -> Result<&str, Refused> {
    match text(headers, EXTENSION_ID) {
        "" => Err(Refused::new(
            "Extension.MissingExtensionIdentifier",
            "Missing Lambda-Extension-Identifier header",
        )),
        id if !is_uuid(id) => Err(Refused::new(
            "Extension.InvalidExtensionIdentifier",
            "Invalid Lambda-Extension-Identifier",
        )),
        id => Ok(id),
    }
}

fn is_uuid(text: &str) -> bool {
    let lengths = text.split('-').map(str::len);
    let digits = |byte: u8| byte == b'-' || byte.is_ascii_hexdigit();
    lengths.eq([8, 4, 4, 4, 12]) && text.bytes().all(digits)
}

/// A UUID, by random(4).
fn new_id() -> std::io::Result<String> {
    std::fs::read_to_string("/proc/sys/kernel/random/uuid").map(|id| id.trim().to_owned())
}

fn with(name: HeaderName, value: &str, mut reply: Reply) -> Reply {
    if let Ok(value) = HeaderValue::from_str(value) {
        reply.headers_mut().insert(name, value);
    }
    reply
}

fn refuse(refused: Refused) -> Reply {
    reply::error(StatusCode::FORBIDDEN, refused.kind, &refused.message)
}

#[cfg(test)]
mod tests;
