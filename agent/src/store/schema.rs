//! The tables, and how an older file is brought up to date.

use std::path::Path;
use std::sync::Arc;

use prost::Message as _;
use rusqlite::{Connection, TransactionBehavior};
use stoker_proto::v1;
use ulid::Ulid;

use super::key::Key;
use super::{Fault, Keys, StoreError, accounts, copy, environment, layers, reports, resizing};
use crate::failpoints::{self, Failpoint};
use crate::files::FileError;

/// Brings the schema one version up.
type Migration = fn(&Connection, &Key) -> Result<(), Fault>;

/// `PRAGMA user_version` holds how many were applied. Only ever append.
const MIGRATIONS: [Migration; 10] = [
    |c, _| Ok(c.execute_batch(FIRST)?),
    |c, _| Ok(c.execute_batch(ORPHANS)?),
    |c, _| Ok(c.execute_batch(DECISIONS)?),
    |c, _| requests_by_uid(c),
    |c, _| {
        c.pragma_update(None, "application_id", APPLICATION_ID)?;
        Ok(c.execute_batch("INSERT INTO counters VALUES ('lost_decisions', 0)")?)
    },
    environment::encrypt,
    |c, _| Ok(c.execute_batch(layers::TABLES)?),
    |c, _| Ok(c.execute_batch(layers::UNPACKED)?),
    |c, _| Ok(c.execute_batch(resizing::TABLES)?),
    |c, _| Ok(c.execute_batch(accounts::TABLES)?),
];

/// The schema from which on values of environment variables are encrypted.
pub(super) const ENCRYPTED: u32 = 6;

/// The schema from which on functions have layers.
pub(super) const LAYERS: u32 = 7;

/// The newest schema.
pub(crate) const KNOWN: u32 = MIGRATIONS.len() as u32;

const FIRST: &str = "
    CREATE TABLE meta (
        key TEXT PRIMARY KEY,
        value TEXT NOT NULL
    ) STRICT;

    CREATE TABLE functions (
        uid TEXT PRIMARY KEY,
        account TEXT NOT NULL,
        function TEXT NOT NULL,
        -- The version that `$LATEST` names.
        latest INTEGER NOT NULL,
        UNIQUE (account, function)
    ) STRICT;

    -- Versions are immutable.
    CREATE TABLE versions (
        uid TEXT NOT NULL REFERENCES functions (uid) ON DELETE CASCADE,
        version INTEGER NOT NULL,
        runtime TEXT NOT NULL,
        handler TEXT NOT NULL,
        environment TEXT NOT NULL,
        timeout_ms INTEGER NOT NULL,
        cpu_millis INTEGER NOT NULL,
        memory_mib INTEGER NOT NULL,
        code_sha256 TEXT NOT NULL,
        code_size INTEGER NOT NULL,
        create_time_ms INTEGER NOT NULL,
        PRIMARY KEY (uid, version)
    ) STRICT;
    CREATE INDEX versions_by_code ON versions (code_sha256);

    -- What was answered to which request id, so that a retry gets the same answer.
    CREATE TABLE requests (
        account TEXT NOT NULL,
        request_id TEXT NOT NULL,
        fingerprint TEXT NOT NULL,
        response BLOB NOT NULL,
        create_time_ms INTEGER NOT NULL,
        PRIMARY KEY (account, request_id)
    ) STRICT;
    CREATE INDEX requests_by_time ON requests (create_time_ms);

    -- `record` is a stoker.v1.Machine.
    CREATE TABLE machines (
        name TEXT PRIMARY KEY,
        record BLOB NOT NULL
    ) STRICT;

    -- Unacknowledged reports. `event` is a stoker.v1.Event without its sequence; AUTOINCREMENT never gives one twice.
    CREATE TABLE reports (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        -- 0: lifecycle, 1: use samples.
        kind INTEGER NOT NULL,
        event BLOB NOT NULL
    ) STRICT;
    CREATE INDEX reports_by_kind ON reports (kind, sequence);

    CREATE TABLE counters (
        key TEXT PRIMARY KEY,
        value INTEGER NOT NULL
    ) STRICT;
    INSERT INTO counters VALUES ('report_bytes', 0), ('dropped_use', 0), ('dropped_lifecycle', 0);
    CREATE TRIGGER report_added AFTER INSERT ON reports BEGIN
        UPDATE counters SET value = value + length(NEW.event) WHERE key = 'report_bytes';
    END;
    CREATE TRIGGER report_removed AFTER DELETE ON reports BEGIN
        UPDATE counters SET value = value - length(OLD.event) WHERE key = 'report_bytes';
    END;
";

const ORPHANS: &str = "
    -- Code that is in the code store and that no version needs, and since when that is known.
    CREATE TABLE orphans (
        code_sha256 TEXT PRIMARY KEY,
        since_ms INTEGER NOT NULL
    ) STRICT;
