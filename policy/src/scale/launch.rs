use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use stoker_credits::{Mode, TermsError};

use super::obstacle::Obstacle;
use super::size::{BLOCK_MIB, Quantity, Resource, Size};
use super::threshold::Thresholds;
use crate::{Rules, Shape};

/// The most vCPUs that a machine may come to have.
pub const MOST_VCPUS: u32 = 64;

/// A machine as an account wants it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launch {
    /// What it is booted from: an id that means something to executors alone.
    pub image: Arc<str>,
    /// What it begins with; of a machine that was found, what was asked for last.
    pub size: Size,
    /// The most that it may ever have.
    pub ceiling: Size,
    /// The memory that it is booted with, in MiB, and can't give back; the rest of its size is plugged at once.
    pub base_mib: u32,
    /// Its scratch drive in MiB, which the writable layer of its image is on.
    pub drive_mib: u32,
    /// When its size changes, and how.
    pub thresholds: Thresholds,
    /// What becomes of it without credits; as the rules have it where nothing else is asked for.
    pub mode: Option<Mode>,
}

/// Why a machine is not launched.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LaunchError {
    /// The agent is shutting down.
    #[error("the agent is shutting down")]
    Draining,
    /// There is a machine of that id.
    #[error("there is a machine of that id")]
    Exists,
    /// No machine can have its size.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// Its account may not have it.
    #[error("it needs {needs} {part}, and the limits of its account leave {}: end a machine, or ask for less", (*left).max(0))]
    Account {
        /// Of what there is too little.
        part: Part,
        /// How much it needs.
        needs: i64,
        /// How much is left.
        left: i64,
    },
    /// The host has no room.
    #[error("it needs {needs} {part}, and the host has {} left: end a machine, or ask for less", (*left).max(0))]
    Host {
        /// Of what there is too little.
        part: Part,
        /// How much it needs.
        needs: i64,
        /// How much is left.
        left: i64,
    },
    /// Its account of credits can't be kept.
    #[error(transparent)]
    Terms(#[from] TermsError),
}

/// Why no machine can have a size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// It has nothing of something.
    #[error("a machine needs some {0}")]
    Nothing(Resource),
    /// A CPU share of more than its vCPUs.
    #[error("a CPU share of {share_millis} mCPU is more than {vcpus} vCPUs can use")]
    Share {
        /// The share.
        share_millis: u32,
        /// The vCPUs.
        vcpus: u32,
    },
    /// Memory that is not in whole blocks.
    #[error("memory goes in blocks of {BLOCK_MIB} MiB, and {0} MiB are not whole ones")]
    Blocks(u32),
    /// More than it may ever have.
    #[error("{} are more than the most that it may ever have, {}", Quantity(*resource, *amount), Quantity(*resource, *most))]
    AboveCeiling {
        /// Of what.
        resource: Resource,
        /// How much.
        amount: u32,
        /// The most.
        most: u32,
    },
    /// More than any machine of this host may have.
    #[error("the most that it may ever have, {}, is more than the host allows, {}", Quantity(*resource, *amount), Quantity(*resource, *most))]
    AboveHost {
        /// Of what.
        resource: Resource,
        /// How much.
        amount: u32,
        /// The most.
        most: u32,
    },
    /// Booted with less than its kernel needs.
    #[error("it can't be booted with {base_mib} MiB: its kernel keeps {reserve_mib} MiB for itself")]
    TooSmall {
        /// What it is to be booted with.
        base_mib: u32,
        /// What its kernel keeps.
        reserve_mib: u32,
    },
    /// Less than it is booted with.
    #[error("{memory_mib} MiB are less than the {base_mib} MiB that it is booted with and can't give back")]
    BelowBase {
        /// What it is to have.
        memory_mib: u32,
        /// What it is booted with.
        base_mib: u32,
    },
}

