//! AWS's T3 instances, as they are published: table "CPU credits earned per hour" of "Key concepts for burstable performance
//! instances" in the EC2 user guide.

use crate::plan::Plan;
use crate::terms::Mode;
use crate::units::Credits;

/// What a T2 instance in `standard` has at its start, for each of its vCPUs ("Launch credits" in the same guide). T3 instances have
/// none.
pub const T2_LAUNCH_PER_VCPU: Credits = Credits::new(30);

/// A size of T3 instances.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// `t3.nano`.
    Nano,
    /// `t3.micro`.
    Micro,
    /// `t3.small`.
    Small,
    /// `t3.medium`: as small, with more memory.
    Medium,
    /// `t3.large`.
    Large,
    /// `t3.xlarge`.
    XLarge,
    /// `t3.2xlarge`.
    X2Large,
}

impl Size {
    /// From the smallest to the largest.
    pub const ALL: [Self; 7] = [
        Self::Nano,
        Self::Micro,
        Self::Small,
        Self::Medium,
        Self::Large,
        Self::XLarge,
        Self::X2Large,
    ];

    /// AWS's name for it.
    #[inline]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nano => "t3.nano",
            Self::Micro => "t3.micro",
            Self::Small => "t3.small",
            Self::Medium => "t3.medium",
            Self::Large => "t3.large",
            Self::XLarge => "t3.xlarge",
            Self::X2Large => "t3.2xlarge",
        }
    }

    /// How many vCPUs it has.
    #[inline]
    pub const fn vcpus(self) -> u32 {
        match self {
            Self::XLarge => 4,
            Self::X2Large => 8,
            _ => 2,
        }
    }

    /// Its baseline, in percent of each vCPU.
    #[inline]
    pub const fn baseline_percent(self) -> u32 {
        match self {
            Self::Nano => 5,
            Self::Micro => 10,
            Self::Small | Self::Medium => 20,
            Self::Large => 30,
            Self::XLarge | Self::X2Large => 40,
        }
    }

    /// A plan by which a machine earns and keeps what this size does. The thresholds, of which AWS says nothing, are ours.
    #[inline]
    pub const fn plan(self, mode: Mode) -> Plan {
        Plan::new(self.vcpus(), self.vcpus() * self.baseline_percent() * 10, mode)
    }
}
