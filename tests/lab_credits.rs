//! Credits of real machines: they are spent, run out, come back, and outlive agent and eBPF programs.

#![allow(clippy::expect_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};
use stoker_proto::v1::{self, machine_credits::Class};
use stoker_tests::host::{Host, Options, python_function};
use stoker_tests::metrics::{Metrics, free_address};
use stoker_tests::{ACCOUNT, code, eventually};

/// A handler that computes for so many seconds.
const BUSY: &str = "\
import time
def handler(event, context):
    end = time.monotonic() + event
    while time.monotonic() < end:
        pass
    return event
";

/// Machines with one vCPU, of which half is the baseline, with so few credits at their start that half a minute spends them, and
/// that fall to their baseline within as long.
fn options() -> Options {
    Options {
        warming: 0,
        settings: vec![
            ("machines.vcpus", json!(1)),
            ("credits.baseline_percent", json!(50.0)),
            ("credits.launch", json!(0.1)),
            ("credits.low", json!(0.03)),
            ("telemetry.interval", "500ms".into()),
        ],
    }
}

/// A function whose container has all of its machine, so that its share of the credits is all of them too.
fn busy() -> v1::Function {
    let mut function = python_function("busy");
    if let Some(amount) = &mut function.amount {
        amount.cpu_millis = 1000;
    }
    function
}

async fn credits(host: &Host, machine: &str) -> anyhow::Result<v1::MachineCredits> {
    let name = format!("{machine}/credits");
    let request = v1::GetMachineCreditsRequest { name };
    Ok(host.credits().get_machine_credits(request).await?.into_inner())
}

/// Calls until the machine's class is another.
async fn busy_until(host: &Host, machine: &str, class: Class) -> anyhow::Result<v1::MachineCredits> {
    let started = Instant::now();
    loop {
        host.answer("busy", &json!(5)).await?;
        let now = credits(host, machine).await?;
        if now.class() == class {
            return Ok(now);
        }
        anyhow::ensure!(started.elapsed() < 3 * stoker_tests::PATIENCE, "it is {now:?}");
    }
}

/// earned + granted + billed + forgiven + owed = spent + balance + launch + discarded
fn balanced(credits: &v1::MachineCredits) {
    let totals = credits.totals.expect("totals");
    let had = totals.earned + totals.granted + totals.billed + totals.forgiven + credits.owed;
    let has = totals.spent + totals.discarded + credits.balance + credits.launch;
    assert!((had - has).abs() < 1e-6, "{credits:?}");
}

#[tokio::test]
async fn a_machine_that_spent_all_has_its_baseline_and_recovers_when_it_rests() -> anyhow::Result<()> {
    let metrics = free_address()?;
    let mut options = options();
    options.settings.push(("metrics.address", metrics.to_string().into()));
    let host = Host::start(options).await?;
    host.create(busy(), &code::python(BUSY)?).await?;
    let (_, response) = host.answer("busy", &json!(0)).await?;
    let machine = response.placement.context("a placement")?.machine;
    let first = credits(&host, &machine).await?;
    assert_eq!(
        (first.account.as_str(), first.vcpus, first.baseline_millis),
        (ACCOUNT, 1, 500)
    );
    balanced(&first);
    let spent = busy_until(&host, &machine, Class::Exhausted).await?;
    assert_eq!((spent.level, spent.allowed_millis), (0, 500));
    balanced(&spent);
    // It was told how soon it was held back after each level that its balance fell to, the last one among them.
    eventually("it to be held back", async || {
        let told = Metrics::scrape(metrics)
            .await?
            .get("stoker_machine_cpu_delay_seconds_count")?;
        Ok((told >= 1.0).then_some(()))
    })
    .await?;
    // Over some seconds it uses what it may.
    let of = |credits: &v1::MachineCredits| credits.totals.map(|totals| totals.spent * 60.0).unwrap_or_default();
    let (before, begun) = (of(&spent), Instant::now());
    host.answer("busy", &json!(15)).await?;
    let (used, passed) = (
        of(&credits(&host, &machine).await?) - before,
        begun.elapsed().as_secs_f64(),
    );
    assert!((0.4..0.55).contains(&(used / passed)), "{used} s in {passed} s");
    // Each change is known, here and with the controller.
    let why = host.why(&machine).await?;
    let set: Vec<_> = why.iter().filter(|decision| decision.command == "set cpu").collect();
    let last = set.last().context("a decision")?;
    assert_eq!(
        (last.figures["class"].as_str(), last.figures["level"].as_str()),
        ("Exhausted", "0")
    );
    eventually("the controller to hear of it", async || {
        let reports = host.reports()?;
        let batches = reports
            .iter()
            .filter_map(|report| report["decisions"]["decisions"].as_array());
        let heard = batches
            .flatten()
            .any(|decision| decision["command"] == "set cpu" && decision["figures"]["class"] == "Exhausted");
        Ok(heard.then_some(()))
    })
    .await?;
    // Nothing happens in it: the agent settles it when it may have earned enough.
    eventually("it to recover", async || {
        let now = credits(&host, &machine).await?;
        Ok((now.class() == Class::Normal && now.allowed_millis > 500).then_some(()))
    })
    .await?;
    // A grant pays what it owes, and counts at once.
    let request = v1::GrantMachineCreditsRequest {
        name: format!("{machine}/credits"),
        credits: 1000.0,
    };
    host.credits().grant_machine_credits(request).await?;
    eventually("it to come before others", async || {
        Ok((credits(&host, &machine).await?.class() == Class::High).then_some(()))
    })
    .await?;
    // Its end is reported with its account.
    host.stop().await?;
    Ok(())
}

