//! A range of the guest's addresses with memory behind it.

use std::sync::Arc;

use vm_memory::mmap::{FromRangesError, MmapRegionBuilder};
use vm_memory::{
    GuestAddress, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes, GuestRegionMmap, MemoryRegionAddress,
    VolatileSlice,
};

use super::mapping::Mapping;
use super::plug::Pluggable;

/// A region, as `vm-memory` looks it up. Of pluggable memory it gives out what is plugged.
#[derive(Debug)]
pub struct Region {
    mapped: GuestRegionMmap<()>,
    /// What it lies in. Dropped after it.
    backing: Backing,
}

#[derive(Debug)]
enum Backing {
    Boot(Mapping),
    Pluggable(Arc<Pluggable>),
}

// === impl Region ===

impl Region {
    /// Memory that is there as long as the machine.
    pub(super) fn boot(start: u64, mapping: Mapping) -> Result<Self, FromRangesError> {
        Self::new(start, Backing::Boot(mapping))
    }

    /// Memory that comes and goes.
    pub(super) fn pluggable(pluggable: Arc<Pluggable>) -> Result<Self, FromRangesError> {
        Self::new(pluggable.start(), Backing::Pluggable(pluggable))
    }

    fn new(start: u64, backing: Backing) -> Result<Self, FromRangesError> {
        let mapping = backing.mapping();
        // SAFETY: the range is that of the mapping, which lives as long as the region does: nobody gets the one without the other.
        let region = unsafe {
            MmapRegionBuilder::new(mapping.length())
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_raw_mmap_pointer(mapping.start())
        };
        let mapped = GuestRegionMmap::new(region.build()?, GuestAddress(start));
        Ok(Self {
            mapped: mapped.ok_or(FromRangesError::InvalidGuestRegion)?,
            backing,
        })
    }

    /// Gives the memory of whole pages back to the host; false where it is not there, or the host refuses.
    pub(super) fn give_back(&self, offset: u64, length: u64) -> bool {
        self.has(offset, length) && self.backing.mapping().discard(offset, length).is_ok()
    }

    fn has(&self, offset: u64, length: u64) -> bool {
        match &self.backing {
            Backing::Boot(_) => true,
            Backing::Pluggable(pluggable) => pluggable.holds(offset, length),
        }
    }
}

impl GuestMemoryRegion for Region {
    type B = ();

    fn len(&self) -> u64 {
        self.mapped.len()
    }

    fn start_addr(&self) -> GuestAddress {
        self.mapped.start_addr()
    }

    fn bitmap(&self) {}

    /// Where it lies, plugged or not.
    fn get_host_address(&self, offset: MemoryRegionAddress) -> Result<*mut u8, GuestMemoryError> {
        self.mapped.get_host_address(offset)
    }

    fn get_slice(&self, offset: MemoryRegionAddress, count: usize) -> Result<VolatileSlice<'_>, GuestMemoryError> {
        if !self.has(offset.0, count as u64) {
            return Err(GuestMemoryError::InvalidBackendAddress);
        }
        self.mapped.get_slice(offset, count)
    }
}

impl GuestMemoryRegionBytes for Region {}

// === impl Backing ===

impl Backing {
    fn mapping(&self) -> &Mapping {
        match self {
            Self::Boot(mapping) => mapping,
            Self::Pluggable(pluggable) => pluggable.mapping(),
        }
    }
}
