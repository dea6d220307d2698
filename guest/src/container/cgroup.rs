//! The cgroup (v2) of one container: its limits, its end, its count of processes killed for want of memory. All of it
//! by the files that the kernel's `admin-guide/cgroup-v2.rst` describes.

use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use stoker_linux::{CPU_PERIOD_US, CgroupError, CpuMax, cpu_weight};
use stoker_proto::v1::Amount;

use crate::budget;

/// As many processes and threads as Lambda allows. A fork bomb ends here.
pub(super) const PIDS_MAX: u32 = 1024;
/// The same of an image, which has the machine to itself.
const IMAGE_PIDS_MAX: u32 = 8192;
/// What a container that initialises may use at least.
const ONE_CPU_MILLIS: u32 = 1_000;
/// How long the kernel gets to let go of processes that were killed.
const EMPTY_TIMEOUT: Duration = Duration::from_secs(5);

/// A container's cgroup. It stays until [`Cgroup::remove`].
#[derive(Debug)]
pub(crate) struct Cgroup {
    files: stoker_linux::Cgroup,
    id: u64,
}

/// A cgroup that goes when this is dropped, with all that runs in it, by and by.
#[derive(Debug)]
pub(crate) struct HeldCgroup(Arc<Cgroup>);

// === impl HeldCgroup ===

impl HeldCgroup {
    pub(crate) fn shared(&self) -> &Arc<Cgroup> {
        &self.0
    }
}

impl Deref for HeldCgroup {
    type Target = Cgroup;

    fn deref(&self) -> &Cgroup {
        &self.0
    }
}

impl Drop for HeldCgroup {
    fn drop(&mut self) {
        let cgroup = Arc::clone(&self.0);
        let _ = cgroup.kill();
        budget::spawn_uncounted(async move {
            if let Err(error) = cgroup.remove().await {
                tracing::error!("{error}");
            }
        });
    }
}

// === impl Cgroup ===

impl Cgroup {
    /// What a container with such an amount may use while it initialises: at least one CPU, as with Lambda.
    pub(crate) fn boosted_millis(amount_millis: u32) -> u32 {
        amount_millis.max(ONE_CPU_MILLIS)
    }

    /// Makes the group in `parent` with the limits of `amount`.
    pub(crate) fn create(parent: &Path, name: &str, amount: &Amount) -> Result<Self, CgroupError> {
        let files = stoker_linux::Cgroup::at(parent.to_owned()).create(name)?;
        let id = files.id()?;
        let cgroup = Self { files, id };
        let limited = cgroup.limit(amount);
        if limited.is_err() {
            let _ = cgroup.files.remove();
        }
        limited.map(|()| cgroup)
    }

    /// Makes the group of an image in `parent`, which may use all of the machine: its memory is for who knows that to limit.
    pub(crate) fn create_for_image(parent: &Path, name: &str) -> Result<HeldCgroup, CgroupError> {
        let cgroup = Self::held(parent.to_owned(), name)?;
        // Of many workers one may run out of memory, and its server go on.
        cgroup.files.write("memory.oom.group", "0")?;
        cgroup.files.write("pids.max", &IMAGE_PIDS_MAX.to_string())?;
        Ok(cgroup)
    }

    /// Makes a group in this one that has no limits of its own, so that what runs in it can be ended by itself.
    pub(crate) fn part(&self, name: &str) -> Result<HeldCgroup, CgroupError> {
        Self::held(self.path().to_owned(), name)
    }

    fn held(parent: PathBuf, name: &str) -> Result<HeldCgroup, CgroupError> {
        let files = stoker_linux::Cgroup::at(parent).create(name)?;
        let id = files.id()?;
        Ok(HeldCgroup(Arc::new(Self { files, id })))
    }

