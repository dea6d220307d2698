//! CPU time.
//!
//! It is the scheduler's own: `sched_stat_runtime` fires wherever it charges a thread, and so its cgroup, with what it
//! ran since it was charged last, at each tick and at the latest when it leaves its CPU. Most often the thread is current, so its
//! cgroup is known. Another CPU that wakes a thread up charges the one that runs where that is to run; that one is known by its
//! address alone.
//!
//! When `sched_switch` fires the thread that leaves is still current. The one that comes is known by its address alone: how long it
//! waited ([`waits`]) is charged with what it runs.

use core::intrinsics::{AtomicOrdering::Relaxed, atomic_xadd};

use aya_ebpf::{
    helpers::bpf_get_current_pid_tgid,
    helpers::generated::{bpf_get_current_task, bpf_ktime_get_ns},
    macros::raw_tracepoint,
    programs::RawTracePointContext,
};
use stoker_ebpf_types::{NO_PLACE, Preemption, Running, Subject, Thread, Times, is_woken, requeued, throttled, woken};

use crate::maps::{PREEMPTIONS, RUNNING, TIMES, current_cgroup, lost, of_machines, subject_of};
use crate::waits::{self, Wait};
use crate::{accounts, alarms, threads, throttle};

/// `TASK_DEAD` of `include/linux/sched.h`: the thread leaves for the last time.
const TASK_DEAD: u32 = 0x80;

/// A thread was charged with what it ran since it was charged last. Its run queue is locked, with interrupts off; it runs
/// on this CPU or on another.
#[raw_tracepoint(tracepoint = "sched_stat_runtime")]
pub fn sched_stat_runtime(event: RawTracePointContext) -> i32 {
    let thread = event.arg::<u64>(0);
    let ran = event.arg::<u64>(1);
    let now = now();
    let Some(running) = this_cpu() else { return 0 };
    let subject = if thread == running.thread || thread == current() {
        if thread != running.thread {
            begin(running, thread, now);
        }
        // What ran when its cgroup was added is charged from then on.
        let most = if running.is_settled != 0 {
            now.saturating_sub(running.since_ns)
        } else {
            u64::MAX
        };
        charge(running, thread, ran.min(most));
        running.since_ns = now;
        running.is_settled = 0;
        running.subject
    } else {
        charge_other(thread, ran, now)
    };
    accounts::settle_due(&subject, now);
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
    let was_idle = match running.idle {
        // The thread that leaves is still current, and no other has the id 0.
        0 => bpf_get_current_pid_tgid() as u32 == 0,
        idle => idle == prev,
    };
    // One that is preempted, or that yields, waits from now on.
    let runnable = preempted || prev_state == 0;

    let mut came = Running {
        since_ns: now,
        thread: next,
        idle: if was_idle { prev } else { running.idle },
        place: NO_PLACE,
        ..Running::default()
    };
    // Else it is looked up when it is charged, with all that its subject has.
    if !waits::are_counted()
        && next != came.idle
        && let Some(kept) = threads::find(next)
    {
        came.waits = core::mem::take(&mut kept.waits);
        came.subject = kept.subject;
        came.place = kept.place;
        came.since_ns = waits::end(came.waits, running.since_ns, now, was_idle, runnable);
    }
    if !was_idle {
        if prev != running.thread {
            begin(running, prev, now);
        }
        let dead = prev_state & TASK_DEAD != 0;
        let is_preempted = leave(running, prev, dead, runnable.then_some(came.since_ns), now);
        if is_preempted && of_machines() && next != came.idle {
            came.lost_slot = running.subject.slot();
            came.lost_generation = running.subject.generation;
        }
    }
    if next != came.idle {
        accounts::arrive(next);
    }
    *running = came;
    0
}

