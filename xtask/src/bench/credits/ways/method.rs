//! The ways in which Linux can be told who runs first.

use std::time::Duration;

use stoker_linux::sched::Policy;

/// One way, or several together.
#[derive(Debug, Clone, Copy)]
pub(super) struct Method {
    pub(super) name: &'static str,
    /// For the threads of the machine that wakes up.
    pub(super) quiet: Option<Policy>,
    /// For its cgroup.
    pub(super) quiet_files: &'static [(&'static str, &'static str)],
    /// For the threads of those that compute.
    pub(super) hogs: Option<Policy>,
    /// For their cgroups.
    pub(super) hog_files: &'static [(&'static str, &'static str)],
    /// For the cgroup of their vCPUs, in it.
    pub(super) hog_limit: &'static [(&'static str, &'static str)],
    /// The first of those that compute is scheduled as the one that wakes up, as one that has credits too.
    pub(super) first_hog_too: bool,
    /// All of them are scheduled by a scheduler of ours (`sched_ext`), the one that wakes up as of the class high, and those that
    /// compute as exhausted ones with this baseline, in thousandths of a CPU; where it is 0, as normal ones.
    pub(super) sched_ext: Option<u32>,
    /// The kernel preempts whatever runs at once, rather than at its next tick.
    pub(super) full_preemption: bool,
}

const fn fair(nice: i32, slice_us: u64) -> Option<Policy> {
    let slice = match slice_us {
        0 => None,
        us => Some(Duration::from_micros(us)),
    };
    Some(Policy::Fair { nice, slice })
}

const RR: Option<Policy> = Some(Policy::RoundRobin { priority: 1 });
const WEIGHT: &[(&str, &str)] = &[("cpu.weight", "10000")];
const IDLE: &[(&str, &str)] = &[("cpu.idle", "1")];
/// Eight of them leave a fifth of two CPUs.
const MAX: &[(&str, &str)] = &[("cpu.max", "10000 50000")];
const BURST: &[(&str, &str)] = &[("cpu.max", "10000 50000"), ("cpu.max.burst", "10000")];
const DEADLINE: Option<Policy> = Some(Policy::Deadline {
    runtime: Duration::from_millis(2),
    period: Duration::from_millis(20),
});

/// As the kernel does it for all.
pub(super) const DEFAULT: Method = Method {
    name: "kernel's default",
    quiet: None,
    quiet_files: &[],
    hogs: None,
    hog_files: &[],
    hog_limit: &[],
    first_hog_too: false,
    sched_ext: None,
    full_preemption: false,
};

const fn named(name: &'static str) -> Method {
    Method { name, ..DEFAULT }
}

/// All that are measured, in this order.
pub(super) const METHODS: &[Method] = &[
    DEFAULT,
    Method {
        full_preemption: true,
        ..named("kernel's default, preempt=full")
    },
    Method {
        quiet_files: WEIGHT,
        ..named("cpu.weight 10000")
    },
    Method {
        hog_files: IDLE,
        ..named("cpu.idle for the hogs")
    },
    Method {
        hog_files: IDLE,
        full_preemption: true,
        ..named("cpu.idle for the hogs, preempt=full")
    },
    Method {
        hog_limit: MAX,
        ..named("cpu.max 20% for the hogs")
    },
    Method {
        hog_limit: BURST,
        ..named("cpu.max 20% with burst for the hogs")
    },
    Method {
        quiet: fair(0, 100),
        ..named("slice 0.1 ms")
    },
    Method {
        quiet: fair(0, 100),
        hogs: fair(0, 10_000),
        ..named("slice 0.1 ms, hogs 10 ms")
    },
    Method {
        quiet: fair(-20, 0),
        ..named("nice -20")
    },
    Method {
        quiet: fair(-20, 100),
        quiet_files: WEIGHT,
        ..named("slice 0.1 ms, cpu.weight 10000, nice -20")
    },
    Method {
        quiet: fair(-20, 100),
        quiet_files: WEIGHT,
        full_preemption: true,
        ..named("slice 0.1 ms, cpu.weight 10000, nice -20, preempt=full")
    },
    Method {
        hogs: Some(Policy::Idle),
        ..named("SCHED_IDLE for the hogs")
    },
    Method {
        quiet: Some(Policy::Fifo { priority: 1 }),
        ..named("SCHED_FIFO")
    },
    Method {
        quiet: RR,
        ..named("SCHED_RR")
    },
    Method {
        quiet: RR,
        hog_limit: BURST,
        ..named("SCHED_RR, cpu.max 20% with burst for the hogs")
    },
    Method {
        quiet: RR,
        first_hog_too: true,
        ..named("SCHED_RR for it and for one hog, without a bound")
    },
    Method {
        quiet: DEADLINE,
        ..named("SCHED_DEADLINE, 2 ms in 20")
    },
    Method {
        quiet: DEADLINE,
        first_hog_too: true,
        ..named("SCHED_DEADLINE for it and for one hog, 2 ms in 20")
    },
    Method {
        sched_ext: Some(0),
        ..named("sched_ext")
    },
    Method {
        sched_ext: Some(200),
        ..named("sched_ext, 20% for the hogs")
    },
    Method {
        sched_ext: Some(0),
        first_hog_too: true,
        ..named("sched_ext for it and for one hog")
    },
];

// === impl Method ===

impl Method {
    /// Whether it takes cgroups with a CPU controller.
    pub(super) fn takes_cgroups(&self) -> bool {
        !(self.quiet_files.is_empty() && self.hog_files.is_empty() && self.hog_limit.is_empty())
    }
}
