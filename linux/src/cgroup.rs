//! Cgroups v2 (cgroup-v2.rst in the kernel's documentation).

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// The kernel's default period of CPU limits (`cpu.max`), in us.
pub const CPU_PERIOD_US: u64 = 100_000;

/// How long the kernel may take to end the processes of a cgroup that was killed.
pub const KILL_LIMIT: Duration = Duration::from_secs(10);

/// Why a cgroup could not be used.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// There is no cgroup v2 on this host.
    #[error(
        "no cgroup v2 file system is mounted: mount one (`mount -t cgroup2 none /sys/fs/cgroup`), or boot with \
         systemd.unified_cgroup_hierarchy=1"
    )]
    NotMounted,
    /// Something on one could not be done.
    #[error("can't {operation} {}: {source}", path.display())]
    Io {
        /// What was being done.
        operation: &'static str,
        /// The cgroup's folder, or the file in it.
        path: PathBuf,
        /// The underlying error.
        source: io::Error,
    },
    /// Its processes would not end.
    #[error("the processes of the cgroup {} have not ended {limit:?} after they were killed", path.display())]
    StillThere {
        /// The cgroup's folder.
        path: PathBuf,
        /// How long that was waited for.
        limit: Duration,
    },
}

/// A cgroup: a folder below the cgroup v2 mount. It stays when this is dropped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    path: PathBuf,
}

/// The `cpu.weight` of a cgroup that is given that much CPU, in thousandths of one: 100 for each CPU, the weight that a
/// cgroup has by default, within the 1 to 10,000 that the kernel takes.
pub fn cpu_weight(cpu_millis: u32) -> u32 {
    (cpu_millis / 10).clamp(1, 10_000)
}

// === impl CgroupError ===

impl CgroupError {
    /// Whether the cgroup has no such file, as where its controller is absent, or is gone itself.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

// === impl Cgroup ===

impl Cgroup {
    /// Where cgroup v2 is mounted.
    ///
    /// # Errors
    /// [`CgroupError::NotMounted`] where it is not.
    pub fn mount() -> Result<PathBuf, CgroupError> {
        let path = Path::new("/proc/thread-self/mountinfo");
        let text = fs::read_to_string(path).map_err(during("read", path))?;
        find_mount(&text).ok_or(CgroupError::NotMounted)
    }

    /// The cgroup that this process is in, below that mount.
    ///
    /// # Errors
    /// Where the kernel does not say.
    pub fn of_this_process(mount: &Path) -> Result<Self, CgroupError> {
        let path = Path::new("/proc/self/cgroup");
        let text = fs::read_to_string(path).map_err(during("read", path))?;
        let below_mount = find_own(&text).ok_or(CgroupError::NotMounted)?;
        Ok(Self {
            path: mount.join(below_mount),
        })
    }

    /// Whether it is the one that all others of the host are below: this has processes and controllers beside one another.
    pub fn is_root(&self) -> bool {
        !self.path.join("cgroup.type").exists()
    }

    /// Moves a process into it; one that has ended meanwhile is none.
    ///
    /// # Errors
    /// Where the kernel does not let it.
    pub fn take(&self, process: u32) -> Result<(), CgroupError> {
        ended_is_none(self.write("cgroup.procs", &process.to_string()))
    }

    /// The cgroup of that folder, whether or not it is there.
    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Makes a new cgroup below this one.
    ///
    /// # Errors
    /// Where there is one of that name already, or it can't be made.
    pub fn create(&self, name: impl AsRef<Path>) -> Result<Self, CgroupError> {
        let path = self.path.join(name);
        fs::create_dir(&path).map_err(during("make the cgroup", &path))?;
        Ok(Self { path })
    }

    /// The controllers that it has, as `memory`.
    ///
    /// # Errors
    /// Where it can't be read.
    pub fn controllers(&self) -> Result<Vec<String>, CgroupError> {
        self.words("cgroup.controllers")
    }

    /// Lets the cgroups below this one have a controller of it, where they do not yet.
    ///
    /// # Errors
    /// Where this one does not have it, or it can't be passed on.
    pub fn enable(&self, controller: &str) -> Result<(), CgroupError> {
        if self
            .words("cgroup.subtree_control")?
            .iter()
            .any(|name| name == controller)
        {
            return Ok(());
        }
        self.write("cgroup.subtree_control", &format!("+{controller}"))
    }

    /// Lets single threads of the processes in the cgroup above be in it ("threads" in cgroup-v2.rst). For good: it is never again
    /// one that whole processes, memory above all, are bounded by.
    ///
    /// # Errors
    /// Where the cgroup above passes on controllers that bound whole processes.
    pub fn make_threaded(&self) -> Result<(), CgroupError> {
        self.write("cgroup.type", "threaded")
    }

