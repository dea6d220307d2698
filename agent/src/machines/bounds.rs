//! What the host lets a machine have, for what its guest has: the limits of its cgroup.

use stoker_linux::{CPU_PERIOD_US, Cgroup, CgroupError};
use stoker_policy::Shape;

use super::Ceiling;

/// Threads of a VMM beside those of its vCPUs, at most.
const OTHER_THREADS: u32 = 32;

/// What a machine's cgroup is to be enough for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bounds {
    /// vCPUs that have threads.
    pub(super) vcpus: u32,
    /// Guest memory in MiB.
    pub(super) memory_mib: u32,
}

// === impl Bounds ===

impl Bounds {
    /// For what a machine starts with.
    pub(super) fn of(shape: Shape) -> Self {
        Self {
            vcpus: shape.vcpus,
            memory_mib: shape.memory_mib,
        }
    }

    /// What is enough for both.
    pub(super) fn max(self, other: Self) -> Self {
        Self {
            vcpus: self.vcpus.max(other.vcpus),
            memory_mib: self.memory_mib.max(other.memory_mib),
        }
    }

    /// Bounds a machine, that may ever have up to `ceiling` and has no more than that, by those controllers that there are. Blocks.
    pub(super) fn set(self, cgroup: &Cgroup, controllers: &[&str], ceiling: Ceiling) -> Result<(), CgroupError> {
        // Whatever its VMM tells that it has.
        let (vcpus, memory_mib) = (self.vcpus.min(ceiling.vcpus), self.memory_mib.min(ceiling.memory_mib));
        // What KVM has of a vCPU stays when that is given back.
        let memory = stoker_vmm::memory::most_charged(memory_mib, ceiling.memory_mib, ceiling.vcpus);
        let pids = vcpus + OTHER_THREADS;
        // One CPU more than it has: all that a guest can make the VMM's own threads burn.
        let quota = (u64::from(vcpus) + 1) * CPU_PERIOD_US;
        let limits = [
            ("memory", "memory.max", memory.to_string()),
            ("pids", "pids.max", pids.to_string()),
            ("cpu", "cpu.max", format!("{quota} {CPU_PERIOD_US}")),
        ];
        let mut limits = limits
            .iter()
            .filter(|(controller, _, _)| controllers.contains(controller));
        limits.try_for_each(|(_, file, value)| cgroup.write(file, value))
    }
}
