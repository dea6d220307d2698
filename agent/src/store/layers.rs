//! The layers of functions, and all code that functions need: their own zips and their layers.

use std::collections::BTreeMap;

use rusqlite::Connection;

use super::functions::{integer, natural};
use super::{Fault, Layer, Store, StoreError, schema};

/// Since schema [`schema::LAYERS`]: settings of a version, its layers, and `codes`, all code that any version needs.
pub(super) const TABLES: &str = "
    ALTER TABLE versions ADD COLUMN freeze INTEGER NOT NULL DEFAULT 1;
    ALTER TABLE versions ADD COLUMN ephemeral_storage_mib INTEGER NOT NULL DEFAULT 512;

    CREATE TABLE layers (
        uid TEXT NOT NULL,
        version INTEGER NOT NULL,
        -- From 0, the last lies on top.
        position INTEGER NOT NULL,
        code_sha256 TEXT NOT NULL,
        code_size INTEGER NOT NULL,
        PRIMARY KEY (uid, version, position),
        FOREIGN KEY (uid, version) REFERENCES versions (uid, version) ON DELETE CASCADE
    ) STRICT;
    CREATE INDEX layers_by_code ON layers (code_sha256);

    CREATE VIEW codes AS
        SELECT uid, code_sha256, code_size FROM versions
        UNION ALL
        SELECT uid, code_sha256, code_size FROM layers;
";

/// Since the schema after that: what the zips of a version take when they are unpacked, in bytes.
pub(super) const UNPACKED: &str = "ALTER TABLE versions ADD COLUMN unpacked_bytes INTEGER";

/// Whether any function needs a zip of this hash.
pub(super) const IN_USE: &str = "SELECT 1 FROM codes WHERE code_sha256 = ?1";

pub(super) fn insert(c: &Connection, uid: &str, version: i64, layers: &[Layer]) -> Result<(), Fault> {
    let mut insert = c.prepare_cached(
        "INSERT INTO layers (uid, version, position, code_sha256, code_size) VALUES (?1, ?2, ?3, ?4, ?5)",
    )?;
    for (position, layer) in (0..).zip(layers) {
        let position: i64 = position;
        insert.execute((uid, version, position, &layer.code_sha256, integer(layer.code_size)?))?;
    }
    Ok(())
}

/// The layers of a version.
pub(super) fn read(c: &Connection, uid: &str, version: i64) -> rusqlite::Result<Vec<Layer>> {
    let mut layers = c.prepare_cached(
        "SELECT code_sha256, code_size FROM layers WHERE uid = ?1 AND version = ?2 ORDER BY position",
    )?;
    let rows = layers.query_map((uid, version), |row| {
        Ok(Layer {
            code_sha256: row.get(0)?,
            code_size: natural(row.get(1)?),
        })
    })?;
    rows.collect()
}

/// Hashes and sizes in bytes of all code that functions need, in a file of this schema.
pub(super) fn needed(c: &Connection, schema: u32) -> rusqlite::Result<BTreeMap<String, u64>> {
    let from = if schema >= schema::LAYERS { "codes" } else { "versions" };
    let mut statement = c.prepare(&format!("SELECT DISTINCT code_sha256, code_size FROM {from}"))?;
    let rows = statement.query_map([], |row| Ok((row.get(0)?, natural(row.get(1)?))))?;
    rows.collect()
}

