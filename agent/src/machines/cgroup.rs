//! Cgroups v2, as far as machines need them (cgroup-v2.rst in the kernel's documentation).

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// How long the kernel may take to end the processes of a cgroup that was killed.
const KILL_LIMIT: Duration = Duration::from_secs(10);

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
    #[error("can't {operation} the cgroup {}: {source}", path.display())]
    Io {
        /// What was being done.
        operation: &'static str,
        /// Its folder.
        path: PathBuf,
        /// The underlying error.
        source: io::Error,
    },
    /// Its processes would not end.
    #[error("the processes of the cgroup {} have not ended {limit:?} after they were killed", path.display())]
    StillThere {
        /// Its folder.
        path: PathBuf,
        /// How long that was waited for.
        limit: Duration,
    },
}

/// A cgroup: a folder below the cgroup v2 mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    path: PathBuf,
}

// === impl Cgroup ===

impl Cgroup {
    /// Where cgroup v2 is mounted.
    ///
    /// # Errors
    /// [`CgroupError::NotMounted`] where it is not.
    pub fn mount() -> Result<PathBuf, CgroupError> {
        let path = Path::new("/proc/thread-self/mountinfo");
        let text = fs::read_to_string(path).map_err(during("find", path))?;
        find_mount(&text).ok_or(CgroupError::NotMounted)
    }

    /// Opens the cgroup at `below` the mount and makes it, and those above it, where they are missing. The controllers
    /// that there are become usable in each of them.
    ///
    /// # Errors
    /// Where one can't be made.
    pub fn open(mount: &Path, below: &Path) -> Result<Self, CgroupError> {
        let mut path = mount.to_owned();
        for part in below.components() {
            // Delegating is the best that can be done: a controller may be absent, or bound to cgroup v1.
            delegate(&path);
            path.push(part);
            match fs::create_dir(&path) {
                Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(during("make", &path)(source));
                }
                _ => {}
            }
        }
        Ok(Self { path })
    }

    /// Makes a new cgroup below this one, which lets it have its controllers.
    ///
    /// # Errors
    /// Where there is one of that name already, or it can't be made.
    pub fn child(&self, name: &str) -> Result<Self, CgroupError> {
        delegate(&self.path);
        let path = self.path.join(name);
        fs::create_dir(&path).map_err(during("make", &path))?;
        Ok(Self { path })
    }

    /// The cgroups below this one.
    ///
    /// # Errors
    /// Where its folder can't be read.
    pub fn children(&self) -> Result<Vec<Self>, CgroupError> {
        let mut children = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(during("list", &self.path))? {
            let entry = entry.map_err(during("list", &self.path))?;
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                children.push(Self { path: entry.path() });
            }
        }
        Ok(children)
    }

    /// The cgroup of that folder, whether or not it is there.
    pub(super) fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Sets one of its limits, where its controller is there: says whether it was set.
    pub fn set(&self, file: &str, value: &str) -> bool {
        fs::write(self.path.join(file), value).is_ok()
    }

    /// One number of a file of `key value` lines, as `memory.events` is one.
    pub fn event(&self, file: &str, key: &str) -> Option<u64> {
        let text = fs::read_to_string(self.path.join(file)).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
        line?.trim().parse().ok()
    }

    /// `cgroup.procs`: a new process writes `0` to it before it executes its program, and is in this cgroup from then on.
    ///
    /// # Errors
    /// Where it can't be opened.
    pub fn procs_file(&self) -> Result<File, CgroupError> {
        let path = self.path.join("cgroup.procs");
        File::options()
            .write(true)
            .open(&path)
            .map_err(during("enter", &self.path))
    }

    /// Kills everything in it, waits until that has ended, and removes it with all below it. One that is gone is removed
    /// already. Blocks.
    ///
    /// # Errors
    /// Where processes stay or the folder can't be removed.
    pub fn destroy(&self) -> Result<(), CgroupError> {
        let deadline = Instant::now() + KILL_LIMIT;
        match fs::write(self.path.join("cgroup.kill"), "1") {
            Err(source) if source.kind() == io::ErrorKind::NotFound && !self.path.exists() => {
                return Ok(());
            }
            Err(source) => return Err(during("kill", &self.path)(source)),
            Ok(()) => {}
        }
        self.wait_empty(deadline)?;
        for child in self.children()? {
            child.destroy()?;
        }
        loop {
            match fs::remove_dir(&self.path) {
                Ok(()) => return Ok(()),
                Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(()),
                // A thread may leave its cgroup an instant after its process is reported dead.
                Err(source) if source.raw_os_error() == Some(nix::libc::EBUSY) => {
                    if Instant::now() >= deadline {
                        return Err(during("remove", &self.path)(source));
                    }
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(source) => return Err(during("remove", &self.path)(source)),
            }
        }
    }

    /// `cgroup.events` is signalled (POLLPRI) when `populated` changes.
    fn wait_empty(&self, deadline: Instant) -> Result<(), CgroupError> {
        let path = self.path.join("cgroup.events");
        loop {
            // Opened anew each time: reading it also arms the notification that poll waits for.
            let mut events = File::open(&path).map_err(during("watch", &self.path))?;
            let text = io::read_to_string(&mut events).map_err(during("watch", &self.path))?;
            if text.lines().any(|line| line == "populated 0") {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(CgroupError::StillThere {
                    path: self.path.clone(),
                    limit: KILL_LIMIT,
                });
            }
            let mut waits = [PollFd::new(std::os::fd::AsFd::as_fd(&events), PollFlags::POLLPRI)];
            let timeout = PollTimeout::try_from(left.min(Duration::from_millis(500))).unwrap_or(PollTimeout::ZERO);
            match poll(&mut waits, timeout) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(during("watch", &self.path)(errno.into())),
            }
        }
    }
}

