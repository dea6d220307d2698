//! The values of environment variables: encrypted in the database, each for itself.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use rusqlite::{Connection, OptionalExtension as _};

use super::key::{self, About, Key, KeyError};
use super::{Fault, Store, StoreError};

/// The keys that this process knows. The database says which of them its values are encrypted with, so that a change of
/// the key holds or fails with the transaction that it is made in.
#[derive(Debug)]
pub(super) struct Keys {
    path: PathBuf,
    known: RwLock<BTreeMap<String, Arc<Key>>>,
    /// Held while the key is changed.
    rotating: tokio::sync::Mutex<()>,
}

/// What a change of the key did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rotated {
    /// The new key's id.
    pub key: String,
    /// How many values were encrypted again.
    pub values: usize,
}

// === impl Keys ===

impl Keys {
    /// The key in that file, which the database's values need; made where there is none and no value needs one.
    pub(super) fn open(c: &Connection, path: &Path, has_tables: bool) -> Result<Self, Fault> {
        key::remove_unfinished(path)?;
        let needed = if has_tables { needed(c)? } else { None };
        let key = match needed {
            Some(id) => key::find(path, &id)?,
            None => key::find_or_make(path)?,
        };
        Ok(Self {
            path: path.to_owned(),
            known: RwLock::new([(key.id().to_owned(), Arc::new(key))].into()),
            rotating: tokio::sync::Mutex::default(),
        })
    }

    /// The key that the values need; nothing is made or put right.
    pub(super) fn look(c: &Connection, path: &Path) -> Result<Option<Key>, Fault> {
        let needed = needed(c)?;
        Ok(needed.map(|id| key::look(path, &id)).transpose()?)
    }

    /// The bytes of the key of that id.
    pub(super) fn bytes(&self, id: &str) -> Option<Vec<u8>> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.get(id).map(|key| key.bytes().to_vec())
    }

    /// The only key that there is at the start.
    pub(super) fn first(&self) -> Option<Arc<Key>> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.values().next().cloned()
    }

    fn current(&self, c: &Connection) -> Result<Arc<Key>, Fault> {
        let id = id(c)?.unwrap_or_default();
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        let key = known.get(&id).cloned();
        key.ok_or_else(|| {
            Fault::Corrupt(format!(
                "values are encrypted with the key {id}, which this agent does not have"
            ))
        })
    }

    fn add(&self, key: Key) -> Arc<Key> {
        let key = Arc::new(key);
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        known.insert(key.id().to_owned(), key.clone());
        key
    }

    fn keep_only(&self, id: &str) {
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        known.retain(|known, _| known == id);
    }

    pub(super) fn insert(
        &self,
        c: &Connection,
        uid: &str,
        version: i64,
        environment: &BTreeMap<String, String>,
    ) -> Result<(), Fault> {
        if environment.is_empty() {
            return Ok(());
        }
        let key = self.current(c)?;
        insert(c, &key, uid, version, environment)
    }

    pub(super) fn read(&self, c: &Connection, uid: &str, version: i64) -> Result<BTreeMap<String, String>, Fault> {
        let mut statement = c.prepare_cached("SELECT name, value FROM environment WHERE uid = ?1 AND version = ?2")?;
        let mut rows = statement.query((uid, version))?;
        let mut environment = BTreeMap::new();
        let mut key = None;
        while let Some(row) = rows.next()? {
            let key = match &key {
                Some(key) => key,
                None => key.insert(self.current(c)?),
            };
            let (name, sealed): (String, Vec<u8>) = (row.get(0)?, row.get(1)?);
            let about = About {
                uid,
                version,
                name: &name,
            };
            let value = open(key, about, &sealed)?;
            environment.insert(name, value);
        }
        Ok(environment)
    }
}

