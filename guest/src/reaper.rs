//! Reaps every child, as PID 1 must, without taking a status from someone who waits for it.
//!
//! All children of this process are started here ([`Reaper::spawn`]) or are orphans that fell to it. Nothing else in
//! the process waits for a child, so one catch-all `waitpid` finds them all: a status that somebody asked for is handed
//! over, any other is dropped. The lock is held from before a child exists until it is known, so that one that ends at
//! once is not mistaken for an orphan.

use std::collections::HashMap;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// With this status.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl Exit {
    /// As shells have it.
    pub(crate) fn status(self) -> i32 {
        match self {
            Self::Code(code) => code,
            Self::Signal(number) => 128 + number,
        }
    }
}

impl std::fmt::Display for Exit {
    /// In the words of Lambda's `Runtime.ExitError`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit status {code}"),
            Self::Signal(libc::SIGKILL) => write!(f, "signal: killed"),
            Self::Signal(number) => match nix::sys::signal::Signal::try_from(*number) {
                Ok(signal) => write!(f, "signal: {}", signal.as_str()),
                Err(_) => write!(f, "signal: {number}"),
            },
        }
    }
}

/// Resolves with the exit of a child.
pub(crate) type Waiting = oneshot::Receiver<Exit>;

type Table = HashMap<i32, oneshot::Sender<Exit>>;

/// The one place that waits for children.
#[derive(Clone, Default)]
pub(crate) struct Reaper(Arc<Mutex<Table>>);

// === impl Reaper ===

impl Reaper {
    /// Starts a child; its exit comes through the second part.
    pub(crate) fn spawn(&self, command: &mut Command) -> std::io::Result<(Pid, Waiting)> {
        let mut table = self.table();
        let child = command.spawn()?;
        let (sender, waiting) = oneshot::channel();
        let pid = child.id() as i32;
        table.insert(pid, sender);
        Ok((Pid::from_raw(pid), waiting))
    }

    /// Asks for the exit of a process that is not yet our child but will fall to us before it can be reaped.
    pub(crate) fn adopt(&self, pid: Pid) -> Waiting {
        let (sender, waiting) = oneshot::channel();
        self.table().insert(pid.as_raw(), sender);
        waiting
    }

    /// Reaps at each SIGCHLD, for ever.
    pub(crate) async fn run(self) -> std::io::Result<()> {
        let mut signals = signal(SignalKind::child())?;
        // Some may have ended before the handler stood.
        self.reap();
        while signals.recv().await.is_some() {
            self.reap();
        }
        Ok(())
    }

    fn reap(&self) {
        let mut table = self.table();
        loop {
            let flags = WaitPidFlag::WNOHANG | WaitPidFlag::__WALL;
            let (pid, exit) = match waitpid(Pid::from_raw(-1), Some(flags)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, Exit::Code(code)),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, Exit::Signal(signal as i32)),
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
                Ok(_) | Err(Errno::EINTR) => continue,
                Err(error) => {
                    tracing::warn!(%error, "waiting for children failed");
                    return;
                }
            };
            if let Some(sender) = table.remove(&pid.as_raw()) {
                // Whoever asked may have lost interest.
                let _ = sender.send(exit);
            }
        }
    }

    fn table(&self) -> std::sync::MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Who reaps all children must not have others' children beside him.
    #[test]
    fn in_a_process_of_its_own() {
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "reaper::tests::hands_each_status_to_who_asked"])
            .status()
            .unwrap();
        assert!(status.success());
    }

    #[ignore = "run by the test above"]
    #[tokio::test(flavor = "current_thread")]
    async fn hands_each_status_to_who_asked() {
        let reaper = Reaper::default();
        tokio::spawn(reaper.clone().run());
        let mut waiting = Vec::new();
        for code in 0..20 {
            let (_, exit) = reaper
                .spawn(Command::new("/bin/sh").args(["-c", &format!("exit {code}")]))
                .unwrap();
            waiting.push((exit, Exit::Code(code)));
        }
        let (_, killed) = reaper
            .spawn(Command::new("/bin/sh").args(["-c", "kill -9 $$"]))
            .unwrap();
        waiting.push((killed, Exit::Signal(9)));
        for (exit, expected) in waiting {
            assert_eq!(exit.await.unwrap(), expected);
        }
        assert!(reaper.table().is_empty());
        assert_eq!(Exit::Signal(9).to_string(), "signal: killed");
        assert_eq!(Exit::Code(1).to_string(), "exit status 1");
        assert_eq!((Exit::Code(3).status(), Exit::Signal(9).status()), (3, 137));
    }
}
