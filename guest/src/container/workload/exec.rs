//! Programs that run beside the image's, each as long as somebody wants it.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::Pid;
use stoker_linux::CgroupError;
use stoker_proto::limits::EXECS;
use tokio::io::Interest;
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};
use tokio::sync::OwnedSemaphorePermit;

use super::{NotRunning, Running, Workload};
use crate::budget::Budget;
use crate::container::cgroup::HeldCgroup;
use crate::container::environment;
use crate::container::launch::{self, As, EnterError, Entered, Entry};
use crate::reaper::{Exit, Waiting};

/// What is read at a time, in bytes. Nothing is kept while nothing is read.
const CHUNK: usize = 32 << 10;
/// What ends input at a terminal (VEOF of termios(3), as it is by default).
pub(crate) const END_OF_INPUT: u8 = 4;

/// A program to be run.
#[derive(Debug, Default)]
pub(crate) struct Exec {
    pub(crate) command: Vec<String>,
    /// Beside what the image's program has.
    pub(crate) environment: Vec<(String, String)>,
    /// As the image's program has it where empty.
    pub(crate) working_dir: String,
    /// `USER[:GROUP]`; the image's where empty.
    pub(crate) user: String,
    /// Columns and rows of its terminal, where it has one.
    pub(crate) terminal: Option<(u16, u16)>,
}

