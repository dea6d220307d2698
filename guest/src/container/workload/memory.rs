//! How much memory an image's container may have: all that the machine has, but for what the machine itself needs. It follows what
//! is plugged: at once where that makes a block of memory that the kernel tells of, and else whenever somebody looks.
//!
//! Without a limit of its own a container that takes all there is makes every other process wait for the kernel to find a page,
//! among them the one that serves the agent. With one it waits, and ends, alone. That process needs no more protection: nothing
//! of it can be written back, so that none of its pages are ever taken, and the kernel never kills the machine's PID 1.

use std::sync::atomic::{AtomicU64, Ordering};

use stoker_linux::CgroupError;

use crate::container::cgroup::Cgroup;
use crate::machine;
use crate::uevents::Uevents;

/// What stays free, in bytes, for what PID 1 and the kernel need while the container is at its limit: messages, and programs to
/// be run in it.
const SPARE: u64 = 16 << 20;
/// Of memory that is plugged the kernel takes one byte in so many to keep track of it (`struct page`: 64 bytes for 4 KiB).
const KEPT_TRACK_OF: u64 = 64;

/// Where the kernel has blocks of memory.
const MEMORY: &[u8] = b"/devices/system/memory/memory";

/// The limit of one container.
pub(super) struct MemoryLimit {
    /// What there was in all when the container was made, in bytes.
    first: u64,
    /// What of that was the machine's own, in bytes.
    own: u64,
    /// Which total was looked at last, in bytes.
    seen: AtomicU64,
}

// === impl MemoryLimit ===

impl MemoryLimit {
    /// By what the machine has and uses now. Limits the cgroup.
    pub(super) fn set(cgroup: &Cgroup) -> Result<Self, CgroupError> {
        let first = machine::memory_bytes();
        let limit = Self {
            first,
            own: first.saturating_sub(machine::memory_available_bytes()),
            seen: AtomicU64::new(first),
        };
        cgroup.limit_memory(limit.of(first))?;
        Ok(limit)
    }

    /// Follows what the kernel tells of, until it ends.
    pub(super) async fn follow_at_once(&self, cgroup: &Cgroup) -> std::io::Result<()> {
        let messages = Uevents::listen()?;
        loop {
            if messages.next(is_memory).await?.unwrap_or(true) {
                self.follow(cgroup);
            }
        }
    }

    /// Looks whether the machine has come to have more, or less.
    pub(super) fn follow(&self, cgroup: &Cgroup) {
        let total = machine::memory_bytes();
        if total == 0 || self.seen.swap(total, Ordering::Relaxed) == total {
            return;
        }
        if let Err(error) = cgroup.limit_memory(self.of(total)) {
            // It has ended.
            tracing::debug!("{error}");
        }
    }

    /// Of a machine that has so much in all, in bytes.
    fn of(&self, total: u64) -> u64 {
        let plugged = total.saturating_sub(self.first);
        let kept = self.own.saturating_add(plugged / KEPT_TRACK_OF).saturating_add(SPARE);
        // However little that is, a container has something.
        total.saturating_sub(kept).max(total / 2)
    }
}

/// Whether a message is about a block of memory: one that it runs on now, above all.
fn is_memory(message: &[u8]) -> bool {
    let path = message
        .iter()
        .position(|byte| *byte == b'@')
        .and_then(|at| message.get(at + 1..));
    path.is_some_and(|path| path.starts_with(MEMORY))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_about_memory() {
        for about in [
            "online@/devices/system/memory/memory32",
            "add@/devices/system/memory/memory7",
        ] {
            assert!(is_memory(about.as_bytes()), "{about}");
        }
        for other in [
            "",
            "@",
            "online",
            "online@/devices/system/cpu/cpu1",
            "/devices/system/memory/memory32",
        ] {
            assert!(!is_memory(other.as_bytes()), "{other}");
        }
    }

    const MIB: u64 = 1 << 20;

    fn limit(first_mib: u64, own_mib: u64) -> MemoryLimit {
        MemoryLimit {
            first: first_mib * MIB,
            own: own_mib * MIB,
            seen: AtomicU64::new(0),
        }
    }

    #[test]
    fn a_container_has_what_the_machine_does_not_need() {
        let limit = limit(496, 24);
        assert_eq!(limit.of(496 * MIB), 456 * MIB);
        // Of what is plugged, all but what keeping track of it takes.
        assert_eq!(limit.of((496 + 1024) * MIB), (456 + 1008) * MIB);
        assert_eq!(limit.of(400 * MIB), 360 * MIB);
    }

    #[test]
    fn it_always_has_half() {
        for (first, own, total) in [(64, 40, 64), (64, 64, 64), (64, 40, 32), (64, 1000, 64)] {
            assert_eq!(limit(first, own).of(total * MIB), total / 2 * MIB);
        }
        assert_eq!(limit(0, 0).of(0), 0);
    }

    proptest::proptest! {
        /// More memory is never less for the container, and never all of it.
        #[test]
        fn it_grows_with_the_machine(first in 32u64..1 << 20, own in 0u64..1 << 20, total in 32u64..1 << 20, more in 0u64..1 << 20) {
            let limit = limit(first, own);
            let (before, after) = (limit.of(total * MIB), limit.of((total + more) * MIB));
            proptest::prop_assert!(before <= after && after < (total + more) * MIB);
        }
    }
}
