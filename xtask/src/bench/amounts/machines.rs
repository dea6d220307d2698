//! How the machine of a web server follows its load, and what that does to requests.

use std::{env, fs, path::Path};

use anyhow::{Context as _, Result};
use serde::Deserialize;

use super::super::{Bar, Options, sample::Sample};
use super::plot::{self, Seen};
use crate::{cache::Cache, web_image};

/// The most that requests may take while the machine changes, at p99, of what they took before.
const P99_LIMIT: f64 = 2.0;

/// How long each step of the load lasts, in s, and in a quick run.
const SECONDS: u32 = 40;
const QUICK_SECONDS: u32 = 20;

/// The plot of the last round, in what the host leaves.
pub(in super::super) const PLOT: &str = "machine.svg";

/// A line that the example prints.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    /// The machine has followed a step of the load.
    Change(Change),
    /// All that was seen in a round.
    Seen(Seen),
}

#[derive(Debug, Deserialize)]
struct Change {
    is_up: bool,
    crossed_to_used_ms: f64,
    took_ms: f64,
    p99_before_ms: f64,
    p99_during_ms: f64,
}

pub(super) fn bars(cache: &Cache, binaries: &Path, options: &Options) -> Result<Vec<Bar>> {
    let (rounds, seconds) = match options.quick {
        true => (1, QUICK_SECONDS),
        false => (options.runs, SECONDS),
    };
    println!("A web server under a load that steps up and down, {rounds} rounds, {seconds} s a step.");
    let image = web_image::archive(cache).display().to_string();
    let arguments = ["machines".into(), rounds.to_string(), seconds.to_string(), image];
    let lines: Vec<Line> = super::example(cache, binaries, &arguments)?;
    let seen = lines.iter().rev().find_map(|line| match line {
        Line::Seen(seen) => Some(seen),
        Line::Change(_) => None,
    });
    let out = env::var_os("STOKER_LAB_OUT").context("STOKER_LAB_OUT is not set")?;
    let file = Path::new(&out).join(PLOT);
    let svg = plot::svg(seen.context("the example has seen nothing")?);
    fs::write(&file, svg).with_context(|| format!("write {}", file.display()))?;
    judge(&lines)
}

fn judge(lines: &[Line]) -> Result<Vec<Bar>> {
    let mut bars = Vec::new();
    for (is_up, what) in [(true, "grows"), (false, "shrinks")] {
        let of = |figure: fn(&Change) -> f64| {
            let changes = lines.iter().filter_map(|line| match line {
                Line::Change(change) if change.is_up == is_up => Some(figure(change)),
                _ => None,
            });
            Sample::new(changes.collect()).with_context(|| format!("of one that {what}"))
        };
        let named = |name: &str| format!("{name}, a web server's machine that {what}");
        bars.push(Bar::told(
            &named("from crossing to the guest using what it got"),
            "ms",
            of(|change| change.crossed_to_used_ms)?,
        ));
        bars.push(Bar::told(
            &named("of that, what the guest took"),
            "ms",
            of(|change| change.took_ms)?,
        ));
        bars.push(Bar::against(
            &named("p99 of requests meanwhile"),
            "ms",
            of(|change| change.p99_during_ms)?,
            "before",
            of(|change| change.p99_before_ms)?,
            P99_LIMIT,
        ));
    }
    Ok(bars)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(is_up: bool, during: f64) -> String {
        format!(
            r#"{{"change": {{"is_up": {is_up}, "from_vcpus": 1, "to_vcpus": 2, "crossed_to_used_ms": 2500.0, "took_ms": 40.0,
                "p99_before_ms": 10.0, "p99_during_ms": {during}, "reason": "cpu_use"}}}}"#
        )
    }

    #[test]
    fn requests_meanwhile_are_held_to_twice_what_they_took_before() {
        let lines = |during| -> Vec<Line> {
            let seen = r#"{"seen": {"looks": [[0.0, 1, 1, null]], "steps": [[0.0, 3.5]], "requests": [[0.1, 9.0]]}}"#;
            [change(true, during), change(false, 12.0), seen.into()]
                .map(|line| serde_json::from_str(&line).unwrap())
                .into()
        };
        let short = |during| judge(&lines(during)).unwrap().iter().filter(|bar| !bar.holds).count();
        assert_eq!((short(19.0), short(21.0)), (0, 1));
        assert!(judge(&lines(1.0)[1..]).is_err(), "it never grew");
    }
}
