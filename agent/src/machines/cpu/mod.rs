//! How much a machine may use of the host's CPUs, and how soon it runs when it is woken: a class of credits as the kernel is told
//! it. [What each way was measured to give, and why it is this one](../../../../docs/scheduling.md).
//!
//! | class | when it is woken | what its vCPUs may use |
//! |---|---|---|
//! | high | runs at once, in real time, while it uses little (`urgent`) | what is allowed |
//! | normal | waits its turn | what is allowed |
//! | exhausted | waits its turn | what is allowed: its baseline, in every period (`limit`) |
//!
//! The threads of the VMM's devices are as urgent as those of the vCPUs, for a wake-up may come through them. They are not limited:
//! what they do for the guest is charged to it, and to stop them would stop what others wait for. How contended CPUs are shared
//! stands in `cpu.weight` of the machine's own cgroup, whatever the class.
//!
//! Where the kernel schedules no thread of a machine in real time (`CONFIG_RT_GROUP_SCHED`, or without `CAP_SYS_NICE`), one of the
//! class high asks for short slices instead.
//!
//! Where the kernel has `sched_ext`, a scheduler of ours does all of that instead (`sched_ext`), for as long as it lives.

mod limit;
mod sched_ext;
#[cfg(test)]
mod tests;
mod urgent;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use stoker_credits::Class;
use stoker_ebpf::Ledger;
use stoker_linux::sched::Policy;
use stoker_linux::{Cgroup, CgroupError, CpuMax};
use ulid::Ulid;

use self::limit::limit;
pub use self::sched_ext::NoSchedExt;
use self::sched_ext::SchedExt;
use self::urgent::Urgent;
use super::ThreadCgroups;
use crate::config::Scheduler;

/// What a machine of the class high asks for where it can't be scheduled in real time.
const SOON: Policy = Policy::Fair {
    nice: 0,
    slice: Some(Duration::from_micros(100)),
};

/// Why a machine does not run as it should. One that has ended gives one of these too.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// Its vCPUs can't be limited.
    #[error("can't limit what a guest uses of the host's CPUs: {0}")]
    Limit(#[from] CgroupError),
    /// Its threads can't be scheduled otherwise.
    #[error("can't schedule a machine's threads otherwise: {0}")]
    Schedule(#[source] io::Error),
}

/// How soon and how much the threads of a machine run. Clones are the same machine's.
#[derive(Clone, Debug)]
pub struct Cpu {
    machine: urgent::Machine,
    cgroup: Cgroup,
    schedulers: Schedulers,
    /// Its threads may be more urgent than others. What is so already is not done again: a fall of its balance is to count at once.
    hurried: Arc<AtomicBool>,
}

/// What machines are scheduled by, beside the kernel itself; the first that there is.
#[derive(Clone, Debug, Default)]
pub(super) struct Schedulers {
    sched_ext: Option<Arc<SchedExt>>,
    /// Keeps machines that run in real time; none does without.
    urgent: Option<Arc<Urgent>>,
}

// === impl Cpu ===

impl Cpu {
    pub(super) fn new(schedulers: Schedulers, id: Ulid, vmm: u32, cgroup: &Cgroup, vcpus: u32) -> Self {
        let parts = ThreadCgroups::of(cgroup);
        Self {
            machine: urgent::Machine { id, vmm, parts, vcpus },
            cgroup: cgroup.clone(),
            schedulers,
            // As far as is known here.
            hurried: Arc::new(AtomicBool::new(true)),
        }
    }

    /// Lets the machine run by a class and use so much of the host's CPUs, in thousandths of one. Of two calls at a time either
    /// may count. To be called again when threads have been added, as at the end of its boot. Blocks, for less than a
    /// millisecond on a host that is not overloaded.
    ///
    /// # Errors
    /// [`CpuError`]; it may be tried again. It is never less limited, or more urgent, than either before or after.
    pub fn set(&self, class: Class, allowed_millis: u32) -> Result<(), CpuError> {
        if let Some(sched_ext) = &self.schedulers.sched_ext
            && sched_ext.set(self, class, allowed_millis).map_err(CpuError::Schedule)?
        {
            // For when it ends.
            return Ok(self.machine.parts.vcpus.limit_cpu(self.limit(allowed_millis))?);
        }
        self.set_without(class, allowed_millis)
    }

    /// The same for a thread that others wait for, where the machine may use less; false where that is left to [`Self::set`], for the
    /// scheduler sees it by itself.
    ///
    /// # Errors
    /// As of [`Self::set`].
    pub fn hold(&self, class: Class, allowed_millis: u32) -> Result<bool, CpuError> {
        if self
            .schedulers
            .sched_ext
            .as_ref()
            .is_some_and(|sched_ext| sched_ext.is_at_work())
        {
            return Ok(false);
        }
        self.set_without(class, allowed_millis).map(|()| true)
    }

    /// Says how contended CPUs are shared: `cpu.weight`. Blocks, for as long.
    ///
    /// # Errors
    /// Where there is no controller for it, or the machine has ended.
    pub fn weigh(&self, weight: u32) -> Result<(), CpuError> {
        self.cgroup.write("cpu.weight", &weight.to_string())?;
        match &self.schedulers.sched_ext {
            Some(sched_ext) => sched_ext.weighed(self.machine.id).map_err(CpuError::Schedule),
            None => Ok(()),
        }
    }

    /// The same where no `sched_ext` scheduler is at work.
    fn set_without(&self, class: Class, allowed_millis: u32) -> Result<(), CpuError> {
        let (vcpus, limit) = (&self.machine.parts.vcpus, self.limit(allowed_millis));
        match class {
            Class::High => {
                vcpus.limit_cpu(limit)?;
                self.hurry().map_err(CpuError::Schedule)
            }
            Class::Normal | Class::Exhausted => {
                // In real time there are no limits.
                self.calm().map_err(CpuError::Schedule)?;
                Ok(vcpus.limit_cpu(limit)?)
            }
        }
    }

    fn limit(&self, allowed_millis: u32) -> Option<CpuMax> {
        limit(allowed_millis, self.machine.vcpus)
    }

    fn hurry(&self) -> io::Result<()> {
        // After it too: who calms it at the same time takes this back.
        self.hurried.store(true, Ordering::SeqCst);
        let done = self.make_urgent();
        self.hurried.store(true, Ordering::SeqCst);
        done
    }

    fn make_urgent(&self) -> io::Result<()> {
        let Some(urgent) = &self.schedulers.urgent else {
            return self.machine.schedule(SOON);
        };
        match urgent.enter(self.machine.clone()) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                tracing::warn!(
                    machine = %self.machine.id, %error,
                    "the kernel does not let a machine's threads run in real time (CONFIG_RT_GROUP_SCHED: boot with \
                     rt_group_sched=0); they ask for short slices instead"
                );
                self.machine.schedule(SOON)
            }
            other => other,
        }
    }

    fn calm(&self) -> io::Result<()> {
        if !self.hurried.swap(false, Ordering::SeqCst) {
            return Ok(());
        }
        let left = match &self.schedulers.urgent {
            Some(urgent) => urgent.leave(self.machine.id),
            None => Ok(false),
        };
        let calm = |left| match left {
            true => Ok(()),
            false => self.machine.schedule(Policy::DEFAULT),
        };
        let calmed = left.and_then(calm);
        calmed.inspect_err(|_| self.hurried.store(true, Ordering::SeqCst))
    }

    /// Has the threads of one that has just started scheduled as those of any machine; false where the kernel does that by itself.
    /// Blocks, for as long as [`Self::set`].
    pub(super) fn enter(&self) -> io::Result<bool> {
        match &self.schedulers.sched_ext {
            Some(sched_ext) => sched_ext.set(self, Class::Normal, u32::MAX),
            None => Ok(false),
        }
    }

    /// The same for one that was found, whoever made its threads what they are.
    pub(super) fn reset(&self) -> io::Result<()> {
        match self.enter()? {
            true => Ok(()),
            false => self.machine.schedule(Policy::DEFAULT),
        }
    }
}

