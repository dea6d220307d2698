//! Init's side of running another program in a container.

use std::io::ErrorKind;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use nix::unistd::Pid;

use super::order::{Channel, LauncherProcess, out_of_turn};
use super::{Command, Entry, LaunchError, Report};
use crate::reaper::{Reaper, Waiting};

/// Why the program was not started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EnterError {
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// There is no such user.
    #[error("{0}")]
    NoUser(String),
}

/// A program that was started.
pub(crate) struct Entered {
    pub(crate) pid: Pid,
    pub(crate) exit: Waiting,
    /// Init's end of its terminal, where it has one.
    pub(crate) terminal: Option<OwnedFd>,
    /// Why it could not be run, where that is so; the exit tells the status.
    pub(crate) not_run: Option<String>,
}

/// Has a program run in the container whose PID 1 has this pidfd, with `ends` as standard input, output and error where it has no
/// terminal. Where this is given up there is no program, or it is in the cgroup that the entry names.
pub(crate) async fn enter(
    reaper: &Reaper,
    container: BorrowedFd<'_>,
    entry: Entry,
    ends: Option<[OwnedFd; 3]>,
) -> Result<Entered, EnterError> {
    let (channel, _process) = LauncherProcess::start(reaper, "enter")?;
    let descriptors: Vec<BorrowedFd<'_>> = std::iter::once(container)
        .chain(ends.iter().flatten().map(|end| end.as_fd()))
        .collect();
    channel.send_all(&Command::Enter(entry), &descriptors)?;
    drop(descriptors);
    // Else nobody would see the end of what the program writes.
    drop(ends);
    let mut terminal = None;
    let pid = loop {
        match channel.receive().await? {
            (Report::Terminal, Some(end)) => terminal = Some(end),
            (Report::Created(pid), _) => break Pid::from_raw(pid),
            (Report::NoUser(why), _) => return Err(EnterError::NoUser(why)),
            (report, _) => return Err(out_of_turn(report).into()),
        }
    };
    // Its parent waits, so that it can't have been reaped.
    let exit = reaper.adopt(pid);
    channel.send_all(&Command::Start, &[])?;
    let not_run = not_run(&channel).await?;
    Ok(Entered {
        pid,
        exit,
        terminal,
        not_run,
    })
}

/// Why the program was not run, if it was not. Both ends of the socket close when it is.
async fn not_run(channel: &Channel) -> Result<Option<String>, LaunchError> {
    match channel.receive().await {
        Ok((Report::NotExecutable(why), _)) => Ok(Some(why)),
        Ok((report, _)) => Err(out_of_turn(report)),
        Err(LaunchError::Talk(error)) if is_closed(error.kind()) => Ok(None),
        Err(error) => Err(error),
    }
}

fn is_closed(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset)
}
