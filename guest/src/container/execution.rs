//! What one execution, an invocation or an init, used of what its container was given.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::credits;
use crate::machine;
use crate::telemetry::{Subject, Use};

/// One shorter than this is not asked how long it was held back: the next one is, with what it leaves. To ask takes a few
/// microseconds.
const SHORT: Duration = Duration::from_millis(2);

/// What an execution used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Execution {
    /// How long it took.
    pub(crate) wall: Duration,
    /// Since the one before it ended. `recent_peak_bytes` is of this one alone.
    pub(crate) used: Use,
    /// For how much of the time its amount of CPU kept it from running.
    pub(crate) throttled: Duration,
    /// How long its threads waited for CPUs that others had, in ns: without what its limit held them back.
    pub(crate) wait_ns: u64,
}

/// Tells one execution of a container from the next.
pub(super) struct Meter {
    subject: Subject,
    credits: credits::Share,
    told: Mutex<Told>,
}

/// What was counted by the end of the last one.
#[derive(Default)]
struct Told {
    used: Use,
    throttled_ns: u64,
}

// === impl Meter ===

impl Meter {
    pub(super) fn new(subject: Subject, credits: credits::Share) -> Self {
        Self {
            subject,
            credits,
            told: Mutex::default(),
        }
    }

    /// An execution begins.
    pub(super) fn begin(&self) {
        self.subject.begin_peak();
    }

    /// It has ended after so long, and the container, which may have ended with it (`over`), has used so much in all.
    pub(super) fn end(&self, wall: Duration, used: Use, over: bool) -> Execution {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let since = used.since(&std::mem::replace(&mut told.used, used));
        let (mut throttled, mut held_ns) = (Duration::ZERO, 0);
        if !over
            && wall >= SHORT
            && let Some(all_ns) = self.subject.throttled_ns()
        {
            held_ns = all_ns.saturating_sub(std::mem::replace(&mut told.throttled_ns, all_ns));
            if held_ns > 0 && !self.credits.holds_back() {
                throttled = held_back(wall, since.cpu_ns, held_ns, machine::cpus());
            }
        }
        Execution {
            wall,
            used: since,
            throttled,
            wait_ns: since.wait_ns.saturating_sub(held_ns),
        }
    }
}

/// How long nothing ran. The kernel adds up how long it held back the threads of each CPU, so several that were held back at the
/// same time count several times; but while anything ran, no more than all CPUs did.
fn held_back(wall: Duration, cpu_ns: u64, held_ns: u64, cpus: u32) -> Duration {
    let ran = Duration::from_nanos(cpu_ns / u64::from(cpus.max(1)));
    Duration::from_nanos(held_ns).min(wall.saturating_sub(ran))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(wall_ms: u64, cpu_ms: u64, held_ms: u64, cpus: u32) -> Duration {
        held_back(
            Duration::from_millis(wall_ms),
            cpu_ms * 1_000_000,
            held_ms * 1_000_000,
            cpus,
        )
    }

    #[test]
    fn threads_that_are_held_back_together_count_once() {
        // One thread with a quarter of a CPU, wherever it runs.
        assert_eq!(held(400, 100, 300, 1), Duration::from_millis(300));
        assert_eq!(held(400, 100, 300, 4), Duration::from_millis(300));
        // Four of them with one CPU among them.
        assert_eq!(held(1000, 1000, 3000, 4), Duration::from_millis(750));
        // What was left over from before.
        assert_eq!(held(10, 10, 75, 1), Duration::ZERO);
    }
}
