//! How the host asks for memory, and hears of it.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use super::{NUMBER_BYTES, PAGE, Shared, Statistics, field};

const PAGES_A_MIB: u64 = (1 << 20) / PAGE;

/// A balloon's end by which its size is asked for. The device's own thread has no part in it.
pub struct Inflation {
    shared: Arc<Shared>,
}

// === impl Inflation ===

impl Inflation {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Asks the driver for a balloon of `mib` MiB. It gives or takes pages in its own time, or not: Linux, once it took some back for
    /// want of memory, gives them again when it is asked again.
    pub fn ask(&mut self, mib: u32) {
        let has_changed = mib != self.asked_mib();
        if has_changed {
            // A number of 32 bits: of more the driver has not.
            let pages = u32::try_from(u64::from(mib) * PAGES_A_MIB).unwrap_or(u32::MAX);
            self.shared.config.set(field::NUM_PAGES, &pages.to_le_bytes());
        }
        if has_changed || mib != self.taken_mib() {
            self.shared.config.tell();
        }
    }

    /// What was asked for last, in MiB.
    pub fn asked_mib(&self) -> u32 {
        self.field_mib(field::NUM_PAGES)
    }

    /// What the balloon has, in MiB: pages that the driver gave and has not taken back.
    pub fn taken_mib(&self) -> u32 {
        (self.shared.taken.load(Ordering::Acquire) / PAGES_A_MIB) as u32
    }

    /// What the driver says that the balloon has, in MiB.
    pub fn told_mib(&self) -> u32 {
        self.field_mib(field::ACTUAL)
    }

    /// What the guest said of its memory last.
    pub fn statistics(&self) -> Option<Statistics> {
        *self.shared.statistics.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the driver tell how its memory is. It is not waited for: [`Inflation::statistics`] has it later.
    pub fn refresh(&self) {
        // A full counter means that it is being asked anyway.
        let _ = self.shared.refresh.write(1);
    }

    fn field_mib(&self, offset: usize) -> u32 {
        let mut pages = [0; NUMBER_BYTES];
        self.shared.config.read(offset as u64, &mut pages);
        u32::from_le_bytes(pages) / PAGES_A_MIB as u32
    }
}
