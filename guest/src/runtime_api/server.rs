//! The HTTP side.

use std::convert::Infallible;
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::header::{CONNECTION, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::peer::{Peer, PeerStream};
use super::reply::{self, Reply};
use super::session::Refusal;
use super::{RuntimeApi, extensions, headers, runtime, telemetry};
use crate::budget::{Source, breathe};

/// Connections at a time. A runtime needs one, or one for each of its threads, and an extension two.
const CONNECTIONS: usize = 32;
/// The most of a request's head, in bytes: 1 MiB, and something around it, as Go's net/http takes, of which Lambda's own
/// server is made. Runtimes repeat an error in a header (`Lambda-Runtime-Function-XRay-Error-Cause`) up to that.
const HEAD_LIMIT: usize = (1 << 20) + 4096;
/// Connections at a time that had a head over 64 KiB. Each such request is its connection's last, for the memory that its head
/// took is the connection's until that ends.
const LARGE_HEADS: usize = 2;
/// What a connection reads ahead at most, in bytes: a head, and one step of reading.
const BUFFER: usize = HEAD_LIMIT + (64 << 10);
/// How long there is a rest where no connection can be taken, for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
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
}

/// Accepts up to [`CONNECTIONS`] at a time, until dropped; the connections end with it.
pub(super) async fn serve(api: RuntimeApi, listener: Arc<Source<TcpListener>>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let large_heads = Arc::new(Semaphore::new(LARGE_HEADS));
    let mut connections = JoinSet::new();
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        while connections.try_join_next().is_some() {}
        let peer = match listener.read(accept).await {
            Ok(stream) => Peer::new(stream, Arc::clone(&large_heads)),
            Err(error) => {
                // One that was broken off at once is as if it had not been (accept(2)).
                if error.kind() != std::io::ErrorKind::ConnectionAborted {
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
                breathe().await;
                continue;
            }
        };
        let socket = peer.socket().clone();
        let connection = converse(api.clone(), peer);
        let connection = async move {
            connection.await;
            drop(place);
        };
        connections.spawn(api.0.budget.throttle(connection, socket));
        breathe().await;
    }
}

fn accept(listener: &TcpListener) -> std::io::Result<TcpStream> {
    let (stream, _) = listener.accept()?;
    stream.set_nonblocking(true)?;
    // Answers are small: none may wait for another.
    let _ = stream.set_nodelay(true);
    Ok(stream)
}

/// Answers what comes by one connection.
async fn converse(api: RuntimeApi, peer: Arc<Peer>) {
    let stream = PeerStream::new(Arc::clone(&peer));
    let ended = Arc::clone(&peer);
    let service = service_fn(move |request| {
        let (api, peer) = (api.clone(), Arc::clone(&peer));
        async move {
            // Many may have come at once.
            breathe().await;
            let goes_on = peer.begin_request();
            let mut reply = answer(&api, &peer, request).await;
            peer.end_request();
            if !goes_on {
                reply
                    .headers_mut()
                    .insert(CONNECTION, HeaderValue::from_static("close"));
            }
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
    ended.end();
}

async fn answer(api: &RuntimeApi, peer: &Arc<Peer>, request: Request<Incoming>) -> Reply {
    api.note_request_of(peer);
    let (head, body) = request.into_parts();
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
        Err(status) => Ok(reply::plain(status)),
    };
    answered.unwrap_or_else(refuse)
}

fn parse(method: &Method, path: &str) -> Result<Call, StatusCode> {
    let (call, expected) = match path {
        "/2018-06-01/runtime/init/error" => (Call::InitError, Method::POST),
        "/2020-01-01/extension/register" => (Call::Register, Method::POST),
        "/2020-01-01/extension/event/next" => (Call::NextEvent, Method::GET),
        "/2020-01-01/extension/init/error" => (Call::ExtensionInitError, Method::POST),
        "/2020-01-01/extension/exit/error" => (Call::ExtensionExitError, Method::POST),
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
