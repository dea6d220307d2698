//! Whose a thread is, what its machine may still use, and what it has used.

use core::intrinsics::{
    AtomicOrdering::{AcqRel, Relaxed},
    atomic_cxchg, atomic_xadd,
};

use aya_ebpf::helpers::generated::bpf_map_lookup_elem;
use stoker_ebpf_types::{
    AccountEntry,
    scheduler::{Host, Machine, Progress, Runs, SLICE_NS, Share, period_at},
};

use crate::{
    field32,
    kernel::{Task, map, number},
};

/// What the kernel calls nice 0 (`DEFAULT_PRIO`): threads of vCPUs have it, those of devices another.
const NICE_0: u32 = 120;

/// How long what was earned is left lying before it is added: each time costs an atomic operation.
const EARN_AFTER_NS: u64 = 1_000_000;

/// When a thread runs.
#[derive(Clone, Copy)]
pub enum Turn {
    /// At once.
    Urgent,
    /// When its machine has run least, for so many ns.
    Ordinary { vtime: u64, slice: u64 },
    /// Not before that.
    Later { at: u64 },
}

// === impl Turn ===

impl Turn {
    /// For how many ns, if it may run now.
    #[inline(always)]
    pub fn slice(self) -> Option<u64> {
        match self {
            Self::Urgent => Some(SLICE_NS),
            Self::Ordinary { slice, .. } => Some(slice),
            Self::Later { .. } => None,
        }
    }
}

/// When a thread runs. Its machine can be that far behind others.
///
/// # Safety
/// It is one of the kernel's.
#[inline(always)]
pub unsafe fn turn(task: Task, now: u64, lag: u64) -> Turn {
    // SAFETY: elements of maps live as long as the program runs; others change them at any time by atomic operations.
    unsafe {
        let Some(machine) = machine_of(task) else {
            return Turn::Ordinary {
                vtime: reached(),
                slice: SLICE_NS,
            };
        };
        let machine = &mut *machine;
        let share = share_of(machine);
        let mut slice = SLICE_NS;
        if share.is_limited() && field32(task, number!(TASK_STATIC_PRIO)) == NICE_0 {
            let left = left(machine, &share, now);
            if left <= 0 {
                let at = share.resumes_at(now, left);
                return Turn::Later { at };
            }
            slice = share.slice(left);
        }
        if share.high != 0 && urgent(machine, now) > 0 {
            return Turn::Urgent;
        }
        let least = reached().saturating_sub(lag);
        let vtime = (&raw const machine.vtime).read_volatile();
        if (vtime.wrapping_sub(least) as i64) < 0 {
            atomic_cxchg::<u64, { AcqRel }, { Relaxed }>(&raw mut machine.vtime, vtime, least);
            return Turn::Ordinary { vtime: least, slice };
        }
        Turn::Ordinary { vtime, slice }
    }
}

/// A thread has run for so many ns, ahead of others or not. What it ran ahead of them is no part of its machine's share: one that was
/// urgent for long would else, once it is not, wait until all others had run as much.
///
/// # Safety
/// It is one of the kernel's.
#[inline(always)]
pub unsafe fn spend(task: Task, used: u64, was_urgent: bool) {
    // SAFETY: elements of maps live as long as the program runs; others change them at any time by atomic operations.
    unsafe {
        let Some(machine) = machine_of(task) else { return };
        let machine = &mut *machine;
        let share = share_of(machine);
        let used_up = (used as i64).wrapping_neg();
        if !was_urgent {
            atomic_xadd::<u64, u64, { Relaxed }>(&raw mut machine.vtime, share.weighed(used));
        }
        if share.high != 0 {
            atomic_xadd::<i64, i64, { Relaxed }>(&raw mut machine.urgent_ns, used_up);
        }
        if share.is_limited() && field32(task, number!(TASK_STATIC_PRIO)) == NICE_0 {
            atomic_xadd::<i64, i64, { Relaxed }>(&raw mut machine.left_ns, used_up);
        }
    }
}

