//! Cgroups to try things in, and what else a test needs of the system.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount};
use stoker_ebpf::CgroupId;

/// A cgroup of its own, removed with all that runs in it.
pub(crate) struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes one below the system's cgroup v2 mount; where there is none, mounts it (without controllers, which cgroup
    /// v1 may have) in a folder that stays.
    pub(crate) fn new(name: &str) -> Result<Self> {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = mount_point()?.join(format!("stoker-test-{}-{count}-{name}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(Self { path })
    }

    /// Makes one inside.
    pub(crate) fn child(&self, name: &str) -> Result<Self> {
        let path = self.path.join(name);
        fs::create_dir(&path)?;
        Ok(Self { path })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn id(&self) -> Result<CgroupId> {
        Ok(CgroupId::of(&self.path)?)
    }

    /// A key of `cpu.stat`, in us.
    pub(crate) fn cpu_stat(&self, key: &str) -> Result<u64> {
        let text = fs::read_to_string(self.path.join("cpu.stat"))?;
        text.lines()
            .find_map(|line| line.strip_prefix(key)?.trim().parse().ok())
            .with_context(|| format!("no {key} in {text}"))
    }

    /// `memory.current` in bytes, where the memory controller is at hand.
    pub(crate) fn memory_current(&self) -> Option<u64> {
        fs::read_to_string(self.path.join("memory.current"))
            .ok()?
            .trim()
            .parse()
            .ok()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::write(self.path.join("cgroup.kill"), "1");
        let _ = wait_for("an empty cgroup", || {
            Ok(fs::remove_dir(&self.path).is_ok() || !self.path.exists())
        });
    }
}

fn mount_point() -> Result<PathBuf> {
    let mounted = || -> Result<Option<PathBuf>> {
        Ok(fs::read_to_string("/proc/self/mounts")?.lines().find_map(|line| {
            let mut fields = line.split(' ');
            let (path, system) = (fields.nth(1)?, fields.next()?);
            (system == "cgroup2").then(|| PathBuf::from(path))
        }))
    };
    if let Some(path) = mounted()? {
        return Ok(path);
    }
    let path = Path::new("/run/stoker-test-cgroup");
    fs::create_dir_all(path)?;
    mount(None::<&str>, path, Some("cgroup2"), MsFlags::empty(), None::<&str>).context("mounting cgroup v2")?;
    Ok(path.to_owned())
}

/// Mounts tracefs where it is not.
pub(crate) fn need_tracefs() -> Result<()> {
    let path = Path::new("/sys/kernel/tracing");
    if !path.join("events").is_dir() {
        mount(None::<&str>, path, Some("tracefs"), MsFlags::empty(), None::<&str>).context("mounting tracefs")?;
    }
    Ok(())
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
