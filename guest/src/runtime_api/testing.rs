//! What tests of the API share: a served one, and clients that send bytes as they are.

use std::net::{SocketAddr, TcpListener};
use std::pin::Pin;

use bytes::Bytes;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::oneshot;

use super::{Identity, Init, Invocation, Outcome, RuntimeApi, Sandbox, TelemetryApi};
use crate::budget::{Budget, Budgets};
use crate::parts::Parts;

/// A served API and where to reach it.
pub(super) async fn served() -> (RuntimeApi, SocketAddr) {
    served_with(Budgets::default().budget())
}

/// The same at the cost of a container.
pub(super) fn served_with(budget: Budget) -> (RuntimeApi, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let identity = Identity {
        arn: "arn:aws:lambda:us-east-1:acme:function:f:1".to_owned(),
        name: "f".to_owned(),
        version: "1".to_owned(),
        handler: "app.handler".to_owned(),
        account: "acme".to_owned(),
        memory_mib: 128,
    };
    let telemetry = TelemetryApi::new(identity.clone());
    let api = RuntimeApi::new(identity, telemetry, Nothing, budget);
    tokio::spawn(api.clone().serve(listener));
    (api, address)
}

/// A container in which nothing is.
struct Nothing;

impl Sandbox for Nothing {
    fn memory_peak_bytes(&self) -> u64 {
        3 << 20
    }

    fn read_log(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(async {})
    }
}

/// Sends bytes as they are and reads until the server closes.
pub(super) async fn raw(address: SocketAddr, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    // The server may answer and close before it has read everything.
    let _ = stream.write_all(request).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

pub(super) async fn get(address: SocketAddr, path: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    raw(address, request.as_bytes()).await
}

pub(super) async fn post(address: SocketAddr, path: &str, headers: &str, body: &[u8]) -> String {
    let mut request = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n{headers}\r\n",
        body.len()
    )
    .into_bytes();
    request.extend_from_slice(body);
    raw(address, &request).await
}

pub(super) fn invocation(id: &str) -> Invocation {
    Invocation {
        id: id.to_owned(),
        payload: Bytes::from_static(br#"{"a":1}"#),
        deadline_ms: 1_700_000_000_123,
    }
}

pub(super) const NEXT: &str = "/2018-06-01/runtime/invocation/next";
pub(super) const ID: &str = "8476a536-e9f4-11e8-9739-2dfe598c3fcd";

/// Invokes, and takes the work as the runtime would.
pub(super) async fn invoked(api: &RuntimeApi, address: SocketAddr) -> (oneshot::Receiver<Outcome>, String) {
    invoked_by(api, address, None).await
}

/// The same for a caller to whom the answer may be streamed.
pub(super) async fn invoked_by(
    api: &RuntimeApi,
    address: SocketAddr,
    parts: Option<Parts>,
) -> (oneshot::Receiver<Outcome>, String) {
    let asked = tokio::spawn(async move { get(address, NEXT).await });
    assert_eq!(api.initialised().await, Init::Done);
    let outcome = api.invoke(invocation(ID), parts).unwrap();
    (outcome, asked.await.unwrap())
}

/// Reads up to something that must come.
pub(super) async fn read_until(stream: &mut TcpStream, end: &[u8]) -> String {
    let mut read = Vec::new();
    while !read.windows(end.len()).any(|part| part == end) {
        let length = stream.read_buf(&mut read).await.unwrap();
        assert_ne!(length, 0, "{}", String::from_utf8_lossy(&read));
    }
    String::from_utf8_lossy(&read).into_owned()
}
