//! What one account's flood does to another's warm calls, as the example `flood` of the end-to-end tests measures it.

use std::path::Path;

use anyhow::Result;
use serde::Deserialize;

use super::{Bar, sample::Sample};
use crate::cache::Cache;

/// What the example prints.
#[derive(Debug, Deserialize)]
struct Line {
    alone_p50_us: f64,
    alone_p99_us: f64,
    within_p50_us: f64,
    within_p99_us: f64,
}

pub(super) fn bars(cache: &Cache, binaries: &Path, runs: u32) -> Result<Vec<Bar>> {
    let mut lines: Vec<Line> = Vec::new();
    for run in 1..=runs {
        println!("Flooding, run {run} of {runs}.");
        lines.extend(super::example::<Line>(cache, binaries, "flood", &[])?);
    }
    let take = |figure: fn(&Line) -> f64| Sample::new(lines.iter().map(|line| figure(line) / 1e3).collect());
    let name = |figure| format!("warm call of an account in another's flood of 10,000, {figure}");
    let (ours, alone) = (take(|line| line.within_p50_us)?, take(|line| line.alone_p50_us)?);
    let median = Bar::beside(&name("median"), "ms", ours, "alone", alone);
    let (ours, alone) = (take(|line| line.within_p99_us)?, take(|line| line.alone_p99_us)?);
    Ok(vec![
        median,
        Bar::against(&name("p99"), "ms", ours, "alone", alone, 2.0),
    ])
}
