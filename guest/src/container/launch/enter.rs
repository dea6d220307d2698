//! A process with one thread, `stoker-init enter`, that joins a container to run a program beside the image's. Its standard input is
//! the socket to init.
//!
//! Not by `libcontainer`'s tenants: these want the state that it keeps of a container, which lies in the container's own mount
//! namespace, want a socket beside it to be told to start, and know neither the container's users nor system call filters
//! without a C library.

use std::convert::Infallible;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, fchown};

use anyhow::Context as _;
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::stat::makedev;
use nix::unistd::{ForkResult, chdir, fork, pipe2, setsid};
use seccompiler::BpfProgram;
use stoker_linux::users::{self, User};

use super::confine::confine;
use super::executor::is_inside;
use super::pid1::exit;
use super::program::{Program, status_of};
use super::wire::{self, WireError};
use super::{As, Command, Entry, Report};
use crate::boot::precedence;
use crate::container::seccomp::{self, Of};
use crate::container::spec::{IMAGE_OPEN_FILES, OOM_SCORE};

/// Status of what can't be run for another reason than that it is not there, as shells have it.
const NOT_RUN: i32 = 126;

/// What the child needs to become the program.
struct Child {
    entry: Entry,
    /// Standard input, output and error.
    ends: [OwnedFd; 3],
    cgroup: File,
    filter: BpfProgram,
    program: Program,
    /// To init.
    socket: OwnedFd,
    /// Tells when it may begin, by a byte.
    start: File,
}

/// Starts one program and ends. Its exit status means nothing: init is told by message.
pub(crate) fn run() {
    precedence::ordinary();
    let entered = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .context("cannot duplicate a socket")
        .and_then(enter);
    match entered {
        Ok(()) => {}
        // Init is gone, or wants the program no more.
        Err(error) if matches!(error.downcast_ref(), Some(WireError::Closed)) => {}
        Err(error) => {
            let report = match error.downcast::<NoUser>() {
                Ok(NoUser(why)) => Report::NoUser(why),
                Err(error) => Report::Failed(format!("{error:#}")),
            };
            let _ = wire::send(std::io::stdin(), &report, None);
        }
    }
}

/// The user that was named can't be known.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct NoUser(String);

fn enter(socket: OwnedFd) -> anyhow::Result<()> {
    let (Command::Enter(entry), descriptors) = wire::receive_all(&socket)? else {
        anyhow::bail!("init gave no order");
    };
    let mut descriptors = descriptors.into_iter();
    let container = descriptors.next().context("init named no container")?;
    let pipes: Vec<OwnedFd> = descriptors.collect();
    let filter = seccomp::filter(Of::Image).context("cannot compile the system call filter")?;
    // What is init's is none of the container's business.
    let _ = prctl::set_dumpable(false);
    std::fs::write("/proc/self/oom_score_adj", OOM_SCORE.to_string()).context("cannot be made the first to go")?;
    for (resource, (soft, hard)) in [
        (Resource::RLIMIT_NOFILE, IMAGE_OPEN_FILES),
        (Resource::RLIMIT_CORE, (0, 0)),
    ] {
        setrlimit(resource, soft, hard).context("cannot set limits")?;
    }
    // Opened out here, where it is.
    let cgroup = File::options().write(true).open(&entry.cgroup);
    let cgroup = cgroup.with_context(|| format!("cannot open {}", entry.cgroup.display()))?;
    let namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP;
    setns(&container, namespaces).context("cannot join the container")?;
    drop(container);
    // From here on paths are the container's, which is hostile.
    let mut environment = entry.environment.clone();
    let user = match &entry.user {
        As::Known(user) => user.clone(),
        As::Named { user, home } => {
            let found = user_named(&File::open("/").context("cannot open the root")?, user)
                .map_err(|error| NoUser(format!("{error:#}")))?;
            if *home {
                environment.push(format!("HOME={}", found.home));
            }
            found
        }
    };
    let ends = match entry.terminal {
        Some(size) => {
            let (ours, theirs) = terminal(size, user.uid).context("cannot make a terminal")?;
            wire::send(&socket, &Report::Terminal, Some(ours.as_fd()))?;
            let more = || theirs.try_clone().context("cannot duplicate a terminal");
            [more()?, more()?, theirs]
        }
        None => <[OwnedFd; 3]>::try_from(pipes)
            .ok()
            .context("init gave no input and output")?,
    };
    let program = Program::new(entry.command.iter().map(String::as_bytes), environment)?
        .with_user(&user)
        .found_by_path();
    let (start, started) = pipe2(OFlag::O_CLOEXEC).context("cannot make a pipe")?;
    let child = Child {
        entry,
        ends,
        cgroup,
        filter,
        program,
        socket: socket.try_clone().context("cannot duplicate a socket")?,
        start: start.into(),
    };
    // SAFETY: this process has one thread, so that the child may do all that it might.
    match unsafe { fork() }.context("the container has ended")? {
        ForkResult::Child => {
            drop(started);
            child.run()
        }
        ForkResult::Parent { child: pid } => {
            drop(child);
            wire::send(&socket, &Report::Created(pid.as_raw()), None)?;
            let (Command::Start, _) = wire::receive(&socket)? else {
                anyhow::bail!("init did not say to start");
            };
            // It may have been killed meanwhile, which init sees.
            let _ = File::from(started).write_all(&[0]);
            Ok(())
        }
    }
}

