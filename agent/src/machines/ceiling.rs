//! How large a machine may ever become: fixed when it is booted, for its guest's kernel makes room for it then.

use serde::{Deserialize, Serialize};
use stoker_policy::Shape;

use crate::config;

/// By default a machine may become so many times as large as it starts. A vCPU that may come costs a guest about 0.3 MiB from the
/// start. Memory that may come costs it nothing before it comes; then the kernel's records of it are a 64th of it, in what the machine
/// started with, of which they may be a 20th so.
const GROWTH: u32 = 4;

/// The most vCPUs that a guest's kernel knows what to do with (`CONFIG_NR_CPUS` of the one that we build).
const MOST_VCPUS: u32 = 64;

/// What is plugged comes in blocks of so many MiB.
pub(super) const BLOCK_MIB: u32 = (stoker_vmm::memory::BLOCK >> 20) as u32;

/// The most that a machine may ever have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ceiling {
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest memory in MiB: what it starts with, and whole blocks beside that.
    pub memory_mib: u32,
}

/// What decides about the ceilings of machines of this host.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ceilings {
    max_vcpus: Option<u32>,
    max_memory_mib: Option<u32>,
    /// What the host has itself.
    host: Ceiling,
}

// === impl Ceiling ===

impl Ceiling {
    /// Of a machine that stays as it starts.
    #[must_use]
    pub fn fixed(shape: Shape) -> Self {
        Self {
            vcpus: shape.vcpus,
            memory_mib: shape.memory_mib,
        }
    }

    /// The same, or more where that is less than what a machine starts with; in whole blocks.
    fn at_least(self, shape: Shape) -> Self {
        let more = self.memory_mib.saturating_sub(shape.memory_mib);
        Self {
            vcpus: self.vcpus.max(shape.vcpus),
            memory_mib: shape.memory_mib + more / BLOCK_MIB * BLOCK_MIB,
        }
    }
}

// === impl Ceilings ===

impl Ceilings {
    /// As configured, on a host that has so much.
    pub(super) fn new(config: &config::Machines, host: Ceiling) -> Self {
        Self {
            max_vcpus: config.max_vcpus,
            max_memory_mib: config.max_memory_mib,
            host,
        }
    }

    /// That of a machine that starts with so much.
    pub(super) fn of(&self, shape: Shape) -> Ceiling {
        let grown = |amount: u32, host: u32| amount.saturating_mul(GROWTH).min(host);
        let vcpus = self.max_vcpus.unwrap_or_else(|| grown(shape.vcpus, self.host.vcpus));
        let memory_mib = self.max_memory_mib;
        let ceiling = Ceiling {
            vcpus: vcpus.min(MOST_VCPUS),
            memory_mib: memory_mib.unwrap_or_else(|| grown(shape.memory_mib, self.host.memory_mib)),
        };
        ceiling.at_least(shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(vcpus: u32, memory_mib: u32) -> Shape {
        Shape {
            vcpus,
            memory_mib,
            drive_mib: 0,
            baseline_millis: 0,
        }
    }

    fn of(max: (Option<u32>, Option<u32>), host: (u32, u32), vcpus: u32, memory_mib: u32) -> (u32, u32) {
        let ceilings = Ceilings {
            max_vcpus: max.0,
            max_memory_mib: max.1,
            host: Ceiling {
                vcpus: host.0,
                memory_mib: host.1,
            },
        };
        let ceiling = ceilings.of(shape(vcpus, memory_mib));
        (ceiling.vcpus, ceiling.memory_mib)
    }

    #[test]
    fn a_machine_may_grow_as_far_as_the_host_goes() {
        let by_default = (None, None);
        assert_eq!(of(by_default, (64, 1 << 20), 2, 512), (8, 2048));
        assert_eq!(of(by_default, (6, 1500), 2, 512), (6, 1500));
        assert_eq!(of(by_default, (256, 1 << 20), 32, 512), (64, 2048));
        // It has more than the host already.
        assert_eq!(of(by_default, (2, 256), 4, 512), (4, 512));
    }

    #[test]
    fn what_is_configured_counts_but_never_less_than_it_starts_with() {
        assert_eq!(of((Some(16), Some(9000)), (4, 4096), 2, 512), (16, 9000));
        assert_eq!(of((Some(2), Some(512)), (64, 1 << 20), 2, 512), (2, 512));
        assert_eq!(of((Some(2), Some(512)), (64, 1 << 20), 4, 600), (4, 600));
        assert_eq!(of((Some(500), None), (64, 1 << 20), 2, 512).0, 64);
    }

    #[test]
    fn memory_comes_in_whole_blocks() {
        for (most, is) in [(1025, 1025), (1026, 1025), (1027, 1027), (513, 513)] {
            assert_eq!(of((None, Some(most)), (64, 1 << 20), 2, 513).1, is, "{most}");
        }
    }
}