";

/// Reports of decisions have kind 2.
const DECISIONS: &str = "
    INSERT INTO counters VALUES ('dropped_decisions', 0);

    -- What was decided, but routine. `decision` is a stoker.v1.Decision; the ids are ULIDs of what it is about.
    CREATE TABLE decisions (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        sequence INTEGER NOT NULL,
        machine TEXT,
        container TEXT,
        request TEXT,
        decision BLOB NOT NULL
    ) STRICT;
    CREATE INDEX decisions_by_sequence ON decisions (sequence);
    CREATE INDEX decisions_by_machine ON decisions (machine, sequence) WHERE machine IS NOT NULL;
    CREATE INDEX decisions_by_container ON decisions (container, sequence) WHERE container IS NOT NULL;
    CREATE INDEX decisions_by_request ON decisions (request, sequence) WHERE request IS NOT NULL;
";

/// A request id is kept with the function that it made, in place of a copy of the answer.
fn requests_by_uid(c: &Connection) -> Result<(), Fault> {
    c.execute_batch(
        "
    ALTER TABLE requests RENAME TO answers;
    DROP INDEX requests_by_time;
    -- Which function was made by which request id, so that a retry makes no second one. Outlives the function.
    CREATE TABLE requests (
        account TEXT NOT NULL,
        request_id TEXT NOT NULL,
        uid TEXT NOT NULL,
        create_time_ms INTEGER NOT NULL,
        PRIMARY KEY (account, request_id)
    ) STRICT;
    CREATE INDEX requests_by_time ON requests (create_time_ms);
",
    )?;
    let mut insert =
        c.prepare("INSERT INTO requests SELECT account, request_id, ?2, create_time_ms FROM answers WHERE rowid = ?1")?;
    let mut answers = c.prepare("SELECT rowid, response FROM answers")?;
    let mut rows = answers.query([])?;
    while let Some(row) = rows.next()? {
        let (id, answer): (i64, Vec<u8>) = (row.get(0)?, row.get(1)?);
        let function = v1::Function::decode(answer.as_slice())
            .map_err(|error| Fault::Corrupt(format!("an answer to a request id: {error}")))?;
        insert.execute((id, function.uid))?;
    }
    drop(rows);
    Ok(c.execute_batch("DROP TABLE answers")?)
}

/// Says of a file that it is a database of stokerd's: "Stok".
const APPLICATION_ID: i32 = 0x5374_6f6b;

/// A database that is ready for use.
pub(super) struct Opened {
    pub(super) connection: Connection,
    /// This host's id.
    pub(super) host: Ulid,
    /// How many decisions were lost so far.
    pub(super) lost: u64,
    pub(super) keys: Keys,
}

/// Opens the file, brings it up to date and reads the host's id.
pub(super) fn open(path: &Arc<Path>, key: &Path) -> Result<Opened, StoreError> {
    let failed = |source| StoreError::failed(path, "open it", source);
    copy::remove_unfinished(path)?;
    match crate::files::make_own_file(path) {
        // Said below, with what to do.
        Err(FileError::Prepare { .. }) | Ok(()) => {}
        Err(error) => return Err(error.into()),
    }
    let mut connection = Connection::open(path).map_err(failed)?;
    // SQLite opens what can't be written for reading, without a word.
    if connection.is_readonly("main").map_err(failed)? {
        let read_only = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_READONLY);
        return Err(failed(rusqlite::Error::SqliteFailure(read_only, None)));
    }
    let found = identify(&connection, path)?;
    prepare(&connection).map_err(failed)?;
    failpoints::reach(Failpoint::DatabaseMade);
    let keys = Keys::open(&connection, key, found >= ENCRYPTED);
    let keys = keys.map_err(|fault| fault.during(path, "look up its key"))?;
    if (1..KNOWN).contains(&found) {
        copy::check(&connection, path)?;
        let kept = copy::keep(&connection, path, found)?;
        failpoints::reach(Failpoint::CopyKept);
        tracing::info!(from = found, to = KNOWN, copy = %kept.display(), "bringing the database up to date");
    }
    let migrated = migrate(&mut connection, found, &keys);
    migrated.map_err(|fault| fault.during(path, "bring it up to date"))?;
    purge(&connection, path);
    host(&connection).map_err(failed)?;
    let host = host_of(&connection, path)?;
    let lost = reports::counter(&connection, "lost_decisions");
    let lost = lost.map_err(|fault| fault.during(path, "count lost decisions"))?;
    Ok(Opened {
        connection,
        host,
        lost: reports::sequence_of(lost),
        keys,
    })
}