    /// The id by which eBPF programs know it.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    pub(crate) fn path(&self) -> &Path {
        self.files.path()
    }

    /// The same, below where cgroups are mounted.
    pub(crate) fn path_in_hierarchy(&self) -> PathBuf {
        let path = self.path();
        path.strip_prefix("/sys/fs/cgroup")
            .map_or_else(|_| path.to_owned(), |path| Path::new("/").join(path))
    }

    /// What a process writes to, to be in it.
    pub(crate) fn procs(&self) -> PathBuf {
        self.path().join("cgroup.procs")
    }

    /// Limits its memory, in bytes. Not to less than it has: the kernel would take it from its processes there and then.
    pub(crate) fn limit_memory(&self, bytes: u64) -> Result<(), CgroupError> {
        if self.memory_bytes().is_some_and(|(now, _)| now > bytes) {
            return Ok(());
        }
        self.files.write("memory.max", &bytes.to_string())
    }

    fn limit(&self, amount: &Amount) -> Result<(), CgroupError> {
        let memory = u64::from(amount.memory_mib) << 20;
        self.files.write("pids.max", &PIDS_MAX.to_string())?;
        self.files.write("memory.max", &memory.to_string())?;
        // Half a function is of no use: out of memory takes all of it, at once.
        self.files.write("memory.oom.group", "1")?;
        // Only there where the kernel has swap.
        match self.files.write("memory.swap.max", "0") {
            Err(error) if error.is_not_found() => {}
            other => other?,
        }
        self.give_cpu(amount.cpu_millis)
    }

    /// Lets a container that initialises have what it may then: the first request waits for it.
    pub(crate) fn boost_cpu(&self, amount: &Amount) -> Result<(), CgroupError> {
        self.give_cpu(Self::boosted_millis(amount.cpu_millis))
    }

    /// Limits CPU time, and weighs it by the same.
    fn give_cpu(&self, cpu_millis: u32) -> Result<(), CgroupError> {
        self.limit_cpu(cpu_millis)?;
        self.weigh_cpu(cpu_millis)
    }

    /// How contended CPU time is shared.
    pub(crate) fn weigh_cpu(&self, cpu_millis: u32) -> Result<(), CgroupError> {
        self.files.write("cpu.weight", &cpu_weight(cpu_millis).to_string())
    }

    /// Limits CPU time to so many thousandths of one CPU: this much in each period, and as much again when there was less use before.
    pub(crate) fn limit_cpu(&self, cpu_millis: u32) -> Result<(), CgroupError> {
        self.files.limit_cpu(Some(CpuMax::new(cpu_millis, CPU_PERIOD_US)))
    }

    /// Freezes every process in it, or lets them go on. Neither waits until it is done.
    pub(crate) fn freeze(&self, frozen: bool) -> Result<(), CgroupError> {
        self.files.write("cgroup.freeze", if frozen { "1" } else { "0" })
    }

    /// Kills every process in it, frozen ones too.
    pub(crate) fn kill(&self) -> Result<(), CgroupError> {
        self.files.kill()
    }

    /// Whether the kernel has killed in it for want of memory.
    pub(crate) fn ran_out_of_memory(&self) -> bool {
        self.files
            .keyed_number("memory.events", "oom_kill")
            .is_some_and(|count| count > 0)
    }

    /// CPU time in ns, by the kernel's own count.
    pub(crate) fn cpu_ns(&self) -> Option<u64> {
        self.files
            .keyed_number("cpu.stat", "usage_usec")
            .map(|us| us.saturating_mul(1_000))
    }

    /// How long its threads could have run and were held back by its limit, in ns.
    pub(crate) fn throttled_ns(&self) -> Option<u64> {
        self.files
            .keyed_number("cpu.stat", "throttled_usec")
            .map(|us| us.saturating_mul(1_000))
    }

    /// Memory charged to it, and the most that ever was, in bytes.
    pub(crate) fn memory_bytes(&self) -> Option<(u64, u64)> {
        let now = self.files.number("memory.current")?;
        Some((now, self.files.number("memory.peak").unwrap_or(now)))
    }

    /// Kills what is left in it and takes it away.
    pub(crate) async fn remove(&self) -> Result<(), CgroupError> {
        let begin = tokio::time::Instant::now();
        let mut pause = Duration::from_micros(200);
        loop {
            let Err(error) = self.files.remove() else {
                return Ok(());
            };
            if begin.elapsed() > EMPTY_TIMEOUT {
                return Err(error);
            }
            let _ = self.kill();
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }
}
