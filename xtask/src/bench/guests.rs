//! What a hostile container costs its neighbour in the same machine, and who is charged for it, as the example `guests` of the
//! end-to-end tests measures it.

use std::path::Path;

use anyhow::{Context as _, Result};
use serde::Deserialize;

use super::{Bar, Options, sample::Sample};
use crate::cache::Cache;

/// What goes on beside the neighbour; the names are the example's.
const ATTACKS: [&str; 5] = ["requests", "logs", "connections", "forks", "all"];
/// What the attacks are compared with: the neighbour beside nobody, and beside one that only uses its CPU time.
const ALONE: &str = "alone";
const SPIN: &str = "spin";
/// The same as [`SPIN`].
const SPIN_AGAIN: &str = "spin again";

/// The most that an attack may make of the neighbour's p99 beside [`SPIN`].
const LIMIT: f64 = 1.1;

/// How long each phase lasts, and in a quick run, in ms.
const PHASE_MS: u32 = 6000;
const QUICK_PHASE_MS: u32 = 1500;

/// What the example prints of a phase.
#[derive(Debug, Deserialize)]
struct Line {
    beside: String,
    calls: f64,
    p50_us: f64,
    p99_us: f64,
    neighbour: Neighbour,
    hostile: Option<Hostile>,
}

#[derive(Debug, Deserialize)]
struct Neighbour {
    own_cpu_ns: f64,
    charged_ns: f64,
}

#[derive(Debug, Deserialize)]
struct Hostile {
    used: Used,
    charged_ns: f64,
}

/// What was used while a container attacked.
#[derive(Debug, Deserialize)]
struct Used {
    took_ns: f64,
    own_cpu_ns: f64,
    guest_busy_ns: f64,
}

/// All phases, those of one name in the order of their rounds.
struct Lines(Vec<Line>);

// === impl Line ===

impl Line {
    /// CPU time that the guest spent beyond what ran in its containers, in ns, and how long that took.
    fn beyond(&self) -> Option<(f64, f64)> {
        let used = &self.hostile.as_ref()?.used;
        let beyond = used.guest_busy_ns - used.own_cpu_ns - self.neighbour.own_cpu_ns;
        Some((beyond, used.took_ns))
    }

    /// CPU time that an attack cost beyond what ran in the containers, and what it was charged of it, in ms a second. What
    /// the guest spends on the neighbour's calls is known of a phase without attack.
    fn spent_and_charged(&self, spin: &Line) -> Option<(f64, f64)> {
        let (beyond, took) = self.beyond()?;
        let (for_calls, _) = spin.beyond()?;
        let spent = beyond - for_calls / spin.calls * self.calls;
        let hostile = self.hostile.as_ref()?;
        let charged = hostile.charged_ns - hostile.used.own_cpu_ns;
        Some((spent / took * 1e3, charged / took * 1e3))
    }
}

// === impl Lines ===

impl Lines {
    fn of(&self, beside: &str) -> impl Iterator<Item = &Line> {
        self.0.iter().filter(move |line| line.beside == beside)
    }

    fn sample(&self, beside: &str, figure: impl Fn(&Line) -> f64) -> Result<Sample> {
        let figures = self.of(beside).map(figure).collect();
        Sample::new(figures).with_context(|| format!("beside {beside}"))
    }

    /// A row about the neighbour's calls beside `ours` and beside `peer`.
    fn beside(&self, name: &str, unit: &str, ours: &str, peer: &str, figure: fn(&Line) -> f64) -> Result<Bar> {
        let (of_ours, of_peer) = (self.sample(ours, figure)?, self.sample(peer, figure)?);
        Ok(Bar::beside(&named(name, ours), unit, of_ours, peer, of_peer))
    }
}

fn named(what: &str, beside: &str) -> String {
    format!("{what} beside `{beside}`")
}

fn p50_ms(line: &Line) -> f64 {
    line.p50_us / 1e3
}

fn p99_ms(line: &Line) -> f64 {
    line.p99_us / 1e3
}

fn charged_for_a_call_us(line: &Line) -> f64 {
    line.neighbour.charged_ns / line.calls / 1e3
}

