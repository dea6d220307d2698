//! Initramfs archives for guests that go wrong.

use std::fmt::Write as _;

/// A newc cpio archive (kernel: Documentation/driver-api/early-userspace/buffer-format.rst) of these files, each executable.
pub fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (inode, (name, content)) in files.iter().chain([&("TRAILER!!!", [].as_slice())]).enumerate() {
        let mode = 0o100_755;
        let mut header = String::from("070701");
        for field in [inode, mode, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, name.len() + 1, 0] {
            // Writing to a string never fails.
            let _ = write!(header, "{field:08x}");
        }
        archive.extend_from_slice(header.as_bytes());
        archive.extend_from_slice(name.as_bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(content);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}

/// An ELF program that does nothing for ever: `for (;;) pause();`.
pub fn sleeper() -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    // mov eax, 34 (pause); syscall; jmp to the start
    let code = [0xb8, 34, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xf7];
    let size = HEADERS + code.len() as u64;
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let u16s = |elf: &mut Vec<u8>, values: &[u16]| values.iter().for_each(|v| elf.extend_from_slice(&v.to_le_bytes()));
    let u32s = |elf: &mut Vec<u8>, values: &[u32]| values.iter().for_each(|v| elf.extend_from_slice(&v.to_le_bytes()));
    let u64s = |elf: &mut Vec<u8>, values: &[u64]| values.iter().for_each(|v| elf.extend_from_slice(&v.to_le_bytes()));
    u16s(&mut elf, &[2, 62]); // an executable for x86-64
    u32s(&mut elf, &[1]);
    u64s(&mut elf, &[BASE + HEADERS, 64, 0]); // entry, program headers, no section headers
    u32s(&mut elf, &[0]);
    u16s(&mut elf, &[64, 56, 1, 0, 0, 0]);
    u32s(&mut elf, &[1, 5]); // one segment to load, readable and executable
    u64s(&mut elf, &[0, BASE, BASE, size, size, 0x1000]);
    elf.extend_from_slice(&code);
    elf
}
