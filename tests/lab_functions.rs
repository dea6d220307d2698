//! What a function may have beside its code: that it is frozen between calls or not, and layers.

#![allow(clippy::expect_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use serde_json::json;
use stoker_proto::v1;
use stoker_testkit::zip::zip;
use stoker_tests::host::{Host, Options, python_function};
use stoker_tests::{code, eventually};

/// Counts in the background, and answers with how far it is.
const TICKS: &str = "
import threading, time
ticks = 0

def tick():
    global ticks
    while True:
        ticks += 1
        sum(range(10_000))
        time.sleep(0.01)

threading.Thread(target=tick, daemon=True).start()

def handler(event, context):
    return ticks
";

/// CPU time that the container of each of these functions has used, in ns.
async fn used<const N: usize>(host: &Host, functions: [&v1::Function; N]) -> anyhow::Result<[u64; N]> {
    let containers = host.list_containers().await?;
    let used = |function: &v1::Function| {
        let its = containers
            .iter()
            .filter(|container| container.function == function.name);
        its.filter_map(|container| container.usage)
            .map(|usage| usage.cpu_ns)
            .sum()
    };
    Ok(functions.map(used))
}

#[tokio::test]
async fn a_function_is_frozen_between_calls_where_it_does_not_say_otherwise() -> anyhow::Result<()> {
    let host = Host::start(Options::default()).await?;
    let code = code::python(TICKS)?;
    let frozen = host.create(python_function("frozen"), &code).await?;
    let free = v1::Function {
        freeze: Some(false),
        ..python_function("free")
    };
    let free = host.create(free, &code).await?;
    let mut ticks = Vec::new();
    for id in ["frozen", "free"] {
        let (answer, _) = host.answer(id, &json!({})).await?;
        ticks.push(answer.as_u64().expect("a number"));
    }
    // As long as one uses 300 ms of a CPU the other uses nothing.
    let mut since = used(&host, [&frozen, &free]).await?;
    eventually("one to use nothing while the other runs", async || {
        let now = used(&host, [&frozen, &free]).await?;
        if now[0] != since[0] {
            since = now;
        }
        Ok((now[1] >= since[1] + 300_000_000).then_some(()))
    })
    .await?;
    // Both go on.
    for (id, before) in ["frozen", "free"].into_iter().zip(ticks) {
        eventually("it to count on", async || {
            let (answer, _) = host.answer(id, &json!({})).await?;
            Ok(answer.as_u64().filter(|ticks| *ticks > before))
        })
        .await?;
    }
    host.stop().await?;
    Ok(())
}

/// Answers with what it finds in its layers.
const LAYERED: &str = "
import os, subprocess
import common, house

def handler(event, context):
    program = subprocess.run(['greet'], capture_output=True, text=True)
    return {'common': common.FROM, 'house': house.RULE, 'program': program.stdout, 'opt': sorted(os.listdir('/opt'))}
";

#[tokio::test]
async fn layers_are_in_opt_the_later_ones_over_the_earlier() -> anyhow::Result<()> {
    let host = Host::start(Options::default()).await?;
    let code = code::python(LAYERED)?;
    let greet: &[u8] = b"#!/bin/sh\necho hello\n";
    let first = zip(&[
        ("python/common.py", 0o644, b"FROM = 'first'\n"),
        ("bin/greet", 0o755, greet),
    ])?;
    let second = zip(&[
        ("python/common.py", 0o644, b"FROM = 'second'\n"),
        ("python/lib/python3.11/site-packages/house.py", 0o644, b"RULE = 1\n"),
    ])?;
    for (id, layers, common) in [
        ("up", [first.clone(), second.clone()], "second"),
        ("down", [second, first], "first"),
    ] {
        let made = host.create_with(python_function(id), &code, &layers).await?;
        assert_eq!(made.layers.len(), 2);
        let (answer, _) = host.answer(id, &json!({})).await?;
        let expected = json!({ "common": common, "house": 1, "program": "hello\n", "opt": ["bin", "python"] });
        assert_eq!(answer, expected);
    }
    // The handler itself, in a function that holds next to nothing.
    let handler = zip(&[("python/app.py", 0o644, b"def handler(event, context): return event\n")])?;
    let nothing = zip(&[("nothing", 0o644, b"")])?;
    host.create_with(python_function("thin"), &nothing, &[handler]).await?;
    let (answer, _) = host.answer("thin", &json!(7)).await?;
    assert_eq!(answer, json!(7));
    host.stop().await?;
    Ok(())
}
