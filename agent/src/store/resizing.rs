//! How amounts of functions are fitted to their use: settings, what was determined and when, and what accounts were told of it.

use prost::Message as _;
use rusqlite::Connection;
use serde::de::DeserializeOwned;
use stoker_policy::{Kept, Resize};
use stoker_proto::v1;
use ulid::Ulid;

use super::functions::integer;
use super::{Fault, Store, StoreError};
use crate::names::FunctionName;

/// How many changes of a function are kept.
const RESIZES: i64 = 100;

/// How many notifications are kept.
const NOTIFICATIONS: i64 = 10_000;

/// The tables. All go with the function.
pub(super) const TABLES: &str = "
    -- How its amount is fitted to its use, as JSON; NULL where it is as its account has it.
    ALTER TABLE functions ADD COLUMN resizing TEXT;

    -- The amounts that were determined last, as JSON.
    CREATE TABLE amounts (
        uid TEXT NOT NULL REFERENCES functions (uid) ON DELETE CASCADE,
        version INTEGER NOT NULL,
        kept TEXT NOT NULL,
        PRIMARY KEY (uid, version)
    ) STRICT;

    -- All changes of amounts, each a stoker.v1.FunctionResize.
    CREATE TABLE resizes (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        uid TEXT NOT NULL REFERENCES functions (uid) ON DELETE CASCADE,
        resize BLOB NOT NULL
    ) STRICT;
    CREATE INDEX resizes_by_function ON resizes (uid, id);

    -- What accounts were told, each a stoker.v1.Notification, by the number of the decision.
    CREATE TABLE notifications (
        sequence INTEGER PRIMARY KEY,
        uid TEXT NOT NULL REFERENCES functions (uid) ON DELETE CASCADE,
        account TEXT NOT NULL,
        function TEXT NOT NULL,
        notification BLOB NOT NULL
    ) STRICT;
    CREATE INDEX notifications_by_uid ON notifications (uid);
";

/// A change of the amount of a function, to keep.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredResize {
    /// The function's unique id.
    pub uid: Ulid,
    /// What was determined, for decisions to come.
    pub kept: Kept,
    /// What it is shown as.
    pub resize: v1::FunctionResize,
}

/// What an account was told, to keep.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredNotification {
    /// The function's unique id.
    pub uid: Ulid,
    /// Its name.
    pub function: FunctionName,
    /// The number of the decision.
    pub sequence: u64,
    /// The whole of it.
    pub notification: v1::Notification,
}

/// Which notifications are looked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NotificationFilter {
    /// Those of one account.
    pub account: Option<String>,
    /// Those of one function of it.
    pub function: Option<String>,
}

impl Store {
    /// Sets how a function's amount is fitted to its use; says whether there is such a function.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where the database fails.
    pub async fn set_resizing(&self, uid: Ulid, settings: Option<Resize>) -> Result<bool, StoreError> {
        self.call("set how a function's amount is fitted", move |c| {
            let settings = settings.as_ref().map(to_json).transpose()?;
            let set = c.execute(
                "UPDATE functions SET resizing = ?2 WHERE uid = ?1",
                (uid.to_string(), settings),
            )?;
            Ok(set > 0)
        })
        .await
    }

    /// Keeps what was determined and what was told, in their order; what is about a function that is no more is left out.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where the database fails; none is kept then.
    pub async fn keep_resizes(
        &self,
        resizes: Vec<StoredResize>,
        notifications: Vec<StoredNotification>,
    ) -> Result<(), StoreError> {
        self.call("keep amounts of functions", move |c| {
            resizes.iter().try_for_each(|resized| keep_resize(c, resized))?;
            notifications.iter().try_for_each(|told| keep_notification(c, told))
        })
        .await
    }

    /// What was changed of a function's amount, the youngest first, each with its number: at most `limit` whose number is less than
    /// `before`.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where the database fails or a row is damaged.
    pub async fn resizes(
        &self,
        uid: Ulid,
        before: Option<u64>,
        limit: usize,
    ) -> Result<Vec<(u64, v1::FunctionResize)>, StoreError> {
        self.call("list changes of a function's amount", move |c| {
            let mut statement = c.prepare_cached(
                "SELECT id, resize FROM resizes WHERE uid = ?1 AND id < ?2 ORDER BY id DESC LIMIT ?3",
            )?;
            let rows = statement.query_map((uid.to_string(), number(before), most(limit)), |row| {
                Ok((row.get::<_, i64>(0)?, row.get::<_, Vec<u8>>(1)?))
            })?;
            rows.map(|row| decoded(row?, "a change of an amount")).collect()
        })
        .await
    }

