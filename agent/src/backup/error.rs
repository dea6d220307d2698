//! Why a backup is not made, restored or found right.

use std::io;
use std::path::PathBuf;

use crate::code::CodeError;
use crate::files::FileError;
use crate::lock::LockError;
use crate::store::{KeyError, StoreError};

/// Why a backup is not made or restored.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The archive can't be read or written, or is not whole.
    #[error("can't {operation} the archive: {source}")]
    Archive {
        /// What was being done.
        operation: &'static str,
        /// The underlying error.
        source: io::Error,
    },
    /// It is not what this agent reads.
    #[error("the archive can't be read: {0}")]
    NotAnArchive(String),
    /// It was made by a later agent.
    #[error(
        "the archive was made by stokerd {made_by}, whose database (schema {schema}) this one ({}) does not know: use that \
         version", env!("CARGO_PKG_VERSION")
    )]
    Newer {
        /// The version that made it.
        made_by: String,
        /// The schema of its database.
        schema: u32,
    },
    /// There is a database already.
    #[error("there is a database {} already; `--replace` puts it aside and the archive's in its place", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The key that its values need is neither there nor in the archive.
    #[error(
        "the archive's values of environment variables are encrypted with the key {id}, which is neither in the archive nor in \
         {} (store.key): put it there, or let store.key name it", path.display()
    )]
    Key {
        /// The key that is needed.
        id: String,
        /// Where it was looked for.
        path: PathBuf,
    },
    /// An agent uses the folders.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A folder is not this user's alone.
    #[error(transparent)]
    Folder(#[from] FileError),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The key.
    #[error(transparent)]
    KeyFile(#[from] KeyError),
    /// The code store.
    #[error(transparent)]
    Code(#[from] CodeError),
}

// === impl BackupError ===

impl BackupError {
    pub(super) fn archive(operation: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Archive { operation, source }
    }
}
