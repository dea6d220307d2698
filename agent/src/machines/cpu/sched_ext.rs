//! Machines that are scheduled by a scheduler of ours, where the kernel has `sched_ext` (`stoker_ebpf::scheduler`).
//!
//! It knows the class of each machine, its limit and its weight, and holds urgent ones to what they may use by itself
//! ([`stoker_ebpf::Allowance`]): nobody has to be woken for that. Where a machine's account falls it looks there itself, and what is
//! set here follows; what rises waits until it is set. While it is at work `cpu.max` and `cpu.weight` of cgroups, which
//! are for fair threads, have no effect. They are set all the same: when it ends they hold at once.
//!
//! It ends with this process, or when the kernel ends it. Machines are then scheduled as where there is none.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use stoker_credits::Class;
use stoker_ebpf::Ledger;
use stoker_ebpf::scheduler::{self, Scheduler, SchedulerError, Share};
use stoker_linux::sched::Policy;
use ulid::Ulid;

use super::{Cpu, Schedulers, Wanted};
use crate::watcher::Watcher;

/// How threads of vCPUs are, and those of devices: by the nice value the scheduler knows which are limited.
const VCPUS: Policy = Policy::Extensible { nice: 0 };
const DEVICES: Policy = Policy::Extensible { nice: -1 };

/// The first process id namespace, by which the kernel tells processes apart (`PROC_PID_INIT_INO`).
const FIRST_NAMESPACE: &str = "pid:[4026531836]";

/// Schedules machines until it is dropped or ends.
#[derive(Debug)]
pub(in crate::machines) struct SchedExt {
    shared: Arc<Shared>,
    _watcher: Watcher,
}

/// Why machines can't be scheduled so.
#[derive(Debug, thiserror::Error)]
pub enum NoSchedExt {
    /// The scheduler can't be loaded.
    #[error(transparent)]
    Scheduler(#[from] SchedulerError),
    /// Process ids here are not the kernel's own.
    #[error("stokerd runs in a process id namespace of its own: give its container the host's (--pid=host)")]
    Namespace,
    /// Nothing keeps fair threads from taking all CPUs.
    #[error(
        "this kernel leaves machines nothing where processes of the host compute without pause; to use it all the same, let \
         machines.scheduler be \"sched_ext\""
    )]
    Unguaranteed,
    /// Something else.
    #[error("{0}")]
    Io(#[from] io::Error),
}

#[derive(Debug)]
struct Shared {
    scheduler: Scheduler,
    ledger: Arc<Ledger>,
    /// None once the scheduler has ended.
    machines: Mutex<Option<Machines>>,
}

/// The machines that it schedules.
#[derive(Debug, Default)]
struct Machines {
    of: HashMap<Ulid, Machine>,
    /// vCPUs of those of the class high.
    urgent_vcpus: u64,
}

#[derive(Debug)]
struct Machine {
    /// Without this scheduler.
    cpu: Cpu,
    wanted: Wanted,
}

// === impl SchedExt ===

impl SchedExt {
    /// Loads the scheduler, for machines that have their accounts in this ledger.
    pub(super) fn start(ledger: &Arc<Ledger>) -> Result<Self, NoSchedExt> {
        if !scheduler::is_there() {
            return Err(SchedulerError::Absent.into());
        }
        if std::fs::read_link("/proc/self/ns/pid")?.as_os_str() != FIRST_NAMESPACE {
            return Err(NoSchedExt::Namespace);
        }
        let shared = Arc::new(Shared {
            scheduler: Scheduler::load(Some(ledger))?,
            ledger: ledger.clone(),
            machines: Mutex::new(Some(Machines::default())),
        });
        let of_thread = shared.clone();
        let watcher = Watcher::start("sched_ext", move |stop| watch_over(&of_thread, stop))?;
        Ok(Self {
            shared,
            _watcher: watcher,
        })
    }

    /// Whether machines have a part of each CPU whatever the host's own processes do.
    pub(super) fn guaranteed(self) -> Result<Self, NoSchedExt> {
        match self.shared.scheduler.is_guaranteed() {
            true => Ok(self),
            false => Err(NoSchedExt::Unguaranteed),
        }
    }

