use crate::scale::Part;
use crate::{AccountLimits, Rules, Shape};

/// Part of the host: a number of machines, their memory, their vCPUs, their drives and what CPU they are promised. What is left of it is
/// less than nothing where machines were found that the rules have no room for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct HostRoom {
    pub(crate) machines: i64,
    pub(crate) memory_mib: i64,
    pub(crate) cpu_millis: i64,
    pub(crate) scratch_mib: i64,
    pub(crate) baseline_millis: i64,
}

// === impl HostRoom ===

impl HostRoom {
    /// The whole host.
    pub(crate) fn all(rules: &Rules) -> Self {
        Self {
            machines: i64::try_from(rules.max_machines).unwrap_or(i64::MAX),
            memory_mib: i64::try_from(rules.host_memory_mib).unwrap_or(i64::MAX),
            cpu_millis: i64::try_from(rules.host_cpu_millis).unwrap_or(i64::MAX),
            scratch_mib: i64::try_from(rules.host_scratch_mib).unwrap_or(i64::MAX),
            baseline_millis: i64::try_from(rules.host_baseline_millis).unwrap_or(i64::MAX),
        }
    }

    /// The most that an account may have.
    pub(crate) fn allowed(limits: &AccountLimits) -> Self {
        Self {
            machines: limits.machines.into(),
            memory_mib: i64::try_from(limits.memory_mib).unwrap_or(i64::MAX),
            cpu_millis: i64::try_from(limits.cpu_millis).unwrap_or(i64::MAX),
            scratch_mib: i64::MAX,
            baseline_millis: i64::MAX,
        }
    }

    /// What one machine takes.
    pub(crate) fn of(shape: Shape) -> Self {
        Self {
            machines: 1,
            memory_mib: shape.memory_mib.into(),
            cpu_millis: i64::from(shape.vcpus) * 1000,
            scratch_mib: shape.drive_mib.into(),
            baseline_millis: shape.baseline_millis.into(),
        }
    }

    /// What a machine takes more where its baseline changes: less than nothing where it becomes lower.
    pub(crate) fn of_baseline(before_millis: u32, after_millis: u32) -> Self {
        Self {
            baseline_millis: i64::from(after_millis) - i64::from(before_millis),
            ..Self::default()
        }
    }

    /// What a machine takes more where its vCPUs and memory change, whatever it is promised: less than nothing where it becomes
    /// smaller.
    pub(crate) fn between(before: Shape, after: Shape) -> Self {
        Self {
            baseline_millis: 0,
            ..Self::of(after).minus(Self::of(before))
        }
    }

    /// So much of the host's disk.
    pub(crate) fn of_disk(scratch_mib: u32) -> Self {
        Self {
            scratch_mib: scratch_mib.into(),
            ..Self::default()
        }
    }

    pub(crate) fn plus(self, other: Self) -> Self {
        Self {
            machines: self.machines.saturating_add(other.machines),
            memory_mib: self.memory_mib.saturating_add(other.memory_mib),
            cpu_millis: self.cpu_millis.saturating_add(other.cpu_millis),
            scratch_mib: self.scratch_mib.saturating_add(other.scratch_mib),
            baseline_millis: self.baseline_millis.saturating_add(other.baseline_millis),
        }
    }

    pub(crate) fn minus(self, other: Self) -> Self {
        Self {
            machines: self.machines.saturating_sub(other.machines),
            memory_mib: self.memory_mib.saturating_sub(other.memory_mib),
            cpu_millis: self.cpu_millis.saturating_sub(other.cpu_millis),
            scratch_mib: self.scratch_mib.saturating_sub(other.scratch_mib),
            baseline_millis: self.baseline_millis.saturating_sub(other.baseline_millis),
        }
    }

    /// What is left once so much was taken, where what it lacks comes from elsewhere.
    pub(crate) fn after(self, taken: Self) -> Self {
        let left = |has: i64, taken: i64| has.saturating_sub(taken).max(has.min(0));
        Self {
            machines: left(self.machines, taken.machines),
            memory_mib: left(self.memory_mib, taken.memory_mib),
            cpu_millis: left(self.cpu_millis, taken.cpu_millis),
            scratch_mib: left(self.scratch_mib, taken.scratch_mib),
            baseline_millis: left(self.baseline_millis, taken.baseline_millis),
        }
    }

    /// An account may have so much.
    pub(crate) fn within(self, limits: &AccountLimits) -> bool {
        self.fits(Self::allowed(limits))
    }

    /// The first part of it that is more than nothing and more than there is: which, how much it is, and how much there is.
    pub(crate) fn lacks(self, room: Self) -> Option<(Part, i64, i64)> {
        let parts = [
            (Part::Machines, self.machines, room.machines),
            (Part::Memory, self.memory_mib, room.memory_mib),
            (Part::Cpu, self.cpu_millis, room.cpu_millis),
            (Part::Disk, self.scratch_mib, room.scratch_mib),
            (Part::Baseline, self.baseline_millis, room.baseline_millis),
        ];
        parts.into_iter().find(|(_, needs, left)| *needs > 0 && needs > left)
    }

    pub(crate) fn fits(self, room: Self) -> bool {
        self.machines <= room.machines
            && self.memory_mib <= room.memory_mib
            && self.cpu_millis <= room.cpu_millis
            && self.scratch_mib <= room.scratch_mib
            && self.baseline_millis <= room.baseline_millis
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lacking_already_stays_so_and_what_comes_from_elsewhere_is_not() {
        let of = |machines, memory_mib, cpu_millis| HostRoom {
            machines,
            memory_mib,
            cpu_millis,
            scratch_mib: memory_mib,
            baseline_millis: cpu_millis,
        };
        assert_eq!(of(3, 500, -2).after(of(1, 600, 7)), of(2, 0, -2));
        assert_eq!(of(3, 500, -2).minus(of(1, 600, 7)), of(2, -100, -9));
    }
}
