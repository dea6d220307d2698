//! What the memory of a virtual machine's process is: the guest's RAM, and its own.

use std::fs;

use anyhow::{Context as _, Result};

/// Proportional set sizes of a process (proc_pid_smaps(5)), in KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pss {
    /// Of the guest's RAM.
    pub guest_kib: u64,
    /// Of all else.
    pub own_kib: u64,
}

// === impl Pss ===

impl Pss {
    /// Of the virtual machine that is this process, whose guest has so much RAM: the one mapping of just that size.
    ///
    /// # Errors
    ///
    /// Where there is no such process, or it has no such mapping.
    pub fn of(pid: u32, guest_ram_kib: u64) -> Result<Self> {
        let path = format!("/proc/{pid}/smaps");
        let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        Self::parse(&text, guest_ram_kib)
    }

    fn parse(smaps: &str, guest_ram_kib: u64) -> Result<Self> {
        let (mut guest, mut own_kib, mut size) = (None, 0, 0);
        for line in smaps.lines() {
            let figure = |key| Some(line.strip_prefix(key)?.trim().strip_suffix(" kB")?.parse::<u64>());
            if let Some(figure) = figure("Size:") {
                size = figure.with_context(|| format!("understand {line}"))?;
            } else if let Some(figure) = figure("Pss:") {
                let pss = figure.with_context(|| format!("understand {line}"))?;
                if size == guest_ram_kib {
                    guest = Some(pss);
                } else {
                    own_kib += pss;
                }
            }
        }
        let guest_kib = guest.context("no mapping is as large as the guest's RAM")?;
        Ok(Self { guest_kib, own_kib })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_told_from_the_own() {
        let smaps = "7f00-7f20 rw-p 0 00:00 0\nSize: 524288 kB\nRss: 30720 kB\nPss: 30720 kB\nPss_Dirty: 1 kB\n\
                     5500-5600 r-xp 0 00:00 0 /vmm\nSize: 900 kB\nRss: 512 kB\nPss: 256 kB\n\
                     5600-5700 rw-p 0 00:00 0\nSize:                 64 kB\nRss: 64 kB\nPss:                 250 kB\n";
        let pss = Pss::parse(smaps, 512 << 10).unwrap();
        assert_eq!((pss.guest_kib, pss.own_kib), (30 << 10, 506));
        assert!(Pss::parse(smaps, 256 << 10).is_err());
    }
}
