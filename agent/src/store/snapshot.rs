//! A copy of the whole database as it is at a moment, for a backup, and what is to be known of it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use rusqlite::{Connection, OpenFlags};
use tempfile::NamedTempFile;
use ulid::Ulid;

use super::{Fault, Keys, Store, StoreError, copy, environment, layers, schema};

/// A copy of the database; its file is gone when this is.
#[derive(Debug)]
pub struct Snapshot {
    file: NamedTempFile,
    /// The host's id.
    pub host: Ulid,
    /// The schema.
    pub schema: u32,
    /// SHA-256 and bytes of the code that its functions need.
    pub codes: BTreeMap<String, u64>,
    /// The id of the key that its values need; none where it has none.
    pub key: Option<String>,
}

// === impl Snapshot ===

impl Snapshot {
    pub(crate) fn path(&self) -> &Path {
        self.file.path()
    }

    pub(crate) fn into_file(self) -> NamedTempFile {
        self.file
    }

    /// Looks at a file that is to be the database of a host. Blocks.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where it is not a whole database, or one of a later agent.
    pub(crate) fn of(file: NamedTempFile) -> Result<Self, StoreError> {
        let path: Arc<Path> = file.path().into();
        let connection = read_only(&path)?;
        let schema = schema::identify(&connection, &path)?;
        copy::check(&connection, &path)?;
        let fault = |fault: Fault| fault.during(&path, "read it");
        let host = schema::host_of(&connection, &path)?;
        let key = match schema >= schema::ENCRYPTED {
            true => environment::needed(&connection).map_err(|error| fault(error.into()))?,
            false => None,
        };
        Ok(Self {
            host,
            schema,
            codes: layers::needed(&connection, schema).map_err(|error| fault(error.into()))?,
            key,
            file,
        })
    }
}

fn read_only(path: &Arc<Path>) -> Result<Connection, StoreError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    Connection::open_with_flags(path, flags).map_err(|source| StoreError::failed(path, "open it", source))
}

// === impl Store ===

impl Store {
    /// Copies the database as it is now, beside it, while it is used.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where it can't be copied, or the copy is damaged.
    pub async fn snapshot(&self) -> Result<Snapshot, StoreError> {
        let path = self.path.clone();
        let copying = tokio::task::spawn_blocking(move || {
            let connection = read_only(&path)?;
            Snapshot::of(copy::make(&connection, &path)?)
        });
        copying.await.map_err(|_| StoreError::Closed)?
    }

    /// The key that a snapshot's values need; `None` where they need none, or it was changed since.
    pub(crate) fn key_of(&self, snapshot: &Snapshot) -> Option<Vec<u8>> {
        snapshot.key.as_deref().and_then(|id| self.keys.bytes(id))
    }
}

/// Checks all of a database that is not in use, with the key in a file, and changes nothing: answers with what is wrong, and
/// with what code its functions need. Blocks.
///
/// # Errors
///
/// [`StoreError`] where it can't be read at all, or is of another program or a later agent.
pub(crate) fn check(folder: &Path, key: &Path) -> Result<(Vec<String>, BTreeMap<String, u64>), StoreError> {
    let path: Arc<Path> = super::file(folder).into();
    let connection = read_only(&path)?;
    let schema = schema::identify(&connection, &path)?;
    let failed = |source| StoreError::failed(&path, "check it", source);
    let mut problems = Vec::new();
    let mut pragma = |name: &str, of: fn(&rusqlite::Row<'_>) -> rusqlite::Result<String>| {
        let mut statement = connection.prepare(name)?;
        let found = statement.query_map([], of)?.collect::<Result<Vec<_>, _>>()?;
        problems.extend(found.into_iter().filter(|found| found != "ok"));
        Ok(())
    };
    pragma("PRAGMA integrity_check", |row| row.get(0)).map_err(failed)?;
    pragma("PRAGMA foreign_key_check", |row| {
        Ok(format!(
            "a row of {} names one that is not there",
            row.get::<_, String>(0)?
        ))
    })
    .map_err(failed)?;
    if schema >= schema::ENCRYPTED {
        let wrong = match Keys::look(&connection, key) {
            Ok(Some(key)) => environment::check(&connection, &key),
            Ok(None) => Ok(Vec::new()),
            Err(fault) => Err(fault),
        };
        match wrong {
            Ok(wrong) => problems.extend(wrong),
            Err(fault) => problems.push(fault.during(&path, "check its values").to_string()),
        }
    }
    Ok((problems, layers::needed(&connection, schema).map_err(failed)?))
}
