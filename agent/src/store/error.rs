//! What goes wrong with the database, and what to do about it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::ErrorCode;

use super::key::KeyError;
use crate::files::FileError;

/// What went wrong with the database. Nothing of the call that hears it was kept; what was acknowledged before is.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// SQLite failed.
    #[error("can't {operation}: the database {} {failure} ({source})", path.display())]
    Failed {
        /// The file.
        path: Arc<Path>,
        /// What was being done.
        operation: &'static str,
        /// What kind of failure it is.
        failure: Failure,
        /// The underlying error.
        source: Arc<rusqlite::Error>,
    },
    /// It was written by a later agent.
    #[error(
        "the database {} has schema {found}, and this stokerd ({}) knows none later than {known}: use stokerd {}, or restore \
         a backup of this one", path.display(), env!("CARGO_PKG_VERSION"), needed.as_deref().unwrap_or("of a later version")
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its schema.
        found: u32,
        /// The schema of this agent.
        known: u32,
        /// The version of the agent that brought it there, where it says so.
        needed: Option<String>,
    },
    /// Another program's database.
    #[error("{} is a database of another program: let store.path name a folder of stokerd's own", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// The key that values are encrypted with is not there, or is another one.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// Its folder or its file is not this user's alone.
    #[error(transparent)]
    File(#[from] FileError),
    /// Its folder, a copy of it or its thread could not be made.
    #[error("can't prepare the database {}: {source}", path.display())]
    Prepare {
        /// The file.
        path: PathBuf,
        /// The underlying error.
        source: Arc<std::io::Error>,
    },
    /// A row can't be what the agent wrote.
    #[error(
        "can't {operation}: the database {} holds what stokerd did not write: {detail}; restore a backup by `stoker admin \
         restore`", path.display()
    )]
    Corrupt {
        /// The file.
        path: Arc<Path>,
        /// What was being done.
        operation: &'static str,
        /// What is wrong.
        detail: String,
    },
    /// Its thread is gone.
    #[error("the database is closed")]
    Closed,
}

/// Why SQLite failed, by what is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// The file is not what SQLite wrote.
    Damaged,
    /// The file or its file system is read-only.
    ReadOnly,
    /// There is no room on its disk.
    Full,
    /// Another program holds it.
    Busy,
    /// Its disk or file system fails.
    Disk,
    /// It can't be opened or made.
    Unopenable,
    /// Anything else.
    Other,
}

// === impl StoreError ===

impl StoreError {
    /// Why SQLite failed, where it was SQLite.
    pub fn failure(&self) -> Option<Failure> {
        match self {
            Self::Failed { failure, .. } => Some(*failure),
            Self::Corrupt { .. } => Some(Failure::Damaged),
            _ => None,
        }
    }

    pub(super) fn failed(path: &Arc<Path>, operation: &'static str, source: impl Into<Arc<rusqlite::Error>>) -> Self {
        let source = source.into();
        Self::Failed {
            path: path.clone(),
            operation,
            failure: Failure::of(&source),
            source,
        }
    }
}

// === impl Failure ===

impl Failure {
    fn of(error: &rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => Self::Damaged,
            Some(ErrorCode::ReadOnly) => Self::ReadOnly,
            Some(ErrorCode::DiskFull) => Self::Full,
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => Self::Busy,
            Some(ErrorCode::SystemIoFailure) => Self::Disk,
            Some(ErrorCode::CannotOpen | ErrorCode::PermissionDenied) => Self::Unopenable,
            _ => Self::Other,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Damaged => {
                "is damaged: stop stokerd, keep a copy of the folder, see what `stoker admin check` finds, and restore a \
                 backup by `stoker admin restore`"
            }
            Self::ReadOnly => "can't be written: make the file and its file system writable, then restart stokerd",
            Self::Full => "can't grow: its disk is full; make room there, stokerd needs no restart",
            Self::Busy => "is held by another program: find that by `fuser` and end it, stokerd needs no restart",
            Self::Disk => "can't be read or written: its disk or file system fails; see the kernel's log (`dmesg`)",
            Self::Unopenable => "can't be opened: see that its folder is there and that stokerd may write in it",
            Self::Other => "failed",
        })
    }
}

// === Fault ===

/// What goes wrong inside a call, before it is known which.
#[derive(Debug)]
pub(super) enum Fault {
    Sql(Arc<rusqlite::Error>),
    Corrupt(String),
    Key(KeyError),
}

impl Fault {
    pub(super) fn sql(&self) -> Option<Arc<rusqlite::Error>> {
        match self {
            Self::Sql(source) => Some(source.clone()),
            Self::Corrupt(_) | Self::Key(_) => None,
        }
    }

    pub(super) fn during(self, path: &Arc<Path>, operation: &'static str) -> StoreError {
        match self {
            Self::Sql(source) => StoreError::failed(path, operation, source),
            Self::Corrupt(detail) => StoreError::Corrupt {
                path: path.clone(),
                operation,
                detail,
            },
            Self::Key(error) => error.into(),
        }
    }
}

impl From<KeyError> for Fault {
    fn from(error: KeyError) -> Self {
        Self::Key(error)
    }
}

impl From<rusqlite::Error> for Fault {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sql(Arc::new(error))
    }
}