fn insert(
    c: &Connection,
    key: &Key,
    uid: &str,
    version: i64,
    environment: &BTreeMap<String, String>,
) -> Result<(), Fault> {
    let mut insert = c.prepare_cached("INSERT INTO environment (uid, version, name, value) VALUES (?1, ?2, ?3, ?4)")?;
    for (name, value) in environment {
        let sealed = key.seal(About { uid, version, name }, value)?;
        insert.execute((uid, version, name, sealed))?;
    }
    Ok(())
}

/// What of the values does not open.
pub(super) fn check(c: &Connection, key: &Key) -> Result<Vec<String>, Fault> {
    let mut all = c.prepare("SELECT uid, version, name, value FROM environment")?;
    let mut rows = all.query([])?;
    let mut wrong = Vec::new();
    while let Some(row) = rows.next()? {
        let (uid, version, name): (String, i64, String) = (row.get(0)?, row.get(1)?, row.get(2)?);
        let about = About {
            uid: &uid,
            version,
            name: &name,
        };
        if let Err(Fault::Corrupt(problem)) = open(key, about, &row.get::<_, Vec<u8>>(3)?) {
            wrong.push(problem);
        }
    }
    Ok(wrong)
}

fn open(key: &Key, about: About<'_>, sealed: &[u8]) -> Result<String, Fault> {
    let About { uid, version, name } = about;
    key.open(about, sealed).ok_or_else(|| {
        Fault::Corrupt(format!(
            "the value of {name} in version {version} of the function {uid} is not what was encrypted"
        ))
    })
}

/// The id of the key that values are encrypted with.
pub(super) fn id(c: &Connection) -> rusqlite::Result<Option<String>> {
    c.prepare_cached("SELECT value FROM meta WHERE key = 'key'")?
        .query_row([], |row| row.get(0))
        .optional()
}

/// The same, where there are values.
pub(super) fn needed(c: &Connection) -> rusqlite::Result<Option<String>> {
    let any = c.prepare("SELECT 1 FROM environment")?.exists([])?;
    Ok(if any { id(c)? } else { None })
}

pub(super) fn set_id(c: &Connection, key: &Key) -> rusqlite::Result<()> {
    c.execute("INSERT OR REPLACE INTO meta VALUES ('key', ?1)", [key.id()])?;
    Ok(())
}

// === migration ===

/// Moves the values, until then in plain text, to a table of their own, encrypted.
pub(super) fn encrypt(c: &Connection, key: &Key) -> Result<(), Fault> {
    c.execute_batch(
        "
    -- The variables of versions.
    CREATE TABLE environment (
        uid TEXT NOT NULL,
        version INTEGER NOT NULL,
        name TEXT NOT NULL,
        -- XChaCha20-Poly1305 with the key whose id is `key` in `meta`, and uid, version and name as associated data: a nonce
        -- of 24 bytes, the encrypted value, a tag of 16 bytes.
        value BLOB NOT NULL,
        PRIMARY KEY (uid, version, name),
        FOREIGN KEY (uid, version) REFERENCES versions (uid, version) ON DELETE CASCADE
    ) STRICT, WITHOUT ROWID;
",
    )?;
    let mut versions = c.prepare("SELECT uid, version, environment FROM versions")?;
    let mut rows = versions.query([])?;
    while let Some(row) = rows.next()? {
        let (uid, version, plain): (String, i64, String) = (row.get(0)?, row.get(1)?, row.get(2)?);
        let environment: BTreeMap<_, _> = serde_json::from_str(&plain)
            .map_err(|error| Fault::Corrupt(format!("the environment of the function {uid}: {error}")))?;
        insert(c, key, &uid, version, &environment)?;
    }
    drop(rows);
    set_id(c, key)?;
    Ok(c.execute_batch("ALTER TABLE versions DROP COLUMN environment")?)
}

// === impl Store ===

