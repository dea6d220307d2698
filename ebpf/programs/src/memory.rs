//! Resident memory.
//!
//! `kmem:rss_stat` tells the size of one kind of memory of one address space each time it changes. What each has is
//! kept, and the difference to before goes into the subject's sum. An address space counts towards the subject whose
//! thread changed it last as its own.

use core::intrinsics::{
    AtomicOrdering::{AcqRel, Relaxed},
    atomic_cxchg, atomic_xadd, atomic_xchg,
};

use aya_ebpf::{
    macros::{raw_tracepoint, tracepoint},
    programs::{RawTracePointContext, TracePointContext},
};
use stoker_ebpf_types::{KINDS, Process, RssStatFields};

use crate::maps::{PROCESSES, RESIDENT, current_cgroup, lost, subject_of};

/// Set by the loader from the tracepoint's `format` file.
#[unsafe(no_mangle)]
static RSS_STAT: RssStatFields = RssStatFields::DEFAULT;

const BPF_NOEXIST: u64 = 1;

/// How often a peak is tried again when another CPU raised it at the same time; the next event tries anew.
const PEAK_TRIES: u32 = 4;

/// An address space grew or shrank.
#[tracepoint(category = "kmem", name = "rss_stat")]
pub fn rss_stat(event: TracePointContext) -> u32 {
    let _ = count(&event);
    0
}

/// Sets what an address space has: `(mm_id, slot, generation, bytes by kind...)`. Nothing calls this but user space, with
/// `BPF_PROG_TEST_RUN`, to take over what earlier programs counted. Events may come meanwhile: sizes are whole, so the next
/// one of each kind puts right what was older than an event.
#[raw_tracepoint(tracepoint = "adopt")]
pub fn adopt(event: RawTracePointContext) -> i32 {
    let mm = event.arg::<u64>(0) as u32;
    let process = Process {
        slot: event.arg::<u64>(1) as u32,
        generation: event.arg::<u64>(2) as u32,
        bytes: [0; KINDS],
    };
    let sizes = [
        event.arg::<u64>(3) as i64,
        event.arg::<u64>(4) as i64,
        event.arg::<u64>(5) as i64,
    ];
    let made = PROCESSES.insert(mm, process, BPF_NOEXIST);
    match PROCESSES.get_ptr_mut(mm) {
        Some(process) => {
            for (kind, bytes) in sizes.into_iter().enumerate() {
                exchange(process, kind, bytes);
            }
            forget_empty(mm, process);
        }
        None => {
            if made.is_err() {
                lost(|lost| lost.processes += 1);
            }
        }
    }
    0
}

/// A change of one kind of memory.
struct Change {
    mm: u32,
    /// Of the current thread's own address space.
    own: bool,
    kind: usize,
    bytes: i64,
}

impl Change {
    #[inline(always)]
    fn read(event: &TracePointContext) -> Option<Self> {
        // SAFETY: a constant that the loader may set before the load; volatile keeps the compiler from taking it for
        // the default.
        let at = unsafe { (&raw const RSS_STAT).read_volatile() };
        // SAFETY: the offsets are the kernel's own, and the helper reads kernel memory safely wherever it is.
        let (mm, own, member, bytes) = unsafe {
            (
                event.read_at::<u32>(at.mm_id as usize).ok()?,
                event.read_at::<u32>(at.curr as usize).ok()?,
                event.read_at::<u32>(at.member as usize).ok()?,
                event.read_at::<i64>(at.size as usize).ok()?,
            )
        };
        let kind = match member {
            0 => 0,
            1 => 1,
            3 => 2,
            // Swap entries are not resident.
            _ => return None,
        };
        // An id of 0 is what the kernel tells of all before it has random numbers to hash with.
        (mm != 0).then_some(Self {
            mm,
            own: own != 0,
            kind,
            bytes,
        })
    }
}

