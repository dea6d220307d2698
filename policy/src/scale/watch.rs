//! How long each threshold of a machine has been crossed.

use std::time::Duration;

use super::measure::{GuestMeasures, Has, Measures, Use, Values};
use super::obstacle::Obstacle;
use super::size::Resource;
use super::threshold::{Metric, Threshold};
use crate::Mono;

/// Rates are taken over so long at least, so that a machine which is measured more often is judged alike.
const LEAST_LOOK: Duration = Duration::from_millis(500);

/// Of a time that is longer than this without measures nothing is known, and nothing is concluded.
pub(crate) const MOST_LOOK: Duration = Duration::from_secs(5);

/// What was measured of a machine, and since when its thresholds are crossed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Watch {
    last: Option<Measures>,
    /// What it used, and its metrics, from the look before to the last.
    pub(super) used: Option<Use>,
    values: Values,
    /// One for each threshold.
    states: Vec<State>,
    /// When each resource was changed last.
    changed: [Option<Mono>; Resource::ALL.len()],
}

/// How it is with one threshold.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct State {
    /// Since when it is crossed.
    since: Option<Mono>,
    /// The most that the machine used, of a time that is as long as the threshold has to be crossed, and of the one before: so
    /// what is known goes back so far at least, where it is crossed for as long.
    most_used: [Use; 2],
    /// When the first of these began.
    turned: Mono,
    /// What was told last to stand in its way.
    told: Option<Told>,
}

#[derive(Clone, Copy, Debug)]
struct Told {
    obstacle: Obstacle,
    at: Mono,
    /// Since when the threshold was crossed then.
    since: Mono,
}

/// A threshold that has been crossed for long enough.
#[derive(Clone, Copy, Debug)]
pub(super) struct Due {
    pub(super) index: usize,
    pub(super) threshold: Threshold,
    /// Since when it is crossed.
    pub(super) since: Mono,
    /// What was measured last.
    pub(super) value: u64,
    /// The most that the machine used in so long, or a time up to twice as long.
    pub(super) most_used: Use,
}

// === impl Watch ===

impl Watch {
    /// Takes what was measured; says whether a threshold is due.
    pub(super) fn look(&mut self, thresholds: &[Threshold], measures: &Measures, has: Has) -> bool {
        let Some(last) = &self.last else {
            self.last = Some(*measures);
            return false;
        };
        let (before, passed) = (last.at, measures.at.saturating_sub(last.at));
        if passed < LEAST_LOOK {
            return false;
        }
        if passed > MOST_LOOK {
            self.last = Some(*measures);
            self.used = None;
            self.states.iter_mut().for_each(State::begin_anew);
            return false;
        }
        let (used, values) = measures.since(last, has);
        (self.last, self.used, self.values) = (Some(*measures), Some(used), values);
        self.states.resize(thresholds.len(), State::default());
        let mut is_due = false;
        for (threshold, state) in thresholds.iter().zip(&mut self.states) {
            if value(&values, threshold).is_none_or(|value| !threshold.is_crossed_by(value)) {
                state.begin_anew();
                continue;
            }
            let since = state.cross(before, measures.at, threshold.held, used);
            is_due |= is_over(
                threshold,
                since,
                changed(&self.changed, threshold.resource),
                measures.at,
            );
        }
        is_due
    }

    /// The thresholds about a resource that are due, of those that `thresholds` are.
    pub(super) fn due(&self, thresholds: &[Threshold], resource: Resource) -> impl Iterator<Item = Due> {
        let at = self.last.as_ref().map_or(Mono::ZERO, |last| last.at);
        let changed = changed(&self.changed, resource);
        let crossed = self.crossed(thresholds, resource);
        crossed.filter(move |due| is_over(&due.threshold, due.since, changed, at))
    }

