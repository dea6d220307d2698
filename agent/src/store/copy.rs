//! Copies of the database, and whether it is whole.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::Connection;
use tempfile::NamedTempFile;
use ulid::Ulid;

use super::{Snapshot, StoreError};
use crate::failpoints::{self, Failpoint};
use crate::files;

/// How the names of files begin that are copies on their way.
pub(crate) const UNFINISHED: &str = "copying-";

/// Checks the structure of all tables; of an index it is not checked that it fits its table.
pub(super) fn check(connection: &Connection, path: &Arc<Path>) -> Result<(), StoreError> {
    let failed = |source| StoreError::failed(path, "check it", source);
    let found: String = connection
        .query_row("PRAGMA quick_check(1)", [], |row| row.get(0))
        .map_err(failed)?;
    if found == "ok" {
        return Ok(());
    }
    let corrupt = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CORRUPT);
    Err(failed(rusqlite::Error::SqliteFailure(corrupt, Some(found))))
}

/// Copies the database, as it is now, to a file beside it that is gone when the handle is. Others may write meanwhile.
pub(super) fn make(connection: &Connection, path: &Arc<Path>) -> Result<NamedTempFile, StoreError> {
    let prepare = |source| prepare(path, source);
    let copy = tempfile::Builder::new()
        .prefix(UNFINISHED)
        .tempfile_in(folder(path))
        .map_err(prepare)?;
    let to = copy
        .path()
        .to_str()
        .ok_or_else(|| prepare(io::ErrorKind::InvalidFilename.into()))?;
    connection
        .execute("VACUUM INTO ?1", [to])
        .map_err(|source| StoreError::failed(path, "copy it", source))?;
    copy.as_file().sync_all().map_err(prepare)?;
    failpoints::reach(Failpoint::CopyMade);
    Ok(copy)
}

/// Keeps a copy of the database beside it, named by its schema.
pub(super) fn keep(connection: &Connection, path: &Arc<Path>, schema: u32) -> Result<PathBuf, StoreError> {
    let prepare = |source| prepare(path, source);
    let kept = self::kept(path, schema);
    let copy = make(connection, path)?;
    copy.persist(&kept).map_err(|error| prepare(error.error))?;
    files::sync_folder(path).map_err(prepare)?;
    Ok(kept)
}

/// Puts a copy in the place of a folder's database, which is kept beside it: answers with where. At any moment there is one of
/// the two, whole.
pub(crate) fn replace(into: &Path, copy: Snapshot) -> Result<Option<PathBuf>, StoreError> {
    let path: Arc<Path> = super::file(into).into();
    let kept = path.with_extension(format!("db.replaced-{}", Ulid::generate()));
    let replaced = path.exists();
    let put = || -> io::Result<()> {
        if replaced {
            // What is in the log of changes belongs to the old one. Where that is too damaged to take it, it is kept too.
            let folded = Connection::open(&path).and_then(|old| super::thread::empty_log(&old));
            if let Err(error) = folded {
                tracing::warn!(%error, "the replaced database is kept with its log of changes beside it");
            }
            for log in ["-wal", "-shm"] {
                match std::fs::rename(files::with_suffix(&path, log), files::with_suffix(&kept, log)) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
            }
            failpoints::reach(Failpoint::LogKept);
            std::fs::hard_link(&path, &kept)?;
            failpoints::reach(Failpoint::DatabaseKept);
        }
        copy.into_file().persist(&path).map_err(|error| error.error)?;
        failpoints::reach(Failpoint::DatabaseReplaced);
        files::sync_folder(&path)
    };
    put().map_err(|source| prepare(&path, source))?;
    Ok(replaced.then_some(kept))
}

/// Where a copy of that schema is kept.
pub(super) fn kept(path: &Path, schema: u32) -> PathBuf {
    path.with_extension(format!("db.v{schema}.bak"))
}

/// Removes copies that were not finished when an agent died.
pub(super) fn remove_unfinished(path: &Arc<Path>) -> Result<(), StoreError> {
    let remove = || -> io::Result<()> {
        for entry in std::fs::read_dir(folder(path))? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
                std::fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    };
    match remove() {
        // What can't be written is said of the database itself.
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => Ok(()),
        removed => removed.map_err(|source| prepare(path, source)),
    }
}

fn folder(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("."))
}

fn prepare(path: &Path, source: io::Error) -> StoreError {
    StoreError::Prepare {
        path: path.to_owned(),
        source: Arc::new(source),
    }
}
