use std::fmt;

use serde::{Deserialize, Serialize};

use super::size::{Quantity, Resource};
use super::threshold::{Metric, Value};

/// What stands in the way of more or less of a resource. Amounts are in the resource's unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Obstacle {
    /// The threshold's own most.
    Most(u32),
    /// The threshold's own least.
    Least(u32),
    /// The most that the machine may ever have, fixed when it was launched.
    Ceiling(u32),
    /// All that its vCPUs come to.
    Vcpus(u32),
    /// Its account may have no more; the machine could have so much.
    Account(u32),
    /// The host has no more; the machine could have so much.
    Host(u32),
    /// The host's CPUs are promised to others; the machine could have so much.
    Promised(u32),
    /// The memory that it was booted with.
    Booted(u32),
    /// A machine has at least one vCPU, and at least its baseline.
    Always(u32),
    /// What it uses: the least that this leaves it.
    Used(u32),
    /// With less than this it would cross a threshold by which it grows.
    WouldGrow(u32),
    /// Its credits hold it back, so that nobody knows what it would use.
    HeldBack,
    /// What it uses is not known: it was not measured, or its guest does not say.
    Unmeasured,
    /// Its guest has not taken what was asked of it before; it has so much.
    Guest(u32),
}

/// A threshold that was crossed, and what comes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Crossed {
    /// What was measured.
    pub metric: Metric,
    /// The threshold's value and side.
    pub threshold: u64,
    /// It is crossed above that (or else below).
    pub above: bool,
    /// The metric's value, as it was last.
    pub measured: u64,
    /// For how long it has been crossed, in ms.
    pub held_ms: u64,
    /// What was to be changed.
    pub resource: Resource,
    /// How much of it the machine had.
    pub before: u32,
    /// How much it should have had.
    pub wanted: u32,
    /// How much it has.
    pub after: u32,
    /// What stood in the way of the rest.
    pub obstacle: Option<Obstacle>,
}

// === impl Obstacle ===

impl Obstacle {
    /// In words, about this resource.
    pub(super) fn about(self, resource: Resource) -> impl fmt::Display {
        About(self, resource)
    }
}

struct About(Obstacle, Resource);

impl fmt::Display for About {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = |amount| Quantity(self.1, amount);
        match self.0 {
            Obstacle::Most(most) => write!(f, "{} is the threshold's most", of(most)),
            Obstacle::Least(least) => write!(f, "{} is the threshold's least", of(least)),
            Obstacle::Ceiling(most) => write!(f, "{} is the most that it was launched with", of(most)),
            Obstacle::Vcpus(most) => write!(f, "its vCPUs come to {}", of(most)),
            Obstacle::Account(most) => write!(f, "the limits of its account leave it {}", of(most)),
            Obstacle::Host(most) => write!(f, "the host has room for {}", of(most)),
            Obstacle::Promised(most) => {
                write!(f, "the host's CPUs are promised to others, and leave it {}", of(most))
            }
            Obstacle::Booted(least) => write!(f, "it was booted with {} and can't give them back", of(least)),
            Obstacle::Always(least) => write!(f, "it always has {}", of(least)),
            Obstacle::Used(least) => write!(f, "what it uses needs {}", of(least)),
            Obstacle::WouldGrow(least) => {
                write!(
                    f,
                    "with less than {} it would cross a threshold by which it grows",
                    of(least)
                )
            }
            Obstacle::HeldBack => f.write_str("its credits hold it back, and nobody knows what it would use"),
            Obstacle::Unmeasured => f.write_str("what it uses is not known"),
            Obstacle::Guest(taken) => {
                write!(f, "its guest has {}, and not what was asked of it before", of(taken))
            }
        }
    }
}

// === impl Crossed ===

impl fmt::Display for Crossed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (metric, resource) = (self.metric, self.resource);
        let side = if self.above { "above" } else { "below" };
        let held = crate::decision::Rounded(std::time::Duration::from_millis(self.held_ms));
        write!(
            f,
            "{metric} was {side} {} for {held}, at last {}: ",
            Value(metric, self.threshold),
            Value(metric, self.measured)
        )?;
        let of = |amount| Quantity(resource, amount);
        match self.before == self.after {
            true => write!(
                f,
                "{resource} should be {} and stays {}",
                of(self.wanted),
                of(self.after)
            )?,
            false => write!(f, "{resource} from {} to {}", of(self.before), of(self.after))?,
        }
        if self.before != self.after && self.wanted != self.after {
            write!(f, " instead of {}", of(self.wanted))?;
        }
        match self.obstacle {
            Some(obstacle) => write!(f, ", for {}", obstacle.about(resource)),
            None => Ok(()),
        }
    }
}
