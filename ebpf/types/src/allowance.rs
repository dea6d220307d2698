//! How much of the host's CPU time machines may use ahead of all others: a pure rule.

/// What a vCPU may use at once, in ns.
const BURST_NS: u64 = 25_000_000;

/// The most of one CPU that a vCPU may use, in thousandths.
const MOST_OF_VCPU: u64 = 500;

/// The most that all may use of the host's CPUs, in thousandths: the rest is for everybody, the host's own processes among them.
const MOST_OF_HOST: u64 = 500;

/// What one machine may use ahead of all others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowance {
    /// How much at once, in ns.
    pub burst_ns: u64,
    /// Thousandths of one CPU over time.
    pub share_millis: u64,
}

// === impl Allowance ===

impl Allowance {
    /// For a machine with so many vCPUs, where all that may be urgent, it among them, have `urgent_vcpus` on a host with `cpus` CPUs.
    #[inline(always)]
    pub fn new(vcpus: u32, urgent_vcpus: u64, cpus: u64) -> Self {
        // No host has so many that this overflows; a program can't multiply in 128 bits to be sure of it.
        let of_host = cpus.min(u64::MAX / MOST_OF_HOST) * MOST_OF_HOST / urgent_vcpus.max(1);
        let of_vcpu = of_host.clamp(1, MOST_OF_VCPU);
        let vcpus = u64::from(vcpus.max(1));
        Self {
            burst_ns: BURST_NS * vcpus,
            share_millis: of_vcpu * vcpus,
        }
    }

    /// How long a machine takes to be allowed so much, both in ns.
    pub fn covered_after_ns(self, used_ns: u64) -> u64 {
        let ns = (u128::from(used_ns) * 1000).div_ceil(self.share_millis.max(1).into());
        u64::try_from(ns).unwrap_or(u64::MAX)
    }

    /// Whether a machine that has used so much within that time stays within what it may, both in ns.
    pub fn covers(self, used_ns: u64, within_ns: u64) -> bool {
        self.covered_after_ns(used_ns) <= within_ns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> u64 {
        ms * 1_000_000
    }

    #[test]
    fn a_vcpu_has_half_a_cpu_on_a_host_with_room() {
        let allowance = Allowance::new(1, 1, 2);
        assert_eq!(allowance.burst_ns, ms(25));
        assert!(allowance.covers(ms(25), ms(50)) && !allowance.covers(ms(25), ms(49)));
        assert_eq!(allowance.covered_after_ns(ms(25)), ms(50));
        let of_two = Allowance::new(2, 2, 4);
        assert_eq!(of_two.burst_ns, ms(50));
        assert!(of_two.covers(ms(50), ms(50)) && !of_two.covers(ms(51), ms(50)));
    }

    #[test]
    fn all_together_have_half_of_the_host() {
        for (machines, cpus) in [(1, 1), (20, 2), (1000, 8), (5000, 64)] {
            let allowance = Allowance::new(1, machines, cpus);
            let all = allowance.share_millis * machines;
            assert!(all <= cpus * 500, "{machines} machines on {cpus} CPUs have {all}");
        }
    }

    #[test]
    fn every_one_has_something() {
        let least = Allowance::new(1, u64::MAX, 1);
        assert!(least.covers(ms(1), ms(1000)) && !least.covers(ms(2), ms(1000)));
        assert!(Allowance::new(u32::MAX, 0, u64::MAX).covers(ms(1), ms(1)));
    }
}
