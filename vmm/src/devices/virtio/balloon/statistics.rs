//! What a guest tells of its memory (virtio 1.3, 5.5.6.3).

use std::time::Instant;

use super::super::buffers::Buffers;
use super::PAGE;
use crate::memory::GuestMemory;

/// Bytes of one figure: a tag, and a value, without padding.
const FIGURE_BYTES: usize = 10;
/// Most figures looked at; Linux 6.12 has 16.
const MAX_FIGURES: usize = 64;

/// What the guest has said, which may be anything. A figure that it left out is `None`; sizes are in bytes, the others counts
/// since it started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Statistics {
    /// When it said so.
    pub at: Instant,
    /// What the balloon had then, in bytes, as the device counts it.
    pub taken: u64,
    /// Memory without any use.
    pub free: Option<u64>,
    /// All memory that it knows of.
    pub total: Option<u64>,
    /// What programs could be given without swapping.
    pub available: Option<u64>,
    /// What caches of files take.
    pub caches: Option<u64>,
    /// Page faults that waited for a disk.
    pub major_faults: Option<u64>,
    /// All other page faults.
    pub minor_faults: Option<u64>,
    /// Processes killed for want of memory (Linux 6.12 and later).
    pub oom_kills: Option<u64>,
    /// Times that memory was waited for (Linux 6.12 and later).
    pub stalls: Option<u64>,
}

// === impl Statistics ===

impl Statistics {
    /// Reads what is in a driver's buffer, of a balloon with so many pages; `None` where it is no guest memory.
    pub(super) fn read(buffer: &Buffers, memory: &GuestMemory, at: Instant, pages: u64) -> Option<Self> {
        let length = usize::try_from(buffer.len()).unwrap_or(usize::MAX);
        let mut bytes = vec![0; length.min(MAX_FIGURES * FIGURE_BYTES)];
        buffer.read(memory, 0, &mut bytes).ok()?;
        let mut statistics = Self {
            at,
            taken: pages * PAGE,
            free: None,
            total: None,
            available: None,
            caches: None,
            major_faults: None,
            minor_faults: None,
            oom_kills: None,
            stalls: None,
        };
        let (figures, _) = bytes.as_chunks::<FIGURE_BYTES>();
        for [t0, t1, value @ ..] in figures {
            let figure = match u16::from_le_bytes([*t0, *t1]) {
                2 => &mut statistics.major_faults,
                3 => &mut statistics.minor_faults,
                4 => &mut statistics.free,
                5 => &mut statistics.total,
                6 => &mut statistics.available,
                7 => &mut statistics.caches,
                10 => &mut statistics.oom_kills,
                11 => &mut statistics.stalls,
                _ => continue,
            };
            *figure = Some(u64::from_le_bytes(*value));
        }
        Some(statistics)
    }
}
