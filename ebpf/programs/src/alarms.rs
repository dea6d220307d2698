//! Alarms of containers: user space is told when one has used so much CPU time. It keeps their accounts of credits itself, since
//! to verify what keeps accounts here takes the kernel several times as long as all the rest, at each boot of a guest.

use core::intrinsics::{
    AtomicOrdering::{AcqRel, Relaxed},
    atomic_cxchg,
};

use stoker_ebpf_types::{Alarm, Rang, Subject, Times};

use crate::maps::{ALARMS, RANG};

/// A subject was charged, and these are its times: tells of it once where its alarm is due.
#[inline(always)]
pub fn ring(subject: &Subject, times: *const Times) {
    let Some(alarm) = ALARMS.get_ptr_mut(subject.slot()) else {
        return;
    };
    // SAFETY: elements of arrays live as long as their maps. Others change them at any time, so each word is read once.
    let (at_ns, generation, cpu_ns) = unsafe {
        (
            (&raw const (*alarm).at_ns).read_volatile(),
            (&raw const (*alarm).generation).read_volatile(),
            (&raw const (*times).cpu_ns).read_volatile(),
        )
    };
    if cpu_ns < at_ns || generation != u64::from(subject.generation) {
        return;
    }
    // Without room it stays set, and is looked at again when the subject is charged next.
    let Some(mut record) = RANG.reserve::<Rang>(0) else {
        return;
    };
    // SAFETY: as above. One that was set anew meanwhile is another, which rings by itself.
    let first = unsafe { atomic_cxchg::<u64, { AcqRel }, { Relaxed }>(&raw mut (*alarm).at_ns, at_ns, Alarm::NEVER).1 };
    if first {
        record.write(Rang {
            slot: subject.slot(),
            generation: subject.generation,
        });
        record.submit(0);
    } else {
        record.discard(0);
    }
}
