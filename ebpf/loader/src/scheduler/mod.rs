//! A scheduler for the threads of machines, for kernels that have `sched_ext` (Linux 6.12 and later with
//! `CONFIG_SCHED_CLASS_EXT`).
//!
//! Threads are scheduled by it that are in `SCHED_EXT`; of each process it is told, by [`Scheduler::set`], how. Where the machine's account
//! in the [ledger](crate::Ledger) falls, it is scheduled as that says from its next turn on, whoever is told of that and when. All other
//! threads know nothing of it and run before them. It is the kernel's as long as the [`Scheduler`] lives: nothing is pinned, so it
//! ends with the process, however that ends. Where the kernel ends it, as for a fault or where threads could not run for 30 s, or a
//! person with SysRq-S, that is told ([`Scheduler::ended`]). In any case its threads are then scheduled as all others are, with their
//! limits by cgroup.
//!
//! The kernel calls its functions through a structure (`struct_ops`), which aya can't load. libbpf can, from C compiled by clang; what
//! this takes in its place is small: the program is compiled as the others are, with all that it uses of the kernel as symbols, and
//! these are linked here with the kernel that runs (`link`, `kernel`).

mod kernel;
mod link;
mod maps;
mod system;
mod types;

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use aya::maps::{Array, HashMap, MapData, RingBuf};
use stoker_ebpf_types::scheduler::{Ended, Host, Machine};

pub use stoker_ebpf_types::scheduler::Share;

use self::kernel::Kernel;
use self::link::LinkError;
use self::maps::Maps;
use self::system::Refused;
use crate::error::{ENOENT, EPERM, errno};
use crate::ledger::Ledger;
use crate::objects::online_cpus;

/// The compiled scheduler.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("STOKER_SCHEDULER_OBJECT"));

/// The kernel's own type information.
const BTF: &str = "/sys/kernel/btf/vmlinux";

/// The name that the kernel tells of it, in `/sys/kernel/sched_ext/root/ops`.
pub const NAME: &str = "stoker";

/// The function for kernels that leave waiting threads on a CPU that was taken from them, and the flag of those that don't.
const RELEASE: &str = "cpu_release";
const NEVER_LEFT: &str = "SCX_OPS_ALWAYS_ENQ_IMMED";

/// Bytes of [`Ended::reason`].
const REASON_BYTES: usize = 64;

/// `EBUSY`.
const BUSY: i32 = 16;

/// Schedules machines' threads until it is dropped.
pub struct Scheduler {
    machines: Mutex<HashMap<MapData, u32, Machine>>,
    host: Mutex<Array<MapData, Host>>,
    ended: Mutex<RingBuf<MapData>>,
    /// All maps: the timer of one ends where nobody has it open.
    maps: Maps,
    guaranteed: bool,
    _link: OwnedFd,
}

