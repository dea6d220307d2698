//! Which kernel the lab boots.

use super::setup::{KERNEL, QEMU, SCHED_EXT_KERNEL};
use crate::setup::Step;

/// The lab's own kernel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Kernel {
    /// Of the series that the guests run.
    #[default]
    Usual,
    /// One with `sched_ext`.
    SchedExt,
}

// === impl Kernel ===

impl Kernel {
    /// One with `sched_ext` where that is wanted.
    pub(crate) fn with_sched_ext(wanted: bool) -> Self {
        if wanted { Self::SchedExt } else { Self::Usual }
    }

    /// What a lab with it takes.
    pub(crate) fn steps(self) -> Vec<&'static Step> {
        vec![&QEMU, self.step()]
    }

    fn step(self) -> &'static Step {
        match self {
            Self::Usual => &KERNEL,
            Self::SchedExt => &SCHED_EXT_KERNEL,
        }
    }

    /// Where it is in the cache.
    pub(super) fn folder(self) -> &'static str {
        match self {
            Self::Usual => "lab/kernel",
            Self::SchedExt => "lab/kernel-sched-ext",
        }
    }
}
