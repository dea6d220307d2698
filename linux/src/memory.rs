//! Memory of the system and of processes, in bytes.

use std::{fs, io};

/// The memory that the kernel manages: `MemTotal` of proc_meminfo(5).
///
/// # Errors
/// Where `/proc/meminfo` can't be read or does not say.
pub fn total() -> io::Result<u64> {
    read("/proc/meminfo", "MemTotal:")
}

/// The memory that can be used without swapping: `MemAvailable` of proc_meminfo(5).
///
/// # Errors
/// Where `/proc/meminfo` can't be read or does not say.
pub fn available() -> io::Result<u64> {
    read("/proc/meminfo", "MemAvailable:")
}

/// The memory of a process that is resident: `VmRSS` of proc_pid_status(5).
///
/// # Errors
/// Where there is no such process, or it has no memory any more.
pub fn resident(pid: u32) -> io::Result<u64> {
    read(&format!("/proc/{pid}/status"), "VmRSS:")
}

fn read(path: &str, key: &str) -> io::Result<u64> {
    bytes(&fs::read_to_string(path)?, key)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("{path} has no {key}")))
}

/// The figure of a line `key: NUMBER kB`, in bytes.
fn bytes(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_in_bytes() {
        let text = "MemTotal:  10 kB\nMemAvailable:     1234 kB\nHugePages_Total:   0\n";
        assert_eq!(bytes(text, "MemTotal:"), Some(10 << 10));
        assert_eq!(bytes(text, "MemAvailable:"), Some(1234 << 10));
        assert_eq!(bytes(text, "MemFree:"), None);
        assert_eq!(bytes(text, "HugePages_Total:"), None);
        assert_eq!(bytes("MemTotal: 18446744073709551615 kB", "MemTotal:"), None);
    }

    #[test]
    fn this_system_and_process_have_memory() {
        let (total, available) = (total().unwrap(), available().unwrap());
        assert!(0 < available && available <= total, "{available} of {total}");
        let resident = resident(std::process::id()).unwrap();
        assert!(0 < resident && resident <= total, "{resident} of {total}");
        assert!(super::resident(u32::MAX).is_err());
    }
}
