//! What is known of one version of a function, and the amount that follows from it.
//!
//! ```text
//!              killed for memory: twice as much, at once
//!            ┌───────────────────────────────────────────┐
//!  execution ┤ rises: memory is tight, or more CPU is no  ├─► another amount ─► evidence begins anew
//!            │ dearer and faster                          │
//!            └ falls: enough executions, and time, without ┘
//!                     any of that; four times as many after each time that falling, or too little, was wrong
//! ```
//!
//! So a fall that is undone by a rise needs ever more executions: of n of them fewer than the logarithm of n to base 4, and one,
//! see that. An amount that was advised counts as if it had been given.

use std::cmp::Ordering;
use std::time::Duration;

use super::notice::{Figures, NoticeKind};
use super::peaks::Peaks;
use super::runs::{Outlook, Runs};
use super::sample::{Run, Sample};
use super::settings::{Kept, Resize, Thresholds};
use crate::{Amount, Mono};

/// How often CPU is looked at, in executions: often enough, and a small part of what an execution costs.
const EVERY: u32 = 8;

/// By how much memory grows where an execution is killed: the first since memory fell, and the next. From an eighth of what it
/// needs no third is.
const GROWS: [u32; 2] = [2, 4];

#[derive(Clone, Debug)]
pub(crate) struct Sizer {
    /// What its user asked for.
    first: Amount,
    /// What was determined.
    target: Amount,
    /// The most memory in MiB with which it was killed, since memory fell.
    killed_mib: u32,
    /// How many executions were, since then.
    kills: u32,
    /// The most memory in MiB that starting a container took: that is never too much.
    start_mib: u32,
    /// Since when executions are looked at, and when something changed last.
    begun: Mono,
    changed: Option<Mono>,
    /// When it was last said that it needs more than there may be.
    told: Option<Mono>,
    memory: Caution,
    cpu: Caution,
    peaks: Peaks,
    runs: Runs,
}

/// One part of an amount: when it may fall.
#[derive(Clone, Copy, Debug, Default)]
struct Caution {
    /// Executions that are evidence for it.
    executions: u32,
    /// How often it was too little, or rose after it fell.
    doubts: u32,
    /// It fell, and has not risen since.
    fell: bool,
}

/// What an amount may be, without its disk.
struct Bounds {
    least: Amount,
    most: Amount,
}

/// Another amount was determined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) from: Amount,
    /// The same as `from` where it should be more than may be.
    pub(crate) to: Amount,
    pub(crate) figures: Figures,
}

// === impl Sizer ===

impl Sizer {
    pub(crate) fn new(first: Amount, now: Mono) -> Self {
        Self {
            first,
            target: first,
            killed_mib: 0,
            kills: 0,
            start_mib: 0,
            begun: now,
            changed: None,
            told: None,
            memory: Caution::default(),
            cpu: Caution::default(),
            peaks: Peaks::default(),
            runs: Runs::default(),
        }
    }

    /// Goes on from what was determined before.
    pub(crate) fn with(mut self, amount: Amount, killed_mib: u32) -> Self {
        (self.target, self.killed_mib) = (amount, killed_mib);
        self
    }

    pub(crate) fn first(&self) -> Amount {
        self.first
    }

    pub(crate) fn target(&self) -> Amount {
        self.target
    }

    /// What is to be kept of it.
    pub(crate) fn kept(&self) -> Kept {
        Kept {
            first: self.first,
            amount: self.target,
            killed_mib: self.killed_mib,
        }
    }

    /// Takes an execution into account; `limit` is the most that there can be.
    pub(crate) fn take(&mut self, settings: &Resize, limit: Amount, sample: &Sample, now: Mono) -> Option<Change> {
        let (by, bounds) = (&settings.thresholds, Bounds::of(settings, limit));
        if sample.oom_killed {
            return self.killed(by, &bounds, sample, now);
        }
        self.peaks.add(sample.peak_mib());
        self.runs.add(Run::of(sample));
        self.memory.count();
        self.cpu.count();
        self.rise(by, &bounds, now).or_else(|| self.fall(by, &bounds, now))
    }

