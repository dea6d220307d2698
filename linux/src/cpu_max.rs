//! How much a cgroup may use of CPUs: `cpu.max` (cgroup-v2.rst in the kernel's documentation).

use crate::cgroup::{Cgroup, CgroupError};

/// The least part of a period and the longest period that the kernel takes, in us.
const LEAST_QUOTA_US: u64 = 1_000;
const LONGEST_PERIOD_US: u64 = 1_000_000;

/// So many us in each period of so many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuMax {
    /// What may be used in a period, by all CPUs together.
    pub quota_us: u64,
    /// How long a period is.
    pub period_us: u64,
}

// === impl CpuMax ===

impl CpuMax {
    /// So many thousandths of one CPU, a thousandth at least, in periods of so many us; longer ones where the kernel gives no such
    /// small part of these.
    pub fn new(millis: u32, period_us: u64) -> Self {
        let millis = u64::from(millis.max(1));
        let least_us = (LEAST_QUOTA_US * 1000).div_ceil(millis);
        let period_us = least_us.max(period_us).min(LONGEST_PERIOD_US);
        Self {
            quota_us: (millis * period_us / 1000).max(LEAST_QUOTA_US),
            period_us,
        }
    }
}

// === impl Cgroup ===

impl Cgroup {
    /// Lets it use so much, or all that there is. What was not used in one period may be in the next (`cpu.max.burst`): over time it
    /// is the same.
    ///
    /// # Errors
    /// Where the cgroup is gone, or the kernel does not let it.
    pub fn limit_cpu(&self, limit: Option<CpuMax>) -> Result<(), CgroupError> {
        // No burst may ever be more than the quota.
        optional(self.write("cpu.max.burst", "0"))?;
        match limit {
            None => self.write("cpu.max", "max"),
            Some(CpuMax { quota_us, period_us }) => {
                self.write("cpu.max", &format!("{quota_us} {period_us}"))?;
                optional(self.write("cpu.max.burst", &quota_us.to_string()))
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
    fn a_limit_is_what_is_allowed() {
        for millis in 1..4000_u32 {
            for least_us in [50_000, 100_000] {
                let CpuMax { quota_us, period_us } = CpuMax::new(millis, least_us);
                let exact = f64::from(millis) / 1000.0 * period_us as f64;
                assert!(
                    (quota_us as f64 / exact - 1.0).abs() < 0.01,
                    "{millis}: {quota_us} of {period_us} us"
                );
                assert!(
                    quota_us >= 1000 && (least_us..=1_000_000).contains(&period_us),
                    "{millis}"
                );
            }
        }
        // Nobody is limited to nothing.
        assert_eq!(CpuMax::new(0, 50_000), CpuMax::new(1, 50_000));
        let all = CpuMax::new(u32::MAX, 100_000);
        assert_eq!(all.period_us, 100_000);
    }

    #[test]
    fn files_are_written_and_none_is_made() {
        let folder = tempfile::tempdir().unwrap();
        let cgroup = Cgroup::at(folder.path().to_owned());
        let limit = Some(CpuMax::new(100, 50_000));
        assert!(cgroup.limit_cpu(limit).unwrap_err().is_not_found());
        let (max, burst) = (folder.path().join("cpu.max"), folder.path().join("cpu.max.burst"));
        fs::write(&max, "").unwrap();
        cgroup.limit_cpu(limit).unwrap();
        assert_eq!(fs::read_to_string(&max).unwrap(), "5000 50000");
        assert!(!burst.exists());
        cgroup.limit_cpu(None).unwrap();
        assert!(fs::read_to_string(&max).unwrap().starts_with("max"));
    }
}
