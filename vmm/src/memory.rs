//! Guest memory and where everything lies in the guest's physical address space.
//!
//! ```text
//! 0x0000_0000  low RAM: boot structures (see `layout`), from 1 MiB the kernel
//! 0x000a_0000  hole, in which the ACPI tables lie (0xe_0000)
//! 0xc000_0000  devices: virtio-mmio at 0xd000_0000, I/O APIC 0xfec0_0000, local APIC 0xfee0_0000
//! 0x1_0000_0000  high RAM, for what does not fit below 3 GiB
//! ```

use std::io;
use std::ops::Deref;
use std::sync::Arc;

use vm_memory::mmap::{FromRangesError, MmapRegionBuilder};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

mod charge;
mod mapping;

pub use charge::most_charged;
use mapping::Mapping;

/// Guest memory, shared by everything that touches it. It is given back with the last of them.
#[derive(Clone, Debug)]
pub struct GuestMemory(Arc<Mapped>);

#[derive(Debug)]
struct Mapped {
    regions: GuestMemoryMmap<()>,
    /// What the regions lie in. Dropped after them.
    _mappings: Vec<Mapping>,
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

/// Maps guest memory: anonymous, private, not reserved and not populated, so that a machine costs what it touches; in huge
/// pages where the host has them.
///
/// # Errors
/// Where the host refuses the mapping.
pub fn allocate(mib: u32) -> Result<GuestMemory, AllocateError> {
    let layout = |source| AllocateError::Layout { mib, source };
    let (mut regions, mut mappings) = (Vec::new(), Vec::new());
    for (start, length) in ranges(mib) {
        let mapping = Mapping::new(length as usize).map_err(|source| AllocateError::Map { mib, source })?;
        // SAFETY: the range is that of `mapping`, which lives as long as the region does: nobody gets the one without the other.
        let region = unsafe {
            MmapRegionBuilder::new(mapping.length())
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_raw_mmap_pointer(mapping.start())
        };
        let region = region.build().map_err(|source| layout(source.into()))?;
        let region = GuestRegionMmap::new(region, GuestAddress(start)).ok_or(FromRangesError::InvalidGuestRegion);
        regions.push(region.map_err(layout)?);
        mappings.push(mapping);
    }
    let regions = GuestMemoryMmap::from_regions(regions).map_err(|source| layout(source.into()))?;
    Ok(GuestMemory(Arc::new(Mapped {
        regions,
        _mappings: mappings,
    })))
}

// === impl GuestMemory ===

impl Deref for GuestMemory {
    type Target = GuestMemoryMmap<()>;

    fn deref(&self) -> &GuestMemoryMmap<()> {
        &self.0.regions
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes as _, GuestMemoryBackend as _};

    use super::*;

    #[test]
    fn memory_goes_round_the_devices() {
        assert_eq!(ranges(128), [(0, 128 << 20)]);
        assert_eq!(ranges(3072), [(0, 3072 << 20)]);
        assert_eq!(ranges(4096), [(0, 3072 << 20), (1 << 32, 1024 << 20)]);
    }

    #[test]
    fn memory_is_not_reserved_ahead() {
        let memory = allocate(8192).unwrap();
        assert_eq!(memory.num_regions(), 2);
        let other = memory.clone();
        drop(memory);
        let last = GuestAddress(layout::ABOVE_4G + (5120 << 20) - 1);
        other.write_slice(&[1], last).unwrap();
        assert!(other.write_slice(&[1, 2], last).is_err());
    }
}