/// What a machine's vCPUs may still use in this period.
#[inline(always)]
unsafe fn left(machine: &mut Machine, share: &Share, now: u64) -> i64 {
    // SAFETY: as its callers'.
    unsafe {
        let left = (&raw const machine.left_ns).read_volatile();
        let (period, of) = (period_at(now), (&raw const machine.period).read_volatile());
        // One CPU adds what a new period brings.
        if period <= of || !atomic_cxchg::<u64, { AcqRel }, { Relaxed }>(&raw mut machine.period, of, period).1 {
            return left;
        }
        let after = share.left_after(left, period - of);
        atomic_xadd::<i64, i64, { Relaxed }>(&raw mut machine.left_ns, after - left);
        after
    }
}

/// What a machine may still use ahead of others.
#[inline(always)]
unsafe fn urgent(machine: &mut Machine, now: u64) -> i64 {
    // SAFETY: as its callers'.
    unsafe {
        let left = (&raw const machine.urgent_ns).read_volatile();
        let at = (&raw const machine.urgent_at).read_volatile();
        let elapsed = now.saturating_sub(at);
        let Some(host) = host() else { return left };
        if elapsed < EARN_AFTER_NS
            || !atomic_cxchg::<u64, { AcqRel }, { Relaxed }>(&raw mut machine.urgent_at, at, now).1
        {
            return left;
        }
        let after = machine.share.urgent_after(left, elapsed, &*host);
        atomic_xadd::<i64, i64, { Relaxed }>(&raw mut machine.urgent_ns, after - left);
        after
    }
}

/// How a machine is to be scheduled at this moment.
///
/// # Safety
/// It is an element of `MACHINES`.
#[inline(always)]
unsafe fn share_of(machine: &Machine) -> Share {
    let share = machine.share;
    if share.generation == 0 {
        return share;
    }
    // SAFETY: elements of an array live as long as the map. The ledger's programs change them at any time, and each word is whole.
    unsafe {
        match element::<AccountEntry>(map!(ACCOUNTS), share.slot) {
            Some(entry) => share.narrowed(&*entry),
            None => share,
        }
    }
}

/// The machine that a thread is of, if it is of one.
#[inline(always)]
pub unsafe fn machine_of(task: Task) -> Option<*mut Machine> {
    // SAFETY: the key is read for the length of the call.
    unsafe {
        let process = field32(task, number!(TASK_TGID));
        element(map!(MACHINES), process)
    }
}

/// What user space says of the host.
#[inline(always)]
pub fn host() -> Option<*mut Host> {
    // SAFETY: such is the map's element.
    unsafe { element(map!(HOST), 0) }
}

/// How far all are.
#[inline(always)]
pub fn progress() -> Option<*mut Progress> {
    // SAFETY: such is the map's element.
    unsafe { element(map!(PROGRESS), 0) }
}

/// What a CPU runs.
#[inline(always)]
pub fn runs(cpu: i32) -> Option<*mut Runs> {
    // SAFETY: such are the map's elements.
    unsafe { element(map!(RUNS), cpu as u32) }
}

/// What the machine that ran last had run.
#[inline(always)]
fn reached() -> u64 {
    // SAFETY: elements of arrays live as long as the maps.
    progress().map_or(0, |progress| unsafe { (&raw const (*progress).vtime).read_volatile() })
}

#[inline(always)]
unsafe fn element<T>(map: *mut core::ffi::c_void, key: u32) -> Option<*mut T> {
    // SAFETY: the key is read for the length of the call.
    let element = unsafe { bpf_map_lookup_elem(map, (&raw const key).cast()) };
    (!element.is_null()).then_some(element.cast())
}

/// A member of 64 bits of one of the kernel's structures, which lies there.
#[inline(always)]
pub unsafe fn field(of: Task, at: u64) -> u64 {
    // SAFETY: the loader told where it lies.
    unsafe { of.byte_add(at as usize).cast::<u64>().read_volatile() }
}
