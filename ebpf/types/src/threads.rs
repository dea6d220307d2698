//! The table of threads: where a thread is kept, and since when it waits.

use crate::Subject;

/// How many places a set has. Their keys fill a line of the processors' caches.
pub const WAYS: u32 = 8;

/// The index of no place.
pub const NO_PLACE: u32 = u32::MAX;

/// The place that a thread has if it is free, by the address of its `task_struct`; else it has another of the same set. `sets` is a
/// power of two.
#[inline(always)]
pub const fn home_of(thread: u64, sets: u32) -> u32 {
    // The golden ratio in 64 bits: the upper half depends on every bit of the address.
    let hash = thread.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    hash as u32 & sets.wrapping_mul(WAYS).wrapping_sub(1)
}

/// What `THREADS` holds for a thread. It fills a line of the processors' caches.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Thread {
    /// The address of its `task_struct`: the key once more. A place that is another's by now is left alone.
    pub thread: u64,
    /// Since when it waits for a CPU; where the kernel counts that, only whether it waits for its cgroup's limit. While it runs: when
    /// another CPU charged it last, 0 where none did since it came.
    pub waits: Stamp,
    /// Whom it is charged to; nobody where that is not known yet. Such a thread makes way for others.
    pub subject: Subject,
    /// CPU time in ns with which other CPUs charged it while that was not known.
    pub uncharged_ns: u64,
    /// Its own index.
    pub place: u32,
    /// To fill the word.
    pub unused: u32,
    /// Where the kernel counts it, how much of its waiting is charged, in ns.
    pub waited_ns: u64,
    /// To fill the line.
    pub unused_more: u64,
}

/// Since when a thread waits for a CPU: ns of `CLOCK_MONOTONIC` but for the two lowest bits, which tell why; 0 where it
/// runs, and nothing in particular where it sleeps.
pub type Stamp = u64;

const REQUEUED: Stamp = 1;
const THROTTLED: Stamp = 2;

/// It waits since it was woken up.
pub const fn woken(at_ns: u64) -> Stamp {
    at_ns & !(REQUEUED | THROTTLED)
}

/// It waits since it lost its CPU to another.
pub const fn requeued(at_ns: u64) -> Stamp {
    woken(at_ns) | REQUEUED
}

/// It waits for what it did, and its cgroup's limit is used up.
pub const fn throttled(stamp: Stamp) -> Stamp {
    stamp | THROTTLED
}

/// Whether a stamp came from a wake-up.
pub const fn is_woken(stamp: Stamp) -> bool {
    stamp & REQUEUED == 0
}

/// Whether its cgroup's limit was used up then.
pub const fn is_throttled(stamp: Stamp) -> bool {
    stamp & THROTTLED != 0
}
