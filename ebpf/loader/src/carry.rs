//! Going on with the sums of programs of another version, while both count.

use std::collections::HashMap;
use std::thread;
use std::time::Duration;

use aya::maps::MapError;
use stoker_ebpf_types::{KINDS, PARTS, Part, Process};

use crate::cgroup::CgroupId;
use crate::error::{LedgerError, reading};
use crate::ledger::Ledger;
use crate::objects::{Programs, online_cpus};
use crate::slots::Slot;
use crate::state::{Counted, State};
use crate::usage::Time;

/// How often sums are compared at most, and how often it is looked whether processes changed while they were taken over.
const TRIES: u32 = 8;

/// How often the scheduler charges a thread that runs on and on, at least: `CONFIG_HZ` is 100 or more.
const TICK: Duration = Duration::from_millis(10);

/// The slots that subjects have now, by those that they had.
type Successors = HashMap<Slot, Slot>;

/// Gives `new`, which counts nobody yet, the subjects of `old` with all that they have used. It lacks waits that have not ended
/// yet.
pub(crate) fn carry(old: &Ledger, new: &Ledger) -> Result<(), LedgerError> {
    let mut successors = Successors::new();
    let old_state = old.lock();
    let mut state = new.lock();
    for (&id, before) in &old_state.subjects {
        let counted = Counted {
            slot: state.take()?,
            ..before.clone()
        };
        state.begin(id, &counted, old_state.resident(before.slot)?.peak_bytes)?;
        for &(cgroup, part) in &counted.cgroups {
            state.direct(cgroup, counted.slot, part)?;
        }
        successors.insert(before.slot, counted.slot);
        state.insert(id, counted);
    }
    // From here on both count. What the old ones count more is what the new ones lack.
    let mut lacks: HashMap<CgroupId, [Time; PARTS as usize]> = HashMap::new();
    for _ in 0..TRIES {
        for cpu in online_cpus()? {
            old.programs().settle(cpu)?;
            new.programs().settle(cpu)?;
        }
        // What ran when the new ones came is in theirs once the scheduler has charged it.
        let charged = !state.running()?.is_settled();
        for (&id, before) in &old_state.subjects {
            let theirs = old_state.times(before.slot)?;
            let ours = state.times(state.subject(id)?.slot)?;
            // What comes between two steps is in ours alone: a comparison tells too little rather than too much.
            let most = lacks.entry(id).or_default();
            for (most, (theirs, ours)) in most.iter_mut().zip(theirs.into_iter().zip(ours)) {
                *most = most.most(theirs.beyond(ours));
            }
        }
        if charged {
            break;
        }
        thread::sleep(TICK);
    }
    for (id, parts) in lacks {
        let slot = state.subject(id)?.slot;
        for (part, lacks) in Part::ALL.into_iter().zip(parts) {
            new.programs().adopt_times(slot, part, lacks)?;
        }
    }
    carry_processes(&old_state, new.programs(), &successors)?;
    let owners: Vec<CgroupId> = old_state.subjects.keys().copied().collect();
    drop(old_state);
    for owner in owners {
        new.carry_account(&mut state, owner, old)?;
    }
    Ok(())
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
