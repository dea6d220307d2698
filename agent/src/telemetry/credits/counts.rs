//! What is counted of accounts, for Prometheus.

use crate::metrics::Label;

/// What could not be done with an account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// It could not be opened, so that its machine runs without.
    Open,
    /// What was written down of it, or the file of all that was, could not be restored.
    Restore,
    /// It could not be settled, granted credits, or given other terms.
    Change,
    /// It could not be settled for the last time, so that its machine's end is told without.
    Close,
    /// All could not be read.
    Read,
    /// All could not be written down.
    Write,
}

impl Label for Failure {
    const ALL: &'static [Self] = &[
        Self::Open,
        Self::Restore,
        Self::Change,
        Self::Close,
        Self::Read,
        Self::Write,
    ];

    fn labels(self) -> Vec<(&'static str, &'static str)> {
        let operation = match self {
            Self::Open => "open",
            Self::Restore => "restore",
            Self::Change => "change",
            Self::Close => "close",
            Self::Read => "read",
            Self::Write => "write",
        };
        vec![("operation", operation)]
    }
}
