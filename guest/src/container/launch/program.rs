//! One program of a container, run as a child of its PID 1, or in place of a process that has entered the container.

use std::convert::Infallible;
use std::ffi::{CStr, CString, NulError};
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsRawFd as _, BorrowedFd};

use anyhow::Context as _;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, signal, sigprocmask};
use nix::unistd::{ForkResult, Gid, Pid, Uid, chdir, execve, fork, pipe2, setgroups, setpgid, setresgid, setresuid};
use stoker_linux::users::User;

/// What is to be run.
pub(super) struct Program {
    /// Where it may be: the first that can be run is.
    paths: Vec<CString>,
    arguments: Vec<CString>,
    environment: Vec<CString>,
    /// None: where this process is.
    folder: Option<&'static CStr>,
    /// None: as this process.
    user: Option<Ids>,
}

struct Ids {
    uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
}

// === impl Program ===

impl Program {
    /// `environment`: of the form `NAME=value`.
    pub(super) fn new(
        arguments: impl IntoIterator<Item = impl Into<Vec<u8>>>,
        environment: impl IntoIterator<Item = impl Into<Vec<u8>>>,
    ) -> Result<Self, NulError> {
        let arguments: Vec<CString> = arguments.into_iter().map(CString::new).collect::<Result<_, _>>()?;
        Ok(Self {
            paths: arguments.first().cloned().into_iter().collect(),
            arguments,
            environment: environment.into_iter().map(CString::new).collect::<Result<_, _>>()?,
            folder: None,
            user: None,
        })
    }

    /// The same, run in a folder.
    pub(super) fn within(mut self, folder: &'static CStr) -> Self {
        self.folder = Some(folder);
        self
    }

    /// The same, run as this user.
    pub(super) fn with_user(mut self, user: &User) -> Self {
        self.user = Some(Ids {
            uid: Uid::from_raw(user.uid),
            gid: Gid::from_raw(user.gid),
            groups: user.groups.iter().copied().map(Gid::from_raw).collect(),
        });
        self
    }

    /// The same, found by `PATH` of its environment where its name has no `/`, as execvp(3) does.
    pub(super) fn found_by_path(mut self) -> Self {
        let Some(name) = self.arguments.first().map(|name| name.as_bytes()) else {
            return self;
        };
        if !name.contains(&b'/') && !name.is_empty() {
            let path = self
                .environment
                .iter()
                .rev()
                .find_map(|variable| variable.as_bytes().strip_prefix(b"PATH="));
            let folders = path.unwrap_or_default().split(|byte| *byte == b':');
            // An empty one is where the program runs.
            let in_folder = |folder: &[u8]| match folder {
                [] => [b"./".as_slice(), name].concat(),
                folder => [folder, b"/", name].concat(),
            };
            self.paths = folders
                .filter_map(|folder| CString::new(in_folder(folder)).ok())
                .collect();
        }
        self
    }

    /// Starts it in a process group of its own. It writes to `output`, or to what this process writes to.
    ///
    /// # Errors
    ///
    /// What is wrong with the program, in words for who made it.
    pub(super) fn start(&self, output: Option<BorrowedFd<'_>>) -> anyhow::Result<Pid> {
        // Closed by an exec that succeeds.
        let (failure, failed) = pipe2(OFlag::O_CLOEXEC).context("cannot make a pipe")?;
        // SAFETY: until its exec the child calls nothing but what may be called after a fork, and allocates nothing.
        let child = match unsafe { fork() }.context("cannot fork")? {
            ForkResult::Parent { child } => child,
            ForkResult::Child => {
                let errno = self.exec(output) as i32;
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
                Err(self.not_run(Errno::from_raw(i32::from_ne_bytes(errno))))
            }
        }
    }

    /// What is wrong with it, where it could not be run for this.
    pub(super) fn not_run(&self, errno: Errno) -> anyhow::Error {
        let name = self.arguments.first().map(|name| name.to_string_lossy());
        anyhow::Error::new(io::Error::from(errno)).context(format!("cannot run {}", name.unwrap_or_default()))
    }

    /// Becomes the program, in a process group of its own. Returns only where it fails.
    fn exec(&self, output: Option<BorrowedFd<'_>>) -> Errno {
        let run = || -> nix::Result<Infallible> {
            // A signal for it reaches what it started, too.
            setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
            if let Some(output) = output {
                for standard in [libc::STDOUT_FILENO, libc::STDERR_FILENO] {
                    // SAFETY: integers go in; what was at these places is nobody's in this process.
                    Errno::result(unsafe { libc::dup2(output.as_raw_fd(), standard) })?;
                }
            }
            self.replace()
        };
        let Err(errno) = run();
        errno
    }

    /// Puts the program in the place of this one. Returns only where it fails.
    pub(super) fn replace(&self) -> nix::Result<Infallible> {
        sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
        // Rust programs ignore it; others do not expect that.
        // SAFETY: the default action is no handler of ours.
        unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) }?;
        if let Some(folder) = self.folder {
            chdir(folder)?;
        }
        if let Some(Ids { uid, gid, groups }) = &self.user {
            setgroups(groups)?;
            setresgid(*gid, *gid, *gid)?;
            // Who is not root any more has no capability any more.
            setresuid(*uid, *uid, *uid)?;
        }
        let mut why = Errno::ENOENT;
        for path in &self.paths {
            // Not by way of a shell, as `execvp` does with what is no program.
            let Err(errno) = execve(path, &self.arguments, &self.environment);
            match errno {
                Errno::ENOENT | Errno::ENOTDIR => {}
                // What may not be run here may be found elsewhere.
                Errno::EACCES => why = errno,
                errno => return Err(errno),
            }
        }
        Err(why)
    }
}

/// The exit status of who can't run a program for this, as shells have it: 127 where there is none, else 126.
pub(super) fn status_of(errno: Errno) -> i32 {
    match errno {
        Errno::ENOENT | Errno::ENOTDIR => super::pid1::NOT_EXECUTABLE,
        _ => super::pid1::NOT_EXECUTABLE - 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(name: &str, environment: &[&str]) -> Vec<String> {
        let program = Program::new([name], environment.iter().copied())
            .unwrap()
            .found_by_path();
        let paths = program.paths.into_iter();
        paths.map(|path| path.into_string().unwrap()).collect()
    }

    #[test]
    fn programs_are_found_by_path() {
        assert_eq!(paths("sh", &["A=b", "PATH=/bin:/usr/bin"]), ["/bin/sh", "/usr/bin/sh"]);
        // The last counts, as in what runs it; an empty folder is the one where it runs.
        assert_eq!(paths("sh", &["PATH=/no", "PATH=/bin:"]), ["/bin/sh", "./sh"]);
        for name in ["/bin/sh", "./sh", "bin/sh"] {
            assert_eq!(paths(name, &["PATH=/no"]), [name]);
        }
        assert_eq!(paths("sh", &["PATHS=/bin"]), ["./sh"]);
        assert_eq!(paths("", &["PATH=/bin"]), [""]);
        assert!(Program::new(["a\0b"], [""]).is_err());
    }

    #[test]
    fn statuses_are_as_shells_have_them() {
        assert_eq!(
            [Errno::ENOENT, Errno::ENOTDIR, Errno::EACCES, Errno::ENOEXEC].map(status_of),
            [127, 127, 126, 126]
        );
    }
}
