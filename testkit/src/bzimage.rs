//! A kernel in the format that x86 boots (`arch/x86/boot.rst` in the kernel's documentation), as far as a loader looks at
//! it.

/// A bzImage with `code` bytes that do nothing behind its header, a multiple of 16; it prefers to be loaded at 16 MiB.
pub fn bzimage(code: u32) -> Vec<u8> {
    let fields: [(usize, &[u8]); 11] = [
        (0x1f1, &[1]),
        (0x1f4, &(code / 16).to_le_bytes()),
        (0x1fe, &[0x55, 0xaa]),
        (0x202, b"HdrS"),
        (0x206, &0x20f_u16.to_le_bytes()),
        (0x211, &[1]),
        (0x214, &0x10_0000_u32.to_le_bytes()),
        (0x22c, &0x7fff_ffff_u32.to_le_bytes()),
        (0x236, &1_u16.to_le_bytes()),
        (0x258, &0x100_0000_u64.to_le_bytes()),
        (0x260, &0x10_0000_u32.to_le_bytes()),
    ];
    let mut image = vec![0; 1024];
    for (offset, bytes) in fields {
        image.splice(offset..offset + bytes.len(), bytes.iter().copied());
    }
    image.extend(std::iter::repeat_n(0x90, code as usize));
    image
}
