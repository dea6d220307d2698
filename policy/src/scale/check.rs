//! Whether thresholds can be kept, before anything goes by them.

use std::time::Duration;

use super::fault::{Fault, ThresholdError, Whose};
use super::size::{Resource, Size};
use super::threshold::{Change, Comparison, Direction, Metric, Threshold, Thresholds, Value};

/// The most thresholds of a machine: each is looked at whenever it is measured.
pub const MAX_THRESHOLDS: usize = 16;

/// How long a threshold is crossed at least before something happens, and how long its cooldown is at least: machines are
/// measured once a second.
pub const LEAST_TIME: Duration = Duration::from_secs(1);

/// How long each may be at most.
pub const MOST_TIME: Duration = Duration::from_secs(24 * 60 * 60);

/// How long a threshold is crossed before a machine grows, where nothing else is asked for: longer than a short burst, and soon
/// enough for who waits.
pub const HELD_TO_GROW: Duration = Duration::from_secs(10);

/// The same before it shrinks. To grow late costs those who wait, to shrink late costs little; so the Horizontal Pod Autoscaler of
/// Kubernetes looks back as long before it shrinks ("Stabilization window").
pub const HELD_TO_SHRINK: Duration = Duration::from_secs(300);

/// The cooldown of a threshold by which a machine grows, where nothing else is asked for: a guest has taken what it got long
/// before, and a minute of load is enough to judge by.
pub const COOLDOWN_TO_GROW: Duration = Duration::from_secs(60);

/// The same for one by which it shrinks: as long as the default cooldown of AWS's simple scaling policies.
pub const COOLDOWN_TO_SHRINK: Duration = Duration::from_secs(300);

/// The most that a machine may grow by at once, in percent of what it has.
const MOST_PERCENT: f64 = 1000.0;

/// A threshold as somebody asks for it.
#[derive(Clone, Debug, PartialEq)]
pub struct ThresholdSpec {
    /// The name of a metric.
    pub metric: String,
    /// On which side of the value it is crossed.
    pub comparison: Comparison,
    /// In percent, or in credits.
    pub value: f64,
    /// How long it has to be crossed; by default as the constants say.
    pub held: Option<Duration>,
    /// What is to be changed.
    pub resource: Resource,
    /// Which way.
    pub direction: Direction,
    /// How far.
    pub change: ChangeSpec,
    /// The least that the machine is to have by it; by default as little as a machine can have.
    pub least: Option<u32>,
    /// The most; by default as much as the machine, its account and the host may have.
    pub most: Option<u32>,
    /// How long after a change of the resource it makes none; by default as the constants say.
    pub cooldown: Option<Duration>,
}

/// How far a machine's size is to go, as somebody asks for it; in the resource's unit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ChangeSpec {
    /// By so much.
    By(u32),
    /// By so many percent of what it has.
    ByPercent(f64),
    /// To so much.
    To(u32),
}

/// What a machine can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// The most that the host has for machines.
    pub host: Size,
    /// The most that all machines of its account may have.
    pub account: Size,
    /// The most that the machine may ever have, fixed when it was launched.
    pub machine: Size,
    /// The memory that it is booted with, in MiB, and can't give back.
    pub base_mib: u32,
    /// It has an account of credits.
    pub credits: bool,
}

/// Checks thresholds for a machine within bounds.
///
/// # Errors
/// The first that can't be kept, or the first two that contradict one another; the error says why.
pub fn check(specs: &[ThresholdSpec], bounds: &Bounds) -> Result<Thresholds, ThresholdError> {
    if specs.len() > MAX_THRESHOLDS {
        return Err(ThresholdError::TooMany(specs.len()));
    }
    let one = |(index, spec): (usize, &ThresholdSpec)| {
        let checked = threshold(spec, bounds);
        checked.map_err(|fault| ThresholdError::Fault { index, fault })
    };
    let thresholds = specs.iter().enumerate().map(one).collect::<Result<Vec<_>, _>>()?;
    for (index, first) in thresholds.iter().enumerate() {
        for (other, second) in thresholds.iter().enumerate().skip(index + 1) {
            if let Some((crossed, low)) = contradict(first, second) {
                return Err(ThresholdError::Contradiction {
                    index,
                    other,
                    metric: first.metric,
                    resource: first.resource,
                    crossed,
                    low,
                });
            }
        }
    }
    Ok(Thresholds(thresholds))
}

