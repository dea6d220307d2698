use std::fmt;

use serde::{Deserialize, Serialize};

/// Guest memory is plugged and unplugged in blocks of so many MiB, so amounts of it are multiples of that (virtio 1.3, 5.15: the
/// block size of our device).
pub const BLOCK_MIB: u32 = 2;

/// What a machine that was launched has of CPU and memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Number of vCPUs.
    pub vcpus: u32,
    /// The CPU share: the most that all its vCPUs may use together, in millicores of one CPU.
    pub cpu_millis: u32,
    /// Guest memory in MiB.
    pub memory_mib: u32,
}

/// What the guest has of what was asked for, as the machine's devices tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Taken {
    /// vCPUs that it has online.
    pub vcpus: u32,
    /// Memory that is plugged, in MiB.
    pub memory_mib: u32,
}

/// A change of some of a size; the rest stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SizeChange {
    /// Number of vCPUs.
    pub vcpus: Option<u32>,
    /// CPU share in millicores. Where it is absent, a share of all vCPUs stays one of all.
    pub cpu_millis: Option<u32>,
    /// Guest memory in MiB.
    pub memory_mib: Option<u32>,
}

/// What can be changed of a machine's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Resource {
    /// Its vCPUs, by number.
    Vcpus,
    /// Its CPU share, in millicores.
    CpuShare,
    /// Its memory, in MiB.
    Memory,
}

// === impl Size ===

impl Size {
    /// With all of its vCPUs as its CPU share.
    #[must_use]
    pub fn whole(vcpus: u32, memory_mib: u32) -> Self {
        Self {
            vcpus,
            cpu_millis: vcpus.saturating_mul(1000),
            memory_mib,
        }
    }

    /// How much it has of a resource, in the resource's unit.
    #[must_use]
    pub fn get(self, resource: Resource) -> u32 {
        match resource {
            Resource::Vcpus => self.vcpus,
            Resource::CpuShare => self.cpu_millis,
            Resource::Memory => self.memory_mib,
        }
    }

    /// The same with so much of a resource. A CPU share of all vCPUs stays one of all; another stays what it is, where the vCPUs
    /// are enough for it.
    #[must_use]
    pub fn with(self, resource: Resource, amount: u32) -> Self {
        match resource {
            Resource::Vcpus => {
                let all = amount.saturating_mul(1000);
                let is_whole = self.cpu_millis == self.vcpus.saturating_mul(1000);
                Self {
                    vcpus: amount,
                    cpu_millis: if is_whole { all } else { self.cpu_millis.min(all) },
                    ..self
                }
            }
            Resource::CpuShare => Self {
                cpu_millis: amount,
                ..self
            },
            Resource::Memory => Self {
                memory_mib: amount,
                ..self
            },
        }
    }

    /// The same with this change.
    #[must_use]
    pub fn changed(self, change: SizeChange) -> Self {
        let parts = [
            (Resource::Vcpus, change.vcpus),
            (Resource::CpuShare, change.cpu_millis),
            (Resource::Memory, change.memory_mib),
        ];
        let set = parts
            .into_iter()
            .filter_map(|(resource, amount)| Some((resource, amount?)));
        set.fold(self, |size, (resource, amount)| size.with(resource, amount))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let part = |resource| Quantity(resource, self.get(resource));
        write!(f, "{} and {}", part(Resource::Vcpus), part(Resource::Memory))?;
        match self.cpu_millis == self.vcpus.saturating_mul(1000) {
            true => Ok(()),
            false => write!(f, ", held to {}", part(Resource::CpuShare)),
        }
    }
}

// === impl Taken ===

impl Taken {
    /// How much of a resource the guest has; nothing for what it has no part in.
    pub(crate) fn get(self, resource: Resource) -> Option<u32> {
        match resource {
            Resource::Vcpus => Some(self.vcpus),
            Resource::CpuShare => None,
            Resource::Memory => Some(self.memory_mib),
        }
    }

    /// The guest has all that was asked for, and no more.
    pub(crate) fn is(self, asked: Size) -> bool {
        (self.vcpus, self.memory_mib) == (asked.vcpus, asked.memory_mib)
    }
}

// === impl Resource ===

impl Resource {
    /// All of them, in the order in which they are looked at.
    pub const ALL: [Self; 3] = [Self::Vcpus, Self::CpuShare, Self::Memory];

    /// What amounts of it are multiples of.
    #[must_use]
    pub fn unit(self) -> u32 {
        match self {
            Self::Vcpus | Self::CpuShare => 1,
            Self::Memory => BLOCK_MIB,
        }
    }

    /// It is about CPU, as another may be: what changes one changes what there is to measure of the other.
    pub(crate) fn is_cpu(self) -> bool {
        self != Self::Memory
    }

    /// Its place in an array of all.
    pub(crate) fn index(self) -> usize {
        match self {
            Self::Vcpus => 0,
            Self::CpuShare => 1,
            Self::Memory => 2,
        }
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vcpus => "vCPUs",
            Self::CpuShare => "CPU share",
            Self::Memory => "memory",
        })
    }
}

/// So much of a resource, as people read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Quantity(pub(crate) Resource, pub(crate) u32);

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Resource::Vcpus if self.1 == 1 => f.write_str("1 vCPU"),
            Resource::Vcpus => write!(f, "{} vCPUs", self.1),
            Resource::CpuShare => write!(f, "{} mCPU", self.1),
            Resource::Memory => write!(f, "{} MiB", self.1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_share_stays_whole_and_another_is_kept_where_it_can_be() {
        let whole = Size::whole(2, 512);
        assert_eq!(whole.with(Resource::Vcpus, 3), Size::whole(3, 512));
        let part = whole.with(Resource::CpuShare, 1500);
        assert_eq!(part.with(Resource::Vcpus, 3).cpu_millis, 1500);
        assert_eq!(part.with(Resource::Vcpus, 1), Size::whole(1, 512));
        let change = SizeChange {
            vcpus: Some(4),
            cpu_millis: Some(2500),
            memory_mib: None,
        };
        let changed = whole.changed(change);
        assert_eq!((changed.vcpus, changed.cpu_millis, changed.memory_mib), (4, 2500, 512));
        assert_eq!(changed.to_string(), "4 vCPUs and 512 MiB, held to 2500 mCPU");
    }
}