// === impl Child ===

impl Child {
    fn run(mut self) -> ! {
        let (why, status) = match self.start() {
            Ok(Err(errno)) => (self.program.not_run(errno), status_of(errno)),
            Err(why) => (why, NOT_RUN),
        };
        let _ = wire::send(&self.socket, &Report::NotExecutable(format!("{why:#}")), None);
        exit(status)
    }

    /// Becomes the program, or tells what is wrong with it.
    fn start(&mut self) -> anyhow::Result<Result<Infallible, Errno>> {
        self.cgroup.write_all(b"0").context("cannot enter its cgroup")?;
        if self.start.read_exact(&mut [0]).is_err() {
            // Nobody wants it any more.
            exit(NOT_RUN)
        }
        setsid().context("cannot make a session")?;
        if self.entry.terminal.is_some() {
            // SAFETY: integers go in.
            let taken = unsafe { libc::ioctl(self.ends[0].as_raw_fd(), libc::TIOCSCTTY, 0) };
            Errno::result(taken).context("cannot take its terminal")?;
        }
        for (end, standard) in self.ends.iter().zip(0..) {
            // SAFETY: integers go in; what was at these places is the socket, of which there is another descriptor, and nobody's.
            Errno::result(unsafe { libc::dup2(end.as_raw_fd(), standard) })
                .context("cannot set its input and output")?;
        }
        let folder = self.entry.working_dir.as_str();
        chdir(folder).with_context(|| format!("cannot work in {folder}"))?;
        is_inside()?;
        confine(&self.filter)?;
        Ok(self.program.replace())
    }
}

/// Finds a user by the files of a root file system that is somebody else's.
fn user_named(root: &File, user: &str) -> anyhow::Result<User> {
    let passwd = read(root, "etc/passwd")?;
    let group = read(root, "etc/group")?;
    Ok(users::look_up(user, &passwd, &group)?)
}

/// Reads a file of a root file system that is somebody else's: nowhere else, nothing but a file, and not without end. One that is not
/// there is empty.
fn read(root: &File, path: &str) -> anyhow::Result<Vec<u8>> {
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let file = match openat2(root, path, how) {
        Ok(file) => File::from(file),
        Err(Errno::ENOENT) => return Ok(Vec::new()),
        Err(errno) => return Err(errno).with_context(|| format!("cannot open its /{path}")),
    };
    let found = file.metadata().with_context(|| format!("cannot look at its /{path}"))?;
    anyhow::ensure!(found.is_file(), "its /{path} is no file");
    let mut content = Vec::new();
    let read = file.take(users::FILE_BYTES + 1).read_to_end(&mut content);
    let length = read.with_context(|| format!("cannot read its /{path}"))?;
    anyhow::ensure!(
        length as u64 <= users::FILE_BYTES,
        "its /{path} has more than {} KiB",
        users::FILE_BYTES >> 10
    );
    Ok(content)
}

