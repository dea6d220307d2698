//! Answers that are streamed, between the function and the agent.

use std::time::Duration;

use serde_json::json;
use stoker_proto::guest::function_error::Kind;
use stoker_proto::guest::{InvokeRequest, InvokeResponse};
use stoker_proto::limits::{STREAM_PART_BYTES, STREAM_WINDOW_BYTES, STREAMED_ANSWER_BYTES};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::support::{Function, Guest, PATIENCE, invoke, request};
use crate::{answer, failure};

const MIB: usize = 1 << 20;

/// The agent's end of a call that is streamed.
struct Call {
    to: mpsc::Sender<InvokeRequest>,
    answers: Streaming<InvokeResponse>,
    number: u64,
    /// What has come, and what may.
    bytes: usize,
    granted: usize,
}

impl Call {
    async fn begin(guest: &mut Guest, asked: InvokeRequest) -> Self {
        let number = asked.call;
        let (to, requests) = mpsc::channel(4);
        to.send(InvokeRequest { stream: true, ..asked }).await.unwrap();
        let answers = guest.client.invoke(ReceiverStream::new(requests)).await.unwrap();
        Self {
            to,
            answers: answers.into_inner(),
            number,
            bytes: 0,
            granted: STREAM_WINDOW_BYTES,
        }
    }

    /// Reads a part, or what ends the call.
    async fn next(&mut self) -> Option<InvokeResponse> {
        let answer = self.answers.message().await.unwrap().unwrap();
        assert_eq!(answer.call, self.number);
        if !answer.more {
            return Some(answer);
        }
        assert!((1..=STREAM_PART_BYTES).contains(&answer.payload.len()));
        self.bytes += answer.payload.len();
        assert!(self.bytes <= self.granted);
        None
    }

    async fn grant(&mut self, bytes: usize) {
        self.granted += bytes;
        let grant = InvokeRequest {
            call: self.number,
            grant_bytes: bytes.try_into().unwrap(),
            ..Default::default()
        };
        self.to.send(grant).await.unwrap();
    }

    /// Reads to the end; `seen` after each grant.
    async fn end(&mut self, mut seen: impl FnMut()) -> InvokeResponse {
        loop {
            if let Some(answer) = self.next().await {
                return answer;
            }
            let due = self.bytes + STREAM_WINDOW_BYTES - self.granted;
            if due >= STREAM_WINDOW_BYTES / 2 {
                self.grant(due).await;
                seen();
            }
        }
    }
}

#[tokio::test]
async fn a_stream_comes_while_the_function_runs_and_says_how_it_ended() {
    let mut guest = Guest::start().await;
    let container = guest.container(&Function::probe()).await;
    for (then, told) in [("answer", None), ("exit", Some((Kind::Exited, "Runtime.ExitError")))] {
        let event = json!({ "do": "stream", "n": 1, "then": then });
        let mut call = Call::begin(&mut guest, request(&container, event, PATIENCE)).await;
        let end = call.end(|| {}).await;
        assert_eq!(end.error.as_ref().map(|error| (error.kind(), &*error.r#type)), told);
        match told {
            None => assert_eq!(call.bytes + end.payload.len(), MIB),
            Some(_) => assert!(call.bytes > 0 && end.container_ended),
        }
    }
    let container = guest.container(&Function::probe()).await;
    let event = json!({ "do": "stream", "n": 1, "then": "hang" });
    let mut call = Call::begin(&mut guest, request(&container, event, Duration::from_secs(5))).await;
    let end = call.end(|| {}).await;
    assert_eq!(call.bytes, MIB, "all came before the function was killed");
    assert_eq!(failure(&end.error).0, Kind::TimedOut);
    let container = guest.container(&Function::probe()).await;
    let n = (STREAMED_ANSWER_BYTES >> 20) + 1;
    let event = json!({ "do": "stream", "n": n });
    let mut call = Call::begin(&mut guest, request(&container, event, 5 * PATIENCE)).await;
    let end = call.end(|| {}).await;
    assert_eq!(failure(&end.error).0, Kind::ResponseTooLarge);
    assert!(call.bytes <= STREAMED_ANSWER_BYTES);
    // Who does not want a stream has it collected.
    let response = guest.invoke(&container, json!({ "do": "stream", "n": 6 })).await;
    assert_eq!((response.error, response.payload.len()), (None, 6 * MIB));
}

#[tokio::test]
async fn a_stream_that_nobody_reads_waits_alone_and_in_little_memory() {
    let mut guest = Guest::start().await;
    let container = guest.container(&Function::probe()).await;
    let other = guest.container(&Function::probe()).await;
    let before = guest.resident_kib();
    let event = json!({ "do": "stream", "n": 100 });
    let mut call = Call::begin(&mut guest, request(&container, event, PATIENCE)).await;
    // Until the next part may not fit.
    while call.bytes + STREAM_PART_BYTES <= STREAM_WINDOW_BYTES {
        assert_eq!(call.next().await, None);
    }
    let response = guest.invoke(&other, json!({ "do": "echo", "with": 42 })).await;
    assert_eq!(answer(&response), json!(42));
    let mut most = guest.resident_kib();
    call.grant(call.bytes).await;
    let process = &guest;
    let end = call.end(|| most = most.max(process.resident_kib())).await;
    assert_eq!((end.error, call.bytes + end.payload.len()), (None, 100 * MIB));
    println!("100 MiB were streamed: {before} KiB before, at most {most} KiB");
    assert!(most < before + 8 * 1024, "{before} {most}");
}

#[tokio::test]
async fn a_function_whose_agent_leaves_streams_to_its_end() {
    let mut guest = Guest::start().await;
    let container = guest.container(&Function::probe()).await;
    let event = json!({ "do": "stream", "n": 50 });
    let asked = InvokeRequest {
        keep: true,
        ..request(&container, event, PATIENCE)
    };
    let mut call = Call::begin(&mut guest, asked.clone()).await;
    assert_eq!(call.next().await, None);
    drop(call);
    guest.reconnect().await;
    let attached = InvokeRequest { attach: true, ..asked };
    let end = invoke(&mut guest.client, attached).await.unwrap();
    assert!(end.error.is_none() && end.partial, "{end:?}");
    let response = guest.invoke(&container, json!({ "do": "echo", "with": 42 })).await;
    assert_eq!(answer(&response), json!(42));
}
