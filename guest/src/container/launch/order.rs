//! Init's side of a launch.

use std::io::PipeReader;
use std::net::TcpListener;
use std::os::fd::{AsFd as _, OwnedFd};
use std::process::{Command as Program, Stdio};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::Pid;
use serde::de::DeserializeOwned;
use tokio::io::unix::AsyncFd;
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
    channel: Channel,
    _launcher: LauncherProcess,
    exit: Waiting,
}

/// The launcher's process; killed if dropped before it has done its work.
struct LauncherProcess {
    pid: Pid,
    exit: Waiting,
}

struct Channel(AsyncFd<OwnedFd>);

// === impl Launcher ===

impl Launcher {
    /// Starts a launcher, which gets ready while it is not needed.
    pub(crate) fn start(reaper: &Reaper) -> Result<Self, LaunchError> {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .map_err(|errno| LaunchError::Spawn(errno.into()))?;
        let channel = Channel::new(ours).map_err(LaunchError::Spawn)?;
        let (pid, exit) = reaper
            .spawn(
                Program::new("/proc/self/exe")
                    .arg("launch")
                    .env_clear()
                    .stdin(Stdio::from(theirs))
                    .stdout(Stdio::null()),
            )
            .map_err(LaunchError::Spawn)?;
        Ok(Self {
            channel,
            process: LauncherProcess { pid, exit },
        })
    }

    /// Whether its process is there.
    pub(crate) fn is_alive(&mut self) -> bool {
        self.process.is_alive()
    }

    /// Waits until it is ready. The listener of the Runtime API in the network namespace that the container will have, which
    /// does not block.
    pub(crate) async fn ready(&self) -> Result<TcpListener, LaunchError> {
        let (report, listener) = self.channel.receive().await?;
        match (report, listener) {
            (Report::Ready, Some(listener)) => {
                let listener = TcpListener::from(listener);
                listener.set_nonblocking(true).map_err(LaunchError::Talk)?;
                Ok(listener)
            }
            (report, _) => Err(out_of_turn(report)),
        }
    }

    /// Has the container made, up to the moment before its program runs.
    pub(crate) async fn create(self, reaper: &Reaper, order: Order, log: OwnedFd) -> Result<Created, LaunchError> {
        self.channel.send(&Command::Order(order), Some(log))?;
        match self.channel.receive().await?.0 {
            Report::Created(pid) => Ok(Created {
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
        let with = with.as_ref().map(|fd| fd.as_fd());
        wire::send(self.0.get_ref().as_fd(), command, with).map_err(|error| LaunchError::Talk(into_io(error)))
    }

    async fn receive<T: DeserializeOwned>(&self) -> Result<(T, Option<OwnedFd>), LaunchError> {
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
        error => std::io::Error::other(error),
    }
}

fn out_of_turn(report: Report) -> LaunchError {
    match report {
        Report::Failed(why) => LaunchError::Failed(why),
        Report::NotExecutable(why) => LaunchError::NotExecutable(why),
        report => LaunchError::OutOfTurn(format!("{report:?}")),
    }
}
