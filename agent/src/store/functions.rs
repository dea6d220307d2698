//! Functions, their versions, and the request ids that make creating one safe to retry.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use rusqlite::{Connection, OptionalExtension as _, Row, named_params};
use stoker_policy::TooManyFunctions;
use stoker_proto::v1;

use super::{Fault, FunctionRecord, Keys, Store, StoreError, from_millis, layers, millis, resizing};
use crate::names::FunctionName;

/// How long a request id is remembered.
const REQUEST_ID_LIFE: Duration = Duration::from_secs(24 * 3600);

/// A function to make.
#[derive(Debug, Clone)]
pub struct NewFunction {
    /// What it is to be.
    pub record: FunctionRecord,
    /// The caller's request id, where it gave one; scoped to the account.
    pub request_id: Option<String>,
    /// The most functions that there may be.
    pub limit: u32,
    /// Whether its account may have another.
    pub may_create: Result<(), TooManyFunctions>,
}

/// What a function leaves that was deleted.
#[derive(Debug, PartialEq, Eq)]
pub struct DeletedFunction {
    /// Its unique id.
    pub uid: String,
    /// SHA-256 of the code and the layers of each of its versions.
    pub codes: BTreeSet<String>,
}

/// What came of making a function.
#[derive(Debug, Clone, PartialEq)]
pub enum Created {
    /// It was made.
    New,
    /// The same request made this function before.
    Replayed(Box<FunctionRecord>),
    /// The request id was used for something else.
    RequestReused,
    /// The request id made a function that was deleted since.
    Deleted,
    /// There is a function of that name.
    NameTaken,
    /// There are as many functions as there may be.
    Full,
    /// Its account has as many as it may.
    AccountFull(TooManyFunctions),
}

const COLUMNS: &str = "f.account, f.function, f.uid, v.runtime, v.handler, v.timeout_ms, v.cpu_millis, v.memory_mib,
    v.version, v.code_sha256, v.code_size, v.create_time_ms, v.freeze, v.ephemeral_storage_mib, v.unpacked_bytes,
    f.resizing, a.kept
    FROM functions f JOIN versions v ON v.uid = f.uid LEFT JOIN amounts a ON a.uid = v.uid AND a.version = v.version";

impl Store {
    /// Makes a function with its first version, all or nothing.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where the database fails.
    pub async fn create_function(&self, new: NewFunction) -> Result<Created, StoreError> {
        let keys = self.keys.clone();
        self.call("create a function", move |c| create(c, &keys, &new)).await
    }

    /// Whether an account's request id was answered before.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where the database fails.
    pub async fn request_is_known(&self, account: String, id: String) -> Result<bool, StoreError> {
        self.call("look up a request id", move |c| {
            Ok(
                c.prepare_cached("SELECT 1 FROM requests WHERE account = ?1 AND request_id = ?2")?
                    .exists([account, id])?,
            )
        })
        .await
    }

    /// The latest version of every function.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where the database fails or a row is damaged.
    pub async fn functions(&self) -> Result<Vec<FunctionRecord>, StoreError> {
        let keys = self.keys.clone();
        self.call("list functions", move |c| {
            let mut statement = c.prepare(&format!("SELECT {COLUMNS} WHERE v.version = f.latest"))?;
            let rows = statement.query_map([], |row| Ok(record(c, &keys, row)))?;
            rows.map(|row| row?).collect()
        })
        .await
    }

    /// Deletes a function with all its versions, of which nothing stays in the file; `None` where there is no such function.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where the database fails.
    pub async fn delete_function(&self, name: FunctionName) -> Result<Option<DeletedFunction>, StoreError> {
        let purge = self.purge.clone();
        self.call("delete a function", move |c| {
            let uid: Option<String> = c
                .query_row(
                    "SELECT uid FROM functions WHERE account = ?1 AND function = ?2",
                    [name.account(), name.function()],
                    |row| row.get(0),
                )
                .optional()?;
            let Some(uid) = uid else { return Ok(None) };
            let mut statement = c.prepare("SELECT code_sha256 FROM codes WHERE uid = ?1")?;
            let codes = statement
                .query_map([&uid], |row| row.get(0))?
                .collect::<Result<_, _>>()?;
            c.execute("DELETE FROM functions WHERE uid = ?1", [&uid])?;
            // Its environment, though encrypted.
            purge.store(true, Ordering::Relaxed);
            Ok(Some(DeletedFunction { uid, codes }))
        })
        .await
    }
}