/// Why it is not run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExecError {
    #[error(transparent)]
    NotRunning(#[from] NotRunning),
    #[error("{EXECS} programs run beside the image's, as many as may")]
    TooMany,
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Enter(#[from] EnterError),
    #[error("cannot make or watch a pipe: {0}")]
    Pipe(#[source] io::Error),
}

/// One that runs. When this is dropped it ends, with all that it has started.
pub(crate) struct Process {
    pid: Pid,
    exit: Waiting,
    /// Why it could not be run, where that is so: it exits at once.
    pub(crate) not_run: Option<String>,
    pub(crate) input: Input,
    /// What it writes; with a terminal all of it.
    pub(crate) stdout: Arc<End>,
    pub(crate) stderr: Option<Arc<End>>,
    pub(crate) budget: Budget,
    _cgroup: HeldCgroup,
    _place: OwnedSemaphorePermit,
}

/// Where its input goes.
pub(crate) enum Input {
    /// None once the program takes no more.
    Pipe(Option<End>),
    Terminal(Arc<End>),
}

/// This process's end of a pipe or terminal.
pub(crate) struct End(AsyncFd<OwnedFd>);

/// What is there to be read.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Read {
    Some(Bytes),
    /// Not now.
    Nothing,
    /// Never again.
    End,
}

/// The ends of a program without a terminal: its own, and ours of its input, output and error.
type Pipes = ([OwnedFd; 3], End, End, End);

// === impl Workload ===

impl Workload {
    /// Runs a program in the container.
    pub(crate) async fn exec(&self, exec: Exec) -> Result<Process, ExecError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let running = self.running()?;
        let place = Arc::clone(&running.execs)
            .try_acquire_owned()
            .map_err(|_| ExecError::TooMany)?;
        let name = format!("exec-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let cgroup = running.cgroup.part(&name)?;
        let terminal = exec.terminal.is_some();
        let entry = entry(&running, exec, &cgroup);
        let pipes = if terminal { None } else { Some(pipes()?) };
        let (theirs, ours) = match pipes {
            Some((theirs, stdin, stdout, stderr)) => (Some(theirs), Some((stdin, stdout, stderr))),
            None => (None, None),
        };
        let reaper = self.0.containers.reaper();
        let entered = match launch::enter_with(reaper, running.pidfd.as_fd(), entry, theirs).await {
            Ok(entered) => entered,
            // Where the container ended meanwhile, that is why.
            Err(error) => return Err(self.running().err().map_or(error.into(), ExecError::NotRunning)),
        };
        let Entered {
            pid,
            exit,
            terminal,
            not_run,
        } = entered;
        let (input, stdout, stderr) = match (ours, terminal) {
            (Some((stdin, stdout, stderr)), _) => (Input::Pipe(Some(stdin)), Arc::new(stdout), Some(Arc::new(stderr))),
            (None, Some(terminal)) => {
                let terminal = End::new(terminal, Interest::READABLE | Interest::WRITABLE)?;
                let terminal = Arc::new(terminal);
                (Input::Terminal(Arc::clone(&terminal)), terminal, None)
            }
            (None, None) => return Err(ExecError::Pipe(io::ErrorKind::NotFound.into())),
        };
        Ok(Process {
            pid,
            exit,
            not_run,
            input,
            stdout,
            stderr,
            budget: running.subject.budget().clone(),
            _cgroup: cgroup,
            _place: place,
        })
    }
}

fn entry(running: &Running, exec: Exec, cgroup: &HeldCgroup) -> Entry {
    let program = &running.program;
    let named = !exec.user.is_empty();
    let mut variables: Vec<String> = program
        .environment
        .iter()
        // The last one that is added is the one that counts; nobody is to find another.
        .filter(|variable| !exec.environment.iter().any(|(name, _)| environment::is(variable, name)))
        // Somebody else's.
        .filter(|variable| !named || running.has_home || !environment::is(variable, "HOME"))
        .cloned()
        .collect();
    variables.extend(exec.environment.iter().map(|(name, value)| format!("{name}={value}")));
    if exec.terminal.is_some() && !environment::has(&variables, "TERM") {
        variables.push("TERM=xterm".to_owned());
    }
    let home = !environment::has(&variables, "HOME");
    Entry {
        cgroup: cgroup.procs(),
        command: exec.command,
        working_dir: if exec.working_dir.is_empty() {
            program.working_dir.clone()
        } else {
            exec.working_dir
        },
        user: if named {
            As::Named { user: exec.user, home }
        } else {
            As::Known(program.user.clone())
        },
        terminal: exec.terminal,
        environment: variables,
    }
}

fn pipes() -> Result<Pipes, ExecError> {
    let (stdin, to_stdin) = io::pipe().map_err(ExecError::Pipe)?;
    let (of_stdout, stdout) = io::pipe().map_err(ExecError::Pipe)?;
    let (of_stderr, stderr) = io::pipe().map_err(ExecError::Pipe)?;
    Ok((
        [stdin.into(), stdout.into(), stderr.into()],
        End::new(to_stdin.into(), Interest::WRITABLE)?,
        End::new(of_stdout.into(), Interest::READABLE)?,
        End::new(of_stderr.into(), Interest::READABLE)?,
    ))
}

// === impl Process ===

impl Process {
    /// Resolves when it has ended; what it wrote is there by then.
    pub(crate) async fn exited(&mut self) -> Exit {
        match (&mut self.exit).await {
            Ok(exit) => exit,
            // Who reaps lives as long as this process.
            Err(_) => std::future::pending().await,
        }
    }

    /// Its own until [`exited`](Self::exited) has told of its end.
    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }
}

/// Sends a signal to a child of this process that was not reaped yet.
pub(crate) fn signal(pid: Pid, number: i32) {
    // Not by `nix`, which knows no real-time signals.
    // SAFETY: integers go in.
    unsafe { libc::kill(pid.as_raw(), number) };
}

// === impl Input ===

impl Input {
    /// Writes all of it, as the program takes it. One that takes no more has no need of it.
    pub(crate) async fn write(&mut self, data: &[u8]) {
        let written = match self {
            Self::Pipe(Some(end)) => end.write_all(data).await,
            Self::Pipe(None) => return,
            Self::Terminal(terminal) => terminal.write_all(data).await,
        };
        if written.is_err()
            && let Self::Pipe(end) = self
        {
            *end = None;
        }
    }

    /// The terminal that it is typed at, where there is one.
    pub(crate) fn terminal(&self) -> Option<Arc<End>> {
        match self {
            Self::Pipe(_) => None,
            Self::Terminal(terminal) => Some(Arc::clone(terminal)),
        }
    }
}

// === impl End ===

