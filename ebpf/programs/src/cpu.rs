//! CPU time and run-queue wait.
//!
//! When `sched_switch` fires the thread that leaves is still current, so its cgroup is known and its time is charged
//! to it. The one that comes is known by its address alone: how long it waited is kept beside the CPU and charged when
//! it leaves or is settled.

use aya_ebpf::{
    helpers::bpf_get_current_pid_tgid, helpers::generated::bpf_ktime_get_ns, macros::raw_tracepoint,
    programs::RawTracePointContext,
};
use stoker_ebpf_types::{ASLEEP, ON_CPU, Running, is_woken, requeued, woken};

use crate::accounts::{RUNNING, TASKS, TIMES, current, lost};

/// `TASK_DEAD` of `include/linux/sched.h`: the thread leaves for the last time.
const TASK_DEAD: u32 = 0x80;

/// What it takes at most, in ns, from a wake-up to the switch that it causes; a thread that comes later was kept
/// waiting.
const LONGEST_PREEMPTION_NS: u64 = 100_000;

/// The same where the CPU was idle, and perhaps asleep. Well below the time that throttling keeps a thread waiting.
const LONGEST_IDLE_EXIT_NS: u64 = 1_000_000;

const BPF_ANY: u64 = 0;

/// The thread `prev` leaves this CPU to `next`. Interrupts are off and the run queue is locked.
#[raw_tracepoint(tracepoint = "sched_switch")]
pub fn sched_switch(event: RawTracePointContext) -> i32 {
    let preempted = event.arg::<u64>(0) as u8 != 0;
    let prev = event.arg::<u64>(1);
    let next = event.arg::<u64>(2);
    let prev_state = event.arg::<u64>(3) as u32;
    let now = now();
    let Some(running) = this_cpu() else { return 0 };
    // One that is preempted, or that yields, waits from now on.
    let runnable = preempted || prev_state == 0;

    let waker = TASKS.get_ptr_mut(next);
    let stamp = match waker {
        // SAFETY: the run queue's lock keeps everyone else from this thread's stamp.
        Some(stamp) => unsafe { stamp.replace(ON_CPU) },
        None => ASLEEP,
    };
    let moment = match stamp {
        ASLEEP | ON_CPU => now,
        _ if runnable && is_woken(stamp) && took_this_cpu(stamp, running.since_ns, now) => stamp,
        _ => now,
    };

    let ours = charge(running, moment);
    if prev_state & TASK_DEAD != 0 || !ours {
        if running.known != 0 {
            let _ = TASKS.remove(prev);
        }
    } else {
        let stamp = if runnable { requeued(moment) } else { ASLEEP };
        match TASKS.get_ptr_mut(prev) {
            // SAFETY: as above.
            Some(old) => unsafe { *old = stamp },
            None => remember(prev, stamp),
        }
    }

    running.since_ns = moment;
    running.wait_ns = if stamp > ON_CPU {
        moment.saturating_sub(stamp)
    } else {
        0
    };
    running.known = waker.is_some().into();
    0
}

/// Whether a thread that is runnable since `stamp` took this CPU from the one that has it since `since` as fast as that
/// goes. The time it took to wake it up is its own then, neither the other's nor a wait: the kernel's accounts say so
/// too, since they go by the run queue's clock, which stands still from such a wake-up to the switch.
#[inline(always)]
fn took_this_cpu(stamp: u64, since: u64, now: u64) -> bool {
    let took = now.saturating_sub(stamp);
    stamp >= since
        && (took <= LONGEST_PREEMPTION_NS || (took <= LONGEST_IDLE_EXIT_NS && bpf_get_current_pid_tgid() as u32 == 0))
}

/// A thread that slept is runnable.
#[raw_tracepoint(tracepoint = "sched_wakeup")]
pub fn sched_wakeup(event: RawTracePointContext) -> i32 {
    if let Some(stamp) = TASKS.get_ptr_mut(event.arg::<u64>(0)) {
        // SAFETY: the lock of its run queue is held, save where a thread wakes itself, and that one is ON_CPU.
        unsafe {
            // A wake-up of one that runs or waits already changes nothing.
            if *stamp == ASLEEP {
                *stamp = woken(now());
            }
        }
    }
    0
}

/// A new thread is runnable. Its cgroup is not known before it has run.
#[raw_tracepoint(tracepoint = "sched_wakeup_new")]
pub fn sched_wakeup_new(event: RawTracePointContext) -> i32 {
    remember(event.arg::<u64>(0), woken(now()));
    0
}

/// Charges the thread that runs on this CPU up to now. Nothing calls this but user space, with `BPF_PROG_TEST_RUN` and
/// `BPF_F_TEST_RUN_ON_CPU`: in an interrupt, so that the current thread is the one that was running.
#[raw_tracepoint(tracepoint = "settle")]
pub fn settle(_: RawTracePointContext) -> i32 {
    let now = now();
    if let Some(running) = this_cpu() {
        charge(running, now);
        running.since_ns = now;
        running.wait_ns = 0;
    }
    0
}

/// Charges the current thread; whether it is one of ours.
#[inline(always)]
fn charge(running: &Running, now: u64) -> bool {
    let Some((slot, _)) = current() else {
        return false;
    };
    if running.since_ns != 0
        && let Some(times) = TIMES.get_ptr_mut(slot)
    {
        // SAFETY: this CPU's own element; all that write to it run here with interrupts off or one after the other.
        let times = unsafe { &mut *times };
        times.cpu_ns += now.saturating_sub(running.since_ns);
        times.wait_ns += running.wait_ns;
    }
    true
}

#[inline(always)]
fn remember(task: u64, stamp: u64) {
    if TASKS.insert(task, stamp, BPF_ANY).is_err() {
        lost(|lost| lost.tasks += 1);
    }
}

#[inline(always)]
fn this_cpu<'a>() -> Option<&'a mut Running> {
    // SAFETY: this CPU's own element, taken once in each program: sched_switch runs with interrupts off, settle in an
    // interrupt or, on the caller's own CPU, with preemption off, so that neither sees the other's half-done work.
    RUNNING.get_ptr_mut(0).map(|running| unsafe { &mut *running })
}

#[inline(always)]
fn now() -> u64 {
    // SAFETY: the helper takes nothing and has no precondition.
    unsafe { bpf_ktime_get_ns() }
}
