//! State of the first vCPU at the kernel's entry, as the 64-bit boot protocol wants it (boot.rst, "64-bit boot protocol"):
//! long mode, the first GiB mapped one to one, flat segments, RSI at the zero page.

use kvm_bindings::{kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryError};

use crate::memory::{GuestMemory, layout};

/// Selectors that Linux expects: `__BOOT_CS` and `__BOOT_DS`.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

const CR0_PROTECTED: u64 = 1 << 0;
const CR0_EXTENSION: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PHYSICAL_EXTENSION: u64 = 1 << 5;
const EFER_LONG_ENABLE: u64 = 1 << 8;
const EFER_LONG_ACTIVE: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set.
const RFLAGS: u64 = 1 << 1;

const PRESENT_WRITABLE: u64 = 0b11;
const LARGE_PAGE: u64 = 1 << 7;
const LARGE_PAGE_BYTES: u64 = 2 << 20;
const TABLE_BYTES: u64 = 4096;
const TABLE_ENTRIES: u64 = 512;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1 << 0;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, everything write-back: what firmware would leave.
const MTRR_ENABLE_WRITE_BACK: u64 = 1 << 11 | 6;

/// General registers for an entry at `entry`.
pub fn general(entry: u64) -> kvm_regs {
    kvm_regs {
        rip: entry,
        rsi: layout::ZERO_PAGE,
        rflags: RFLAGS,
        ..Default::default()
    }
}

/// System registers on top of KVM's own.
pub fn system(mut sregs: kvm_sregs) -> kvm_sregs {
    let data = segment(DATA, 0x3, false);
    sregs.cs = segment(CODE, 0xb, true);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        selector: TASK,
        // A busy 64-bit TSS.
        type_: 0xb,
        present: 1,
        limit: 0xffff,
        ..Default::default()
    };
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = (GDT.len() * 8 - 1) as u16;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PROTECTED | CR0_EXTENSION | CR0_PAGING;
    sregs.cr3 = layout::PAGE_TABLES;
    sregs.cr4 = CR4_PHYSICAL_EXTENSION;
    sregs.efer = EFER_LONG_ENABLE | EFER_LONG_ACTIVE;
    sregs
}

/// MSRs that firmware would set. KVM may refuse some.
pub fn msrs() -> [kvm_msr_entry; 2] {
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    [
        entry(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(MSR_MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK),
    ]
}

/// Null, null, `CODE`, `DATA`, and `TASK`, which takes two.
const GDT: [u64; 6] = [
    0,
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x008f_8b00_0000_ffff,
    0,
];

/// Writes the GDT and the page tables.
///
/// # Errors
/// Where they do not fit into guest memory, which is larger than that.
pub fn write_tables(memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    let mut gdt = Vec::with_capacity(GDT.len() * 8);
    gdt.extend(GDT.into_iter().flat_map(u64::to_le_bytes));
    memory.write_slice(&gdt, GuestAddress(layout::GDT))?;

    let level = |number: u64| layout::PAGE_TABLES + number * TABLE_BYTES;
    memory.write_obj(level(1) | PRESENT_WRITABLE, GuestAddress(level(0)))?;
    memory.write_obj(level(2) | PRESENT_WRITABLE, GuestAddress(level(1)))?;
    let pages: Vec<u8> = (0..TABLE_ENTRIES)
        .flat_map(|page| ((page * LARGE_PAGE_BYTES) | LARGE_PAGE | PRESENT_WRITABLE).to_le_bytes())
        .collect();
    memory.write_slice(&pages, GuestAddress(level(2)))
}

fn segment(selector: u16, type_: u8, code: bool) -> kvm_segment {
    kvm_segment {
        selector,
        type_,
        limit: u32::MAX,
        present: 1,
        s: 1,
        g: 1,
        l: u8::from(code),
        db: u8::from(!code),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_gib_is_mapped_one_to_one() {
        let memory = crate::memory::allocate(32).unwrap();
        write_tables(&memory).unwrap();
        let entry = |address| -> u64 { memory.read_obj(GuestAddress(address)).unwrap() };
        let level3 = entry(layout::PAGE_TABLES) & !0xfff;
        let level2 = entry(level3) & !0xfff;
        assert_eq!(entry(level2), 0x83);
        assert_eq!(entry(level2 + 511 * 8), 0x3fe0_0083);
        assert_eq!(entry(layout::GDT + u64::from(CODE)), GDT[2]);
    }

    #[test]
    fn segments_agree_with_their_descriptors() {
        let sregs = system(kvm_sregs::default());
        assert_eq!((sregs.cs.l, sregs.cs.db, sregs.ds.db), (1, 0, 1));
        assert_eq!(sregs.gdt.limit, 47);
        assert_eq!(general(0x1234).rip, 0x1234);
    }
}
