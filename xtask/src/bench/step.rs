//! What one event costs the policies, and how that grows, as the bench `step` of the crate `policy` measures it.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde::Deserialize;

use super::{Bar, policy_bench, sample::Sample};
use crate::{cache::Cache, process};

/// A line that the bench prints.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Line {
    Events { name: String, p50_ns: f64, p99_ns: f64 },
    Whole { ms: f64 },
}

/// The host that the bars are about, and one ten times as large.
const SIZES: [&str; 2] = ["1,000 machines", "10,000 machines"];

pub(super) fn bars(cache: &Cache, runs: u32) -> Result<Vec<Bar>> {
    let mut events: BTreeMap<(String, &str), Vec<f64>> = BTreeMap::new();
    let mut whole = Vec::new();
    for run in 1..=runs {
        println!("Deciding about events, run {run} of {runs}.");
        let text = process::output(&mut policy_bench(cache, "step"))?;
        for line in text.lines().filter(|line| line.starts_with('{')) {
            match serde_json::from_str(line).with_context(|| format!("understand {line}"))? {
                Line::Events { name, p50_ns, p99_ns } => {
                    events.entry((name.clone(), "median")).or_default().push(p50_ns / 1e3);
                    events.entry((name, "p99")).or_default().push(p99_ns / 1e3);
                }
                Line::Whole { ms } => whole.push(ms / 1e3),
            }
        }
    }
    let mut take = |size: &str, figure| {
        let figures = events.remove(&(size.to_owned(), figure));
        Sample::new(figures.with_context(|| format!("the bench told no {figure} for {size}"))?)
    };
    let mut bars = Vec::new();
    for (figure, limit) in [("median", 10.0), ("p99", 100.0)] {
        let [small, large] = SIZES;
        let ours = take(small, figure)?;
        bars.push(Bar::at_most(
            &format!("one event, {small}, {figure}"),
            "us",
            ours.clone(),
            limit,
        ));
        let name = format!("one event, {large}, {figure}");
        bars.push(Bar::against(&name, "us", take(large, figure)?, small, ours, 2.0));
    }
    bars.push(Bar::at_most(
        "a million warm requests, decisions alone",
        "s",
        Sample::new(whole)?,
        5.0,
    ));
    Ok(bars)
}