/// A thread leaves its CPU. `waits_from` is since when it waits for the next one, if it does. Says whether it is somebody's and could have
/// run on: neither sleeps nor is held back by its cgroup's limit.
#[inline(always)]
fn leave(running: &mut Running, thread: u64, dead: bool, waits_from: Option<u64>, now: u64) -> bool {
    if running.is_charged == 0 {
        charge(running, thread, 0);
    }
    if running.guest_ns != 0 {
        crate::kvm::leave(running, now);
    }
    if dead {
        // Of one that is nobody's too something may be kept, where another CPU has charged it.
        if let Some(kept) = threads::of(running, thread) {
            threads::remove(kept);
        }
        return false;
    }
    if running.subject.cgroup == 0 {
        return false;
    }
    let is_held = waits_from.is_some() && throttle::is_held(waits::current_task);
    if is_held && let Some(from) = waits_from {
        waits::hold(&running.subject, from);
    }
    if waits::are_counted() && !is_held {
        if let Some(kept) = threads::at(running.place, thread)
            && kept.waits != 0
        {
            kept.waits = 0;
        }
        return waits_from.is_some();
    }
    // One that sleeps needs nothing more: its wake-up says since when it waits.
    let Some(from) = waits_from else { return false };
    if threads::at(running.place, thread).is_none() {
        // There was no room for it.
        let uncharged_ns = keep(running, thread);
        add(&running.subject, uncharged_ns, Wait::NONE, 0);
    }
    if let Some(kept) = threads::at(running.place, thread) {
        let waits = requeued(from);
        kept.waits = if is_held { throttled(waits) } else { waits };
    }
    !is_held
}

/// The current thread came to this CPU without a switch that was seen, as the first one does.
#[inline(never)]
fn begin(running: &mut Running, thread: u64, now: u64) -> u32 {
    *running = Running {
        thread,
        since_ns: now,
        idle: running.idle,
        place: NO_PLACE,
        ..Running::default()
    };
    if let Some(kept) = threads::find(thread) {
        running.subject = kept.subject;
        running.place = kept.place;
    }
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
            begin(running, thread, now);
        }
        if !charge(running, thread, 0) {
            running.since_ns = now;
            running.is_settled = 1;
        }
    }
    0
}

/// Adds to what a part of a subject used: `(place, generation, CPU time, wait, throttled)`. Nothing calls this but user space, with
/// `BPF_PROG_TEST_RUN`, to take over what earlier programs counted.
#[raw_tracepoint(tracepoint = "adopt_times")]
pub fn adopt_times(event: RawTracePointContext) -> i32 {
    let Some(times) = TIMES.get_ptr_mut(event.arg::<u64>(0) as u32) else {
        return 0;
    };
    if generation(times) == event.arg::<u64>(1) {
        // SAFETY: elements of an array live as long as the map; their sums are changed by atomic operations alone.
        unsafe {
            atomic_xadd::<u64, u64, { Relaxed }>(&raw mut (*times).cpu_ns, event.arg::<u64>(2));
            atomic_xadd::<u64, u64, { Relaxed }>(&raw mut (*times).wait_ns, event.arg::<u64>(3));
            atomic_xadd::<u64, u64, { Relaxed }>(&raw mut (*times).throttled_ns, event.arg::<u64>(4));
        }
    }
    0
}

/// Charges the current thread with what it ran, and what it waited before; says whether it is one of ours.
#[inline(always)]
pub fn charge(running: &mut Running, thread: u64, ran: u64) -> bool {
    let came = running.since_ns;
    let wait = if running.is_charged == 0 {
        waits::ended(running, thread)
    } else {
        Wait::NONE
    };
    running.is_charged = 1;
    let is_ours = charge_cgroup(running, thread, ran, wait, came);
    if running.lost_generation != 0 {
        took_cpu(running);
    }
    is_ours
}

/// The same, where it is known how long it waited and when it came.
#[inline(always)]
fn charge_cgroup(running: &mut Running, thread: u64, ran: u64, wait: Wait, came: u64) -> bool {
    let cgroup = current_cgroup();
    // Most often it is whom it was charged to before, and it need not be looked up.
    if running.subject.cgroup == cgroup && add(&running.subject, ran, wait, came) {
        return true;
    }
    if let Some(subject) = subject_of(cgroup) {
        running.subject = subject;
        let uncharged_ns = keep(running, thread);
        if add(&subject, ran.wrapping_add(uncharged_ns), wait.or_first(), came) {
            return true;
        }
    }
    forget(running, thread);
    false
}

