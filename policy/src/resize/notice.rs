//! What the user is told.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{Amount, Code};

/// An amount did not fit: what its user is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notice {
    /// The function and its version.
    pub code: Code,
    /// What to do, or what was done.
    pub kind: NoticeKind,
    /// The amount that it was compared with: what the function or the request asked for, or, where amounts are changed by
    /// themselves, what it had before.
    pub amount: Amount,
    /// It was the amount that one request named for itself.
    #[serde(default)]
    pub own_amount: bool,
    /// Why.
    pub figures: Figures,
}

/// Exactly one of these. Where one part is too little and another too much it is what is too little.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NoticeKind {
    /// More is needed, and nothing says how much: it was killed for want of it.
    Increase,
    /// This much more.
    IncreaseBy(Amount),
    /// Less would do, and one execution does not say how much is safe.
    Decrease,
    /// This much less.
    DecreaseBy(Amount),
}

/// What executions used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Figures {
    /// How many executions memory was looked at in.
    pub executions: u32,
    /// The last one was killed for want of memory.
    pub killed: bool,
    /// A container could not start with less than was asked for.
    #[serde(default)]
    pub start_failed: bool,
    /// The peak of memory that nearly all of them do not exceed, in MiB.
    pub usual_mib: u32,
    /// The largest, in MiB.
    pub largest_mib: u32,
    /// How many executions CPU was looked at in: the latest without the longest and the shortest of them.
    pub runs: u32,
    /// How long these took, on average.
    pub took: Duration,
    /// How long they would have taken with the CPU that is advised.
    pub would_take: Duration,
    /// CPU that they used, in millicores on average.
    pub used_millis: u32,
    /// Of a thousand parts of their time, those in which their CPU was used up.
    pub throttled_permille: u32,
    /// Likewise those in which they waited for a CPU that others had. No amount shortens that.
    pub waited_permille: u32,
}

// === impl NoticeKind ===

impl NoticeKind {
    /// The change from one amount to another, as far as these parts have changed.
    pub(crate) fn of(from: Amount, to: Amount, cpu: bool, memory: bool) -> Option<Self> {
        let parts = |more: Amount| Amount {
            cpu_millis: if cpu { more.cpu_millis } else { 0 },
            memory_mib: if memory { more.memory_mib } else { 0 },
            scratch_mib: 0,
        };
        let (more, less) = (parts(to.minus(from)), parts(from.minus(to)));
        let nothing = Amount::default();
        if more != nothing {
            Some(Self::IncreaseBy(more))
        } else {
            (less != nothing).then_some(Self::DecreaseBy(less))
        }
    }
}

impl fmt::Display for NoticeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (word, by) = match self {
            Self::Increase => ("increase", None),
            Self::IncreaseBy(by) => ("increase", Some(by)),
            Self::Decrease => ("decrease", None),
            Self::DecreaseBy(by) => ("decrease", Some(by)),
        };
        let Some(by) = by else { return f.write_str(word) };
        match (by.cpu_millis, by.memory_mib) {
            (0, memory_mib) => write!(f, "{word} by {memory_mib} MiB"),
            (cpu_millis, 0) => write!(f, "{word} by {cpu_millis} mCPU"),
            (cpu_millis, memory_mib) => write!(f, "{word} by {cpu_millis} mCPU and {memory_mib} MiB"),
        }
    }
}

// === impl Figures ===

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            executions,
            usual_mib,
            largest_mib,
            runs,
            used_millis,
            ..
        } = self;
        if self.killed {
            f.write_str("an execution was killed for want of memory; ")?;
        }
        if self.start_failed {
            f.write_str("a container could not start with less than was asked for; ")?;
        }
        write!(
            f,
            "executions: {executions}, memory at peaks {usual_mib} MiB, at most {largest_mib} MiB"
        )?;
        if *runs == 0 {
            return Ok(());
        }
        write!(f, "; the last {runs} took {} and {used_millis} mCPU", Ms(self.took))?;
        if self.throttled_permille > 0 {
            write!(
                f,
                ", {} of it kept from running by their amount",
                Permille(self.throttled_permille)
            )?;
        }
        if self.waited_permille > 0 {
            write!(f, ", {} of it waiting for others", Permille(self.waited_permille))?;
        }
        match self.would_take == self.took {
            true => Ok(()),
            false => write!(f, "; they would take {}", Ms(self.would_take)),
        }
    }
}

struct Ms(Duration);

impl fmt::Display for Ms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} ms", self.0.as_secs_f64() * 1000.0)
    }
}

struct Permille(u32);

impl fmt::Display for Permille {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}%", self.0 / 10, self.0 % 10)
    }
}
