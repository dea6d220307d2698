//! What this process is given beside containers: it is the first to have a CPU, and may have as many descriptors as they need.

use std::io;

use nix::errno::Errno;
use nix::sys::resource::{Resource, setrlimit};
use stoker_proto::limits::CONTAINERS;

/// The most that setpriority(2) gives.
const NICE: libc::c_int = -20;
/// Descriptors for one container: its connections (32), each that brings it telemetry, with the network that it is made in
/// (2 × 10), listener, logs, control and cgroup.
const DESCRIPTORS_A_CONTAINER: u64 = 64;
/// For all else: drive, agent, code, events.
const DESCRIPTORS: u64 = 1024;

/// To be called by the thread that serves. Where the kernel refuses, all goes on as it is.
pub(crate) fn prepare() {
    if let Err(error) = run_first() {
        tracing::warn!("cannot run before containers: {error}");
    }
    let descriptors = DESCRIPTORS + CONTAINERS as u64 * DESCRIPTORS_A_CONTAINER;
    if let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, descriptors, descriptors) {
        tracing::warn!("cannot have {descriptors} descriptors: {error}");
    }
}

/// Lets this thread run before all that containers do: what it does for one, its budget bounds. What it starts, processes and
/// threads, does not inherit that.
fn run_first() -> io::Result<()> {
    let parameter = libc::sched_param { sched_priority: 0 };
    // SAFETY: the call reads a `sched_param`, which `parameter` is.
    let reset = unsafe { libc::sched_setscheduler(0, libc::SCHED_OTHER | libc::SCHED_RESET_ON_FORK, &parameter) };
    Errno::result(reset)?;
    // SAFETY: no memory is passed.
    let raised = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
    Errno::result(raised)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn nice() -> libc::c_int {
        // SAFETY: no memory is passed.
        unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }
    }

    /// Needs the right to it, which root has.
    #[test]
    fn what_it_starts_does_not_run_first() {
        std::thread::spawn(|| {
            run_first().unwrap();
            assert_eq!(nice(), NICE);
            let child = Command::new("nice").output().unwrap();
            assert_eq!(String::from_utf8_lossy(&child.stdout).trim(), "0");
            assert_eq!(std::thread::spawn(nice).join().unwrap(), 0);
        })
        .join()
        .unwrap();
    }
}
