//! Linux's boot parameters: the zero page, the memory map in it, and the command line (boot.rst and zero-page.rst in
//! Linux's Documentation/arch/x86).

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryError};

use super::kernel::{LoadedInitramfs, LoadedKernel};
use crate::memory::{self, GuestMemory, layout};

/// `type_of_loader` of a loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
/// `HdrS`.
const HEADER_MAGIC: u32 = 0x5372_6448;
/// The protocol that has `acpi_rsdp_addr`, for kernels without a header of their own.
const PROTOCOL: u16 = 0x20e;

const E820_RAM: u32 = 1;
const E820_ACPI: u32 = 3;

/// Writes the zero page and the command line.
///
/// # Errors
/// Where they do not fit into guest memory, which is larger than that.
pub fn write(
    memory: &GuestMemory,
    mib: u32,
    kernel: &LoadedKernel,
    initramfs: Option<LoadedInitramfs>,
    cmdline: &str,
) -> Result<(), GuestMemoryError> {
    let header = kernel.header.unwrap_or(setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        version: PROTOCOL,
        kernel_alignment: 0x100_0000,
        ..Default::default()
    });
    let initramfs = initramfs.unwrap_or(LoadedInitramfs { address: 0, size: 0 });
    let mut params = boot_params {
        acpi_rsdp_addr: layout::ACPI,
        hdr: setup_header {
            type_of_loader: LOADER_UNDEFINED,
            cmd_line_ptr: layout::CMDLINE as u32,
            cmdline_size: cmdline.len() as u32,
            // Both lie below 4 GiB.
            ramdisk_image: initramfs.address as u32,
            ramdisk_size: initramfs.size as u32,
            ..header
        },
        ..Default::default()
    };
    let map = memory_map(mib);
    for (to, from) in params.e820_table.iter_mut().zip(&map) {
        *to = *from;
    }
    params.e820_entries = map.len() as u8;
    memory.write_obj(params, GuestAddress(layout::ZERO_PAGE))?;
    memory.write_slice(cmdline.as_bytes(), GuestAddress(layout::CMDLINE))?;
    memory.write_obj(0u8, GuestAddress(layout::CMDLINE + cmdline.len() as u64))
}

/// What the guest may use: RAM but for the hole below 1 MiB, in which the ACPI tables lie.
fn memory_map(mib: u32) -> Vec<boot_e820_entry> {
    let entry = |start: u64, end: u64, kind| boot_e820_entry {
        addr: start,
        size: end - start,
        r#type: kind,
    };
    let mut map = vec![
        entry(0, layout::LOW_RAM_END, E820_RAM),
        entry(layout::ACPI, layout::ACPI_END, E820_ACPI),
    ];
    map.extend(
        memory::ranges(mib)
            .into_iter()
            .map(|(start, length)| entry(start.max(layout::HIGH_RAM), start + length, E820_RAM)),
    );
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_zero_page_says_what_lies_where() {
        let memory = memory::allocate(4096).unwrap();
        let kernel = LoadedKernel {
            entry: 0x100_0000,
            end: 0x200_0000,
            header: None,
        };
        let initramfs = LoadedInitramfs {
            address: 0x7000_0000,
            size: 0x1234,
        };
        write(&memory, 4096, &kernel, Some(initramfs), "console=ttyS0").unwrap();
        let params: boot_params = memory.read_obj(GuestAddress(layout::ZERO_PAGE)).unwrap();
        assert_eq!({ params.acpi_rsdp_addr }, layout::ACPI);
        assert_eq!({ params.hdr.ramdisk_image }, 0x7000_0000);
        assert_eq!({ params.hdr.ramdisk_size }, 0x1234);
        let map: Vec<_> = params.e820_table[..usize::from(params.e820_entries)]
            .iter()
            .map(|entry| (entry.addr, entry.size, entry.r#type))
            .collect();
        assert_eq!(
            map,
            [
                (0, 0x9_fc00, 1),
                (0xe_0000, 0x2_0000, 3),
                (0x10_0000, 0xbff0_0000, 1),
                (0x1_0000_0000, 0x4000_0000, 1),
            ]
        );
        let mut line = [0xff; 14];
        memory.read_slice(&mut line, GuestAddress(layout::CMDLINE)).unwrap();
        assert_eq!(&line, b"console=ttyS0\0");
    }
}
