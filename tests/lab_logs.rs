//! What functions write, kept on the host and read through the API.

#![allow(clippy::expect_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::process::Command;

use anyhow::{Context as _, ensure};
use nix::sys::signal::Signal;
use serde_json::json;
use stoker_proto::v1;
use stoker_tests::host::{Host, Options, python_function};
use stoker_tests::{ACCOUNT, PATIENCE, binary, code, eventually};
use tonic::{Code, Streaming};

/// Writes at its init, in each call, and shortly after it.
const WRITES: &str = r#"
import threading
print("importing")

def handler(event, context):
    print("handling", event)
    threading.Timer(0.05, print, ["between the calls after", event]).start()
    return event
"#;

async fn open(host: &Host, request: v1::ReadLogsRequest) -> anyhow::Result<Streaming<v1::ReadLogsResponse>> {
    Ok(host.logs().read_logs(request).await?.into_inner())
}

/// All that there is now.
async fn read(host: &Host, request: v1::ReadLogsRequest) -> anyhow::Result<Vec<v1::LogLine>> {
    let mut stream = open(host, request).await?;
    let mut all = Vec::new();
    while let Some(part) = stream.message().await? {
        all.extend(part.lines);
    }
    Ok(all)
}

fn of(name: &str) -> v1::ReadLogsRequest {
    v1::ReadLogsRequest {
        name: name.to_owned(),
        ..Default::default()
    }
}

/// Waits until an invocation's last line is there; all that are there then.
async fn reported(host: &Host, name: &str, request_id: &str) -> anyhow::Result<Vec<v1::LogLine>> {
    let last = format!("REPORT RequestId: {request_id}\t");
    eventually("an invocation's report", async || {
        let lines = read(host, of(name)).await?;
        Ok(lines.iter().any(|line| line.text.starts_with(&last)).then_some(lines))
    })
    .await
}

/// The next line of a stream that fits.
async fn next(
    stream: &mut Streaming<v1::ReadLogsResponse>,
    fits: impl Fn(&v1::LogLine) -> bool,
) -> anyhow::Result<v1::LogLine> {
    let found = async {
        while let Some(part) = stream.message().await? {
            if let Some(line) = part.lines.into_iter().find(|line| fits(line)) {
                return Ok(line);
            }
        }
        anyhow::bail!("the stream ended")
    };
    tokio::time::timeout(PATIENCE, found).await.context("no such line")?
}

fn texts<'a>(lines: &'a [v1::LogLine], request_id: &str) -> Vec<&'a str> {
    let of_it = lines.iter().filter(|line| line.request_id == request_id);
    of_it.map(|line| line.text.as_str()).collect()
}