    /// Schedules a machine as is wanted; false where the scheduler has ended.
    ///
    /// # Errors
    /// Where the kernel does not let its threads.
    pub(super) fn set(&self, cpu: &Cpu, wanted: Wanted) -> io::Result<bool> {
        let mut guard = self.shared.lock();
        let Some(machines) = guard.as_mut() else {
            return Ok(false);
        };
        // Nothing of it runs: it may have left, and nobody would forget it once more.
        if cpu.cgroup.keyed_number("cgroup.events", "populated") != Some(1) {
            return Ok(true);
        }
        let machine = Machine {
            cpu: Cpu {
                schedulers: Schedulers {
                    sched_ext: None,
                    ..cpu.schedulers.clone()
                },
                ..cpu.clone()
            },
            wanted,
        };
        machine.tell(&self.shared)?;
        machines.put(cpu.machine.id, Some(machine));
        self.shared.scheduler.set_urgent_vcpus(machines.urgent_vcpus)?;
        cpu.machine.schedule_parts(VCPUS, DEVICES)?;
        Ok(true)
    }

    /// Whether it has not ended. Waits for nobody: who has the lock knows better.
    pub(super) fn is_at_work(&self) -> bool {
        !matches!(self.shared.machines.try_lock(), Ok(machines) if machines.is_none())
    }

    /// The weight of a machine's cgroup is another.
    ///
    /// # Errors
    /// None that is known.
    pub(super) fn weighed(&self, id: Ulid) -> io::Result<()> {
        let guard = self.shared.lock();
        let machine = guard.as_ref().and_then(|machines| machines.of.get(&id));
        machine.map_or(Ok(()), |machine| machine.tell(&self.shared))
    }

    /// Forgets a machine, which is to end or has: what is left of it runs in its turn, without a limit.
    ///
    /// # Errors
    /// None that is known.
    pub(super) fn leave(&self, id: Ulid) -> io::Result<()> {
        let mut guard = self.shared.lock();
        let Some(machines) = guard.as_mut() else {
            return Ok(());
        };
        let Some(machine) = machines.put(id, None) else {
            return Ok(());
        };
        self.shared.scheduler.set_urgent_vcpus(machines.urgent_vcpus)?;
        self.shared.scheduler.remove(machine.cpu.machine.vmm)
    }
}

/// Waits until the scheduler has ended, or is to.
fn watch_over(shared: &Shared, stop: &EventFd) {
    let why = loop {
        let mut waits = [stop.as_fd(), shared.scheduler.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        match poll(&mut waits, PollTimeout::NONE) {
            Ok(_) if waits.first().and_then(PollFd::any) == Some(true) => return,
            Ok(_) => match shared.scheduler.ended() {
                Some(why) => break why,
                None => continue,
            },
            Err(Errno::EINTR) => continue,
            Err(error) => break format!("nobody can wait for its end: {error}"),
        }
    };
    // Whoever sets a machine meanwhile waits, and sets it after this.
    let mut guard = shared.lock();
    let machines = guard.take().unwrap_or_default();
    tracing::error!(
        why,
        machines = machines.of.len(),
        "the sched_ext scheduler has ended: machines are scheduled in real time or as all others are, until stokerd is restarted"
    );
    for (id, machine) in machines.of {
        if let Err(error) = machine.cpu.apply_without(machine.wanted) {
            // It may have ended.
            tracing::debug!(machine = %id, %error, "a machine does not run as was decided");
        }
    }
}

// === impl Shared ===

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Option<Machines>> {
        // What is in it is whole at any moment.
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Machines ===

impl Machines {
    /// Puts a machine, or nothing, in the place of one.
    fn put(&mut self, id: Ulid, machine: Option<Machine>) -> Option<Machine> {
        self.urgent_vcpus += machine.as_ref().map_or(0, Machine::urgent_vcpus);
        let was = match machine {
            Some(machine) => self.of.insert(id, machine),
            None => self.of.remove(&id),
        };
        self.urgent_vcpus -= was.as_ref().map_or(0, Machine::urgent_vcpus);
        was
    }
}

// === impl Machine ===

impl Machine {
    fn urgent_vcpus(&self) -> u64 {
        match self.wanted.class {
            Class::High => self.wanted.vcpus.plugged.into(),
            Class::Normal | Class::Exhausted => 0,
        }
    }

    /// Tells the scheduler how it is to be scheduled.
    fn tell(&self, shared: &Shared) -> io::Result<()> {
        let Cpu { machine, cgroup, .. } = &self.cpu;
        let owner = cgroup.id().map_err(io::Error::other)?;
        // One that is not counted has no account.
        let (slot, generation) = shared.ledger.account_place(owner.into()).unwrap_or_default();
        let weight = cgroup
            .number("cpu.weight")
            .and_then(|weight| u32::try_from(weight).ok());
        let share = Share {
            high: u32::from(self.wanted.class == Class::High),
            allowed_millis: self.wanted.millis(),
            vcpus: self.wanted.vcpus.plugged,
            weight: weight.unwrap_or(Share::default().weight),
            slot,
            generation,
        };
        shared.scheduler.set(machine.vmm, share)
    }
}
