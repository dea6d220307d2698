//! Durable state: functions, orphaned code, machine records, decisions, unacknowledged reports, request ids, the host's id.
//!
//! One SQLite database in WAL mode with `synchronous=FULL`, owned by one thread. Callers hand it closures through a
//! bounded queue ([`QUEUE`]); what waits there is carried out in one transaction (at most [`BATCH`] at a time, each in
//! a savepoint of its own) and answered after the commit, so an answer means that it is on disk, and many
//! callers share one sync.

mod decisions;
mod functions;
mod machines;
mod orphans;
mod reports;
mod schema;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rusqlite::{Connection, TransactionBehavior};
use stoker_proto::v1;
use tokio::sync::{mpsc, oneshot};
use ulid::Ulid;

pub use decisions::StoredDecision;
pub use functions::{Created, DeletedFunction, NewFunction};
pub use orphans::Orphan;
pub use reports::{Report, ReportKind};

use crate::names::FunctionName;
use crate::owner::Owner;

/// How many calls may wait for the database; a caller beyond that waits in line.
pub const QUEUE: usize = 1024;

/// How many calls share one transaction at most.
pub const BATCH: usize = 64;

/// A function's version, as it was deployed.
#[derive(Debug, Clone, PartialEq)]
pub struct FunctionRecord {
    /// Its name; holds the account's and the function's id.
    pub name: FunctionName,
    /// Unique everywhere, and never used again for a later function of the same name.
    pub uid: Ulid,
    /// One of [`crate::names::RUNTIMES`].
    pub runtime: String,
    /// `module.function` for Python; passed on as `_HANDLER`.
    pub handler: String,
    /// Environment variables.
    pub environment: BTreeMap<String, String>,
    /// How long one invocation may take; 1 s to 900 s.
    pub timeout: Duration,
    /// The first amount of resources.
    pub amount: v1::Amount,
    /// From 1.
    pub version: u64,
    /// SHA-256 of the zip in lower-case hex: its key in the code store.
    pub code_sha256: String,
    /// Bytes of the zip.
    pub code_size: u64,
    /// When this version was made, to the ms.
    pub create_time: SystemTime,
}

/// What went wrong with the database.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// It could not be opened or brought up to date.
    #[error("can't open the database {}: {source}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The underlying error.
        source: Arc<rusqlite::Error>,
    },
    /// It was written by a later agent.
    #[error("the database {} was written by a later version of stokerd (schema {found}, this one knows {known}); use that version", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its schema.
        found: u32,
        /// The schema of this agent.
        known: u32,
    },
    /// Its folder or thread could not be made.
    #[error("can't prepare the database {}: {source}", path.display())]
    Prepare {
        /// The file.
        path: PathBuf,
        /// The underlying error.
        source: Arc<std::io::Error>,
    },
    /// A statement failed.
    #[error("the database failed to {operation}: {source}")]
    Query {
        /// What was being done.
        operation: &'static str,
        /// The underlying error.
        source: Arc<rusqlite::Error>,
    },
    /// A row can't be what the agent wrote.
    #[error("the database holds something damaged ({operation}): {detail}")]
    Corrupt {
        /// What was being done.
        operation: &'static str,
        /// What is wrong.
        detail: String,
    },
    /// Its thread is gone.
    #[error("the database is closed")]
    Closed,
}

/// A handle on the database; clones share it. The last one to go closes it.
#[derive(Debug, Clone)]
pub struct Store {
    jobs: mpsc::Sender<Job>,
    owner: Arc<Owner>,
}

/// Carries out a call's work, or learns why it can't be; the flag says whether its changes are kept, the closure answers
/// the caller after the commit.
type Job = Box<dyn FnOnce(Result<&Connection, Failed>) -> (bool, Answer) + Send>;
type Answer = Box<dyn FnOnce(Result<(), Failed>) + Send>;

/// Why a whole batch failed.
type Failed = Arc<rusqlite::Error>;

// === impl Store ===

impl Store {
    /// Opens the database `state.db` in a folder, makes both where they are missing, and starts its thread. Blocks.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where the file can't be made, opened, or was written by a later agent.
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        let path = folder.join("state.db");
        let prepare = |source: std::io::Error| StoreError::Prepare {
            path: path.clone(),
            source: Arc::new(source),
        };
        crate::files::make_private_dir(folder).map_err(prepare)?;
        // However it is configured: what is written beside machines and code is compared at the next start.
        let store = folder.canonicalize().map_err(prepare)?;
        let (connection, host) = schema::open(&path)?;
        let (jobs, queue) = mpsc::channel(QUEUE);
        std::thread::Builder::new()
            .name("store".into())
            .spawn(move || run(connection, queue))
            .map_err(prepare)?;
        let owner = Arc::new(Owner { host, store });
        Ok(Self { jobs, owner })
    }

    /// This host's id, made at the first start.
    pub fn host(&self) -> Ulid {
        self.owner.host
    }

    /// Whom the machines and the code belong to that this database knows of.
    pub fn owner(&self) -> &Owner {
        &self.owner
    }

    /// Runs work on the database's thread and answers once its changes are on disk.
    async fn call<T: Send + 'static>(
        &self,
        operation: &'static str,
        work: impl FnOnce(&Connection) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(move |connection| {
            let result = match connection {
                Ok(connection) => work(connection).map_err(|fault| fault.during(operation)),
                Err(source) => Err(StoreError::Query { operation, source }),
            };
            let keep = result.is_ok();
            let finish: Answer = Box::new(move |committed| {
                let result = match committed {
                    Ok(()) => result,
                    Err(source) => Err(StoreError::Query { operation, source }),
                };
                // A caller that left has no use for the answer.
                let _ = answer.send(result);
            });
            (keep, finish)
        });
        self.jobs.send(job).await.map_err(|_| StoreError::Closed)?;
        answered.await.map_err(|_| StoreError::Closed)?
    }
}

