//! PID 1 of a container. A program made for Lambda does not expect to be it: to PID 1 its own signals mean nothing, and
//! every orphan of its pid namespace is its to reap. So the function runs as a child of this process, which does no more
//! than to reap, and which the function can neither signal nor trace.

use nix::sys::prctl;
use nix::unistd::Pid;

/// Status of a function whose program could not be run, as shells have it.
pub(super) const NOT_EXECUTABLE: i32 = 127;
/// Added to the number of the signal that a function ended by, as shells do.
const SIGNALLED: i32 = 128;

/// Reaps until the function has ended, and ends as it did; the kernel then kills all that is left in the namespace.
pub(super) fn wait_for(function: Pid) -> ! {
    // SAFETY: nothing that owns one of these descriptors is used or dropped from here on: this function never returns.
    // The log's readers and the launcher shall see an end when the function's own descriptors are closed.
    unsafe { libc::close_range(0, libc::c_uint::MAX, 0) };
    // For who lists processes; and memory that is init's is none of the function's business. Neither is worth an end.
    let _ = prctl::set_name(c"init");
    let _ = prctl::set_dumpable(false);
    loop {
        let mut status = 0;
        // Not by `nix`, which takes an end by a real-time signal for an error.
        // SAFETY: the call writes one integer, to a place that is ours.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL) };
        if pid == function.as_raw() {
            exit(if libc::WIFSIGNALED(status) {
                SIGNALLED + libc::WTERMSIG(status)
            } else {
                libc::WEXITSTATUS(status)
            });
        }
    }
}

/// Ends this process and does nothing else: what `exit(3)` would do besides is the launcher's.
pub(super) fn exit(status: i32) -> ! {
    // SAFETY: no call needs anything of this process any more.
    unsafe { libc::_exit(status) }
}

/// The signal that a container's PID 1 tells of by its status, if it is one.
pub(super) fn signal_of(status: i32) -> Option<i32> {
    let signal = status.checked_sub(SIGNALLED)?;
    (1..=libc::SIGRTMAX()).contains(&signal).then_some(signal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_tell_of_signals() {
        for (status, signal) in [
            (0, None),
            (1, None),
            (NOT_EXECUTABLE, None),
            (128, None),
            (128 + 9, Some(9)),
            (128 + 64, Some(64)),
            (255, None),
        ] {
            assert_eq!(signal_of(status), signal, "{status}");
        }
    }
}
