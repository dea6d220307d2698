//! What was measured, as a table in Markdown.

use std::{fmt::Write as _, time::Duration};

use anyhow::{Context as _, Result};
use stoker_testkit::permille::permille;

use super::{Round, role::Hog};

/// Percentiles of times, in ms.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Times {
    pub(super) p50: f64,
    pub(super) p99: f64,
    pub(super) p999: f64,
}

/// What was measured of one way.
#[derive(Debug)]
pub(super) struct Row {
    /// Of the quiet one, woken by its timer and by a pipe.
    pub(super) timer: Times,
    pub(super) pipe: Times,
    /// Of the daemon, woken by its timer.
    pub(super) daemon: Times,
    /// What those that compute have done.
    pub(super) turns: f64,
    /// Their CPU time, of all that there was.
    cpu: f64,
    /// By how much the one with most CPU time had more than the one with least, of their mean.
    spread: f64,
    /// The longest that one of them waited, in ms.
    longest_wait: f64,
}

// === impl Times ===

impl Times {
    fn new(ns: &[u64]) -> Result<Self> {
        let mut sorted = ns.to_vec();
        sorted.sort_unstable();
        let at = |of| {
            let ns = permille(&sorted, of).context("nobody woke up")?;
            Ok::<_, anyhow::Error>(ns as f64 / 1e6)
        };
        Ok(Self {
            p50: at(500)?,
            p99: at(990)?,
            p999: at(999)?,
        })
    }

    fn cells(self) -> String {
        format!("{:.2} | {:.2} | {:.2}", self.p50, self.p99, self.p999)
    }
}

// === impl Row ===

impl Row {
    pub(super) fn new(round: &Round, phase: Duration, cpus: usize) -> Result<Self> {
        let sum = |figure: fn(&Hog) -> u64| round.hogs.iter().map(figure).sum::<u64>() as f64;
        let cpu_ns = |hog: &Hog| hog.cpu_ns;
        let all = round.hogs.iter().map(cpu_ns);
        let (least, most) = (all.clone().min().unwrap_or(0), all.max().unwrap_or(0));
        let mean = sum(cpu_ns) / round.hogs.len().max(1) as f64;
        let longest = round.hogs.iter().map(|hog| hog.longest_wait_ns).max();
        Ok(Self {
            timer: Times::new(&round.quiet.timer_ns)?,
            pipe: Times::new(&round.quiet.pipe_ns)?,
            daemon: Times::new(&round.daemon.timer_ns)?,
            turns: sum(|hog| hog.turns),
            cpu: sum(cpu_ns) / (phase.as_nanos() as f64 * cpus as f64),
            spread: (most - least) as f64 / mean.max(1.0),
            longest_wait: longest.unwrap_or(0) as f64 / 1e6,
        })
    }
}

/// The table: `alone` and `again` are the same, before and after all; `base` is what those that compute did by the kernel's default.
pub(super) fn render(alone: &Row, again: &Row, rows: &[(&str, Result<Row, String>)], base: f64) -> String {
    let mut text = String::from(
        "| way | timer p50 | p99 | p99.9 | pipe p50 | p99 | p99.9 | p99 to alone: timer, pipe | daemon p99 | hogs' work | their CPU \
         | spread | longest wait |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    let ratios = |row: &Row| {
        format!(
            "{:.1}, {:.1}",
            row.timer.p99 / alone.timer.p99,
            row.pipe.p99 / alone.pipe.p99
        )
    };
    for (name, row) in [("alone", alone), ("alone, at the end", again)] {
        let (timer, pipe) = (row.timer.cells(), row.pipe.cells());
        // A string takes it all.
        let _ = writeln!(
            text,
            "| {name} | {timer} | {pipe} | {} | {:.2} |  |  |  |  |",
            ratios(row),
            row.daemon.p99
        );
    }
    for (name, row) in rows {
        let _ = match row {
            Ok(row) => writeln!(
                text,
                "| {name} | {} | {} | {} | {:.2} | {:.0}% | {:.0}% | {:.1}% | {:.0} |",
                row.timer.cells(),
                row.pipe.cells(),
                ratios(row),
                row.daemon.p99,
                row.turns / base * 100.0,
                row.cpu * 100.0,
                row.spread * 100.0,
                row.longest_wait,
            ),
            Err(why) => writeln!(text, "| {name} | not here: {why} |  |  |  |  |  |  |  |  |  |  |  |"),
        };
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::role::Waker;
    use super::*;

    fn waker(ms: u64) -> Waker {
        Waker {
            timer_ns: vec![ms * 1_000_000; 10],
            pipe_ns: vec![2 * ms * 1_000_000; 10],
        }
    }

    fn hog(cpu_ms: u64) -> Hog {
        Hog {
            cpu_ns: cpu_ms * 1_000_000,
            turns: cpu_ms,
            longest_wait_ns: cpu_ms * 1000,
        }
    }

    #[test]
    fn percentiles_are_of_so_many_figures() {
        let times = Times::new(&(1..=1000).rev().map(|ms| ms * 1_000_000).collect::<Vec<_>>()).unwrap();
        assert_eq!((times.p50, times.p99, times.p999), (500.0, 990.0, 999.0));
        let one = Times::new(&[3_000_000]).unwrap();
        assert_eq!((one.p50, one.p999), (3.0, 3.0));
        assert!(Times::new(&[]).is_err());
    }

    #[test]
    fn each_way_is_a_row() {
        let round = Round {
            quiet: waker(3),
            daemon: waker(5),
            hogs: vec![hog(900), hog(1100)],
        };
        let alone = Round {
            quiet: waker(1),
            daemon: waker(1),
            hogs: Vec::new(),
        };
        let second = Duration::from_secs(1);
        let (row, alone) = (
            Row::new(&round, second, 2).unwrap(),
            Row::new(&alone, second, 2).unwrap(),
        );
        let rows = [("SCHED_RR", Ok(row)), ("cpu.idle", Err("no controller".to_owned()))];
        let text = render(&alone, &alone, &rows, 2000.0);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 6, "{text}");
        let columns = |line: &&str| line.matches('|').count();
        assert!(lines.iter().all(|line| columns(line) == columns(&lines[0])), "{text}");
        assert_eq!(
            lines[4],
            "| SCHED_RR | 3.00 | 3.00 | 3.00 | 6.00 | 6.00 | 6.00 | 3.0, 3.0 | 5.00 | 100% | 100% | 20.0% | 1 |"
        );
        assert!(lines[5].contains("not here: no controller"));
    }
}
