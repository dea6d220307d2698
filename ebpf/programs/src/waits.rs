//! How long threads wait for a CPU.
//!
//! The kernel counts it itself, for each thread, in `sched_info` of its `task_struct` (`CONFIG_SCHED_INFO`): what that has grown by
//! since a thread was charged last is how long it waited before it came. The loader looks the layout up in the kernel's type
//! information. A wake-up is of interest then only where the woken thread may not run, since its cgroup's limit is used up.
//!
//! Elsewhere it is noted when a thread is woken and when it loses its CPU, and `sched_switch` says when it comes to one.

use core::intrinsics::{AtomicOrdering::Relaxed, atomic_xadd};

use aya_ebpf::{
    EbpfContext as _,
    helpers::bpf_probe_read_kernel,
    helpers::generated::bpf_get_current_task_btf,
    macros::{btf_tracepoint, raw_tracepoint},
    programs::{BtfTracePointContext, RawTracePointContext},
};
use stoker_ebpf_types::{Running, Stamp, Subject, Thread, Times, is_throttled, is_woken, requeued, throttled, woken};

use crate::cpu::{generation, now};
use crate::maps::{TIMES, lost, wait_fields};
use crate::{threads, throttle};

/// What it takes at most, in ns, from a wake-up to the switch that it causes; a thread that comes later was kept
/// waiting.
const LONGEST_PREEMPTION_NS: u64 = 100_000;

/// The same where the CPU was idle, and perhaps asleep. Well below the time that throttling keeps a thread waiting.
const LONGEST_IDLE_EXIT_NS: u64 = 1_000_000;

/// A wait that ended when its thread came to a CPU.
#[derive(Clone, Copy)]
pub struct Wait {
    ns: u64,
    /// Whether the thread's cgroup had used its limit up when it began.
    was_held: bool,
}

impl Wait {
    pub const NONE: Self = Self { ns: 0, was_held: false };

    /// Nothing was kept of the thread. No `Option`, whose content would be undefined then: the verifier refuses to have that moved.
    const UNKNOWN: Self = Self {
        ns: u64::MAX,
        was_held: false,
    };

    /// This, or what is known of the current thread where nothing was kept of it.
    #[inline(always)]
    pub fn or_first(self) -> Self {
        if self.ns != Self::UNKNOWN.ns {
            return self;
        }
        let is_new = read(wait_fields().pcount) == 1;
        Self {
            ns: if is_new { run_delay() } else { 0 },
            was_held: false,
        }
    }
}

/// A thread that slept is runnable. Not needed where the kernel counts waits.
#[raw_tracepoint(tracepoint = "sched_wakeup")]
pub fn sched_wakeup(event: RawTracePointContext) -> i32 {
    let thread = event.arg::<u64>(0);
    // The lock of its run queue is held, save where a thread wakes itself on its own CPU.
    if let Some(kept) = threads::find(thread)
        // One that lost its CPU on its way to sleep has waited since then. What this leaves on one that runs is put right
        // when that leaves its CPU, or wakes up.
        && is_woken(kept.waits)
    {
        kept.waits = woken(now());
    }
    0
}

/// The same where the kernel counts waits: it is seen whether the thread may not run, since its cgroup's limit is used up.
#[btf_tracepoint(function = "sched_wakeup")]
pub fn sched_wakeup_held(event: BtfTracePointContext) -> i32 {
    if !throttle::is_held(|| event.arg(0)) {
        return 0;
    }
    // The pointer as a number, which the verifier does not let be made of it.
    // SAFETY: the helper reads kernel memory safely wherever it is.
    let thread = unsafe { bpf_probe_read_kernel(event.as_ptr() as *const u64) };
    if let Ok(thread) = thread
        && let Some(kept) = threads::find(thread)
    {
        // Not as after a wake-up: another CPU that charges it leaves that alone.
        kept.waits = throttled(requeued(now()));
    }
    0
}

/// A new thread is runnable. Its cgroup is not known before it has run. Not needed where the kernel counts waits.
#[raw_tracepoint(tracepoint = "sched_wakeup_new")]
pub fn sched_wakeup_new(event: RawTracePointContext) -> i32 {
    let thread = event.arg::<u64>(0);
    let new = Thread {
        thread,
        waits: woken(now()),
        ..Thread::default()
    };
    // One that is there was another thread's, whose end was not seen.
    if let Some(kept) = threads::find(thread) {
        let place = kept.place;
        *kept = Thread { place, ..new };
    } else if threads::insert(new).is_none() {
        lost(|lost| lost.tasks += 1);
    }
    0
}

/// Whether the kernel counts waits.
#[inline(always)]
pub fn are_counted() -> bool {
    wait_fields().run_delay != 0
}