#[tokio::test]
async fn accounts_outlive_the_agent_and_the_programs_that_keep_them() -> anyhow::Result<()> {
    let mut host = Host::start(options()).await?;
    host.create(busy(), &code::python(BUSY)?).await?;
    let (_, response) = host.answer("busy", &json!(2)).await?;
    let machine = response.placement.context("a placement")?.machine;
    let request = v1::UpdateMachineCreditsRequest {
        machine_credits: Some(v1::MachineCredits {
            name: format!("{machine}/credits"),
            baseline_millis: 400,
            ..Default::default()
        }),
        update_mask: Some(prost_types::FieldMask {
            paths: vec!["baseline_millis".into()],
        }),
    };
    let changed = host.credits().update_machine_credits(request).await?.into_inner();
    assert_eq!(changed.baseline_millis, 400);
    for lose_programs in [false, true] {
        let before = credits(&host, &machine).await?;
        balanced(&before);
        if lose_programs {
            // What was written down last is of the last half second; what was used since, its cgroup knows.
            kill(host.pid()?, Signal::SIGKILL)?;
            for entry in std::fs::read_dir("/sys/fs/bpf")? {
                let entry = entry?;
                if entry.file_name().to_string_lossy().starts_with("stoker-") {
                    std::fs::remove_dir_all(entry.path())?;
                }
            }
        }
        host = host.restart(Signal::SIGKILL).await?;
        let after = eventually("its account to be there", async || {
            match credits(&host, &machine).await {
                Ok(credits) => Ok(Some(credits)),
                Err(_) => Ok(None),
            }
        })
        .await?;
        balanced(&after);
        let (had, has) = (before.totals.expect("totals"), after.totals.expect("totals"));
        assert_eq!(had.granted, has.granted, "launch credits are given once");
        assert_eq!(after.baseline_millis, 400, "it is the machine's own");
        assert!(has.earned >= had.earned && has.spent >= had.spent, "{had:?} {has:?}");
        let used_seconds = used(&host, &machine)?;
        let spent_seconds = has.spent * 60.0;
        assert!(
            spent_seconds <= used_seconds + 0.5,
            "{spent_seconds} s of {used_seconds} s"
        );
        assert!(
            spent_seconds >= used_seconds * 0.98 - 0.5,
            "{spent_seconds} s of {used_seconds} s"
        );
    }
    host.answer("busy", &json!(1)).await?;
    host.stop().await?;
    Ok(())
}

/// What a machine's cgroup has used, in s.
fn used(host: &Host, machine: &str) -> anyhow::Result<f64> {
    let id = machine.trim_start_matches("machines/");
    let cgroups = host.machine_cgroups()?;
    let cgroup = cgroups
        .iter()
        .find(|cgroup| cgroup.path().ends_with(id))
        .context("its cgroup")?;
    let micros = cgroup.keyed_number("cpu.stat", "usage_usec").context("its use")?;
    Ok(Duration::from_micros(micros).as_secs_f64())
}

#[tokio::test]
async fn a_host_that_lost_its_power_reports_the_last_of_its_machines_accounts() -> anyhow::Result<()> {
    let mut host = Host::start(options()).await?;
    host.create(busy(), &code::python(BUSY)?).await?;
    let (_, response) = host.answer("busy", &json!(3)).await?;
    let machine = response.placement.context("a placement")?.machine;
    let spent = |credits: &v1::MachineCredits| credits.totals.map(|totals| totals.spent).unwrap_or_default();
    let before = credits(&host, &machine).await?;
    assert!(spent(&before) > 0.0);
    eventually("what it spent to be written down", async || {
        let text = std::fs::read_to_string(host.folder().join("store/credits.json")).unwrap_or_default();
        let all: Value = serde_json::from_str(&text).unwrap_or_default();
        let account = &all["machines"][machine.trim_start_matches("machines/")]["account"];
        let written = account["totals"]["spent"]["low"].as_f64().unwrap_or_default() / 6e13;
        Ok((written >= spent(&before)).then_some(()))
    })
    .await?;
    let owner = std::fs::read(host.folder().join("code/owner.json"))?;
    let owner: Value = serde_json::from_slice(&owner)?;
    let id = owner["host"].as_str().context("the host's id")?.to_owned();
    host = host.reboot(id).await?;
    let lost = eventually("its end to be told", async || {
        let all = host.list_machines(true).await?;
        Ok(all
            .into_iter()
            .find(|ended| ended.name == machine && ended.end.is_some()))
    })
    .await?;
    let last = lost.credits.context("its account")?;
    assert!(spent(&last) >= spent(&before));
    balanced(&last);
    host.stop().await?;
    Ok(())
}
