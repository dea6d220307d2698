//! The HTTP side.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Body, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use stoker_proto::limits::{self, PAYLOAD_BYTES};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::peer::{Peer, PeerStream};
use super::session::{Invocation, Outcome, Refusal};
use super::{Init, RuntimeApi};

/// Connections at a time. A runtime needs one, or one for each of its threads.
const CONNECTIONS: usize = 16;
/// The most of a request's head, in bytes.
const HEAD_LIMIT: usize = 16 << 10;
const HEADERS: usize = 64;
/// What a connection reads ahead at most, in bytes.
const BUFFER: usize = 64 << 10;
/// The most of an error object, in bytes.
const ERROR_LIMIT: usize = 256 << 10;
/// The longest that an error object may take.
const ERROR_TIMEOUT: Duration = Duration::from_secs(30);
/// The longest that an answer may take: as long as any invocation, for a function may stream it all the while.
const RESPONSE_TIMEOUT: Duration = limits::TIMEOUT;
/// Lambda's error type where the runtime gives none.
const UNKNOWN_ERROR: &str = "Runtime.Unknown";
const ERROR_TYPE: &str = "lambda-runtime-function-error-type";
const INVOCATION: &str = "/2018-06-01/runtime/invocation/";

/// What a runtime may ask for.
#[derive(Debug, PartialEq, Eq)]
enum Call<'a> {
    Next,
    Response(&'a str),
    Error(&'a str),
    InitError,
}

/// A body, as far as it may be large.
enum Read {
    Whole { bytes: Bytes, trailers: Option<HeaderMap> },
    TooLarge,
}

/// The right to send a body. Given back when the peer goes away in the middle.
struct Claim<'a>(&'a RuntimeApi);

// === impl Claim ===

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.0.state().session.unclaim();
    }
}

/// Accepts up to [`CONNECTIONS`] at a time, until dropped; the connections end with it.
pub(super) async fn serve(api: RuntimeApi, listener: TcpListener) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        while connections.try_join_next().is_some() {}
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(_) => {
                // Of a connection that was broken off at once, or for want of descriptors, which others give back.
                tokio::task::yield_now().await;
                continue;
            }
        };
        // Answers are small: none may wait for another.
        let _ = stream.set_nodelay(true);
        let api = api.clone();
        connections.spawn(async move {
            let peer = Peer::new(stream);
            let stream = PeerStream(Arc::clone(&peer));
            let service = service_fn(move |request| {
                let (api, peer) = (api.clone(), Arc::clone(&peer));
                async move { Ok::<_, Infallible>(answer(&api, &peer, request).await) }
            });
            // What goes wrong on a connection is the container's affair.
            let _ = hyper::server::conn::http1::Builder::new()
                .max_headers(HEADERS)
                .max_header_size(HEAD_LIMIT)
                .max_buf_size(BUFFER)
                .serve_connection(TokioIo::new(stream), service)
                .await;
            drop(place);
        });
    }
}

async fn answer(api: &RuntimeApi, peer: &Arc<Peer>, request: Request<Incoming>) -> Response<Full<Bytes>> {
    api.note_request_of(peer);
    let (head, body) = request.into_parts();
    let call = match parse(&head.method, head.uri.path()) {
        Ok(call) => call,
        Err(status) => return plain(status),
    };
    let kind = error_type(&head.headers);
    let answered = match call {
        Call::Next => next(api, peer).await,
        Call::Response(id) => {
            let bounds = (PAYLOAD_BYTES, RESPONSE_TIMEOUT);
            respond(api, id, bounds, body, response_outcome).await
        }
        Call::Error(id) => {
            let bounds = (ERROR_LIMIT, ERROR_TIMEOUT);
            respond(api, id, bounds, body, |read| error_outcome(kind, read)).await
        }
        Call::InitError => init_error(api, kind, body).await,
    };
    answered.unwrap_or_else(refuse)
}