fn create(c: &Connection, keys: &Keys, new: &NewFunction) -> Result<Created, Fault> {
    let record = &new.record;
    if let Some(id) = &new.request_id
        && let Some(answered) = replay(c, keys, id, record)?
    {
        return Ok(answered);
    }
    let taken = c
        .prepare_cached("SELECT 1 FROM functions WHERE account = ?1 AND function = ?2")?
        .exists([record.name.account(), record.name.function()])?;
    if taken {
        return Ok(Created::NameTaken);
    }
    if let Err(why) = new.may_create {
        return Ok(Created::AccountFull(why));
    }
    let count: u32 = c.query_row("SELECT count(*) FROM functions", [], |row| row.get(0))?;
    if count >= new.limit {
        return Ok(Created::Full);
    }
    let uid = record.uid.to_string();
    let version = integer(record.version)?;
    let create_time = millis(record.create_time);
    c.execute(
        "INSERT INTO functions (uid, account, function, latest, resizing) VALUES (?1, ?2, ?3, ?4, ?5)",
        (
            &uid,
            record.name.account(),
            record.name.function(),
            version,
            record.resizing.as_ref().map(resizing::to_json).transpose()?,
        ),
    )?;
    c.execute(
        "INSERT INTO versions (uid, version, runtime, handler, timeout_ms, cpu_millis, memory_mib,
            code_sha256, code_size, create_time_ms, freeze, ephemeral_storage_mib, unpacked_bytes)
         VALUES (:uid, :version, :runtime, :handler, :timeout_ms, :cpu_millis, :memory_mib,
            :code_sha256, :code_size, :create_time_ms, :freeze, :ephemeral_storage_mib, :unpacked_bytes)",
        named_params! {
            ":uid": uid,
            ":version": version,
            ":runtime": record.runtime,
            ":handler": record.handler,
            ":timeout_ms": integer(u64::try_from(record.timeout.as_millis()).unwrap_or(u64::MAX))?,
            ":cpu_millis": record.amount.cpu_millis,
            ":memory_mib": record.amount.memory_mib,
            ":code_sha256": record.code_sha256,
            ":code_size": integer(record.code_size)?,
            ":create_time_ms": create_time,
            ":freeze": record.freeze,
            ":ephemeral_storage_mib": record.ephemeral_storage_mib,
            ":unpacked_bytes": record.unpacked_bytes.map(integer).transpose()?,
        },
    )?;
    keys.insert(c, &uid, version, &record.environment)?;
    layers::insert(c, &uid, version, &record.layers)?;
    for code in record.codes() {
        c.prepare_cached("DELETE FROM orphans WHERE code_sha256 = ?1")?
            .execute([code])?;
    }
    if let Some(id) = &new.request_id {
        let now = SystemTime::now();
        let forget = millis(now - REQUEST_ID_LIFE);
        c.execute("DELETE FROM requests WHERE create_time_ms < ?1", [forget])?;
        c.execute(
            "INSERT INTO requests (account, request_id, uid, create_time_ms) VALUES (?1, ?2, ?3, ?4)",
            (record.name.account(), id, &uid, millis(now)),
        )?;
    }
    Ok(Created::New)
}

/// What came of an earlier request of that id; `None` where there was none.
///
/// The answer is the function itself (AIP-155 lets a replay answer with what is there now). Where it was deleted since
/// nothing is there to answer with, and to make it again would let a retry that was long on its way undo the deletion: such
/// a request is refused.
fn replay(c: &Connection, keys: &Keys, id: &str, asked: &FunctionRecord) -> Result<Option<Created>, Fault> {
    let uid: Option<String> = c
        .prepare_cached("SELECT uid FROM requests WHERE account = ?1 AND request_id = ?2")?
        .query_row([asked.name.account(), id], |row| row.get(0))
        .optional()?;
    let Some(uid) = uid else { return Ok(None) };
    let made = c
        .prepare_cached(&format!("SELECT {COLUMNS} WHERE f.uid = ?1 AND v.version = 1"))?
        .query_row([uid], |row| Ok(record(c, keys, row)))
        .optional()?
        .transpose()?;
    Ok(Some(match made {
        None => Created::Deleted,
        Some(made) if made.is_what_was_asked(asked) => Created::Replayed(Box::new(made)),
        Some(_) => Created::RequestReused,
    }))
}