/// The schema of the file, 0 where it is new; nothing is written.
pub(super) fn identify(connection: &Connection, path: &Arc<Path>) -> Result<u32, StoreError> {
    let failed = |source| StoreError::failed(path, "open it", source);
    let number = |name| connection.pragma_query_value(None, name, |row| row.get::<_, i32>(0));
    let application = number("application_id").map_err(failed)?;
    let found = number("user_version").map_err(failed)?;
    let tables = "SELECT count(*) FROM sqlite_schema";
    let tables: u32 = connection.query_row(tables, [], |row| row.get(0)).map_err(failed)?;
    // Before version 5 no id was written.
    let ours = match application {
        APPLICATION_ID => true,
        0 => (1..5).contains(&found) || (found == 0 && tables == 0),
        _ => false,
    };
    match u32::try_from(found) {
        Ok(found) if ours && found <= KNOWN => Ok(found),
        Ok(found) if ours => Err(StoreError::Newer {
            path: path.to_path_buf(),
            found,
            known: KNOWN,
            needed: connection
                .query_row("SELECT value FROM meta WHERE key = 'stokerd'", [], |row| row.get(0))
                .ok(),
        }),
        _ => Err(StoreError::Foreign {
            path: path.to_path_buf(),
        }),
    }
}

fn prepare(connection: &Connection) -> rusqlite::Result<()> {
    connection.busy_timeout(super::thread::PATIENCE)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    // An acknowledged call survives a loss of power.
    connection.pragma_update(None, "synchronous", "FULL")?;
    // 1 MiB, a quarter of what is usual: all of it is read when a killed agent starts again.
    connection.pragma_update(None, "wal_autocheckpoint", 256)?;
    connection.pragma_update(None, "foreign_keys", "ON")?;
    // What is deleted is overwritten.
    connection.pragma_update(None, "secure_delete", "ON")?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(())
}

/// All or nothing.
fn migrate(connection: &mut Connection, applied: u32, keys: &Keys) -> Result<(), Fault> {
    let Some(key) = keys.first() else { return Ok(()) };
    let another = |c: &Connection| Ok::<_, Fault>(environment::id(c)?.is_none_or(|id| id != key.id()));
    if applied == KNOWN && !another(connection)? {
        return Ok(());
    }
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    if applied < KNOWN {
        for (version, migration) in (1..).zip(MIGRATIONS) {
            if version > applied {
                migration(&transaction, &key)?;
                failpoints::reach(Failpoint::Migrated);
            }
        }
        transaction.pragma_update(None, "user_version", KNOWN)?;
        let set = "INSERT OR REPLACE INTO meta VALUES (?1, ?2)";
        // Whom an earlier agent is to name that finds this.
        transaction.execute(set, ["stokerd", env!("CARGO_PKG_VERSION")])?;
        if (1..ENCRYPTED).contains(&applied) {
            transaction.execute(set, ["purge", "plain text"])?;
        }
    }
    // No value needs another key, or it would be this one.
    environment::set_id(&transaction, &key)?;
    transaction.commit()?;
    failpoints::reach(Failpoint::MigrationCommitted);
    Ok(())
}

/// Writes the whole file anew where values were in it in plain text, so that none stays in an unused part of it.
fn purge(connection: &Connection, path: &Path) {
    let purge = || -> rusqlite::Result<()> {
        let due = connection
            .prepare("SELECT 1 FROM meta WHERE key = 'purge'")?
            .exists([])?;
        if due {
            connection.execute_batch("VACUUM")?;
            failpoints::reach(Failpoint::Vacuumed);
            super::thread::empty_log(connection)?;
            failpoints::reach(Failpoint::Purged);
            connection.execute("DELETE FROM meta WHERE key = 'purge'", [])?;
        }
        Ok(())
    };
    if let Err(error) = purge() {
        let problem =
            "values of environment variables may still be in the database in plain text; the next start tries again";
        tracing::warn!(%error, "{problem}");
    }
    for version in 1..ENCRYPTED {
        let copy = copy::kept(path, version);
        if copy.exists() {
            tracing::warn!(
                copy = %copy.display(),
                "this copy of the database, kept at an upgrade, has values of environment variables in plain text; remove it once \
                 the older stokerd is not needed any more"
            );
        }
    }
}

/// Makes the host's id, where there is none.
fn host(connection: &Connection) -> rusqlite::Result<()> {
    if !connection.prepare(HOST)?.exists([])? {
        let host = Ulid::generate().to_string();
        connection.execute("INSERT INTO meta VALUES ('host', ?1)", [&host])?;
        failpoints::reach(Failpoint::HostNamed);
    }
    Ok(())
}

const HOST: &str = "SELECT value FROM meta WHERE key = 'host'";

