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

pub(super) fn bars(cache: &Cache, binaries: &Path, options: &Options) -> Result<Vec<Bar>> {
    let (rounds, ms, times) = match options.quick {
        true => (QUICK_ROUNDS, QUICK_MS, QUICK_TIMES),
        false => (options.runs, MS, TIMES),
    };
    println!("Waking a machine alone and among others, {rounds} rounds, {ms} ms for each way.");
    let arguments = [rounds, ms, times].map(|number| number.to_string());
    let lines = Lines {
        place: host::place(),
        ways: WAYS,
        all: super::super::example(cache, binaries, "credits", &arguments)?,
    };
    println!("\nMachines of {}:\n\n{}", lines.place, lines.table()?);
    lines.judge()
}