/// A terminal of the container's, for this user: init's end and the program's.
fn terminal((columns, rows): (u16, u16), uid: u32) -> anyhow::Result<(OwnedFd, OwnedFd)> {
    // Not `/dev/ptmx`, in whose place a container can put what it likes.
    let ours = File::options().read(true).write(true).open("/dev/pts/ptmx")?;
    let found = ours.metadata()?;
    anyhow::ensure!(
        found.file_type().is_char_device() && found.rdev() == makedev(5, 2),
        "/dev/pts/ptmx of the container makes none"
    );
    let size = libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let locked: libc::c_int = 0;
    // SAFETY: each call reads one value of the kind that it is to be given, which is there for the time of the call.
    unsafe {
        Errno::result(libc::ioctl(ours.as_raw_fd(), libc::TIOCSPTLCK, &raw const locked))?;
        Errno::result(libc::ioctl(ours.as_raw_fd(), libc::TIOCSWINSZ, &raw const size))?;
    }
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    // SAFETY: integers go in, and a descriptor comes out that nobody else knows of.
    let theirs = unsafe {
        let theirs = Errno::result(libc::ioctl(ours.as_raw_fd(), libc::TIOCGPTPEER, flags.bits()))?;
        OwnedFd::from_raw_fd(theirs)
    };
    fchown(&theirs, Some(uid), None)?;
    Ok((ours.into(), theirs))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    /// A root file system with this `/etc/passwd` or a link there.
    fn root(passwd: Result<&[u8], &str>) -> (tempfile::TempDir, File) {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("etc")).unwrap();
        let path = folder.path().join("etc/passwd");
        match passwd {
            Ok(content) => fs::write(path, content).unwrap(),
            Err(target) => symlink(target, path).unwrap(),
        }
        let root = File::open(folder.path()).unwrap();
        (folder, root)
    }

    fn refused(root: &File) -> String {
        format!("{:#}", user_named(root, "web").unwrap_err())
    }

    #[test]
    fn users_are_those_of_the_root_file_system() {
        let (folder, root) = root(Ok(b"web:x:101:102::/srv:/bin/sh\n"));
        fs::write(folder.path().join("etc/group"), "log:x:4:web\n").unwrap();
        let user = user_named(&root, "web").unwrap();
        assert_eq!(
            (user.uid, user.gid, user.groups, user.home.as_str()),
            (101, 102, vec![4], "/srv")
        );
        assert!(format!("{:#}", user_named(&root, "nobody").unwrap_err()).contains("nobody"));
        let (_folder, empty) = super::tests::root(Ok(b""));
        assert_eq!(user_named(&empty, "7:8").unwrap().gid, 8);
    }

    #[test]
    fn links_do_not_lead_out() {
        // This machine's own has a user of that name nowhere but there.
        let (folder, root) = root(Err("/../../users"));
        fs::write(folder.path().join("users"), "web:x:5:6::/:\n").unwrap();
        assert_eq!(user_named(&root, "web").unwrap().uid, 5);
        for target in ["/etc/passwd", "passwd", "/proc/self/fd/0", "/etc"] {
            let (_folder, root) = super::tests::root(Err(target));
            let why = refused(&root);
            assert!(why.contains("/etc/passwd"), "{target}: {why}");
        }
    }

    #[test]
    fn what_never_ends_is_not_read() {
        let (folder, root) = root(Err("fifo"));
        nix::unistd::mkfifo(&folder.path().join("etc/fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(refused(&root).contains("is no file"));
        let (_folder, large) = super::tests::root(Ok(&vec![b'\n'; (1 << 20) + 1]));
        assert!(refused(&large).contains("more than 1024 KiB"));
        // A file that has a terabyte where nothing was written.
        let (folder, sparse) = super::tests::root(Ok(b""));
        let file = File::options()
            .write(true)
            .open(folder.path().join("etc/passwd"))
            .unwrap();
        file.set_len(1 << 40).unwrap();
        assert!(refused(&sparse).contains("more than 1024 KiB"));
    }
}
