//! What this machine tells about itself.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// Time since the kernel started, sleep included.
pub(crate) fn uptime() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}

/// The kernel's release.
pub(crate) fn kernel() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease")
        .map(|release| release.trim().to_owned())
        .unwrap_or_default()
}

/// CPUs that are online.
pub(crate) fn cpus() -> u32 {
    std::thread::available_parallelism().map_or(1, |cpus| u32::try_from(cpus.get()).unwrap_or(u32::MAX))
}

/// Memory that can be used without swapping, `MemAvailable` of proc_meminfo(5).
pub(crate) fn memory_available_bytes() -> u64 {
    std::fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| available(&text))
        .unwrap_or(0)
}

fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_kernel_tells() {
        let text = "MemTotal:  10 kB\nMemAvailable:     1234 kB\n";
        assert_eq!(available(text), Some(1234 * 1024));
        assert_eq!(available("MemTotal: 10 kB\n"), None);
        assert!(memory_available_bytes() > 0);
        assert!(uptime() > Duration::ZERO);
        assert!(cpus() > 0);
        assert!(!kernel().is_empty());
    }
}