/// Why it can't be set to work.
#[derive(Debug, thiserror::Error)]
pub enum SchedulerError {
    /// It is not built in.
    #[error(
        "this kernel has no sched_ext: it takes Linux 6.12 or later with CONFIG_SCHED_CLASS_EXT and CONFIG_DEBUG_INFO_BTF"
    )]
    Absent,
    /// Something that it takes is not there.
    #[error("this kernel's sched_ext is of another kind: {0}")]
    Kind(String),
    /// There is one already, and there can be one alone.
    #[error("another sched_ext scheduler runs: end it first")]
    Busy,
    /// Not enough rights.
    #[error("the kernel does not let this process load a scheduler: run it as root")]
    Permission,
    /// The kernel does not take it.
    #[error("the kernel refused the scheduler: {what}: {source}")]
    Refused {
        /// What it did not take.
        what: &'static str,
        /// What it said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Whether this kernel has `sched_ext`, and tells of its types what it takes to use it.
#[must_use]
pub fn is_there() -> bool {
    fs::exists("/sys/kernel/sched_ext").unwrap_or(false) && fs::exists(BTF).unwrap_or(false)
}

// === impl Scheduler ===

impl Scheduler {
    /// Loads it and sets it to work, where machines have accounts in this ledger. Blocks, for some 100 ms.
    ///
    /// # Errors
    /// [`SchedulerError`] says what is missing. Nothing is left then.
    pub fn load(ledger: Option<&Ledger>) -> Result<Self, SchedulerError> {
        if !is_there() {
            return Err(SchedulerError::Absent);
        }
        let types = fs::read(BTF).map_err(|_| SchedulerError::Absent)?;
        let kernel = Kernel::new(&types).ok_or(SchedulerError::Absent)?;
        let own_types = system::load_types(&types::types()).map_err(refused("its types"))?;
        let maps = Maps::new(own_types.as_fd(), ledger)?;
        let programs = link::link(OBJECT, |name| maps.resolve(name).or_else(|| kernel.resolve(name)))?;

        let size = usize::try_from(kernel.value.size).unwrap_or(0);
        let mut value = vec![0_u8; size];
        let never_left = kernel.number(NEVER_LEFT);
        let mut loaded = Vec::new();
        for program in &programs {
            if program.name == RELEASE && never_left.is_some() {
                continue;
            }
            let lacks = || SchedulerError::Kind(format!("it has no {}", program.name));
            let member = kernel.function(program.name).ok_or_else(lacks)?;
            let descriptor = system::load(program, kernel.functions.id, member, own_types.as_fd())?;
            let number = u64::from(descriptor.as_raw_fd().cast_unsigned());
            put(&kernel, &mut value, program.name, &number.to_le_bytes())?;
            loaded.push(descriptor);
        }
        let flag = |name: &str| {
            let lacks = || SchedulerError::Kind(format!("it has no {name}"));
            kernel.number(name).ok_or_else(lacks)
        };
        let flags = flag("SCX_OPS_SWITCH_PARTIAL")? | flag("SCX_OPS_ENQ_LAST")? | never_left.unwrap_or(0);
        put(&kernel, &mut value, "flags", &flags.to_le_bytes())?;
        put(&kernel, &mut value, "name", NAME.as_bytes())?;

        let functions = system::make_functions(kernel.value.id, kernel.value.size, own_types.as_fd());
        let functions = functions.map_err(refused("its functions"))?;
        system::set_functions(functions.as_fd(), &value).map_err(refused("its functions"))?;
        let (machines, mut host, ended) = maps.open().map_err(refused("a map"))?;
        let of_host = Host {
            cpus: cpus()?,
            urgent_vcpus: 0,
        };
        host.set(0, of_host, 0).map_err(refused("the map HOST"))?;
        let link = system::link(functions.as_fd()).map_err(|error| match error.raw_os_error() {
            Some(BUSY) => SchedulerError::Busy,
            _ => refused("to start it")(error),
        })?;
        Ok(Self {
            machines: Mutex::new(machines),
            host: Mutex::new(host),
            ended: Mutex::new(ended),
            maps,
            guaranteed: kernel.guarantees(),
            _link: link,
        })
    }

    /// Has the threads of a process scheduled so, those that are in `SCHED_EXT`.
    ///
    /// # Errors
    /// Where there are too many.
    pub fn set(&self, process: u32, share: Share) -> io::Result<()> {
        let mut machines = lock(&self.machines);
        // What it has used so far goes on counting, but for what it uses at this very moment.
        let was = machines.get(&process, 0).unwrap_or_default();
        machines
            .insert(process, Machine { share, ..was }, 0)
            .map_err(io::Error::other)
    }

    /// Forgets a process, if it is known: its threads, if it has any still, run in their turn and are not charged.
    ///
    /// # Errors
    /// None that is known.
    pub fn remove(&self, process: u32) -> io::Result<()> {
        match lock(&self.machines).remove(&process) {
            Err(error) if errno(&error) != Some(ENOENT) => Err(io::Error::other(error)),
            _ => Ok(()),
        }
    }

    /// Says how many vCPUs all machines together have that may be urgent.
    ///
    /// # Errors
    /// None that is known.
    pub fn set_urgent_vcpus(&self, urgent_vcpus: u64) -> io::Result<()> {
        let mut host = lock(&self.host);
        let was = host.get(&0, 0).map_err(io::Error::other)?;
        host.set(0, Host { urgent_vcpus, ..was }, 0).map_err(io::Error::other)
    }

    /// Whether the kernel leaves its threads a part of each CPU, whatever those want that run before them: Linux 7.3 does, 6.12 not.
    #[must_use]
    pub fn is_guaranteed(&self) -> bool {
        self.guaranteed
    }

    /// Why the kernel has ended it, once it has.
    pub fn ended(&self) -> Option<String> {
        let mut ring = lock(&self.ended);
        let record = ring.next()?;
        let texts = record.get(size_of::<u64>()..size_of::<Ended>()).unwrap_or_default();
        let (reason, message) = texts.split_at_checked(REASON_BYTES).unwrap_or_default();
        let text = |bytes: &[u8]| {
            let bytes = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
            String::from_utf8_lossy(bytes).trim_end().to_owned()
        };
        Some(match (text(reason), text(message)) {
            (reason, message) if message.is_empty() => reason,
            (reason, message) => format!("{reason} ({message})"),
        })
    }
}

/// Is readable once it has ended.
impl AsFd for Scheduler {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.maps.ended()
    }
}

impl fmt::Debug for Scheduler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scheduler").finish_non_exhaustive()
    }
}

/// The host's CPUs, by the highest number of one: this process may be bound to fewer.
fn cpus() -> Result<u64, SchedulerError> {
    let online = online_cpus().map_err(refused("to say which CPUs there are"))?;
    Ok(online.into_iter().max().map_or(1, |last| u64::from(last) + 1))
}

/// Sets a member of what is handed over.
fn put(kernel: &Kernel<'_>, value: &mut [u8], member: &str, bytes: &[u8]) -> Result<(), SchedulerError> {
    let place = kernel.place(member);
    let place = place.and_then(|at| value.get_mut(at..)?.get_mut(..bytes.len()));
    let place = place.ok_or_else(|| SchedulerError::Kind(format!("it has no {member}")))?;
    place.copy_from_slice(bytes);
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is in them is whole at any moment.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// That the kernel did not take something.
fn refused<E>(what: &'static str) -> impl FnOnce(E) -> SchedulerError
where
    E: std::error::Error + Send + Sync + 'static,
{
    move |source| match errno(&source) {
        Some(EPERM) => SchedulerError::Permission,
        _ => SchedulerError::Refused {
            what,
            source: Box::new(source),
        },
    }
}

impl From<LinkError> for SchedulerError {
    fn from(error: LinkError) -> Self {
        Self::Kind(error.to_string())
    }
}

impl From<Refused> for SchedulerError {
    fn from(error: Refused) -> Self {
        refused("a program")(error)
    }
}
