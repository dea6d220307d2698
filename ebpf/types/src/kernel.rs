//! What the loader finds out about the kernel, and tells the programs before they are loaded.

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

/// The same of `kvm:kvm_exit`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct KvmExitFields {
    /// `unsigned int exit_reason`.
    pub reason: u32,
    /// `u32 isa`: whose numbers the reasons are.
    pub isa: u32,
}

/// Where the kernel keeps whether a thread's cgroup has used its limit up, in bytes; found in the kernel's type information. All 0
/// where that is not there.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ThrottleFields {
    /// `struct cfs_rq *` in `task_struct`: where the thread is queued.
    pub cfs_rq: u32,
    /// `int throttle_count` in `cfs_rq`: not 0 where it, or what it is part of, is held back.
    pub throttle_count: u32,
}

/// Where the kernel keeps what it counts of a thread's waiting (`sched_info`), in bytes from the start of its `task_struct`; found
/// likewise. All 0 where that is not there.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct WaitFields {
    /// `unsigned long long run_delay`: how long it has waited in all, in ns, up to when it came to a CPU last.
    pub run_delay: u32,
    /// `unsigned long pcount`: how often it has come to one.
    pub pcount: u32,
}

/// What the programs are to do.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Settings {
    /// How many sets `THREADS` has: a power of two.
    pub sets: u32,
    /// Whether subjects are machines, which have accounts, and of which is kept who takes CPUs from whom; 1 or 0.
    pub machines: u32,
    /// For how long the kernel lets a thread run on without charging it, in ns, where that is so long that who is about to fall to
    /// another level is told of; else 0.
    pub uncharged_ns: u32,
    /// How waits are told apart.
    pub throttle: ThrottleFields,
    /// How waits are counted: where this is known, by the kernel, and else from each wake-up on.
    pub waits: WaitFields,
}
