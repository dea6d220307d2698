//! What can be wrong with a zip.

use std::io;
use std::path::PathBuf;

use zip::result::ZipError;

use crate::handler::HandlerError;
use crate::tree::PathError;

/// Why a zip was refused.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// It could not be read from disk.
    #[error("can't read the zip: {0}")]
    Io(#[source] io::Error),
    /// Not a zip, cut short, or damaged.
    #[error("the zip is damaged or not a zip: {0}")]
    Corrupt(#[source] ZipError),
    /// An entry's bytes are damaged.
    #[error("{name:?} in the zip is damaged: {source}")]
    CorruptEntry {
        /// The entry.
        name: String,
        /// What is wrong.
        source: io::Error,
    },
    /// An entry has more or fewer bytes than the zip's directory says.
    #[error("{name:?} in the zip has not the size that the zip says it has, {said} bytes")]
    WrongSize {
        /// The entry.
        name: String,
        /// Its size in bytes, as the directory has it.
        said: u64,
    },
    /// Nothing in it.
    #[error("the zip is empty")]
    Empty,
    /// More entries than the limit, with the folders that they only imply.
    #[error("the zip has more than {limit} files and folders")]
    TooManyEntries {
        /// The limit.
        limit: usize,
    },
    /// It unpacks to more than the limit.
    #[error("the zip unpacks to more than {} MiB", limit >> 20)]
    TooLarge {
        /// The limit in bytes.
        limit: u64,
    },
    /// A password would be needed.
    #[error("{name:?} in the zip is encrypted")]
    Encrypted {
        /// The entry.
        name: String,
    },
    /// Neither stored nor deflated.
    #[error("{name:?} in the zip is compressed by a method that is not supported ({method}); use deflate")]
    Method {
        /// The entry.
        name: String,
        /// The method that the zip names.
        method: String,
    },
    /// A device, pipe or socket.
    #[error("{name:?} in the zip is neither a file nor a folder nor a symbolic link")]
    Special {
        /// The entry.
        name: String,
    },
    /// Its name can't be a path, or its link leads nowhere or out.
    #[error("{name:?} in the zip {source}")]
    Path {
        /// The entry.
        name: String,
        /// What is wrong.
        source: PathError,
    },
    /// The runtime would not find what it starts.
    #[error(transparent)]
    Handler(#[from] HandlerError),
}

/// Why a zip could not be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The zip is at fault.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// Something could not be written.
    #[error("can't write {}: {source}", path.display())]
    Write {
        /// Its path below the folder that is unpacked into.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The path of the folder that is unpacked into is longer than [`MAX_FOLDER`](crate::MAX_FOLDER).
    #[error("the path of the folder {} is too long to unpack into it", .0.display())]
    Folder(PathBuf),
}

// === impl ArchiveError ===

impl ArchiveError {
    /// Whether the zip is too large, rather than wrong.
    pub fn is_size(&self) -> bool {
        matches!(self, Self::TooLarge { .. } | Self::TooManyEntries { .. })
    }

    /// The library's error; what failed below us is no fault of the zip.
    pub(crate) fn of_zip(error: ZipError) -> Self {
        match error {
            ZipError::Io(source) if is_of_the_disk(&source) => Self::Io(source),
            other => Self::Corrupt(other),
        }
    }

    /// A read of the entry `name` failed.
    pub(crate) fn of_entry(name: &str, source: io::Error) -> Self {
        if is_of_the_disk(&source) {
            return Self::Io(source);
        }
        Self::CorruptEntry {
            name: name.to_owned(),
            source,
        }
    }
}

/// A read that failed below us; ends that come too early and seeks to impossible places are the zip's fault.
fn is_of_the_disk(error: &io::Error) -> bool {
    error.raw_os_error().is_some() && error.kind() != io::ErrorKind::InvalidInput
}
