//! Real machines and the agent, as the example `credits` of the end-to-end tests measures them.

use std::path::Path;

use anyhow::Result;

use super::super::{Bar, Options};
use super::figures::{Lines, WAYS};
use crate::{cache::Cache, host};

/// How long a measurement lasts, in ms, and how often credits run out, by default and in a quick run.
const MS: u32 = 12_000;
const TIMES: u32 = 3;
const QUICK_ROUNDS: u32 = 2;
const QUICK_MS: u32 = 2_500;
const QUICK_TIMES: u32 = 1;

/// The default of `machines.scheduler`.
const REAL_TIME: &str = "real_time";

pub(super) fn bars(cache: &Cache, binaries: &Path, options: &Options) -> Result<Vec<Bar>> {
    let (rounds, ms, times) = match options.quick {
        true => (QUICK_ROUNDS, QUICK_MS, QUICK_TIMES),
        false => (options.runs, MS, TIMES),
    };
    let arguments = [rounds, ms, times].map(|number| number.to_string());
    let mut bars = Vec::new();
    for &scheduler in schedulers(options) {
        println!("Waking a machine alone and among others, {rounds} rounds, {ms} ms for each way: {scheduler}.");
        let arguments = [&arguments[..], &[scheduler.into()]].concat();
        let place = match scheduler {
            REAL_TIME => host::place().into(),
            _ => format!("{}, {scheduler}", host::place()),
        };
        let lines = Lines {
            place,
            ways: WAYS,
            all: super::super::example(cache, binaries, "credits", &arguments)?,
        };
        println!("\nMachines of {}:\n\n{}", lines.place, lines.table()?);
        bars.extend(lines.judge()?);
    }
    Ok(bars)
}

/// What machines are scheduled by, one after the other: `machines.scheduler`.
fn schedulers(options: &Options) -> &'static [&'static str] {
    match options.sched_ext {
        true => &[REAL_TIME, "sched_ext"],
        false => &[REAL_TIME],
    }
}
