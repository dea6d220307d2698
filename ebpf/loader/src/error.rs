//! What can go wrong, and what to do about it.

use std::io;
use std::path::{Path, PathBuf};

use aya::maps::MapError;
use aya::programs::ProgramError;
use aya::sys::SyscallError;

use crate::cgroup::CgroupId;

pub(crate) const EPERM: i32 = 1;
pub(crate) const ENOENT: i32 = 2;

/// Why the programs could not be set to work. Nothing stays loaded but what was pinned before.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Not enough rights.
    #[error(
        "the kernel does not let this process use eBPF: run it as root, or with CAP_BPF, CAP_PERFMON and CAP_SYS_ADMIN"
    )]
    Permission(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// There is no tracefs to look a tracepoint up in.
    #[error("tracefs is not mounted: `mount -t tracefs tracefs /sys/kernel/tracing`")]
    Tracefs,
    /// The kernel has no such tracepoint.
    #[error(
        "this kernel has no tracepoint {name}: it must be 6.1 or later with CONFIG_BPF_EVENTS, CONFIG_PERF_EVENTS and \
         CONFIG_FTRACE"
    )]
    NoTracepoint {
        /// `group:event`
        name: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A tracepoint's record is not laid out as known.
    #[error("tracepoint {name} of this kernel has no field {field} of {size} bytes; please report its `format` file")]
    Format {
        /// `group:event`
        name: &'static str,
        /// The missing field.
        field: &'static str,
        /// Its size in bytes.
        size: u32,
    },
    /// A map or a program was refused in another way.
    #[error("the kernel refused the eBPF object; it must be 6.1 or later with CONFIG_BPF_SYSCALL and CONFIG_CGROUPS")]
    Object(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A program was loaded but could not be attached.
    #[error("attaching to tracepoint {name}; the kernel must be 6.1 or later with CONFIG_BPF_EVENTS")]
    Attach {
        /// `group:event`
        name: &'static str,
        /// What the kernel said.
        source: Box<ProgramError>,
    },
    /// The first round over all CPUs failed.
    #[error("starting to count")]
    Start(#[source] LedgerError),
    /// The folder for pins can't be used.
    #[error(transparent)]
    Pins(#[from] PinsError),
    /// What programs of another version or with other limits counted could not be taken over; they go on.
    #[error("going on with what earlier programs counted")]
    Carry(#[source] LedgerError),
    /// The embedded object lacks a part: a fault of the build.
    #[error("the embedded eBPF object has no `{0}`; build again from clean")]
    Part(&'static str),
}

/// What is wrong with the folder in which programs and maps are to be pinned.
#[derive(Debug, thiserror::Error)]
pub enum PinsError {
    /// It is not on a BPF file system.
    #[error("{0} is not on a BPF file system: mount one, as with `mount -t bpf bpf /sys/fs/bpf`")]
    NoBpffs(PathBuf),
    /// It is another user's, who could put other things there.
    #[error("{0} is not a folder of this user's: remove it, or choose another")]
    Foreign(PathBuf),
    /// Another process, or another ledger of this one, counts with it.
    #[error(
        "another process, most likely a stokerd of the same host id, counts with what is pinned in {0}: end it first"
    )]
    InUse(PathBuf),
    /// The kernel refused something.
    #[error("{doing} {path}; it must be on a BPF file system that this user may write to")]
    Failed {
        /// "pinning" and the like.
        doing: &'static str,
        /// The folder, or what is in it.
        path: PathBuf,
        /// What the kernel said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Why a ledger could not do what was asked. It goes on counting.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The root cgroup holds all that is in no other: nobody's use.
    #[error("{0} is the root cgroup or none: it can't be counted")]
    Root(CgroupId),
    /// The cgroup already counts towards a subject.
    #[error("{0} is counted already")]
    Known(CgroupId),
    /// No such subject.
    #[error("{0} is not counted")]
    Unknown(CgroupId),
    /// The ledger holds as many subjects as it was loaded for.
    #[error("all {subjects} places of the ledger are taken; load it with larger limits")]
    Full {
        /// How many it holds.
        subjects: u32,
    },
    /// A map could not be read or written.
    #[error("{doing} eBPF map {map}")]
    Map {
        /// "reading" or "writing".
        doing: &'static str,
        /// The map.
        map: &'static str,
        /// What the kernel said.
        source: MapError,
    },
    /// The CPUs that are online could not be listed.
    #[error("listing online CPUs in {path}")]
    Cpus {
        /// The file of sysfs that lists them.
        path: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The time could not be read.
    #[error("reading the monotonic clock")]
    Clock(#[source] nix::Error),
    /// It could not be found out whose the thread is that runs on a CPU.
    #[error("looking up whose the thread is that runs on CPU {cpu}")]
    Settle {
        /// The CPU.
        cpu: u32,
        /// What the kernel said.
        source: Box<ProgramError>,
    },
    /// The use of a process or a subject could not be taken over from earlier programs.
    #[error("taking over what earlier programs counted")]
    Adopt(#[source] Box<ProgramError>),
    /// The subject has no account.
    #[error("{0} has no account of credits")]
    NoAccount(CgroupId),
    /// The ledger was loaded for containers, which have no accounts.
    #[error("this ledger keeps no accounts; load it for machines (`Limits::machines`)")]
    NoAccounts,
    /// The ledger was loaded for machines, or opened, where nobody may be there to hear of alarms.
    #[error("this ledger has no alarms; load it for containers (`Limits::GUEST`), without pins")]
    NoAlarms,
    /// An account was in use at every moment that it was tried to change or read it.
    #[error("the account of {0} was busy for too long; try again")]
    Busy(CgroupId),
    /// An account could not be changed.
    #[error("changing an account of credits")]
    Account(#[source] Box<ProgramError>),
    /// There is nothing in the kernel to poll for crossings.
    #[error("opening what tells of accounts that change their level")]
    Crossings(#[source] io::Error),
    /// The kernel's statistics on programs could not be had.
    #[error("measuring the programs' cost; that needs CAP_SYS_ADMIN")]
    Cost(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl PinsError {
    pub(crate) fn failed(doing: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Failed {
            doing,
            path: path.to_owned(),
            source: source.into(),
        }
    }
}

/// A map could not be read.
pub(crate) fn reading(map: &'static str) -> impl Fn(MapError) -> LedgerError {
    move |source| LedgerError::Map {
        doing: "reading",
        map,
        source,
    }
}

/// A map could not be written.
pub(crate) fn writing(map: &'static str) -> impl Fn(MapError) -> LedgerError {
    move |source| LedgerError::Map {
        doing: "writing",
        map,
        source,
    }
}

/// The number of the system call's error at the bottom of an aya error, if there is one.
pub(crate) fn errno(error: &(dyn std::error::Error + 'static)) -> Option<i32> {
    let mut next = Some(error);
    while let Some(error) = next {
        // aya's transparent variants skip themselves in the chain of sources: look into them first.
        let inner = if let Some(error) = error.downcast_ref::<io::Error>() {
            error.raw_os_error()
        } else if let Some(error) = error.downcast_ref::<SyscallError>() {
            error.io_error.raw_os_error()
        } else {
            match error.downcast_ref::<ProgramError>() {
                Some(ProgramError::LoadError { io_error, .. }) => io_error.raw_os_error(),
                Some(ProgramError::SyscallError(error)) => error.io_error.raw_os_error(),
                _ => None,
            }
        };
        if inner.is_some() {
            return inner;
        }
        next = error.source();
    }
    None
}