/// Notes whom the current thread is charged to; returns what other CPUs have left uncharged of it. A function of its own: it is
/// rarely needed.
#[inline(never)]
fn keep(running: &mut Running, thread: u64) -> u64 {
    let subject = running.subject;
    if let Some(kept) = threads::of(running, thread) {
        if kept.subject.cgroup == 0 {
            kept.waited_ns = waits::run_delay();
        }
        kept.subject = subject;
        running.place = kept.place;
        return core::mem::take(&mut kept.uncharged_ns);
    }
    let new = Thread {
        thread,
        subject,
        waited_ns: waits::run_delay(),
        ..Thread::default()
    };
    running.place = match threads::insert(new) {
        Some(kept) => kept.place,
        None => {
            lost(|lost| lost.tasks += 1);
            NO_PLACE
        }
    };
    0
}

/// The current thread is nobody's.
#[inline(always)]
fn forget(running: &mut Running, thread: u64) {
    running.subject = Subject::NOBODY;
    if let Some(kept) = threads::at(running.place, thread) {
        threads::remove(kept);
    }
    running.place = NO_PLACE;
}

/// Charges a thread that runs on another CPU; returns to whom. Where it is not known whose it is, that is found out there.
#[inline(always)]
fn charge_other(thread: u64, ran: u64, now: u64) -> Subject {
    if let Some(kept) = threads::find(thread) {
        let subject = kept.subject;
        if subject.cgroup != 0 && add(&subject, ran, Wait::NONE, 0) {
            // Unless it waits again.
            if is_woken(kept.waits) {
                kept.waits = woken(now);
            }
            return subject;
        }
        kept.uncharged_ns = kept.uncharged_ns.wrapping_add(ran);
        return Subject::NOBODY;
    }
    let new = Thread {
        thread,
        uncharged_ns: ran,
        ..Thread::default()
    };
    if threads::insert(new).is_none() {
        lost(|lost| lost.charges += 1);
    }
    Subject::NOBODY
}

/// Adds to what a subject used, unless its slot has another owner by now: what a thread ran, and how long it waited before it came.
/// Says whether that was added.
#[inline(always)]
fn add(subject: &Subject, ran: u64, wait: Wait, came: u64) -> bool {
    let Some(times) = TIMES.get_ptr_mut(subject.place) else {
        return false;
    };
    if generation(times) != u64::from(subject.generation) {
        return false;
    }
    if ran != 0 {
        // SAFETY: as in `adopt_times`.
        unsafe { atomic_xadd::<u64, u64, { Relaxed }>(&raw mut (*times).cpu_ns, ran) };
        if of_machines() {
            accounts::spend(subject, ran);
        } else {
            alarms::ring(subject, times);
        }
    }
    waits::add(times, wait, came);
    true
}

/// The current thread took its CPU from one that could have run on: counts that, once it is known whose it is itself. A function of its
/// own: it is rarely needed.
#[inline(never)]
fn took_cpu(running: &mut Running) -> u64 {
    let by = running.subject;
    let key = Preemption {
        slot: running.lost_slot,
        generation: core::mem::take(&mut running.lost_generation),
        by_slot: by.slot(),
        by_generation: by.generation,
    };
    if key.slot == key.by_slot && key.generation == key.by_generation {
        return 0;
    }
    match PREEMPTIONS.get_ptr_mut(key) {
        // SAFETY: the verifier holds the element alive, and it is changed by atomic operations alone.
        Some(times) => unsafe {
            atomic_xadd::<u64, u64, { Relaxed }>(times, 1);
        },
        // Where that fails another CPU was at the same place: one count of many.
        None => {
            let _ = PREEMPTIONS.insert(key, 1, 0);
        }
    }
    0
}

#[inline(always)]
pub fn generation(times: *const Times) -> u64 {
    // SAFETY: elements of an array live as long as the map; volatile, since user space changes it.
    unsafe { (&raw const (*times).generation).read_volatile() }
}

/// The address of the current thread.
#[inline(always)]
pub fn current() -> u64 {
    // SAFETY: the helper takes nothing and has no precondition.
    unsafe { bpf_get_current_task() }
}

#[inline(always)]
pub fn this_cpu<'a>() -> Option<&'a mut Running> {
    // SAFETY: this CPU's own element, taken once in each program: the tracepoints' run with interrupts off, settle in an
    // interrupt or, on the caller's own CPU, with preemption off, so that none sees the other's half-done work.
    RUNNING.get_ptr_mut(0).map(|running| unsafe { &mut *running })
}

#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: the helper takes nothing and has no precondition.
    unsafe { bpf_ktime_get_ns() }
}