// === impl Schedulers ===

impl Schedulers {
    /// Starts what is configured.
    ///
    /// # Errors
    /// Where a `sched_ext` scheduler is asked for and can't be had.
    pub(super) fn start(wanted: Scheduler, ledger: &Arc<Ledger>) -> Result<Self, NoSchedExt> {
        let sched_ext = match wanted {
            Scheduler::RealTime => None,
            Scheduler::SchedExt => Some(SchedExt::start(ledger)?),
            Scheduler::Auto => match SchedExt::start(ledger).and_then(SchedExt::guaranteed) {
                Ok(started) => Some(started),
                Err(error) => {
                    tracing::info!(%error, "machines are not scheduled by sched_ext");
                    None
                }
            },
        };
        if sched_ext.is_some() {
            tracing::info!("machines are scheduled by sched_ext");
        }
        Ok(Self {
            sched_ext: sched_ext.map(Arc::new),
            urgent: start_urgent(),
        })
    }

    /// Lets a machine that is to end be urgent no more, and no less than others. Blocks, for less than a millisecond on a host that
    /// is not overloaded.
    ///
    /// # Errors
    /// Where the kernel does not say how its threads are scheduled.
    pub(super) fn leave(&self, machine: Ulid) -> io::Result<()> {
        if let Some(sched_ext) = &self.sched_ext {
            sched_ext.leave(machine)?;
        }
        self.urgent
            .as_ref()
            .map_or(Ok(()), |urgent| urgent.leave(machine).map(drop))
    }

    /// Forgets a machine in which nothing runs any more: it may have been set since it left.
    ///
    /// # Errors
    /// None that is known.
    pub(super) fn forget(&self, machine: Ulid) -> io::Result<()> {
        self.sched_ext
            .as_ref()
            .map_or(Ok(()), |sched_ext| sched_ext.leave(machine))
    }
}

/// Starts what keeps machines that run in real time within what they may use; without it, none does.
fn start_urgent() -> Option<Arc<Urgent>> {
    match Urgent::start() {
        Ok(urgent) => Some(Arc::new(urgent)),
        Err(error) => {
            tracing::warn!(
                %error,
                "machines with credits do not run in real time, but ask for short slices: stokerd may not schedule in real time \
                 (it takes CAP_SYS_NICE, and a kernel without CONFIG_RT_GROUP_SCHED or booted with rt_group_sched=0)"
            );
            None
        }
    }
}

/// Lets a machine's vCPUs use all that there is.
pub(super) fn lift_limit(parts: &ThreadCgroups) -> Result<(), CgroupError> {
    parts.vcpus.limit_cpu(None)
}
