//! What containers use: their processes by eBPF, or where the kernel does not let us, by its own counts, and then it is said;
//! and what is spent on them here ([`crate::budget`]).

use std::error::Error;
use std::io;
use std::iter;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use stoker_ebpf::{CgroupId, Ledger, LedgerError, Limits};
use stoker_proto::limits;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use crate::boot::precedence;
use crate::budget::Budget;
use crate::container::cgroup::Cgroup;

/// What the ledger has room for: one subject for each container there may be.
const LIMITS: Limits = Limits {
    subjects: limits::CONTAINERS as u32,
    ..Limits::GUEST
};

/// What a container used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Use {
    /// CPU time in ns: that of its processes, and that of this one for it.
    pub(crate) cpu_ns: u64,
    /// Time in ns that its threads waited for a CPU.
    pub(crate) wait_ns: u64,
    /// Memory now, in bytes.
    pub(crate) memory_bytes: u64,
    /// The most memory so far, in bytes.
    pub(crate) memory_peak_bytes: u64,
    /// The most memory since [`Subject::begin_peak`], in bytes; the most so far where the kernel counts.
    pub(crate) recent_peak_bytes: u64,
}

/// Counts for all containers. Clones are the same.
#[derive(Clone)]
pub(crate) struct Telemetry(watch::Receiver<Option<Arc<Source>>>);

enum Source {
    Ledger(Box<Ledger>),
    /// The kernel's files, and why there is no ledger.
    Cgroup(String),
}

/// What tells of containers that have used so much ([`Subject::set_alarm`]).
pub(crate) struct Alarms {
    source: Arc<Source>,
    rang: AsyncFd<OwnedFd>,
}

/// One container that is counted, until the last clone is gone.
#[derive(Clone)]
pub(crate) struct Subject(Arc<Counted>);

struct Counted {
    source: Arc<Source>,
    cgroup: Arc<Cgroup>,
    budget: Budget,
    /// The most memory before its peak was looked for anew, in bytes.
    earlier_peak_bytes: AtomicU64,
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
    /// Begins to count. The kernel takes its time to verify the programs: until it has, the machine gets on with other
    /// things, and only what is to be counted waits.
    pub(crate) fn start() -> Self {
        let (sender, source) = watch::channel(None);
        std::thread::spawn(move || {
            precedence::ordinary();
            sender.send_replace(Some(Arc::new(Source::load())));
        });
        Self(source)
    }

    /// Why there is no count by eBPF, if there is none.
    pub(crate) async fn error(&self) -> Option<String> {
        match &*self.source().await {
            Source::Ledger(_) => None,
            Source::Cgroup(why) => Some(why.clone()),
        }
    }

    /// Counts what runs in `cgroup`, from now on.
    pub(crate) async fn count(&self, cgroup: &Arc<Cgroup>) -> Result<Subject, LedgerError> {
        let source = self.source().await;
        if let Source::Ledger(ledger) = &*source {
            ledger.add(CgroupId::from(cgroup.id()))?;
        }
        Ok(Subject(Arc::new(Counted {
            source,
            cgroup: Arc::clone(cgroup),
            budget: Budget::default(),
            earlier_peak_bytes: AtomicU64::new(0),
        })))
    }

    /// Counts what runs in `cgroup` and in the cgroups below it, as the kernel does: what counts by eBPF knows each cgroup alone.
    pub(crate) fn count_with_parts(cgroup: &Arc<Cgroup>) -> Subject {
        Subject(Arc::new(Counted {
            source: Arc::new(Source::Cgroup("it has cgroups below it".to_owned())),
            cgroup: Arc::clone(cgroup),
            budget: Budget::default(),
            earlier_peak_bytes: AtomicU64::new(0),
        }))
    }

    /// What tells of containers that have used so much; nothing where there is no count by eBPF.
    pub(crate) async fn alarms(&self) -> Option<Alarms> {
        let source = self.source().await;
        let Source::Ledger(ledger) = &*source else {
            return None;
        };
        let rang = ledger.alarms().and_then(|rang| {
            // SAFETY: an `OwnedFd` is the same open descriptor until it is dropped, and it is dropped after it is deregistered.
            unsafe { AsyncFd::register_with_interest(rang, Interest::READABLE) }.map_err(io::Error::from)
        });
        match rang {
            Ok(rang) => Some(Alarms { source, rang }),
            Err(error) => {
                tracing::error!("containers' credits are not kept: {error}");
                None
            }
        }
    }

