//! Guest memory and where everything lies in the guest's physical address space.
//!
//! ```text
//! 0x0000_0000  low RAM: boot structures (see `layout`), from 1 MiB the kernel
//! 0x000a_0000  hole, in which the ACPI tables lie (0xe_0000)
//! 0xc000_0000  devices: virtio-mmio at 0xd000_0000, I/O APIC 0xfec0_0000, local APIC 0xfee0_0000
//! 0x1_0000_0000  high RAM, for what does not fit below 3 GiB
//! behind it      memory that is plugged while the guest runs, where there is to be any
//! ```

use std::io;
use std::ops::Deref;
use std::sync::Arc;

use vm_memory::mmap::FromRangesError;
use vm_memory::{GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion as _, GuestRegionCollection};

mod charge;
mod mapping;
mod plug;
mod region;

pub use charge::most_charged;
use mapping::Mapping;
pub use plug::{BLOCK, Pluggable, Turn};
pub use region::Region;

/// What guest memory is made of, as `vm-memory` looks it up.
pub type Regions = GuestRegionCollection<Region>;

/// Guest memory, shared by everything that touches it. It is given back with the last of them.
#[derive(Clone, Debug)]
pub struct GuestMemory(Arc<Mapped>);

#[derive(Debug)]
struct Mapped {
    regions: Regions,
    pluggable: Option<Arc<Pluggable>>,
}

/// Fixed guest-physical addresses in bytes.
pub mod layout {
    /// The GDT with which the first vCPU starts.
    pub const GDT: u64 = 0x500;
    /// Linux's `boot_params` (the zero page).
    pub const ZERO_PAGE: u64 = 0x7000;
    /// Page tables for the first vCPU: one page each of level 4, 3 and 2.
    pub const PAGE_TABLES: u64 = 0x9000;
    /// The kernel's command line.
    pub const CMDLINE: u64 = 0x2_0000;
    /// End of the RAM below 1 MiB that the guest may use (where a PC's EBDA would begin).
    pub const LOW_RAM_END: u64 = 0x9_fc00;
    /// ACPI tables, beginning with the RSDP.
    pub const ACPI: u64 = 0xe_0000;
    /// End of the ACPI tables' room.
    pub const ACPI_END: u64 = 0x10_0000;
    /// Where RAM for the kernel begins.
    pub const HIGH_RAM: u64 = 0x10_0000;
    /// Where the range for devices begins and low RAM ends at the latest.
    pub const DEVICES: u64 = 0xc000_0000;
    /// The first virtio-mmio device; one every [`VIRTIO_MMIO_SIZE`] bytes.
    pub const VIRTIO_MMIO: u64 = 0xd000_0000;
    /// Bytes between virtio-mmio devices: a page, so that each could be mapped on its own.
    pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
    /// The I/O APIC, as KVM has it.
    pub const IO_APIC: u32 = 0xfec0_0000;
    /// The local APICs, as KVM has them.
    pub const LOCAL_APIC: u32 = 0xfee0_0000;
    /// Three pages that KVM needs on Intel CPUs without unrestricted guest mode.
    pub const KVM_TSS: u64 = 0xfffb_d000;
    /// Where RAM goes on above the devices.
    pub const ABOVE_4G: u64 = 0x1_0000_0000;
}

/// Guest memory could not be had.
#[derive(Debug, thiserror::Error)]
pub enum AllocateError {
    /// The host refuses to map it.
    #[error("cannot map {mib} MiB of guest memory: {source}; give the machine less or raise the address-space limit")]
    Map {
        /// How much was asked for.
        mib: u32,
        /// What the host says.
        source: io::Error,
    },
    /// The ranges do not fit together.
    #[error("cannot lay out {mib} MiB of guest memory: {source}")]
    Layout {
        /// How much was asked for.
        mib: u32,
        /// Why.
        source: FromRangesError,
    },
}

