#![no_std]
//! Plain types that the eBPF programs share with user space: the keys and values of their maps.
//!
//! A *subject* is what is accounted for: a machine on the host, a container in the guest. It has one slot, an index
//! into the arrays of what is kept of it; one or more cgroups lead to it, each to one of its parts.

mod account;
mod alarm;
mod allowance;
mod guest;
mod kernel;
pub mod scheduler;
mod threads;

pub use account::{AccountEntry, Change, Crossed, Near, Operation, Outcome, SETTLE_AFTER_NS, is_near, settle_after};
pub use alarm::{Alarm, Rang};
pub use allowance::Allowance;
pub use guest::{EXIT_CODES, EXITS, Exit, Guest, exit_index};
pub use kernel::{KvmExitFields, RssStatFields, Settings, ThrottleFields, WaitFields};
pub use threads::{NO_PLACE, Stamp, Thread, WAYS, home_of, is_throttled, is_woken, requeued, throttled, woken};

/// Which meaning the types here have. A later version of the programs goes on with the sums of an earlier one only where
/// this is the same: raise its first part with each change of a type that is in a map. The second is that of the accounts.
pub const LAYOUT: u32 = 3 << 8 | stoker_credits::LAYOUT;

/// How many parts the times of a subject are kept by.
pub const PARTS: u32 = 3;

/// What a subject's threads are told apart by.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// Those in the subject's own cgroup: of a container all.
    Own = 0,
    /// The threads that run a machine's vCPUs.
    Vcpus = 1,
    /// The other threads of its VMM.
    Vmm = 2,
}

impl Part {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; PARTS as usize] = [Self::Own, Self::Vcpus, Self::Vmm];
}

/// What `CGROUPS` holds for a cgroup id: whom to charge.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Subject {
    /// Index of its times: see [`Subject::place_of`].
    pub place: u32,
    /// Which of the subjects that had this slot one after the other; from 1.
    pub generation: u32,
    /// The key once more. The kernel may reuse an element of a hash map while a program still looks at it; a program
    /// that finds another cgroup's id here leaves it alone.
    pub cgroup: u64,
}

impl Subject {
    /// No cgroup has the id 0.
    pub const NOBODY: Self = Self {
        place: 0,
        generation: 0,
        cgroup: 0,
    };

    /// Where the times of a part are.
    #[inline(always)]
    pub const fn place_of(slot: u32, part: Part) -> u32 {
        slot.wrapping_mul(PARTS).wrapping_add(part as u32)
    }

    /// Index of what is kept of the subject as a whole.
    #[inline(always)]
    pub const fn slot(&self) -> u32 {
        self.place / PARTS
    }
}

/// What `OWNERS` holds for a slot. The programs do not look at it: user space keeps it in the kernel for the process that
/// goes on with the maps after it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// Who has the slot, named by its own cgroup; where that is 0 nobody has.
    pub cgroup: u64,
    /// The generation of who has it, or of the last who had; 0 where nobody did.
    pub generation: u64,
    /// The most CPU time in ns that was told of it before it was in its sums.
    pub told_ns: u64,
}

/// What one part of a subject used of CPUs, in ns. All of it only grows while the slot has the same owner. It fills a line of the
/// processors' caches.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// The generation of the slot's owner: see [`Subject::generation`]; 0 where it has none.
    pub generation: u64,
    /// Time that its threads ran.
    pub cpu_ns: u64,
    /// Time that its threads were runnable and did not run.
    pub wait_ns: u64,
    /// Of that, the time that they could not run since their cgroup's limit was used up.
    pub throttled_ns: u64,
    /// When its threads were held back last, in ns of `CLOCK_MONOTONIC`; 0 where they never were.
    pub held_ns: u64,
    /// When one of them ran again; 0 where none has since.
    pub released_ns: u64,
    /// To fill the line.
    pub unused: [u64; 2],
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
    /// Since when it waited before it came, yet to be charged; 0 where it did not, or that is done.
    pub waits: Stamp,
    /// Whom it is charged to; all zero where that is nobody, or not looked up yet.
    pub subject: Subject,
    /// The address of its `task_struct`; 0 before the first event on this CPU.
    pub thread: u64,
    /// The address of this CPU's idle thread; 0 until it was seen.
    pub idle: u64,
    /// When it entered its guest, in ns of `CLOCK_MONOTONIC`; 0 where it is not in one.
    pub guest_ns: u64,
    /// Slot of the subject that it took its CPU from, whose thread could have run on.
    pub lost_slot: u32,
    /// The generation of that subject, until it is counted that it lost its CPU; 0 where there is nothing to count.
    pub lost_generation: u32,
    /// Index of what is kept of it in `THREADS`; [`NO_PLACE`] where nothing is, or that was not looked up yet.
    pub place: u32,
    /// Whether it was charged, or found to be nobody's, since it came.
    pub is_charged: u8,
    /// Whether what it ran before `since_ns` is nobody's, though it is not charged yet.
    pub is_settled: u8,
    /// To fill the word.
    pub unused: [u8; 2],
}

impl Running {
    /// Whether the CPU's idle thread runs.
    pub const fn is_idle(&self) -> bool {
        self.idle != 0 && self.thread == self.idle
    }
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

/// The key of `PREEMPTIONS`: who lost a CPU to whom.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Preemption {
    /// The slot of the subject whose thread was ready to run on.
    pub slot: u32,
    /// Its generation.
    pub generation: u32,
    /// The slot of the subject whose thread came in its place.
    pub by_slot: u32,
    /// Its generation; 0 where that was no subject's thread.
    pub by_generation: u32,
}

/// What could not be counted since there was no room.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    /// Times a thread found no room: one of its waits went uncounted.
    pub tasks: u64,
    /// Times another CPU charged a thread of which was not known whose it is, and there was no room to keep that: so much of its
    /// CPU time went uncounted.
    pub charges: u64,
    /// Times an address space found no room in `PROCESSES`: its memory went uncounted.
    pub processes: u64,
    /// Times an account went to another level and there was no room to tell: the account itself is right.
    pub crossings: u64,
}

#[cfg(feature = "user")]
mod user {
    use super::{
        AccountEntry, Alarm, Change, Guest, KvmExitFields, Lost, Owner, Preemption, Process, Resident, RssStatFields,
        Running, Settings, Subject, Thread, ThrottleFields, Times, WaitFields, scheduler,
    };

    macro_rules! pod {
        ($($of:ty),*) => {
            // SAFETY: `repr(C)`, made of integers without padding between or after them, so that every pattern of
            // bytes is a value and every byte is initialised.
            $(unsafe impl aya::Pod for $of {})*
        };
    }

    pod!(
        Alarm,
        Change,
        Guest,
        KvmExitFields,
        AccountEntry,
        Lost,
        Owner,
        Preemption,
        Process,
        Resident,
        RssStatFields,
        Running,
        Settings,
        Subject,
        Thread,
        ThrottleFields,
        scheduler::Host,
        scheduler::Machine,
        Times,
        WaitFields
    );
}