#[inline(always)]
fn count(event: &TracePointContext) -> Option<()> {
    let change = Change::read(event)?;
    match PROCESSES.get_ptr_mut(change.mm) {
        Some(process) => {
            if change.own {
                settle_owner(process);
            }
            apply(process, &change);
        }
        None => {
            // A fork or an exec fills an address space that is not yet anyone's own: the one who fills it owns it for
            // now.
            if change.bytes == 0 {
                return None;
            }
            let subject = subject_of(current_cgroup())?;
            let process = Process {
                slot: subject.slot(),
                generation: subject.generation,
                bytes: [0; KINDS],
            };
            let made = PROCESSES.insert(change.mm, process, BPF_NOEXIST);
            match PROCESSES.get_ptr_mut(change.mm) {
                Some(process) => apply(process, &change),
                None => {
                    if made.is_err() {
                        lost(|lost| lost.processes += 1);
                    }
                }
            }
        }
    }
    Some(())
}

/// Makes sure that an address space counts towards the subject that its own thread is of: threads move between cgroups,
/// and slots get new owners.
#[inline(always)]
fn settle_owner(process: *mut Process) {
    // SAFETY: the verifier holds the element alive; others change it by atomic operations or as here, and two threads
    // that come from one move write the same.
    let (slot, generation) = unsafe { ((*process).slot, (*process).generation) };
    // A kernel thread may borrow an address space: one that is nobody's does not take it away.
    let Some(new) = subject_of(current_cgroup()) else {
        return;
    };
    let new_slot = new.slot();
    if (new_slot, new.generation) == (slot, generation) {
        return;
    }
    for kind in 0..KINDS {
        let bytes = swap(process, kind, 0);
        add(slot, generation, -bytes);
        // SAFETY: as above.
        unsafe {
            (*process).slot = new_slot;
            (*process).generation = new.generation;
        }
        let had = swap(process, kind, bytes);
        add(new_slot, new.generation, bytes - had);
    }
}

/// Takes a size over into the sum, and forgets an address space that has nothing left.
#[inline(always)]
fn apply(process: *mut Process, change: &Change) {
    exchange(process, change.kind, change.bytes);
    forget_empty(change.mm, process);
}

/// Takes the size of one kind over into the sum.
#[inline(always)]
fn exchange(process: *mut Process, kind: usize, bytes: i64) {
    let before = swap(process, kind, bytes);
    // SAFETY: as in `settle_owner`.
    let (slot, generation) = unsafe { ((*process).slot, (*process).generation) };
    add(slot, generation, bytes - before);
}

#[inline(always)]
fn forget_empty(mm: u32, process: *mut Process) {
    // SAFETY: as in `settle_owner`.
    let left = unsafe { (*process).bytes[0] | (*process).bytes[1] | (*process).bytes[2] };
    if left == 0 {
        let _ = PROCESSES.remove(mm);
    }
}

/// Puts a size in the place of another, which is returned: however many CPUs do so at once, the differences add up.
#[inline(always)]
fn swap(process: *mut Process, kind: usize, bytes: i64) -> i64 {
    // SAFETY: `kind` is below KINDS, and the verifier checks the bounds once more; the field is aligned.
    unsafe {
        let size = (&raw mut (*process).bytes).cast::<i64>().add(kind);
        atomic_xchg::<i64, { AcqRel }>(size, bytes)
    }
}

/// Adds to a subject's sum and raises its peak, unless the slot has another owner by now.
#[inline(always)]
fn add(slot: u32, generation: u32, bytes: i64) {
    let Some(resident) = RESIDENT.get_ptr_mut(slot) else {
        return;
    };
    // SAFETY: elements of an array live as long as the map; the fields are aligned and changed by atomic operations
    // alone while the slot has an owner.
    unsafe {
        if (&raw const (*resident).generation).read_volatile() != u64::from(generation) {
            return;
        }
        // Relaxed would do, but LLVM 22 then takes the instruction that returns nothing and goes on with a wrong sum.
        let now = atomic_xadd::<i64, i64, { AcqRel }>(&raw mut (*resident).bytes, bytes) + bytes;
        for _ in 0..PEAK_TRIES {
            let peak = &raw mut (*resident).peak_bytes;
            let before = peak.read_volatile();
            if now <= before || atomic_cxchg::<i64, { AcqRel }, { Relaxed }>(peak, before, now).1 {
                return;
            }
        }
    }
}
