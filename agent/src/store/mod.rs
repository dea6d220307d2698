//! Durable state: functions, their amounts, limits of accounts, orphaned code, machine records, decisions, unacknowledged reports, request ids, the host's id.
//!
//! One SQLite database in WAL mode with `synchronous=FULL`, owned by one thread. Callers hand it closures through a
//! bounded queue ([`QUEUE`]); what waits there is carried out in one transaction (at most [`BATCH`] at a time, each in
//! a savepoint of its own) and answered after the commit, so an answer means that it is on disk, and many
//! callers share one sync. Where it can't be written, what only reads is answered all the same.

mod accounts;
mod copy;
mod counts;
mod decisions;
mod environment;
mod error;
mod functions;
mod key;
mod layers;
mod losses;
mod machines;
mod orphans;
mod reports;
mod resizing;
mod schema;
mod snapshot;
mod thread;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use rusqlite::Connection;
use stoker_archive::Limits as ArchiveLimits;
use stoker_policy::{Kept, Resize};
use stoker_proto::scratch::{container_scratch_mib, unpacked_bytes};
use stoker_proto::v1;
use tokio::sync::{mpsc, oneshot};
use ulid::Ulid;

#[cfg(test)]
pub(crate) use self::tests::record;
pub(crate) use copy::{UNFINISHED, replace};
pub use counts::Counts;
pub use decisions::StoredDecision;
pub use environment::Rotated;
pub use error::{Failure, StoreError};
pub use functions::{Created, DeletedFunction, NewFunction};
pub(crate) use key::KeyFile;
pub use key::{FILE as KEY_FILE, KeyError};
pub use orphans::Orphan;
pub use reports::{Backlog, Report, ReportKind};
pub use resizing::{NotificationFilter, StoredNotification, StoredResize};
pub(crate) use schema::KNOWN as SCHEMA;
#[cfg(test)]
pub(crate) use schema::tests::earlier;
pub use snapshot::Snapshot;
pub(crate) use snapshot::check;

use environment::Keys;
use error::Fault;
use losses::Losses;
use schema::Opened;
use thread::{Answer, Failed, Job};

use crate::config;
use crate::files;
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
    /// In the order in which they are laid over each other, the last on top.
    pub layers: Vec<Layer>,
    /// What its own zip and its layers take when they are unpacked, in bytes ([`unpacked_bytes`]); none where that was not
    /// written down, by an earlier agent.
    pub unpacked_bytes: Option<u64>,
    /// Its containers are frozen between invocations.
    pub freeze: bool,
    /// What `/tmp` holds, in MiB.
    pub ephemeral_storage_mib: u32,
    /// When this version was made, to the ms.
    pub create_time: SystemTime,
    /// How its amount is fitted to its use, as it was when this was read; none where it is as its account has it. Not of this version
    /// alone.
    pub resizing: Option<Resize>,
    /// The amount that was determined last, likewise.
    pub kept: Option<Kept>,
}

/// A layer of a function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// SHA-256 of the zip in lower-case hex: its key in the code store.
    pub code_sha256: String,
    /// Bytes of the zip.
    pub code_size: u64,
}

/// The file of the database in its folder.
pub(crate) fn file(folder: &Path) -> std::path::PathBuf {
    folder.join("state.db")
}

/// A handle on the database; clones share it. The last one to go closes it.
#[derive(Debug, Clone)]
pub struct Store {
    jobs: mpsc::Sender<Job>,
    path: Arc<Path>,
    owner: Arc<Owner>,
    losses: Arc<Losses>,
    counts: Counts,
    keys: Arc<Keys>,
    /// Set by a call that deletes what must not stay in the log of changes either.
    purge: Arc<AtomicBool>,
}

// === impl Store ===

