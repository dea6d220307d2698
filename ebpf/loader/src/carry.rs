//! Going on with the sums of programs of another version, while both count.

use std::collections::HashMap;

use aya::maps::MapError;
use stoker_ebpf_types::{KINDS, Process, Resident};

use crate::error::{LedgerError, reading};
use crate::ledger::Ledger;
use crate::objects::{Programs, online_cpus};
use crate::slots::Slot;
use crate::state::State;

/// How often it is looked whether processes changed while they were taken over.
const TRIES: u32 = 3;

/// The slots that subjects have now, by those that they had.
type Successors = HashMap<Slot, Slot>;

/// Gives `new`, which counts nobody yet, the subjects of `old` with all that they have used. A subject's threads go
/// uncounted for the time between two interrupts, one after the other, of the CPU that they run on; one that leaves its CPU
/// while the sums are written, since the first of these. Waits that have not ended yet are not counted.
pub(crate) fn carry(old: &Ledger, new: &Ledger) -> Result<(), LedgerError> {
    let mut successors = Successors::new();
    let old_state = old.lock();
    let mut state = new.lock();
    for (&id, counted) in &old_state.subjects {
        let slot = state.take()?;
        let resident = Resident {
            peak_bytes: old_state.resident(counted.slot)?.peak_bytes,
            ..Resident::default()
        };
        for cpu in online_cpus()? {
            old.programs().settle(cpu)?;
            // From here on the new ones charge what runs, to whoever has its cgroup by the time that it leaves.
            new.programs().settle(cpu)?;
        }
        let times = old_state.times(counted.slot)?;
        state.begin(id, slot, times, resident, counted.told_ns)?;
        for &cgroup in &counted.cgroups {
            state.direct(cgroup, slot)?;
        }
        state.insert(id, slot, counted.cgroups.clone(), counted.told_ns);
        successors.insert(counted.slot, slot);
    }
    carry_processes(&old_state, new.programs(), &successors)
}

/// Gives the new programs the processes whose subjects they have. They know those that come from now on.
fn carry_processes(old: &State, new: &Programs, successors: &Successors) -> Result<(), LedgerError> {
    let processes = &old.maps.processes;
    let successor = |process: &Process| {
        let slot = Slot {
            index: process.slot,
            generation: process.generation,
        };
        successors.get(&slot).copied()
    };
    let mut adopted = HashMap::new();
    for entry in processes.iter() {
        let (mm, process) = entry.map_err(reading("PROCESSES"))?;
        if let Some(slot) = successor(&process) {
            adopted.insert(mm, (slot, process.bytes));
        }
    }
    for (&mm, &(slot, bytes)) in &adopted {
        new.adopt(mm, slot, bytes)?;
    }
    // One that changed or ended before the new programs had it did so unseen by them. Those that change all the time put
    // themselves right; one that ended does not.
    for tries in 0..=TRIES {
        let mut changed = HashMap::new();
        for (mm, (slot, bytes)) in adopted {
            let now = match processes.get(&mm, 0) {
                Ok(process) => successor(&process).map(|slot| (slot, process.bytes)),
                Err(MapError::KeyNotFound) => None,
                Err(source) => return Err(reading("PROCESSES")(source)),
            };
            match now {
                None => new.adopt(mm, slot, [0; KINDS])?,
                Some(now) if now != (slot, bytes) && tries < TRIES => {
                    new.adopt(mm, now.0, now.1)?;
                    changed.insert(mm, now);
                }
                Some(_) => {}
            }
        }
        adopted = changed;
    }
    Ok(())
}