    async fn source(&self) -> Arc<Source> {
        let mut receiver = self.0.clone();
        let source = receiver.wait_for(Option::is_some).await;
        match source.ok().and_then(|source| source.clone()) {
            Some(source) => source,
            // The thread that loads tells before it ends.
            None => Arc::new(Source::Cgroup("the programs were not loaded".to_owned())),
        }
    }
}

// === impl Source ===

impl Source {
    fn load() -> Self {
        match Ledger::load(LIMITS) {
            Ok(ledger) => Self::Ledger(Box::new(ledger)),
            Err(error) => {
                let why = with_sources(&error);
                tracing::warn!("containers are counted by their cgroups: {why}");
                Self::Cgroup(why)
            }
        }
    }
}

// === impl Alarms ===

impl Alarms {
    /// Resolves with the cgroup ids of containers whose alarms were due, each at least once.
    pub(crate) async fn next(&self) -> io::Result<Vec<u64>> {
        loop {
            // Before they are drained: what comes meanwhile wakes again.
            self.rang.readable().await?.clear_ready();
            let mut rang = Vec::new();
            if let Source::Ledger(ledger) = &*self.source {
                ledger.drain_alarms(|subject| rang.push(subject.get()));
            }
            if !rang.is_empty() {
                return Ok(rang);
            }
        }
    }
}

// === impl Subject ===

impl Subject {
    /// What may be spent on it here, and was.
    pub(crate) fn budget(&self) -> &Budget {
        &self.0.budget
    }

    /// What it has used up to now.
    pub(crate) fn used(&self) -> Use {
        let own = self.used_by_itself();
        Use {
            cpu_ns: own.cpu_ns.saturating_add(self.0.budget.spent_ns()),
            ..own
        }
    }

    /// Looks for its peak of memory anew, from what it has now; the most so far stays what it was.
    pub(crate) fn begin_peak(&self) {
        let Counted {
            source,
            cgroup,
            earlier_peak_bytes,
            ..
        } = &*self.0;
        let Source::Ledger(ledger) = &**source else {
            return;
        };
        match ledger.begin_peak(CgroupId::from(cgroup.id())) {
            Ok(before) => {
                earlier_peak_bytes.fetch_max(before, Ordering::Relaxed);
            }
            Err(error) => tracing::error!("{}", with_sources(&error)),
        }
    }

    /// How long its threads could have run and were held back by its limit, in ns: of all CPUs together, as the kernel counts it.
    pub(crate) fn throttled_ns(&self) -> Option<u64> {
        self.0.cgroup.throttled_ns()
    }

    /// Has [`Alarms`] tell once its processes have used so much CPU time, in ns of [`used_by_itself`](Self::used_by_itself). The
    /// alarm before it is void.
    pub(crate) fn set_alarm(&self, cpu_ns: u64) {
        if let Source::Ledger(ledger) = &*self.0.source
            && let Err(error) = ledger.set_alarm(CgroupId::from(self.0.cgroup.id()), cpu_ns)
        {
            tracing::error!("{}", with_sources(&error));
        }
    }

    /// What its processes have used up to now.
    pub(crate) fn used_by_itself(&self) -> Use {
        let Counted {
            source,
            cgroup,
            earlier_peak_bytes,
            ..
        } = &*self.0;
        match &**source {
            Source::Ledger(ledger) => match ledger.read_one(CgroupId::from(cgroup.id())) {
                Ok(usage) => Use {
                    cpu_ns: usage.cpu_ns,
                    wait_ns: usage.wait_ns,
                    memory_bytes: usage.memory_bytes,
                    memory_peak_bytes: usage.memory_peak_bytes.max(earlier_peak_bytes.load(Ordering::Relaxed)),
                    recent_peak_bytes: usage.memory_peak_bytes,
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
                    recent_peak_bytes: memory_peak_bytes,
                }
            }
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        if let Source::Ledger(ledger) = &*self.source
            && let Err(error) = ledger.remove(CgroupId::from(self.cgroup.id()))
        {
            tracing::error!("{}", with_sources(&error));
        }
    }
}

/// An error and what it came from, in one line.
fn with_sources(error: &(dyn Error + 'static)) -> String {
    let chain = iter::successors(Some(error), |&error| error.source()).map(ToString::to_string);
    chain.collect::<Vec<_>>().join(": ")
}
