//! Answers Prometheus over HTTP/1.1. Each connection is for one request, and the number and time of all are bounded: it may be
//! anybody who asks.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ACCEPT, ALLOW, CONTENT_TYPE};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, Semaphore};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::TcpListenerStream;

use super::gather::Sources;
use super::page::{Format, page};
use crate::api::listen;

/// Where metrics are.
pub const PATH: &str = "/metrics";

/// How many connections there are at a time; more wait in the kernel.
const CONNECTIONS: usize = 16;

/// How long a connection may take in all, its request and its answer.
const LIMIT: Duration = Duration::from_secs(30);

/// Answers until it is dropped.
pub async fn serve(listener: TcpListener, sources: Sources) {
    // One page is made at a time: to look at all machines for several would cost as many times as much.
    let sources = Arc::new(Mutex::new(sources));
    serve_pages(listener, move |format| {
        let sources = sources.clone();
        async move {
            let sources = sources.lock().await;
            let found = sources.look().await;
            page(sources.counted(), &found, format)
        }
    })
    .await;
}

/// The same with whatever makes pages.
async fn serve_pages<F>(listener: TcpListener, page: impl Fn(Format) -> F + Clone + Send + Sync + 'static)
where
    F: Future<Output = Result<String, std::fmt::Error>> + Send + 'static,
{
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let mut incoming = std::pin::pin!(listen::unhurried(TcpListenerStream::new(listener)));
    while let (Ok(place), Some(accepted)) = (places.clone().acquire_owned().await, incoming.next().await) {
        let Ok(stream) = accepted else { continue };
        let page = page.clone();
        tokio::spawn(async move {
            let answered = tokio::time::timeout(LIMIT, connection(stream, page)).await;
            if let Ok(Err(error)) = answered {
                tracing::debug!(%error, "a connection for metrics broke");
            }
            drop(place);
        });
    }
}

async fn connection<F>(stream: TcpStream, page: impl Fn(Format) -> F) -> hyper::Result<()>
where
    F: Future<Output = Result<String, std::fmt::Error>>,
{
    let service = service_fn(|request| answer(request, &page));
    hyper::server::conn::http1::Builder::new()
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service)
        .await
}

async fn answer<F>(request: Request<Incoming>, page: &impl Fn(Format) -> F) -> Result<Response<Full<Bytes>>, Infallible>
where
    F: Future<Output = Result<String, std::fmt::Error>>,
{
    if request.uri().path() != PATH {
        return Ok(plain(StatusCode::NOT_FOUND, format!("metrics are at {PATH}\n")));
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut refused = plain(StatusCode::METHOD_NOT_ALLOWED, "metrics can only be read\n");
        refused
            .headers_mut()
            .insert(ALLOW, hyper::header::HeaderValue::from_static("GET, HEAD"));
        return Ok(refused);
    }
    let accept = request.headers().get_all(ACCEPT).iter();
    let format = Format::wanted(accept.filter_map(|accept| accept.to_str().ok()));
    Ok(match page(format).await {
        Ok(text) => with_type(StatusCode::OK, text, format.content_type()),
        Err(error) => {
            tracing::error!(%error, "metrics can't be written");
            plain(StatusCode::INTERNAL_SERVER_ERROR, "metrics can't be written\n")
        }
    })
}

fn plain(status: StatusCode, text: impl Into<Bytes>) -> Response<Full<Bytes>> {
    with_type(status, text, "text/plain; charset=utf-8")
}

fn with_type(status: StatusCode, text: impl Into<Bytes>, content_type: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(text.into()));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(content_type));
    response
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    async fn served() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve_pages(
            listener,
            |format| async move { Ok(format!("{format:?}\n")) },
        ));
        address
    }

    async fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        // Up to the end of the connection.
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn who_asks_is_answered_in_the_format_that_is_wanted() {
        let address = served().await;
        let get = |accept: &str| format!("GET /metrics?x=1 HTTP/1.1\r\nHost: h\r\n{accept}\r\n");
        let answer = ask(address, &get("")).await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(
            answer.contains("text/plain; version=0.0.4") && answer.ends_with("Prometheus\n"),
            "{answer}"
        );
        // As Prometheus itself does.
        let accept = "Accept: application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.4\r\n";
        let answer = ask(address, &get(accept)).await;
        assert!(
            answer.contains("application/openmetrics-text; version=1.0.0"),
            "{answer}"
        );
        let answer = ask(address, "HEAD /metrics HTTP/1.1\r\nHost: h\r\n\r\n").await;
        assert!(
            answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\n"),
            "{answer}"
        );
    }

    #[tokio::test]
    async fn what_is_not_asked_for_metrics_is_refused_with_what_to_do() {
        let address = served().await;
        let answer = ask(address, "GET / HTTP/1.1\r\nHost: h\r\n\r\n").await;
        assert!(
            answer.starts_with("HTTP/1.1 404") && answer.ends_with("metrics are at /metrics\n"),
            "{answer}"
        );
        let answer = ask(
            address,
            "POST /metrics HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n",
        )
        .await;
        assert!(
            answer.starts_with("HTTP/1.1 405") && answer.contains("allow: GET, HEAD"),
            "{answer}"
        );
        let answer = ask(address, "what is this\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    }

    #[tokio::test]
    async fn silent_connections_take_no_more_than_their_places() {
        let address = served().await;
        let mut silent = Vec::new();
        for _ in 0..CONNECTIONS - 1 {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        let answer = ask(address, "GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        silent.push(TcpStream::connect(address).await.unwrap());
        // All places are taken: who comes now is served once one of them has left.
        let asking = tokio::spawn(async move { ask(address, "GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n").await });
        drop(silent);
        let answer = asking.await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
}
