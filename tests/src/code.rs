//! Program code for tests.

use std::io::{Cursor, Write as _};

use anyhow::Context as _;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

/// The code of the example `echo`, which lies beside the example that asks for it.
///
/// # Errors
///
/// Where it is not there.
pub fn echo() -> anyhow::Result<Vec<u8>> {
    let me = std::env::current_exe().context("find this program")?;
    let program = me.with_file_name("echo");
    let program = std::fs::read(&program).with_context(|| format!("read {}", program.display()))?;
    zip(&[("bootstrap", 0o755, &program)])
}

/// A zip of these files, each with its mode.
///
/// # Errors
///
/// Where a name can't stand in a zip.
pub fn zip(files: &[(&str, u32, &[u8])]) -> anyhow::Result<Vec<u8>> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, mode, content) in files {
        let options = SimpleFileOptions::default()
            .compression_method(CompressionMethod::Deflated)
            .unix_permissions(*mode);
        zip.start_file(*name, options)
            .with_context(|| format!("adding {name}"))?;
        zip.write_all(content)?;
    }
    Ok(zip.finish()?.into_inner())
}

/// A Python function: `app.py` with this text.
///
/// # Errors
///
/// As [`zip`].
pub fn python(text: &str) -> anyhow::Result<Vec<u8>> {
    zip(&[("app.py", 0o644, text.as_bytes())])
}

/// A Python function that answers with what it was given and where it ran.
pub const ECHO: &str = r#"
import os
calls = 0

def handler(event, context):
    global calls
    calls += 1
    print("echo of", context.aws_request_id)
    return {"event": event, "calls": calls, "pid": os.getpid(), "memory": context.memory_limit_in_mb}
"#;

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
