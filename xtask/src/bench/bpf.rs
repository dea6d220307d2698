//! The ledger: what counting costs, in ns an event by the kernel's own bpf_stats, as `ebpf/loader`'s example `cost` measures it; how
//! far it is from what the kernel counts, as its example `loads` does; and what the agent takes to keep accounts, as its own example
//! `accounts` does.

use std::{path::Path, process::Command};

use anyhow::{Context, Result};
use serde::{Deserialize, de::DeserializeOwned};

use super::{Bar, sample::Sample};
use crate::{host, process};

/// How far the ledger may be from `cpu.stat`, in percent.
const OFF_PERCENT: f64 = 0.1;

/// What keeping all accounts may take where nothing crosses, in percent of a CPU.
const AGENT_PERCENT: f64 = 0.5;

/// For how long loads run, and in a quick run, in seconds.
const SECONDS: u32 = 600;
const QUICK_SECONDS: u32 = 10;

/// A line that the example `cost` prints.
#[derive(Deserialize)]
struct Cost {
    program: String,
    /// How many cgroups were being counted.
    subjects: u32,
    /// Time a run of the program took in each round, in ns.
    ns: Vec<f64>,
}

/// A line that the example `loads` prints.
#[derive(Deserialize)]
struct Load {
    load: String,
    cpu_s: f64,
    off_percent: f64,
    account_off_ns: f64,
    switches_per_s: f64,
}

/// The line that the example `accounts` prints.
#[derive(Deserialize)]
struct Kept {
    accounts: u32,
    /// In percent of a CPU, by round.
    cpu_percent: Vec<f64>,
}

// === impl Cost ===

impl Cost {
    /// What it may take, on processors that are not emulated.
    fn limit_ns(&self) -> Option<f64> {
        match (&*self.program, self.subjects) {
            ("sched_switch", _) => Some(150.0),
            ("sched_wakeup", _) => Some(100.0),
            ("accounts", 1000) => Some(1e6),
            _ => None,
        }
    }
}

pub(super) fn cost(binaries: &Path, place: &str) -> Result<Vec<Bar>> {
    let costs: Vec<Cost> = lines(&mut Command::new(binaries.join("examples/cost")))?;
    let bar = |cost: Cost| {
        let name = format!("eBPF {}, {} subjects, {place}", cost.program, cost.subjects);
        let limit = cost.limit_ns().filter(|_| place == host::HERE);
        let ns = Sample::new(cost.ns)?;
        Ok(match limit {
            Some(limit) => Bar::at_most(&name, "ns", ns, limit),
            None => Bar::told(&name, "ns", ns),
        })
    };
    costs.into_iter().map(bar).collect()
}

/// The ledger against `cpu.stat`, and accounts against the ledger.
pub(super) fn loads(binaries: &Path, place: &str, quick: bool) -> Result<Vec<Bar>> {
    let seconds = if quick { QUICK_SECONDS } else { SECONDS };
    let mut example = Command::new(binaries.join("examples/loads"));
    let loads: Vec<Load> = lines(example.arg(seconds.to_string()))?;
    let mut bars = Vec::new();
    for of in loads {
        let one = |figure| Sample::new(vec![figure]);
        let name = |what| format!("{what}, {} for {seconds} s, {place}", of.load);
        bars.push(Bar::told(&name("CPU time"), "s", one(of.cpu_s)?));
        bars.push(Bar::told(
            &name("switches of the host"),
            "a second",
            one(of.switches_per_s)?,
        ));
        let off = one(of.off_percent)?;
        bars.push(Bar::at_most(&name("ledger beside cpu.stat"), "%", off, OFF_PERCENT));
        let off = one(of.account_off_ns)?;
        bars.push(Bar::at_most(&name("account beside the ledger"), "ns", off, 0.0));
    }
    Ok(bars)
}

/// What the agent takes to keep accounts of machines that do nothing.
pub(super) fn accounts(binaries: &Path, place: &str) -> Result<Vec<Bar>> {
    let told: Vec<Kept> = lines(&mut Command::new(binaries.join("examples/accounts")))?;
    let bar = |of: Kept| {
        let name = format!("keeping {} accounts, {place}", of.accounts);
        let cpu = Sample::new(of.cpu_percent)?;
        Ok(if place == host::HERE {
            Bar::at_most(&name, "% of a CPU", cpu, AGENT_PERCENT)
        } else {
            Bar::told(&name, "% of a CPU", cpu)
        })
    };
    told.into_iter().map(bar).collect()
}

/// What a program prints, a line of JSON each.
fn lines<T: DeserializeOwned>(command: &mut Command) -> Result<Vec<T>> {
    let text = process::output(command)?;
    text.lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("understand {line}")))
        .collect()
}
