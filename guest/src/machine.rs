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

/// Memory that can be used without swapping; 0 where the kernel does not say.
pub(crate) fn memory_available_bytes() -> u64 {
    stoker_linux::memory::available().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_kernel_tells() {
        assert!(memory_available_bytes() > 0);
        assert!(uptime() > Duration::ZERO);
        assert!(cpus() > 0);
        assert!(!kernel().is_empty());
    }
}
