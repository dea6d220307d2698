//! One program of a container, run as a child of its PID 1.

use std::ffi::{CStr, CString, NulError};
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsRawFd as _, BorrowedFd};

use anyhow::Context as _;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, signal, sigprocmask};
use nix::unistd::{ForkResult, Pid, chdir, execve, fork, pipe2, setpgid};

/// What is to be run.
pub(super) struct Program {
    arguments: Vec<CString>,
    environment: Vec<CString>,
    /// None: where this process is.
    folder: Option<&'static CStr>,
}

// === impl Program ===

impl Program {
    /// `environment`: of the form `NAME=value`.
    pub(super) fn new(
        arguments: impl IntoIterator<Item = impl Into<Vec<u8>>>,
        environment: impl IntoIterator<Item = impl Into<Vec<u8>>>,
    ) -> Result<Self, NulError> {
        Ok(Self {
            arguments: arguments.into_iter().map(CString::new).collect::<Result<_, _>>()?,
            environment: environment.into_iter().map(CString::new).collect::<Result<_, _>>()?,
            folder: None,
        })
    }

    /// The same, run in a folder.
    pub(super) fn within(mut self, folder: &'static CStr) -> Self {
        self.folder = Some(folder);
        self
    }

    /// Starts it in a process group of its own. It writes to `output`, or to what this process writes to.
    ///
    /// # Errors
    ///
    /// What is wrong with the program, in words for who made it.
    pub(super) fn start(&self, output: Option<BorrowedFd<'_>>) -> anyhow::Result<Pid> {
        let program = self.arguments.first().context("no program is named")?;
        // Closed by an exec that succeeds.
        let (failure, failed) = pipe2(OFlag::O_CLOEXEC).context("cannot make a pipe")?;
        // SAFETY: until its exec the child calls nothing but what may be called after a fork, and allocates nothing.
        let child = match unsafe { fork() }.context("cannot fork")? {
            ForkResult::Parent { child } => child,
            ForkResult::Child => {
                let errno = self.exec(program, output) as i32;
                // If nobody is there to read it, nobody wants to know.
                let _ = nix::unistd::write(failed, &errno.to_ne_bytes());
                super::pid1::exit(super::pid1::NOT_EXECUTABLE)
            }
        };
        drop(failed);
        let mut errno = [0; 4];
        match File::from(failure).read_exact(&mut errno) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(child),
            told => {
                told.context("cannot hear of a program's start")?;
                let error = io::Error::from_raw_os_error(i32::from_ne_bytes(errno));
                Err(error).with_context(|| format!("cannot run {}", program.to_string_lossy()))
            }
        }
    }

    /// Becomes the program. Returns only where it fails.
    fn exec(&self, program: &CStr, output: Option<BorrowedFd<'_>>) -> Errno {
        let run = || -> nix::Result<std::convert::Infallible> {
            // A signal for it reaches what it started, too.
            setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
            sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
            // Rust programs ignore it; others do not expect that.
            // SAFETY: the default action is no handler of ours.
            unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) }?;
            if let Some(output) = output {
                for standard in [libc::STDOUT_FILENO, libc::STDERR_FILENO] {
                    // SAFETY: integers go in; what was at these places is nobody's in this process.
                    Errno::result(unsafe { libc::dup2(output.as_raw_fd(), standard) })?;
                }
            }
            if let Some(folder) = self.folder {
                chdir(folder)?;
            }
            // Not by way of a shell, as `execvp` does with what is no program.
            execve(program, &self.arguments, &self.environment)
        };
        let Err(errno) = run();
        errno
    }
}
