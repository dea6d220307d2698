//! Answers that are streamed: as they come, no faster than they are read, and to their end, however that is.

#![allow(clippy::expect_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use anyhow::{Context as _, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use stoker_proto::v1;
use stoker_proto::v1::container::State;
use stoker_proto::v1::invoke_with_response_stream_response::Event;
use stoker_tests::code::{self, ECHO};
use stoker_tests::host::{Host, Options, python_function};
use stoker_tests::{ACCOUNT, eventually};
use tonic::{Code, Status, Streaming};

const MIB: usize = 1 << 20;
/// More than lies between a function and a caller who does not read.
const LARGE: usize = 8 * MIB;
/// What would be seen if the agent kept it.
const LONG: usize = 40 * MIB;

/// A host with a function that streams, and a Python one that does not.
async fn host() -> anyhow::Result<Host> {
    let host = Host::start(Options::default()).await?;
    let function = v1::Function {
        runtime: "provided".into(),
        handler: "bootstrap".into(),
        timeout: Some(prost_types::Duration { seconds: 120, nanos: 0 }),
        ..python_function("streams")
    };
    host.create(function.clone(), &code::streams()?).await?;
    let impatient = v1::Function {
        name: format!("{ACCOUNT}/functions/impatient"),
        timeout: Some(prost_types::Duration { seconds: 10, nanos: 0 }),
        ..function
    };
    host.create(impatient, &code::streams()?).await?;
    host.create(python_function("echo"), &code::python(ECHO)?).await?;
    Ok(host)
}

fn request(id: &str, payload: &Value) -> v1::InvokeRequest {
    v1::InvokeRequest {
        name: format!("{ACCOUNT}/functions/{id}"),
        payload: payload.to_string().into(),
        ..Default::default()
    }
}

/// Parts of 64 KiB of so many bytes in all.
fn large(bytes: usize, end: &str) -> Value {
    json!({ "parts": bytes >> 16, "bytes": 64 << 10, "end": end })
}

/// What a caller hears.
struct Heard {
    events: Streaming<v1::InvokeWithResponseStreamResponse>,
    bytes: usize,
}

impl Heard {
    async fn of(host: &Host, request: v1::InvokeRequest) -> anyhow::Result<Self> {
        let mut events = host.stream(request).await?;
        let first = events.message().await?.context("a message")?;
        let Some(Event::Head(head)) = first.event else {
            anyhow::bail!("no head: {first:?}")
        };
        ensure!(!head.request_id.is_empty(), "it has a request id");
        Ok(Self { events, bytes: 0 })
    }

    async fn event(&mut self) -> Result<Event, Status> {
        let event = self.events.message().await?.and_then(|message| message.event);
        Ok(event.expect("each message says something, and the last that it is over"))
    }

    async fn chunk(&mut self) -> anyhow::Result<Vec<u8>> {
        match self.event().await? {
            Event::Chunk(chunk) => {
                ensure!(!chunk.is_empty() && chunk.len() <= 64 << 10, "{} bytes", chunk.len());
                self.bytes += chunk.len();
                Ok(chunk.to_vec())
            }
            other => anyhow::bail!("no chunk: {other:?}"),
        }
    }

    /// Reads on to the end.
    async fn end(&mut self) -> anyhow::Result<v1::InvokeComplete> {
        loop {
            match self.event().await? {
                Event::Chunk(chunk) => self.bytes += chunk.len(),
                Event::Complete(complete) => {
                    ensure!(self.events.message().await?.is_none(), "it is the last");
                    return Ok(complete);
                }
                Event::Head(head) => anyhow::bail!("a second head: {head:?}"),
            }
        }
    }
}

fn kind(complete: &v1::InvokeComplete) -> anyhow::Result<String> {
    ensure!(complete.function_error == "Unhandled", "it must fail: {complete:?}");
    let error: Value = serde_json::from_slice(&complete.error)?;
    Ok(error["errorType"].as_str().unwrap_or_default().to_owned())
}

/// The containers that run an invocation.
async fn busy(host: &Host) -> anyhow::Result<Vec<String>> {
    let containers = host.list_containers().await?.into_iter();
    let busy = containers.filter(|container| container.state() == State::Busy);
    Ok(busy.map(|container| container.name).collect())
}

async fn none_is_busy(host: &Host) -> anyhow::Result<()> {
    eventually("no container to be busy", async || {
        Ok(busy(host).await?.is_empty().then_some(()))
    })
    .await
}

#[tokio::test]
async fn the_first_bytes_come_while_the_function_runs() -> anyhow::Result<()> {
    let host = host().await?;
    let asked = json!({ "parts": 1, "bytes": 5, "end": "hang" });
    let mut heard = Heard::of(&host, request("impatient", &asked)).await?;
    assert_eq!(heard.chunk().await?, b"aaaaa");
    assert_eq!(
        busy(&host).await?.len(),
        1,
        "what has told this hangs until it is killed"
    );
    assert_eq!(kind(&heard.end().await?)?, "Sandbox.Timedout");
    none_is_busy(&host).await?;

    let asked = json!({ "parts": 30, "bytes": 100, "end": "answer" });
    let letters: Vec<u8> = (0..30).flat_map(|part| [b'a' + part % 26; 100]).collect();
    let mut heard = Heard::of(&host, request("streams", &asked)).await?;
    let mut all = Vec::new();
    while all.len() < letters.len() {
        all.extend_from_slice(&heard.chunk().await?);
    }
    assert_eq!(all, letters);
    let complete = heard.end().await?;
    assert_eq!(complete.function_error, "");
    assert!(complete.placement.is_some() && complete.latency.is_some() && complete.usage.is_some());

    // Without a stream the same answer comes at once, and with one an answer that is not streamed comes too.
    let whole = host.invoke_with(request("streams", &asked)).await?;
    assert_eq!((&whole.payload[..], whole.function_error.as_str()), (&letters[..], ""));
    let mut heard = Heard::of(&host, request("echo", &json!({ "a": 1 }))).await?;
    let answer: Value = serde_json::from_slice(&heard.chunk().await?)?;
    assert_eq!(answer["event"], json!({ "a": 1 }));
    let complete = heard.end().await?;
    assert!(
        String::from_utf8_lossy(&complete.log).contains("echo of"),
        "{complete:?}"
    );
    host.stop().await?;
    Ok(())
}

