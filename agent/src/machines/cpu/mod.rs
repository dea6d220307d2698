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
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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
use super::{Size, ThreadCgroups};
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
    /// Locked for no longer than it takes to read or write it.
    wanted: Arc<Mutex<Wanted>>,
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

/// How a machine is to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Wanted {
    class: Class,
    /// What its account allows, in thousandths of a CPU.
    allowed_millis: u32,
    vcpus: Vcpus,
}

/// The vCPUs of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Vcpus {
    /// How many have threads.
    pub(super) plugged: u32,
    /// The most that all of them may use together whatever else is allowed, in thousandths of a CPU.
    pub(super) share_millis: u32,
}

// === impl Wanted ===

impl Wanted {
    /// What all of its vCPUs may use, in thousandths of a CPU.
    fn millis(self) -> u32 {
        self.allowed_millis.min(self.vcpus.share_millis)
    }

    fn limit(self) -> Option<CpuMax> {
        limit(self.millis(), self.vcpus.plugged)
    }
}

// === impl Vcpus ===

impl Vcpus {
    /// Of a machine that has just what it is to have.
    pub(super) fn of(size: Size) -> Self {
        Self {
            plugged: size.vcpus,
            share_millis: size.cpu_millis,
        }
    }
}

// === impl Cpu ===

impl Cpu {
    pub(super) fn new(schedulers: Schedulers, id: Ulid, vmm: u32, cgroup: &Cgroup, vcpus: Vcpus) -> Self {
        let parts = ThreadCgroups::of(cgroup);
        let wanted = Wanted {
            class: Class::Normal,
            allowed_millis: u32::MAX,
            vcpus,
        };
        Self {
            machine: urgent::Machine { id, vmm, parts },
            cgroup: cgroup.clone(),
            schedulers,
            wanted: Arc::new(Mutex::new(wanted)),
            // As far as is known here.
            hurried: Arc::new(AtomicBool::new(true)),
        }
    }

    /// Lets the machine run by a class and use so much of the host's CPUs, in thousandths of one. To be called again when threads
    /// have been added, as at the end of its boot. Blocks, for less than a millisecond on a host that is not overloaded.
    ///
    /// # Errors
    /// [`CpuError`]; it may be tried again. It is never less limited, or more urgent, than either before or after.
    pub fn set(&self, class: Class, allowed_millis: u32) -> Result<(), CpuError> {
        self.change(
            |wanted| (wanted.class, wanted.allowed_millis) = (class, allowed_millis),
            Self::apply,
        )
    }

    /// The machine has other vCPUs than before: those that are new run as the others do from now on. Their threads are in the
    /// machine's cgroups by then. Blocks, as [`Self::set`].
    ///
    /// # Errors
    /// As [`Self::set`]'s.
    pub(super) fn set_vcpus(&self, vcpus: Vcpus) -> Result<(), CpuError> {
        self.change(|wanted| wanted.vcpus = vcpus, Self::apply)
    }

    /// The same as [`Self::set`] for a thread that others wait for, where the machine may use less; false where that is left to
    /// [`Self::set`], for the scheduler sees it by itself.
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
        let change = |wanted: &mut Wanted| (wanted.class, wanted.allowed_millis) = (class, allowed_millis);
        self.change(change, Self::apply_without).map(|()| true)
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

    /// Changes what is wanted, and has the machine run so. Nobody waits for another to be done with that: who is done last sees to it
    /// that it is what is wanted then.
    fn change(
        &self,
        change: impl FnOnce(&mut Wanted),
        apply: impl Fn(&Self, Wanted) -> Result<(), CpuError>,
    ) -> Result<(), CpuError> {
        let mut applied = {
            let mut wanted = self.wanted();
            change(&mut wanted);
            *wanted
        };
        loop {
            apply(self, applied)?;
            let wanted = *self.wanted();
            if wanted == applied {
                return Ok(());
            }
            applied = wanted;
        }
    }

    fn wanted(&self) -> MutexGuard<'_, Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn apply(&self, wanted: Wanted) -> Result<(), CpuError> {
        if let Some(sched_ext) = &self.schedulers.sched_ext
            && sched_ext.set(self, wanted).map_err(CpuError::Schedule)?
        {
            // For when it ends.
            return Ok(self.machine.parts.vcpus.limit_cpu(wanted.limit())?);
        }
        self.apply_without(wanted)
    }

    /// The same where no `sched_ext` scheduler is at work.
    fn apply_without(&self, wanted: Wanted) -> Result<(), CpuError> {
        let (vcpus, limit) = (&self.machine.parts.vcpus, wanted.limit());
        match wanted.class {
            Class::High => {
                vcpus.limit_cpu(limit)?;
                self.hurry(wanted.vcpus.plugged).map_err(CpuError::Schedule)
            }
            Class::Normal | Class::Exhausted => {
                // In real time there are no limits.
                self.calm().map_err(CpuError::Schedule)?;
                Ok(vcpus.limit_cpu(limit)?)
            }
        }
    }

    fn hurry(&self, vcpus: u32) -> io::Result<()> {
        // After it too: who calms it at the same time takes this back.
        self.hurried.store(true, Ordering::SeqCst);
        let done = self.make_urgent(vcpus);
        self.hurried.store(true, Ordering::SeqCst);
        done
    }

    fn make_urgent(&self, vcpus: u32) -> io::Result<()> {
        let Some(urgent) = &self.schedulers.urgent else {
            return self.machine.schedule(SOON);
        };
        match urgent.enter(self.machine.clone(), vcpus) {
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
            Some(sched_ext) => sched_ext.set(self, *self.wanted()),
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
