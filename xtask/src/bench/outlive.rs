//! What is lost where the agent is killed, restarted and upgraded under load, as the example `outlive` of the end-to-end tests
//! sees it.

use std::path::Path;

use anyhow::{Context as _, Result};
use clap::Args;
use serde::Deserialize;

use super::{Bar, sample::Sample};
use crate::cache::Cache;

/// Names the other build of `stokerd` to the example.
pub(super) const OTHER_BUILD: &str = "STOKER_OTHER_BUILD";

/// The most that taking machines over, and a gap in service, may take, in ms.
const LIMIT_MS: f64 = 1000.0;

/// How much is done.
#[derive(Debug, Args)]
pub(super) struct Counts {
    /// How often `outlive` kills the agent.
    #[arg(long, default_value_t = 200)]
    kills: u32,
    /// How often it restarts it.
    #[arg(long, default_value_t = 100)]
    restarts: u32,
    /// How often it puts another build in its place.
    #[arg(long, default_value_t = 20)]
    upgrades: u32,
    /// Of one seed come the same moments and calls.
    #[arg(long, default_value_t = 1)]
    seed: u32,
}

/// What the example prints.
#[derive(Debug, Deserialize)]
struct Line {
    kills: u32,
    guests: u32,
    calls: u32,
    asked_again: u32,
    writes: u32,
    broken: u32,
    first_answer_ms: Vec<f64>,
    taken_over_ms: Vec<f64>,
    gaps_ms: Vec<f64>,
    counted_off_percent: f64,
    ended: u32,
    writes_lost: u32,
    ran_twice: u32,
    no_answer: u32,
    left_over: u32,
}

// === impl Counts ===

impl Counts {
    /// The same on a command line.
    pub(super) fn arguments(&self) -> impl Iterator<Item = String> + use<> {
        let all = [
            ("kills", self.kills),
            ("restarts", self.restarts),
            ("upgrades", self.upgrades),
            ("seed", self.seed),
        ];
        all.into_iter().map(|(name, number)| format!("--{name}={number}"))
    }
}

pub(super) fn bars(cache: &Cache, binaries: &Path, counts: &Counts) -> Result<Vec<Bar>> {
    let Counts {
        kills,
        restarts,
        upgrades,
        seed,
    } = counts;
    println!(
        "Killing the agent {kills} times, restarting it {restarts} and upgrading it {upgrades} times, seed {seed}."
    );
    let arguments = [kills, restarts, upgrades, seed].map(u32::to_string);
    let lines = super::example::<Line>(cache, binaries, "outlive", &arguments)?;
    let line = lines.into_iter().next().context("the example told nothing")?;
    let one = |figure: f64| Sample::new(vec![figure]);
    let told = |name: &str, count: u32| Ok::<_, anyhow::Error>(Bar::told(name, "", one(count.into())?));
    let none = |name: &str, count: u32| Ok::<_, anyhow::Error>(Bar::at_most(name, "", one(count.into())?, 0.0));
    let mut bars = vec![
        told("kills of the agent (`kill -9`) under load", line.kills)?,
        told("restarts and upgrades under load", restarts + upgrades)?,
        told("calls, each with an id", line.calls)?,
        told("calls, deployments and deletions whose connection broke", line.broken)?,
        told("answered calls that were asked for again", line.asked_again)?,
        told("functions created or deleted", line.writes)?,
        told("guests alive at a kill, of all kills", line.guests)?,
        none("guests or containers that ended unasked", line.ended)?,
        none("acknowledged creations or deletions lost", line.writes_lost)?,
        none("requests that ran twice or had two answers", line.ran_twice)?,
        none("calls that failed or were not answered", line.no_answer)?,
        none("processes, sockets, files and pins left over", line.left_over)?,
    ];
    let longest = |figures: &[f64]| figures.iter().copied().fold(0.0, f64::max);
    for (name, figures) in [
        ("killed: from its start to its first answer", line.first_answer_ms),
        (
            "killed: from its start until 10 machines are taken over",
            line.taken_over_ms,
        ),
        ("restarted or upgraded: gap in service, 10 machines", line.gaps_ms),
    ] {
        if !figures.is_empty() {
            let most = one(longest(&figures))?;
            bars.push(Bar::told(name, "ms", Sample::new(figures)?));
            bars.push(Bar::at_most(&format!("{name}, longest"), "ms", most, LIMIT_MS));
        }
    }
    bars.push(Bar::told(
        "CPU time counted of 10 machines, beside `cpu.stat`, off by",
        "%",
        one(line.counted_off_percent)?,
    ));
    Ok(bars)
}
