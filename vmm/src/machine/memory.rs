//! A machine's memory while it runs: what its guest is asked to have, and what it has made of it.

use stoker_proto::vmm::Balloon;
use stoker_proto::vmm::balloon::Statistics;

use super::Machine;
use crate::devices::virtio::balloon;
use crate::devices::virtio::mem::Plugging;
use crate::memory::BLOCK;

const BLOCK_MIB: u32 = (BLOCK >> 20) as u32;

// === impl Machine ===

impl Machine {
    /// Whether the machine may have so much memory in all.
    pub(super) fn check_memory(&self, mib: u32) -> Result<(), String> {
        let (least, most) = (self.memory_mib, self.max_memory_mib);
        if !(least..=most).contains(&mib) {
            return Err(format!(
                "`memory_mib` is {mib}; this machine may have {least} MiB, which it started with, to {most} MiB"
            ));
        }
        if !(mib - least).is_multiple_of(BLOCK_MIB) {
            return Err(format!(
                "`memory_mib` is {mib}; more than the {least} MiB that this machine started with comes in blocks of {BLOCK_MIB} MiB"
            ));
        }
        Ok(())
    }

    /// Asks the guest for so much memory in all, which was checked.
    pub(super) fn resize_memory(&mut self, mib: u32) -> Result<(), String> {
        match &mut self.built.plugging {
            Some(plugging) => plugging
                .ask(mib.saturating_sub(self.memory_mib))
                .map_err(|error| error.to_string()),
            None => Ok(()),
        }
    }

    pub(super) fn set_balloon(&mut self, mib: u32) -> Result<(), String> {
        let has = self.memory_asked();
        let inflation = self.built.inflation.as_mut();
        let inflation = inflation.ok_or("this machine has no balloon: it was started without `balloon`")?;
        if mib > has {
            return Err(format!("the balloon cannot have {mib} MiB: this machine has {has} MiB"));
        }
        inflation.ask(mib);
        Ok(())
    }

    /// Has the guest tell how its memory is, if it can.
    pub(super) fn refresh_statistics(&self) {
        if let Some(inflation) = &self.built.inflation {
            inflation.refresh();
        }
    }

    /// What the guest is to have, in MiB.
    pub(super) fn memory_asked(&self) -> u32 {
        self.memory_mib + self.built.plugging.as_ref().map_or(0, Plugging::asked_mib)
    }

    /// What it has, in MiB.
    pub(super) fn memory_taken(&self) -> u32 {
        self.memory_mib + self.built.plugging.as_ref().map_or(0, Plugging::taken_mib)
    }

    pub(super) fn balloon(&self) -> Option<Balloon> {
        self.built.inflation.as_ref().map(|inflation| Balloon {
            asked_mib: inflation.asked_mib(),
            taken_mib: inflation.taken_mib(),
            told_mib: inflation.told_mib(),
            statistics: inflation.statistics().map(told),
        })
    }
}

fn told(statistics: balloon::Statistics) -> Statistics {
    Statistics {
        age_us: statistics.at.elapsed().as_micros() as u64,
        taken_bytes: Some(statistics.taken),
        free_bytes: statistics.free,
        total_bytes: statistics.total,
        available_bytes: statistics.available,
        caches_bytes: statistics.caches,
        major_faults: statistics.major_faults,
        minor_faults: statistics.minor_faults,
        oom_kills: statistics.oom_kills,
        stalls: statistics.stalls,
    }
}