/// A thread that waited comes to this CPU, which another has had since `since`; returns when it came. That is earlier than now where it
/// took the CPU at once, while the other one could have run on.
#[inline(always)]
pub fn end(waits: Stamp, since: u64, now: u64, was_idle: bool, runnable: bool) -> u64 {
    if runnable && took_this_cpu(waits, since, now, was_idle) {
        woken(waits)
    } else {
        now
    }
}

/// Whether a thread that `waits` took this CPU from the one that has it since `since` as fast as that
/// goes. The time it took to wake it up is no wait then: the kernel's own counts say so too, since they go by the run queue's
/// clock, which stands still from such a wake-up to the switch.
#[inline(always)]
fn took_this_cpu(waits: Stamp, since: u64, now: u64, was_idle: bool) -> bool {
    let took = now.saturating_sub(waits);
    waits != 0
        && is_woken(waits)
        && waits >= since
        && (took <= LONGEST_PREEMPTION_NS || (was_idle && took <= LONGEST_IDLE_EXIT_NS))
}

/// How long the current thread waited before it came, as it is charged for the first time since. Where the kernel counts that, what is
/// kept of it is looked up now.
#[inline(always)]
pub fn ended(running: &mut Running, thread: u64) -> Wait {
    if !are_counted() {
        let waits = core::mem::take(&mut running.waits);
        return Wait {
            ns: if waits == 0 {
                0
            } else {
                running.since_ns.saturating_sub(woken(waits))
            },
            was_held: is_throttled(waits),
        };
    }
    let Some(kept) = threads::of(running, thread) else {
        return Wait::UNKNOWN;
    };
    running.place = kept.place;
    running.subject = kept.subject;
    if kept.subject.cgroup == 0 {
        return Wait::UNKNOWN;
    }
    let all = run_delay();
    let ns = all.saturating_sub(kept.waited_ns);
    kept.waited_ns = all;
    Wait {
        ns,
        was_held: is_throttled(core::mem::take(&mut kept.waits)),
    }
}

/// How long the current thread has waited in all; 0 where the kernel does not count it.
#[inline(always)]
pub fn run_delay() -> u64 {
    read(wait_fields().run_delay)
}

/// A word of the current thread's `task_struct`; 0 where the kernel does not count waits. A kernel without types refuses a program that
/// may ask for the task by its type, whether it ever does or not.
#[inline(always)]
fn read(at: u32) -> u64 {
    if !are_counted() {
        return 0;
    }
    // SAFETY: the verifier sees to it that this is a member of that structure.
    unsafe { current_task().wrapping_add(at as usize).cast::<u64>().read_volatile() }
}

/// The current thread's `task_struct`, of which the verifier knows that it is one.
#[inline(always)]
pub fn current_task() -> *const u8 {
    // SAFETY: the helper takes nothing and has no precondition.
    unsafe { bpf_get_current_task_btf() as *const u8 }
}

/// Adds a wait, of a thread that came so.
#[inline(always)]
pub fn add(times: *mut Times, wait: Wait, came: u64) {
    if wait.ns == 0 || wait.ns == Wait::UNKNOWN.ns {
        return;
    }
    let from = came.saturating_sub(wait.ns);
    // SAFETY: elements of an array live as long as the map; their sums are changed by atomic operations alone. The two times of
    // throttling are of threads that are held back and released together: which of them writes last makes no difference that matters.
    unsafe {
        atomic_xadd::<u64, u64, { Relaxed }>(&raw mut (*times).wait_ns, wait.ns);
        if !throttle::is_known() {
            return;
        }
        let (held, released) = ((*times).held_ns, (*times).released_ns);
        let throttled = if wait.was_held {
            if released == 0 {
                (*times).released_ns = came;
            }
            wait.ns
        } else if held > from {
            // It waited already when others of its cgroup were held back, and it with them.
            let until = if released == 0 { came } else { released.min(came) };
            until.saturating_sub(held)
        } else {
            0
        };
        if throttled != 0 {
            atomic_xadd::<u64, u64, { Relaxed }>(&raw mut (*times).throttled_ns, throttled);
        }
    }
}

/// A part of a subject is held back from now on, unless it is already.
#[inline(always)]
pub fn hold(subject: &Subject, now: u64) {
    let Some(times) = TIMES.get_ptr_mut(subject.place) else {
        return;
    };
    // SAFETY: as in `add`.
    unsafe {
        if generation(times) == u64::from(subject.generation) && ((*times).held_ns == 0 || (*times).released_ns != 0) {
            (*times).held_ns = now;
            (*times).released_ns = 0;
        }
    }
}
