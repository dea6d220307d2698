//! What was measured of machines that wake up and of others that compute, what it is held to, and how it is shown.

use std::fmt::Write as _;

use anyhow::{Context as _, Result};
use serde::Deserialize;

use super::super::{Bar, sample::Sample};

/// The settings; the names are those of the example `credits` of the end-to-end tests.
pub(super) const ALONE: &str = "alone";
pub(super) const DEFAULT: &str = "default";
pub(super) const CREDITS: &str = "credits";
pub(super) const SETTINGS: [&str; 3] = [ALONE, DEFAULT, CREDITS];

/// The ways in which a machine is woken; the names are the same.
pub(super) const TIMER: &str = "timer";
pub(super) const WAYS: &[&str] = &[TIMER, "pipe", "vsock", CALL];
/// What is told of, and held to nothing: it is as much about the host's own processes.
const CALL: &str = "call";

/// The most that p50 and p99, and p99.9, may be with credits, of what they are alone.
const LIMIT: f64 = 1.5;
const LIMIT_OF_TAIL: f64 = 3.0;
/// The most that p99 may be alone, of what it is by the kernel's default.
const LIMIT_OF_ALONE: f64 = 0.1;
/// By how much those that compute may differ in CPU time, in % of their mean, and the longest that one may wait, in ms.
const LIMIT_OF_SPREAD: f64 = 5.0;
const LIMIT_OF_WAIT: f64 = 100.0;
/// By how much a machine without credits may miss its baseline, in %.
const LIMIT_OFF_BASELINE: f64 = 2.0;

/// One result, as the example prints it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Line {
    Wakes(Wakes),
    Hogs(Hogs),
    Spent(Spent),
    Baseline(Baseline),
}

/// Wake-ups in one setting and way, a figure a round; p99.9 of all rounds together.
#[derive(Debug, Deserialize)]
pub(super) struct Wakes {
    pub(super) setting: String,
    pub(super) way: String,
    pub(super) samples: u32,
    pub(super) p50_ms: Vec<f64>,
    pub(super) p99_ms: Vec<f64>,
    pub(super) p999_ms: f64,
    pub(super) used_percent: Vec<f64>,
    pub(super) real_time_percent: Vec<f64>,
}

/// Those that compute in a setting, a figure a round; alone they don't.
#[derive(Debug, Deserialize)]
pub(super) struct Hogs {
    pub(super) setting: String,
    pub(super) spread_percent: Vec<f64>,
    pub(super) longest_wait_ms: Vec<f64>,
    pub(super) cpu_percent: Vec<f64>,
}

/// How a machine was held back as its balance fell.
#[derive(Debug, Deserialize)]
pub(super) struct Spent {
    beside: String,
    changes: f64,
    /// More than 2 ms after it fell.
    late: f64,
    mean_ms: f64,
}

/// What a machine had whose credits had run out, of its baseline.
#[derive(Debug, Deserialize)]
pub(super) struct Baseline {
    windows: u32,
    least: f64,
    most: f64,
}

/// All of one run.
pub(super) struct Lines {
    /// Where it was.
    pub(super) place: String,
    /// The ways that were measured.
    pub(super) ways: &'static [&'static str],
    pub(super) all: Vec<Line>,
}

// === impl Lines ===

impl Lines {
    fn wakes(&self, setting: &str, way: &str) -> Result<&Wakes> {
        let mut all = self.all.iter().filter_map(|line| match line {
            Line::Wakes(wakes) => Some(wakes),
            _ => None,
        });
        all.find(|wakes| wakes.setting == setting && wakes.way == way)
            .with_context(|| format!("nothing was told of {way}, {setting}"))
    }

    fn hogs(&self, setting: &str) -> Result<&Hogs> {
        let mut all = self.all.iter().filter_map(|line| match line {
            Line::Hogs(hogs) => Some(hogs),
            _ => None,
        });
        all.find(|hogs| hogs.setting == setting)
            .with_context(|| format!("nothing was told of those that compute, {setting}"))
    }

