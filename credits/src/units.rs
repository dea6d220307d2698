//! The unit that is counted in, and the one that people read.

use core::fmt;

/// ps of CPU time in one ns of one CPU.
pub const PS_PER_NS: u64 = 1_000;

/// ps of CPU time in a credit: one CPU for one minute, as AWS defines it.
pub const PS_PER_CREDIT: u64 = 60_000_000_000_000;

/// The most that a balance, a cap or a limit may be: two of them add up without overflow.
pub const MAX_PS: u64 = i64::MAX as u64;

const PS_PER_MILLI_CREDIT: u64 = PS_PER_CREDIT / 1_000;

/// An amount of credits, in thousandths of one (60 ms of CPU time).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Credits(u64);

impl Credits {
    /// The most that an account can hold.
    pub const MAX: Self = Self::from_ps(MAX_PS);

    /// Whole credits.
    #[inline]
    pub const fn new(credits: u32) -> Self {
        Self(credits as u64 * 1_000)
    }

    /// Thousandths of a credit.
    #[inline]
    pub const fn from_millis(millis: u64) -> Self {
        Self(millis)
    }

    /// What so many ps are, rounded down.
    #[inline]
    pub const fn from_ps(ps: u64) -> Self {
        Self(ps / PS_PER_MILLI_CREDIT)
    }

    /// The same rounded up: what is enough for so many ps.
    #[inline]
    pub const fn covering_ps(ps: u64) -> Self {
        Self(ps.div_ceil(PS_PER_MILLI_CREDIT))
    }

    /// In thousandths of a credit.
    #[inline]
    pub const fn millis(self) -> u64 {
        self.0
    }

    /// In ps of CPU time; `u64::MAX`, which is more than [`MAX_PS`], where it is more than fits.
    #[inline]
    pub const fn ps(self) -> u64 {
        self.0.saturating_mul(PS_PER_MILLI_CREDIT)
    }
}

impl fmt::Display for Credits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:03} credits", self.0 / 1_000, self.0 % 1_000)
    }
}

/// A sum that only grows, in ps of CPU time: 64 CPUs fill one word in 80 hours, and two of them never.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Sum {
    low: u64,
    high: u64,
}

impl Sum {
    #[inline(always)]
    pub(crate) const fn add(&mut self, ps: u64) {
        let (low, carry) = self.low.overflowing_add(ps);
        self.low = low;
        self.high = self.high.wrapping_add(carry as u64);
    }

    /// In ps. The eBPF target has no such integer, and no need of one.
    #[cfg(not(target_arch = "bpf"))]
    #[inline]
    pub const fn get(self) -> u128 {
        (self.high as u128) << 64 | self.low as u128
    }
}
