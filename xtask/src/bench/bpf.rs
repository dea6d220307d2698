//! What counting costs: ns an event by the kernel's own bpf_stats, as `ebpf/loader`'s example `cost` measures it.

use std::{path::Path, process::Command};

use anyhow::{Context, Result};
use serde::Deserialize;

use super::{Bar, sample::Sample};
use crate::process;

/// A line that the example prints.
#[derive(Deserialize)]
struct Cost {
    program: String,
    /// How many cgroups were being counted.
    subjects: u32,
    /// Time a run of the program took in each round, in ns.
    ns: Vec<f64>,
}

pub(super) fn cost(binaries: &Path, place: &str) -> Result<Vec<Bar>> {
    let text = process::output(&mut Command::new(binaries.join("examples/cost")))?;
    text.lines()
        .map(|line| {
            let Cost { program, subjects, ns } =
                serde_json::from_str(line).with_context(|| format!("understand {line}"))?;
            let name = format!("eBPF {program}, {subjects} subjects, {place}");
            Ok(Bar::told(&name, "ns", Sample::new(ns)?))
        })
        .collect()
}
