//! What this machine tells about itself.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use stoker_proto::guest::MachineUse;

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

/// All memory that is online, in bytes; 0 where the kernel does not say.
pub(crate) fn memory_bytes() -> u64 {
    stoker_linux::memory::total().unwrap_or(0)
}

/// What is used of all of it. Without pressure where the kernel does not count it.
pub(crate) fn used() -> MachineUse {
    MachineUse {
        memory_bytes: memory_bytes().saturating_sub(memory_available_bytes()),
        cpu_pressure_us: pressure_us("cpu"),
        memory_pressure_us: pressure_us("memory"),
        io_pressure_us: pressure_us("io"),
    }
}

/// For how long something waited for this resource since the kernel started, in us; nothing where the kernel does not count it.
fn pressure_us(resource: &str) -> Option<u64> {
    let waited = stoker_linux::pressure::waited(resource).ok()?;
    Some(u64::try_from(waited.as_micros()).unwrap_or(u64::MAX))
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
        assert!((1..=memory_bytes()).contains(&used().memory_bytes));
    }

    #[test]
    fn what_the_kernel_does_not_count_is_not_told() {
        assert_eq!(pressure_us("nothing"), None);
    }
}
