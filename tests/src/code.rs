//! Program code for tests.

use std::io::{Cursor, Write as _};

use anyhow::Context as _;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

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
