//! How much a guest may use of the host's CPUs: `cpu.max` of its vCPUs' threads.

use stoker_linux::{Cgroup, CgroupError};

/// A limit holds in each period of so many us. A vCPU that has used up its part stands still for the rest of one: the shorter, the
/// shorter. Much shorter it can't be, for the kernel looks whether a part is used up at its ticks, 4 ms apart on most hosts; what
/// was used beyond it the next period has less.
const PERIOD_US: u64 = 50_000;

/// The least part of a period and the longest period that the kernel takes, in us.
const LEAST_QUOTA_US: u64 = 1_000;
const LONGEST_PERIOD_US: u64 = 1_000_000;

/// A limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Limit {
    None,
    /// So many us in each period of so many.
    Of {
        quota_us: u64,
        period_us: u64,
    },
}

// === impl Limit ===

impl Limit {
    /// Of so many thousandths of one CPU. All that its vCPUs can use is no limit: one of just that would stop all of them together
    /// whenever the host's clock says that they used a little more.
    pub(super) fn new(allowed_millis: u32, vcpus: u32) -> Self {
        let allowed = u64::from(allowed_millis);
        if allowed >= u64::from(vcpus) * 1000 {
            return Self::None;
        }
        // The least that there can be is a thousandth.
        let allowed = allowed.max(1);
        let period_us = (LEAST_QUOTA_US * 1000)
            .div_ceil(allowed)
            .clamp(PERIOD_US, LONGEST_PERIOD_US);
        Self::Of {
            quota_us: (allowed * period_us / 1000).max(LEAST_QUOTA_US),
            period_us,
        }
    }

    /// Sets it. What was not used in one period may be in the next (`cpu.max.burst`): over time it is the same.
    ///
    /// # Errors
    /// Where the cgroup is gone, or the kernel does not let it.
    pub(super) fn apply(self, vcpus: &Cgroup) -> Result<(), CgroupError> {
        // No burst may ever be more than the quota.
        optional(vcpus.write("cpu.max.burst", "0"))?;
        match self {
            Self::None => vcpus.write("cpu.max", "max"),
            Self::Of { quota_us, period_us } => {
                vcpus.write("cpu.max", &format!("{quota_us} {period_us}"))?;
                optional(vcpus.write("cpu.max.burst", &quota_us.to_string()))
            }
        }
    }
}

/// Before Linux 5.14 there is no burst.
fn optional(written: Result<(), CgroupError>) -> Result<(), CgroupError> {
    written.or_else(|error| if error.is_not_found() { Ok(()) } else { Err(error) })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn all_vcpus_are_no_limit() {
        assert_eq!(Limit::new(2000, 2), Limit::None);
        assert_eq!(Limit::new(u32::MAX, 2), Limit::None);
        assert_ne!(Limit::new(1999, 2), Limit::None);
    }

    #[test]
    fn a_limit_is_what_is_allowed() {
        for allowed in 1..4000_u32 {
            let Limit::Of { quota_us, period_us } = Limit::new(allowed, 4) else {
                panic!("{allowed} of 4000 is a limit");
            };
            let exact = f64::from(allowed) / 1000.0 * period_us as f64;
            assert!(
                (quota_us as f64 / exact - 1.0).abs() < 0.01,
                "{allowed}: {quota_us} of {period_us} us"
            );
            assert!(
                quota_us >= 1000 && (50_000..=1_000_000).contains(&period_us),
                "{allowed}"
            );
        }
        // Nobody is limited to nothing.
        assert_eq!(Limit::new(0, 1), Limit::new(1, 1));
    }

    #[test]
    fn files_are_written_and_none_is_made() {
        let folder = tempfile::tempdir().unwrap();
        let cgroup = Cgroup::at(folder.path().to_owned());
        assert!(Limit::new(100, 1).apply(&cgroup).unwrap_err().is_not_found());
        let (max, burst) = (folder.path().join("cpu.max"), folder.path().join("cpu.max.burst"));
        fs::write(&max, "").unwrap();
        Limit::new(100, 1).apply(&cgroup).unwrap();
        assert_eq!(fs::read_to_string(&max).unwrap(), "5000 50000");
        assert!(!burst.exists());
    }
}
