//! The tables, and how an older file is brought up to date.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use rusqlite::{Connection, OptionalExtension as _};
use stoker_proto::v1;
use ulid::Ulid;

use super::{Fault, StoreError};

/// Brings the schema one version up.
type Migration = fn(&Connection) -> Result<(), Fault>;

/// `PRAGMA user_version` holds how many were applied. Only ever append.
const MIGRATIONS: [Migration; 4] = [
    |c| Ok(c.execute_batch(FIRST)?),
    |c| Ok(c.execute_batch(ORPHANS)?),
    |c| Ok(c.execute_batch(DECISIONS)?),
    requests_by_uid,
];

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

/// Opens the file, brings it up to date and reads the host's id.
pub(super) fn open(path: &Path) -> Result<(Connection, Ulid), StoreError> {
    let open = |source| StoreError::Open {
        path: path.to_owned(),
        source: Arc::new(source),
    };
    let mut connection = Connection::open(path).map_err(open)?;
    prepare(&connection).map_err(open)?;
    let known = u32::try_from(MIGRATIONS.len()).unwrap_or(u32::MAX);
    let found: u32 = connection
        .pragma_query_value(None, "user_version", |row| row.get(0))
        .map_err(open)?;
    if found > known {
        return Err(StoreError::Newer {
            path: path.to_owned(),
            found,
            known,
        });
    }
    migrate(&mut connection, found).map_err(|fault| fault.during("bring its tables up to date"))?;
    let host = host(&connection).map_err(open)?;
    let host = host.parse().map_err(|error| StoreError::Corrupt {
        operation: "read the host's id",
        detail: format!("{host:?}: {error}"),
    })?;
    Ok((connection, host))
}

fn prepare(connection: &Connection) -> rusqlite::Result<()> {
    connection.busy_timeout(Duration::from_secs(5))?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    // An acknowledged call survives a loss of power.
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", "ON")?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(())
}

/// All or nothing.
fn migrate(connection: &mut Connection, applied: u32) -> Result<(), Fault> {
    let transaction = connection.transaction()?;
    for (version, migration) in (1u32..).zip(MIGRATIONS) {
        if version > applied {
            migration(&transaction)?;
            transaction.pragma_update(None, "user_version", version)?;
        }
    }
    Ok(transaction.commit()?)
}

fn host(connection: &Connection) -> rusqlite::Result<String> {
    let found = connection
        .query_row("SELECT value FROM meta WHERE key = 'host'", [], |row| row.get(0))
        .optional()?;
    if let Some(host) = found {
        return Ok(host);
    }
    let host = Ulid::generate().to_string();
    connection.execute("INSERT INTO meta VALUES ('host', ?1)", [&host])?;
    Ok(host)
}

#[cfg(test)]
mod tests {
    use super::super::Store;
    use super::*;

    /// A database as an earlier schema had it.
    fn earlier(folder: &Path, version: u32, more: impl FnOnce(&Connection)) {
        let connection = Connection::open(folder.join("state.db")).unwrap();
        prepare(&connection).unwrap();
        for migration in MIGRATIONS.iter().take(version as usize) {
            migration(&connection).unwrap();
        }
        connection.pragma_update(None, "user_version", version).unwrap();
        more(&connection);
    }

    #[tokio::test]
    async fn request_ids_stay_known_over_an_upgrade() {
        let dir = tempfile::tempdir().unwrap();
        let uid = Ulid::generate().to_string();
        earlier(dir.path(), 3, |c| {
            let answer = v1::Function {
                uid: uid.clone(),
                ..Default::default()
            };
            c.execute(
                "INSERT INTO requests VALUES ('acme', 'r1', 'f', ?1, 7)",
                [answer.encode_to_vec()],
            )
            .unwrap();
        });
        let store = Store::open(dir.path()).unwrap();
        assert!(store.request_is_known("acme".into(), "r1".into()).await.unwrap());
        let connection = Connection::open(dir.path().join("state.db")).unwrap();
        let kept: String = connection
            .query_row("SELECT uid FROM requests", [], |row| row.get(0))
            .unwrap();
        assert_eq!(kept, uid);
    }
}
