//! Going on with the sums of programs of another version, while both count.

use std::collections::HashMap;

use stoker_ebpf_types::{KINDS, Process, Resident};

use crate::error::{LedgerError, reading};
use crate::ledger::Ledger;
use crate::objects::online_cpus;
use crate::slots::Slot;

/// How often the sizes of processes are looked at once more, since they changed meanwhile.
const TRIES: u32 = 3;

/// Gives `new`, which counts nobody yet, the subjects of `old` with all that they have used. A subject's threads go
/// uncounted for the time between two interrupts, one after the other, of the CPU that they run on; one that leaves its CPU
/// while the sums are written, since the first of these. Waits that have not ended yet are not counted.
pub(crate) fn carry(old: &Ledger, new: &Ledger) -> Result<(), LedgerError> {
    let mut successors = HashMap::new();
    let old_state = old.lock();
    let mut state = new.lock();
    for (&id, counted) in &old_state.subjects {
        let slot = state.take()?;
        let memory = old_state.resident(counted.slot)?;
        for cpu in online_cpus()? {
            old.programs().settle(cpu)?;
            // From here on the new ones charge what runs, to whoever has its cgroup by the time that it leaves.
            new.programs().settle(cpu)?;
        }
        let usage = old_state.times(counted.slot)?;
        let begin = Resident {
            peak_bytes: memory.peak_bytes,
            ..Resident::default()
        };
        state.begin(id, slot, usage, begin, counted.told_ns)?;
        for &cgroup in &counted.cgroups {
            state.direct(cgroup, slot)?;
        }
        state.insert(id, slot, counted.cgroups.clone(), counted.told_ns);
        successors.insert((counted.slot.index, counted.slot.generation), slot);
    }
    // Each has a slot and is counted: processes that come from now on are known to the new programs.
    let processes = || -> Result<HashMap<u32, (Slot, [i64; KINDS])>, LedgerError> {
        let map = &old_state.maps.processes;
        let mut processes = HashMap::new();
        for entry in map.iter() {
            let (
                mm,
                Process {
                    slot,
                    generation,
                    bytes,
                },
            ) = entry.map_err(reading("PROCESSES"))?;
            if let Some(&slot) = successors.get(&(slot, generation)) {
                processes.insert(mm, (slot, bytes));
            }
        }
        Ok(processes)
    };
    let mut adopted = HashMap::new();
    for _ in 0..=TRIES {
        let now = processes()?;
        let mut changed = false;
        for (&mm, &(slot, bytes)) in &now {
            if adopted.get(&mm) != Some(&(slot, bytes)) {
                new.programs().adopt(mm, slot, bytes)?;
                changed = true;
            }
        }
        for (&mm, &(slot, _)) in &adopted {
            // It ended before or while it was adopted.
            if !now.contains_key(&mm) {
                new.programs().adopt(mm, slot, [0; KINDS])?;
            }
        }
        adopted = now;
        if !changed {
            break;
        }
    }
    Ok(())
}