/// What goes wrong inside a call, before it is known which.
#[derive(Debug)]
enum Fault {
    Sql(rusqlite::Error),
    Corrupt(String),
}

impl Fault {
    fn during(self, operation: &'static str) -> StoreError {
        match self {
            Self::Sql(source) => StoreError::Query {
                operation,
                source: Arc::new(source),
            },
            Self::Corrupt(detail) => StoreError::Corrupt { operation, detail },
        }
    }
}

impl From<rusqlite::Error> for Fault {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sql(error)
    }
}

fn run(mut connection: Connection, mut queue: mpsc::Receiver<Job>) {
    let mut batch = Vec::with_capacity(BATCH);
    while queue.blocking_recv_many(&mut batch, BATCH) > 0 {
        let mut answers = Vec::with_capacity(batch.len());
        let committed = carry_out(&mut connection, &mut batch, &mut answers).map_err(Arc::new);
        if let Err(error) = &committed {
            tracing::error!(%error, "the database failed");
            // What was not tried fails for the same reason.
            answers.extend(batch.drain(..).map(|job| job(Err(error.clone())).1));
        }
        for answer in answers {
            answer(committed.clone());
        }
    }
    // Leaves one tidy file; the WAL is read again at the next start where this fails.
    if let Err(error) = connection.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)") {
        tracing::warn!(%error, "the database was closed without a checkpoint");
    }
}

/// Carries out a batch in one transaction. Where that fails, what was not tried is still in the batch.
fn carry_out(connection: &mut Connection, batch: &mut Vec<Job>, answers: &mut Vec<Answer>) -> rusqlite::Result<()> {
    let mut transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    while !batch.is_empty() {
        let savepoint = transaction.savepoint()?;
        let (keep, answer) = batch.remove(0)(Ok(&savepoint));
        answers.push(answer);
        if keep {
            savepoint.commit()?;
        } else {
            savepoint.finish()?;
        }
    }
    transaction.commit()
}

fn millis(time: SystemTime) -> i64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .ok()
        .and_then(|since| i64::try_from(since.as_millis()).ok())
        .unwrap_or(0)
}

fn from_millis(millis: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_millis(u64::try_from(millis).unwrap_or(0))
}

// === impl FunctionRecord ===

impl FunctionRecord {
    /// Whether it is what a request for the other would make; when and under which ids is not compared.
    fn is_what_was_asked(&self, other: &Self) -> bool {
        let named_alike = Self {
            uid: other.uid,
            version: other.version,
            create_time: other.create_time,
            ..self.clone()
        };
        named_alike == *other
    }
}

impl From<&FunctionRecord> for v1::Function {
    fn from(record: &FunctionRecord) -> Self {
        Self {
            name: record.name.to_string(),
            uid: record.uid.to_string(),
            runtime: record.runtime.clone(),
            handler: record.handler.clone(),
            environment: record.environment.clone().into_iter().collect(),
            timeout: prost_types::Duration::try_from(record.timeout).ok(),
            amount: Some(record.amount),
            version: record.version,
            code_sha256: record.code_sha256.clone(),
            code_size_bytes: record.code_size,
            create_time: Some(record.create_time.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_host_id_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let first = Store::open(dir.path()).unwrap().owner().clone();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path(), &link).unwrap();
        assert_eq!(Store::open(&link).unwrap().owner(), &first);
    }

    #[tokio::test]
    async fn a_failed_call_undoes_itself_alone() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let insert = |store: Store, key: &'static str, fail: bool| async move {
            store
                .call("test", move |c| {
                    c.execute("INSERT INTO meta VALUES (?1, 'x')", [key])?;
                    if fail {
                        return Err(Fault::Corrupt("on purpose".into()));
                    }
                    Ok(())
                })
                .await
        };
        let (a, b, c) = tokio::join!(
            insert(store.clone(), "a", false),
            insert(store.clone(), "b", true),
            insert(store.clone(), "c", false)
        );
        assert!(a.is_ok() && b.is_err() && c.is_ok());
        let kept = store
            .call("test", |c| {
                let mut statement = c.prepare("SELECT key FROM meta WHERE value = 'x' ORDER BY key")?;
                let keys = statement.query_map([], |row| row.get::<_, String>(0))?;
                Ok(keys.collect::<Result<Vec<_>, _>>()?)
            })
            .await
            .unwrap();
        assert_eq!(kept, ["a", "c"]);
    }

    /// Another program holds the database: callers are told so, and are served once it is free.
    #[tokio::test]
    async fn a_locked_database_is_an_error_and_not_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        store
            .call("test", |c| Ok(c.busy_timeout(Duration::ZERO)?))
            .await
            .unwrap();
        let other = Connection::open(dir.path().join("state.db")).unwrap();
        other.execute_batch("BEGIN IMMEDIATE").unwrap();
        let error = store.machines().await.unwrap_err();
        assert!(error.to_string().contains("locked"), "{error}");
        other.execute_batch("COMMIT").unwrap();
        store.machines().await.unwrap();
    }

    #[test]
    fn a_later_schema_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        drop(Store::open(dir.path()).unwrap());
        Connection::open(dir.path().join("state.db"))
            .unwrap()
            .pragma_update(None, "user_version", 99)
            .unwrap();
        let error = Store::open(dir.path()).unwrap_err();
        assert!(matches!(error, StoreError::Newer { found: 99, .. }), "{error}");
    }

    #[test]
    fn a_damaged_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("state.db"), vec![7; 8192]).unwrap();
        let error = Store::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("state.db"), "{error}");
    }
}