fn parse<'a>(method: &Method, path: &'a str) -> Result<Call<'a>, StatusCode> {
    let (call, expected) = if path == "/2018-06-01/runtime/init/error" {
        (Call::InitError, Method::POST)
    } else {
        let rest = path.strip_prefix(INVOCATION).ok_or(StatusCode::NOT_FOUND)?;
        match rest.split_once('/') {
            None if rest == "next" => (Call::Next, Method::GET),
            Some((id, "response")) => (Call::Response(id), Method::POST),
            Some((id, "error")) => (Call::Error(id), Method::POST),
            _ => return Err(StatusCode::NOT_FOUND),
        }
    };
    if *method == expected {
        Ok(call)
    } else {
        Err(StatusCode::METHOD_NOT_ALLOWED)
    }
}

async fn next(api: &RuntimeApi, peer: &Arc<Peer>) -> Result<Response<Full<Bytes>>, Refusal> {
    loop {
        // Listens before it looks, so that nothing falls between.
        let work = api.0.work.notified();
        tokio::pin!(work);
        work.as_mut().enable();
        let invocation = {
            let mut state = api.state();
            let invocation = state.session.next()?;
            if invocation.is_some() {
                state.taken_by = Some(Arc::clone(peer));
            }
            invocation
        };
        api.0.init.send_if_modified(|init| {
            let first = *init == Init::Running;
            if first {
                *init = Init::Done;
            }
            first
        });
        match invocation {
            Some(invocation) => return Ok(hand_over(api, invocation)),
            None => work.await,
        }
    }
}

fn hand_over(api: &RuntimeApi, invocation: Invocation) -> Response<Full<Bytes>> {
    let mut response = json(StatusCode::OK, invocation.payload);
    let trace = trace_id(&invocation.id, invocation.deadline_ms);
    for (name, value) in [
        ("lambda-runtime-aws-request-id", invocation.id.as_str()),
        ("lambda-runtime-deadline-ms", &invocation.deadline_ms.to_string()),
        ("lambda-runtime-invoked-function-arn", &api.0.arn),
        ("lambda-runtime-trace-id", &trace),
    ] {
        // Request ids were checked where they came in, the rest is ours.
        if let Ok(value) = HeaderValue::from_str(value) {
            response.headers_mut().insert(name, value);
        }
    }
    response
}

/// An X-Ray trace header that says that nothing is traced. The root is `1-` time in s `-` 96 bits, here of the request id.
fn trace_id(request: &str, deadline_ms: u64) -> String {
    let digits: String = request
        .chars()
        .filter(char::is_ascii_hexdigit)
        .map(|digit| digit.to_ascii_lowercase())
        .take(24)
        .collect();
    format!(
        "Root=1-{:08x}-{digits:0>24};Parent={:0>16};Sampled=0",
        deadline_ms / 1_000,
        digits.get(..16).unwrap_or(&digits)
    )
}

/// Takes the outcome of the invocation `id`.
async fn respond(
    api: &RuntimeApi,
    id: &str,
    (limit, timeout): (usize, Duration),
    body: Incoming,
    outcome: impl FnOnce(Read) -> Outcome,
) -> Result<Response<Full<Bytes>>, Refusal> {
    {
        let mut state = api.state();
        state.session.claim(id)?;
        state.taken_by = None;
    }
    let claim = Claim(api);
    let Some(read) = read(body, limit, timeout).await else {
        return Ok(plain(StatusCode::BAD_REQUEST));
    };
    let response = match &read {
        Read::Whole { .. } => accepted(),
        Read::TooLarge => too_large(limit),
    };
    let sender = {
        let mut state = api.state();
        state.session.answered();
        state.outcome.take()
    };
    drop(claim);
    if let Some(sender) = sender {
        // None waits any more once the deadline has passed.
        let _ = sender.send(outcome(read));
    }
    Ok(response)
}

async fn init_error(api: &RuntimeApi, kind: String, body: Incoming) -> Result<Response<Full<Bytes>>, Refusal> {
    api.state().session.claim_init()?;
    let _claim = Claim(api);
    let Some(read) = read(body, ERROR_LIMIT, ERROR_TIMEOUT).await else {
        return Ok(plain(StatusCode::BAD_REQUEST));
    };
    api.state().session.init_failed();
    api.0.init.send_replace(Init::Failed(error_outcome(kind, read)));
    Ok(accepted())
}