/// Why a machine's size is not changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResizeError {
    /// It is not there, or was not launched by an account.
    #[error("there is no such machine, or it was not launched by an account")]
    Unknown,
    /// It is not in a state for that.
    #[error("the machine boots or ends; it can be resized while it runs")]
    State,
    /// No machine can have that size.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// Something stands in the way.
    #[error("{resource} can't be {}: {}", Quantity(*resource, *wanted), obstacle.about(*resource))]
    Obstacle {
        /// Of what.
        resource: Resource,
        /// What was asked for.
        wanted: u32,
        /// What stands in the way.
        obstacle: Obstacle,
    },
}

/// A part of what a host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// A number of machines.
    Machines,
    /// Memory in MiB.
    Memory,
    /// vCPUs in millicores.
    Cpu,
    /// Disk in MiB.
    Disk,
    /// What is promised of the host's CPUs, in millicores.
    Baseline,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Machines => "machines",
            Self::Memory => "MiB of memory",
            Self::Cpu => "mCPU of vCPUs",
            Self::Disk => "MiB of disk",
            Self::Baseline => "mCPU of baseline",
        })
    }
}

// === impl Launch ===

impl Launch {
    /// How large the machine counts when it begins, with what it is promised by the rules.
    pub(crate) fn shape(&self, rules: &Rules) -> Shape {
        rules.with_baseline(Shape {
            vcpus: self.size.vcpus,
            memory_mib: self.size.memory_mib,
            drive_mib: self.drive_mib,
            baseline_millis: 0,
        })
    }

    /// Checks the sizes against one another and what the host allows.
    ///
    /// # Errors
    /// The first that can't be.
    pub fn check(&self, rules: &Rules) -> Result<(), SizeError> {
        let host = largest(rules);
        for resource in [Resource::Vcpus, Resource::Memory] {
            let (amount, most) = (self.ceiling.get(resource), host.get(resource));
            if amount > most {
                return Err(SizeError::AboveHost { resource, amount, most });
            }
        }
        let (base_mib, reserve_mib) = (self.base_mib, rules.reserve_mib);
        if base_mib <= reserve_mib {
            return Err(SizeError::TooSmall { base_mib, reserve_mib });
        }
        for mib in [base_mib, self.ceiling.memory_mib] {
            if !mib.is_multiple_of(BLOCK_MIB) {
                return Err(SizeError::Blocks(mib));
            }
        }
        check_size(self.size, self.ceiling, base_mib)
    }
}

/// Whether a machine with this ceiling and this base can have a size.
pub(crate) fn check_size(size: Size, ceiling: Size, base_mib: u32) -> Result<(), SizeError> {
    for resource in Resource::ALL {
        if size.get(resource) == 0 {
            return Err(SizeError::Nothing(resource));
        }
    }
    let beyond = |resource: Resource| {
        let (amount, most) = (size.get(resource), ceiling.get(resource));
        (amount > most).then_some(SizeError::AboveCeiling { resource, amount, most })
    };
    if let Some(error) = beyond(Resource::Vcpus).or_else(|| beyond(Resource::Memory)) {
        return Err(error);
    }
    let (vcpus, share_millis) = (size.vcpus, size.cpu_millis);
    if share_millis > vcpus.saturating_mul(1000) {
        return Err(SizeError::Share { share_millis, vcpus });
    }
    if let Some(error) = beyond(Resource::CpuShare) {
        return Err(error);
    }
    let memory_mib = size.memory_mib;
    if !memory_mib.is_multiple_of(BLOCK_MIB) {
        return Err(SizeError::Blocks(memory_mib));
    }
    if memory_mib < base_mib {
        return Err(SizeError::BelowBase { memory_mib, base_mib });
    }
    Ok(())
}

/// The largest machine of a host.
pub(crate) fn largest(rules: &Rules) -> Size {
    let of_host = u32::try_from(rules.host_cpu_millis / 1000).unwrap_or(u32::MAX);
    let memory_mib = u32::try_from(rules.host_memory_mib).unwrap_or(u32::MAX);
    Size::whole(
        rules.max_vcpus.min(MOST_VCPUS).min(of_host),
        memory_mib - memory_mib % BLOCK_MIB,
    )
}
