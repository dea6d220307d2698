//! What settlements go by.

use crate::class::Level;

/// What becomes of a machine that has spent all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "lowercase"))]
pub enum Mode {
    /// It falls to its baseline.
    #[default]
    Standard,
    /// It runs on as before, borrows what it will earn, and is billed for what is more than that.
    Unlimited,
}

/// How many steps the fall from full speed has before the last, to the baseline.
pub(crate) const FALL_STEPS: u64 = 7;

/// The rules of one account as integers. Made and checked by [`Plan::terms`](crate::Plan::terms), and a value of a map: where all is
/// zero nothing is earned, and what is used is forgiven.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Terms {
    pub(crate) baseline_millis: u32,
    pub(crate) full_millis: u32,
    /// 1 for [`Mode::Unlimited`], else 0.
    pub(crate) unlimited: u32,
    pub(crate) unused: u32,
    pub(crate) cap_ps: u64,
    pub(crate) launch_ps: u64,
    pub(crate) limit_ps: u64,
    pub(crate) high_enter_ps: u64,
    pub(crate) high_leave_ps: u64,
    /// A seventh of the balance at which full speed begins.
    pub(crate) step_ps: u64,
    pub(crate) recover_ps: u64,
    /// The longest time that can be earned for at once: its earning still is a `u64`.
    pub(crate) longest_ns: u64,
}

impl Terms {
    /// What it earns, and what an exhausted machine still may use: millicores of the whole machine.
    #[inline(always)]
    pub const fn baseline_millis(&self) -> u32 {
        self.baseline_millis
    }

    /// All its vCPUs, in millicores.
    #[inline(always)]
    pub const fn full_millis(&self) -> u32 {
        self.full_millis
    }

    /// What becomes of a machine that has spent all.
    #[inline(always)]
    pub const fn mode(&self) -> Mode {
        if self.unlimited == 0 {
            Mode::Standard
        } else {
            Mode::Unlimited
        }
    }

    /// The most that can be kept of what was earned, in ps.
    #[inline(always)]
    pub const fn cap_ps(&self) -> u64 {
        self.cap_ps
    }

    /// What it has at its start, in ps: spent first, and outside the cap.
    #[inline(always)]
    pub const fn launch_ps(&self) -> u64 {
        self.launch_ps
    }

    /// The most that can be owed, in ps.
    #[inline(always)]
    pub const fn limit_ps(&self) -> u64 {
        self.limit_ps
    }

    /// A level is left for the one below where less than this is left.
    #[inline(always)]
    pub(crate) const fn falls_below(&self, level: u32) -> u64 {
        let full = Level::FULL.number();
        if level > full {
            self.high_leave_ps
        } else if level == 0 || self.unlimited != 0 {
            0
        } else if level == 1 {
            // Where nothing is left.
            1
        } else {
            self.step_ps
                .wrapping_mul(level as u64 - 1)
                .wrapping_sub(self.step_ps / 2)
        }
    }

    /// A level is left for the one above where this or more is left.
    #[inline(always)]
    pub(crate) const fn rises_at(&self, level: u32) -> u64 {
        let full = Level::FULL.number();
        if level > full {
            u64::MAX
        } else if level == full {
            self.high_enter_ps
        } else if self.unlimited != 0 {
            0
        } else if level == 0 {
            // Not 0, as it is where nothing was set.
            if self.recover_ps == 0 { 1 } else { self.recover_ps }
        } else {
            self.step_ps.wrapping_mul(level as u64)
        }
    }
}
