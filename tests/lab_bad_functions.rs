//! Functions that misbehave, and requests that ask for what can't be: each gets its answer, and the next good request
//! is served.

#![allow(clippy::expect_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use serde_json::json;
use stoker_proto::v1;
use stoker_tests::ACCOUNT;
use stoker_tests::code::{self, ECHO};
use stoker_tests::host::{Host, Options, python_function};
use tonic::Code;

/// A host with a good function, `echo`, that is asked after each thing that goes wrong.
async fn host() -> anyhow::Result<Host> {
    let host = Host::start(Options::default()).await?;
    host.create(python_function("echo"), &code::python(ECHO)?).await?;
    Ok(host)
}

async fn still_serves(host: &Host) -> anyhow::Result<()> {
    let (answer, _) = host.answer("echo", &json!({"still": "there"})).await?;
    assert_eq!(answer["event"], json!({"still": "there"}));
    Ok(())
}

/// Deploys `text` with a timeout and invokes it, which must fail, and sees that the next good request is served; returns
/// the error's type and the whole answer.
async fn fails(host: &Host, id: &str, timeout_s: i64, text: &str) -> anyhow::Result<(String, v1::InvokeResponse)> {
    let timeout = Some(prost_types::Duration {
        seconds: timeout_s,
        nanos: 0,
    });
    host.create(
        v1::Function {
            timeout,
            ..python_function(id)
        },
        &code::python(text)?,
    )
    .await?;
    let response = host.invoke(id, &json!({})).await?;
    assert_eq!(
        response.function_error,
        "Unhandled",
        "{id} must fail: {}",
        String::from_utf8_lossy(&response.payload)
    );
    let error: serde_json::Value = serde_json::from_slice(&response.payload)?;
    let kind = error["errorType"].as_str().unwrap_or_default().to_owned();
    println!("{id}: {error}");
    still_serves(host).await?;
    Ok((kind, response))
}

#[tokio::test]
async fn functions_that_crash() -> anyhow::Result<()> {
    let host = host().await?;
    let (kind, response) = fails(
        &host,
        "init-raises",
        10,
        "print('before the end')\nraise ValueError('at init')\n",
    )
    .await?;
    assert!(kind.contains("ValueError"), "{kind}");
    assert!(
        String::from_utf8_lossy(&response.log).contains("before the end"),
        "the log of init is kept"
    );

    let (kind, _) = fails(&host, "init-exits", 10, "import os\nos._exit(3)\n").await?;
    assert_eq!(kind, "Runtime.ExitError");

    let (kind, _) = fails(
        &host,
        "raises",
        10,
        "def handler(event, context): raise KeyError('in a call')\n",
    )
    .await?;
    assert!(kind.contains("KeyError"), "{kind}");
    let again = host.invoke("raises", &json!({})).await?;
    let place = again.placement.as_ref().map(v1::Placement::source);
    assert_eq!(
        place,
        Some(v1::placement::Source::IdleContainer),
        "an error that was reported leaves the container alive"
    );

    let (kind, _) = fails(
        &host,
        "dies",
        10,
        "import os\ndef handler(event, context): os._exit(9)\n",
    )
    .await?;
    assert_eq!(kind, "Runtime.ExitError");

    let missing = v1::Function {
        handler: "app.nothing".into(),
        ..python_function("no-handler")
    };
    host.create(missing, &code::python("x = 1\n")?).await?;
    let response = host.invoke("no-handler", &json!({})).await?;
    assert_eq!(response.function_error, "Unhandled");
    assert!(String::from_utf8_lossy(&response.payload).contains("HandlerNotFound"));
    still_serves(&host).await?;
    host.stop().await?;
    Ok(())
}

/// As on Lambda, that costs the next call a cold start and nobody an error.
#[tokio::test]
async fn functions_that_end_between_two_calls() -> anyhow::Result<()> {
    let host = host().await?;
    // The runtime client ends when its answer is refused, without asking for another call.
    let ends = "import os\ndef handler(event, context): return 'x' * event['bytes'] or os.getpid()\n";
    host.create(python_function("ends"), &code::python(ends)?).await?;
    let mut processes = Vec::new();
    for _ in 0..4 {
        let response = host.invoke("ends", &json!({ "bytes": 7 << 20 })).await?;
        let error: serde_json::Value = serde_json::from_slice(&response.payload)?;
        assert_eq!(error["errorType"], "Function.ResponseSizeTooLarge");
        let (_, next) = host.answer("ends", &json!({ "bytes": 0 })).await?;
        let container = next.placement.map(|place| place.container);
        assert!(!processes.contains(&container), "{container:?}");
        processes.push(container);
    }
    host.stop().await?;
    Ok(())
}