pub(super) fn bars(cache: &Cache, binaries: &Path, options: &Options) -> Result<Vec<Bar>> {
    let (rounds, ms) = if options.quick {
        (1, QUICK_PHASE_MS)
    } else {
        (options.runs, PHASE_MS)
    };
    println!("Calling a function beside a hostile one, {rounds} rounds, {ms} ms a phase.");
    let arguments = [rounds, ms].map(|number| number.to_string());
    judge(&Lines(super::example(cache, binaries, "guests", &arguments)?))
}

fn judge(lines: &Lines) -> Result<Vec<Bar>> {
    let mut bars = Vec::new();
    for beside in [SPIN, SPIN_AGAIN].into_iter().chain(ATTACKS) {
        let peer = if beside == SPIN { ALONE } else { SPIN };
        bars.push(lines.beside("warm call, median,", "ms", beside, peer, p50_ms)?);
        let (ours, spin) = (lines.sample(beside, p99_ms)?, lines.sample(peer, p99_ms)?);
        let name = named("warm call, p99,", beside);
        bars.push(if ATTACKS.contains(&beside) {
            Bar::against(&name, "ms", ours, peer, spin, LIMIT)
        } else {
            Bar::beside(&name, "ms", ours, peer, spin)
        });
        if peer != ALONE {
            bars.push(lines.beside("the same", "ms", beside, ALONE, p99_ms)?);
        }
    }
    for attack in ATTACKS {
        let (mut spent, mut charged) = (Vec::new(), Vec::new());
        for (line, spin) in lines.of(attack).zip(lines.of(SPIN)) {
            let figures = line.spent_and_charged(spin).context("nobody attacked")?;
            spent.push(figures.0);
            charged.push(figures.1);
        }
        bars.push(Bar::beside(
            &format!("CPU time charged to `{attack}` beyond its own"),
            "ms a second",
            Sample::new(charged)?,
            "spent on it",
            Sample::new(spent)?,
        ));
        let what = "charged to the neighbour for a call";
        bars.push(lines.beside(what, "us", attack, SPIN, charged_for_a_call_us)?);
    }
    Ok(bars)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A phase of a second with 100 calls, each of which takes 1 ms of the neighbour's own and costs the guest 1 ms more.
    fn line(beside: &str, p99_ms: f64, busy_ms: f64, charged_ms: f64) -> Line {
        let hostile = json!({
            "used": { "took_ns": 1e9, "own_cpu_ns": 250e6, "guest_busy_ns": busy_ms * 1e6 },
            "charged_ns": charged_ms * 1e6,
        });
        let line = json!({
            "beside": beside, "calls": 100, "p50_us": 5e3, "p99_us": p99_ms * 1e3,
            "neighbour": { "own_cpu_ns": 100e6, "charged_ns": 200e6 },
            "hostile": (beside != ALONE).then_some(hostile),
        });
        serde_json::from_value(line).unwrap()
    }

    #[test]
    fn what_an_attack_costs_is_what_is_busy_beyond_the_containers_and_the_calls() {
        let spin = line(SPIN, 10.0, 450.0, 250.0);
        assert_eq!(spin.spent_and_charged(&spin), Some((0.0, 0.0)));
        let attack = line("logs", 10.0, 850.0, 550.0);
        assert_eq!(attack.spent_and_charged(&spin), Some((400.0, 300.0)));
        // With half of the calls, half of what is spent on them.
        let fewer = Line { calls: 50.0, ..attack };
        assert_eq!(fewer.spent_and_charged(&spin), Some((450.0, 300.0)));
        let alone = line(ALONE, 10.0, 0.0, 0.0);
        assert_eq!(alone.spent_and_charged(&spin), None);
    }

    #[test]
    fn attacks_alone_are_held_to_a_bar() {
        let lines = |p99_ms: f64| {
            let quiet = [ALONE, SPIN, SPIN_AGAIN].map(|beside| line(beside, 10.0, 450.0, 250.0));
            let attacks = ATTACKS.map(|attack| line(attack, p99_ms, 850.0, 550.0));
            Lines(quiet.into_iter().chain(attacks).collect())
        };
        let short = |p99_ms| judge(&lines(p99_ms)).unwrap().iter().filter(|bar| !bar.holds).count();
        assert_eq!(short(10.9), 0);
        assert_eq!(short(11.1), ATTACKS.len());
    }

    #[test]
    fn a_phase_that_is_missing_is_an_error() {
        assert!(judge(&Lines(vec![line(ALONE, 10.0, 0.0, 0.0)])).is_err());
    }
}
