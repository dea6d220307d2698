//! The table of threads.
//!
//! A thread is looked up each time it comes to a CPU, and where the kernel counts no waits at each wake-up too, so that is what has to be
//! cheap: most often it is at its home, which is one cache line. Where that was another's it is in one of a few places beside, whose keys are in one more line. All is found without
//! a helper of the kernel's. A thread comes and goes under the lock of its run queue; two threads may want the same place at once.

use core::intrinsics::{
    AtomicOrdering::{AcqRel, Relaxed},
    atomic_cxchg,
};

use stoker_ebpf_types::{NO_PLACE, Running, Thread, WAYS, home_of};

use crate::maps::{KEYS, THREADS, sets};

/// What is kept of a thread.
#[inline(always)]
pub fn find(thread: u64) -> Option<&'static mut Thread> {
    let home = home_of(thread, sets());
    at(home, thread).or_else(|| at(place_beside(home, thread), thread))
}

/// What is kept of the current thread.
#[inline(always)]
pub fn of(running: &Running, thread: u64) -> Option<&'static mut Thread> {
    match running.place {
        NO_PLACE => find(thread),
        place => at(place, thread),
    }
}

/// Where a thread is that is not at its home. A function of its own: it is rarely needed, and so takes no room in the processor's
/// cache of instructions.
#[inline(never)]
fn place_beside(home: u32, thread: u64) -> u32 {
    let Some(keys) = KEYS.get_ptr(home / WAYS) else {
        return NO_PLACE;
    };
    for way in 0..WAYS {
        // SAFETY: `way` is within the element, which lives as long as the map; others may change it, so it is read once.
        let key = unsafe { keys.cast::<u64>().add(way as usize).read_volatile() };
        if key == thread {
            return home / WAYS * WAYS + way;
        }
    }
    NO_PLACE
}

/// What is kept of a thread at its place, if the place is still its own.
#[inline(always)]
pub fn at(place: u32, thread: u64) -> Option<&'static mut Thread> {
    let kept = THREADS.get_ptr_mut(place)?;
    // SAFETY: elements of an array live as long as the map. The run queue's lock keeps others from this thread's, save for one
    // that takes the place of a thread that is nobody's: what is written to it then is put right when that one is charged.
    let kept = unsafe { &mut *kept };
    (kept.thread == thread).then_some(kept)
}

/// Keeps what is known of a thread that is not kept; `None` where there was no room. Where all places are taken a thread that
/// is nobody's makes way.
#[inline(always)]
pub fn insert(thread: Thread) -> Option<&'static mut Thread> {
    let place = take_place(thread.thread);
    // SAFETY: as in `at`.
    let kept = unsafe { &mut *THREADS.get_ptr_mut(place)? };
    *kept = Thread { place, ..thread };
    Some(kept)
}

/// Forgets a thread.
#[inline(always)]
pub fn remove(kept: &mut Thread) {
    let thread = core::mem::take(&mut kept.thread);
    let Some(keys) = KEYS.get_ptr_mut(kept.place / WAYS) else {
        return;
    };
    // SAFETY: within the element; the remainder is below WAYS. Only its own thread's key is taken away.
    unsafe {
        let key = keys.cast::<u64>().add((kept.place % WAYS) as usize);
        atomic_cxchg::<u64, { AcqRel }, { Relaxed }>(key, thread, 0);
    }
}

/// A function of its own: it is rarely needed and long.
#[inline(never)]
fn take_place(thread: u64) -> u32 {
    let home = home_of(thread, sets());
    let Some(keys) = KEYS.get_ptr_mut(home / WAYS) else {
        return NO_PLACE;
    };
    let keys = keys.cast::<u64>();
    // From its home on.
    for step in 0..WAYS {
        let way = home.wrapping_add(step) % WAYS;
        // SAFETY: as in `place_beside`, and changed by atomic operations alone.
        unsafe {
            let key = keys.add(way as usize);
            if key.read_volatile() == 0 && atomic_cxchg::<u64, { AcqRel }, { Relaxed }>(key, 0, thread).1 {
                return home / WAYS * WAYS + way;
            }
        }
    }
    for step in 0..WAYS {
        let way = home.wrapping_add(step) % WAYS;
        let place = home / WAYS * WAYS + way;
        let Some(kept) = THREADS.get_ptr(place) else {
            return NO_PLACE;
        };
        // SAFETY: as above.
        unsafe {
            let key = keys.add(way as usize);
            let other = key.read_volatile();
            if (*kept).subject.cgroup == 0 && atomic_cxchg::<u64, { AcqRel }, { Relaxed }>(key, other, thread).1 {
                return place;
            }
        }
    }
    NO_PLACE
}
