//! Cgroups to try things in, and what else a test needs of the system.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use stoker_ebpf::CgroupId;
use stoker_linux::CgroupError;
use tempfile::TempDir;

/// A cgroup of its own, removed with all that runs in it.
pub(crate) struct Cgroup(stoker_linux::Cgroup);

impl Cgroup {
    /// Makes one below the system's cgroup v2 mount; where there is none, mounts it (without controllers, which cgroup
    /// v1 may have) in a folder that stays.
    pub(crate) fn new(name: &str) -> Result<Self> {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let root = stoker_linux::Cgroup::at(mount_point()?);
        Ok(Self(root.create(format!(
            "stoker-test-{}-{count}-{name}",
            std::process::id()
        ))?))
    }

    /// Makes one inside.
    pub(crate) fn child(&self, name: &str) -> Result<Self> {
        Ok(Self(self.0.create(name)?))
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn id(&self) -> Result<CgroupId> {
        Ok(CgroupId::from(self.0.id()?))
    }

    /// A key of `cpu.stat`, in us.
    pub(crate) fn cpu_stat(&self, key: &str) -> Result<u64> {
        self.0
            .keyed_number("cpu.stat", key)
            .with_context(|| format!("no {key} in cpu.stat"))
    }

    /// Lets it use so many us of CPU time in each 100 ms, by cgroup v2, or else by a cgroup of v1 beside it.
    pub(crate) fn limit(&self, quota_us: u32) -> Result<Limited> {
        let root = stoker_linux::Cgroup::at(mount_point()?);
        if root.controllers()?.iter().any(|controller| controller == "cpu") {
            root.enable("cpu")?;
            self.0.write("cpu.max", &format!("{quota_us} 100000"))?;
            return Ok(Limited::Here);
        }
        let name = self.path().file_name().context("a name")?;
        let path = Path::new("/sys/fs/cgroup/cpu").join(name);
        fs::create_dir(&path).context("neither cgroup v2 nor v1 has the CPU controller here")?;
        fs::write(path.join("cpu.cfs_quota_us"), quota_us.to_string())?;
        Ok(Limited::Beside(path))
    }

    /// `memory.current` in bytes, where the memory controller is at hand.
    pub(crate) fn memory_current(&self) -> Option<u64> {
        self.0.number("memory.current")
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = self.0.destroy();
    }
}

/// What holds a cgroup to its limit.
pub(crate) enum Limited {
    Here,
    /// A cgroup of v1. It goes with this, once nothing is in it.
    Beside(PathBuf),
}

impl Limited {
    /// Holds a process of the cgroup to the limit too.
    pub(crate) fn take(&self, process: u32) -> Result<()> {
        match self {
            Self::Here => Ok(()),
            Self::Beside(path) => Ok(fs::write(path.join("cgroup.procs"), process.to_string())?),
        }
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        if let Self::Beside(path) = self {
            let _ = fs::remove_dir(path);
        }
    }
}

fn mount_point() -> Result<PathBuf> {
    match stoker_linux::Cgroup::mount() {
        Err(CgroupError::NotMounted) => {}
        mounted => return Ok(mounted?),
    }
    let path = Path::new("/run/stoker-test-cgroup");
    fs::create_dir_all(path)?;
    mount(None::<&str>, path, Some("cgroup2"), MsFlags::empty(), None::<&str>).context("mounting cgroup v2")?;
    Ok(path.to_owned())
}

/// From now on this thread alone sees what it mounts.
pub(crate) fn unshare_mounts() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let (none, flags) = (None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE);
    Ok(mount(none, "/", none, flags, none)?)
}

/// Does something in a thread that sees no type information of the kernel's.
pub(crate) fn without_type_information<T: Send>(act: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let hidden = || {
        unshare_mounts()?;
        let none = None::<&str>;
        mount(none, "/sys/kernel/btf", Some("tmpfs"), MsFlags::empty(), none).context("hiding /sys/kernel/btf")?;
        act()
    };
    thread::scope(|scope| scope.spawn(hidden).join()).map_err(|_| anyhow::anyhow!("it panicked"))?
}

/// A BPF file system that this thread alone sees, and what it starts. It goes with them, and with it all that is pinned.
pub(crate) struct Bpffs(TempDir);

impl Bpffs {
    pub(crate) fn mount() -> Result<Self> {
        let folder = TempDir::new()?;
        unshare_mounts()?;
        mount(None::<&str>, folder.path(), Some("bpf"), MsFlags::empty(), None::<&str>).context("mounting bpffs")?;
        Ok(Self(folder))
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Nothing may be pinned or removed from now on.
    pub(crate) fn make_read_only(&self) -> Result<()> {
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        Ok(mount(None::<&str>, self.path(), None::<&str>, flags, None::<&str>)?)
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        let _ = umount2(self.path(), MntFlags::MNT_DETACH);
    }
}

/// Waits for a condition, at most a minute.
pub(crate) fn wait_for(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(60);
    while !holds()? {
        ensure!(Instant::now() < end, "waited a minute for {what}");
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
