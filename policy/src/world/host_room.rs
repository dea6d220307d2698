use crate::{AccountLimits, Rules, Shape};

/// Part of the host: a number of machines, their memory and their vCPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct HostRoom {
    pub(crate) machines: u64,
    pub(crate) memory_mib: u64,
    pub(crate) cpu_millis: u64,
}

// === impl HostRoom ===

impl HostRoom {
    /// The whole host.
    pub(crate) fn all(rules: &Rules) -> Self {
        Self {
            machines: u64::try_from(rules.max_machines).unwrap_or(u64::MAX),
            memory_mib: rules.host_memory_mib,
            cpu_millis: rules.host_cpu_millis,
        }
    }

    /// What one machine takes.
    pub(crate) fn of(shape: Shape) -> Self {
        Self {
            machines: 1,
            memory_mib: shape.memory_mib.into(),
            cpu_millis: u64::from(shape.vcpus) * 1000,
        }
    }

    pub(crate) fn plus(self, other: Self) -> Self {
        Self {
            machines: self.machines + other.machines,
            memory_mib: self.memory_mib + other.memory_mib,
            cpu_millis: self.cpu_millis + other.cpu_millis,
        }
    }

    pub(crate) fn minus(self, other: Self) -> Self {
        Self {
            machines: self.machines.saturating_sub(other.machines),
            memory_mib: self.memory_mib.saturating_sub(other.memory_mib),
            cpu_millis: self.cpu_millis.saturating_sub(other.cpu_millis),
        }
    }

    /// An account may have so much.
    pub(crate) fn within(self, limits: &AccountLimits) -> bool {
        self.machines <= limits.machines.into() && self.memory_mib <= limits.memory_mib
    }

    pub(crate) fn fits(self, room: Self) -> bool {
        self.machines <= room.machines && self.memory_mib <= room.memory_mib && self.cpu_millis <= room.cpu_millis
    }
}
