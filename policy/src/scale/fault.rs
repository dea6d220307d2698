//! Why thresholds can't be kept.

use std::fmt;
use std::time::Duration;

use super::check::{LEAST_TIME, MAX_THRESHOLDS, MOST_TIME};
use super::size::{Quantity, Resource};
use super::threshold::{Comparison, Direction, Metric};
use crate::decision::Rounded;

/// Thresholds that can't be kept: which of them, from 0, and why.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ThresholdError {
    /// One of them can't be.
    #[error("threshold {}: {fault}", index + 1)]
    Fault {
        /// Which.
        index: usize,
        /// Why.
        fault: Fault,
    },
    /// One says that a machine is to grow while another says that it is to shrink.
    #[error(
        "threshold {} contradicts threshold {}: a {metric} {crossed} would both grow and shrink {resource}; let the one by which it \
         shrinks be crossed below {low}, and the one by which it grows above that",
        other + 1, index + 1
    )]
    Contradiction {
        /// The first.
        index: usize,
        /// The second.
        other: usize,
        /// What both are about.
        metric: Metric,
        /// What both change.
        resource: Resource,
        /// Where both are crossed, in words.
        crossed: String,
        /// The lower of the two values, in words.
        low: String,
    },
    /// There are too many.
    #[error("{0} thresholds are more than the {MAX_THRESHOLDS} that a machine may have")]
    TooMany(usize),
}

/// Why a threshold can't be kept.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Fault {
    /// There is no such metric.
    #[error("there is no metric {name:?}; there are {}", AllMetrics)]
    UnknownMetric {
        /// What was asked for.
        name: String,
    },
    /// The machine has no credits.
    #[error("the machine has no account of credits")]
    NoCredits,
    /// A value that is no number, or infinite.
    #[error("{what} is {value}, which is no number")]
    NoNumber {
        /// What it is of.
        what: &'static str,
        /// The value.
        value: f64,
    },
    /// A value below 0.
    #[error("{what} is {value}, and can't be negative")]
    Negative {
        /// What it is of.
        what: &'static str,
        /// The value.
        value: f64,
    },
    /// It would never be crossed.
    #[error("{metric} is never {comparison} {value}")]
    NeverCrossed {
        /// The metric.
        metric: Metric,
        /// The side.
        comparison: Comparison,
        /// The value.
        value: f64,
    },
    /// More than the unit can hold.
    #[error("{what} is {value}, which is too much")]
    TooMuch {
        /// What it is of.
        what: &'static str,
        /// The value.
        value: f64,
    },
    /// A time that can't be.
    #[error("{what} of {} is not within {} and {}", Rounded(*time), Rounded(LEAST_TIME), Rounded(MOST_TIME))]
    Time {
        /// Which.
        what: &'static str,
        /// What was asked for.
        time: Duration,
    },
    /// It changes nothing.
    #[error("it changes {0} by nothing")]
    NoChange(Resource),
    /// Nothing would be left.
    #[error("it leaves nothing of {0}: shrink by less than 100%")]
    NothingLeft(Resource),
    /// What it does makes what it is about worse.
    #[error(
        "with {} {resource} {metric} {}: it would be crossed ever more; let it {} instead",
        if *direction == Direction::Grow { "more" } else { "less" },
        if *direction == Direction::Grow { "falls" } else { "rises" },
        if *direction == Direction::Grow { "shrink" } else { "grow" }
    )]
    Backwards {
        /// What it is about.
        metric: Metric,
        /// What it changes.
        resource: Resource,
        /// Which way.
        direction: Direction,
    },
    /// Memory that is not in whole blocks.
    #[error("{what} is {}, and memory goes in blocks of {}", Quantity(*resource, *amount), Quantity(*resource, resource.unit()))]
    Blocks {
        /// Which amount.
        what: &'static str,
        /// Of what.
        resource: Resource,
        /// How much.
        amount: u32,
    },
    /// The least is more than the most.
    #[error("least is {}, which is more than most, {}", Quantity(*resource, *least), Quantity(*resource, *most))]
    LeastAboveMost {
        /// Of what.
        resource: Resource,
        /// The least.
        least: u32,
        /// The most.
        most: u32,
    },
    /// It leads out of what it is to stay within.
    #[error(
        "{} is not within least, {}, and most, {}",
        Quantity(*resource, *to), Quantity(*resource, *least), Quantity(*resource, *most)
    )]
    ToOutside {
        /// Of what.
        resource: Resource,
        /// Where it leads.
        to: u32,
        /// The least.
        least: u32,
        /// The most.
        most: u32,
    },
    /// More than there is.
    #[error("{what} is {}, and {whose} has at most {}", Quantity(*resource, *amount), Quantity(*resource, *most))]
    TooLarge {
        /// Which amount.
        what: &'static str,
        /// Of what.
        resource: Resource,
        /// How much.
        amount: u32,
        /// Who has no more.
        whose: Whose,
        /// The most.
        most: u32,
    },
    /// Less than a machine can have.
    #[error("{what} is {}, and the machine always has {}", Quantity(*resource, *amount), Quantity(*resource, *least))]
    TooSmall {
        /// Which amount.
        what: &'static str,
        /// Of what.
        resource: Resource,
        /// How much.
        amount: u32,
        /// The least.
        least: u32,
    },
}

/// Whose limit it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// The host's.
    Host,
    /// The account's.
    Account,
    /// The machine's own, since it was launched.
    Machine,
}

impl fmt::Display for Whose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Host => "the host",
            Self::Account => "its account",
            Self::Machine => "the machine itself",
        })
    }
}

struct AllMetrics;

impl fmt::Display for AllMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut names = Metric::ALL.iter().map(|metric| metric.name());
        names.try_for_each(|name| match name == Metric::CpuUse.name() {
            true => f.write_str(name),
            false => write!(f, ", {name}"),
        })
    }
}
