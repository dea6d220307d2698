//! How fast a machine may run, and how urgently.

use crate::terms::Terms;

/// The priority that a balance gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Class {
    /// Nothing is left: the machine is held to its baseline.
    Exhausted,
    /// Between the two.
    Normal,
    /// There is plenty: the machine runs at once, ahead of the others.
    High,
}

/// Where a balance stands, in ten steps:
///
/// | level | class | may use |
/// |---|---|---|
/// | 9 | high | all its vCPUs |
/// | 8 | normal | all its vCPUs |
/// | 7 to 1 | normal | the baseline and so many eighths of what is between that and all its vCPUs |
/// | 0 | exhausted | the baseline |
///
/// The gradual fall comes in steps since nobody can set a limit anew with each ns: a change of level is what the programs wake user
/// space for. And in steps it ends. Were the rate proportional to what is left, a busy machine would come nearer to zero for ever.
///
/// Each level is left for the one below at a lower balance than it is entered at, and the two are further apart than what all
/// vCPUs use in 100 ms ([`Plan`](crate::Plan)): a machine that uses its baseline, however unevenly within that, stays where it is,
/// and none can make the host work by going to and fro more often.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Level(u32);

impl Level {
    /// The lowest.
    pub const EXHAUSTED: Self = Self(0);
    /// The lowest that allows all vCPUs.
    pub const FULL: Self = Self(8);
    /// The highest.
    pub const HIGH: Self = Self(9);

    /// As a number: see the table. One that was read from elsewhere is never more than that of the highest.
    #[inline(always)]
    pub const fn number(self) -> u32 {
        if self.0 > Self::HIGH.0 { Self::HIGH.0 } else { self.0 }
    }

    /// The class that it belongs to.
    #[inline(always)]
    pub const fn class(self) -> Class {
        match self.number() {
            0 => Class::Exhausted,
            1..=8 => Class::Normal,
            _ => Class::High,
        }
    }

    /// The level where so much is left, for an account that was at this one.
    #[inline(always)]
    pub(crate) fn at(self, spendable_ps: u64, terms: &Terms) -> Self {
        let mut level = self.number();
        // It falls, rises, or stays, as it does most often. Of two loops less code is made than of one.
        for _ in 0..Self::HIGH.0 {
            if spendable_ps >= terms.falls_below(level) {
                break;
            }
            level = level.wrapping_sub(1);
        }
        for _ in 0..Self::HIGH.0 {
            if spendable_ps < terms.rises_at(level) {
                break;
            }
            level = level.wrapping_add(1);
        }
        Self(level)
    }
}

/// An account went from one level to another.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Crossing {
    /// Where it was.
    pub from: Level,
    /// Where it is now; never the same.
    pub to: Level,
}

impl Crossing {
    /// The class it has now, if that is another than before.
    #[inline(always)]
    pub fn class(self) -> Option<Class> {
        let class = self.to.class();
        (class != self.from.class()).then_some(class)
    }
}
