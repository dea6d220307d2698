//! What Prometheus is told, beside what was done through the API.

#![allow(clippy::expect_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use stoker_proto::v1::{self, machine::State};
use stoker_testkit::agent::Setting;
use stoker_tests::code;
use stoker_tests::host::{Host, Options, python_function};
use stoker_tests::metrics::{Metrics, free_address};
use stoker_tests::{ACCOUNT, eventually};
use tonic::Code;

/// Fails, sleeps or answers, as it is told.
const CODE: &str = "
import time

def handler(event, context):
    if event.get('fail'):
        raise ValueError('as the test wants it')
    time.sleep(event.get('sleep', 0))
    return event
";

async fn start(warming: u32, settings: Vec<Setting>) -> anyhow::Result<(Host, SocketAddr)> {
    let address = free_address()?;
    let mut all = vec![("metrics.address", address.to_string().into())];
    all.extend(settings);
    let options = Options { warming, settings: all };
    Ok((Host::start(options).await?, address))
}

/// Metrics, once one of them has a value.
async fn once(address: SocketAddr, name: &str, value: f64) -> anyhow::Result<Metrics> {
    eventually(&format!("{name} to be {value}"), async || {
        let metrics = Metrics::scrape(address).await?;
        Ok((metrics.get(name).ok() == Some(value)).then_some(metrics))
    })
    .await
}

/// What all machines have used of a CPU so far, as the API tells it, in s.
async fn cpu(host: &Host) -> anyhow::Result<f64> {
    let machines = host.list_machines(true).await?;
    let used = machines.iter().filter_map(|machine| machine.usage);
    Ok(used.map(|usage| usage.cpu_ns as f64 / 1e9).sum())
}

fn seconds(duration: Option<prost_types::Duration>) -> f64 {
    let duration = duration.and_then(|duration| Duration::try_from(duration).ok());
    duration.expect("every part of a latency is told").as_secs_f64()
}

