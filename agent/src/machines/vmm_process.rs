//! The process of a VMM: a child of this agent, or one that an earlier agent started.

use std::io;
use std::os::fd::OwnedFd;
use std::process::ExitStatus;

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use stoker_linux::{Cgroup, CgroupError};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::process::Child;

/// A VMM's process.
#[derive(Debug)]
pub(super) enum VmmProcess {
    /// This agent's child.
    Child(Child),
    /// Another's, which this agent sees end but has no status of.
    Found {
        /// Its id.
        pid: u32,
        /// Readable once it has ended (pidfd_open(2)).
        pidfd: OwnedFd,
    },
    /// It had ended before it was looked for.
    Ended,
}

// === impl VmmProcess ===

impl VmmProcess {
    /// The process in a machine's cgroup. Blocks, but never for long.
    ///
    /// # Errors
    /// Where the cgroup can't be read, or the kernel has no pidfds (before 5.3).
    pub(super) fn find(cgroup: &Cgroup) -> Result<Self, CgroupError> {
        let processes = || match cgroup.processes() {
            Err(error) if error.is_not_found() => Ok(Vec::new()),
            processes => processes,
        };
        let Some(pid) = processes()?.first().copied() else {
            return Ok(Self::Ended);
        };
        let opened = i32::try_from(pid)
            .ok()
            .and_then(Pid::from_raw)
            .map(|pid| pidfd_open(pid, PidfdFlags::empty()));
        match opened {
            // A process that is in the cgroup now was not another when it was opened.
            Some(Ok(pidfd)) if processes()?.contains(&pid) => Ok(Self::Found { pid, pidfd }),
            Some(Err(error)) if error != rustix::io::Errno::SRCH => Err(CgroupError::Io {
                operation: "open the process in",
                path: cgroup.path().to_owned(),
                source: error.into(),
            }),
            _ => Ok(Self::Ended),
        }
    }

    /// Its id; 0 once it is known to be gone.
    pub(super) fn pid(&self) -> u32 {
        match self {
            Self::Child(child) => child.id().unwrap_or(0),
            Self::Found { pid, .. } => *pid,
            Self::Ended => 0,
        }
    }

    /// Waits for its end; the status is known of a child alone. May be called again.
    ///
    /// # Errors
    /// Where it can't be waited for.
    pub(super) async fn wait(&mut self) -> io::Result<Option<ExitStatus>> {
        match self {
            Self::Child(child) => child.wait().await.map(Some),
            Self::Found { pidfd, .. } => {
                let own = pidfd.try_clone()?;
                // SAFETY: it is a descriptor of its own, which stays open until it is dropped with what is returned.
                let ended =
                    unsafe { AsyncFd::register_with_interest(own, Interest::READABLE) }.map_err(io::Error::from)?;
                let _ = ended.readable().await?;
                *self = Self::Ended;
                Ok(None)
            }
            Self::Ended => Ok(None),
        }
    }
}