impl Store {
    /// Makes a new key and encrypts all values with it, then removes the old key. Where it fails, or the agent dies in it,
    /// one of the two keys is in place and fits the values.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where the key files can't be written, or the database fails.
    pub async fn rotate_key(&self) -> Result<Rotated, StoreError> {
        let store = self.clone();
        // Also where the caller leaves.
        let rotating = tokio::spawn(async move { store.rotate().await });
        rotating.await.map_err(|_| StoreError::Closed)?
    }

    async fn rotate(&self) -> Result<Rotated, StoreError> {
        let _alone = self.keys.rotating.lock().await;
        // What an earlier one left.
        self.settle().await?;
        let path = self.keys.path.clone();
        let key = blocking(move || key::make_next(&path)).await?;
        let key = self.keys.add(key);
        let keys = self.keys.clone();
        let rotated = self.call("change the key", move |c| {
            let old = keys.current(c)?;
            let mut all = c.prepare("SELECT uid, version, name, value FROM environment")?;
            let mut update =
                c.prepare("UPDATE environment SET value = ?4 WHERE uid = ?1 AND version = ?2 AND name = ?3")?;
            // Read first: what is read is changed.
            let rows = all.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)))?;
            let rows: Vec<(String, i64, String, Vec<u8>)> = rows.collect::<Result<_, _>>()?;
            for (uid, version, name, sealed) in &rows {
                let about = About {
                    uid,
                    version: *version,
                    name,
                };
                let sealed = key.seal(about, &open(&old, about, sealed)?)?;
                update.execute((uid, version, name, sealed))?;
            }
            set_id(c, &key)?;
            Ok(Rotated {
                key: key.id().to_owned(),
                values: rows.len(),
            })
        });
        let rotated = rotated.await;
        self.settle().await?;
        rotated
    }

    /// Leaves the key alone that the database names, in memory and in its file.
    async fn settle(&self) -> Result<(), StoreError> {
        let id = self.call("look up the key", |c| Ok(id(c)?.unwrap_or_default())).await?;
        let path = self.keys.path.clone();
        let key = blocking(move || key::find(&path, &id)).await?;
        self.keys.keep_only(key.id());
        Ok(())
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, KeyError> + Send + 'static,
) -> Result<T, StoreError> {
    let done = tokio::task::spawn_blocking(work).await;
    Ok(done.map_err(|_| StoreError::Closed)??)
}

#[cfg(test)]
mod tests {
    use ulid::Ulid;

    use super::super::key::FILE;
    use super::super::tests::record;
    use super::super::{Created, FunctionRecord, NewFunction};
    use super::*;

    const SECRET: &str = "a value that nobody else may read";

    fn function(id: &str, environment: &[(&str, &str)]) -> NewFunction {
        NewFunction {
            record: FunctionRecord {
                environment: environment
                    .iter()
                    .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                    .collect(),
                ..record(&format!("accounts/acme/functions/{id}"))
            },
            request_id: Some(id.into()),
            limit: 1000,
            may_create: Ok(()),
        }
    }

    async fn create(store: &Store, new: &NewFunction) {
        assert_eq!(store.create_function(new.clone()).await.unwrap(), Created::New);
    }

    async fn records(store: &Store) -> Vec<FunctionRecord> {
        let mut records = store.functions().await.unwrap();
        records.sort_by(|a, b| a.name.cmp(&b.name));
        records
    }

