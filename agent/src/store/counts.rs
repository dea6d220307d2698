//! What is counted of the database, for Prometheus.

use super::{Failure, ReportKind};
use crate::metrics::{Counters, Label};

/// Counts since the agent's start; clones share them.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// Calls that failed.
    pub errors: Counters<Failure>,
    /// Reports that were dropped as too many waited, or that could not be kept.
    pub dropped_reports: Counters<ReportKind>,
}

impl Label for Failure {
    const ALL: &'static [Self] = &[
        Self::Damaged,
        Self::ReadOnly,
        Self::Full,
        Self::Busy,
        Self::Disk,
        Self::Unopenable,
        Self::Other,
    ];

    fn labels(self) -> Vec<(&'static str, &'static str)> {
        let failure = match self {
            Self::Damaged => "damaged",
            Self::ReadOnly => "read_only",
            Self::Full => "full",
            Self::Busy => "busy",
            Self::Disk => "disk",
            Self::Unopenable => "unopenable",
            Self::Other => "other",
        };
        vec![("failure", failure)]
    }
}

impl Label for ReportKind {
    // That some were dropped is never dropped itself.
    const ALL: &'static [Self] = &[Self::Lifecycle, Self::Use, Self::Decisions];

    fn labels(self) -> Vec<(&'static str, &'static str)> {
        let kind = match self {
            Self::Lifecycle => "lifecycle",
            Self::Use => "use",
            Self::Decisions => "decisions",
            Self::Dropped => "dropped",
        };
        vec![("kind", kind)]
    }
}