    /// Those that are crossed, for however long.
    pub(super) fn crossed(&self, thresholds: &[Threshold], resource: Resource) -> impl Iterator<Item = Due> {
        let all = thresholds.iter().zip(&self.states).enumerate();
        all.filter_map(move |(index, (threshold, state))| {
            if threshold.resource != resource {
                return None;
            }
            Some(Due {
                index,
                threshold: *threshold,
                since: state.since?,
                value: value(&self.values, threshold)?,
                most_used: state.most_used[0].max(state.most_used[1]),
            })
        })
    }

    /// When it was measured last.
    pub(super) fn at(&self) -> Mono {
        self.last.as_ref().map_or(Mono::ZERO, |last| last.at)
    }

    /// What it used up to now; nothing where that is not known.
    pub(crate) fn fresh(&self, now: Mono) -> Option<Use> {
        self.used.filter(|_| self.at().saturating_add(MOST_LOOK) >= now)
    }

    /// The values of metrics as they were measured last, in their units; none of what is not known.
    pub(crate) fn metrics(&self) -> impl Iterator<Item = (Metric, u64)> {
        let known = Metric::ALL.into_iter().zip(self.values);
        known.filter_map(|(metric, value)| Some((metric, value?)))
    }

    /// The metrics that the kernel of its guest does not count, as that said last.
    pub(crate) fn unsupported(&self) -> impl Iterator<Item = Metric> {
        let guest = self.last.and_then(|last| last.guest);
        guest.into_iter().flat_map(GuestMeasures::unsupported)
    }

    /// A resource was changed, or the guest has taken a change: what was measured before says nothing of how it is now.
    pub(crate) fn begin_anew(&mut self, thresholds: &[Threshold], resource: Resource, changed: Option<Mono>) {
        if let Some(place) = self.changed.get_mut(resource.index()).filter(|_| changed.is_some()) {
            *place = changed;
        }
        for (threshold, state) in thresholds.iter().zip(&mut self.states) {
            if threshold.resource.is_cpu() == resource.is_cpu() {
                state.begin_anew();
            }
        }
    }

    /// The machine has other thresholds.
    pub(crate) fn forget(&mut self) {
        self.states.clear();
    }

    /// Whether it is to be told what stands in the way of a threshold: no more often than it could change something, and as long as
    /// it is crossed not the same again.
    pub(super) fn is_news(&mut self, due: &Due, obstacle: Obstacle) -> bool {
        let at = self.at();
        let Some(state) = self.states.get_mut(due.index) else {
            return false;
        };
        let is_known = state.told.is_some_and(|told| {
            let is_same = std::mem::discriminant(&told.obstacle) == std::mem::discriminant(&obstacle);
            (is_same && told.since == due.since) || told.at.saturating_add(due.threshold.cooldown) > at
        });
        if !is_known {
            let since = due.since;
            state.told = Some(Told { obstacle, at, since });
        }
        !is_known
    }
}

// === impl State ===

impl State {
    /// It was crossed from then on up to now, and so much was used meanwhile; says since when it is.
    fn cross(&mut self, from: Mono, now: Mono, held: Duration, used: Use) -> Mono {
        let since = *self.since.get_or_insert_with(|| {
            self.turned = from;
            from
        });
        let [latest, _] = self.most_used;
        self.most_used = match self.turned.saturating_add(held) < now {
            true => {
                self.turned = from;
                [used, latest]
            }
            false => [latest.max(used), self.most_used[1]],
        };
        since
    }

    /// It is crossed no longer, or nobody knows.
    fn begin_anew(&mut self) {
        (self.since, self.most_used) = (None, Default::default());
    }
}

fn value(values: &Values, threshold: &Threshold) -> Option<u64> {
    values.get(threshold.metric.index()).copied().flatten()
}

fn changed(changed: &[Option<Mono>; Resource::ALL.len()], resource: Resource) -> Option<Mono> {
    changed.get(resource.index()).copied().flatten()
}

/// Whether a threshold has been crossed for long enough, and its cooldown is over.
fn is_over(threshold: &Threshold, since: Mono, changed: Option<Mono>, at: Mono) -> bool {
    let held = since.saturating_add(threshold.held) <= at;
    held && changed.is_none_or(|changed| changed.saturating_add(threshold.cooldown) <= at)
}
