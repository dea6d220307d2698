//! What a runtime asks for: its next invocation, and to be heard of what came of it (AWS Lambda Developer Guide, "Using the
//! Lambda runtime API for custom runtimes").

use std::sync::Arc;

use hyper::StatusCode;
use hyper::body::Incoming;
use hyper::header::{HeaderMap, HeaderValue};
use serde_json::json;
use stoker_proto::limits::{ANSWER_BYTES, STREAMED_ANSWER_BYTES};

use super::body::{self, Read};
use super::headers::{DEADLINE, FUNCTION_ARN, REQUEST_ID, RESPONSE_MODE, TRACE_ID, text};
use super::peer::Peer;
use super::reply::{self, Reply};
use super::session::{Invocation, Outcome, Refusal};
use super::{Init, RuntimeApi, error_object, stream};
use crate::parts::Parts;

/// The right to send the outcome of an invocation. Dropped without, its connection has broken.
struct Claim<'a> {
    api: Option<&'a RuntimeApi>,
    /// Where what is streamed goes before.
    parts: Option<Parts>,
}

/// The right to report that init failed. Given back when dropped.
struct InitClaim<'a>(&'a RuntimeApi);

// === impl Claim ===

impl<'a> Claim<'a> {
    fn of(api: &'a RuntimeApi, id: &str) -> Result<Self, Refusal> {
        let mut state = api.state();
        state.session.claim(id)?;
        state.taken_by = None;
        api.0.telemetry.answering();
        Ok(Self {
            api: Some(api),
            parts: state.parts.take(),
        })
    }

    fn settle(mut self, outcome: Outcome) {
        if let Some(api) = self.api.take() {
            api.settle(outcome);
        }
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        if let Some(api) = self.api.take() {
            api.settle(Outcome::BrokenOff);
        }
    }
}

// === impl InitClaim ===

impl Drop for InitClaim<'_> {
    fn drop(&mut self) {
        self.0.state().session.unclaim_init();
    }
}

/// Waits for an invocation.
pub(super) async fn next(api: &RuntimeApi, peer: &Arc<Peer>) -> Result<Reply, Refusal> {
    // What it wrote comes before that it is done.
    api.read_log().await;
    let given = {
        let mut state = api.state();
        let given = state.session.ask()?;
        if given.is_some() {
            state.taken_by = Some(Arc::clone(peer));
        }
        state.asked = true;
        state.extensions.close();
        given
    };
    api.0.telemetry.asked();
    api.note_ready();
    let invocation = match given {
        Some(invocation) => invocation,
        None => {
            let waiting = api.wait(
                peer,
                |state| Some(&mut state.line),
                |state| {
                    let invocation = state.session.take()?;
                    state.taken_by = Some(Arc::clone(peer));
                    Some(invocation)
                },
            );
            waiting.await.ok_or(Refusal::InvalidState)?
        }
    };
    Ok(hand_over(api, invocation))
}

fn hand_over(api: &RuntimeApi, invocation: Invocation) -> Reply {
    let trace = invocation.trace_id();
    let mut response = reply::json(StatusCode::OK, invocation.payload);
    for (name, value) in [
        (REQUEST_ID, invocation.id.as_str()),
        (DEADLINE, &invocation.deadline_ms.to_string()),
        (FUNCTION_ARN, &api.0.identity.arn),
        (TRACE_ID, &trace),
    ] {
        // Request ids were checked where they came in, the rest is ours.
        if let Ok(value) = HeaderValue::from_str(value) {
            response.headers_mut().insert(name, value);
        }
    }
    response
}

/// Takes the answer to the invocation `id`, sent at once or as a stream.
pub(super) async fn response(
    api: &RuntimeApi,
    id: &str,
    headers: &HeaderMap,
    body: Incoming,
) -> Result<Reply, Refusal> {
    let claim = Claim::of(api, id)?;
    let mode = text(headers, RESPONSE_MODE);
    if !matches!(mode, "" | "streaming") {
        let message = format!("the runtime wanted to send its answer in the mode {mode:?}; there is `streaming`");
        claim.settle(Outcome::Error {
            kind: "Runtime.InvalidResponseModeHeader".to_owned(),
            object: json!({ "errorType": "Runtime.InvalidResponseModeHeader", "errorMessage": message })
                .to_string()
                .into(),
        });
        return Ok(reply::error(
            StatusCode::BAD_REQUEST,
            "InvalidFunctionResponseMode",
            "Invalid function response mode",
        ));
    }
    let parts = claim.parts.clone().filter(|_| mode == "streaming");
    let (limit, read) = match &parts {
        Some(parts) => {
            let limit = STREAMED_ANSWER_BYTES;
            (limit, stream::pass_on(body, headers, limit, parts).await)
        }
        None => (ANSWER_BYTES, body::read(body, ANSWER_BYTES).await),
    };
    Ok(match read {
        Read::Whole { bytes, trailers } => {
            // Who streams says only at the end that it failed.
            let outcome = match error_object::streamed(headers, &trailers, &bytes) {
                Some((outcome, before)) => {
                    if let Some(parts) = parts {
                        parts.send(bytes.slice(..before)).await;
                    }
                    outcome
                }
                None => Outcome::Answer(bytes),
            };
            claim.settle(outcome);
            reply::accepted()
        }
        Read::TooLarge => {
            claim.settle(Outcome::TooLarge { limit });
            reply::too_large(limit)
        }
        Read::BrokenOff => reply::truncated(),
    })
}

/// Takes the error that came of the invocation `id`.
pub(super) async fn error(api: &RuntimeApi, id: &str, headers: &HeaderMap, body: Incoming) -> Result<Reply, Refusal> {
    let claim = Claim::of(api, id)?;
    let read = body::read(body, ANSWER_BYTES).await;
    Ok(match error_object::reported(headers, read) {
        Some(outcome) => {
            claim.settle(outcome);
            reply::accepted()
        }
        None => reply::truncated(),
    })
}

/// Takes the error that came of init.
pub(super) async fn init_error(api: &RuntimeApi, headers: &HeaderMap, body: Incoming) -> Result<Reply, Refusal> {
    api.state().session.claim_init()?;
    let _claim = InitClaim(api);
    let read = body::read(body, ANSWER_BYTES).await;
    Ok(match error_object::reported(headers, read) {
        Some(outcome) => {
            api.state().session.init_failed();
            if let Outcome::Error { kind, .. } = &outcome {
                api.0.telemetry.init_failed(kind);
            }
            api.0.init.send_replace(Init::Failed(outcome));
            reply::accepted()
        }
        None => reply::truncated(),
    })
}
