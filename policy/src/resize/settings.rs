//! What the resizer goes by, for each function. All defaults are here.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::runs::RING;
use crate::Amount;

/// Memory in MiB that costs as much as one CPU, where the cost of an amount is compared: what general-purpose servers have for
/// each (AWS m7i, Google n2-standard and Azure D: 4 GiB a vCPU).
pub(crate) const MIB_A_CPU: u64 = 4096;

/// What is done about an amount that does not fit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ResizeMode {
    /// Nothing: executions are not looked at.
    Off,
    /// The user is told. The default: whose amount it is decides.
    #[default]
    Advise,
    /// Later executions run in containers of the amount that was determined, and the user is told.
    Auto,
}

/// How a function's amount is looked after.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resize {
    /// What is done.
    pub mode: ResizeMode,
    /// The least that is determined: CPU and memory.
    pub least: Amount,
    /// The most: CPU and memory. What the host and the account have is another limit.
    pub most: Amount,
    /// When an amount does not fit.
    pub thresholds: Thresholds,
    /// What was determined before this agent started, or before the function was forgotten.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<Kept>,
}

/// When an amount does not fit, and how fast that is acted on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Thresholds {
    /// Of a thousand executions, those whose peak of memory has the head room on top; the others fit without it.
    pub quantile_permille: u32,
    /// How much memory there is above that, in percent of it.
    pub head_room_percent: u32,
    /// Memory is too little where a peak takes more than this much of it, in percent.
    pub tight_percent: u32,
    /// It is too much where less would save at least this much of it, in percent, or `cheaper_percent` of the cost.
    pub saves_percent: u32,
    /// CPU changes, and memory falls, where the cost of an execution, amount times time, is lower by at least this much, in percent.
    pub cheaper_percent: u32,
    /// It also rises where executions become shorter by this much at no more cost, in percent.
    pub faster_percent: u32,
    /// The least number of executions before CPU rises. Memory rises at once.
    pub executions_up: u32,
    /// The least number of executions before anything falls; four times as many after each time that memory was too little, or
    /// that something fell and rose again.
    pub executions_down: u32,
    /// How long nothing rises after a change. An execution that was killed for memory does not wait.
    pub cooldown_up: Duration,
    /// How long nothing falls after a change, or after the first execution.
    pub cooldown_down: Duration,
}

/// What was determined, for who keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// The amount that it was determined from: with another it is not taken.
    pub first: Amount,
    /// What was determined.
    pub amount: Amount,
    /// The most memory in MiB with which an execution was killed for want of it; 0 where none was.
    pub killed_mib: u32,
}

/// Settings that can't work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResizeError {
    /// Nothing is between the bounds.
    #[error("the least amount, {least}, is more than the most, {most}")]
    Bounds {
        /// The lower one.
        least: Amount,
        /// The upper one.
        most: Amount,
    },
    /// A bound is nothing.
    #[error("the least amount must have at least 1 mCPU and 1 MiB of memory")]
    Nothing,
    /// The amount that the function has is not between the bounds.
    #[error("the function's amount, {first}, is not between the least, {least}, and the most, {most}")]
    First {
        /// What the function has.
        first: Amount,
        /// The lower bound.
        least: Amount,
        /// The upper one.
        most: Amount,
    },
    /// A threshold that makes no sense.
    #[error("{name} must be from {least} to {most}, not {value}")]
    Range {
        /// Which.
        name: &'static str,
        /// The least that it may be.
        least: u64,
        /// The most.
        most: u64,
        /// What it is.
        value: u64,
    },
    /// What has just been given its head room would be too little.
    #[error(
        "with head room of {head_room_percent}% a peak takes {takes_percent}% of the memory, and more than {tight_percent}% is too \
         much: raise head_room_percent or tight_percent"
    )]
    Contradiction {
        /// The head room.
        head_room_percent: u32,
        /// What a peak takes with it.
        takes_percent: u32,
        /// When memory is too little.
        tight_percent: u32,
    },
}

// === impl Thresholds ===

impl Default for Thresholds {
    fn default() -> Self {
        Self {
            // Of fewer than 1,000 executions that is the largest.
            quantile_permille: 999,
            // As the Kubernetes vertical autoscaler has it. A peak is then 87% of the memory.
            head_room_percent: 15,
            // What kernels and runtimes take beside is a few percent.
            tight_percent: 90,
            // With the head room: memory falls where it is more than 1.44 times the peak, whatever it costs.
            saves_percent: 20,
            // With steps of CPU and with the head room, 10% above the best: what is less is not worth new containers.
            cheaper_percent: 5,
            // What people notice.
            faster_percent: 10,
            // The longest and the shortest are left out, which leaves three.
            executions_up: 5,
            // By that many without it, something larger comes in less than 3% of executions (the rule of three, 95%).
            executions_down: 100,
            // A second container is ready by then, and has run something.
            cooldown_up: Duration::from_secs(60),
            // A burst of many executions of one kind is over.
            cooldown_down: Duration::from_secs(600),
        }
    }
}

