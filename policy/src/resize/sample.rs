//! One execution as it was counted, and how long it would have taken with another amount of CPU.

use serde::{Deserialize, Serialize};

use crate::Amount;

/// What one execution used of what it was given, as eBPF and the cgroup count it. A guest may lie: whatever it says, an amount
/// stays within its bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// How long it took, in ns.
    pub wall_ns: u64,
    /// CPU time in ns.
    pub cpu_ns: u64,
    /// How long it was kept from running because its amount of CPU was used up, in ns.
    pub throttled_ns: u64,
    /// How long its threads were runnable and waited for a CPU that others had, in ns: no amount of its own shortens that.
    pub wait_ns: u64,
    /// The most resident memory during this execution, in bytes; without page cache, which is given back on demand.
    pub memory_peak_bytes: u64,
    /// It was killed for want of memory.
    pub oom_killed: bool,
    /// What its container was given.
    pub amount: Amount,
}

/// What counts of an execution where it is asked how much CPU it needs.
///
/// Threads that run use whole CPUs. While an amount is used up nothing runs: with more of it, that time is shorter by as much as
/// the same CPU time takes less, and at most gone. With less, CPU time takes longer, as far as it took less than all CPUs
/// that its threads would have run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    wall_ns: u64,
    cpu_ns: u64,
    throttled_ns: u64,
    wait_ns: u64,
    /// What it was given, in millicores.
    given: u32,
    /// With how much it runs as fast as it can, as far as that is known.
    wants: u32,
}

/// The longest execution that is believed: a day.
const LONGEST_NS: u64 = 24 * 3600 * 1_000_000_000;

/// The most CPUs that are believed.
const MOST_CPUS: u64 = 1024;

/// Throttled for less than a part of this many of its time, an execution was not held back.
const UNNOTICED: u64 = 50;

// === impl Sample ===

impl Sample {
    /// The most memory that it took, in MiB. No more than it was given and has not been killed for.
    pub(crate) fn peak_mib(&self) -> u32 {
        let mib = u32::try_from(self.memory_peak_bytes.div_ceil(1 << 20)).unwrap_or(u32::MAX);
        mib.min(self.amount.memory_mib)
    }
}

// === impl Run ===

impl Run {
    pub(crate) fn of(sample: &Sample) -> Self {
        let wall_ns = sample.wall_ns.clamp(1, LONGEST_NS);
        let cpu_ns = sample.cpu_ns.min(wall_ns.saturating_mul(MOST_CPUS));
        let given = sample.amount.cpu_millis.max(1);
        let throttled_ns = match sample.throttled_ns.min(wall_ns) {
            some if some < wall_ns / UNNOTICED => 0,
            some => some,
        };
        let cpus = cpu_ns.div_ceil(wall_ns).max(1);
        let wants = match throttled_ns {
            0 => u32::try_from(cpus * 1000).unwrap_or(u32::MAX),
            _ => u32::MAX,
        };
        Self {
            wall_ns,
            cpu_ns,
            throttled_ns,
            wait_ns: sample.wait_ns.min(wall_ns),
            given,
            wants,
        }
    }

    pub(crate) fn wall_ns(&self) -> u64 {
        self.wall_ns
    }

    pub(crate) fn cpu_ns(&self) -> u64 {
        self.cpu_ns
    }

    pub(crate) fn throttled_ns(&self) -> u64 {
        self.throttled_ns
    }

    pub(crate) fn wait_ns(&self) -> u64 {
        self.wait_ns
    }

    /// How long it would have taken with this many millicores, in ns.
    pub(crate) fn wall_at(&self, cpu_millis: u32) -> u64 {
        let (now, then) = (self.running_at(self.given), self.running_at(cpu_millis));
        match now.checked_sub(then) {
            Some(less) => self.wall_ns - less.min(self.throttled_ns),
            None => self.wall_ns.saturating_add(then - now),
        }
    }

    /// How long its CPU time takes with this many millicores.
    fn running_at(&self, cpu_millis: u32) -> u64 {
        // A day on all CPUs, in millicores: less than 2^64.
        self.cpu_ns.saturating_mul(1000) / u64::from(cpu_millis.clamp(1, self.wants))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn run(wall_ms: u64, cpu_ms: u64, throttled_ms: u64, cpu_millis: u32) -> Run {
        Run::of(&Sample {
            wall_ns: wall_ms * 1_000_000,
            cpu_ns: cpu_ms * 1_000_000,
            throttled_ns: throttled_ms * 1_000_000,
            wait_ns: 0,
            memory_peak_bytes: 0,
            oom_killed: false,
            amount: (cpu_millis, 128).into(),
        })
    }

    #[test]
    fn one_thread_that_is_held_back_becomes_faster_up_to_a_whole_cpu() {
        let held = run(400, 100, 300, 250);
        assert_eq!(held.wall_at(250), SECOND * 4 / 10);
        assert_eq!(held.wall_at(500), SECOND * 2 / 10);
        assert_eq!(held.wall_at(1000), SECOND / 10);
        assert_eq!(held.wall_at(4000), SECOND / 10);
        assert_eq!(held.wall_at(125), SECOND * 8 / 10);
    }

    #[test]
    fn four_threads_are_as_many_cpus() {
        let held = run(1000, 1000, 750, 1000);
        assert_eq!(held.wall_at(2000), SECOND / 2);
        assert_eq!(held.wall_at(4000), SECOND / 4);
        assert_eq!(held.wall_at(6000), SECOND / 4);
    }

    #[test]
    fn who_waits_for_others_is_not_helped_by_more_and_loses_little_by_less() {
        let waits = run(500, 20, 0, 1000);
        assert_eq!(waits.wall_at(4000), SECOND / 2);
        assert_eq!(waits.wall_at(200), SECOND * 58 / 100);
        // What one thread uses of four CPUs it uses of one.
        assert_eq!(run(1000, 990, 0, 4000).wall_at(1000), SECOND);
    }

    #[test]
    fn what_a_guest_says_is_bounded() {
        let all = Run::of(&Sample {
            wall_ns: u64::MAX,
            cpu_ns: u64::MAX,
            throttled_ns: u64::MAX,
            wait_ns: u64::MAX,
            memory_peak_bytes: u64::MAX,
            oom_killed: true,
            amount: (u32::MAX, 64).into(),
        });
        assert!(all.wall_at(1) >= all.wall_at(u32::MAX));
        let nothing = run(0, 0, 0, 0);
        assert_eq!((nothing.wall_at(0), nothing.wall_at(1000)), (1, 1));
    }
}
