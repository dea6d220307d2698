//! CPU time and run-queue wait.
//!
//! CPU time is the scheduler's own: `sched_stat_runtime` fires wherever it charges a thread, and so its cgroup, with what it
//! ran since it was charged last, at the latest when it leaves its CPU. Most often the thread is current, so its cgroup is
//! known. Another CPU that wakes a thread up charges the one that runs where that is to run; that one is known by its
//! address alone.
//!
//! When `sched_switch` fires the thread that leaves is still current. The one that comes is known by its address alone: how
//! long it waited is kept beside the CPU and charged with what it runs.

use aya_ebpf::{
    helpers::bpf_get_current_pid_tgid,
    helpers::generated::{bpf_get_current_task, bpf_ktime_get_ns},
    macros::raw_tracepoint,
    programs::RawTracePointContext,
};
use stoker_ebpf_types::{Running, Stamp, Subject, Task, is_woken, requeued, woken};

use crate::maps::{RUNNING, TASKS, TIMES, UNCHARGED, current_cgroup, lost, subject_of};

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

/// A thread was charged with what it ran since it was charged last. Its run queue is locked, with interrupts off; it runs
/// on this CPU or on another.
#[raw_tracepoint(tracepoint = "sched_stat_runtime")]
pub fn sched_stat_runtime(event: RawTracePointContext) -> i32 {
    let thread = event.arg::<u64>(0);
    let ran = event.arg::<u64>(1);
    let now = now();
    if thread == current() {
        let Some(running) = this_cpu() else { return 0 };
        // What ran when its cgroup was added is charged from then on.
        let most = if running.settled != 0 {
            now.saturating_sub(running.since_ns)
        } else {
            u64::MAX
        };
        charge(running, thread, ran.min(most));
        running.since_ns = now;
        running.settled = 0;
    } else {
        charge_other(thread, ran, now);
    }
    0
}

/// The thread `prev` leaves this CPU to `next`. Interrupts are off and the run queue is locked.
#[raw_tracepoint(tracepoint = "sched_switch")]
pub fn sched_switch(event: RawTracePointContext) -> i32 {
    let preempted = event.arg::<u64>(0) as u8 != 0;
    let prev = event.arg::<u64>(1);
    let next = event.arg::<u64>(2);
    let prev_state = event.arg::<u64>(3) as u32;
    let now = now();
    let Some(running) = this_cpu() else { return 0 };
    // The thread that leaves is still current, and no other has the id 0.
    let was_idle = bpf_get_current_pid_tgid() as u32 == 0;
    // One that is preempted, or that yields, waits from now on.
    let runnable = preempted || prev_state == 0;

    let comes = TASKS.get_ptr_mut(next);
    let (waits, subject) = match comes {
        // SAFETY: the run queue's lock keeps everyone else from this thread's entry.
        Some(task) => unsafe { ((&raw mut (*task).waits).replace(0), (*task).subject) },
        None => (0, NOBODY),
    };
    let moment = if runnable && took_this_cpu(waits, running.since_ns, now, was_idle) {
        waits
    } else {
        now
    };

    if !was_idle {
        leave(running, prev, prev_state & TASK_DEAD != 0, runnable.then_some(moment));
    }
    *running = Running {
        since_ns: moment,
        settled: 0,
        wait_ns: if waits != 0 { moment.saturating_sub(waits) } else { 0 },
        known: comes.is_some().into(),
        subject,
        thread: next,
        idle: if was_idle { prev } else { running.idle },
    };
    0
}

