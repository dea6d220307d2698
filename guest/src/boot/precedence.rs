//! Who runs first: the thread that serves all containers, before any of them.

/// The least nice that there is: nobody else in the machine has it.
const FIRST: libc::c_int = -20;
const ORDINARY: libc::c_int = 0;

/// This thread runs before others from now on. Threads and processes that it starts do so too, until they say otherwise.
pub(crate) fn first() {
    set(FIRST);
}

/// This thread is one among others from now on.
pub(crate) fn ordinary() {
    set(ORDINARY);
}

fn set(nice: libc::c_int) {
    // SAFETY: `setpriority` takes numbers alone. On Linux it is the calling thread's where `who` is 0 (setpriority(2)).
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) } != 0 {
        // It runs all the same, only later.
        tracing::warn!("cannot change the priority: {}", std::io::Error::last_os_error());
    }
}