    /// What starting a container took, which was not killed.
    pub(crate) fn started(&mut self, sample: &Sample) {
        self.start_mib = self.start_mib.max(sample.peak_mib());
    }

    /// A container with what was determined could not start, and its function is to blame. Where it has less than was asked for,
    /// that may be why.
    pub(crate) fn start_failed(&mut self, settings: &Resize, with: Amount, now: Mono) -> Option<Change> {
        if with != self.target || self.first.fits(self.target) {
            return None;
        }
        let to = Amount {
            cpu_millis: self.target.cpu_millis.max(self.first.cpu_millis),
            memory_mib: self.target.memory_mib.max(self.first.memory_mib),
            ..self.target
        };
        let figures = Figures {
            start_failed: true,
            ..self.figures(&settings.thresholds, None, false)
        };
        Some(self.change(to, figures, now))
    }

    /// One was killed for want of memory. How much more it needs nothing says.
    fn killed(&mut self, by: &Thresholds, bounds: &Bounds, sample: &Sample, now: Mono) -> Option<Change> {
        let had_mib = sample.amount.memory_mib;
        // With less than it has by now, or than was advised.
        if had_mib < self.target.memory_mib {
            return None;
        }
        let factor = GROWS.get(self.kills as usize).or(GROWS.last()).copied().unwrap_or(1);
        let to = Amount {
            memory_mib: bounds
                .memory(had_mib.saturating_mul(factor))
                .max(self.target.memory_mib),
            ..self.target
        };
        let figures = self.figures(by, None, true);
        self.kills = self.kills.saturating_add(1);
        self.killed_mib = self.killed_mib.max(had_mib);
        // What it would have taken is more than it had.
        self.peaks.add(had_mib);
        if to != self.target {
            return Some(self.change(to, figures, now));
        }
        self.memory.was_too_little();
        // It has all that it may have, which is not said at every execution.
        let told = self.told.replace(now);
        if !rests(told, by.cooldown_down, now) {
            self.told = told;
            return None;
        }
        Some(Change { from: to, to, figures })
    }

    fn rise(&mut self, by: &Thresholds, bounds: &Bounds, now: Mono) -> Option<Change> {
        if !rests(self.changed, by.cooldown_up, now) {
            return None;
        }
        let mut to = self.target;
        let largest = self.peaks.largest_mib();
        if by.is_tight(largest, to.memory_mib) {
            to.memory_mib = bounds.memory(by.with_head_room(largest)).max(to.memory_mib);
        }
        let mut best = None;
        let executions = self.cpu.executions;
        if executions == by.executions_up || (executions > by.executions_up && executions.is_multiple_of(EVERY)) {
            best = self.better(to, bounds.least.cpu_millis, bounds.most.cpu_millis);
            best = best.filter(|(present, best)| best.cpu_millis > to.cpu_millis && is_worth_it(by, present, best));
        }
        if let Some((_, best)) = best {
            to.cpu_millis = best.cpu_millis;
        }
        self.change_to(by, to, best, now)
    }