impl Store {
    /// Whether some version needs this code, as its own or as a layer.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where the database fails.
    pub async fn code_in_use(&self, sha256: String) -> Result<bool, StoreError> {
        self.call("look up code", move |c| {
            Ok(c.prepare_cached(IN_USE)?.exists([sha256])?)
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::super::tests::record;
    use super::super::{Created, FunctionRecord, NewFunction, earlier};
    use super::*;

    fn layer(digit: char) -> Layer {
        Layer {
            code_sha256: digit.to_string().repeat(64),
            code_size: 7,
        }
    }

    fn new(id: &str, layers: &[Layer]) -> NewFunction {
        NewFunction {
            record: FunctionRecord {
                layers: layers.to_vec(),
                freeze: false,
                ephemeral_storage_mib: 10_240,
                ..record(&format!("accounts/acme/functions/{id}"))
            },
            request_id: Some(format!("request-{id}")),
            limit: 100,
            may_create: Ok(()),
        }
    }

    #[tokio::test]
    async fn layers_come_back_in_their_order_and_go_with_the_last_function_that_needs_them() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        // One of them twice, and the other is below the first.
        let one = new("one", &[layer('b'), layer('a'), layer('b')]);
        let two = new("two", &[layer('a')]);
        for new in [&one, &two] {
            assert_eq!(store.create_function(new.clone()).await.unwrap(), Created::New);
        }
        drop(store);
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(
            store.functions().await.unwrap(),
            [one.record.clone(), two.record.clone()]
        );
        let codes = store.snapshot().await.unwrap().codes;
        let own = (one.record.code_sha256.clone(), one.record.code_size);
        let needed = ['a', 'b'].map(|digit| (layer(digit).code_sha256, 7));
        assert_eq!(codes, needed.into_iter().chain([own]).collect());

        // None of them is an orphan.
        let orphans = store.update_orphans(codes, SystemTime::now()).await.unwrap();
        assert_eq!(orphans, []);
        let deleted = store.delete_function(one.record.name).await.unwrap().unwrap();
        assert_eq!(deleted.codes.len(), 3);
        let in_use = async |digit| store.code_in_use(layer(digit).code_sha256).await.unwrap();
        assert!(in_use('a').await && !in_use('b').await);
        store.delete_function(two.record.name).await.unwrap();
        assert!(!in_use('a').await);
    }

    #[tokio::test]
    async fn a_retry_asks_for_the_same_layers_in_the_same_order() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let first = new("one", &[layer('a'), layer('b')]);
        store.create_function(first.clone()).await.unwrap();
        let again = store.create_function(first.clone()).await.unwrap();
        assert_eq!(again, Created::Replayed(Box::new(first.record.clone())));
        let other = |change: fn(&mut FunctionRecord)| {
            let mut other = first.clone();
            change(&mut other.record);
            other
        };
        for other in [
            other(|record| record.layers.reverse()),
            other(|record| drop(record.layers.pop())),
            other(|record| record.freeze = true),
            other(|record| record.ephemeral_storage_mib = 512),
        ] {
            assert_eq!(store.create_function(other).await.unwrap(), Created::RequestReused);
        }
    }

    #[tokio::test]
    async fn what_functions_of_schema_7_unpack_to_is_not_known() {
        let dir = tempfile::tempdir().unwrap();
        let layered = || FunctionRecord {
            layers: vec![layer('a')],
            ephemeral_storage_mib: 700,
            unpacked_bytes: None,
            ..record("accounts/acme/functions/old")
        };
        let uid = ulid::Ulid::generate().to_string();
        earlier(dir.path(), schema::LAYERS, |c| {
            c.execute("INSERT INTO functions VALUES (?1, 'acme', 'old', 1)", [&uid])
                .unwrap();
            let insert = "INSERT INTO versions (uid, version, runtime, handler, timeout_ms, cpu_millis, memory_mib,
                    code_sha256, code_size, create_time_ms, ephemeral_storage_mib)
                VALUES (?1, 1, 'python3.11', 'app.handler', 3000, 250, 128, ?2, 1234, 1700000000123, 700)";
            c.execute(insert, [&uid, &"ab".repeat(32)]).unwrap();
            super::insert(c, &uid, 1, &[layer('a')]).unwrap();
        });
        let store = Store::open(dir.path()).unwrap();
        assert!(dir.path().join("state.db.v7.bak").exists());
        let old = FunctionRecord {
            uid: uid.parse().unwrap(),
            ..layered()
        };
        assert_eq!(store.functions().await.unwrap(), std::slice::from_ref(&old));
        // One that asks again for what was made then is told of that.
        let known = FunctionRecord {
            unpacked_bytes: Some(1),
            ..old.clone()
        };
        assert!(old.is_what_was_asked(&known));
        let new = new("new", &[]);
        store.create_function(new.clone()).await.unwrap();
        let all = store.functions().await.unwrap();
        assert_eq!(
            all.iter().map(|record| record.unpacked_bytes).collect::<Vec<_>>(),
            [None, Some(5678)]
        );
    }

    #[tokio::test]
    async fn functions_of_an_earlier_schema_have_no_layers_and_are_as_they_were() {
        let dir = tempfile::tempdir().unwrap();
        let (uid, code) = (ulid::Ulid::generate().to_string(), "ab".repeat(32));
        earlier(dir.path(), schema::LAYERS - 1, |c| {
            c.execute("INSERT INTO functions VALUES (?1, 'acme', 'old', 1)", [&uid])
                .unwrap();
            let insert = "INSERT INTO versions (uid, version, runtime, handler, timeout_ms, cpu_millis, memory_mib,
                    code_sha256, code_size, create_time_ms)
                VALUES (?1, 1, 'python3.11', 'app.handler', 3000, 250, 128, ?2, 1234, 1700000000123)";
            c.execute(insert, [&uid, &code]).unwrap();
            // As an archive has it that an earlier agent made.
            assert_eq!(needed(c, schema::LAYERS - 1).unwrap(), [(code.clone(), 1234)].into());
        });
        let store = Store::open(dir.path()).unwrap();
        let old = FunctionRecord {
            uid: uid.parse().unwrap(),
            unpacked_bytes: None,
            ..record("accounts/acme/functions/old")
        };
        // As if it unpacked to the most that there may be: 250 MiB in 20,000 files.
        assert_eq!(old.scratch_mib(), ((512 + 329) * 65_u32).div_ceil(64) + 1);
        assert_eq!(store.functions().await.unwrap(), [old]);
        assert!(store.code_in_use(code).await.unwrap());
    }
}
