//! How much a machine's guest is asked to have, and what it has.

use stoker_proto::vmm::request::Resize;
use stoker_proto::vmm::status::{Amounts, Balloon, Statistics};

use super::Machine;
use crate::devices::virtio::balloon;
use crate::devices::virtio::mem::Plugging;
use crate::memory::BLOCK;

const BLOCK_MIB: u32 = (BLOCK >> 20) as u32;

// === impl Machine ===

impl Machine {
    /// Asks the guest for what is wanted; all of it is checked first.
    pub(super) fn resize(&mut self, Resize { vcpus, memory_mib }: &Resize) -> Result<(), String> {
        if let Some(vcpus) = vcpus
            && *vcpus != self.vcpus
        {
            return Err(format!("this machine has {} vCPUs as long as it runs", self.vcpus));
        }
        if let Some(mib) = *memory_mib {
            let more = self.plugged_for(mib)?;
            if let Some(plugging) = &mut self.built.plugging {
                plugging.ask(more).map_err(|error| error.to_string())?;
            }
        }
        Ok(())
    }

    /// What is to be plugged for a guest to have `mib` MiB in all.
    fn plugged_for(&self, mib: u32) -> Result<u32, String> {
        let (least, most) = (self.memory_mib, self.max_memory_mib);
        if !(least..=most).contains(&mib) {
            return Err(format!(
                "this machine cannot have {mib} MiB of memory: it may have {least} MiB, which it started with, to {most} MiB"
            ));
        }
        let more = mib - least;
        if !more.is_multiple_of(BLOCK_MIB) {
            return Err(format!(
                "this machine cannot have {mib} MiB of memory: more than {least} MiB comes in blocks of {BLOCK_MIB} MiB"
            ));
        }
        Ok(more)
    }

    pub(super) fn set_balloon(&mut self, mib: u32) -> Result<(), String> {
        let has = self.amounts().memory_asked_mib;
        let inflation = self.built.inflation.as_mut().ok_or("this machine has no balloon")?;
        if mib > has {
            return Err(format!("the balloon cannot have {mib} MiB: the machine has {has} MiB"));
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

    pub(super) fn amounts(&self) -> Amounts {
        let plugging = self.built.plugging.as_ref();
        Amounts {
            vcpus_asked: self.vcpus,
            vcpus_taken: self.vcpus,
            memory_asked_mib: self.memory_mib + plugging.map_or(0, Plugging::asked_mib),
            memory_taken_mib: self.memory_mib + plugging.map_or(0, Plugging::taken_mib),
        }
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