#[tokio::test]
async fn functions_that_never_end() -> anyhow::Result<()> {
    let host = host().await?;
    let never = "import time\ndef handler(event, context):\n    while True: time.sleep(3600)\n";
    let (kind, _) = fails(&host, "never-answers", 2, never).await?;
    assert_eq!(kind, "Sandbox.Timedout");

    let forks = "import os\ndef handler(event, context):\n    while True:\n        \
                 try: os.fork()\n        except OSError: pass\n";
    let (kind, _) = fails(&host, "forks", 3, forks).await?;
    assert!(
        ["Sandbox.Timedout", "Runtime.OutOfMemory"].contains(&kind.as_str()),
        "{kind}"
    );
    host.stop().await?;
    Ok(())
}

#[tokio::test]
async fn functions_that_take_everything() -> anyhow::Result<()> {
    let host = host().await?;
    let eats = "def handler(event, context):\n    all = []\n    while True: all.append(bytearray(1 << 20))\n";
    let (kind, response) = fails(&host, "eats-memory", 60, eats).await?;
    assert_eq!(kind, "Runtime.OutOfMemory");
    let peak = response.usage.map_or(0, |usage| usage.memory_peak_bytes);
    // Pages of the image that it maps and another has read before count as resident and are not charged to it.
    let mapped = 24 << 20;
    assert!(
        (64 << 20..=(128 << 20) + mapped).contains(&peak),
        "it had 128 MiB and reached {peak} bytes"
    );

    let talks = "def handler(event, context):\n    while True: print('x' * 4096)\n";
    let (kind, response) = fails(&host, "talks", 3, talks).await?;
    assert_eq!(kind, "Sandbox.Timedout");
    assert!(
        response.log_truncated && (255 << 10..=256 << 10).contains(&response.log.len()),
        "{} bytes",
        response.log.len()
    );

    // Most of its 512 MiB is taken without being written, which in the lab takes minutes (see `lab_scratch`).
    let writes = "import os\ndef handler(event, context):\n    with open('/tmp/all', 'wb') as file:\n        \
                  os.posix_fallocate(file.fileno(), 0, 480 << 20)\n        file.seek(480 << 20)\n        \
                  while True: file.write(bytes(1 << 20))\n";
    let (kind, _) = fails(&host, "writes", 60, writes).await?;
    assert!(["OSError", "Runtime.OutOfMemory"].contains(&kind.as_str()), "{kind}");

    let answers = "def handler(event, context): return 'x' * (7 << 20)\n";
    let (kind, _) = fails(&host, "answers-too-much", 60, answers).await?;
    assert!(kind.contains("ResponseSizeTooLarge"), "{kind}");
    host.stop().await?;
    Ok(())
}

#[tokio::test]
async fn requests_that_can_not_be() -> anyhow::Result<()> {
    let host = host().await?;
    let name = format!("{ACCOUNT}/functions/echo");
    let good = v1::InvokeRequest {
        name: name.clone(),
        payload: "{}".into(),
        ..Default::default()
    };

    let mut large = b"\"".to_vec();
    large.resize(6 << 20, b'x');
    large.push(b'"');
    for (what, code, request) in [
        (
            "unknown",
            Code::NotFound,
            v1::InvokeRequest {
                name: format!("{ACCOUNT}/functions/none"),
                ..good.clone()
            },
        ),
        (
            "bad name",
            Code::InvalidArgument,
            v1::InvokeRequest {
                name: "../etc/passwd".into(),
                ..good.clone()
            },
        ),
        (
            "6 MiB and 1 byte",
            Code::InvalidArgument,
            v1::InvokeRequest {
                payload: large.clone().into(),
                ..good.clone()
            },
        ),
        (
            "no JSON",
            Code::InvalidArgument,
            v1::InvokeRequest {
                payload: "{".into(),
                ..good.clone()
            },
        ),
        (
            "more than the host",
            Code::InvalidArgument,
            v1::InvokeRequest {
                amount: Some(v1::Amount {
                    cpu_millis: 500,
                    memory_mib: 1 << 20,
                }),
                ..good.clone()
            },
        ),
        (
            "no memory at all",
            Code::InvalidArgument,
            v1::InvokeRequest {
                amount: Some(v1::Amount {
                    cpu_millis: 500,
                    memory_mib: 0,
                }),
                ..good.clone()
            },
        ),
    ] {
        let status = host.invoke_with(request).await.expect_err(what);
        assert_eq!(status.code(), code, "{what}: {status:?}");
        assert!(!status.message().is_empty());
        still_serves(&host).await?;
    }
    // The largest payload there may be arrives whole.
    large.truncate((6 << 20) - 1);
    large.push(b'"');
    assert_eq!(large.len(), 6 << 20);
    let sizes = "def handler(event, context): return len(event)\n";
    host.create(python_function("sizes"), &code::python(sizes)?).await?;
    let request = v1::InvokeRequest {
        name: format!("{ACCOUNT}/functions/sizes"),
        payload: large.into(),
        ..Default::default()
    };
    let response = host.invoke_with(request).await?;
    assert_eq!(response.payload, ((6 << 20) - 2).to_string());
    host.stop().await?;
    Ok(())
}