impl Store {
    /// The same as [`Self::open_with_key`] with the key in the same folder.
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        Self::open_with_key(folder, &folder.join(KEY_FILE))
    }

    /// Opens the database `state.db` in a folder, makes both where they are missing, and starts its thread. One of an earlier
    /// agent is brought up to date, once a copy of what it was is kept beside it, as `state.db.v3.bak`. Values are encrypted
    /// with the key in a file, which is made where nothing needs another. Blocks.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where the file can't be made, opened or written, others may write it, it is damaged, another program's, was written by a
    /// later agent, or needs another key; it is as it was then.
    pub fn open_with_key(folder: &Path, key: &Path) -> Result<Self, StoreError> {
        let path: Arc<Path> = file(folder).into();
        let prepare = |source: std::io::Error| StoreError::Prepare {
            path: path.to_path_buf(),
            source: Arc::new(source),
        };
        files::make_own_dir(folder)?;
        // However it is configured: what is written beside machines and code is compared at the next start.
        let store = folder.canonicalize().map_err(prepare)?;
        let Opened {
            connection,
            host,
            lost,
            keys,
        } = schema::open(&path, key)?;
        let purge = Arc::new(AtomicBool::new(false));
        let (jobs, queue) = mpsc::channel(QUEUE);
        std::thread::Builder::new()
            .name("store".into())
            .spawn({
                let purge = purge.clone();
                move || thread::run(connection, queue, &purge)
            })
            .map_err(prepare)?;
        Ok(Self {
            jobs,
            path: path.clone(),
            owner: Arc::new(Owner { host, store }),
            losses: Arc::new(Losses::new(lost)),
            counts: Counts::default(),
            keys: Arc::new(keys),
            purge,
        })
    }

    /// This host's id, made at the first start.
    pub fn host(&self) -> Ulid {
        self.owner.host
    }

    /// Whom the machines and the code belong to that this database knows of.
    pub fn owner(&self) -> &Owner {
        &self.owner
    }

    /// What is counted of it.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// How many calls wait for its thread.
    pub fn calls_waiting(&self) -> usize {
        self.jobs.max_capacity().saturating_sub(self.jobs.capacity())
    }

    /// Writes a row as it was: says whether the database can be written, and that its thread answers.
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    pub async fn touch(&self) -> Result<(), StoreError> {
        self.call("write", |c| {
            c.execute("UPDATE meta SET value = value WHERE key = 'host'", ())?;
            Ok(())
        })
        .await
    }

    /// Empties the log of changes, which the next start need not read then.
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    pub async fn empty_log(&self) -> Result<(), StoreError> {
        self.purge.store(true, Ordering::Relaxed);
        self.call("empty its log of changes", |_| Ok(())).await
    }

    /// Resolves when the database's thread has ended: as long as there is a handle, by a panic alone.
    pub async fn ended(&self) {
        self.jobs.closed().await;
    }

    /// Closes the database where this is the last handle, and waits until its file is.
    #[cfg(test)]
    async fn close(self) {
        let wal = self.path.with_extension("db-wal");
        drop(self);
        let start = std::time::Instant::now();
        while wal.exists() {
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "{} is still open",
                wal.display()
            );
            tokio::task::yield_now().await;
        }
    }

    /// Runs work on the database's thread and answers once its changes are on disk.
    async fn call<T: Send + 'static>(
        &self,
        operation: &'static str,
        work: impl FnOnce(&Connection) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (answer, answered) = oneshot::channel();
        let path = self.path.clone();
        let job: Job = Box::new(move |connection| {
            let result = match connection {
                Ok(connection) => work(connection),
                Err(source) => Err(Fault::Sql(source)),
            };
            let (kept, result) = match result {
                Ok(done) => (Ok(()), Ok(done)),
                Err(fault) => (Err(fault.sql()), Err(fault.during(&path, operation))),
            };
            let finish: Answer = Box::new(move |committed: Result<(), Failed>| {
                let result = match (result, committed) {
                    (Ok(done), Ok(())) => Ok(done),
                    (Ok(_), Err(source)) => Err(StoreError::failed(&path, operation, source)),
                    (Err(error), _) => Err(error),
                };
                // A caller that left has no use for the answer.
                let _ = answer.send(result);
            });
            (kept, finish)
        });
        self.jobs.send(job).await.map_err(|_| StoreError::Closed)?;
        let answer = answered.await.map_err(|_| StoreError::Closed)?;
        answer.inspect_err(|error: &StoreError| {
            if let Some(failure) = error.failure() {
                self.counts.errors.count(failure);
            }
        })
    }
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
    /// Whether it is what a request for the other would make; when and under which ids is not compared, nor what may have changed
    /// since.
    fn is_what_was_asked(&self, other: &Self) -> bool {
        let named_alike = Self {
            uid: other.uid,
            version: other.version,
            create_time: other.create_time,
            unpacked_bytes: other.unpacked_bytes,
            resizing: other.resizing,
            kept: other.kept,
            ..self.clone()
        };
        named_alike == *other
    }

    /// What a container of it takes of its machine's scratch disk, in MiB.
    pub fn scratch_mib(&self) -> u32 {
        let zipped = self
            .layers
            .iter()
            .fold(self.code_size, |sum, layer| sum.saturating_add(layer.code_size));
        let unpacked = self.unpacked_bytes.unwrap_or_else(most_unpacked);
        container_scratch_mib(self.ephemeral_storage_mib, zipped, unpacked)
    }

    /// SHA-256 of all zips that it needs, its own and its layers.
    pub fn codes(&self) -> impl Iterator<Item = &String> {
        let layers = self.layers.iter().map(|layer| &layer.code_sha256);
        std::iter::once(&self.code_sha256).chain(layers)
    }
}

/// What the zips of a function took at most that an earlier agent took in by its default limits.
fn most_unpacked() -> u64 {
    unpacked_bytes(
        ArchiveLimits::MOST.unzipped_bytes,
        config::Limits::default().zip_entries.into(),
    )
}

#[cfg(test)]
mod tests;