    /// Which files of the database hold these bytes.
    fn holding(folder: &Path, bytes: &[u8]) -> Vec<&'static str> {
        let holds = |file: &&str| {
            let content = std::fs::read(folder.join(file)).unwrap_or_default();
            content.windows(bytes.len()).any(|window| window == bytes)
        };
        ["state.db", "state.db-wal"].into_iter().filter(holds).collect()
    }

    fn sealed(folder: &Path, name: &str) -> Vec<u8> {
        let connection = Connection::open(folder.join("state.db")).unwrap();
        let select = "SELECT value FROM environment WHERE name = ?1";
        connection.query_row(select, [name], |row| row.get(0)).unwrap()
    }

    #[tokio::test]
    async fn a_value_is_never_on_disk_in_plain_text_and_gone_with_its_function() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let new = function("a", &[("TOKEN", SECRET), ("EMPTY", "")]);
        create(&store, &new).await;
        let sealed = sealed(dir.path(), "TOKEN");
        assert!(!holding(dir.path(), &sealed).is_empty());
        assert_eq!(holding(dir.path(), SECRET.as_bytes()), [""; 0]);
        assert_eq!(records(&store).await, std::slice::from_ref(&new.record));
        store.delete_function(new.record.name.clone()).await.unwrap();
        assert_eq!(holding(dir.path(), &sealed), [""; 0]);
        // The retry of what made it is answered, or not, without any.
        assert_eq!(store.create_function(new).await.unwrap(), Created::Deleted);
    }

    #[tokio::test]
    async fn a_value_in_anothers_place_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        create(&store, &function("a", &[("ONE", "1"), ("TWO", "2")])).await;
        let other = sealed(dir.path(), "TWO");
        let connection = Connection::open(dir.path().join("state.db")).unwrap();
        let swap = "UPDATE environment SET value = ?1 WHERE name = 'ONE'";
        connection.execute(swap, [other]).unwrap();
        let error = store.functions().await.unwrap_err();
        assert!(
            matches!(&error, StoreError::Corrupt { detail, .. } if detail.contains("ONE")),
            "{error}"
        );
    }

    #[tokio::test]
    async fn without_its_key_nothing_is_opened_or_changed() {
        let dir = tempfile::tempdir().unwrap();
        let (key, away) = (dir.path().join(FILE), dir.path().join("away"));
        // Without values any key does.
        drop(Store::open(dir.path()).unwrap());
        std::fs::remove_file(&key).unwrap();
        let store = Store::open(dir.path()).unwrap();
        let new = function("a", &[("TOKEN", SECRET)]);
        create(&store, &new).await;
        store.close().await;
        let before = std::fs::read(dir.path().join("state.db")).unwrap();
        std::fs::rename(&key, &away).unwrap();
        let error = Store::open(dir.path()).unwrap_err();
        assert!(matches!(error, StoreError::Key(KeyError::Missing { .. })), "{error}");
        assert!(!key.exists(), "none is made");
        Key::generate().unwrap().write(&key).unwrap();
        let error = Store::open(dir.path()).unwrap_err();
        assert!(matches!(error, StoreError::Key(KeyError::Wrong { .. })), "{error}");
        assert!(std::fs::read(dir.path().join("state.db")).unwrap() == before);
        // It may lie elsewhere.
        let store = Store::open_with_key(dir.path(), &away).unwrap();
        assert_eq!(records(&store).await, [new.record]);
    }

    #[tokio::test]
    async fn a_new_key_takes_the_place_of_the_old_one_whatever_is_written_meanwhile() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let old = Key::read(&dir.path().join(FILE)).unwrap().unwrap();
        let all: Vec<_> = (0..40)
            .map(|n| function(&format!("f{n:02}"), &[("TOKEN", SECRET)]))
            .collect();
        let (first, rest) = all.split_at(20);
        for new in first {
            create(&store, new).await;
        }
        let (rotated, ()) = tokio::join!(store.rotate_key(), async {
            for new in rest {
                create(&store, new).await;
            }
        });
        let rotated = rotated.unwrap();
        assert!((20..=40).contains(&rotated.values), "{rotated:?}");
        let again = store.rotate_key().await.unwrap();
        assert_eq!(again.values, 40);
        let records_of = |all: &[NewFunction]| all.iter().map(|new| new.record.clone()).collect::<Vec<_>>();
        assert_eq!(records(&store).await, records_of(&all));
        let key = Key::read(&dir.path().join(FILE)).unwrap().unwrap();
        assert!(key.id() == again.key && key.id() != rotated.key && key.id() != old.id());
        store.close().await;
        let mut files: Vec<_> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        files.sort();
        assert_eq!(files, [FILE, "state.db"], "no other key is left");
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(records(&store).await, records_of(&all));
    }

    /// The agent died: before the database had the new key, or after that and before the key was in its place.
    #[tokio::test]
    async fn a_change_of_the_key_that_was_cut_short_is_finished_or_undone() {
        let dir = tempfile::tempdir().unwrap();
        let (file, next) = (dir.path().join(FILE), dir.path().join(format!("{FILE}.new")));
        let store = Store::open(dir.path()).unwrap();
        let new = function("a", &[("TOKEN", SECRET)]);
        create(&store, &new).await;
        store.close().await;
        let old = std::fs::read(&file).unwrap();
        key::make_next(&file).unwrap();
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(records(&store).await, std::slice::from_ref(&new.record));
        assert!(!next.exists() && std::fs::read(&file).unwrap() == old);
        store.rotate_key().await.unwrap();
        store.close().await;
        let changed = std::fs::read(&file).unwrap();
        std::fs::rename(&file, &next).unwrap();
        std::fs::write(&file, &old).unwrap();
        let private = <std::fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o600);
        std::fs::set_permissions(&file, private).unwrap();
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(records(&store).await, [new.record]);
        assert!(!next.exists() && std::fs::read(&file).unwrap() == changed);
    }

    #[tokio::test]
    async fn a_key_that_can_not_be_written_leaves_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let keys = tempfile::tempdir().unwrap();
        let path = keys.path().join("key");
        let store = Store::open_with_key(dir.path(), &path).unwrap();
        let new = function("a", &[("TOKEN", SECRET)]);
        create(&store, &new).await;
        // A folder is in the way, which nothing that is renamed replaces.
        std::fs::create_dir(keys.path().join("key.new")).unwrap();
        let error = store.rotate_key().await.unwrap_err();
        assert!(matches!(error, StoreError::Key(_)), "{error}");
        std::fs::remove_dir(keys.path().join("key.new")).unwrap();
        assert_eq!(records(&store).await, std::slice::from_ref(&new.record));
        store.rotate_key().await.unwrap();
        store.close().await;
        let store = Store::open_with_key(dir.path(), &path).unwrap();
        assert_eq!(records(&store).await, [new.record]);
    }

    #[tokio::test]
    async fn values_of_an_earlier_schema_are_encrypted_and_leave_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let uid = Ulid::generate();
        super::super::earlier(dir.path(), 3, |c| {
            let environment = format!("{{\"TOKEN\": \"{SECRET}\"}}");
            let code = "ab".repeat(32);
            // The second is deleted, as by an agent that overwrote nothing.
            c.pragma_update(None, "secure_delete", "OFF").unwrap();
            for (id, uid) in [("a", uid.to_string()), ("b", Ulid::generate().to_string())] {
                c.execute("INSERT INTO functions VALUES (?1, 'acme', ?2, 1)", [&uid, id])
                    .unwrap();
                let insert =
                    "INSERT INTO versions VALUES (?1, 1, 'python3.11', 'app.handler', ?2, 3000, 250, 128, ?3, 1234, 0)";
                c.execute(insert, [&uid, &environment, &code]).unwrap();
            }
            c.execute("DELETE FROM functions WHERE function = 'b'", []).unwrap();
        });
        assert_eq!(holding(dir.path(), SECRET.as_bytes()), ["state.db"]);
        let store = Store::open(dir.path()).unwrap();
        let found = records(&store).await;
        assert_eq!(found.len(), 1);
        assert_eq!(
            (found[0].uid, &found[0].environment["TOKEN"]),
            (uid, &SECRET.to_owned())
        );
        assert_eq!(holding(dir.path(), SECRET.as_bytes()), [""; 0]);
    }
}