    /// The cgroups below this one.
    ///
    /// # Errors
    /// Where its folder can't be read.
    pub fn children(&self) -> Result<Vec<Self>, CgroupError> {
        let mut children = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(during("list the cgroup", &self.path))? {
            let entry = entry.map_err(during("list the cgroup", &self.path))?;
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                children.push(Self { path: entry.path() });
            }
        }
        Ok(children)
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its id, as `bpf_get_current_cgroup_id` returns it: the inode number of its folder.
    ///
    /// # Errors
    /// Where it is gone.
    pub fn id(&self) -> Result<u64, CgroupError> {
        let folder = fs::metadata(&self.path).map_err(during("look at the cgroup", &self.path))?;
        Ok(folder.ino())
    }

    /// Writes one of its files.
    ///
    /// # Errors
    /// Where it has no such file, or the kernel does not take the value.
    pub fn write(&self, file: &str, value: &str) -> Result<(), CgroupError> {
        let path = self.path.join(file);
        // Never made: where the kernel has no such file, it is to say so.
        let written = File::options()
            .write(true)
            .open(&path)
            .and_then(|mut file| file.write_all(value.as_bytes()));
        written.map_err(during("write", &path))
    }

    /// The number that is one of its files; none where it has no such file.
    pub fn number(&self, file: &str) -> Option<u64> {
        fs::read_to_string(self.path.join(file)).ok()?.trim().parse().ok()
    }

    /// One number of a file of `key value` lines, as `memory.events` is one; none where it has no such file or key.
    pub fn keyed_number(&self, file: &str, key: &str) -> Option<u64> {
        keyed_number(&fs::read_to_string(self.path.join(file)).ok()?, key)
    }

    /// The ids of the processes that are in it.
    ///
    /// # Errors
    /// Where it is gone.
    pub fn processes(&self) -> Result<Vec<u32>, CgroupError> {
        let ids = self.words("cgroup.procs")?;
        Ok(ids.iter().filter_map(|id| id.parse().ok()).collect())
    }

    /// The ids of the threads that are in it, but in no cgroup below.
    ///
    /// # Errors
    /// Where it is gone.
    pub fn threads(&self) -> Result<Vec<u32>, CgroupError> {
        let ids = self.words("cgroup.threads")?;
        Ok(ids.iter().filter_map(|id| id.parse().ok()).collect())
    }

    /// Moves a thread into it, from a cgroup whose processes it may have threads of; one that has ended meanwhile is none.
    ///
    /// # Errors
    /// Where the kernel does not let it.
    pub fn take_thread(&self, thread: u32) -> Result<(), CgroupError> {
        ended_is_none(self.write("cgroup.threads", &thread.to_string()))
    }

    /// `cgroup.procs`: a new process writes `0` to it before it executes its program, and is in this cgroup from then on.
    ///
    /// # Errors
    /// Where it can't be opened.
    pub fn procs_file(&self) -> Result<File, CgroupError> {
        let path = self.path.join("cgroup.procs");
        File::options().write(true).open(&path).map_err(during("open", &path))
    }

    /// Kills every process in it and in the cgroups below it; they may take a moment to end.
    ///
    /// # Errors
    /// Where it is gone, or the kernel is older than 5.14.
    pub fn kill(&self) -> Result<(), CgroupError> {
        self.write("cgroup.kill", "1")
    }

    /// Kills everything in it and in the cgroups below it, and waits until that has ended, which may take so long. One that is
    /// gone has nothing in it.
    ///
    /// # Errors
    /// Where processes stay.
    pub fn empty(&self, limit: Duration) -> Result<(), CgroupError> {
        match self.kill() {
            Err(error) if error.is_not_found() && !self.path.exists() => Ok(()),
            killed => killed.and_then(|()| self.wait_empty(limit)),
        }
    }

    /// [Empties](Self::empty) it and removes it with all below it. One that is gone is removed already. May take 20 s.
    ///
    /// # Errors
    /// Where processes stay or the folder can't be removed.
    pub fn destroy(&self) -> Result<(), CgroupError> {
        self.empty(KILL_LIMIT)?;
        self.remove_all(Instant::now() + KILL_LIMIT)
    }

    /// Removes it with all below it, in which nothing runs any more.
    fn remove_all(&self, deadline: Instant) -> Result<(), CgroupError> {
        let children = match self.children() {
            Err(error) if error.is_not_found() => return Ok(()),
            children => children?,
        };
        for child in children {
            child.remove_all(deadline)?;
        }
        loop {
            match self.remove() {
                // A thread may leave its cgroup an instant after its process is reported dead.
                Err(CgroupError::Io { source, .. })
                    if source.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline =>
                {
                    std::thread::sleep(Duration::from_millis(2));
                }
                removed => return removed,
            }
        }
    }

    /// Removes it, in which there is nothing left. One that is gone is removed already.
    ///
    /// # Errors
    /// Where something is in it still.
    pub fn remove(&self) -> Result<(), CgroupError> {
        match fs::remove_dir(&self.path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(during("remove the cgroup", &self.path)(source))
            }
            _ => Ok(()),
        }
    }