impl Thresholds {
    /// Memory for this much and the head room.
    pub(crate) fn with_head_room(&self, mib: u32) -> u32 {
        percent(mib, 100 + u64::from(self.head_room_percent))
    }

    /// The least memory that is not too little for this much.
    pub(crate) fn just_fits(&self, mib: u32) -> u32 {
        let all = u64::from(mib) * 100;
        saturated(all.div_ceil(self.tight_percent.max(1).into()))
    }

    /// A peak takes too much of the memory.
    pub(crate) fn is_tight(&self, peak_mib: u32, memory_mib: u32) -> bool {
        u64::from(peak_mib) * 100 > u64::from(memory_mib) * u64::from(self.tight_percent)
    }

    /// So much less memory is worth it.
    pub(crate) fn saves(&self, from_mib: u32, to_mib: u32) -> bool {
        let left = 100_u32.saturating_sub(self.saves_percent);
        u64::from(to_mib) * 100 <= u64::from(from_mib) * u64::from(left)
    }

    fn check(&self) -> Result<(), ResizeError> {
        // Each with what it may be.
        let day = 24 * 3600;
        let ranges: [(_, u64, _, _); 10] = [
            ("quantile_permille", self.quantile_permille.into(), 500, 1000),
            ("head_room_percent", self.head_room_percent.into(), 1, 400),
            ("tight_percent", self.tight_percent.into(), 50, 99),
            ("saves_percent", self.saves_percent.into(), 5, 90),
            ("cheaper_percent", self.cheaper_percent.into(), 3, 90),
            ("faster_percent", self.faster_percent.into(), 3, 90),
            ("executions_up", self.executions_up.into(), 3, RING as u64),
            ("executions_down", self.executions_down.into(), RING as u64, 1_000_000),
            ("cooldown_up in seconds", self.cooldown_up.as_secs(), 1, 7 * day),
            ("cooldown_down in seconds", self.cooldown_down.as_secs(), 1, 7 * day),
        ];
        let wrong = ranges
            .into_iter()
            .find(|(_, value, least, most)| value < least || value > most);
        if let Some((name, value, least, most)) = wrong {
            return Err(ResizeError::Range {
                name,
                least,
                most,
                value,
            });
        }
        let (head_room_percent, tight_percent) = (self.head_room_percent, self.tight_percent);
        let takes_percent = 10_000_u32.div_ceil(100 + head_room_percent);
        if takes_percent > tight_percent {
            return Err(ResizeError::Contradiction {
                head_room_percent,
                takes_percent,
                tight_percent,
            });
        }
        Ok(())
    }
}

// === impl Resize ===

impl Default for Resize {
    fn default() -> Self {
        Self {
            mode: ResizeMode::default(),
            // Less CPU makes a runtime's start take seconds, and less memory is less than an interpreter needs.
            least: Amount {
                cpu_millis: 100,
                memory_mib: 64,
                scratch_mib: 0,
            },
            // As on AWS Lambda (its quotas: 10,240 MB, six vCPUs): where memory leaks this is where growing ends.
            most: Amount {
                cpu_millis: 6000,
                memory_mib: 10_240,
                scratch_mib: 0,
            },
            thresholds: Thresholds::default(),
            kept: None,
        }
    }
}

impl Resize {
    /// Checks that these settings can work for a function that has this amount.
    ///
    /// # Errors
    /// The first thing that can't.
    pub fn check(&self, first: Amount) -> Result<(), ResizeError> {
        let without_disk = |amount: Amount| Amount {
            scratch_mib: 0,
            ..amount
        };
        let (least, most, first) = (without_disk(self.least), without_disk(self.most), without_disk(first));
        if least.cpu_millis == 0 || least.memory_mib == 0 {
            return Err(ResizeError::Nothing);
        }
        if !least.fits(most) {
            return Err(ResizeError::Bounds { least, most });
        }
        if !least.fits(first) || !first.fits(most) {
            return Err(ResizeError::First { first, least, most });
        }
        self.thresholds.check()
    }

    /// The same settings, whatever was determined before.
    pub(crate) fn same(&self, other: &Self) -> bool {
        Self { kept: None, ..*self } == Self { kept: None, ..*other }
    }
}

// === impl Amount ===

impl Amount {
    /// What it costs for each unit of time, in a thousandth of the cost of a MiB.
    pub(crate) fn price(self) -> u64 {
        u64::from(self.cpu_millis) * MIB_A_CPU + u64::from(self.memory_mib) * 1000
    }
}

fn percent(of: u32, percent: u64) -> u32 {
    saturated((u64::from(of) * percent).div_ceil(100))
}

fn saturated(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