impl End {
    pub(crate) fn new(end: OwnedFd, interest: Interest) -> Result<Self, ExecError> {
        fcntl(&end, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(|errno| ExecError::Pipe(errno.into()))?;
        // SAFETY: an `OwnedFd` is a descriptor that stays open, and the same, as long as it lives.
        let end = unsafe { AsyncFd::register_with_interest(end, interest) };
        end.map(Self).map_err(|error| ExecError::Pipe(error.into()))
    }

    /// A terminal's columns and rows are others.
    pub(crate) fn resize(&self, (columns, rows): (u16, u16)) {
        let size = libc::winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: the call reads a `winsize`, which `size` is for the time of the call.
        let done = unsafe { libc::ioctl(self.0.get_ref().as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
        if let Err(error) = Errno::result(done) {
            tracing::debug!("cannot resize a terminal: {error}");
        }
    }

    /// Resolves when there may be something to be read.
    pub(crate) async fn readable(&self) -> io::Result<AsyncFdReadyGuard<'_, OwnedFd>> {
        self.0.readable().await
    }

    /// Reads what is there after that, or finds that there was nothing.
    pub(crate) fn read_ready(ready: &mut AsyncFdReadyGuard<'_, OwnedFd>) -> Read {
        match ready.try_io(|end| read(end.get_ref())) {
            Ok(read) => read.unwrap_or(Read::End),
            Err(_) => Read::Nothing,
        }
    }

    /// Reads what is there.
    pub(crate) fn read_now(&self) -> Read {
        match read(self.0.get_ref()) {
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Read::Nothing,
            Err(_) => Read::End,
        }
    }

    async fn write_all(&self, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            let mut ready = self.0.writable().await?;
            if let Ok(written) = ready.try_io(|end| Ok(nix::unistd::write(end.get_ref(), data)?)) {
                data = data.get(written?..).unwrap_or_default();
            }
        }
        Ok(())
    }
}

fn read(end: &OwnedFd) -> io::Result<Read> {
    let mut chunk = [0; CHUNK];
    loop {
        return match nix::unistd::read(end, &mut chunk) {
            // What a terminal says where nobody has it open any more.
            Ok(0) | Err(Errno::EIO) => Ok(Read::End),
            Ok(length) => Ok(Read::Some(Bytes::copy_from_slice(
                chunk.get(..length).unwrap_or_default(),
            ))),
            Err(Errno::EINTR) => continue,
            Err(errno) => Err(errno.into()),
        };
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[tokio::test]
    async fn ends_are_read_as_something_comes() {
        let (reader, mut writer) = io::pipe().unwrap();
        let end = End::new(reader.into(), Interest::READABLE).unwrap();
        assert_eq!(end.read_now(), Read::Nothing);
        writer.write_all(b"one").unwrap();
        let mut ready = end.readable().await.unwrap();
        assert_eq!(End::read_ready(&mut ready), Read::Some(Bytes::from_static(b"one")));
        assert_eq!(End::read_ready(&mut ready), Read::Nothing);
        drop(ready);
        writer.write_all(&[b'x'; CHUNK + 1]).unwrap();
        drop(writer);
        assert!(matches!(end.read_now(), Read::Some(bytes) if bytes.len() == CHUNK));
        assert!(matches!(end.read_now(), Read::Some(bytes) if bytes.len() == 1));
        assert_eq!(end.read_now(), Read::End);
    }

    #[tokio::test]
    async fn who_takes_no_more_is_not_waited_for() {
        let (reader, writer) = io::pipe().unwrap();
        let mut input = Input::Pipe(Some(End::new(writer.into(), Interest::WRITABLE).unwrap()));
        let large = vec![b'x'; 1 << 20];
        // More than a pipe holds: it waits until somebody reads.
        let reading = std::thread::spawn(move || io::read_to_string(reader).unwrap().len());
        input.write(&large).await;
        drop(input);
        assert_eq!(reading.join().unwrap(), large.len());
        let (reader, writer) = io::pipe().unwrap();
        let mut input = Input::Pipe(Some(End::new(writer.into(), Interest::WRITABLE).unwrap()));
        drop(reader);
        input.write(&large).await;
        assert!(matches!(input, Input::Pipe(None)));
    }
}
