//! How much of this host a machine can have.

/// The largest amount that one machine of this host can give to a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// CPU in millicores.
    pub cpu_millis: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
}

/// vCPUs that the VMM gives one machine at most.
const MAX_VCPUS: usize = 8;

/// Guest memory in MiB that kernel and init need for themselves.
pub(crate) const GUEST_OVERHEAD_MIB: u32 = 64;

// === impl Capacity ===

impl Capacity {
    /// What this host has: its CPUs as this process may use them (at most 8, the VMM's limit), and its memory less what a
    /// guest needs for itself.
    ///
    /// # Errors
    ///
    /// Where `/proc/meminfo` or the CPU count can't be read.
    pub fn of_this_host() -> std::io::Result<Self> {
        let cpus = std::thread::available_parallelism()?.get().min(MAX_VCPUS);
        let meminfo = std::fs::read_to_string("/proc/meminfo")?;
        let total_mib = mem_total_kib(&meminfo)
            .ok_or_else(|| std::io::Error::new(std::io::ErrorKind::InvalidData, "/proc/meminfo has no MemTotal"))?
            / 1024;
        Ok(Self {
            cpu_millis: u32::try_from(cpus * 1000).unwrap_or(u32::MAX),
            memory_mib: u32::try_from(total_mib.saturating_sub(u64::from(GUEST_OVERHEAD_MIB))).unwrap_or(u32::MAX),
        })
    }
}

fn mem_total_kib(meminfo: &str) -> Option<u64> {
    meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_in_kib() {
        assert_eq!(
            mem_total_kib("MemTotal:       24689548 kB\nMemFree: 1 kB\n"),
            Some(24_689_548)
        );
        assert_eq!(mem_total_kib("MemFree: 1 kB\n"), None);
    }

    #[test]
    fn this_host_has_something() {
        let capacity = Capacity::of_this_host().unwrap();
        assert!((1000..=8000).contains(&capacity.cpu_millis) && capacity.memory_mib > 0);
    }
}