    pub(super) fn judge(&self) -> Result<Vec<Bar>> {
        let (mut bars, place) = (Vec::new(), &self.place);
        for &way in self.ways {
            let [alone, default, credits] = [
                self.wakes(ALONE, way)?,
                self.wakes(DEFAULT, way)?,
                self.wakes(CREDITS, way)?,
            ];
            let mut told = |figure: &str, ours: Sample, peer: Sample, limit: f64| {
                let name = format!("woken by {way}, {figure}, with credits, {place}");
                bars.push(match way {
                    CALL => Bar::beside(&name, "ms", ours, ALONE, peer),
                    _ => Bar::against(&name, "ms", ours, ALONE, peer, limit),
                });
            };
            told("p50", of(&credits.p50_ms)?, of(&alone.p50_ms)?, LIMIT);
            told("p99", of(&credits.p99_ms)?, of(&alone.p99_ms)?, LIMIT);
            told("p99.9", one(credits.p999_ms)?, one(alone.p999_ms)?, LIMIT_OF_TAIL);
            let (ours, peer) = (of(&alone.p99_ms)?, of(&default.p99_ms)?);
            let (name, by) = (format!("woken by {way}, p99, alone, {place}"), "kernel's default");
            bars.push(match way {
                CALL => Bar::beside(&name, "ms", ours, by, peer),
                _ => Bar::against(&name, "ms", ours, by, peer, LIMIT_OF_ALONE),
            });
        }
        for setting in [DEFAULT, CREDITS] {
            let hogs = self.hogs(setting)?;
            bars.push(Bar::at_most(
                &format!("CPU time of those that compute, most less least, {setting}, {place}"),
                "% of the mean",
                of(&hogs.spread_percent)?,
                LIMIT_OF_SPREAD,
            ));
            // Not the median of the rounds: none.
            let longest = hogs.longest_wait_ms.iter().copied().fold(0.0, f64::max);
            bars.push(Bar::at_most(
                &format!("longest that one of them waited, {setting}, {place}"),
                "ms",
                one(longest)?,
                LIMIT_OF_WAIT,
            ));
        }
        for line in &self.all {
            match line {
                Line::Spent(spent) => {
                    let beside = &spent.beside;
                    bars.push(Bar::told(
                        &format!("held back after its balance fell, {beside}, mean of {}", spent.changes),
                        "ms",
                        one(spent.mean_ms)?,
                    ));
                    let name = format!("held back more than 2 ms after that, {beside}");
                    bars.push(Bar::at_most(&name, "", one(spent.late)?, 0.0));
                }
                Line::Baseline(baseline) => {
                    let off = (baseline.least - 1.0).abs().max((baseline.most - 1.0).abs()) * 100.0;
                    let name = format!("most off the baseline in 10 s, of {}", baseline.windows);
                    bars.push(Bar::at_most(&name, "%", one(off)?, LIMIT_OFF_BASELINE));
                }
                Line::Wakes(_) | Line::Hogs(_) => {}
            }
        }
        Ok(bars)
    }

    /// Tables in Markdown, for `docs/scheduling.md`.
    pub(super) fn table(&self) -> Result<String> {
        let mut text = String::from(
            "| woken by | setting | p50 | p99 | p99.9 | wake-ups | p50, p99, p99.9 to alone | uses of a CPU | in real time |\n\
             |---|---|---|---|---|---|---|---|---|\n",
        );
        for &way in self.ways {
            let alone = self.wakes(ALONE, way)?;
            let (p50, p99) = (of(&alone.p50_ms)?.median(), of(&alone.p99_ms)?.median());
            for setting in SETTINGS {
                let wakes = self.wakes(setting, way)?;
                let (ours_p50, ours_p99) = (of(&wakes.p50_ms)?, of(&wakes.p99_ms)?);
                // A string takes it all.
                let _ = writeln!(
                    text,
                    "| {way} | {setting} | {ours_p50} | {ours_p99} | {:.2} | {} | {:.2}, {:.2}, {:.2} | {:.0}% | {:.0}% |",
                    wakes.p999_ms,
                    wakes.samples,
                    ours_p50.median() / p50,
                    ours_p99.median() / p99,
                    wakes.p999_ms / alone.p999_ms,
                    of(&wakes.used_percent)?.median(),
                    of(&wakes.real_time_percent)?.median(),
                );
            }
        }
        text += "\n| those that compute | CPU time in all, % of a CPU | most less least, % of the mean | longest wait |\n\
                 |---|---|---|---|\n";
        for setting in SETTINGS {
            let hogs = self.hogs(setting)?;
            let shown = |figures: &[f64]| of(figures).map_or(String::new(), |sample| sample.to_string());
            let _ = writeln!(
                text,
                "| {setting} | {} | {} | {} |",
                shown(&hogs.cpu_percent),
                shown(&hogs.spread_percent),
                shown(&hogs.longest_wait_ms),
            );
        }
        Ok(text)
    }
}

