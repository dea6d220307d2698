#![no_std]
//! Plain types that the eBPF programs share with user space: the keys and values of their maps.
//!
//! A *subject* is what is accounted for: a machine on the host, a container in the guest. It has one slot, an index
//! into the arrays of sums; one or more cgroups lead to it.

/// Which meaning the types here have. A later version of the programs goes on with the sums of an earlier one only where
/// this is the same: raise it with each change of a type that is in a map.
pub const LAYOUT: u32 = 1;

/// What `CGROUPS` holds for a cgroup id: the subject to charge.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Subject {
    /// Index of the subject's sums.
    pub slot: u32,
    /// Which of the subjects that had this slot one after the other; from 1.
    pub generation: u32,
    /// The key once more. The kernel may reuse an element of a hash map while a program still looks at it; a program
    /// that finds another cgroup's id here leaves it alone.
    pub cgroup: u64,
}

/// What `OWNERS` holds for a slot. The programs do not look at it: user space keeps it in the kernel for the process that
/// goes on with the maps after it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// Who has the slot, named by its own cgroup; where the cgroup is 0 nobody has, and the generation is that of the last
    /// who had, 0 where nobody did.
    pub subject: Subject,
    /// The most CPU time in ns that was told of it before it was in its sums.
    pub told_ns: u64,
    /// CPU time in ns that earlier programs counted, which is not in its sums.
    pub earlier_cpu_ns: u64,
    /// The same of its waiting, in ns.
    pub earlier_wait_ns: u64,
}

/// CPU times of one subject on one CPU, in ns. They only grow while the slot has the same owner.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// Time that its threads ran.
    pub cpu_ns: u64,
    /// Time that its threads were runnable and waited for a CPU.
    pub wait_ns: u64,
    /// The generation of the slot's owner: see [`Subject::generation`]; 0 where it has none.
    pub generation: u64,
}

/// Resident memory of one subject.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resident {
    /// File, anonymous and shared memory mapped by its processes, in bytes.
    pub bytes: i64,
    /// The highest that `bytes` has been.
    pub peak_bytes: i64,
    /// The generation of the slot's owner: see [`Subject::generation`].
    pub generation: u64,
}

/// The thread that is on a CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Running {
    /// When it came, or was charged last by this CPU, in ns of `CLOCK_MONOTONIC`; 0 before the first event on this CPU.
    pub since_ns: u64,
    /// How long it waited before it ran, yet to be charged.
    pub wait_ns: u64,
    /// 1 where it has an entry in `TASKS`, else 0.
    pub known: u32,
    /// 1 where what it ran before `since_ns` is nobody's, though it is not charged yet; else 0.
    pub settled: u32,
    /// The subject in that entry: whom the thread is charged to; all zero where that is nobody, or not known.
    pub subject: Subject,
    /// The address of its `task_struct`; 0 before the first event on this CPU.
    pub thread: u64,
    /// The address of this CPU's idle thread; 0 until it was seen.
    pub idle: u64,
}

impl Running {
    /// Whether the CPU's idle thread runs.
    pub const fn is_idle(&self) -> bool {
        self.idle != 0 && self.thread == self.idle
    }
}

/// What `TASKS` holds for a thread.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Task {
    /// Since when it waits for a CPU. While it runs: when another CPU charged it last, 0 where none did since it came.
    pub waits: Stamp,
    /// Whom it is charged to; nobody where it is new.
    pub subject: Subject,
}

/// Since when a thread waits for a CPU: ns of `CLOCK_MONOTONIC` but for the lowest bit, which tells why; 0 where it
/// runs, and nothing in particular where it sleeps.
pub type Stamp = u64;

const REQUEUED: Stamp = 1;

/// It waits since it was woken up.
pub const fn woken(at_ns: u64) -> Stamp {
    at_ns & !REQUEUED
}

/// It waits since it lost its CPU to another.
pub const fn requeued(at_ns: u64) -> Stamp {
    at_ns | REQUEUED
}

/// Whether a stamp came from a wake-up.
pub const fn is_woken(stamp: Stamp) -> bool {
    stamp & REQUEUED == 0
}

/// How many kinds of resident memory there are: file, anonymous and shared pages.
pub const KINDS: usize = 3;

/// What `PROCESSES` holds for an address space.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Process {
    /// [`Subject::slot`] of the subject that it counts towards.
    pub slot: u32,
    /// [`Subject::generation`].
    pub generation: u32,
    /// Bytes by kind that are part of the subject's sum.
    pub bytes: [i64; KINDS],
}

/// What could not be counted since a map was full.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    /// Times a thread found no room in `TASKS`: one of its waits went uncounted.
    pub tasks: u64,
    /// Times an address space found no room in `PROCESSES`: its memory went uncounted.
    pub processes: u64,
}

/// Where the tracepoint `kmem:rss_stat` has its fields, in bytes from the start of its record; found in tracefs at
/// load. The default is what kernels 6.1 to 6.18 have.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RssStatFields {
    /// `unsigned int mm_id`: a hash of the address space's address.
    pub mm_id: u32,
    /// `unsigned int curr`: not 0 where it is the current thread's own.
    pub curr: u32,
    /// `int member`: 0 file, 1 anonymous, 2 swap entries, 3 shared.
    pub member: u32,
    /// `long size`: bytes now.
    pub size: u32,
}

impl Default for RssStatFields {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl RssStatFields {
    /// What kernels 6.1 to 6.18 have.
    pub const DEFAULT: Self = Self {
        mm_id: 8,
        curr: 12,
        member: 16,
        size: 24,
    };
}

#[cfg(feature = "user")]
mod user {
    use super::{Lost, Owner, Process, Resident, RssStatFields, Running, Subject, Task, Times};

    macro_rules! pod {
        ($($of:ty),*) => {
            // SAFETY: `repr(C)`, made of integers without padding between or after them, so that every pattern of
            // bytes is a value and every byte is initialised.
            $(unsafe impl aya::Pod for $of {})*
        };
    }

    pod!(
        Subject,
        Lost,
        Owner,
        Process,
        Resident,
        RssStatFields,
        Running,
        Task,
        Times
    );
}
