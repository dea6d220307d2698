//! Two faults in QEMU's emulation, and patches of them in the program as unpacked. Both are in the code of 11.1.3.
//!
//! A lab whose QEMU is not patched loses guests and itself within minutes of load: interrupts are delivered where they are
//! disabled, and memory is read and written by the wrong page tables.

use std::{fs, path::Path};

use anyhow::{Context, Result, bail};

/// Instructions of QEMU's that must not run.
#[derive(Debug)]
pub(super) struct Patch {
    /// What they do, for who reads that they were not found.
    does: &'static str,
    /// They, and those after them by which they are told from all others, as hexadecimal bytes; `..` is any byte.
    code: &'static str,
    /// What takes the place of the first bytes: an instruction that does nothing (AMD64 Architecture Programmer's Manual,
    /// volume 3, `NOP`).
    instead: &'static [u8],
}

pub(super) const PATCHES: [Patch; 2] = [
    // `helper_vmrun` (`target/i386/tcg/system/svm_helper.c`) delivers an external interrupt that a host injects into its guest
    // at once, and also notes its vector as an exception that is yet to be delivered. Nothing takes the note back before the
    // guest's next exit. Where QEMU's thread is told to leave its loop meanwhile, it finds the note and delivers the interrupt
    // once more, whether the guest has interrupts enabled or not.
    Patch {
        does: "helper_vmrun's note of an injected interrupt",
        // mov %esi, exception_index(%rbx); movl $0, exception_is_int(%rbx); movq $-1, exception_next_eip(%rbx)
        code: "89 b3 .. .. .. .. c7 83 .. .. .. .. 00 00 00 00 48 c7 83 .. .. .. .. ff ff ff ff",
        instead: &[0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00],
    },
    // `cpu_clear_ignne` (`target/i386/tcg/system/fpu_helper.c`), which every restoring of the FPU's state calls on any CPU,
    // clears a bit in the flags of the first CPU, and takes no lock. So it can put back what these flags were a moment before
    // the first CPU entered or left a guest: the host is interrupted before it has its own GS again, or reads by the guest's
    // page tables; a guest reads and writes without the nested ones, that is in the host's own memory. The bit is for FPU errors
    // as MS-DOS took them (`CR0.NE` clear), which nothing in the lab does, so it is never set.
    Patch {
        does: "cpu_clear_ignne's change of another CPU's flags",
        // andl $0xffffff7f, hflags2(%rax)
        code: "81 a0 .. .. .. .. 7f ff ff ff",
        instead: &[0x66, 0x2e, 0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
    },
];

/// Patches this QEMU. Where some code is not found exactly once it is another QEMU, which must be looked at first.
pub(super) fn apply(qemu: &Path) -> Result<()> {
    let mut program = fs::read(qemu).with_context(|| format!("read {}", qemu.display()))?;
    for it in &PATCHES {
        patch(&mut program, it)?;
    }
    fs::write(qemu, program).with_context(|| format!("write {}", qemu.display()))
}

fn patch(program: &mut [u8], patch: &Patch) -> Result<()> {
    let code: Vec<Option<u8>> = patch
        .code
        .split(' ')
        .map(|byte| u8::from_str_radix(byte, 16).ok())
        .collect();
    let same = |bytes: &[u8]| {
        bytes
            .iter()
            .zip(&code)
            .all(|(byte, wanted)| wanted.is_none_or(|wanted| wanted == *byte))
    };
    let windows = program.windows(code.len()).enumerate();
    let found: Vec<_> = windows.filter(|(_, bytes)| same(bytes)).map(|(at, _)| at).collect();
    let [at] = found[..] else {
        let (does, times) = (patch.does, found.len());
        bail!("expected {does} once in QEMU's code, found it {times} times");
    };
    for (byte, instead) in program.iter_mut().skip(at).zip(patch.instead) {
        *byte = *instead;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As in QEMU 11.1.3, between other instructions: what is patched, and where it starts.
    const NOTE: (&[u8], usize) = (
        &[
            0x45, 0x89, 0xab, 0x80, 0x89, 0xb3, 0x50, 0xc2, 0xff, 0xff, 0xc7, 0x83, 0x84, 0x34, 0x00, 0x00, 0x00, 0x00,
            0x00, 0x00, 0x48, 0xc7, 0x83, 0x88, 0x34, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0xf6, 0x05, 0xdc, 0x5d,
        ],
        4,
    );
    const CLEAR: (&[u8], usize) = (
        &[
            0xe8, 0x12, 0x30, 0x0c, 0x00, 0x81, 0xa0, 0xa4, 0x41, 0x00, 0x00, 0x7f, 0xff, 0xff, 0xff, 0x48, 0x83, 0xc4,
        ],
        5,
    );

    #[test]
    fn the_instruction_is_taken_out_and_nothing_else() {
        for (it, (code, at)) in PATCHES.iter().zip([NOTE, CLEAR]) {
            let mut program = code.to_vec();
            patch(&mut program, it).unwrap();
            let end = at + it.instead.len();
            assert_eq!(program[at..end], *it.instead);
            assert_eq!((&program[..at], &program[end..]), (&code[..at], &code[end..]));
        }
    }

    #[test]
    fn another_program_is_left_as_it_is() {
        for (it, (code, _)) in PATCHES.iter().zip([NOTE, CLEAR]) {
            let mut patched = code.to_vec();
            patch(&mut patched, it).unwrap();
            let error = patch(&mut patched.clone(), it).unwrap_err().to_string();
            assert!(error.contains("found it 0 times"), "{error}");
            let mut twice = [code, code].concat();
            assert!(patch(&mut twice, it).is_err());
            assert_eq!(twice, [code, code].concat());
        }
    }
}