fn threshold(spec: &ThresholdSpec, bounds: &Bounds) -> Result<Threshold, Fault> {
    let metric = Metric::of(&spec.metric).ok_or_else(|| Fault::UnknownMetric {
        name: spec.metric.chars().take(64).collect(),
    })?;
    if metric == Metric::Credits && !bounds.credits {
        return Err(Fault::NoCredits);
    }
    let (resource, direction) = (spec.resource, spec.direction);
    let value = value(metric, spec.comparison, spec.value)?;
    let wants = match direction {
        Direction::Grow => Comparison::Above,
        Direction::Shrink => Comparison::Below,
    };
    if metric.falls_with(resource) && spec.comparison != wants {
        return Err(Fault::Backwards {
            metric,
            resource,
            direction,
        });
    }
    let (held, cooldown) = match direction {
        Direction::Grow => (HELD_TO_GROW, COOLDOWN_TO_GROW),
        Direction::Shrink => (HELD_TO_SHRINK, COOLDOWN_TO_SHRINK),
    };
    let (least, most) = (least(spec, bounds)?, most(spec, bounds)?);
    if least > most {
        return Err(Fault::LeastAboveMost { resource, least, most });
    }
    Ok(Threshold {
        metric,
        comparison: spec.comparison,
        value,
        held: time("how long it is crossed", spec.held, held)?,
        resource,
        direction,
        change: change(spec, (least, most), bounds)?,
        least,
        most,
        cooldown: time("a cooldown", spec.cooldown, cooldown)?,
    })
}

/// The value in the metric's unit.
fn value(metric: Metric, comparison: Comparison, value: f64) -> Result<u64, Fault> {
    let (scale, most) = match metric {
        Metric::Credits => (1000.0, f64::from(u32::MAX)),
        _ => (100.0, 100.0),
    };
    let number = number("its value", value, scale)?;
    let never = Fault::NeverCrossed {
        metric,
        comparison,
        value,
    };
    match comparison {
        Comparison::Below if number == 0 => Err(never),
        Comparison::Above if metric != Metric::Credits && number >= 10_000 => Err(never),
        _ if value > most => Err(Fault::TooMuch {
            what: "its value",
            value,
        }),
        _ => Ok(number),
    }
}

/// So many times the value, as a whole number.
fn number(what: &'static str, value: f64, scale: f64) -> Result<u64, Fault> {
    if !value.is_finite() {
        return Err(Fault::NoNumber { what, value });
    }
    if value < 0.0 {
        return Err(Fault::Negative { what, value });
    }
    let scaled = (value * scale).round();
    if scaled > f64::from(u32::MAX) * 1000.0 {
        return Err(Fault::TooMuch { what, value });
    }
    // Whole, and within 0 and 2^42.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    Ok(scaled as u64)
}

fn time(what: &'static str, asked: Option<Duration>, default: Duration) -> Result<Duration, Fault> {
    let time = asked.unwrap_or(default);
    match (LEAST_TIME..=MOST_TIME).contains(&time) {
        true => Ok(time),
        false => Err(Fault::Time { what, time }),
    }
}

/// What a machine has at least of a resource.
fn always(resource: Resource, bounds: &Bounds) -> u32 {
    match resource {
        Resource::Vcpus | Resource::CpuShare => 1,
        Resource::Memory => bounds.base_mib,
    }
}

fn least(spec: &ThresholdSpec, bounds: &Bounds) -> Result<u32, Fault> {
    let always = always(spec.resource, bounds);
    let Some(least) = spec.least else { return Ok(always) };
    blocks("least", spec.resource, least)?;
    match least < always {
        true => Err(Fault::TooSmall {
            what: "least",
            resource: spec.resource,
            amount: least,
            least: always,
        }),
        false => Ok(least),
    }
}

