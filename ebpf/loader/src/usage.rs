//! What subjects used.

use stoker_ebpf_types::{EXITS, Exit, PARTS, Part};

use crate::cgroup::CgroupId;

/// What threads used of CPUs, in ns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Time {
    /// CPU time.
    pub cpu_ns: u64,
    /// Time that they were runnable and waited for a CPU.
    pub wait_ns: u64,
    /// Of that, the time that they were held back since their cgroup had used its limit up; the rest others had the CPU. 0 where
    /// [`crate::Ledger::lacks`] it.
    pub throttled_ns: u64,
}

/// What a subject has used since it was added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// CPU time in ns.
    pub cpu_ns: u64,
    /// Time in ns that its threads were runnable and waited for a CPU.
    pub wait_ns: u64,
    /// Of that, the time that they were held back: see [`Time::throttled_ns`].
    pub throttled_ns: u64,
    /// Resident memory now, in bytes.
    pub memory_bytes: u64,
    /// The most resident memory so far, or since [`Ledger::begin_peak`](crate::Ledger::begin_peak), in bytes.
    pub memory_peak_bytes: u64,
    /// The same times by part.
    pub(crate) parts: [Time; PARTS as usize],
}

/// What KVM has done for a machine since it was added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestUse {
    /// Time in ns that its vCPUs ran the guest. What their threads used beyond that was KVM's and the VMM's.
    pub guest_ns: u64,
    pub(crate) exits: [u64; EXITS],
}

/// A subject's threads lost CPUs to another's, though they could have run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preempted {
    /// Whose threads lost them.
    pub subject: CgroupId,
    /// Whose threads took them; `None` for those of no subject that is there.
    pub by: Option<CgroupId>,
    /// How often.
    pub times: u64,
}

// === impl Time ===

impl Time {
    pub(crate) fn plus(self, other: Self) -> Self {
        Self {
            cpu_ns: self.cpu_ns + other.cpu_ns,
            wait_ns: self.wait_ns + other.wait_ns,
            throttled_ns: self.throttled_ns + other.throttled_ns,
        }
    }

    /// What this has more than another.
    pub(crate) fn beyond(self, other: Self) -> Self {
        Self {
            cpu_ns: self.cpu_ns.saturating_sub(other.cpu_ns),
            wait_ns: self.wait_ns.saturating_sub(other.wait_ns),
            throttled_ns: self.throttled_ns.saturating_sub(other.throttled_ns),
        }
    }

    /// The most of both.
    pub(crate) fn most(self, other: Self) -> Self {
        Self {
            cpu_ns: self.cpu_ns.max(other.cpu_ns),
            wait_ns: self.wait_ns.max(other.wait_ns),
            throttled_ns: self.throttled_ns.max(other.throttled_ns),
        }
    }
}

// === impl Usage ===

impl Usage {
    /// What one part of it used. All together they are the subject's, but for CPU time that was told of it while it ran and
    /// turned out to have been stolen.
    pub fn part(&self, part: Part) -> Time {
        let [own, vcpus, vmm] = self.parts;
        match part {
            Part::Own => own,
            Part::Vcpus => vcpus,
            Part::Vmm => vmm,
        }
    }

    /// With these times in the place of its own.
    pub(crate) fn with(self, parts: [Time; PARTS as usize]) -> Self {
        let sum = parts.into_iter().fold(Time::default(), Time::plus);
        Self {
            cpu_ns: sum.cpu_ns,
            wait_ns: sum.wait_ns,
            throttled_ns: sum.throttled_ns,
            parts,
            ..self
        }
    }
}

// === impl GuestUse ===

impl GuestUse {
    /// How often its vCPUs left the guest, by reason.
    pub fn exits(&self) -> impl Iterator<Item = (Exit, u64)> {
        Exit::ALL.into_iter().zip(self.exits)
    }
}