    fn words(&self, file: &str) -> Result<Vec<String>, CgroupError> {
        let path = self.path.join(file);
        let text = fs::read_to_string(&path).map_err(during("read", &path))?;
        Ok(text.split_whitespace().map(str::to_owned).collect())
    }

    /// `cgroup.events` is signalled (POLLPRI) when `populated` changes.
    fn wait_empty(&self, limit: Duration) -> Result<(), CgroupError> {
        let deadline = Instant::now() + limit;
        let path = self.path.join("cgroup.events");
        loop {
            // Opened anew each time: reading it also arms the notification that poll waits for.
            let mut events = File::open(&path).map_err(during("open", &path))?;
            let text = io::read_to_string(&mut events).map_err(during("read", &path))?;
            if keyed_number(&text, "populated") == Some(0) {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(CgroupError::StillThere {
                    path: self.path.clone(),
                    limit,
                });
            }
            let mut waits = [PollFd::new(events.as_fd(), PollFlags::POLLPRI)];
            let timeout = PollTimeout::try_from(left.min(Duration::from_millis(500))).unwrap_or(PollTimeout::ZERO);
            match poll(&mut waits, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(during("watch", &path)(errno.into())),
            }
        }
    }
}

/// The cgroup v2 of a process, a path below the mount, from its file (cgroups(7)).
fn find_own(text: &str) -> Option<&Path> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(Path::new(path))
}

/// What came of moving something that may have ended meanwhile.
fn ended_is_none(moved: Result<(), CgroupError>) -> Result<(), CgroupError> {
    match moved {
        Err(CgroupError::Io { source, .. }) if source.raw_os_error() == Some(Errno::ESRCH as i32) => Ok(()),
        other => other,
    }
}

fn keyed_number(text: &str, key: &str) -> Option<u64> {
    text.lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.parse().ok())
}

/// The mount point of the first cgroup2 file system in a mountinfo file (proc_pid_mountinfo(5)).
fn find_mount(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (fields, kind) = line.split_once(" - ")?;
        if kind.split(' ').next()? != "cgroup2" {
            return None;
        }
        let mut fields = fields.split(' ');
        // The root of the mount within its file system: only the whole of it is of use.
        // That of a cgroup namespace is seen as the whole from within.
        (fields.nth(3)? == "/").then_some(())?;
        Some(PathBuf::from(fields.next()?.replace("\\040", " ")))
    })
}

fn during(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    move |source| CgroupError::Io {
        operation,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_is_found() {
        let text = "30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - tmpfs tmpfs rw\n\
                    31 30 0:27 /sub /bound rw - cgroup2 cgroup2 rw\n\
                    32 30 0:27 / /sys/fs/cgroup/uni\\040fied rw,nosuid shared:5 - cgroup2 cgroup2 rw\n";
        assert_eq!(find_mount(text), Some("/sys/fs/cgroup/uni fied".into()));
        assert_eq!(find_mount("1 2 0:3 / /proc rw - proc proc rw"), None);
        assert_eq!(find_mount("rubbish"), None);
    }

    #[test]
    fn the_own_cgroup_is_found() {
        let text = "4:memory:/a\n1:name=systemd:/b\n0::/system.slice/stokerd.service\n";
        assert_eq!(find_own(text), Some(Path::new("system.slice/stokerd.service")));
        assert_eq!(find_own("0::/\n"), Some(Path::new("")));
        assert_eq!(find_own("4:memory:/a\n"), None);
    }

    #[test]
    fn keyed_numbers_are_read_by_their_whole_key() {
        let text = "oom 3\noom_kill 2\noom_group_kill 1\n";
        assert_eq!(keyed_number(text, "oom_kill"), Some(2));
        assert_eq!(keyed_number(text, "oom"), Some(3));
        assert_eq!(keyed_number(text, "max"), None);
    }

    #[test]
    fn a_file_that_is_not_there_is_not_made() {
        let folder = tempfile::tempdir().unwrap();
        let cgroup = Cgroup::at(folder.path().to_owned());
        let error = cgroup.write("memory.max", "1").unwrap_err();
        assert!(
            error.is_not_found() && error.to_string().contains("memory.max"),
            "{error}"
        );
        assert!(!folder.path().join("memory.max").exists());
        assert_eq!(cgroup.number("memory.max"), None);
        assert_eq!(cgroup.keyed_number("memory.events", "oom"), None);
        fs::write(folder.path().join("memory.current"), "4096\n").unwrap();
        assert_eq!(cgroup.number("memory.current"), Some(4096));
        let missing = Cgroup::at(folder.path().join("missing")).id().unwrap_err();
        assert!(
            missing.is_not_found() && missing.to_string().contains("missing"),
            "{missing}"
        );
    }

    #[test]
    fn a_weight_is_a_hundred_for_each_cpu() {
        assert_eq!(cpu_weight(1000), 100);
        assert_eq!(cpu_weight(250), 25);
        assert_eq!(cpu_weight(0), 1);
        assert_eq!(cpu_weight(u32::MAX), 10_000);
    }
}
