//! The HTTP side.

use std::convert::Infallible;
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::budget::Budget;

use super::body::RequestBody;
use super::peer::{Peer, PeerStream};
use super::reply::{self, Reply};
use super::session::Refusal;
use super::{RuntimeApi, extensions, headers, runtime, telemetry};

/// Connections at a time. A runtime needs one, or one for each of its threads, and an extension two.
const CONNECTIONS: usize = 32;
/// The most of a request's head, in bytes: 1 MiB, and something around it, as Go's net/http takes, of which Lambda's own
/// server is made. Runtimes repeat an error in a header (`Lambda-Runtime-Function-XRay-Error-Cause`) up to that.
const HEAD_LIMIT: usize = (1 << 20) + 4096;
/// Heads over 64 KiB that are read at a time.
const LARGE_HEADS: usize = 2;
/// What a connection reads ahead at most, in bytes: a head, and one step of reading.
const BUFFER: usize = HEAD_LIMIT + (64 << 10);
/// How long nothing is accepted where there are no descriptors.
const WITHOUT_DESCRIPTORS: Duration = Duration::from_millis(100);
/// The longest request id that may be one, in bytes.
const ID_BYTES: usize = 64;
const INVOCATION: &str = "/2018-06-01/runtime/invocation/";

/// What may be asked for.
#[derive(Debug, PartialEq, Eq)]
enum Call {
    Next,
    Response(String),
    Error(String),
    InitError,
    Register,
    NextEvent,
    ExtensionInitError,
    ExtensionExitError,
    Subscribe(telemetry::Api),
    /// What is left of its credits: ours, not Lambda's.
    Credits,
}

/// Accepts up to [`CONNECTIONS`] at a time, until dropped; the connections end with it.
pub(super) async fn serve(api: RuntimeApi, listener: TcpListener, budget: &Budget) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let large_heads = Arc::new(Semaphore::new(LARGE_HEADS));
    let mut connections = JoinSet::new();
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        while connections.try_join_next().is_some() {}
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            // It was broken off at once.
            Err(error) if error.kind() == ErrorKind::ConnectionAborted => continue,
            Err(_) => {
                // For want of descriptors or memory, which others give back. The listener stays ready meanwhile.
                tokio::time::sleep(WITHOUT_DESCRIPTORS).await;
                continue;
            }
        };
        // Answers are small: none may wait for another.
        let _ = stream.set_nodelay(true);
        let api = api.clone();
        let large_heads = Arc::clone(&large_heads);
        connections.spawn(budget.paced(async move {
            let peer = Peer::new(stream, large_heads);
            let stream = PeerStream(Arc::clone(&peer));
            let service = service_fn(move |request| {
                let (api, peer) = (api.clone(), Arc::clone(&peer));
                async move {
                    peer.begin_request();
                    let reply = answer(&api, &peer, request).await;
                    peer.end_request();
                    Ok::<_, Infallible>(reply)
                }
            });
            // What goes wrong on a connection is the container's affair.
            let _ = hyper::server::conn::http1::Builder::new()
                .max_header_size(HEAD_LIMIT)
                .max_buf_size(BUFFER)
                // As Lambda writes them: there are clients that compare letter by letter.
                .title_case_headers(true)
                // Some end their side when they have sent their request.
                .half_close(true)
                .serve_connection(TokioIo::new(stream), service)
                .await;
            drop(place);
        }));
    }
}

async fn answer(api: &RuntimeApi, peer: &Arc<Peer>, request: Request<Incoming>) -> Reply {
    api.note_request_of(peer);
    let (head, body) = request.into_parts();
    let body = RequestBody::new(body, Arc::clone(peer));
    let call = parse(&head.method, head.uri.path());
    let headers = headers::needed(&head.headers);
    // As large as a header may be.
    drop(head);
    let answered = match call {
        Ok(Call::Next) => runtime::next(api, peer).await,
        Ok(Call::Response(id)) => runtime::response(api, &id, &headers, body).await,
        Ok(Call::Error(id)) => runtime::error(api, &id, &headers, body).await,
        Ok(Call::InitError) => runtime::init_error(api, &headers, body).await,
        Ok(Call::Register) => Ok(extensions::register(api, &headers, body).await),
        Ok(Call::NextEvent) => Ok(extensions::next(api, peer, &headers).await),
        Ok(Call::ExtensionInitError) => Ok(extensions::init_error(api, &headers, body).await),
        Ok(Call::ExtensionExitError) => Ok(extensions::exit_error(api, &headers, body).await),
        Ok(Call::Subscribe(to)) => Ok(extensions::subscribe(api, to, peer, &headers, body).await),
        Ok(Call::Credits) => Ok(credits(api).await),
        Err(status) => Ok(reply::plain(status)),
    };
    answered.unwrap_or_else(refuse)
}

/// Where nothing is known yet, it may be asked again.
async fn credits(api: &RuntimeApi) -> Reply {
    let (known, report) = api.credits().await;
    let status = if known {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    reply::json(status, report.to_string().into())
}

fn parse(method: &Method, path: &str) -> Result<Call, StatusCode> {
    let (call, expected) = match path {
        "/2018-06-01/runtime/init/error" => (Call::InitError, Method::POST),
        "/2020-01-01/extension/register" => (Call::Register, Method::POST),
        "/2020-01-01/extension/event/next" => (Call::NextEvent, Method::GET),
        "/2020-01-01/extension/init/error" => (Call::ExtensionInitError, Method::POST),
        "/2020-01-01/extension/exit/error" => (Call::ExtensionExitError, Method::POST),
        "/credits" => (Call::Credits, Method::GET),
        "/2020-08-15/logs" => (Call::Subscribe(telemetry::Api::Logs), Method::PUT),
        "/2022-07-01/telemetry" => (Call::Subscribe(telemetry::Api::Telemetry), Method::PUT),
        path => {
            let rest = path.strip_prefix(INVOCATION).ok_or(StatusCode::NOT_FOUND)?;
            // One that is longer is nobody's, and neither is its beginning.
            let id = |id: &str| id.chars().take(ID_BYTES + 1).collect();
            match rest.split_once('/') {
                None if rest == "next" => (Call::Next, Method::GET),
                Some((of, "response")) => (Call::Response(id(of)), Method::POST),
                Some((of, "error")) => (Call::Error(id(of)), Method::POST),
                _ => return Err(StatusCode::NOT_FOUND),
            }
        }
    };
    if *method == expected {
        Ok(call)
    } else {
        Err(StatusCode::METHOD_NOT_ALLOWED)
    }
}

fn refuse(refusal: Refusal) -> Reply {
    match refusal {
        Refusal::InvalidRequestId => reply::error(StatusCode::BAD_REQUEST, "InvalidRequestID", "Invalid request ID"),
        Refusal::InvalidState => reply::error(
            StatusCode::FORBIDDEN,
            "InvalidStateTransition",
            "State transition is not allowed",
        ),
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
