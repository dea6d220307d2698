//! Init's side of a launch.

use std::io::PipeReader;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::process::{Command as Program, Stdio};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::Pid;
use serde::de::DeserializeOwned;
use tokio::io::unix::AsyncFd;
use tokio::net::TcpListener;
use tokio::sync::oneshot::error::TryRecvError;

use super::wire::{self, WireError};
use super::{Command, Member, Order, Report, pid1};
use crate::reaper::{Exit, Reaper, Waiting};

/// A launcher that takes this long has gone wrong. Generous: hosts may be emulated and busy.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Why there is no container.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LaunchError {
    #[error("cannot start a launcher: {0}")]
    Spawn(#[source] std::io::Error),
    #[error("cannot talk to the launcher: {0}")]
    Talk(#[source] std::io::Error),
    #[error("the launcher did not answer within {0:?}")]
    Timeout(Duration),
    #[error("the launcher answered out of turn: {0}")]
    OutOfTurn(String),
    /// The container could not be made.
    #[error("{0}")]
    Failed(String),
    /// The function's program could not be run.
    #[error("{0}")]
    NotExecutable(String),
}

/// A launcher that waits for its order.
pub(crate) struct Launcher {
    channel: Channel,
    process: LauncherProcess,
}

/// A container that runs, or is to run its external extensions first.
pub(crate) struct Launched {
    pid: Pid,
    exit: Waiting,
    pub(crate) control: Control,
    pub(crate) external: Option<External>,
}

/// External extensions that are there and not yet started.
pub(crate) struct External {
    pub(crate) names: Vec<String>,
    /// What they will write.
    pub(crate) output: PipeReader,
}

/// What PID 1 of a container is told, and tells. Clones are the same.
#[derive(Clone)]
pub(crate) struct Control(Arc<Channel>);

/// A container that is made and not yet running.
pub(crate) struct Created {
    pid: Pid,
    channel: Channel,
    _launcher: LauncherProcess,
    exit: Waiting,
}

/// The launcher's process; killed if dropped before it has done its work.
pub(super) struct LauncherProcess {
    pid: Pid,
    exit: Waiting,
}

/// A socket to a process that was started.
pub(super) struct Channel(AsyncFd<OwnedFd>);

// === impl Launcher ===

impl Launcher {
    /// Starts a launcher, which gets ready while it is not needed.
    pub(crate) fn start(reaper: &Reaper) -> Result<Self, LaunchError> {
        let (channel, process) = LauncherProcess::start(reaper, "launch")?;
        Ok(Self { channel, process })
    }

    /// Whether its process is there.
    pub(crate) fn is_alive(&mut self) -> bool {
        self.process.is_alive()
    }

    /// Waits until it is ready. The listener of the Runtime API in the network namespace that the container will have.
    pub(crate) async fn ready(&self) -> Result<TcpListener, LaunchError> {
        let (report, listener) = self.channel.receive().await?;
        match (report, listener) {
            (Report::Ready, Some(listener)) => {
                let listener = std::net::TcpListener::from(listener);
                listener.set_nonblocking(true).map_err(LaunchError::Talk)?;
                TcpListener::from_std(listener).map_err(LaunchError::Talk)
            }
            (report, _) => Err(out_of_turn(report)),
        }
    }

    /// Has the container made, up to the moment before its program runs.
    pub(crate) async fn create(self, reaper: &Reaper, order: Order, log: OwnedFd) -> Result<Created, LaunchError> {
        self.channel.send(&Command::Order(order), Some(log))?;
        match self.channel.receive().await?.0 {
            Report::Created(pid) => Ok(Created {
                pid: Pid::from_raw(pid),
                exit: reaper.adopt(Pid::from_raw(pid)),
                channel: self.channel,
                _launcher: self.process,
            }),
            report => Err(out_of_turn(report)),
        }
    }
}

// === impl Created ===

impl Created {
    /// Runs the function's program, where there are no external extensions.
    pub(crate) async fn start(self) -> Result<Launched, LaunchError> {
        self.channel.send(&Command::Start, None)?;
        let external = match self.channel.receive().await? {
            (Report::Started, _) => None,
            (Report::Extensions(names), Some(output)) => Some(External {
                names,
                output: output.into(),
            }),
            (report, _) => return Err(out_of_turn(report)),
        };
        Ok(Launched {
            pid: self.pid,
            exit: self.exit,
            control: Control(Arc::new(self.channel)),
            external,
        })
    }
}

// === impl Control ===

impl Control {
    /// Starts external extensions, or then the runtime.
    pub(crate) fn start(&self) {
        self.send(&Command::Start);
    }

    /// Asks the runtime to end.
    pub(crate) fn terminate(&self) {
        self.send(&Command::Terminate);
    }

    /// Sends the image's program a signal.
    pub(crate) fn signal(&self, number: i32) {
        self.send(&Command::Signal(number));
    }

    /// Ends one program.
    pub(crate) fn kill(&self, member: Member) {
        self.send(&Command::Kill(member));
    }

    /// What PID 1 tells next. None: it is gone.
    pub(crate) async fn next(&self) -> Option<Report> {
        self.0.next().await.ok().map(|(report, _)| report)
    }

    fn send(&self, command: &Command) {
        if let Err(error) = self.0.send(command, None) {
            // It has ended.
            tracing::debug!("{error}");
        }
    }
}

// === impl LauncherProcess ===

impl LauncherProcess {
    /// Starts this program once more, to do this.
    pub(super) fn start(reaper: &Reaper, what: &str) -> Result<(Channel, Self), LaunchError> {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .map_err(|errno| LaunchError::Spawn(errno.into()))?;
        let channel = Channel::new(ours).map_err(LaunchError::Spawn)?;
        let (pid, exit) = reaper
            .spawn(
                Program::new("/proc/self/exe")
                    .arg(what)
                    .env_clear()
                    .stdin(Stdio::from(theirs))
                    .stdout(Stdio::null()),
            )
            .map_err(LaunchError::Spawn)?;
        Ok((channel, Self { pid, exit }))
    }

    fn is_alive(&mut self) -> bool {
        matches!(self.exit.try_recv(), Err(TryRecvError::Empty))
    }
}

impl Drop for LauncherProcess {
    fn drop(&mut self) {
        // Once its exit is known the number may belong to another.
        if self.is_alive() {
            let _ = kill(self.pid, Signal::SIGKILL);
        }
    }
}

// === impl Launched ===

impl Launched {
    /// The container's PID 1, as this process's pid namespace numbers it.
    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// Resolves when the container's PID 1 is gone, and with it all others of its pid namespace: how the function ended.
    pub(crate) async fn exit(self) -> Option<Exit> {
        match self.exit.await.ok()? {
            Exit::Code(status) => Some(exit_of(status)),
            killed @ Exit::Signal(_) => Some(killed),
        }
    }
}

// === impl Channel ===

impl Channel {
    fn new(socket: OwnedFd) -> std::io::Result<Self> {
        let flags = nix::fcntl::OFlag::O_NONBLOCK;
        nix::fcntl::fcntl(&socket, nix::fcntl::FcntlArg::F_SETFL(flags))?;
        // SAFETY: an `OwnedFd` is a descriptor that stays open, and the same, as long as it lives.
        Ok(Self(unsafe { AsyncFd::register(socket) }?))
    }

    fn send(&self, command: &Command, with: Option<OwnedFd>) -> Result<(), LaunchError> {
        self.send_all(command, with.as_ref().map(|fd| fd.as_fd()).as_slice())
    }

    pub(super) fn send_all(&self, command: &Command, with: &[BorrowedFd<'_>]) -> Result<(), LaunchError> {
        wire::send_all(self.0.get_ref().as_fd(), command, with).map_err(|error| LaunchError::Talk(into_io(error)))
    }

    pub(super) async fn receive<T: DeserializeOwned>(&self) -> Result<(T, Option<OwnedFd>), LaunchError> {
        tokio::time::timeout(TIMEOUT, self.next())
            .await
            .map_err(|_| LaunchError::Timeout(TIMEOUT))?
            .map_err(LaunchError::Talk)
    }

    async fn next<T: DeserializeOwned>(&self) -> std::io::Result<(T, Option<OwnedFd>)> {
        loop {
            let mut ready = self.0.readable().await?;
            let received = ready.try_io(|socket| wire::receive(socket.get_ref().as_fd()).map_err(into_io));
            if let Ok(received) = received {
                return received;
            }
        }
    }
}

/// The end that PID 1 tells of by a status as shells have it.
pub(crate) fn exit_of(status: i32) -> Exit {
    pid1::signal_of(status).map_or(Exit::Code(status), Exit::Signal)
}

fn into_io(error: WireError) -> std::io::Error {
    match error {
        WireError::Socket(errno) => errno.into(),
        closed @ WireError::Closed => std::io::Error::new(std::io::ErrorKind::UnexpectedEof, closed),
        error => std::io::Error::other(error),
    }
}

pub(super) fn out_of_turn(report: Report) -> LaunchError {
    match report {
        Report::Failed(why) => LaunchError::Failed(why),
        Report::NotExecutable(why) => LaunchError::NotExecutable(why),
        report => LaunchError::OutOfTurn(format!("{report:?}")),
    }
}
