//! CPU time and run-queue wait.
//!
//! When `sched_switch` fires the thread that leaves is still current, so its cgroup is known and its time is charged
//! to it. The one that comes is known by its address alone: how long it waited is kept beside the CPU and charged when
//! it leaves or is settled.

use aya_ebpf::{
    helpers::bpf_get_current_pid_tgid, helpers::generated::bpf_ktime_get_ns, macros::raw_tracepoint,
    programs::RawTracePointContext,
};
use stoker_ebpf_types::{Running, Stamp, Subject, Task, is_woken, requeued, woken};

use crate::maps::{RUNNING, TASKS, TIMES, current_cgroup, lost, subject_of};

/// `TASK_DEAD` of `include/linux/sched.h`: the thread leaves for the last time.
const TASK_DEAD: u32 = 0x80;

/// What it takes at most, in ns, from a wake-up to the switch that it causes; a thread that comes later was kept
/// waiting.
const LONGEST_PREEMPTION_NS: u64 = 100_000;

/// The same where the CPU was idle, and perhaps asleep. Well below the time that throttling keeps a thread waiting.
const LONGEST_IDLE_EXIT_NS: u64 = 1_000_000;

const BPF_ANY: u64 = 0;

/// No cgroup has the id 0.
const NOBODY: Subject = Subject {
    slot: 0,
    generation: 0,
    cgroup: 0,
};

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

    let comes = TASKS.get_ptr_mut(next);
    let (waits, subject) = match comes {
        // SAFETY: the run queue's lock keeps everyone else from this thread's entry.
        Some(task) => unsafe { ((&raw mut (*task).waits).replace(0), (*task).subject) },
        None => (0, NOBODY),
    };
    let moment = if runnable && took_this_cpu(waits, running.since_ns, now) {
        waits
    } else {
        now
    };

    let charged = charge(running, moment);
    let dead = prev_state & TASK_DEAD != 0;
    match charged {
        Some(subject) if !dead => {
            // A thread that sleeps, and is known, needs nothing: its wake-up says since when it waits.
            if runnable || running.known == 0 || running.subject != subject {
                let waits = if runnable { requeued(moment) } else { 0 };
                let task = Task { waits, subject };
                match TASKS.get_ptr_mut(prev) {
                    // SAFETY: as above.
                    Some(old) => unsafe { *old = task },
                    None => put(prev, task),
                }
            }
        }
        _ if running.known != 0 => {
            let _ = TASKS.remove(prev);
        }
        _ => {}
    }

    *running = Running {
        since_ns: moment,
        wait_ns: if waits != 0 { moment.saturating_sub(waits) } else { 0 },
        known: comes.is_some().into(),
        subject,
        thread: next,
        // The thread that leaves is still current, and no other has the id 0.
        idle: if bpf_get_current_pid_tgid() as u32 == 0 {
            prev
        } else {
            running.idle
        },
    };
    0
}

/// Whether a thread that `waits` took this CPU from the one that has it since `since` as fast as that
/// goes. The time it took to wake it up is its own then, neither the other's nor a wait: the kernel's own counts say so
/// too, since they go by the run queue's clock, which stands still from such a wake-up to the switch.
#[inline(always)]
fn took_this_cpu(waits: Stamp, since: u64, now: u64) -> bool {
    let took = now.saturating_sub(waits);
    waits != 0
        && is_woken(waits)
        && waits >= since
        && (took <= LONGEST_PREEMPTION_NS || (took <= LONGEST_IDLE_EXIT_NS && bpf_get_current_pid_tgid() as u32 == 0))
}

/// A thread that slept is runnable.
#[raw_tracepoint(tracepoint = "sched_wakeup")]
pub fn sched_wakeup(event: RawTracePointContext) -> i32 {
    if let Some(task) = TASKS.get_ptr_mut(event.arg::<u64>(0)) {
        // SAFETY: the lock of its run queue is held, save where a thread wakes itself on its own CPU.
        let waits = unsafe { &mut (*task).waits };
        // One that lost its CPU on its way to sleep has waited since then. What this leaves on one that runs means
        // nothing: it is put right when that leaves its CPU, or wakes up.
        if is_woken(*waits) {
            *waits = woken(now());
        }
    }
    0
}

/// A new thread is runnable. Its cgroup is not known before it has run.
#[raw_tracepoint(tracepoint = "sched_wakeup_new")]
pub fn sched_wakeup_new(event: RawTracePointContext) -> i32 {
    let task = Task {
        waits: woken(now()),
        subject: NOBODY,
    };
    put(event.arg::<u64>(0), task);
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

/// Charges the current thread up to `until`; to whom, if it is one of ours.
#[inline(always)]
fn charge(running: &Running, until: u64) -> Option<Subject> {
    let cgroup = current_cgroup();
    // Most often it is whom it was charged to before, and it need not be looked up.
    let known = running.subject;
    if known.cgroup == cgroup && add(&known, running, until) {
        return Some(known);
    }
    let subject = subject_of(cgroup)?;
    add(&subject, running, until).then_some(subject)
}

/// Adds to a subject's times, unless its slot has another owner by now.
#[inline(always)]
fn add(subject: &Subject, running: &Running, until: u64) -> bool {
    let Some(times) = TIMES.get_ptr_mut(subject.slot) else {
        return false;
    };
    // SAFETY: this CPU's own element; all that write to it run here with interrupts off or one after the other.
    let times = unsafe { &mut *times };
    if times.generation != u64::from(subject.generation) {
        return false;
    }
    if running.since_ns != 0 {
        times.cpu_ns += until.saturating_sub(running.since_ns);
        times.wait_ns += running.wait_ns;
    }
    true
}

#[inline(always)]
fn put(thread: u64, task: Task) {
    if TASKS.insert(thread, task, BPF_ANY).is_err() {
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