fn of(figures: &[f64]) -> Result<Sample> {
    Sample::new(figures.to_vec())
}

fn one(figure: f64) -> Result<Sample> {
    Sample::new(vec![figure])
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// What is printed where a wake-up takes so long in each setting.
    fn lines(ms: [f64; 3]) -> Lines {
        let mut lines = vec![
            json!({ "spent": { "beside": ALONE, "changes": 9, "late": 0, "mean_ms": 0.4 } }),
            json!({ "baseline": { "windows": 100, "least": 0.99, "most": 1.015 } }),
        ];
        for (setting, ms) in SETTINGS.into_iter().zip(ms) {
            for way in WAYS {
                lines.push(json!({ "wakes": {
                    "setting": setting, "way": way, "samples": 20, "p50_ms": [ms, ms], "p99_ms": [ms, ms], "p999_ms": ms,
                    "used_percent": [2.0, 3.0], "real_time_percent": [100.0, 100.0],
                }}));
            }
            let (spread, wait) = match setting {
                ALONE => (json!([]), json!([])),
                _ => (json!([1.0, 3.0]), json!([60.0, 99.0])),
            };
            lines.push(json!({ "hogs": {
                "setting": setting, "spread_percent": spread, "longest_wait_ms": wait, "cpu_percent": [190.0, 192.0],
            }}));
        }
        let all = lines.into_iter().map(|line| serde_json::from_value(line).unwrap());
        Lines {
            place: "the lab".into(),
            ways: WAYS,
            all: all.collect(),
        }
    }

    fn short(lines: &Lines) -> usize {
        lines.judge().unwrap().iter().filter(|bar| !bar.holds).count()
    }

    #[test]
    fn the_machine_alone_is_what_others_are_held_to() {
        assert_eq!(short(&lines([1.0, 10.0, 1.5])), 0);
        // p50 and p99 of all ways but calls.
        assert_eq!(short(&lines([1.0, 10.0, 1.6])), 6);
        assert_eq!(short(&lines([1.0, 10.0, 3.1])), 9);
        // The host was not busy.
        assert_eq!(short(&lines([1.0, 9.0, 1.0])), 3);
    }

    #[test]
    fn one_that_is_late_or_off_its_baseline_falls_short() {
        let mut late = lines([1.0, 10.0, 1.0]);
        for line in &mut late.all {
            match line {
                Line::Spent(spent) => spent.late = 1.0,
                Line::Baseline(baseline) => baseline.least = 0.97,
                Line::Hogs(hogs) => hogs.longest_wait_ms.iter_mut().for_each(|ms| *ms += 2.0),
                Line::Wakes(_) => {}
            }
        }
        assert_eq!(short(&late), 4);
    }

    #[test]
    fn every_setting_is_a_row() {
        let text = lines([1.0, 10.0, 1.5]).table().unwrap();
        let rows: Vec<_> = text.lines().collect();
        assert_eq!(rows.len(), 2 + 12 + 1 + 2 + 3, "{text}");
        assert_eq!(
            rows[4],
            "| timer | credits | 1.50 | 1.50 | 1.50 | 20 | 1.50, 1.50, 1.50 | 2% | 100% |"
        );
        assert_eq!(rows[17], "| alone | 191 (190 to 192) |  |  |");
        let nothing = Lines {
            all: Vec::new(),
            ..lines([1.0; 3])
        };
        assert!(nothing.table().is_err() && nothing.judge().is_err());
    }
}
