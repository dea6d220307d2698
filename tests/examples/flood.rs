//! What one account's flood does to another's warm calls, in real microVMs. `cargo xtask bench world` runs it, in a host that can
//! run them; it prints one line of JSON. The flood comes from a process of its own, as another customer's does, of nice 19: a
//! customer's own computer would take none of this host's CPU.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde_json::json;
use stoker_proto::v1;
use stoker_proto::v1::invocations_client::InvocationsClient;
use stoker_testkit::permille::permille;
use stoker_tests::code;
use stoker_tests::host::{self, Host, Options};
use tokio::task::JoinSet;
use tonic::transport::Channel;
use tonic::{Code, Status};

/// Calls of the flood, all at once, over so many connections.
const FLOOD: usize = 10_000;
const CONNECTIONS: usize = 10;
/// Calls one after the other that are measured without it; within it they go on to its end.
const ALONE: usize = 300;

const PAYLOAD: &[u8] = br#"{"hello": "world"}"#;
const QUIET: &str = "accounts/quiet/functions/echo";
const LOUD: &str = "accounts/loud/functions/echo";

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    if let Some(socket) = std::env::args_os().nth(1) {
        println!("{}", json!(flood(Path::new(&socket)).await?));
        return Ok(());
    }
    let agent = Host::start(Options {
        warming: 0,
        settings: vec![("pool.warming", json!({ "provided": 2 })), ("log.level", "info".into())],
    })
    .await?;
    let me = std::env::current_exe().context("find this program")?;
    let zip = code::echo()?;
    for name in [QUIET, LOUD] {
        let function = v1::Function {
            name: name.into(),
            runtime: "provided".into(),
            handler: "bootstrap".into(),
            ..Default::default()
        };
        agent.create(function, &zip).await?;
    }
    let socket = agent.folder().join("stokerd.sock");
    let quiet = host::channel(&socket).await?;
    eprintln!("warming");
    // Both are warm.
    for name in [QUIET, LOUD] {
        one_by_one(&quiet, name, |calls| calls < ALONE / 10).await?;
    }
    eprintln!("alone");
    let alone = one_by_one(&quiet, QUIET, |calls| calls < ALONE).await?;
    eprintln!("flooding");
    let mut flood = Command::new("nice")
        .args(["-n", "19"])
        .args([&me, &socket])
        .stdout(Stdio::piped())
        .spawn()?;
    let within = one_by_one(&quiet, QUIET, |_| matches!(flood.try_wait(), Ok(None))).await?;
    let answers = flood.wait_with_output()?;
    ensure!(answers.status.success(), "the flood failed: {}", answers.status);
    let answers: BTreeMap<String, usize> = serde_json::from_slice(&answers.stdout)?;
    let at = |times: &[Duration], of| permille(times, of).unwrap_or_default().as_micros();
    println!(
        "{}",
        json!({
            "alone_p50_us": at(&alone, 500), "alone_p99_us": at(&alone, 990),
            "within_p50_us": at(&within, 500), "within_p99_us": at(&within, 990),
            "within_calls": within.len(), "flood": answers,
        })
    );
    agent.stop().await?;
    Ok(())
}

async fn call(channel: &Channel, name: &str) -> Result<(), Status> {
    let request = v1::InvokeRequest {
        name: name.into(),
        payload: PAYLOAD.into(),
        ..Default::default()
    };
    InvocationsClient::new(channel.clone()).invoke(request).await.map(drop)
}

/// How long each call took, sorted.
async fn one_by_one(
    channel: &Channel,
    name: &str,
    mut more: impl FnMut(usize) -> bool,
) -> anyhow::Result<Vec<Duration>> {
    let mut times = Vec::new();
    while more(times.len()) {
        let began = Instant::now();
        call(channel, name)
            .await
            .with_context(|| format!("call {} of {name}", times.len()))?;
        times.push(began.elapsed());
    }
    ensure!(!times.is_empty(), "nothing was measured");
    times.sort_unstable();
    Ok(times)
}

/// Makes every call at once; how many were answered, and how many refused.
async fn flood(socket: &Path) -> anyhow::Result<BTreeMap<&'static str, usize>> {
    let mut channels = Vec::new();
    for _ in 0..CONNECTIONS {
        channels.push(host::channel(socket).await?);
    }
    let mut calls = JoinSet::new();
    for channel in channels.into_iter().cycle().take(FLOOD) {
        calls.spawn(async move { call(&channel, LOUD).await });
    }
    let mut answers = BTreeMap::new();
    while let Some(answer) = calls.join_next().await {
        let answer = match answer? {
            Ok(()) => "answered",
            Err(status) if status.code() == Code::ResourceExhausted => "refused",
            Err(status) => bail!("a call of the flood failed: {status}"),
        };
        *answers.entry(answer).or_default() += 1;
    }
    Ok(answers)
}