#[tokio::test]
async fn who_reads_slowly_keeps_nobody_else_waiting() -> anyhow::Result<()> {
    let host = host().await?;
    // Of the same runtime, so that both run in one machine.
    let asked = json!({ "parts": 1, "bytes": 5, "end": "answer" });
    host.invoke_with(request("impatient", &asked)).await?;
    let mut slow = Heard::of(&host, request("streams", &large(LARGE, "answer"))).await?;
    slow.chunk().await?;
    let runs = busy(&host).await?;
    for _ in 0..3 {
        let response = host.invoke_with(request("impatient", &asked)).await?;
        assert_eq!(response.payload, b"aaaaa"[..]);
        let machine = response.placement.context("a placement")?.machine;
        assert!(runs[0].starts_with(&format!("{machine}/")), "both run in one machine");
    }
    assert_eq!(busy(&host).await?, runs, "it can't end unread");
    let complete = slow.end().await?;
    assert_eq!((slow.bytes, complete.function_error.as_str()), (LARGE, ""));
    host.stop().await?;
    Ok(())
}

#[tokio::test]
async fn a_stream_that_ends_badly_says_so_behind_what_came() -> anyhow::Result<()> {
    let host = host().await?;
    for (end, expected) in [
        ("fail", "Broke"),
        ("break", "Runtime.TruncatedResponse"),
        ("exit", "Runtime.ExitError"),
    ] {
        let mut heard = Heard::of(&host, request("streams", &large(LARGE, end))).await?;
        heard.chunk().await?;
        let complete = heard.end().await?;
        assert_eq!(kind(&complete)?, expected);
        println!("{end}: {} bytes came before", heard.bytes);
        if end == "fail" {
            assert_eq!(heard.bytes, LARGE);
        }
    }
    host.stop().await?;
    Ok(())
}

#[tokio::test]
async fn a_function_whose_caller_leaves_runs_to_its_end() -> anyhow::Result<()> {
    let host = host().await?;
    let asked = v1::InvokeRequest {
        request_id: "left".into(),
        ..request("streams", &large(LARGE, "answer"))
    };
    let mut heard = Heard::of(&host, asked.clone()).await?;
    heard.chunk().await?;
    drop(heard);
    none_is_busy(&host).await?;
    let invocations = async || {
        let containers = host.list_containers().await?;
        anyhow::Ok(containers.iter().map(|container| container.invocations).sum::<u64>())
    };
    let before = invocations().await?;
    let again = [
        host.invoke_with(asked.clone()).await.map(drop),
        host.stream(asked).await.map(drop),
    ];
    for answer in again {
        let status = answer.expect_err("its answer is not kept");
        assert_eq!(status.code(), Code::Aborted, "{status:?}");
        assert!(status.message().contains("streamed"), "{status:?}");
    }
    assert_eq!(invocations().await?, before, "it is not run again");
    host.stop().await?;
    Ok(())
}

#[tokio::test]
async fn a_stream_is_lost_with_its_agent_and_the_function_runs_to_its_end() -> anyhow::Result<()> {
    let host = host().await?;
    let asked = v1::InvokeRequest {
        request_id: "lost".into(),
        ..request("streams", &large(LARGE, "answer"))
    };
    let mut heard = Heard::of(&host, asked.clone()).await?;
    heard.chunk().await?;
    let runs = busy(&host).await?;
    let host = host.restart(Signal::SIGKILL).await?;
    heard.end().await.expect_err("its agent is gone");
    let status = host.invoke_with(asked).await.expect_err("its answer is not kept");
    assert_eq!(status.code(), Code::Aborted, "{status:?}");
    assert!(status.message().contains("streamed"), "{status:?}");
    let next = host.invoke_with(request("streams", &large(MIB, "answer"))).await?;
    assert_eq!((next.payload.len(), next.function_error.as_str()), (MIB, ""));
    assert_eq!(
        next.placement.context("a placement")?.container,
        runs[0],
        "it is as it was"
    );
    host.stop().await?;
    Ok(())
}

#[tokio::test]
async fn a_long_stream_takes_little_memory() -> anyhow::Result<()> {
    let host = host().await?;
    Heard::of(&host, request("streams", &large(MIB, "answer")))
        .await?
        .end()
        .await?;
    let pid = u32::try_from(host.pid()?.as_raw())?;
    let resident = || stoker_linux::memory::resident(pid).context("the agent's memory");
    let (before, mut most) = (resident()?, 0);
    let mut heard = Heard::of(&host, request("streams", &large(LONG, "answer"))).await?;
    while heard.bytes < LONG - MIB {
        heard.chunk().await?;
        most = most.max(resident()?);
    }
    let complete = heard.end().await?;
    assert_eq!((heard.bytes, complete.function_error.as_str()), (LONG, ""));
    println!("the agent: {} KiB before, at most {} KiB", before >> 10, most >> 10);
    assert!(most < before + 16 * MIB as u64, "{before} {most}");
    host.stop().await?;
    Ok(())
}