#[tokio::test]
async fn invocations_are_counted_as_their_callers_were_told() -> anyhow::Result<()> {
    let (host, address) = start(1, Vec::new()).await?;
    let metrics = once(address, "stoker_machines{state=\"warming\"}", 1.0).await?;
    assert_eq!(metrics.get("stoker_pool_target_machines{runtime=\"python3.11\"}")?, 1.0);
    assert_eq!(
        metrics.get("stoker_pool_warming_machines{runtime=\"python3.11\"}")?,
        1.0
    );
    assert_eq!(metrics.get("stoker_machine_boot_duration_seconds_count")?, 1.0);
    let machines = host.list_machines(false).await?;
    let [machine] = &machines[..] else {
        anyhow::bail!("there is one machine, not {machines:?}");
    };
    let booted = metrics.get("stoker_machine_boot_duration_seconds_sum")?;
    assert!(
        (booted - seconds(machine.boot_duration)).abs() < 1e-6,
        "{booted} {machine:?}"
    );
    assert_eq!(metrics.get("stoker_machines_memory_bytes")?, f64::from(512 << 20));

    host.create(python_function("f"), &code::python(CODE)?).await?;
    host.create(python_function("g"), &code::python(CODE)?).await?;
    // Cold, warm, failing, and cold in the machine that the account has.
    let mut expected: BTreeMap<String, f64> = BTreeMap::new();
    let mut latencies = Vec::new();
    for (id, event) in [
        ("f", json!({})),
        ("f", json!({})),
        ("f", json!({"fail": true})),
        ("g", json!({})),
    ] {
        let response = host.invoke(id, &event).await?;
        let source = response.placement.context("it had a place")?.source();
        let result = match response.function_error.as_str() {
            "" => "success",
            _ => "function_error",
        };
        let source = source.as_str_name().to_lowercase();
        let name = format!("stoker_invocations_total{{result=\"{result}\",source=\"{source}\"}}");
        *expected.entry(name).or_default() += 1.0;
        latencies.push(response.latency.context("it has a latency")?);
    }
    // Not let in.
    let missing = host.invoke("nobody", &json!({})).await.expect_err("there is none");
    assert_eq!(missing.code(), Code::NotFound);
    let wrong = v1::InvokeRequest {
        name: "nobody".into(),
        ..Default::default()
    };
    host.invoke_with(wrong).await.expect_err("that is no name");

    let metrics = Metrics::scrape(address).await?;
    for (name, count) in &expected {
        assert_eq!(metrics.get(name)?, *count, "{name}");
    }
    assert_eq!(expected.len(), 4, "{expected:?}");
    assert_eq!(metrics.sum("stoker_invocations_total"), 4.0);
    assert_eq!(
        metrics.get("stoker_invocation_refusals_total{reason=\"function_not_found\"}")?,
        1.0
    );
    assert_eq!(
        metrics.get("stoker_invocation_refusals_total{reason=\"invalid_argument\"}")?,
        1.0
    );
    assert_eq!(metrics.sum("stoker_invocation_refusals_total"), 2.0);
    let told = |part: fn(&v1::Latency) -> Option<prost_types::Duration>| -> f64 {
        latencies.iter().map(|latency| seconds(part(latency))).sum()
    };
    for (name, sum) in [
        (
            "stoker_invocation_phase_duration_seconds_sum{phase=\"wait\"}",
            told(|latency| latency.machine),
        ),
        (
            "stoker_invocation_phase_duration_seconds_sum{phase=\"code\"}",
            told(|latency| latency.code),
        ),
        (
            "stoker_invocation_phase_duration_seconds_sum{phase=\"init\"}",
            told(|latency| latency.init),
        ),
        (
            "stoker_invocation_phase_duration_seconds_sum{phase=\"run\"}",
            told(|latency| latency.run),
        ),
    ] {
        assert!((metrics.get(name)? - sum).abs() < 1e-6, "{name} {sum}: {metrics:?}");
    }
    let all = metrics.sum("stoker_invocation_duration_seconds_sum");
    assert!((all - told(|latency| latency.total)).abs() < 1e-6, "{all}: {metrics:?}");
    assert_eq!(
        metrics.get("stoker_invocation_duration_seconds_count{source=\"idle_container\"}")?,
        2.0
    );
    assert_eq!(
        metrics.get("stoker_invocation_phase_duration_seconds_count{phase=\"init\"}")?,
        2.0
    );

    // Uses only grow, so that what is told lies between what the API told before and after.
    let before = cpu(&host).await?;
    let metrics = Metrics::scrape(address).await?;
    let used = metrics.get("stoker_machines_cpu_seconds_total")?;
    let after = cpu(&host).await?;
    assert!(
        before > 0.0 && before <= used + 1e-6 && used <= after + 1e-6,
        "{before} {used} {after}"
    );
    // Accounts are charged when threads are, so not yet with what runs at this moment.
    let spent = metrics.get("stoker_credits_spent_cpu_seconds_total")?;
    assert!(spent > 0.0 && spent <= after, "{spent} {after}");
    assert!(metrics.get("stoker_credits_granted_cpu_seconds_total")? > spent);
    assert!(metrics.get("stoker_credits_earned_cpu_seconds_total")? > 0.0);
    let (classes, machines) = (metrics.sum("stoker_credits_machines"), metrics.sum("stoker_machines"));
    assert!((1.0..=machines).contains(&classes), "{classes} of {machines}");
    let (promised, limit) = (
        metrics.get("stoker_credits_baseline_cpus")?,
        metrics.get("stoker_credits_baseline_limit_cpus")?,
    );
    assert!(promised > 0.0 && promised <= limit, "{promised} {limit}");
    assert_eq!(metrics.sum("stoker_credits_errors_total"), 0.0);
    assert!(metrics.get("stoker_machines_resident_memory_bytes")? > f64::from(1 << 20));
    for program in ["sched_switch", "sched_stat_runtime", "rss_stat"] {
        let runs = metrics.get(&format!("stoker_ebpf_runs_total{{program=\"{program}\"}}"))?;
        let time = metrics.get(&format!("stoker_ebpf_run_time_seconds_total{{program=\"{program}\"}}"))?;
        assert!(runs > 0.0 && time > 0.0, "{program}: {runs} runs, {time} s");
    }
    assert_eq!(metrics.sum("stoker_ledger_lost_total"), 0.0);
    assert_eq!(metrics.sum("stoker_database_errors_total"), 0.0);
    for part in [
        "event_loop",
        "machines_use",
        "credits",
        "database",
        "ledger",
        "ebpf",
        "process",
    ] {
        assert_eq!(metrics.get(&format!("stoker_scrape_success{{part=\"{part}\"}}"))?, 1.0);
    }
    let started = metrics.get("process_start_time_seconds")?;
    let now = SystemTime::UNIX_EPOCH.elapsed()?.as_secs_f64();
    let ago = host.started().elapsed().as_secs_f64();
    assert!((now - started - ago).abs() < 5.0, "{started} {ago}");
    host.stop().await?;
    Ok(())
}