/// A thread leaves its CPU. `waits` is since when it waits for the next one, if it does.
#[inline(always)]
fn leave(running: &mut Running, thread: u64, dead: bool, waits: Option<u64>) {
    let charged = charge(running, thread, 0).is_some();
    if !charged || running.known == 0 {
        take_uncharged(running, thread, charged);
    }
    if dead || !charged {
        if running.known != 0 {
            let _ = TASKS.remove(thread);
        }
        return;
    }
    // One that sleeps needs nothing: its wake-up says since when it waits.
    if let Some(waits) = waits.map(requeued) {
        match TASKS.get_ptr_mut(thread) {
            // SAFETY: as in `sched_switch`.
            Some(task) => unsafe { (*task).waits = waits },
            None => {
                let subject = running.subject;
                put(thread, Task { waits, subject });
            }
        }
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

/// A thread that slept is runnable.
#[raw_tracepoint(tracepoint = "sched_wakeup")]
pub fn sched_wakeup(event: RawTracePointContext) -> i32 {
    if let Some(task) = TASKS.get_ptr_mut(event.arg::<u64>(0)) {
        // SAFETY: the lock of its run queue is held, save where a thread wakes itself on its own CPU.
        let waits = unsafe { &mut (*task).waits };
        // One that lost its CPU on its way to sleep has waited since then. What this leaves on one that runs is put right
        // when that leaves its CPU, or wakes up.
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

/// Looks up whose the thread is that runs on this CPU; if it is nobody's, what it has run up to now will not be charged.
/// Nothing calls this but user space, with `BPF_PROG_TEST_RUN` and `BPF_F_TEST_RUN_ON_CPU`: in an interrupt, so that the
/// current thread is the one that was running.
#[raw_tracepoint(tracepoint = "settle")]
pub fn settle(_: RawTracePointContext) -> i32 {
    let now = now();
    if let Some(running) = this_cpu() {
        let thread = current();
        if running.thread != thread {
            // No switch was seen on this CPU yet.
            running.thread = thread;
            running.since_ns = now;
        }
        if charge(running, thread, 0).is_none() {
            take_uncharged(running, thread, false);
            running.since_ns = now;
            running.settled = 1;
        }
    }
    0
}

/// Charges the current thread with what it ran, and what it waited before; to whom, if it is one of ours.
#[inline(always)]
fn charge(running: &mut Running, thread: u64, ran: u64) -> Option<Subject> {
    let cgroup = current_cgroup();
    let waited = core::mem::take(&mut running.wait_ns);
    // Most often it is whom it was charged to before, and it need not be looked up.
    let known = running.subject;
    if known.cgroup == cgroup && add(&known, ran, waited) {
        return Some(known);
    }
    let found = subject_of(cgroup).filter(|subject| add(subject, ran, waited));
    match found {
        Some(subject) => {
            running.subject = subject;
            running.known = put(thread, Task { waits: 0, subject }).into();
            take_uncharged(running, thread, true);
        }
        None if known.cgroup != 0 => {
            let _ = TASKS.remove(thread);
            running.known = 0;
            running.subject = NOBODY;
        }
        None => {}
    }
    found
}

/// Charges a thread that runs on another CPU. Where it is not known whose it is, that is found out there.
#[inline(always)]
fn charge_other(thread: u64, ran: u64, now: u64) {
    if let Some(task) = TASKS.get_ptr_mut(thread) {
        // SAFETY: the run queue's lock keeps everyone else from this thread's entry.
        let task = unsafe { &mut *task };
        if task.subject.cgroup != 0 && add(&task.subject, ran, 0) {
            // Unless it waits again.
            if is_woken(task.waits) {
                task.waits = woken(now);
            }
            return;
        }
    }
    match UNCHARGED.get_ptr_mut(thread) {
        // SAFETY: as above.
        Some(sum) => unsafe { *sum += ran },
        None => {
            if UNCHARGED.insert(thread, ran, BPF_ANY).is_err() {
                lost(|lost| lost.tasks += 1);
            }
        }
    }
}

/// Charges what other CPUs left uncharged of the thread that runs here, or drops it where it is nobody's.
#[inline(always)]
fn take_uncharged(running: &mut Running, thread: u64, charged: bool) {
    if let Some(sum) = UNCHARGED.get_ptr(thread) {
        if charged {
            // SAFETY: the verifier holds the element alive, and the run queue's lock keeps others from it.
            add(&running.subject, unsafe { *sum }, 0);
            running.since_ns = now();
        }
        let _ = UNCHARGED.remove(thread);
    }
}

/// Adds to a subject's times, unless its slot has another owner by now.
#[inline(always)]
fn add(subject: &Subject, ran: u64, waited: u64) -> bool {
    let Some(times) = TIMES.get_ptr_mut(subject.slot) else {
        return false;
    };
    // SAFETY: this CPU's own element; all that write to it run here with interrupts off or one after the other.
    let times = unsafe { &mut *times };
    if times.generation != u64::from(subject.generation) {
        return false;
    }
    times.cpu_ns += ran;
    times.wait_ns += waited;
    true
}

/// Keeps what is known of a thread; says whether there was room.
#[inline(always)]
fn put(thread: u64, task: Task) -> bool {
    let kept = TASKS.insert(thread, task, BPF_ANY).is_ok();
    if !kept {
        lost(|lost| lost.tasks += 1);
    }
    kept
}

/// The address of the current thread.
#[inline(always)]
fn current() -> u64 {
    // SAFETY: the helper takes nothing and has no precondition.
    unsafe { bpf_get_current_task() }
}

#[inline(always)]
fn this_cpu<'a>() -> Option<&'a mut Running> {
    // SAFETY: this CPU's own element, taken once in each program: the tracepoints' run with interrupts off, settle in an
    // interrupt or, on the caller's own CPU, with preemption off, so that none sees the other's half-done work.
    RUNNING.get_ptr_mut(0).map(|running| unsafe { &mut *running })
}

#[inline(always)]
fn now() -> u64 {
    // SAFETY: the helper takes nothing and has no precondition.
    unsafe { bpf_ktime_get_ns() }
}
