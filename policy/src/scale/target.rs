//! How far a machine's size goes, and what stands in the way.

use super::measure::Use;
use super::obstacle::{Crossed, Obstacle};
use super::size::Resource;
use super::threshold::{Comparison, Direction, Metric, Threshold};
use super::watch::Due;
use crate::world::Launched;

/// Memory that is left to a guest beside what it uses: a tenth of that, and so much in MiB, for what it may need until it is
/// measured again.
const HEADROOM_MIB: u32 = 64;

/// A machine that uses at least so many percent of what its credits allow is held back by them.
const HELD_BACK_PERCENT: u64 = 90;

/// The most or least that a machine can have, and what says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limit {
    pub(crate) amount: u32,
    pub(crate) by: Obstacle,
}

/// What is to become of a resource by a threshold.
pub(super) struct Proposal {
    pub(super) due: Due,
    pub(super) crossed: Crossed,
}

/// What may be said of a machine beside what is known of it itself.
pub(super) struct Around {
    /// The most that account and host leave it of the resource.
    pub(super) most: Limit,
    /// What it may use of CPU by its credits, in millicores.
    pub(super) allowed_millis: Option<u32>,
    /// What it is promised of CPU, in millicores.
    pub(super) baseline_millis: u32,
}

/// What is to become of a resource. One that should grow does not shrink.
pub(super) fn propose(launched: &Launched, resource: Resource, around: impl FnOnce() -> Around) -> Option<Proposal> {
    let (watch, has) = (&launched.watch, launched.asked.get(resource));
    let towards = |due: &Due, direction| due.threshold.direction == direction;
    let grows = |due: &Due| towards(due, Direction::Grow) && due.threshold.target(has).is_some();
    let mut wanted: Option<(Due, u32)> = None;
    for due in watch.due(&launched.thresholds, resource) {
        let Some(target) = due.threshold.target(has) else {
            continue;
        };
        let is_further = match (due.threshold.direction, wanted) {
            (_, None) => true,
            (Direction::Grow, Some((other, most))) => towards(&other, Direction::Shrink) || target > most,
            (Direction::Shrink, Some((other, least))) => towards(&other, Direction::Shrink) && target < least,
        };
        if is_further {
            wanted = Some((due, target));
        }
    }
    let (due, wanted) = wanted?;
    if towards(&due, Direction::Shrink) && watch.crossed(&launched.thresholds, resource).any(|due| grows(&due)) {
        return None;
    }
    let around = around();
    let (after, obstacle) = match due.threshold.direction {
        _ if launched.taken.get(resource).is_some_and(|taken| taken != has) => {
            let taken = launched.taken.get(resource).unwrap_or(has);
            (has, Some(Obstacle::Guest(taken)))
        }
        Direction::Grow => grown(launched, &due.threshold, (has, wanted), &around),
        Direction::Shrink => shrunk(launched, &due, (has, wanted), &around),
    };
    let held = watch.at().saturating_sub(due.since);
    let crossed = Crossed {
        metric: due.threshold.metric,
        threshold: due.threshold.value,
        above: due.threshold.comparison == Comparison::Above,
        measured: due.value,
        held_ms: u64::try_from(held.as_millis()).unwrap_or(u64::MAX),
        resource,
        before: has,
        wanted,
        after,
        obstacle,
    };
    Some(Proposal { due, crossed })
}

/// As much as there is room for.
fn grown(
    launched: &Launched,
    threshold: &Threshold,
    (has, wanted): (u32, u32),
    around: &Around,
) -> (u32, Option<Obstacle>) {
    let own = Limit {
        amount: threshold.most,
        by: Obstacle::Most(threshold.most),
    };
    let limits = [own, launched.most(threshold.resource), around.most];
    let limit = limits.into_iter().min_by_key(|limit| limit.amount).unwrap_or(own);
    let whole = limit.amount - limit.amount % threshold.resource.unit();
    match wanted <= limit.amount {
        true => (wanted, None),
        false => (whole.max(has), Some(limit.by)),
    }
}

/// As little as what is used allows.
fn shrunk(launched: &Launched, due: &Due, (has, wanted): (u32, u32), around: &Around) -> (u32, Option<Obstacle>) {
    let threshold = &due.threshold;
    let resource = threshold.resource;
    let used = due.most_used;
    if resource.is_cpu() && is_held_back(launched, used, around) {
        return (has, Some(Obstacle::HeldBack));
    }
    let Some(needed) = needed(resource, used) else {
        return (has, Some(Obstacle::Unmeasured));
    };
    let own = Limit {
        amount: threshold.least,
        by: Obstacle::Least(threshold.least),
    };
    let stable = least_without_growing(&launched.thresholds, resource, used);
    let limits = [
        own,
        launched.least(resource, around.baseline_millis),
        Limit {
            amount: needed,
            by: Obstacle::Used(needed),
        },
        Limit {
            amount: stable,
            by: Obstacle::WouldGrow(stable),
        },
    ];
    let limit = limits.into_iter().max_by_key(|limit| limit.amount).unwrap_or(own);
    let whole = limit.amount.checked_next_multiple_of(resource.unit()).unwrap_or(has);
    match wanted >= limit.amount {
        true => (wanted, None),
        false => (whole.min(has), Some(limit.by)),
    }
}

/// The least of a resource that what is used leaves a machine; nothing where that is not known.
pub(crate) fn needed(resource: Resource, used: Use) -> Option<u32> {
    Some(match resource {
        Resource::Vcpus => used.cpu_millis.div_ceil(1000),
        Resource::CpuShare => used.cpu_millis,
        Resource::Memory => {
            let used = used.memory_mib?;
            used.saturating_add(used / 10).saturating_add(HEADROOM_MIB)
        }
    })
}

/// With less than this of a resource the same use would cross a threshold by which it grows.
fn least_without_growing(thresholds: &[Threshold], resource: Resource, used: Use) -> u32 {
    let least = thresholds.iter().filter_map(|threshold| {
        let used = match threshold.metric {
            Metric::CpuUse if resource.is_cpu() => used.cpu_millis,
            Metric::MemoryUse if resource == Resource::Memory => used.memory_mib?,
            _ => return None,
        };
        let is_same = threshold.resource.is_cpu() == resource.is_cpu();
        if threshold.direction != Direction::Grow || !is_same {
            return None;
        }
        let least = u64::from(used).saturating_mul(10_000).div_ceil(threshold.value.max(1));
        let least = u32::try_from(least).unwrap_or(u32::MAX);
        Some(match resource {
            Resource::Vcpus => least.div_ceil(1000),
            _ => least,
        })
    });
    least.max().unwrap_or(0)
}

/// Whether a machine uses all that its credits allow, which is less than it has.
fn is_held_back(launched: &Launched, used: Use, around: &Around) -> bool {
    around.allowed_millis.is_some_and(|allowed| {
        let held_back = u64::from(used.cpu_millis) * 100 >= u64::from(allowed) * HELD_BACK_PERCENT;
        allowed < launched.asked.cpu_millis && held_back
    })
}
