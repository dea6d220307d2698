use std::fmt;

use serde::{Deserialize, Serialize};

/// CPU and memory given to a container or free in a machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Amount {
    /// CPU in millicores.
    pub cpu_millis: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
}

/// The size of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Shape {
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u32,
}

// === impl Amount ===

impl Amount {
    /// Both parts fit within `room`.
    #[must_use]
    pub fn fits(self, room: Amount) -> bool {
        self.cpu_millis <= room.cpu_millis && self.memory_mib <= room.memory_mib
    }

    /// The sum; each part stops at its type's end.
    #[must_use]
    pub fn plus(self, other: Amount) -> Amount {
        Amount {
            cpu_millis: self.cpu_millis.saturating_add(other.cpu_millis),
            memory_mib: self.memory_mib.saturating_add(other.memory_mib),
        }
    }

    /// The difference; each part stops at 0.
    #[must_use]
    pub fn minus(self, other: Amount) -> Amount {
        Amount {
            cpu_millis: self.cpu_millis.saturating_sub(other.cpu_millis),
            memory_mib: self.memory_mib.saturating_sub(other.memory_mib),
        }
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} mCPU and {} MiB", self.cpu_millis, self.memory_mib)
    }
}

// === impl Shape ===

impl Shape {
    /// What a machine of this size can give to containers when its guest keeps `reserve_mib` for itself.
    #[must_use]
    pub fn capacity(self, reserve_mib: u32) -> Amount {
        Amount {
            cpu_millis: self.vcpus.saturating_mul(1000),
            memory_mib: self.memory_mib.saturating_sub(reserve_mib),
        }
    }
}
