//! How much of this host a machine can have.

use std::io;
use std::path::Path;

use nix::sys::statvfs::statvfs;
use stoker_linux::memory;

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
    pub fn of_this_host() -> io::Result<Self> {
        let cpus = std::thread::available_parallelism()?.get().min(MAX_VCPUS);
        let total_mib = memory::total()? >> 20;
        Ok(Self {
            cpu_millis: u32::try_from(cpus * 1000).unwrap_or(u32::MAX),
            memory_mib: u32::try_from(total_mib.saturating_sub(u64::from(GUEST_OVERHEAD_MIB))).unwrap_or(u32::MAX),
        })
    }
}

/// What may be written in a folder, or in the one above in which it is to be, in bytes.
///
/// # Errors
///
/// Where that can't be found out.
pub fn free_disk(folder: &Path) -> io::Result<u64> {
    let there = folder.ancestors().find(|folder| folder.exists());
    let found = statvfs(there.unwrap_or(folder))?;
    Ok(found.blocks_available().saturating_mul(found.fragment_size()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_has_something() {
        let capacity = Capacity::of_this_host().unwrap();
        let missing = std::env::temp_dir().join("is/not/there");
        assert!(free_disk(&missing).unwrap() > 0);
        assert!((1000..=8000).contains(&capacity.cpu_millis) && capacity.memory_mib > 0);
    }
}