#[tokio::test]
async fn what_functions_write_is_kept_for_their_accounts() -> anyhow::Result<()> {
    let mut host = Host::start(Options::default()).await?;
    let mine = format!("{ACCOUNT}/functions/writes");
    let stranger = "accounts/umbrella/functions/writes".to_owned();
    for name in [&mine, &stranger] {
        let function = v1::Function {
            name: name.clone(),
            ..python_function("writes")
        };
        host.create(function, &code::python(WRITES)?).await?;
    }
    assert!(read(&host, of(&mine)).await?.is_empty());
    let invoke = async |host: &Host, name: &str, payload: &str| {
        let request = v1::InvokeRequest {
            name: name.to_owned(),
            payload: json!(payload).to_string().into(),
            ..Default::default()
        };
        let response = host.invoke_with(request).await?;
        ensure!(response.function_error.is_empty(), "{response:?}");
        Ok(response.request_id)
    };

    // Init and a call, in Lambda's format; nothing of another account's.
    let first = invoke(&host, &mine, "mine").await?;
    let others = invoke(&host, &stranger, "another's").await?;
    let lines = reported(&host, &mine, &first).await?;
    let theirs = reported(&host, &stranger, &others).await?;
    let init = texts(&lines, "");
    assert!(
        init[0].starts_with("INIT_START Runtime Version: python:3.11"),
        "{init:?}"
    );
    assert_eq!(init[1], "importing");
    let mut of_first = texts(&lines, &first);
    // On a slow host it may not be answered by then.
    of_first.retain(|text| !text.starts_with("between"));
    assert_eq!(of_first.len(), 4, "{of_first:?}");
    assert_eq!(of_first[0], format!("START RequestId: {first} Version: $LATEST"));
    assert_eq!(of_first[1], "handling mine");
    assert_eq!(of_first[2], format!("END RequestId: {first}"));
    assert!(
        of_first[3].contains("\tBilled Duration: ") && of_first[3].contains("\tInit Duration: "),
        "{of_first:?}"
    );
    let is_foreign = |line: &v1::LogLine| line.text.contains("another's") || line.request_id == others;
    assert!(!lines.iter().any(is_foreign), "{lines:?}");
    assert!(theirs.iter().any(is_foreign) && !theirs.iter().any(|line| line.text.contains("mine")));

    // What runs on after an answer, before it is frozen. A host that is slow may freeze it first: then it is tried again.
    eventually("a line between two calls", async || {
        let request = invoke(&host, &mine, "more").await?;
        let lines = reported(&host, &mine, &request).await?;
        let between = |text: &&str| text.starts_with("between the calls after");
        Ok(texts(&lines, "").iter().any(between).then_some(()))
    })
    .await?;

    // Who follows has new lines as they come, and only those that are asked for.
    let mut following = open(
        &host,
        v1::ReadLogsRequest {
            follow: true,
            last_lines: 1,
            ..of(&mine)
        },
    )
    .await?;
    let followed = invoke(&host, &mine, "followed").await?;
    let line = next(&mut following, |line| line.request_id == followed).await?;
    assert_eq!(line.text, format!("START RequestId: {followed} Version: $LATEST"));
    drop(following);
    reported(&host, &mine, &followed).await?;
    let one = v1::ReadLogsRequest {
        request_id: followed.clone(),
        last_lines: 3,
        ..of(&mine)
    };
    let one = read(&host, one).await?;
    assert_eq!((one.len(), one[0].text.as_str()), (3, "handling followed"));

    // An agent that is killed loses nothing that was kept, and the next one goes on with what is warm.
    let before = read(&host, of(&mine)).await?;
    host = host.restart(Signal::SIGKILL).await?;
    assert_eq!(read(&host, of(&mine)).await?[..before.len()], before);
    let again = invoke(&host, &mine, "again").await?;
    let after = reported(&host, &mine, &again).await?;
    assert_eq!(texts(&after, &again)[1], "handling again");
    let inits = |lines: &[v1::LogLine]| lines.iter().filter(|line| line.text.starts_with("INIT_START")).count();
    assert_eq!(inits(&after), inits(&before), "the same container");

    // As people read it.
    let socket = host.folder().join("stokerd.sock");
    let mut command = Command::new(binary("stoker")?);
    command
        .arg("--socket")
        .arg(&socket)
        .args(["logs", &mine, "--request-id", &again, "--lines", "3"]);
    let shown = tokio::task::spawn_blocking(move || command.output()).await??;
    let shown = String::from_utf8(shown.stdout)?;
    let first_line = shown.lines().next().context("a line")?;
    ensure!(first_line.ends_with(&format!("Z {again} handling again")), "{shown}");

    // It goes with the function.
    let kept = host.folder().join("store/logs/acme");
    assert!(kept.exists(), "{}", kept.display());
    let request = v1::DeleteFunctionRequest { name: mine.clone() };
    host.functions().delete_function(request).await?;
    eventually("its files to be gone", async || Ok((!kept.exists()).then_some(()))).await?;
    let gone = host
        .logs()
        .read_logs(of(&mine))
        .await
        .expect_err("there is no such function");
    assert_eq!(gone.code(), Code::NotFound);
    host.stop().await?;
    Ok(())
}

/// A call that ends badly says how, and one that writes without end loses what is too much and its report stays.
#[tokio::test]
async fn what_goes_wrong_is_in_the_log() -> anyhow::Result<()> {
    let host = Host::start(Options::default()).await?;
    let source = "\
import os
def handler(event, context):
    if event == 'exit':
        os._exit(3)
    for n in range(30_000):
        print('x' * 99)
    print('the end')
";
    host.create(python_function("fails"), &code::python(source)?).await?;
    let name = format!("{ACCOUNT}/functions/fails");
    let written = host.invoke("fails", &json!("write")).await?;
    assert!(written.log_truncated);
    let log = String::from_utf8_lossy(&written.log);
    assert!(
        log.contains(" bytes are missing here]\n") && log.ends_with("the end\n"),
        "{}",
        log.len()
    );
    let lines = reported(&host, &name, &written.request_id).await?;
    let lost: u64 = lines.iter().map(|line| line.lost_bytes).sum();
    let of_it = texts(&lines, &written.request_id);
    let kept: u64 = of_it
        .iter()
        .filter(|text| text.len() == 99)
        .map(|text| text.len() as u64 + 1)
        .sum();
    // What was written last may be among what is lost.
    let end = if of_it.contains(&"the end") { 0 } else { 8 };
    assert_eq!(lost + kept, 3_000_000 + end, "each byte is kept or told as missing");

    let exited = host.invoke("fails", &json!("exit")).await?;
    let lines = reported(&host, &name, &exited.request_id).await?;
    let of_it = texts(&lines, &exited.request_id);
    let report = of_it.last().context("a report")?;
    assert!(
        report.ends_with("\tStatus: error\tError Type: Runtime.ExitError"),
        "{of_it:?}"
    );
    assert!(of_it.contains(&"Runtime.ExitError"), "{of_it:?}");
    host.stop().await?;
    Ok(())
}