    /// What accounts were told, the youngest first, each with its number: at most `limit` whose number is less than `before` and more
    /// than `after`.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where the database fails or a row is damaged.
    pub async fn notifications(
        &self,
        filter: NotificationFilter,
        after: u64,
        before: Option<u64>,
        limit: usize,
    ) -> Result<Vec<(u64, v1::Notification)>, StoreError> {
        self.call("list notifications", move |c| {
            let NotificationFilter { account, function } = filter;
            let mut statement = c.prepare_cached(
                "SELECT sequence, notification FROM notifications
                 WHERE sequence > ?1 AND sequence < ?2
                 AND (?3 IS NULL OR account = ?3) AND (?4 IS NULL OR function = ?4)
                 ORDER BY sequence DESC LIMIT ?5",
            )?;
            let after = i64::try_from(after).unwrap_or(i64::MAX);
            let rows = statement.query_map((after, number(before), account, function, most(limit)), |row| {
                Ok((row.get::<_, i64>(0)?, row.get::<_, Vec<u8>>(1)?))
            })?;
            rows.map(|row| decoded(row?, "a notification")).collect()
        })
        .await
    }
}

fn keep_resize(c: &Connection, resized: &StoredResize) -> Result<(), Fault> {
    let StoredResize { uid, kept, resize } = resized;
    let (uid, version) = (uid.to_string(), integer(resize.version)?);
    let is_there = c
        .prepare_cached("SELECT 1 FROM functions WHERE uid = ?1")?
        .exists([&uid])?;
    if !is_there {
        return Ok(());
    }
    c.prepare_cached("INSERT OR REPLACE INTO amounts (uid, version, kept) VALUES (?1, ?2, ?3)")?
        .execute((&uid, version, to_json(kept)?))?;
    c.prepare_cached("INSERT INTO resizes (uid, resize) VALUES (?1, ?2)")?
        .execute((&uid, resize.encode_to_vec()))?;
    c.prepare_cached(
        "DELETE FROM resizes WHERE uid = ?1
         AND id <= (SELECT id FROM resizes WHERE uid = ?1 ORDER BY id DESC LIMIT 1 OFFSET ?2)",
    )?
    .execute((&uid, RESIZES))?;
    Ok(())
}

fn keep_notification(c: &Connection, told: &StoredNotification) -> Result<(), Fault> {
    c.prepare_cached(
        "INSERT INTO notifications (sequence, uid, account, function, notification)
         SELECT ?1, uid, ?3, ?4, ?5 FROM functions WHERE uid = ?2",
    )?
    .execute((
        integer(told.sequence)?,
        told.uid.to_string(),
        told.function.account(),
        told.function.function(),
        told.notification.encode_to_vec(),
    ))?;
    c.prepare_cached(
        "DELETE FROM notifications
         WHERE sequence <= (SELECT sequence FROM notifications ORDER BY sequence DESC LIMIT 1 OFFSET ?1)",
    )?
    .execute([NOTIFICATIONS])?;
    Ok(())
}

/// A number before which all are, where there is none.
fn number(before: Option<u64>) -> i64 {
    before.and_then(|before| i64::try_from(before).ok()).unwrap_or(i64::MAX)
}

fn most(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}

fn decoded<T: prost::Message + Default>((id, bytes): (i64, Vec<u8>), what: &str) -> Result<(u64, T), Fault> {
    let message = T::decode(bytes.as_slice()).map_err(|error| Fault::Corrupt(format!("{what}: {error}")))?;
    Ok((u64::try_from(id).unwrap_or(0), message))
}

pub(super) fn to_json(value: &impl serde::Serialize) -> Result<String, Fault> {
    serde_json::to_string(value).map_err(|error| Fault::Corrupt(error.to_string()))
}

/// What a column of JSON holds.
pub(super) fn from_json<T: DeserializeOwned>(text: Option<String>) -> Result<Option<T>, serde_json::Error> {
    text.map(|text| serde_json::from_str(&text)).transpose()
}

#[cfg(test)]
mod tests {
    use stoker_policy::{Amount, ResizeMode};

    use super::super::tests::record;
    use super::super::{FunctionRecord, NewFunction};
    use super::*;

