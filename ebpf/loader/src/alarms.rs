//! Alarms: who keeps accounts of containers is told when one has used so much CPU time.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use stoker_ebpf_types::{Alarm, Rang};

use crate::cgroup::CgroupId;
use crate::error::{LedgerError, writing};
use crate::ledger::Ledger;
use crate::slots::Slot;
use crate::state::State;

impl Ledger {
    /// Tells once ([`Ledger::drain_alarms`]) that a container has used so much CPU time in all, in ns, not counting what its parts
    /// have. Where it has already that is told when it is charged next. An alarm that was set before is not told any more.
    ///
    /// # Errors
    ///
    /// Where the subject is unknown, where subjects are machines, which have accounts, or where the kernel refuses.
    pub fn set_alarm(&self, subject: CgroupId, cpu_ns: u64) -> Result<(), LedgerError> {
        let mut state = self.lock();
        let slot = state.subject(subject)?.slot;
        let alarms = state.maps.alarms.as_mut().ok_or(LedgerError::NoAlarms)?;
        let alarm = Alarm {
            generation: slot.generation.into(),
            at_ns: cpu_ns,
        };
        alarms.set.set(slot.index, alarm, 0).map_err(writing("ALARMS"))
    }

    /// What is readable, to `poll` and its like, where alarms were due since they were [drained](Self::drain_alarms) last.
    ///
    /// # Errors
    ///
    /// Where subjects are machines, or there are no descriptors left.
    pub fn alarms(&self) -> io::Result<OwnedFd> {
        match &self.lock().maps.alarms {
            Some(alarms) => alarms.rang.as_fd().try_clone_to_owned(),
            None => Err(io::Error::other(LedgerError::NoAlarms)),
        }
    }

    /// Tells of containers whose alarms were due, of each once. It may have been set anew since.
    pub fn drain_alarms(&self, mut tell: impl FnMut(CgroupId)) {
        loop {
            // `tell` may ask the ledger.
            let subject = match next(&mut self.lock()) {
                None => break,
                Some(None) => continue,
                Some(Some(subject)) => subject,
            };
            tell(subject);
        }
    }
}

/// The next record; `Some(None)` for one of a subject that is gone.
fn next(state: &mut State) -> Option<Option<CgroupId>> {
    let item = state.maps.alarms.as_mut()?.rang.next()?;
    let rang = record(&item);
    drop(item);
    Some(rang.and_then(|Rang { slot, generation }| {
        state.owner(Slot {
            index: slot,
            generation,
        })
    }))
}

fn record(bytes: &[u8]) -> Option<Rang> {
    let number = |bytes: &[u8]| Some(u32::from_ne_bytes(bytes.try_into().ok()?));
    Some(Rang {
        slot: number(bytes.get(..4)?)?,
        generation: number(bytes.get(4..8)?)?,
    })
}