/// The host's id.
pub(super) fn host_of(connection: &Connection, path: &Arc<Path>) -> Result<Ulid, StoreError> {
    const OPERATION: &str = "read the host's id";
    let host = connection.query_row(HOST, [], |row| row.get::<_, String>(0));
    let host = host.map_err(|source| StoreError::failed(path, OPERATION, source))?;
    host.parse().map_err(|error| StoreError::Corrupt {
        path: path.clone(),
        operation: OPERATION,
        detail: format!("{host:?}: {error}"),
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::{Failure, Store};
    use super::*;

    /// Makes a database as an earlier schema had it.
    pub(crate) fn earlier(folder: &Path, version: u32, more: impl FnOnce(&Connection)) {
        let connection = Connection::open(folder.join("state.db")).unwrap();
        prepare(&connection).unwrap();
        for migration in MIGRATIONS.iter().take(version as usize) {
            migration(&connection, &Key::generate().unwrap()).unwrap();
        }
        connection.pragma_update(None, "user_version", version).unwrap();
        more(&connection);
    }

    fn text(folder: &Path, file: &str, query: &str) -> String {
        let connection = Connection::open(folder.join(file)).unwrap();
        connection.query_row(query, [], |row| row.get(0)).unwrap()
    }

    #[tokio::test]
    async fn an_earlier_one_is_brought_up_to_date_and_a_copy_of_it_kept() {
        let dir = tempfile::tempdir().unwrap();
        let uid = Ulid::generate().to_string();
        earlier(dir.path(), 3, |c| {
            let answer = v1::Function {
                uid: uid.clone(),
                ..Default::default()
            };
            let insert = "INSERT INTO requests VALUES ('acme', 'r1', 'f', ?1, 7)";
            c.execute(insert, [answer.encode_to_vec()]).unwrap();
        });
        let store = Store::open(dir.path()).unwrap();
        assert!(store.request_is_known("acme".into(), "r1".into()).await.unwrap());
        assert_eq!(text(dir.path(), "state.db", "SELECT uid FROM requests"), uid);
        let by = "SELECT value FROM meta WHERE key = 'stokerd'";
        assert_eq!(text(dir.path(), "state.db", by), env!("CARGO_PKG_VERSION"));
        let copy = Connection::open(dir.path().join("state.db.v3.bak")).unwrap();
        let version = copy.pragma_query_value(None, "user_version", |row| row.get::<_, u32>(0));
        assert_eq!(version.unwrap(), 3);
        assert_eq!(
            text(dir.path(), "state.db.v3.bak", "SELECT fingerprint FROM requests"),
            "f"
        );
    }

    #[test]
    fn one_that_can_not_be_brought_up_to_date_is_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        earlier(dir.path(), 3, |c| {
            let insert = "INSERT INTO requests VALUES ('acme', 'r1', 'f', ?1, 7)";
            c.execute(insert, [vec![0xff; 9]]).unwrap();
        });
        let error = Store::open(dir.path()).unwrap_err();
        assert!(matches!(error, StoreError::Corrupt { .. }), "{error}");
        assert_eq!(text(dir.path(), "state.db", "SELECT fingerprint FROM requests"), "f");
    }

    #[test]
    fn a_damaged_earlier_one_is_not_touched() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("state.db");
        earlier(dir.path(), 3, |_| {});
        let mut bytes = std::fs::read(&file).unwrap();
        bytes[3 * 4096..4 * 4096].fill(0x5a);
        std::fs::write(&file, &bytes).unwrap();
        let error = Store::open(dir.path()).unwrap_err();
        assert_eq!(error.failure(), Some(Failure::Damaged), "{error}");
        assert!(std::fs::read(&file).unwrap() == bytes);
    }

    #[test]
    fn a_later_one_is_refused_by_its_version() {
        let dir = tempfile::tempdir().unwrap();
        drop(Store::open(dir.path()).unwrap());
        let connection = Connection::open(dir.path().join("state.db")).unwrap();
        connection.pragma_update(None, "user_version", 99).unwrap();
        let written = "UPDATE meta SET value = '7.1.0' WHERE key = 'stokerd'";
        connection.execute(written, []).unwrap();
        drop(connection);
        let error = Store::open(dir.path()).unwrap_err();
        assert!(matches!(error, StoreError::Newer { found: 99, .. }), "{error}");
        let says = format!("schema 99, and this stokerd ({})", env!("CARGO_PKG_VERSION"));
        let error = error.to_string();
        assert!(error.contains(&says) && error.contains("use stokerd 7.1.0"), "{error}");
    }

    #[test]
    fn another_programs_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("state.db");
        Connection::open(&file)
            .unwrap()
            .execute_batch("CREATE TABLE theirs (x)")
            .unwrap();
        let error = Store::open(dir.path()).unwrap_err();
        assert!(matches!(error, StoreError::Foreign { .. }), "{error}");
        assert_eq!(text(dir.path(), "state.db", "SELECT name FROM sqlite_schema"), "theirs");
    }
}