fn most(spec: &ThresholdSpec, bounds: &Bounds) -> Result<u32, Fault> {
    let Some(most) = spec.most else {
        let all = [bounds.host, bounds.account, bounds.machine];
        let most = all.iter().map(|size| size.get(spec.resource)).min().unwrap_or(0);
        return Ok(most - most % spec.resource.unit());
    };
    blocks("most", spec.resource, most)?;
    within("most", spec.resource, most, bounds)?;
    Ok(most)
}

fn change(spec: &ThresholdSpec, (least, most): (u32, u32), bounds: &Bounds) -> Result<Change, Fault> {
    let resource = spec.resource;
    match spec.change {
        ChangeSpec::By(0) | ChangeSpec::To(0) => Err(Fault::NoChange(resource)),
        ChangeSpec::By(by) => {
            blocks("by", resource, by)?;
            Ok(Change::By(by))
        }
        ChangeSpec::To(to) => {
            blocks("to", resource, to)?;
            within("to", resource, to, bounds)?;
            match (least..=most).contains(&to) {
                true => Ok(Change::To(to)),
                false => Err(Fault::ToOutside {
                    resource,
                    to,
                    least,
                    most,
                }),
            }
        }
        ChangeSpec::ByPercent(percent) => {
            let what = "by";
            let part = number(what, percent, 100.0)?;
            if part == 0 {
                return Err(Fault::NoChange(resource));
            }
            if spec.direction == Direction::Shrink && percent >= 100.0 {
                return Err(Fault::NothingLeft(resource));
            }
            let part = u32::try_from(part).ok().filter(|_| percent <= MOST_PERCENT);
            let part = part.ok_or(Fault::TooMuch { what, value: percent })?;
            Ok(Change::ByPart(part))
        }
    }
}

fn blocks(what: &'static str, resource: Resource, amount: u32) -> Result<(), Fault> {
    match amount.is_multiple_of(resource.unit()) {
        true => Ok(()),
        false => Err(Fault::Blocks { what, resource, amount }),
    }
}

fn within(what: &'static str, resource: Resource, amount: u32, bounds: &Bounds) -> Result<(), Fault> {
    let all = [
        (Whose::Host, bounds.host),
        (Whose::Account, bounds.account),
        (Whose::Machine, bounds.machine),
    ];
    let beyond = all.into_iter().find(|(_, size)| amount > size.get(resource));
    match beyond {
        None => Ok(()),
        Some((whose, size)) => Err(Fault::TooLarge {
            what,
            resource,
            amount,
            whose,
            most: size.get(resource),
        }),
    }
}

/// Where two thresholds want opposite things of the same resource by the same metric, or would at the next moment since nothing
/// lies between them; and the lower of their values.
fn contradict(first: &Threshold, second: &Threshold) -> Option<(String, String)> {
    let of = |threshold: &Threshold| (threshold.metric, threshold.resource);
    if of(first) != of(second) || first.direction == second.direction {
        return None;
    }
    let value = |value| Value(first.metric, value);
    let (low, high) = (first.value.min(second.value), first.value.max(second.value));
    let (above, below) = match (first.comparison, second.comparison) {
        (Comparison::Above, Comparison::Below) => (first.value, second.value),
        (Comparison::Below, Comparison::Above) => (second.value, first.value),
        (Comparison::Above, Comparison::Above) => {
            return Some((format!("above {}", value(high)), value(low).to_string()));
        }
        (Comparison::Below, Comparison::Below) => {
            return Some((format!("below {}", value(low)), value(low).to_string()));
        }
    };
    if below < above {
        return None;
    }
    let crossed = match below == above {
        true => format!("around {}", value(low)),
        false => format!("between {} and {}", value(low), value(high)),
    };
    Some((crossed, value(low).to_string()))
}
