//! How much a guest may use of the host's CPUs: `cpu.max` of its vCPUs' threads.

use stoker_linux::CpuMax;

/// A limit holds in each period of so many us. A vCPU that has used up its part stands still for the rest of one: the shorter, the
/// shorter. Much shorter it can't be, for the kernel looks whether a part is used up at its ticks, 4 ms apart on most hosts; what
/// was used beyond it the next period has less.
const PERIOD_US: u64 = 50_000;

/// The limit of so many thousandths of one CPU. All that its vCPUs can use is no limit: one of just that would stop all of them
/// together whenever the host's clock says that they used a little more.
pub(super) fn limit(allowed_millis: u32, vcpus: u32) -> Option<CpuMax> {
    let all = u64::from(vcpus) * 1000;
    (u64::from(allowed_millis) < all).then(|| CpuMax::new(allowed_millis, PERIOD_US))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_vcpus_are_no_limit() {
        assert_eq!(limit(2000, 2), None);
        assert_eq!(limit(u32::MAX, 2), None);
        assert_ne!(limit(1999, 2), None);
    }
}