    fn fall(&mut self, by: &Thresholds, bounds: &Bounds, now: Mono) -> Option<Change> {
        if !rests(self.changed.or(Some(self.begun)), by.cooldown_down, now) {
            return None;
        }
        let (memory_due, cpu_due) = (self.memory.beyond(by).is_some(), self.cpu.beyond(by));
        let cpu_due = cpu_due.is_some_and(|beyond| beyond.is_multiple_of(EVERY) || memory_due);
        if !memory_due && !cpu_due {
            return None;
        }
        let had = self.target;
        let mut to = had;
        if memory_due {
            let usual = by.with_head_room(self.peaks.quantile_mib(by.quantile_permille));
            let largest = self.peaks.largest_mib().max(self.start_mib);
            to.memory_mib = bounds.memory(usual.max(by.just_fits(largest))).min(had.memory_mib);
        }
        if cpu_due && self.runs.len() > 0 {
            // Half as much at a time: what was not held back does not show all that it would want at once.
            let least = bounds.least.cpu_millis.max(had.cpu_millis / 2);
            let most = bounds.most.cpu_millis.max(least);
            let ((present, _), (_, best)) = (self.runs.best(had, least, most), self.runs.best(to, least, most));
            if best.cpu_millis < had.cpu_millis && is_cheaper(by, &present, &best) {
                to.cpu_millis = best.cpu_millis;
                return self.change_to(by, to, Some((present, best)), now);
            }
        }
        let cheaper = is_less(had.price().into(), to.price().into(), by.cheaper_percent);
        if memory_due && (by.saves(had.memory_mib, to.memory_mib) || cheaper) {
            return self.change_to(by, to, None, now);
        }
        if memory_due {
            // What was needed once counts up to here.
            self.peaks = Peaks::default();
            self.memory.executions = 0;
        }
        None
    }

    /// What the executions would cost with the CPU of an amount, and the best between these.
    fn better(&self, now: Amount, least: u32, most: u32) -> Option<(Outlook, Outlook)> {
        (self.runs.len() > 0).then(|| self.runs.best(now, least, most))
    }

    fn change_to(&mut self, by: &Thresholds, to: Amount, cpu: Option<(Outlook, Outlook)>, now: Mono) -> Option<Change> {
        if to == self.target {
            return None;
        }
        let figures = self.figures(by, cpu, false);
        Some(self.change(to, figures, now))
    }

    /// Sets what was determined. What is known of CPU was so with another amount, and of memory that fell with more.
    fn change(&mut self, to: Amount, figures: Figures, now: Mono) -> Change {
        let from = std::mem::replace(&mut self.target, to);
        self.changed = Some(now);
        match to.memory_mib.cmp(&from.memory_mib) {
            Ordering::Less => {
                self.memory.falls();
                self.peaks = Peaks::default();
                self.kills = 0;
                if to.memory_mib <= self.killed_mib {
                    self.killed_mib = 0;
                }
            }
            Ordering::Equal => {}
            Ordering::Greater => self.memory.was_too_little(),
        }
        match to.cpu_millis.cmp(&from.cpu_millis) {
            Ordering::Less => self.cpu.falls(),
            Ordering::Equal => {}
            Ordering::Greater => self.cpu.rises(),
        }
        if to.cpu_millis != from.cpu_millis {
            self.runs = Runs::default();
        }
        Change { from, to, figures }
    }

    fn figures(&self, by: &Thresholds, cpu: Option<(Outlook, Outlook)>, killed: bool) -> Figures {
        let (runs, [wall, used, throttled, waited]) = self.runs.sums();
        let part = |of: u128| u32::try_from(of.saturating_mul(1000) / wall.max(1)).unwrap_or(u32::MAX);
        let average =
            |sum: u128| Duration::from_nanos(u64::try_from(sum / u128::from(runs.max(1))).unwrap_or(u64::MAX));
        Figures {
            executions: u32::try_from(self.peaks.executions()).unwrap_or(u32::MAX),
            killed,
            start_failed: false,
            usual_mib: self.peaks.quantile_mib(by.quantile_permille),
            largest_mib: self.peaks.largest_mib(),
            runs,
            took: average(wall),
            would_take: average(cpu.map_or(wall, |(_, best)| best.wall_ns)),
            used_millis: part(used),
            throttled_permille: part(throttled),
            waited_permille: part(waited),
        }
    }
}

