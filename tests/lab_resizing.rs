//! Functions get, or their accounts are told, the amounts that their executions turn out to need.

#![allow(clippy::indexing_slicing, reason = "a test fails by panicking")]

use anyhow::{Context as _, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use stoker_proto::v1::notification::Kind;
use stoker_proto::v1::{self, resizing::Mode};
use stoker_tests::host::{Host, Options, python_function};
use stoker_tests::{ACCOUNT, PATIENCE, code, eventually};

/// A handler that fills so many MiB, computes for so many seconds of CPU time, and gives all of it back.
const USES: &str = "\
import time
def handler(event, context):
    filled = bytearray(event.get('mib', 0) << 20)
    for page in range(0, len(filled), 4096):
        filled[page] = 1
    end = time.process_time() + event.get('seconds', 0)
    while time.process_time() < end:
        pass
    return len(filled) >> 20
";

/// Machines of two vCPUs with room for a container of the first and of the second amount.
fn options() -> Options {
    Options {
        warming: 0,
        settings: vec![
            ("machines.vcpus", json!(2)),
            ("machines.memory_mib", json!(1024)),
            // Nothing is held back but by amounts.
            ("credits.launch", json!(1000.0)),
            ("account.resizing", json!("advise")),
        ],
    }
}

fn function(id: &str, cpu_millis: u32, resizing: Option<Mode>) -> v1::Function {
    v1::Function {
        amount: Some(v1::Amount {
            cpu_millis,
            memory_mib: 128,
        }),
        resizing: resizing.map(in_mode),
        ..python_function(id)
    }
}

fn in_mode(mode: Mode) -> v1::Resizing {
    v1::Resizing {
        mode: mode.into(),
        ..Default::default()
    }
}

fn name(id: &str) -> String {
    format!("{ACCOUNT}/functions/{id}")
}

/// What it ran with.
fn given(response: &v1::InvokeResponse) -> anyhow::Result<v1::Amount> {
    let placement = response.placement.as_ref().context("a placement")?;
    placement.amount.context("an amount")
}

async fn notifications(host: &Host, parent: String) -> anyhow::Result<Vec<v1::Notification>> {
    let request = v1::ListNotificationsRequest {
        parent,
        ..Default::default()
    };
    Ok(host
        .notifications()
        .list_notifications(request)
        .await?
        .into_inner()
        .notifications)
}

async fn resizes(host: &Host, id: &str) -> anyhow::Result<Vec<v1::FunctionResize>> {
    let request = v1::ListFunctionResizesRequest {
        parent: name(id),
        ..Default::default()
    };
    Ok(host
        .functions()
        .list_function_resizes(request)
        .await?
        .into_inner()
        .resizes)
}

async fn effective(host: &Host, id: &str) -> anyhow::Result<v1::Amount> {
    let request = v1::GetFunctionRequest {
        name: name(id),
        ..Default::default()
    };
    let function = host.functions().get_function(request).await?.into_inner();
    function.effective_amount.context("an amount")
}

#[tokio::test]
async fn where_the_need_for_memory_doubles_one_execution_is_killed_and_the_next_has_more() -> anyhow::Result<()> {
    let host = Host::start(options()).await?;
    host.create(function("grows", 500, Some(Mode::Auto)), &code::python(USES)?)
        .await?;
    for _ in 0..3 {
        let (_, response) = host.answer("grows", &json!({ "mib": 40 })).await?;
        assert_eq!((given(&response)?.memory_mib, response.notification), (128, None));
    }
    // From now on it needs more than it has.
    let killed = host.invoke("grows", &json!({ "mib": 130 })).await?;
    let error: Value = serde_json::from_slice(&killed.payload)?;
    assert_eq!(error["errorType"], "Runtime.OutOfMemory", "{error}");
    let told = killed.notification.context("a notification")?;
    assert!(
        told.applied && told.evidence.is_some_and(|evidence| evidence.memory_killed),
        "{told:?}"
    );
    let second = told.advised.context("what is right")?;
    assert_eq!(second.memory_mib, 256);
    for _ in 0..2 {
        let (answer, response) = host.answer("grows", &json!({ "mib": 130 })).await?;
        assert_eq!((answer, given(&response)?), (json!(130), second));
    }
    // It is told, kept and reported.
    let listed = eventually("it to be kept", async || {
        let listed = notifications(&host, ACCOUNT.to_owned()).await?;
        Ok((!listed.is_empty()).then_some(listed))
    })
    .await?;
    assert_eq!(listed, std::slice::from_ref(&told));
    let history = resizes(&host, "grows").await?;
    assert_eq!((history.len(), history[0].after), (1, Some(second)));
    eventually("it to be reported", async || {
        let reports = host.reports()?;
        let of = |report: &Value| report["notification"]["name"] == told.name;
        Ok(reports.iter().any(of).then_some(()))
    })
    .await?;
    // Also by an agent that starts again, whose machines are another's.
    let host = host.restart(Signal::SIGKILL).await?;
    assert_eq!(effective(&host, "grows").await?, second);
    let (_, response) = host.answer("grows", &json!({ "mib": 130 })).await?;
    assert_eq!(given(&response)?, second);
    host.stop().await?;
    Ok(())
}

#[tokio::test]
async fn one_that_computes_is_advised_to_have_more_and_has_it_once_that_is_wanted() -> anyhow::Result<()> {
    let host = Host::start(options()).await?;
    host.create(function("computes", 250, None), &code::python(USES)?)
        .await?;
    let work = json!({ "seconds": 0.5 });
    let mut watched = host
        .notifications()
        .watch_notifications(v1::WatchNotificationsRequest {
            parent: name("computes"),
            ..Default::default()
        })
        .await?
        .into_inner();
    let call = async || -> anyhow::Result<v1::InvokeResponse> { Ok(host.answer("computes", &work).await?.1) };
    let begun = std::time::Instant::now();
    let told = loop {
        let response = call().await?;
        assert_eq!(given(&response)?.cpu_millis, 250);
        if let Some(told) = response.notification {
            break told;
        }
        ensure!(begun.elapsed() < 5 * PATIENCE, "nothing is told");
    };
    let advised = told.advised.context("what is right")?;
    assert!(
        told.kind() == Kind::IncreaseBy && !told.applied && advised.cpu_millis >= 500,
        "{told:?}"
    );
    let evidence = told.evidence.context("why")?;
    let seconds = |time: Option<prost_types::Duration>| {
        time.map_or(0.0, |time| time.seconds as f64 + f64::from(time.nanos) / 1e9)
    };
    assert!(
        seconds(evidence.throttled_time) > seconds(evidence.wall_time) / 4.0,
        "{evidence:?}"
    );
    assert_eq!(watched.message().await?, Some(told));
    assert_eq!(effective(&host, "computes").await?.cpu_millis, 250);
    // From now on it is done.
    let request = v1::SetResizingRequest {
        name: name("computes"),
        resizing: Some(in_mode(Mode::Auto)),
    };
    host.functions().set_resizing(request).await?;
    let begun = std::time::Instant::now();
    let (mut slow, mut fast) = (None, None);
    while fast.is_none() {
        let response = call().await?;
        let run = seconds(response.latency.and_then(|latency| latency.run));
        match given(&response)?.cpu_millis {
            250 => slow = Some(run),
            cpu_millis => {
                ensure!(cpu_millis >= 500, "{cpu_millis}");
                // The first of a new container has its start too.
                fast = Some(seconds(call().await?.latency.and_then(|latency| latency.run)));
            }
        }
        ensure!(begun.elapsed() < 5 * PATIENCE, "it has what it had");
    }
    let (slow, fast) = (slow.context("how long it took")?, fast.context("how long it takes")?);
    println!("with 250 mCPU {slow:.2} s, then {fast:.2} s");
    assert!(fast < slow * 0.75, "{slow} s, then {fast} s");
    let history = eventually("it to be kept", async || {
        let history = resizes(&host, "computes").await?;
        Ok((!history.is_empty()).then_some(history))
    })
    .await?;
    println!("{}", history[0].detail);
    assert_eq!(history[0].before.map(|before| before.cpu_millis), Some(250));
    // The container of the first amount is gone.
    eventually("one container to be left", async || {
        let containers = host.list_containers().await?;
        Ok((containers.len() == 1).then_some(()))
    })
    .await?;
    host.stop().await?;
    Ok(())
}
