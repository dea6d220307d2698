//! What things are counted by. prometheus-client has counters without a lock too, but not by label, and no such histograms.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus_client::encoding::{EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

/// By what things of a kind are told apart. All are known beforehand, so that their number is bounded.
pub trait Label: Copy + PartialEq + fmt::Debug + Send + Sync + 'static {
    /// All that there are.
    const ALL: &'static [Self];

    /// Names and values as Prometheus is told.
    fn labels(self) -> Vec<(&'static str, &'static str)>;
}

/// Nothing is told apart.
impl Label for () {
    const ALL: &'static [Self] = &[()];

    fn labels(self) -> Vec<(&'static str, &'static str)> {
        Vec::new()
    }
}

/// How often something has happened since the agent's start, by label; clones share the counts.
#[derive(Debug)]
pub struct Counters<L>(Arc<[AtomicU64]>, PhantomData<L>);

/// How long something took, by label; clones share the counts.
#[derive(Debug)]
pub struct Histograms<L>(Arc<[Cells]>, PhantomData<L>);

/// Upper bounds of buckets: from what a warm call takes to the longest that a function may run.
const BOUNDS: [Duration; 19] = [
    Duration::from_micros(500),
    Duration::from_millis(1),
    Duration::from_millis(2),
    Duration::from_micros(2_500),
    Duration::from_millis(5),
    Duration::from_millis(10),
    Duration::from_millis(25),
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(250),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_millis(2_500),
    Duration::from_secs(5),
    Duration::from_secs(10),
    Duration::from_secs(30),
    Duration::from_secs(60),
    Duration::from_secs(300),
    Duration::from_secs(900),
];

/// One histogram.
#[derive(Debug, Default)]
struct Cells {
    /// Up to each of [`BOUNDS`], and more than before it; the last of what was longer than all.
    buckets: [AtomicU64; BOUNDS.len() + 1],
    sum_ns: AtomicU64,
}

/// The one of several that a label has.
fn of<L: Label, T>(all: &[T], label: L) -> Option<&T> {
    L::ALL
        .iter()
        .position(|known| *known == label)
        .and_then(|at| all.get(at))
}

// === impl Counters ===

impl<L: Label> Counters<L> {
    /// One more.
    pub fn count(&self, label: L) {
        self.add(label, 1);
    }

    /// So many more.
    pub fn add(&self, label: L, count: u64) {
        if let Some(counter) = of(&self.0, label) {
            counter.fetch_add(count, Ordering::Relaxed);
        }
    }

    /// How many so far.
    #[must_use]
    pub fn get(&self, label: L) -> u64 {
        of(&self.0, label).map_or(0, |counter| counter.load(Ordering::Relaxed))
    }
}

impl<L: Label> Default for Counters<L> {
    fn default() -> Self {
        Self(L::ALL.iter().map(|_| AtomicU64::new(0)).collect(), PhantomData)
    }
}

impl<L> Clone for Counters<L> {
    fn clone(&self) -> Self {
        Self(self.0.clone(), PhantomData)
    }
}

impl<L: Label> EncodeMetric for Counters<L> {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        for (label, counter) in L::ALL.iter().zip(&*self.0) {
            let count = counter.load(Ordering::Relaxed);
            let labels = label.labels();
            let mut member = encoder.encode_family(&labels)?;
            member.encode_counter::<NoLabelSet, _, u64>(&count, None)?;
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Counter
    }
}

// === impl Histograms ===

impl<L: Label> Histograms<L> {
    /// It took so long once more.
    pub fn observe(&self, label: L, took: Duration) {
        let Some(cells) = of(&self.0, label) else { return };
        let at = BOUNDS.partition_point(|bound| *bound < took);
        if let Some(bucket) = cells.buckets.get(at) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        cells.sum_ns.fetch_add(ns, Ordering::Relaxed);
    }

    /// How often so far.
    #[must_use]
    pub fn count(&self, label: L) -> u64 {
        of(&self.0, label).map_or(0, |cells| cells.counts().iter().sum())
    }
}

impl Cells {
    fn counts(&self) -> [u64; BOUNDS.len() + 1] {
        self.buckets.each_ref().map(|bucket| bucket.load(Ordering::Relaxed))
    }
}

impl<L: Label> Default for Histograms<L> {
    fn default() -> Self {
        Self(L::ALL.iter().map(|_| Cells::default()).collect(), PhantomData)
    }
}

impl<L> Clone for Histograms<L> {
    fn clone(&self) -> Self {
        Self(self.0.clone(), PhantomData)
    }
}

impl<L: Label> EncodeMetric for Histograms<L> {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let bounds = BOUNDS.iter().map(Duration::as_secs_f64).chain([f64::INFINITY]);
        for (label, cells) in L::ALL.iter().zip(&*self.0) {
            let counts = cells.counts();
            let buckets: Vec<_> = bounds.clone().zip(counts).collect();
            let sum = Duration::from_nanos(cells.sum_ns.load(Ordering::Relaxed)).as_secs_f64();
            let labels = label.labels();
            let mut member = encoder.encode_family(&labels)?;
            member.encode_histogram::<NoLabelSet>(sum, counts.iter().sum(), &buckets, None)?;
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text;
    use prometheus_client::registry::{Registry, Unit};

    use super::*;

    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Side {
        Left,
        Right,
    }

    impl Label for Side {
        const ALL: &'static [Self] = &[Self::Left, Self::Right];

        fn labels(self) -> Vec<(&'static str, &'static str)> {
            let side = match self {
                Self::Left => "left",
                Self::Right => "right",
            };
            vec![("side", side)]
        }
    }

    #[test]
    fn every_label_is_told_from_the_start() {
        let counters = Counters::<Side>::default();
        let shared = counters.clone();
        shared.count(Side::Right);
        shared.add(Side::Right, 2);
        assert_eq!((counters.get(Side::Left), counters.get(Side::Right)), (0, 3));
        let mut registry = Registry::default();
        registry.register("turns", "Turns", counters);
        let mut text = String::new();
        text::encode(&mut text, &registry).unwrap();
        assert!(text.contains("\nturns_total{side=\"left\"} 0\n"), "{text}");
        assert!(text.contains("\nturns_total{side=\"right\"} 3\n"), "{text}");
    }

    #[test]
    fn buckets_are_cumulative_and_hold_their_bounds() {
        let histograms = Histograms::<()>::default();
        for took in [
            Duration::ZERO,
            Duration::from_micros(500),
            Duration::from_micros(501),
            Duration::from_secs(900),
            Duration::from_secs(1000),
        ] {
            histograms.observe((), took);
        }
        assert_eq!(histograms.count(()), 5);
        let mut registry = Registry::default();
        registry.register_with_unit("turn", "A turn", Unit::Seconds, histograms);
        let mut text = String::new();
        text::encode(&mut text, &registry).unwrap();
        for line in [
            "turn_seconds_bucket{le=\"0.0005\"} 2",
            "turn_seconds_bucket{le=\"0.001\"} 3",
            "turn_seconds_bucket{le=\"900.0\"} 4",
            "turn_seconds_bucket{le=\"+Inf\"} 5",
            "turn_seconds_count 5",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is missing in: {text}");
        }
        let sum = text.lines().find_map(|line| line.strip_prefix("turn_seconds_sum "));
        assert!((sum.unwrap().parse::<f64>().unwrap() - 1_900.001_001).abs() < 1e-6);
    }

    #[test]
    fn bounds_grow() {
        assert!(BOUNDS.is_sorted());
    }
}
