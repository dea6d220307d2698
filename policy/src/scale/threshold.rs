//! Thresholds that have been checked.

use std::fmt;
use std::ops::Deref;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::size::{Quantity, Resource};
use crate::decision::Rounded;

/// What is measured of a machine. All but credits are in hundredths of a percent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Metric {
    /// CPU time that its vCPUs used, of its CPU share or of the vCPUs that the guest has, whichever is less.
    CpuUse,
    /// Of the time in which its vCPUs wanted to run, the part in which they waited for one of the host's CPUs.
    CpuWait,
    /// Memory that the guest could not give up, of what it has.
    MemoryUse,
    /// The part of the time in which something in the guest waited for a CPU (PSI, `some`).
    CpuPressure,
    /// The same for memory.
    MemoryPressure,
    /// The same for I/O.
    IoPressure,
    /// What it can spend of its credits, in thousandths of one.
    Credits,
}

/// On which side of its value a threshold is crossed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Comparison {
    /// Where the metric is more.
    Above,
    /// Where it is less.
    Below,
}

/// Which way a machine's size goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Direction {
    /// It has more.
    Grow,
    /// It has less.
    Shrink,
}

/// How far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    /// By so much, in the resource's unit.
    By(u32),
    /// By such a part of what it has, in hundredths of a percent; by one unit at least.
    ByPart(u32),
    /// To so much; where it has that already, or is beyond it, nothing happens.
    To(u32),
}

/// When a machine's size is changed, and how. Made by [`check`](super::check) alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Threshold {
    pub(super) metric: Metric,
    pub(super) comparison: Comparison,
    pub(super) value: u64,
    pub(super) held: Duration,
    pub(super) resource: Resource,
    pub(super) direction: Direction,
    pub(super) change: Change,
    pub(super) least: u32,
    pub(super) most: u32,
    pub(super) cooldown: Duration,
}

/// The thresholds of a machine, which contradict neither themselves nor one another.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Thresholds(pub(super) Vec<Threshold>);

// === impl Metric ===

impl Metric {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::CpuUse,
        Self::CpuWait,
        Self::MemoryUse,
        Self::CpuPressure,
        Self::MemoryPressure,
        Self::IoPressure,
        Self::Credits,
    ];

    /// What it is called in the API.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::CpuUse => "cpu_use",
            Self::CpuWait => "cpu_wait",
            Self::MemoryUse => "memory_use",
            Self::CpuPressure => "cpu_pressure",
            Self::MemoryPressure => "memory_pressure",
            Self::IoPressure => "io_pressure",
            Self::Credits => "credits",
        }
    }

    /// The one of this name.
    #[must_use]
    pub fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|metric| metric.name() == name)
    }

    /// It falls where a machine has more of this resource, and rises where it has less.
    pub(super) fn falls_with(self, resource: Resource) -> bool {
        match self {
            Self::CpuUse | Self::CpuWait | Self::CpuPressure => resource.is_cpu(),
            Self::MemoryUse | Self::MemoryPressure => resource == Resource::Memory,
            Self::IoPressure | Self::Credits => false,
        }
    }

    /// Its place in an array of all.
    pub(super) fn index(self) -> usize {
        match self {
            Self::CpuUse => 0,
            Self::CpuWait => 1,
            Self::MemoryUse => 2,
            Self::CpuPressure => 3,
            Self::MemoryPressure => 4,
            Self::IoPressure => 5,
            Self::Credits => 6,
        }
    }
}

impl fmt::Display for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The value of a metric, as people read it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Value(pub(super) Metric, pub(super) u64);

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Metric::Credits => stoker_credits::Credits::from_millis(self.1).fmt(f),
            _ => Percent(self.1).fmt(f),
        }
    }
}

/// Hundredths of a percent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Percent(pub(crate) u64);

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.0 / 100, self.0 % 100) {
            (whole, 0) => write!(f, "{whole}%"),
            (whole, part) => write!(f, "{whole}.{part:02}%"),
        }
    }
}

// === impl Comparison ===

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Above => "above",
            Self::Below => "below",
        })
    }
}

// === impl Threshold ===

impl Threshold {
    /// What is measured.
    #[must_use]
    pub fn metric(&self) -> Metric {
        self.metric
    }

    /// On which side of the value it is crossed.
    #[must_use]
    pub fn comparison(&self) -> Comparison {
        self.comparison
    }

    /// The value, in the metric's unit.
    #[must_use]
    pub fn value(&self) -> u64 {
        self.value
    }

    /// How long it has to be crossed before something happens.
    #[must_use]
    pub fn held(&self) -> Duration {
        self.held
    }

    /// What is changed.
    #[must_use]
    pub fn resource(&self) -> Resource {
        self.resource
    }

    /// Which way.
    #[must_use]
    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// How far.
    #[must_use]
    pub fn change(&self) -> Change {
        self.change
    }

    /// The least that the machine is to have by it.
    #[must_use]
    pub fn least(&self) -> u32 {
        self.least
    }

    /// The most.
    #[must_use]
    pub fn most(&self) -> u32 {
        self.most
    }

    /// How long after the last change of the resource, whoever made it, this threshold makes none.
    #[must_use]
    pub fn cooldown(&self) -> Duration {
        self.cooldown
    }

    pub(super) fn is_crossed_by(&self, value: u64) -> bool {
        match self.comparison {
            Comparison::Above => value > self.value,
            Comparison::Below => value < self.value,
        }
    }

    /// How much a machine would have that has so much, in whole units, before anything stands in the way; nothing where it is beyond that
    /// already.
    pub(super) fn target(&self, has: u32) -> Option<u32> {
        let part = |part: u32| {
            let by = u64::from(has) * u64::from(part) / 10_000;
            u32::try_from(by).unwrap_or(u32::MAX).max(self.resource.unit())
        };
        let target = match (self.direction, self.change) {
            (_, Change::To(to)) => to,
            (Direction::Grow, Change::By(by)) => has.saturating_add(by),
            (Direction::Grow, Change::ByPart(by)) => has.saturating_add(part(by)),
            (Direction::Shrink, Change::By(by)) => has.saturating_sub(by),
            (Direction::Shrink, Change::ByPart(by)) => has.saturating_sub(part(by)),
        };
        let unit = self.resource.unit();
        let target = target.checked_next_multiple_of(unit).unwrap_or(target - target % unit);
        let is_further = match self.direction {
            Direction::Grow => target > has,
            Direction::Shrink => target < has,
        };
        is_further.then_some(target)
    }
}

/// As it is told what it is about: `cpu_use above 80% for 10.0 s: grow vCPUs by 1 vCPU`.
impl fmt::Display for Threshold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (metric, comparison, held) = (self.metric, self.comparison, Rounded(self.held));
        write!(f, "{metric} {comparison} {} for {held}: ", Value(metric, self.value))?;
        let direction = match self.direction {
            Direction::Grow => "grow",
            Direction::Shrink => "shrink",
        };
        write!(f, "{direction} {} ", self.resource)?;
        match self.change {
            Change::By(by) => write!(f, "by {}", Quantity(self.resource, by)),
            Change::ByPart(by) => write!(f, "by {}", Percent(by.into())),
            Change::To(to) => write!(f, "to {}", Quantity(self.resource, to)),
        }
    }
}

// === impl Thresholds ===

impl Deref for Thresholds {
    type Target = [Threshold];

    fn deref(&self) -> &[Threshold] {
        &self.0
    }
}
