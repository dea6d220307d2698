//! The zip of a function.

use std::io::{Cursor, Write as _};

use zip::result::ZipResult;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

/// How a file in it is written: compressed, as most tools do it.
pub fn options() -> SimpleFileOptions {
    SimpleFileOptions::default().compression_method(CompressionMethod::Deflated)
}

/// A zip of these files, each with its mode.
///
/// # Errors
///
/// Where a name can't stand in a zip.
pub fn zip(files: &[(&str, u32, &[u8])]) -> ZipResult<Vec<u8>> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, mode, content) in files {
        zip.start_file(*name, options().unix_permissions(*mode))?;
        zip.write_all(content)?;
    }
    Ok(zip.finish()?.into_inner())
}
