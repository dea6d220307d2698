//! Who runs first: the thread that serves all containers, before any of them.

/// The least nice that there is: nobody else in the machine has it.
const FIRST: libc::c_int = -20;
const ORDINARY: libc::c_int = 0;
/// A tenth of what an ordinary one has, where there is not enough (`sched_prio_to_weight` of kernel/sched/core.c).
const LOW: libc::c_int = 10;

/// This thread runs before others from now on. Threads and processes that it starts do so too, until they say otherwise.
pub(crate) fn first() {
    set(FIRST);
}

/// This thread is one among others from now on.
pub(crate) fn ordinary() {
    set(ORDINARY);
}

/// Others run before this thread from now on, and it gets on all the same.
pub(crate) fn low() {
    set(LOW);
}

fn set(nice: libc::c_int) {
    // SAFETY: `setpriority` takes numbers alone. On Linux it is the calling thread's where `who` is 0 (setpriority(2)).
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) } != 0 {
        // It runs all the same, only later.
        tracing::warn!("cannot change the priority: {}", std::io::Error::last_os_error());
    }
}
