//! The cgroup (v2) of one container: its limits, its end, its count of processes killed for want of memory. All of it
//! by the files that the kernel's `admin-guide/cgroup-v2.rst` describes.

use std::path::Path;
use std::time::Duration;

use stoker_linux::{CPU_PERIOD_US, CgroupError, cpu_weight};
use stoker_proto::v1::Amount;

/// As many processes and threads as Lambda allows. A fork bomb ends here.
pub(super) const PIDS_MAX: u32 = 1024;
/// The least quota the kernel takes.
const MIN_QUOTA_US: u64 = 1_000;
const ONE_CPU_MILLIS: u32 = 1_000;
/// How long the kernel gets to let go of processes that were killed.
const EMPTY_TIMEOUT: Duration = Duration::from_secs(5);

/// A container's cgroup. It stays until [`Cgroup::remove`].
#[derive(Debug)]
pub(crate) struct Cgroup {
    files: stoker_linux::Cgroup,
    id: u64,
}

/// CPU time: this much in each period, and as much again when there was less use before.
#[derive(Debug, PartialEq, Eq)]
struct CpuLimit {
    quota_us: u64,
    weight: u32,
}

// === impl CpuLimit ===

impl CpuLimit {
    fn of(cpu_millis: u32) -> Self {
        Self {
            quota_us: (u64::from(cpu_millis) * CPU_PERIOD_US / u64::from(ONE_CPU_MILLIS)).max(MIN_QUOTA_US),
            weight: cpu_weight(cpu_millis),
        }
    }
}

// === impl Cgroup ===

impl Cgroup {
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

    /// The id by which eBPF programs know it.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    pub(crate) fn path(&self) -> &Path {
        self.files.path()
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
        self.limit_cpu(amount.cpu_millis)
    }

    /// Lets a container that initialises have one CPU, as Lambda does: the first request waits for it.
    pub(crate) fn boost_cpu(&self, amount: &Amount) -> Result<(), CgroupError> {
        self.limit_cpu(amount.cpu_millis.max(ONE_CPU_MILLIS))
    }

    /// Limits CPU time.
    pub(crate) fn limit_cpu(&self, cpu_millis: u32) -> Result<(), CgroupError> {
        let limit = CpuLimit::of(cpu_millis);
        // The burst may not be above the quota at any moment.
        self.files.write("cpu.max.burst", "0")?;
        self.files
            .write("cpu.max", &format!("{} {CPU_PERIOD_US}", limit.quota_us))?;
        self.files.write("cpu.max.burst", &limit.quota_us.to_string())?;
        self.files.write("cpu.weight", &limit.weight.to_string())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_limits_follow_the_amount() {
        let limit = |quota_us, weight| CpuLimit { quota_us, weight };
        assert_eq!(CpuLimit::of(250), limit(25_000, 25));
        assert_eq!(CpuLimit::of(1_000), limit(100_000, 100));
        assert_eq!(CpuLimit::of(4_000), limit(400_000, 400));
        assert_eq!(CpuLimit::of(10), limit(1_000, 1));
        assert_eq!(CpuLimit::of(0), limit(1_000, 1));
        assert_eq!(CpuLimit::of(u32::MAX).weight, 10_000);
    }
}
