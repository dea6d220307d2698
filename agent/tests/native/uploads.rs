//! Deployments that stand still, and those for which there is no room.

use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use stoker_agent::config::Limits;
use stoker_proto::v1;
use stoker_proto::v1::create_function_request::Part;
use stoker_proto::v1::functions_client::FunctionsClient;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::task::JoinSet;
use tokio_stream::StreamExt as _;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::common::*;
use crate::functions::still_serves;

/// A deployment whose caller sends as much of a zip as given, and then nothing more.
async fn stalled(mut client: FunctionsClient<Channel>, id: String, zip: Bytes) -> Result<(), Status> {
    let chunks = (0..zip.len()).step_by(1 << 20);
    let chunks = chunks.map(move |at| Part::Chunk(zip.slice(at..zip.len().min(at + (1 << 20)))));
    let parts = std::iter::once(Part::Header(header(function(&id), ""))).chain(chunks);
    let parts = parts.map(|part| v1::CreateFunctionRequest { part: Some(part) });
    let sent = tokio_stream::iter(parts).chain(tokio_stream::pending());
    client.create_function(sent).await.map(|_| ())
}

/// Callers that stop in the middle of a zip keep nobody else waiting, not even on their own connection, and what they sent
/// takes no more room than the zips that may come in.
#[tokio::test]
async fn uploads_that_stand_still_keep_nobody_waiting() {
    const STALLED: usize = 200;
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path()).await;
    let zip = Bytes::from(vec![7; 3 << 20]);
    let mut uploads: JoinSet<_> = (0..STALLED)
        .map(|n| stalled(agent.functions(), format!("f{n}"), zip.clone()))
        .collect();
    let slots = Limits::default().concurrent_uploads as usize;
    let refused = async {
        for _ in 0..STALLED - slots {
            let status = uploads.join_next().await.unwrap().unwrap().unwrap_err();
            let details = status.get_error_details();
            assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
            assert!(details.retry_info().is_some(), "{status:?}");
            // While all of them stand still.
            let missing = agent.get("accounts/acme/functions/none").await.unwrap_err();
            assert_eq!(missing.code(), Code::NotFound, "{missing:?}");
        }
    };
    tokio::time::timeout(PATIENCE, refused).await.unwrap();
    let staging = agent.folder.join("code/staging");
    assert_eq!(names(&staging).len(), slots);
    let refused = agent.create(function("one-more"), &app()).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
    uploads.shutdown().await;
    agent.nothing_staged().await;
    still_serves(&agent).await;
}

#[tokio::test]
async fn an_upload_that_stands_still_is_ended() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits {
        upload_idle_timeout: Duration::from_millis(100),
        ..Limits::default()
    };
    let agent = Agent::with_limits(dir.path(), limits).await;
    let half = Bytes::from(vec![7; 1 << 20]);
    let mut client = agent.functions();
    let silent = client.create_function(tokio_stream::pending());
    let silent = tokio::time::timeout(PATIENCE, silent).await.unwrap().unwrap_err();
    let stalled = stalled(agent.functions(), "half".into(), half);
    let stalled = tokio::time::timeout(PATIENCE, stalled).await.unwrap().unwrap_err();
    for status in [silent, stalled] {
        assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
        assert!(status.message().contains("limits.upload_idle_timeout"), "{status:?}");
    }
    agent.nothing_staged().await;
    still_serves(&agent).await;
}

/// An HTTP/2 connection that sends what it is told to, whatever the agent says meanwhile (RFC 9113).
struct Stubborn(UnixStream);

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const GO_AWAY: u8 = 7;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

impl Stubborn {
    async fn connect(agent: &Agent) -> Self {
        let mut stream = UnixStream::connect(socket(&agent.folder)).await.unwrap();
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        let mut connection = Self(stream);
        connection.send(SETTINGS, 0, 0, &[]).await;
        connection
    }

    async fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        frame.extend([kind, flags]);
        frame.extend(stream.to_be_bytes());
        frame.extend(payload);
        self.0.write_all(&frame).await.unwrap();
    }

    /// Begins a call: POST, http, and the rest as literals without an index (RFC 7541).
    async fn call(&mut self, stream: u32, method: &str) {
        let path = format!("/stoker.v1.Functions/{method}");
        let mut block = vec![0x83, 0x86];
        for (name, value) in [
            (":path", path.as_str()),
            (":authority", "agent"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ] {
            block.push(0);
            for text in [name, value] {
                block.push(text.len() as u8);
                block.extend(text.bytes());
            }
        }
        self.send(HEADERS, END_HEADERS, stream, &block).await;
    }

    /// Kind, flags and stream of the next frame.
    async fn next(&mut self) -> (u8, u8, u32) {
        let mut head = [0; 9];
        let read = tokio::time::timeout(PATIENCE, self.0.read_exact(&mut head));
        let read = read.await.unwrap();
        assert!(read.is_ok(), "the agent ended the connection: {read:?}");
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        self.0.read_exact(&mut vec![0; length as usize]).await.unwrap();
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        (head[3], head[4], stream)
    }
}

/// A client hears late that its calls are refused, and sends on until then.
#[tokio::test]
async fn what_comes_for_calls_that_were_refused_ends_no_connection() {
    const CALLS: u32 = 200;
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path()).await;
    let mut connection = Stubborn::connect(&agent).await;
    let streams = (0..CALLS).map(|n| 2 * n + 1);
    for stream in streams.clone() {
        connection.call(stream, "CreateFunction").await;
    }
    let mut refused = Vec::new();
    while refused.len() < (CALLS - Limits::default().concurrent_uploads) as usize {
        let (kind, flags, stream) = connection.next().await;
        if kind == HEADERS && flags & END_STREAM != 0 {
            refused.push(stream);
        }
    }
    for _ in 0..20 {
        for stream in &refused {
            connection.send(DATA, 0, *stream, &[0]).await;
        }
    }
    let last = 2 * CALLS + 1;
    let request = v1::GetFunctionRequest {
        name: "accounts/acme/functions/none".into(),
        ..Default::default()
    };
    let request = request.encode_to_vec();
    let body = [&[0][..], &(request.len() as u32).to_be_bytes(), &request].concat();
    connection.call(last, "GetFunction").await;
    connection.send(DATA, END_STREAM, last, &body).await;
    loop {
        let (kind, _, stream) = connection.next().await;
        assert_ne!(kind, GO_AWAY, "the agent ended the connection");
        if kind == HEADERS && stream == last {
            break;
        }
    }
}