fn response_outcome(read: Read) -> Outcome {
    match read {
        Read::TooLarge => Outcome::TooLarge,
        Read::Whole { bytes, trailers } => {
            // A function that streams its answer says only at the end that it failed.
            let failed = trailers.filter(|trailers| trailers.contains_key(ERROR_TYPE));
            match failed {
                None => Outcome::Answer(bytes),
                Some(trailers) => Outcome::Error {
                    kind: error_type(&trailers),
                    object: Bytes::from_static(
                        br#"{"errorMessage":"the function failed while it streamed its answer"}"#,
                    ),
                },
            }
        }
    }
}

fn error_outcome(kind: String, read: Read) -> Outcome {
    let object = match read {
        Read::Whole { bytes, .. } => bytes,
        Read::TooLarge => {
            Bytes::from_static(br#"{"errorMessage":"the error object that the function reported was over 256 KiB"}"#)
        }
    };
    Outcome::Error { kind, object }
}

fn error_type(headers: &HeaderMap) -> String {
    headers
        .get(ERROR_TYPE)
        .and_then(|kind| kind.to_str().ok())
        .filter(|kind| !kind.is_empty() && kind.len() <= 256)
        .unwrap_or(UNKNOWN_ERROR)
        .to_owned()
}

/// Reads a body of at most `limit` bytes; one that is longer is read to its end all the same, so that the peer reads the
/// answer instead of failing to write. None where the peer went away or takes longer than `timeout`.
async fn read(body: impl Body<Data = Bytes> + Unpin, limit: usize, timeout: Duration) -> Option<Read> {
    tokio::time::timeout(timeout, read_all(body, limit)).await.ok()?
}

async fn read_all(mut body: impl Body<Data = Bytes> + Unpin, limit: usize) -> Option<Read> {
    let declared = body.size_hint().lower();
    let mut too_large = declared > limit as u64;
    // One piece, copied together: frames may be a byte each, and cost more than they hold.
    let mut bytes = Vec::with_capacity(if too_large { 0 } else { declared as usize });
    let mut trailers = None;
    while let Some(frame) = body.frame().await {
        match frame.ok()?.into_data() {
            Ok(data) => {
                too_large |= bytes.len() + data.len() > limit;
                if too_large {
                    bytes = Vec::new();
                } else {
                    bytes.extend_from_slice(&data);
                }
            }
            Err(frame) => trailers = frame.into_trailers().ok(),
        }
    }
    Some(if too_large {
        Read::TooLarge
    } else {
        Read::Whole {
            bytes: bytes.into(),
            trailers,
        }
    })
}

fn accepted() -> Response<Full<Bytes>> {
    json(StatusCode::ACCEPTED, Bytes::from_static(br#"{"status":"OK"}"#))
}

fn too_large(limit: usize) -> Response<Full<Bytes>> {
    error(
        StatusCode::PAYLOAD_TOO_LARGE,
        "RequestEntityTooLarge",
        &format!("Exceeded maximum allowed payload size ({limit} bytes)."),
    )
}

fn refuse(refusal: Refusal) -> Response<Full<Bytes>> {
    match refusal {
        Refusal::InvalidRequestId => error(StatusCode::BAD_REQUEST, "InvalidRequestID", "Invalid request ID"),
        Refusal::InvalidState => error(
            StatusCode::FORBIDDEN,
            "InvalidStateTransition",
            "State transition is not allowed",
        ),
    }
}

fn error(status: StatusCode, kind: &str, message: &str) -> Response<Full<Bytes>> {
    let object = serde_json::json!({ "errorMessage": message, "errorType": kind });
    json(status, object.to_string().into())
}

fn json(status: StatusCode, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn plain(status: StatusCode) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    *response.status_mut() = status;
    response
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
