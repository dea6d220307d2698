//! How functions whose amounts do not fit come to what they need, and what it costs.

use std::path::Path;

use anyhow::Result;
use serde::Deserialize;

use super::super::{Bar, Options, sample::Sample};
use crate::cache::Cache;

/// The functions, as the example calls them.
const FUNCTIONS: [&str; 5] = ["doubles", "computes", "waits", "spikes", "shrinks"];

/// The most memory of the largest peak.
const MEMORY_LIMIT: f64 = 1.5;
/// The most that it may cost of the cheapest fixed amount of the sweep.
const COST_LIMIT: f64 = 1.1;

/// Executions before anything falls: the default, and the least that there may be.
const EXECUTIONS: u32 = 100;
const QUICK_EXECUTIONS: u32 = 32;
/// Each takes some ten minutes in the lab.
const MOST_ROUNDS: u32 = 3;

/// A line that the example prints.
#[derive(Debug, Deserialize)]
struct Line {
    function: String,
    until_right: f64,
    slow_down: f64,
    killed: f64,
    killed_late: f64,
    settled: String,
    settled_cost: f64,
    best: String,
    best_cost: f64,
    need_mib: f64,
    memory_mib: f64,
}

pub(super) fn bars(cache: &Cache, binaries: &Path, options: &Options) -> Result<Vec<Bar>> {
    let (rounds, executions) = match options.quick {
        true => (1, QUICK_EXECUTIONS),
        false => (options.runs.min(MOST_ROUNDS), EXECUTIONS),
    };
    println!(
        "Calling functions whose amounts do not fit, {rounds} rounds; after {executions} executions something may fall."
    );
    let arguments = ["functions".into(), rounds.to_string(), executions.to_string()];
    judge(&super::example(cache, binaries, &arguments)?)
}

fn judge(lines: &[Line]) -> Result<Vec<Bar>> {
    let mut bars = Vec::new();
    for function in FUNCTIONS {
        let of = || lines.iter().filter(|line| line.function == function);
        let sample = |figure: fn(&Line) -> f64| Sample::new(of().map(figure).collect());
        let named = |what: &str| format!("{what}, one that {function}");
        bars.push(Bar::told(
            &named("executions until its amount was right"),
            "executions",
            sample(|line| line.until_right)?,
        ));
        bars.push(Bar::against(
            &named("memory"),
            "MiB",
            sample(|line| line.memory_mib)?,
            "its largest peak",
            sample(|line| line.need_mib)?,
            MEMORY_LIMIT,
        ));
        bars.push(Bar::told(
            &named("time of executions while it was wrong, of what they take then"),
            "times",
            sample(|line| line.slow_down)?,
        ));
        let words = |amount: fn(&Line) -> &str| of().next().map(amount).unwrap_or_default().to_owned();
        bars.push(Bar::against(
            &named(&format!("cost of an execution with {}", words(|line| &line.settled))),
            "CPU-s",
            sample(|line| line.settled_cost)?,
            &format!("{}, the cheapest fixed amount", words(|line| &line.best)),
            sample(|line| line.best_cost)?,
            COST_LIMIT,
        ));
        bars.push(Bar::told(
            &named("executions that were killed for memory"),
            "executions",
            sample(|line| line.killed)?,
        ));
        bars.push(Bar::at_most(
            &named("those of them after the second"),
            "executions",
            sample(|line| line.killed_late)?,
            0.0,
        ));
    }
    Ok(bars)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn lines(memory_mib: f64, cost: f64, killed_late: f64) -> Vec<Line> {
        let line = |function| {
            json!({
                "function": function, "executions": 30, "until_right": 2, "slow_down": 1.5, "killed": 1 + killed_late as u32,
                "killed_late": killed_late, "settled": "1000m,115MiB", "settled_cost": cost, "best": "1000m,128MiB",
                "best_cost": 0.2, "need_mib": 100.0, "memory_mib": memory_mib, "peak_mib": 99.0,
            })
        };
        FUNCTIONS
            .map(|function| serde_json::from_value(line(function)).unwrap())
            .into()
    }

    #[test]
    fn what_each_came_to_is_held_to_its_bars() {
        let short = |memory_mib, cost, late| {
            let bars = judge(&lines(memory_mib, cost, late)).unwrap();
            bars.iter().filter(|bar| !bar.holds).count()
        };
        assert_eq!(short(149.0, 0.21, 0.0), 0);
        assert_eq!(short(151.0, 0.21, 0.0), FUNCTIONS.len());
        assert_eq!(short(149.0, 0.23, 0.0), FUNCTIONS.len());
        assert_eq!(short(149.0, 0.21, 1.0), FUNCTIONS.len());
    }

    #[test]
    fn a_function_that_is_missing_is_an_error() {
        assert!(judge(&lines(149.0, 0.21, 0.0)[1..]).is_err());
    }
}