/// The ranges of RAM, each a start and a length in bytes, of a machine with `mib` MiB.
pub fn ranges(mib: u32) -> Vec<(u64, u64)> {
    let size = u64::from(mib) << 20;
    let low = size.min(layout::DEVICES);
    let mut ranges = vec![(0, low)];
    if size > low {
        ranges.push((layout::ABOVE_4G, size - low));
    }
    ranges
}

/// Where Linux may be given more memory than a machine with `mib` MiB starts with, up to `max_mib`: a start and a length in bytes. The
/// length is of whole blocks of Linux's (`probe_memory_block_size` of its arch/x86/mm/init_64.c), so that all that is missing fits in.
pub fn pluggable_range(mib: u32, max_mib: u32) -> Option<(u64, u64)> {
    /// Bytes from which on Linux adds memory in larger blocks.
    const LARGE: u64 = 64 << 30;
    let more = u64::from(max_mib.checked_sub(mib).filter(|more| *more > 0)?) << 20;
    let end = ranges(mib).last().map_or(0, |(start, length)| start + length);
    let block = if end < LARGE { 128 << 20 } else { 2 << 30 };
    let start = end.max(layout::ABOVE_4G).next_multiple_of(block);
    Some((start, more.next_multiple_of(block)))
}

/// Maps guest memory: anonymous, private, not reserved and not populated, so that a machine costs what it touches; in huge
/// pages where the host has them.
///
/// # Errors
/// Where the host refuses the mapping.
pub fn allocate(mib: u32) -> Result<GuestMemory, AllocateError> {
    allocate_up_to(mib, mib)
}

/// The same with more that can be plugged, up to `max_mib` MiB in all.
///
/// # Errors
/// Where the host refuses the mapping.
pub fn allocate_up_to(mib: u32, max_mib: u32) -> Result<GuestMemory, AllocateError> {
    let map = |mib| move |source| AllocateError::Map { mib, source };
    let layout = |source| AllocateError::Layout { mib: max_mib, source };
    let mut regions = Vec::new();
    for (start, length) in ranges(mib) {
        let mapping = Mapping::new(length as usize).map_err(map(mib))?;
        regions.push(Region::boot(start, mapping).map_err(layout)?);
    }
    let mut pluggable = None;
    if let Some((start, length)) = pluggable_range(mib, max_mib) {
        let more = Arc::new(Pluggable::new(start, length).map_err(map(max_mib))?);
        regions.push(Region::pluggable(more.clone()).map_err(layout)?);
        pluggable = Some(more);
    }
    let regions = Regions::from_regions(regions).map_err(|source| layout(source.into()))?;
    Ok(GuestMemory(Arc::new(Mapped { regions, pluggable })))
}

// === impl GuestMemory ===

impl GuestMemory {
    /// What of it is plugged while the guest runs, if any is.
    pub fn pluggable(&self) -> Option<&Arc<Pluggable>> {
        self.0.pluggable.as_ref()
    }

    /// The turn of a thread that looks memory up; none is needed where all memory stays.
    pub fn turn(&self) -> Option<Turn> {
        self.pluggable().map(|pluggable| pluggable.turn())
    }

    /// Gives whole pages of 4096 bytes back to the host at once; the guest reads zeros there. False where not all of that is
    /// guest memory, or the host refuses; a part of it may be given back then.
    pub fn give_back(&self, start: u64, length: u64) -> bool {
        let (mut start, mut rest) = (start, length);
        while rest > 0 {
            let Some((region, offset)) = self.to_region_addr(GuestAddress(start)) else {
                return false;
            };
            let part = rest.min(region.len() - offset.0);
            if !region.give_back(offset.0, part) {
                return false;
            }
            (start, rest) = (start.saturating_add(part), rest - part);
        }
        true
    }
}

impl Deref for GuestMemory {
    type Target = Regions;

    fn deref(&self) -> &Regions {
        &self.0.regions
    }
}

#[cfg(test)]
mod tests;
