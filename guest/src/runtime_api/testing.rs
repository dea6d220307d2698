//! What tests of the API share: a served one, and clients that send bytes as they are.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};

use bytes::Bytes;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, oneshot};

use super::{CreditsReport, Identity, Init, Invocation, Outcome, RuntimeApi, Sandbox, TelemetryApi};
use crate::budget::Budget;
use crate::parts::Parts;

/// A served API and where to reach it.
pub(super) async fn served() -> (RuntimeApi, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let identity = Identity {
        arn: "arn:aws:lambda:us-east-1:acme:function:f".to_owned(),
        name: "f".to_owned(),
        version: "$LATEST".to_owned(),
        handler: "app.handler".to_owned(),
        account: "acme".to_owned(),
        memory_mib: 128,
    };
    let telemetry = TelemetryApi::new(identity.clone());
    let api = RuntimeApi::new(identity, telemetry, Nothing::default());
    tokio::spawn(api.clone().serve(listener, Budget::default()));
    (api, address)
}

/// A container in which nothing is.
#[derive(Default)]
struct Nothing {
    questions: AtomicU32,
    third: Notify,
}

impl Sandbox for Nothing {
    fn memory_peak_bytes(&self) -> u64 {
        3 << 20
    }

    fn read_log(&self) {}

    fn credits(&self) -> CreditsReport<'_> {
        Box::pin(async {
            // Known at first; then it takes until somebody else asks.
            let known = match self.questions.fetch_add(1, Ordering::Relaxed) {
                0 => true,
                1 => {
                    self.third.notified().await;
                    false
                }
                _ => {
                    self.third.notify_one();
                    false
                }
            };
            (known, serde_json::json!({ "throttle": null }))
        })
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
