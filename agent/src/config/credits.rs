//! `[credits]`

use serde::{Deserialize, Serialize};
use stoker_credits::{Mode, Plan};

/// The most credits for each vCPU: a year of it, and more.
const MOST_CREDITS: f64 = 1_000_000.0;

/// `[credits]`: a credit is one CPU for one minute; amounts are for each vCPU of a machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Credits {
    /// What a machine earns and may always use, in percent of each of its vCPUs; 0.1 to 100. Where absent 10, or less where
    /// `pool.cpu_overcommit` is more than 10: what the CPUs have for each vCPU.
    pub baseline_percent: Option<f64>,
    /// What becomes of a machine that has spent all.
    pub mode: CreditMode,
    /// What a machine has at its start.
    pub launch: f64,
    /// The most that is kept; what is earned in 24 hours where absent.
    pub cap: Option<f64>,
    /// The most that may be owed; 1, in `unlimited` what is earned in 24 hours where absent.
    pub limit: Option<f64>,
    /// With so many a machine comes before others; an eighth of `cap` where absent.
    pub high_enter: Option<f64>,
    /// Below it no longer; half of `high_enter` where absent.
    pub high_leave: Option<f64>,
    /// Below it a machine is slowed down, step by step; so much that this takes a quarter of an hour where absent.
    pub low: Option<f64>,
    /// With so many a machine that had none is given more than its baseline; a fourteenth of `low` where absent.
    pub recover: Option<f64>,
}

/// What becomes of a machine without credits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CreditMode {
    /// It falls to its baseline.
    Standard,
    /// It runs on, and is billed for what it does not earn later.
    Unlimited,
}

// === impl Credits ===

impl Credits {
    /// What each vCPU brings to its machine's account, where a CPU is given out so often.
    #[must_use]
    pub fn vcpu_plan(&self, cpu_overcommit: f64) -> Plan {
        let millis = match self.baseline_percent {
            Some(percent) => percent * 10.0,
            None => (1000.0 / cpu_overcommit).min(100.0),
        };
        // To whole millicores, of which there are 1 to 1000.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let baseline_millis = (millis.floor() as u32).max(1);
        Plan {
            vcpus: 1,
            baseline_millis,
            mode: self.mode.into(),
            launch: credits(self.launch),
            cap: self.cap.map(credits),
            limit: self.limit.map(credits),
            high_enter: self.high_enter.map(credits),
            high_leave: self.high_leave.map(credits),
            low: self.low.map(credits),
            recover: self.recover.map(credits),
        }
    }

    /// What is wrong with it.
    pub(super) fn problems(&self, cpu_overcommit: f64) -> Vec<String> {
        let mut problems = Vec::new();
        let percent = self.baseline_percent.unwrap_or(10.0);
        if !(0.1..=100.0).contains(&percent) {
            problems.push(format!("credits.baseline_percent: {percent} is not 0.1 to 100"));
        }
        for (key, amount) in [
            ("launch", Some(self.launch)),
            ("cap", self.cap),
            ("limit", self.limit),
            ("high_enter", self.high_enter),
            ("high_leave", self.high_leave),
            ("low", self.low),
            ("recover", self.recover),
        ] {
            let amount = amount.unwrap_or_default();
            if !(0.0..=MOST_CREDITS).contains(&amount) {
                problems.push(format!("credits.{key}: {amount} is not 0 to {MOST_CREDITS}"));
            }
        }
        // What is out of its range would contradict the rest, too.
        if problems.is_empty()
            && (0.1..=1000.0).contains(&cpu_overcommit)
            && let Err(error) = self.vcpu_plan(cpu_overcommit).terms()
        {
            problems.push(format!("credits: {error}"));
        }
        problems
    }
}

/// To the thousandth.
fn credits(amount: f64) -> stoker_credits::Credits {
    // In the range that the configuration allows it is far from what a u64 holds.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let millis = (amount * 1000.0).round() as u64;
    stoker_credits::Credits::from_millis(millis)
}

impl From<CreditMode> for Mode {
    fn from(mode: CreditMode) -> Self {
        match mode {
            CreditMode::Standard => Self::Standard,
            CreditMode::Unlimited => Self::Unlimited,
        }
    }
}

impl Default for Credits {
    fn default() -> Self {
        Self {
            baseline_percent: None,
            mode: CreditMode::Standard,
            // Below `high_leave` by default: full speed for a start, and priority for what was saved.
            launch: 6.0,
            cap: None,
            limit: None,
            high_enter: None,
            high_leave: None,
            low: None,
            recover: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::Config;

    #[test]
    fn credits_that_can_not_be_kept_are_refused_with_what_to_change() {
        let refused = |text: &str| {
            Config::parse(&format!("[credits]\n{text}"), Path::new("test.toml"))
                .unwrap_err()
                .to_string()
        };
        for (text, says) in [
            (
                "baseline_percent = nan",
                "credits.baseline_percent: NaN is not 0.1 to 100",
            ),
            (
                "baseline_percent = -1.0",
                "credits.baseline_percent: -1 is not 0.1 to 100",
            ),
            (
                "baseline_percent = 101.0",
                "credits.baseline_percent: 101 is not 0.1 to 100",
            ),
            ("launch = -1.0", "credits.launch: -1 is not 0"),
            ("cap = inf", "credits.cap: inf is not 0"),
            (
                "cap = 1.0\nhigh_enter = 2.0",
                "high_enter (2.000 credits) must not be above cap (1.000 credits)",
            ),
            ("recover = 0.001", "credits: recover is 0.001 credits"),
            ("mode = 'free'", "unknown variant `free`"),
        ] {
            let error = refused(text);
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn all_vcpus_that_the_pool_may_have_have_their_baseline_by_default() {
        for (overcommit, millis) in [(8.0, 100), (10.0, 100), (16.0, 62), (1000.0, 1), (0.1, 100)] {
            let plan = Credits::default().vcpu_plan(overcommit);
            assert_eq!(plan.baseline_millis, millis, "{overcommit}");
            assert!(f64::from(plan.baseline_millis) * overcommit <= 1000.0);
            plan.terms().unwrap();
        }
        let text = "[credits]\nbaseline_percent = 12.5\nlaunch = 0.5\nmode = 'unlimited'";
        let plan = Config::parse(text, Path::new("test.toml")).unwrap().credits;
        let plan = plan.vcpu_plan(8.0);
        assert_eq!(
            (plan.baseline_millis, plan.launch.millis(), plan.mode),
            (125, 500, Mode::Unlimited)
        );
    }
}