    async fn create(store: &Store, name: &str) -> FunctionRecord {
        let record = record(name);
        let new = NewFunction {
            record: record.clone(),
            request_id: None,
            limit: 100,
            may_create: Ok(()),
        };
        store.create_function(new).await.unwrap();
        record
    }

    fn amount(memory_mib: u32) -> Amount {
        Amount {
            cpu_millis: 250,
            memory_mib,
            scratch_mib: 521,
        }
    }

    fn resized(uid: Ulid, memory_mib: u32) -> StoredResize {
        let after = v1::Amount {
            cpu_millis: 250,
            memory_mib,
        };
        StoredResize {
            uid,
            kept: Kept {
                first: amount(128),
                amount: amount(memory_mib),
                killed_mib: 128,
            },
            resize: v1::FunctionResize {
                version: 1,
                after: Some(after),
                ..Default::default()
            },
        }
    }

    fn told(record: &FunctionRecord, sequence: u64) -> StoredNotification {
        StoredNotification {
            uid: record.uid,
            function: record.name.clone(),
            sequence,
            notification: v1::Notification {
                function: record.name.to_string(),
                detail: sequence.to_string(),
                ..Default::default()
            },
        }
    }

    #[tokio::test]
    async fn settings_and_what_was_determined_come_back_over_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let record = create(&store, "accounts/acme/functions/a").await;
        let settings = Resize {
            mode: ResizeMode::Auto,
            most: amount(4096),
            ..Resize::default()
        };
        assert!(store.set_resizing(record.uid, Some(settings)).await.unwrap());
        let second = resized(record.uid, 512);
        let resizes = vec![resized(record.uid, 256), second.clone(), resized(Ulid(7), 9)];
        store.keep_resizes(resizes, Vec::new()).await.unwrap();
        store.close().await;
        let store = Store::open(dir.path()).unwrap();
        let known = store.functions().await.unwrap();
        assert_eq!((known[0].resizing, known[0].kept), (Some(settings), Some(second.kept)));
        let listed = store.resizes(record.uid, None, 10).await.unwrap();
        assert_eq!(listed.len(), 2);
        assert_eq!(listed[0].1, second.resize);
        assert_eq!(
            store.resizes(record.uid, Some(listed[0].0), 10).await.unwrap(),
            listed[1..]
        );
        assert!(store.set_resizing(record.uid, None).await.unwrap());
        assert_eq!(store.functions().await.unwrap()[0].resizing, None);
        assert!(!store.set_resizing(Ulid(7), None).await.unwrap());
    }

    #[tokio::test]
    async fn notifications_are_found_by_whom_they_are_for_and_go_with_the_function() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let a = create(&store, "accounts/acme/functions/a").await;
        let b = create(&store, "accounts/acme/functions/b").await;
        let other = create(&store, "accounts/other/functions/a").await;
        let all = vec![told(&a, 1), told(&b, 2), told(&other, 3), told(&a, 4)];
        store.keep_resizes(Vec::new(), all).await.unwrap();
        let list = async |account: Option<&str>, function: Option<&str>, after, before| {
            let filter = NotificationFilter {
                account: account.map(str::to_owned),
                function: function.map(str::to_owned),
            };
            let found = store.notifications(filter, after, before, 10).await.unwrap();
            found.into_iter().map(|(sequence, _)| sequence).collect::<Vec<_>>()
        };
        assert_eq!(list(None, None, 0, None).await, [4, 3, 2, 1]);
        assert_eq!(list(Some("acme"), None, 0, None).await, [4, 2, 1]);
        assert_eq!(list(Some("acme"), Some("a"), 0, None).await, [4, 1]);
        assert_eq!(list(Some("acme"), None, 1, Some(4)).await, [2]);
        store.delete_function(a.name).await.unwrap();
        assert_eq!(list(None, None, 0, None).await, [3, 2]);
    }

    #[tokio::test]
    async fn of_many_changes_the_last_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let record = create(&store, "accounts/acme/functions/a").await;
        let resizes = (1..=150).map(|n| resized(record.uid, n)).collect();
        store.keep_resizes(resizes, Vec::new()).await.unwrap();
        let listed = store.resizes(record.uid, None, 1000).await.unwrap();
        let memory = |at: usize| listed[at].1.after.unwrap().memory_mib;
        assert_eq!((listed.len(), memory(0), memory(99)), (100, 150, 51));
    }
}
