//! What the software between a caller and a function costs without a VM, beside a bare gRPC echo, as the example `path` of the
//! end-to-end tests measures it.

use std::path::Path;

use anyhow::Result;
use serde::Deserialize;

use super::{Bar, sample::Sample};
use crate::cache::Cache;

/// Names the guest's `stoker-init` to the example.
pub(super) const INIT: &str = "STOKER_INIT";

/// A line that the example prints.
#[derive(Debug, Deserialize)]
struct Line {
    path: String,
    p50_ns: Option<f64>,
    p99_ns: Option<f64>,
    calls_per_second: Option<f64>,
}

/// The most that a call may take of the peer's, one by one and with several at once.
const LIMIT: f64 = 4.0;

pub(super) fn bars(cache: &Cache, binaries: &Path, runs: u32) -> Result<Vec<Bar>> {
    let mut lines: Vec<Line> = Vec::new();
    for run in 1..=runs {
        println!("Calling an echo function without a VM, run {run} of {runs}.");
        lines.extend(super::example::<Line>(cache, binaries, "path", &[])?);
    }
    let take = |path: &str, figure: fn(&Line) -> Option<f64>| {
        let of_path = lines.iter().filter(|line| line.path == path);
        Sample::new(of_path.filter_map(figure).collect())
    };
    let both = |figure| Ok::<_, anyhow::Error>((take("ours", figure)?, take("bare", figure)?));
    let peer = "bare tonic echo";
    let p50 = |line: &Line| Some(line.p50_ns? / 1e3);
    let (ours, bare) = both(p50)?;
    let median = Bar::against("call without a VM, median", "us", ours, peer, bare, LIMIT);
    let (ours, named) = (take("ours", p50)?, take("named", p50)?);
    let kept = Bar::beside("the same with a request id, median", "us", named, "without", ours);
    let (ours, bare) = both(|line| Some(line.p99_ns? / 1e3))?;
    let p99 = Bar::beside("call without a VM, p99", "us", ours, peer, bare);
    let (ours, bare) = both(|line| Some(1e6 / line.calls_per_second?))?;
    let name = "call without a VM, 8 at once, time for each";
    Ok(vec![
        median,
        kept,
        p99,
        Bar::against(name, "us", ours, peer, bare, LIMIT),
    ])
}
