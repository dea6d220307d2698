//! Node.js, on the client of the Runtime API that AWS publishes: a `provided` function that brings both, as its author packs it.

#![allow(clippy::expect_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use anyhow::Context as _;
use serde_json::{Value, json};
use stoker_proto::v1;
use stoker_proto::v1::invoke_with_response_stream_response::Event;
use stoker_tests::host::{Host, Options, python_function};
use stoker_tests::{ACCOUNT, cache};

/// A function with this handler of `node/index.mjs`.
fn function(id: &str, handler: &str) -> v1::Function {
    v1::Function {
        runtime: "provided".into(),
        handler: handler.into(),
        ..python_function(id)
    }
}

/// Invokes one that streams, and takes all that it answers.
async fn streamed(host: &Host, id: &str, payload: &Value) -> anyhow::Result<Vec<u8>> {
    let mut events = host
        .stream(v1::InvokeRequest {
            name: format!("{ACCOUNT}/functions/{id}"),
            payload: payload.to_string().into(),
            ..Default::default()
        })
        .await?;
    let mut answer = Vec::new();
    while let Some(message) = events.message().await? {
        match message.event.context("each message says something")? {
            Event::Head(_) => {}
            Event::Chunk(chunk) => answer.extend(chunk),
            Event::Complete(complete) => anyhow::ensure!(complete.function_error.is_empty(), "{complete:?}"),
        }
    }
    Ok(answer)
}

#[tokio::test]
async fn aws_lambda_ric_runs_unmodified() -> anyhow::Result<()> {
    let host = Host::start(Options::default()).await?;
    let code = std::fs::read(cache("node/function.zip")?).context("read what `cargo xtask test` makes")?;
    host.create(function("node", "index.handler"), &code).await?;
    for calls in 1..=2 {
        let (answer, response) = host.answer("node", &json!({ "n": calls })).await?;
        assert_eq!(answer["event"], json!({ "n": calls }));
        assert_eq!(answer["calls"], calls, "in one process");
        assert_eq!(answer["request"], response.request_id);
        assert_eq!(
            (&answer["function"], &answer["version"]),
            (&json!("node"), &json!("$LATEST"))
        );
        assert_eq!(answer["arn"], "arn:aws:lambda:us-east-1:acme:function:node");
        assert_eq!(answer["memory"], "128");
        let stream = answer["stream"].as_str().context("a log stream")?;
        assert!(stream.contains("[$LATEST]"), "{stream}");
        let remaining = answer["remaining"].as_u64().context("a time in ms")?;
        assert!(remaining > 0 && remaining <= 60_000, "{remaining}");
        let log = String::from_utf8_lossy(&response.log);
        assert!(log.contains(&format!("called with {{ n: {calls} }}")), "{log}");
    }
    // An error is its own, and its process goes on.
    let failed = host.invoke("node", &json!({ "fail": "on purpose" })).await?;
    let error: Value = serde_json::from_slice(&failed.payload)?;
    assert_eq!(failed.function_error, "Unhandled");
    assert_eq!(
        (&error["errorType"], &error["errorMessage"]),
        (&json!("TypeError"), &json!("on purpose"))
    );
    assert_eq!(host.answer("node", &json!({})).await?.0["calls"], 4);
    // The same code, streaming.
    host.create(function("streams", "index.streaming"), &code).await?;
    assert_eq!(streamed(&host, "streams", &json!({ "parts": 5 })).await?, b"0 1 2 3 4 ");
    host.stop().await?;
    Ok(())
}
