//! A fault in QEMU's emulation of AMD's virtualisation, and a patch of it in the program as unpacked.
//!
//! `helper_vmrun` (`target/i386/tcg/system/svm_helper.c`) delivers an external interrupt that a host injects into its guest at
//! once, and also notes its vector as an exception that is yet to be delivered. Nothing takes the note back before the guest's
//! next exit. Where QEMU's thread is told to leave its loop meanwhile, it finds the note and delivers the interrupt once more,
//! whether the guest has interrupts enabled or not: at the entry of a system call, say, with the program's registers still in
//! place. So it is in the code of 11.1.3.

use std::{fs, path::Path};

use anyhow::{Context, Result, bail};

/// The instructions that note the exception, and those after them, by which they are told from all others: the vector as
/// `exception_index`, 0 as `exception_is_int` and -1 as `exception_next_eip`, each at some place from `%rbx`.
const NOTE: [Option<u8>; 27] = {
    let mut code = [None; 27];
    // mov %esi, DISP(%rbx)
    (code[0], code[1]) = (Some(0x89), Some(0xb3));
    // movl $0, DISP(%rbx)
    (code[6], code[7]) = (Some(0xc7), Some(0x83));
    (code[12], code[13], code[14], code[15]) = (Some(0), Some(0), Some(0), Some(0));
    // movq $-1, DISP(%rbx)
    (code[16], code[17], code[18]) = (Some(0x48), Some(0xc7), Some(0x83));
    (code[23], code[24], code[25], code[26]) = (Some(0xff), Some(0xff), Some(0xff), Some(0xff));
    code
};

/// What takes the first one's place: one that does nothing (AMD64 Architecture Programmer's Manual, volume 3, `NOP`).
pub(super) const PATCH: [u8; 6] = [0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00];

/// Keeps this QEMU from noting the exception. Where the code is not found exactly once it is another QEMU, which must be looked
/// at first.
pub(super) fn apply(qemu: &Path) -> Result<()> {
    let mut program = fs::read(qemu).with_context(|| format!("read {}", qemu.display()))?;
    patch(&mut program)?;
    fs::write(qemu, program).with_context(|| format!("write {}", qemu.display()))
}

fn patch(program: &mut [u8]) -> Result<()> {
    let windows = program.windows(NOTE.len()).enumerate();
    let found: Vec<_> = windows.filter(|(_, code)| is_note(code)).map(|(at, _)| at).collect();
    let [at] = found[..] else {
        let times = found.len();
        bail!("expected the injection of interrupts once in QEMU's code, found it {times} times");
    };
    for (byte, instead) in program.iter_mut().skip(at).zip(PATCH) {
        *byte = instead;
    }
    Ok(())
}

fn is_note(code: &[u8]) -> bool {
    code.iter()
        .zip(NOTE)
        .all(|(byte, wanted)| wanted.is_none_or(|wanted| wanted == *byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As in QEMU 11.1.3, between other instructions.
    const CODE: [u8; 35] = [
        0x45, 0x89, 0xab, 0x80, 0x89, 0xb3, 0x50, 0xc2, 0xff, 0xff, 0xc7, 0x83, 0x84, 0x34, 0x00, 0x00, 0x00, 0x00,
        0x00, 0x00, 0x48, 0xc7, 0x83, 0x88, 0x34, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0xf6, 0x05, 0xdc, 0x5d,
    ];

    #[test]
    fn the_note_is_taken_out_and_nothing_else() {
        let mut program = CODE;
        patch(&mut program).unwrap();
        assert_eq!(program[4..10], PATCH);
        assert_eq!((&program[..4], &program[10..]), (&CODE[..4], &CODE[10..]));
    }

    #[test]
    fn another_program_is_left_as_it_is() {
        let mut patched = CODE;
        patch(&mut patched).unwrap();
        let error = patch(&mut patched.clone()).unwrap_err().to_string();
        assert!(error.contains("found it 0 times"), "{error}");
        let mut twice = [CODE, CODE].concat();
        assert!(patch(&mut twice).is_err());
        assert_eq!(twice, [CODE, CODE].concat());
    }
}