/// One execution against the amount that its request named for itself: what it says of that, and why. It says how much more it
/// needed, and only that less would do: the next may need more.
pub(crate) fn compare(settings: &Resize, limit: Amount, sample: &Sample) -> Option<(NoticeKind, Figures)> {
    let (by, bounds) = (&settings.thresholds, Bounds::of(settings, limit));
    let had = sample.amount;
    let mut alone = Sizer::new(had, Mono::ZERO);
    if sample.oom_killed {
        return Some((NoticeKind::Increase, alone.figures(by, None, true)));
    }
    alone.peaks.add(sample.peak_mib());
    alone.runs.add(Run::of(sample));
    let needs = bounds.memory(by.with_head_room(sample.peak_mib()));
    let mut to = had;
    if by.is_tight(sample.peak_mib(), had.memory_mib) {
        to.memory_mib = needs.max(had.memory_mib);
    }
    let (least, most) = (bounds.least.cpu_millis, bounds.most.cpu_millis);
    let (present, best) = alone.runs.best(had, least, most);
    if best.cpu_millis > had.cpu_millis && is_worth_it(by, &present, &best) {
        to.cpu_millis = best.cpu_millis;
    }
    let figures = |cpu: bool| alone.figures(by, cpu.then_some((present, best)), false);
    if let Some(kind) = NoticeKind::of(had, to, true, true) {
        return Some((kind, figures(to.cpu_millis != had.cpu_millis)));
    }
    let less_cpu = best.cpu_millis < had.cpu_millis && is_cheaper(by, &present, &best);
    (less_cpu || by.saves(had.memory_mib, needs)).then(|| (NoticeKind::Decrease, figures(less_cpu)))
}

/// So long has passed since.
fn rests(since: Option<Mono>, time: Duration, now: Mono) -> bool {
    since.is_none_or(|since| now >= since.saturating_add(time))
}

/// An execution costs less by as much as counts.
fn is_cheaper(by: &Thresholds, present: &Outlook, best: &Outlook) -> bool {
    is_less(present.cost, best.cost, by.cheaper_percent)
}

/// It does, or is faster by as much as counts, and no dearer.
fn is_worth_it(by: &Thresholds, present: &Outlook, best: &Outlook) -> bool {
    let faster = is_less(present.wall_ns, best.wall_ns, by.faster_percent);
    is_cheaper(by, present, best) || (faster && best.cost <= present.cost)
}

fn is_less(from: u128, to: u128, percent: u32) -> bool {
    to.saturating_mul(100) <= from.saturating_mul(u128::from(100_u32.saturating_sub(percent)))
}

// === impl Caution ===

impl Caution {
    fn count(&mut self) {
        self.executions = self.executions.saturating_add(1);
    }

    /// Whether there were enough executions for it to fall, and by how many more.
    fn beyond(&self, by: &Thresholds) -> Option<u32> {
        let least = by.executions_down.saturating_mul(4_u32.saturating_pow(self.doubts));
        self.executions.checked_sub(least)
    }

    fn falls(&mut self) {
        (self.fell, self.executions) = (true, 0);
    }

    fn rises(&mut self) {
        self.doubts = self.doubts.saturating_add(self.fell.into());
        (self.fell, self.executions) = (false, 0);
    }

    /// Likewise, and it is not to happen again.
    fn was_too_little(&mut self) {
        self.rises();
        self.doubts = self.doubts.max(1);
    }
}

// === impl Bounds ===

impl Bounds {
    fn of(settings: &Resize, limit: Amount) -> Self {
        let Amount {
            cpu_millis, memory_mib, ..
        } = settings.most;
        let most = Amount {
            cpu_millis: cpu_millis.min(limit.cpu_millis),
            memory_mib: memory_mib.min(limit.memory_mib),
            scratch_mib: 0,
        };
        let least = Amount {
            cpu_millis: settings.least.cpu_millis.min(most.cpu_millis),
            memory_mib: settings.least.memory_mib.min(most.memory_mib),
            scratch_mib: 0,
        };
        Self { least, most }
    }

    fn memory(&self, mib: u32) -> u32 {
        mib.clamp(self.least.memory_mib, self.most.memory_mib)
    }
}
