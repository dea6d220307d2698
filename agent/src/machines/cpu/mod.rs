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

mod allowance;
mod limit;
#[cfg(test)]
mod tests;
mod urgent;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use stoker_credits::Class;
use stoker_linux::CgroupError;
use stoker_linux::sched::Policy;
use ulid::Ulid;

use self::limit::limit;
pub(super) use self::urgent::Urgent;
use super::{Size, ThreadCgroups};

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
    urgent: Option<Arc<Urgent>>,
    /// Locked while it is made so.
    wanted: Arc<Mutex<Wanted>>,
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
    pub(super) fn new(urgent: Option<Arc<Urgent>>, id: Ulid, vmm: u32, parts: ThreadCgroups, vcpus: Vcpus) -> Self {
        let wanted = Wanted {
            class: Class::Normal,
            allowed_millis: u32::MAX,
            vcpus,
        };
        Self {
            machine: urgent::Machine { id, vmm, parts },
            urgent,
            wanted: Arc::new(Mutex::new(wanted)),
        }
    }

    /// Lets the machine run by a class and use so much of the host's CPUs, in thousandths of one. To be called again when threads
    /// have been added, as at the end of its boot. Blocks, for less than a millisecond on a host that is not overloaded.
    ///
    /// # Errors
    /// [`CpuError`]; it may be tried again. It is never less limited, or more urgent, than either before or after.
    pub fn set(&self, class: Class, allowed_millis: u32) -> Result<(), CpuError> {
        let mut wanted = self.wanted();
        (wanted.class, wanted.allowed_millis) = (class, allowed_millis);
        self.apply(*wanted)
    }

    /// The machine has other vCPUs than before: those that are new run as the others do from now on. Their threads are in the
    /// machine's cgroups by then. Blocks, as [`Self::set`].
    ///
    /// # Errors
    /// As [`Self::set`]'s.
    pub(super) fn set_vcpus(&self, vcpus: Vcpus) -> Result<(), CpuError> {
        let mut wanted = self.wanted();
        wanted.vcpus = vcpus;
        self.apply(*wanted)
    }

    fn wanted(&self) -> MutexGuard<'_, Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn apply(&self, wanted: Wanted) -> Result<(), CpuError> {
        let Vcpus { plugged, share_millis } = wanted.vcpus;
        let limit = limit(wanted.allowed_millis.min(share_millis), plugged);
        let vcpus = &self.machine.parts.vcpus;
        match wanted.class {
            Class::High => {
                vcpus.limit_cpu(limit)?;
                self.hurry(plugged).map_err(CpuError::Schedule)
            }
            Class::Normal | Class::Exhausted => {
                // In real time there are no limits.
                self.calm().map_err(CpuError::Schedule)?;
                Ok(vcpus.limit_cpu(limit)?)
            }
        }
    }

    fn hurry(&self, vcpus: u32) -> io::Result<()> {
        let Some(urgent) = &self.urgent else {
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
        if let Some(urgent) = &self.urgent {
            urgent.leave(self.machine.id)?;
        }
        self.reset()
    }

    /// Schedules its threads as any others, whoever made them what they are.
    pub(super) fn reset(&self) -> io::Result<()> {
        self.machine.schedule(Policy::DEFAULT)
    }
}

/// Starts what keeps machines that run in real time within what they may use; without it, none does.
pub(super) fn start_urgent() -> Option<Arc<Urgent>> {
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