#[tokio::test]
async fn who_waits_is_refused_or_loses_its_machine_is_counted() -> anyhow::Result<()> {
    let settings = vec![("account.concurrency", 1.into()), ("account.waiting", 1.into())];
    let (host, address) = start(0, settings).await?;
    host.create(python_function("f"), &code::python(CODE)?).await?;
    let warm = host.invoke("f", &json!({})).await?;
    let placement = warm.placement.context("it had a place")?;
    let call = |event: serde_json::Value| {
        let mut client = host.invocations();
        let request = v1::InvokeRequest {
            name: format!("{ACCOUNT}/functions/f"),
            payload: event.to_string().into(),
            ..Default::default()
        };
        tokio::spawn(async move { client.invoke(request).await })
    };
    // It sleeps until its machine is killed.
    let runs = call(json!({"sleep": 55}));
    once(address, "stoker_containers{state=\"busy\"}", 1.0).await?;
    let waits = call(json!({}));
    let metrics = once(address, "stoker_invocations_waiting", 1.0).await?;
    assert_eq!(metrics.get("stoker_invocations_running")?, 1.0);
    let refused = host.invoke("f", &json!({})).await.expect_err("as many wait as may");
    assert_eq!(refused.code(), Code::ResourceExhausted);
    let request = v1::GetMachineRequest {
        name: placement.machine.clone(),
    };
    let machine = host.machines().get_machine(request).await?.into_inner();
    kill(Pid::from_raw(machine.pid.try_into()?), Signal::SIGKILL)?;
    let lost = runs.await?.expect_err("its machine is gone");
    assert_eq!(lost.code(), Code::Aborted);
    let response = waits.await??.into_inner();
    let elsewhere = response.placement.context("it had a place")?;
    assert_ne!(elsewhere.machine, placement.machine);

    let metrics = Metrics::scrape(address).await?;
    let lost = "stoker_invocations_total{result=\"lost\",source=\"idle_container\"}";
    assert_eq!(metrics.get(lost)?, 1.0);
    assert_eq!(
        metrics.get("stoker_invocation_refusals_total{reason=\"account_queue_full\"}")?,
        1.0
    );
    assert_eq!(metrics.sum("stoker_invocation_refusals_total"), 1.0);
    assert_eq!(metrics.get("stoker_machine_ends_total{reason=\"killed\"}")?, 1.0);
    assert_eq!(metrics.sum("stoker_machine_boot_failures_total"), 0.0);
    assert_eq!(metrics.get("stoker_invocations_waiting")?, 0.0);

    // What an ended machine has used counts on.
    let (before, metrics) = (cpu(&host).await?, Metrics::scrape(address).await?);
    let used = metrics.get("stoker_machines_cpu_seconds_total")?;
    assert!(
        before <= used + 1e-6 && used <= cpu(&host).await? + 1e-6,
        "{before} {used}"
    );
    host.stop().await?;
    Ok(())
}

#[tokio::test]
async fn reports_that_nobody_takes_are_told() -> anyhow::Result<()> {
    let (mut host, address) = start(1, Vec::new()).await?;
    let warm = eventually("a warm machine", async || {
        let machines = host.list_machines(false).await?;
        Ok(machines.into_iter().find(|machine| machine.state() == State::Warming))
    })
    .await?;
    assert_eq!(warm.account, "");
    once(address, "stoker_reports_waiting_bytes", 0.0).await?;
    host.kill_controller();
    let metrics = eventually("reports to wait for some time", async || {
        let metrics = Metrics::scrape(address).await?;
        Ok((metrics.get("stoker_reports_oldest_age_seconds")? > 1.0).then_some(metrics))
    })
    .await?;
    let (waiting, limit) = (
        metrics.get("stoker_reports_waiting_bytes")?,
        metrics.get("stoker_reports_waiting_limit_bytes")?,
    );
    assert!(
        waiting > 0.0 && waiting < limit && limit == f64::from(64 << 20),
        "{waiting} {limit}"
    );
    assert_eq!(metrics.sum("stoker_reports_dropped_total"), 0.0);
    host.stop().await?;
    Ok(())
}
