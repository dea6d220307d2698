//! What could not be kept, as the database failed or did not keep up: counted, and told once it works again.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{ReportKind, Store};

/// Counts of what was lost.
#[derive(Debug, Default)]
pub(super) struct Losses {
    /// Reports that are not in the database's own counts yet, as [`ReportKind::DROPPED`].
    reports: [AtomicU64; ReportKind::DROPPED.len()],
    /// Decisions, since the host's first start.
    decisions: AtomicU64,
}

// === impl Losses ===

impl Losses {
    /// With the decisions that earlier runs lost.
    pub(super) fn new(decisions: u64) -> Self {
        Self {
            decisions: decisions.into(),
            ..Self::default()
        }
    }

    /// Adds to one of the database's counters.
    pub(super) fn add_reports(&self, counter: &str, count: u64) {
        for ((_, name), lost) in ReportKind::DROPPED.iter().zip(&self.reports) {
            if *name == counter {
                lost.fetch_add(count, Ordering::Relaxed);
            }
        }
    }

    /// The reports that are counted nowhere else, by the database's counter; who takes the counts sees to them.
    pub(super) fn take_reports(&self) -> Vec<(&'static str, u64)> {
        let taken = ReportKind::DROPPED.iter().zip(&self.reports);
        taken
            .map(|((_, counter), lost)| (*counter, lost.swap(0, Ordering::Relaxed)))
            .filter(|(_, count)| *count > 0)
            .collect()
    }
}

// === impl Store ===

impl Store {
    /// Counts a report that never came so far as to be kept.
    pub fn lost_report(&self, kind: ReportKind) {
        self.counts.dropped_reports.count(kind);
        for (dropped, counter) in ReportKind::DROPPED {
            if dropped == kind {
                self.losses.add_reports(counter, 1);
            }
        }
    }

    /// Counts decisions that should have been kept on disk and are not; answers with how many there are in all.
    pub fn lost_decisions(&self, count: usize) -> u64 {
        let count = count as u64;
        self.losses.decisions.fetch_add(count, Ordering::Relaxed) + count
    }

    /// How many decisions should have been kept on disk and are not, since the host's first start.
    pub fn decisions_lost(&self) -> u64 {
        self.losses.decisions.load(Ordering::Relaxed)
    }
}
