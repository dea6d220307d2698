//! PID 1 of a container. A program made for Lambda does not expect to be it: to PID 1 its own signals mean nothing, and
//! every orphan of its pid namespace is its to reap. So the function runs as a child of this process, which does no more
//! than to reap, and which the function can neither signal nor trace.

use std::sync::atomic::{AtomicI32, Ordering};

use nix::sys::prctl;
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::unistd::Pid;

/// Status of a function whose program could not be run, as shells have it.
pub(super) const NOT_EXECUTABLE: i32 = 127;
/// Added to the number of the signal that a function ended by, as shells do.
const SIGNALLED: i32 = 128;

/// The function's process, for the handler of SIGTERM.
static FUNCTION: AtomicI32 = AtomicI32::new(0);

/// Asks the function to end, as this process was asked.
extern "C" fn pass_on(signal: libc::c_int) {
    // SAFETY: kill(2) may be called in a signal handler. The function has not been reaped, for with that this process ends.
    unsafe { libc::kill(FUNCTION.load(Ordering::Relaxed), signal) };
}

/// Reaps until the function has ended, and ends as it did; the kernel then kills all that is left in the namespace.
pub(super) fn wait_for(function: Pid) -> ! {
    // SAFETY: nothing that owns one of these descriptors is used or dropped from here on: this function never returns.
    // The log's readers and the launcher shall see an end when the function's own descriptors are closed.
    unsafe { libc::close_range(0, libc::c_uint::MAX, 0) };
    FUNCTION.store(function.as_raw(), Ordering::Relaxed);
    // Where it fails, the function is not asked before it is killed.
    // SAFETY: the handler calls nothing but kill(2).
    let _ = unsafe { signal(Signal::SIGTERM, SigHandler::Handler(pass_on)) };
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
    use std::process::Command;
    use std::time::{Duration, Instant};

    use super::*;

    /// Where the shell of the test below tells that it can be asked to end.
    const READY: &str = "STOKER_TEST_READY";

    /// A shell that ends with 7 when it is asked to, once its parent would pass that on (bit 14 of what it catches, proc(5)).
    const SHELL: &str = r#"trap 'exit 7' TERM
        until grep -Eq '^SigCgt:.*[4-7c-f][0-9a-f]{3}$' "/proc/$PPID/status"; do :; done
        : >"$STOKER_TEST_READY"
        while :; do sleep 0.01; done"#;

    #[test]
    fn passes_on_that_it_is_to_end() {
        let folder = tempfile::tempdir().unwrap();
        let ready = folder.path().join("ready");
        let mut parent = Command::new(std::env::current_exe().unwrap())
            .args([
                "--ignored",
                "--exact",
                "container::launch::pid1::tests::waits_for_a_shell",
            ])
            .env(READY, &ready)
            .spawn()
            .unwrap();
        let begin = Instant::now();
        while !ready.exists() {
            assert!(begin.elapsed() < Duration::from_secs(60), "no shell");
            std::thread::yield_now();
        }
        nix::sys::signal::kill(Pid::from_raw(parent.id() as i32), Signal::SIGTERM).unwrap();
        assert_eq!(parent.wait().unwrap().code(), Some(7));
    }

    #[ignore = "run by the test above"]
    #[test]
    #[expect(clippy::zombie_processes, reason = "it is what is tested that waits for it")]
    fn waits_for_a_shell() {
        let shell = Command::new("/bin/sh").args(["-c", SHELL]).spawn().unwrap();
        wait_for(Pid::from_raw(shell.id() as i32));
    }

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
