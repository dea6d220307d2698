//! Packs a folder as a zip.

use std::fs::File;
use std::io::{self, BufReader, Seek, Write};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use zip::result::ZipError;
use zip::write::{FullFileOptions, SimpleFileOptions};
use zip::{CompressionMethod, DateTime, ZipWriter};

/// Why a folder could not be packed.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// Something in it could not be read, or its content not be written.
    #[error("can't pack {}: {source}", path.display())]
    Copy {
        /// What.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A name, or a link's target, that a zip can't hold.
    #[error("{}: its name, or the target of the link, is not UTF-8", .0.display())]
    Name(PathBuf),
    /// A device, pipe or socket.
    #[error("{} is neither a file nor a folder nor a link", .0.display())]
    Special(PathBuf),
    /// The zip could not be written.
    #[error("can't write the zip: {0}")]
    Write(#[source] ZipError),
}

/// Writes a zip of everything below a folder but `.git`; links stay links, and files have their modes and times. The same
/// folder gives the same bytes. Blocks.
///
/// # Errors
///
/// [`PackError`].
pub fn pack<W: Write + Seek>(folder: &Path, to: W) -> Result<W, PackError> {
    let mut zip = ZipWriter::new(to);
    add(&mut zip, folder, "")?;
    zip.finish().map_err(PackError::Write)
}

fn add<W: Write + Seek>(zip: &mut ZipWriter<W>, folder: &Path, prefix: &str) -> Result<(), PackError> {
    let mut entries = std::fs::read_dir(folder)
        .and_then(Iterator::collect::<io::Result<Vec<_>>>)
        .map_err(failed(folder))?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        let file_name = entry.file_name();
        let name = file_name.to_str().ok_or_else(|| PackError::Name(path.clone()))?;
        let name = format!("{prefix}{name}");
        // Of the link, not of what it leads to.
        let metadata = entry.metadata().map_err(failed(&path))?;
        let options = options(metadata.mode(), metadata.mtime()).map_err(PackError::Write)?;
        if metadata.is_dir() {
            if name != ".git" {
                zip.add_directory(&name, options).map_err(PackError::Write)?;
                add(zip, &path, &format!("{name}/"))?;
            }
        } else if metadata.is_symlink() {
            let target = std::fs::read_link(&path).map_err(failed(&path))?;
            let target = target.to_str().ok_or_else(|| PackError::Name(path.clone()))?;
            zip.add_symlink(&name, target, options).map_err(PackError::Write)?;
        } else if metadata.is_file() {
            let mut file = File::open(&path).map(BufReader::new).map_err(failed(&path))?;
            zip.start_file(&name, options).map_err(PackError::Write)?;
            io::copy(&mut file, zip).map_err(failed(&path))?;
        } else {
            return Err(PackError::Special(path));
        }
    }
    Ok(())
}

/// How an entry is written: with the permissions of `mode`, and the time in seconds since 1970 as far as a zip can say it.
fn options(mode: u32, modified: i64) -> Result<FullFileOptions<'static, 'static>, ZipError> {
    // From 1980 to 2107, in UTC, of even seconds.
    let date = chrono::DateTime::from_timestamp(modified, 0).and_then(|time| DateTime::try_from(time.naive_utc()).ok());
    let options = SimpleFileOptions::default()
        .compression_method(CompressionMethod::Deflated)
        .unix_permissions(mode & 0o777)
        .last_modified_time(date.unwrap_or_default())
        .into_full_options();
    // From 1970 to 2106, exactly.
    match u32::try_from(modified) {
        Ok(modified) => options.with_extended_timestamp(Some(modified), None, None),
        Err(_) => Ok(options),
    }
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> PackError {
    move |source| PackError::Copy {
        path: path.to_owned(),
        source,
    }
}
