//! What the agent itself takes, under the names that all of Prometheus' own libraries use.

use procfs::process::{LimitValue, Process as Proc};
use procfs::{ProcResult, WithCurrentSystemInfo as _};

/// What this process takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Process {
    /// CPU time in s.
    pub(super) cpu: f64,
    /// In bytes.
    pub(super) resident: u64,
    /// In bytes.
    pub(super) virtual_memory: u64,
    /// When it was started, in s since 1970.
    pub(super) started: f64,
    pub(super) threads: u64,
    pub(super) open_fds: u64,
    /// Nothing where there is no limit.
    pub(super) max_fds: Option<u64>,
}

// === impl Process ===

impl Process {
    /// As it is now. Blocks for some microseconds.
    pub(super) fn read() -> ProcResult<Self> {
        let process = Proc::myself()?;
        let stat = process.stat()?;
        let seconds = |ticks: u64| ticks as f64 / procfs::ticks_per_second() as f64;
        let max_fds = match process.limits()?.max_open_files.soft_limit {
            LimitValue::Value(most) => Some(most),
            LimitValue::Unlimited => None,
        };
        Ok(Self {
            cpu: seconds(stat.utime.saturating_add(stat.stime)),
            resident: stat.rss_bytes().get(),
            virtual_memory: stat.vsize,
            started: procfs::boot_time_secs()? as f64 + seconds(stat.starttime),
            threads: u64::try_from(stat.num_threads).unwrap_or(0),
            open_fds: u64::try_from(process.fd_count()?).unwrap_or(u64::MAX),
            max_fds,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn it_is_of_this_process() {
        let before = Process::read().unwrap();
        let files: Vec<_> = (0..100).map(|_| File::open("/dev/null").unwrap()).collect();
        let after = Process::read().unwrap();
        // Other tests of this process open and close some.
        assert!(after.open_fds >= before.open_fds + 50, "{before:?} {after:?}");
        drop(files);
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
        assert!(after.started < now && after.started > now - 86_400.0, "{after:?}");
        assert!(
            after.resident > 1 << 20 && after.virtual_memory > after.resident,
            "{after:?}"
        );
        assert!(after.cpu >= before.cpu && after.threads >= 1, "{after:?}");
    }
}
