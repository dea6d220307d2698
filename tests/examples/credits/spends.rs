//! A machine whose credits run out, with nothing else on the host and beside eight that compute: how soon after each level that its
//! balance falls to it is held back accordingly, as the agent measures it from the time of the kernel's ledger
//! (`stoker_machine_cpu_delay_seconds`), and how much it has of the CPUs once all is spent, as its cgroup counts it.

use std::time::{Duration, Instant};

use anyhow::ensure;
use serde_json::json;
use stoker_proto::v1::machine_credits::Class;
use stoker_tests::PATIENCE;
use stoker_tests::metrics::Metrics;

use super::fleet::{BASELINE, Fleet, call, called};

/// What it has to spend, in credits: more than it takes for full speed.
const TOP: f64 = 0.05;

/// How long it computes at a time.
const BURN: Duration = Duration::from_secs(1);

/// For how long what it uses is watched, the part of it that each window is, and how often it is looked.
const WATCH: Duration = Duration::from_secs(25);
const WINDOW: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(100);

const DELAY: &str = "stoker_machine_cpu_delay_seconds";

/// Changes that were late by so much are too late, in s.
const LATE: &str = "0.002";

/// Has it spend all so often in both ways, and prints what came out.
pub(super) async fn measure(fleet: &Fleet, times: u32) -> anyhow::Result<()> {
    let before = Delays::now(fleet).await?;
    for time in 1..=times {
        eprintln!("spending all, alone: {time} of {times}");
        spend(fleet).await?;
    }
    let alone = Delays::now(fleet).await?;
    println!("{}", alone.since(&before)?.line("alone"));
    for hog in &fleet.hogs {
        fleet.top_up(hog, 3.0).await?;
    }
    let hogs = fleet.run_hogs().await?;
    for time in 1..=times {
        eprintln!("spending all, beside others: {time} of {times}");
        spend(fleet).await?;
    }
    println!("{}", Delays::now(fleet).await?.since(&alone)?.line("beside others"));
    eprintln!("having its baseline");
    let shares = watch(fleet).await?;
    hogs.end().await?;
    let of = |pick: fn(f64, f64) -> f64| shares.iter().copied().reduce(pick).unwrap_or(f64::NAN);
    println!(
        "{}",
        json!({ "baseline": { "windows": shares.len(), "least": of(f64::min), "most": of(f64::max) } })
    );
    Ok(())
}

/// It computes until all is spent.
async fn spend(fleet: &Fleet) -> anyhow::Result<()> {
    let it = &fleet.spender;
    fleet.top_up(it, TOP).await?;
    let order = json!({ "do": "hog", "turns": fleet.turns, "ms": BURN.as_millis() as u64 });
    let start = Instant::now();
    while fleet.credits(it).await?.class() != Class::Exhausted {
        ensure!(
            start.elapsed() < PATIENCE,
            "it does not spend all it has: {:?}",
            fleet.credits(it).await?
        );
        let (_, response) = call(&fleet.host, &it.function, &order).await?;
        it.is_answered_by(&response)?;
    }
    Ok(())
}

/// What it uses while it computes without pause, of its baseline, in each window of those that there are.
async fn watch(fleet: &Fleet) -> anyhow::Result<Vec<f64>> {
    let it = &fleet.spender;
    let time = WATCH + Duration::from_secs(2);
    let order = json!({ "do": "hog", "turns": fleet.turns, "ms": time.as_millis() as u64 });
    let call = called(&fleet.host, &it.function, &order);
    // Its call has come, and what it saved within a period is spent.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (start, mut seen) = (Instant::now(), Vec::new());
    while start.elapsed() < WATCH {
        seen.push((start.elapsed(), it.vcpus_used()?));
        tokio::time::sleep(LOOK).await;
    }
    ensure!(!call.is_finished(), "it does not compute any more");
    let is = fleet.credits(it).await?;
    ensure!(is.class() == Class::Exhausted, "it is not held to its baseline: {is:?}");
    let (_, response) = call.await??;
    it.is_answered_by(&response)?;
    let shares = seen.iter().filter_map(|(at, used)| {
        let (then, used_then) = seen.iter().find(|(then, _)| *then >= *at + WINDOW)?;
        let share = (*used_then - *used).as_secs_f64() / (*then - *at).as_secs_f64();
        Some(share / (f64::from(BASELINE) / 1000.0))
    });
    Ok(shares.collect())
}

/// How late the agent was with changes so far.
struct Delays {
    changes: f64,
    in_time: f64,
    sum_s: f64,
}

impl Delays {
    async fn now(fleet: &Fleet) -> anyhow::Result<Self> {
        let metrics = Metrics::scrape(fleet.metrics).await?;
        let get = |name: String| metrics.get(&name);
        Ok(Self {
            changes: get(format!("{DELAY}_count"))?,
            in_time: get(format!("{DELAY}_bucket{{le=\"{LATE}\"}}"))?,
            sum_s: get(format!("{DELAY}_sum"))?,
        })
    }

    fn since(&self, before: &Self) -> anyhow::Result<Self> {
        ensure!(
            self.changes > before.changes,
            "the agent tells of no machine that was held back"
        );
        Ok(Self {
            changes: self.changes - before.changes,
            in_time: self.in_time - before.in_time,
            sum_s: self.sum_s - before.sum_s,
        })
    }

    fn line(&self, beside: &str) -> serde_json::Value {
        json!({ "spent": {
            "beside": beside, "changes": self.changes, "late": self.changes - self.in_time,
            "mean_ms": self.sum_s / self.changes * 1e3,
        }})
    }
}
