//! What containers use, by eBPF; where the kernel does not let us, by its own counts, and then it is said.

use std::sync::Arc;

use stoker_ebpf::{CgroupId, Ledger, LedgerError, Limits};

use crate::container::cgroup::Cgroup;

/// What a container used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Use {
    /// CPU time in ns.
    pub(crate) cpu_ns: u64,
    /// Time in ns that its threads waited for a CPU.
    pub(crate) wait_ns: u64,
    /// Memory now, in bytes.
    pub(crate) memory_bytes: u64,
    /// The most memory so far, in bytes.
    pub(crate) memory_peak_bytes: u64,
}

/// Counts for all containers. Clones are the same.
#[derive(Clone)]
pub(crate) struct Telemetry(Arc<Source>);

enum Source {
    Ledger(Box<Ledger>),
    /// The kernel's files, and why there is no ledger.
    Cgroup(String),
}

/// One container that is counted, until the last clone is gone.
#[derive(Clone)]
pub(crate) struct Subject(Arc<Counted>);

struct Counted {
    telemetry: Telemetry,
    cgroup: Arc<Cgroup>,
}

// === impl Use ===

impl Use {
    /// What was used since `before`. Memory is as it is now.
    pub(crate) fn since(&self, before: &Self) -> Self {
        Self {
            cpu_ns: self.cpu_ns.saturating_sub(before.cpu_ns),
            wait_ns: self.wait_ns.saturating_sub(before.wait_ns),
            ..*self
        }
    }
}

// === impl Telemetry ===

impl Telemetry {
    /// Begins to count.
    pub(crate) fn start() -> Self {
        Self(Arc::new(match Ledger::load(Limits::GUEST) {
            Ok(ledger) => Source::Ledger(Box::new(ledger)),
            Err(error) => {
                let why = with_sources(&error);
                tracing::warn!("containers are counted by their cgroups: {why}");
                Source::Cgroup(why)
            }
        }))
    }

    /// Why there is no count by eBPF, if there is none.
    pub(crate) fn error(&self) -> Option<&str> {
        match &*self.0 {
            Source::Ledger(_) => None,
            Source::Cgroup(why) => Some(why),
        }
    }

    /// Counts what runs in `cgroup`, from now on.
    pub(crate) fn count(&self, cgroup: &Arc<Cgroup>) -> Result<Subject, LedgerError> {
        if let Source::Ledger(ledger) = &*self.0 {
            ledger.add(CgroupId::from(cgroup.id()))?;
        }
        Ok(Subject(Arc::new(Counted {
            telemetry: self.clone(),
            cgroup: Arc::clone(cgroup),
        })))
    }
}

// === impl Subject ===

impl Subject {
    /// What it has used up to now.
    pub(crate) fn used(&self) -> Use {
        let Counted { telemetry, cgroup } = &*self.0;
        match &*telemetry.0 {
            Source::Ledger(ledger) => match ledger.read_one(CgroupId::from(cgroup.id())) {
                Ok(usage) => Use {
                    cpu_ns: usage.cpu_ns,
                    wait_ns: usage.wait_ns,
                    memory_bytes: usage.memory_bytes,
                    memory_peak_bytes: usage.memory_peak_bytes,
                },
                Err(error) => {
                    tracing::error!("{}", with_sources(&error));
                    Use::default()
                }
            },
            Source::Cgroup(_) => {
                let (memory_bytes, memory_peak_bytes) = cgroup.memory_bytes().unwrap_or_default();
                Use {
                    cpu_ns: cgroup.cpu_ns().unwrap_or_default(),
                    wait_ns: 0,
                    memory_bytes,
                    memory_peak_bytes,
                }
            }
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        if let Source::Ledger(ledger) = &*self.telemetry.0
            && let Err(error) = ledger.remove(CgroupId::from(self.cgroup.id()))
        {
            tracing::error!("{}", with_sources(&error));
        }
    }
}

/// An error and what it came from, in one line.
fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