/// Lets the children of a cgroup have its controllers; one at a time, so that one that can't be had keeps no other away.
fn delegate(path: &Path) {
    let Ok(controllers) = fs::read_to_string(path.join("cgroup.controllers")) else {
        return;
    };
    let enabled = fs::read_to_string(path.join("cgroup.subtree_control")).unwrap_or_default();
    for controller in controllers.split_whitespace() {
        let wanted = ["cpu", "io", "memory", "pids"].contains(&controller);
        if !wanted || enabled.split_whitespace().any(|other| other == controller) {
            continue;
        }
        if let Err(error) = fs::write(path.join("cgroup.subtree_control"), format!("+{controller}")) {
            tracing::debug!(cgroup = %path.display(), controller, %error, "controller not delegated");
        }
    }
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
    use std::io::Write as _;
    use std::os::unix::process::CommandExt as _;
    use std::process::Command;

    use super::super::tests::with_cgroups;
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
    fn a_process_starts_in_its_cgroup_and_ends_with_it() {
        with_cgroups(|mount| {
            let name = format!("stoker-test-{}", std::process::id());
            let root = Cgroup::open(mount, &Path::new(&name).join("machines")).unwrap();
            assert_eq!(Cgroup::open(mount, &Path::new(&name).join("machines")).unwrap(), root);
            let cgroup = root.child("one").unwrap();
            assert!(matches!(
                root.child("one"),
                Err(CgroupError::Io { operation: "make", .. })
            ));
            let mut procs_file = cgroup.procs_file().unwrap();
            let mut command = Command::new("sh");
            command.args(["-c", "sleep 1000 & sleep 1000"]);
            // SAFETY: the closure only writes to a file that is open already.
            unsafe { command.pre_exec(move || procs_file.write_all(b"0")) };
            let mut child = command.spawn().unwrap();
            let procs = fs::read_to_string(cgroup.path().join("cgroup.procs")).unwrap();
            assert!(procs.lines().any(|pid| pid == child.id().to_string()), "{procs}");
            assert_eq!(root.children().unwrap(), std::slice::from_ref(&cgroup));
            cgroup.destroy().unwrap();
            cgroup.destroy().unwrap();
            assert!(!child.wait().unwrap().success());
            assert!(!cgroup.path().exists());
            Cgroup { path: mount.join(name) }.destroy().unwrap();
        });
    }

    #[test]
    fn what_cannot_be_set_is_said() {
        with_cgroups(|mount| {
            let root = Cgroup::open(mount, Path::new(&format!("stoker-set-{}", std::process::id()))).unwrap();
            assert!(!root.set("no.such.limit", "1"));
            assert_eq!(root.event("cgroup.events", "populated"), Some(0));
            assert_eq!(root.event("cgroup.events", "popul"), None);
            root.destroy().unwrap();
        });
    }
}
