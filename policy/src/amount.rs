use std::fmt;

use serde::{Deserialize, Serialize};

/// CPU, memory and scratch disk given to a container or free in a machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Amount {
    /// CPU in millicores.
    pub cpu_millis: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Of its machine's drive in MiB: `/tmp`, and code as it comes and unpacked. 0 in recordings of before there were drives.
    #[serde(default)]
    pub scratch_mib: u32,
}

/// The size of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Shape {
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Its scratch drive in MiB, which may be made larger; 0 where it has none.
    #[serde(default)]
    pub drive_mib: u32,
    /// What it is promised of the host's CPUs whatever others do, in millicores of one CPU, for all its vCPUs together; 0 in
    /// recordings of before there were credits.
    #[serde(default)]
    pub baseline_millis: u32,
}

// === impl Amount ===

impl Amount {
    /// All parts fit within `room`.
    #[must_use]
    pub fn fits(self, room: Amount) -> bool {
        self.cpu_millis <= room.cpu_millis && self.memory_mib <= room.memory_mib && self.scratch_mib <= room.scratch_mib
    }

    /// The sum; each part stops at its type's end.
    #[must_use]
    pub fn plus(self, other: Amount) -> Amount {
        Amount {
            cpu_millis: self.cpu_millis.saturating_add(other.cpu_millis),
            memory_mib: self.memory_mib.saturating_add(other.memory_mib),
            scratch_mib: self.scratch_mib.saturating_add(other.scratch_mib),
        }
    }

    /// The difference; each part stops at 0.
    #[must_use]
    pub fn minus(self, other: Amount) -> Amount {
        Amount {
            cpu_millis: self.cpu_millis.saturating_sub(other.cpu_millis),
            memory_mib: self.memory_mib.saturating_sub(other.memory_mib),
            scratch_mib: self.scratch_mib.saturating_sub(other.scratch_mib),
        }
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (cpu_millis, memory_mib) = (self.cpu_millis, self.memory_mib);
        match self.scratch_mib {
            0 => write!(f, "{cpu_millis} mCPU and {memory_mib} MiB"),
            scratch_mib => write!(
                f,
                "{cpu_millis} mCPU, {memory_mib} MiB of memory and {scratch_mib} MiB of scratch disk"
            ),
        }
    }
}

// === impl Shape ===

impl Shape {
    /// All that a machine of this size has, for its guest and for containers.
    #[must_use]
    pub fn amount(self) -> Amount {
        Amount {
            cpu_millis: self.vcpus.saturating_mul(1000),
            memory_mib: self.memory_mib,
            scratch_mib: self.drive_mib,
        }
    }
}
