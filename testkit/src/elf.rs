//! Programs of a few bytes, as a kernel or a loader of kernels takes them (elf(5)).

/// An ELF program for x86-64 whose one segment is `code`, which lies at `address`, virtual and physical, and is entered at
/// its start. Linux takes it as a program where `address` is 120 bytes behind the start of a page.
pub fn elf(address: u64, code: &[u8]) -> Vec<u8> {
    const PROGRAM_HEADER: u64 = 64;
    const CODE: u64 = 64 + 56;
    let length = code.len() as u64;
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    let halves = |elf: &mut Vec<u8>, values: &[u16]| elf.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    let words = |elf: &mut Vec<u8>, values: &[u32]| elf.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    let longs = |elf: &mut Vec<u8>, values: &[u64]| elf.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    halves(&mut elf, &[2, 62]); // an executable, for x86-64
    words(&mut elf, &[1]);
    longs(&mut elf, &[address, PROGRAM_HEADER, 0]);
    words(&mut elf, &[0]);
    halves(&mut elf, &[64, 56, 1, 0, 0, 0]); // one program header, no section header
    words(&mut elf, &[1, 7]); // to be loaded; readable, writable and executable
    longs(&mut elf, &[CODE, address, address, length, length, 4096]);
    elf.extend(code);
    elf
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::process::Command;

    use super::*;

    #[test]
    fn linux_runs_it() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("program");
        // mov edi, 42; mov eax, 60 (exit); syscall
        let code = [0xbf, 42, 0, 0, 0, 0xb8, 60, 0, 0, 0, 0x0f, 0x05];
        std::fs::write(&program, elf(0x40_0078, &code)).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(Command::new(&program).status().unwrap().code(), Some(42));
    }
}