/// Reads a row of [`COLUMNS`].
fn record(c: &Connection, keys: &Keys, row: &Row<'_>) -> Result<FunctionRecord, Fault> {
    let (account, function): (String, String) = (row.get(0)?, row.get(1)?);
    let (uid, version): (String, i64) = (row.get(2)?, row.get(8)?);
    let corrupt =
        |error: &dyn std::fmt::Display| Fault::Corrupt(format!("accounts/{account}/functions/{function}: {error}"));
    Ok(FunctionRecord {
        name: FunctionName::new(&account, &function).map_err(|e| corrupt(&e))?,
        uid: uid.parse().map_err(|e| corrupt(&e))?,
        runtime: row.get(3)?,
        handler: row.get(4)?,
        environment: keys.read(c, &uid, version)?,
        layers: layers::read(c, &uid, version)?,
        timeout: Duration::from_millis(natural(row.get(5)?)),
        amount: v1::Amount {
            cpu_millis: row.get(6)?,
            memory_mib: row.get(7)?,
        },
        version: natural(version),
        code_sha256: row.get(9)?,
        code_size: natural(row.get(10)?),
        create_time: from_millis(row.get(11)?),
        freeze: row.get(12)?,
        ephemeral_storage_mib: row.get(13)?,
        unpacked_bytes: row.get::<_, Option<i64>>(14)?.map(natural),
        resizing: resizing::from_json(row.get(15)?).map_err(|e| corrupt(&e))?,
        kept: resizing::from_json(row.get(16)?).map_err(|e| corrupt(&e))?,
    })
}

/// SQLite's integers are signed.
pub(super) fn integer(value: u64) -> Result<i64, Fault> {
    i64::try_from(value).map_err(|_| Fault::Corrupt(format!("{value} is more than SQLite holds")))
}

pub(super) fn natural(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::super::tests::record;
    use super::*;

    fn function(account: &str, id: &str) -> FunctionRecord {
        FunctionRecord {
            environment: [("KEY".to_owned(), "välue".to_owned())].into(),
            timeout: Duration::from_millis(3500),
            ..record(&format!("accounts/{account}/functions/{id}"))
        }
    }

    fn new(record: &FunctionRecord) -> NewFunction {
        NewFunction {
            record: record.clone(),
            request_id: None,
            limit: 100,
            may_create: Ok(()),
        }
    }

    #[tokio::test]
    async fn a_function_comes_back_as_it_was_over_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let record = function("acme", "resize");
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(store.create_function(new(&record)).await.unwrap(), Created::New);
        drop(store);
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(store.functions().await.unwrap(), std::slice::from_ref(&record));
        assert!(store.code_in_use(record.code_sha256.clone()).await.unwrap());
        let deleted = store.delete_function(record.name.clone()).await.unwrap().unwrap();
        assert_eq!((deleted.uid, deleted.codes.len()), (record.uid.to_string(), 1));
        assert_eq!(store.functions().await.unwrap(), []);
        assert_eq!(store.delete_function(record.name).await.unwrap(), None);
        assert!(!store.code_in_use(record.code_sha256).await.unwrap());
    }

    #[tokio::test]
    async fn names_are_taken_once_and_numbers_are_limited() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        store.create_function(new(&function("acme", "a"))).await.unwrap();
        assert_eq!(
            store.create_function(new(&function("acme", "a"))).await.unwrap(),
            Created::NameTaken
        );
        let full = NewFunction {
            limit: 1,
            ..new(&function("acme", "b"))
        };
        assert_eq!(store.create_function(full).await.unwrap(), Created::Full);
        let why = TooManyFunctions { has: 1, limit: 1 };
        let full = NewFunction {
            may_create: Err(why),
            ..new(&function("acme", "b"))
        };
        assert_eq!(store.create_function(full).await.unwrap(), Created::AccountFull(why));
    }

    #[tokio::test]
    async fn a_retry_is_answered_with_what_the_first_made_and_refused_once_that_is_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let ask = |record: &FunctionRecord| NewFunction {
            request_id: Some("r1".into()),
            ..new(record)
        };
        let first = function("acme", "a");
        assert_eq!(store.create_function(ask(&first)).await.unwrap(), Created::New);
        let retry = ask(&function("acme", "a"));
        assert_eq!(
            store.create_function(retry.clone()).await.unwrap(),
            Created::Replayed(Box::new(first.clone()))
        );
        let other = FunctionRecord {
            environment: [("KEY".to_owned(), "other".to_owned())].into(),
            ..function("acme", "a")
        };
        for other in [&other, &function("acme", "b")] {
            assert_eq!(store.create_function(ask(other)).await.unwrap(), Created::RequestReused);
        }
        // Another account's ids are its own.
        assert_eq!(
            store.create_function(ask(&function("other", "b"))).await.unwrap(),
            Created::New
        );
        store.delete_function(first.name.clone()).await.unwrap();
        assert_eq!(store.create_function(retry.clone()).await.unwrap(), Created::Deleted);
        assert_eq!(store.functions().await.unwrap().len(), 1);
        // Also where another request made a function of that name since.
        store.create_function(new(&function("acme", "a"))).await.unwrap();
        assert_eq!(store.create_function(retry).await.unwrap(), Created::Deleted);
    }
}
