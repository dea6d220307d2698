//! Functions: which there are, deploying and deleting them, and the code that they leave. No transport: every API stands
//! on this.
//!
//! The catalogue holds every function in memory and is the only one that writes functions to the database: memory
//! changes once the database has committed. So an invocation looks its function up without a database.
//!
//! Code is what zips hold, of functions and of their layers. It goes where this database knows that nobody wants it: with
//! the last function that needed it, or with a call that brought it and failed. All other code that no function needs is an
//! orphan ([`Orphan`]): left by a crash, or known to another database alone. It is kept until somebody asks for its removal,
//! and for a grace time at least.

mod backup;
mod orphans;
mod resizing;
mod upload;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::{Bound, Deref};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockWriteGuard};
use std::time::{Duration, SystemTime};

use stoker_archive::{CheckError, Limits as ArchiveLimits};
use stoker_policy::{Kept, Resize, TooManyFunctions};
use stoker_proto::limits::LAYERS;
use stoker_proto::scratch::unpacked_bytes;
use stoker_proto::v1;
use tokio::sync::{Mutex, Semaphore};
use ulid::Ulid;

use self::resizing::Resizing;
pub use self::resizing::ResizingDefaults;
pub(crate) use self::resizing::{cpu_and_memory, settings};
use self::upload::Zip;
pub use self::upload::{Staged, Upload};
use crate::code::{CodeError, CodeStore};
use crate::config::Limits;
use crate::failpoints::{self, Failpoint};
use crate::names::{AccountName, FunctionName};
pub use crate::store::Orphan;
use crate::store::{Created, FunctionRecord, NewFunction, Store, StoreError};

/// Told the unique id of every function that is deleted, once [`Function::is_deleted`] says so.
pub type Deleted = Arc<dyn Fn(String) + Send + Sync>;

/// Says whether an account that has so many functions may have another.
pub type MayCreate = Arc<dyn Fn(&str, u32) -> Result<(), TooManyFunctions> + Send + Sync>;

/// Every function of this host; clones share it.
#[derive(Clone)]
pub struct Catalog(Arc<Inner>);

struct Inner {
    functions: RwLock<Functions>,
    resizing: ResizingDefaults,
    store: Store,
    codes: CodeStore,
    limits: RwLock<Limits>,
    may_create: MayCreate,
    orphan_grace: Duration,
    deleted: Deleted,
    uploads: Arc<Semaphore>,
    /// Held from a change in the database until memory has it too.
    changing: Mutex<()>,
    /// Held for reading from keeping code until a function needs it, for writing while code that no function needs is
    /// looked for and removed: so that nobody removes what another is about to need.
    collecting: tokio::sync::RwLock<()>,
    kept: backup::Kept,
}

/// The functions that there are.
#[derive(Default)]
struct Functions {
    by_name: BTreeMap<FunctionName, Arc<Function>>,
    by_uid: HashMap<Ulid, Arc<Function>>,
    /// How many each account has.
    by_account: BTreeMap<String, u32>,
}

/// A function in the catalogue.
#[derive(Debug)]
pub struct Function {
    record: FunctionRecord,
    deleted: AtomicBool,
    resizing: Resizing,
}

/// What a function is to be, checked and with defaults filled in.
#[derive(Debug, Clone, PartialEq)]
pub struct FunctionSpec {
    /// Its name.
    pub name: FunctionName,
    /// One of [`crate::names::RUNTIMES`].
    pub runtime: String,
    /// Fit for the runtime.
    pub handler: String,
    /// Environment variables.
    pub environment: BTreeMap<String, String>,
    /// How long one invocation may take; 1 s to 900 s.
    pub timeout: Duration,
    /// The first amount of resources, within the host's capacity.
    pub amount: v1::Amount,
    /// Whether its containers are frozen between invocations.
    pub freeze: bool,
    /// What `/tmp` holds, in MiB; in [`stoker_proto::limits::SCRATCH_MIB`].
    pub ephemeral_storage_mib: u32,
    /// How its amount is fitted to its use; as its account has it where absent.
    pub resizing: Option<Resize>,
}

/// Why something could not be done with functions or code.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// There is no function of that name.
    #[error("there is no function {0}")]
    NotFound(FunctionName),
    /// There is a function of that name.
    #[error("there is a function {0} already")]
    AlreadyExists(FunctionName),
    /// The request id was used for something else.
    #[error("the request id was used for a request with other content; use a new one")]
    RequestReused,
    /// The function that this request made was deleted since.
    #[error("this request made {0}, which was deleted since; to make it again use a new request id")]
    MadeAndDeleted(FunctionName),
    /// There are as many functions as there may be.
    #[error("this host has as many functions as it may ({limit}); delete some or raise limits.functions")]
    Full {
        /// The most that there may be.
        limit: u32,
    },
    /// Its account has as many as it may.
    #[error("{why}, or have the limit raised (`stoker account limit`)")]
    AccountFull {
        /// The account.
        account: AccountName,
        /// How many those are.
        why: TooManyFunctions,
    },
    /// As many zips come in as may.
    #[error("this agent takes in {limit} zips at a time (limits.concurrent_uploads); try again in a moment")]
    Busy {
        /// The most that may come in at a time.
        limit: u32,
    },
    /// A zip has more bytes than it may.
    #[error("{} is larger than {limit_mib} MiB; leave out what the function does not need", zip_name(*layer))]
    ZipTooLarge {
        /// Which layer it is, from 1, where it is not the function's own.
        layer: Option<usize>,
        /// The limit in MiB.
        limit_mib: u32,
    },
    /// There are more layers than there may be.
    #[error("a function has at most {LAYERS} layers; put what they hold into fewer")]
    TooManyLayers,
    /// The zip or a layer is not one that can be run, or they are too large together.
    #[error(transparent)]
    Archive(#[from] CheckError),
    /// Its containers would take more of a machine's scratch disk than one may have.
    #[error(
        "a container takes {needs_mib} MiB of its machine's scratch disk, for {tmp_mib} MiB of /tmp and its code as a zip and \
         unpacked, and a machine of this host has {most_mib} MiB for containers at most: ask for less ephemeral storage, \
         raise pool.scratch_gib, or set machines.scratch_dir to a larger disk"
    )]
    ScratchTooLarge {
        /// What one takes.
        needs_mib: u32,
        /// What of that is for `/tmp`.
        tmp_mib: u32,
        /// The most that there can be.
        most_mib: u32,
    },
    /// Orphans are kept longer than that.
    #[error(
        "code that no function needs is kept for {} at least (code.orphan_grace); {} is less",
        humantime::format_duration(*grace), humantime::format_duration(*asked)
    )]
    GraceTooShort {
        /// What was asked for.
        asked: Duration,
        /// The least that is configured.
        grace: Duration,
    },
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The code store failed, or is another agent's.
    #[error(transparent)]
    Code(#[from] CodeError),
    /// An archive can't be made.
    #[error(transparent)]
    Backup(Box<crate::backup::BackupError>),
    /// A task of this agent panicked; the log says where.
    #[error("a part of the agent panicked: {0}")]
    Panicked(#[from] tokio::task::JoinError),
}

// === impl Catalog ===

impl Catalog {
    /// Reads all functions, and says in the log what of the code no function needs. `orphan_grace` is the least time
    /// that such code is kept, `resizing` what is done for functions that do not say how their amounts are fitted to their use,
    /// `may_create` whether an account may have another function.
    ///
    /// # Errors
    ///
    /// [`CatalogError::Store`] where the functions can't be read.
    pub async fn open(
        store: Store,
        codes: CodeStore,
        limits: Limits,
        orphan_grace: Duration,
        resizing: ResizingDefaults,
        may_create: MayCreate,
        deleted: Deleted,
    ) -> Result<Self, CatalogError> {
        let mut functions = Functions::default();
        for record in store.functions().await? {
            functions.insert(Function::new(record, &resizing));
        }
        let uploads = limits.concurrent_uploads.try_into().unwrap_or(usize::MAX);
        let catalog = Self(Arc::new(Inner {
            functions: RwLock::new(functions),
            resizing,
            store,
            codes,
            limits: RwLock::new(limits),
            may_create,
            orphan_grace,
            deleted,
            uploads: Arc::new(Semaphore::new(uploads.min(Semaphore::MAX_PERMITS))),
            changing: Mutex::new(()),
            collecting: tokio::sync::RwLock::new(()),
            kept: backup::Kept::default(),
        }));
        if let Err(error) = catalog.0.codes.check_owner() {
            tracing::warn!("{error}");
        }
        match catalog.orphans().await {
            Ok(orphans) if orphans.is_empty() => {}
            Ok(orphans) => tracing::warn!(
                orphans = orphans.len(),
                "there is code that no function needs; it is kept: see `stoker code orphans`"
            ),
            // Where the disk is full, say: functions are served all the same.
            Err(error) => tracing::warn!(%error, "it is not known what code no function needs"),
        }
        Ok(catalog)
    }

    /// What callers may ask for at the moment.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.0.limits()
    }

    /// Changes that for what is asked from now on; how many zips come in at a time stays as it was.
    pub fn set_limits(&self, limits: Limits) {
        *self.0.limits.write().unwrap_or_else(PoisonError::into_inner) = limits;
    }

    /// The function of that name.
    #[must_use]
    pub fn get(&self, name: &FunctionName) -> Option<Arc<Function>> {
        let functions = self.0.functions.read().unwrap_or_else(PoisonError::into_inner);
        functions.by_name.get(name).cloned()
    }

    /// The function of that unique id.
    #[must_use]
    pub fn find(&self, uid: Ulid) -> Option<Arc<Function>> {
        let functions = self.0.functions.read().unwrap_or_else(PoisonError::into_inner);
        functions.by_uid.get(&uid).cloned()
    }

    /// At most `limit` functions in the order of their names, of one account or of all, that come after a name.
    #[must_use]
    pub fn list(
        &self,
        account: Option<&AccountName>,
        after: Option<&FunctionName>,
        limit: usize,
    ) -> Vec<Arc<Function>> {
        let from = match (after, account) {
            (Some(after), _) => Bound::Excluded(after.clone()),
            (None, Some(account)) => Bound::Included(FunctionName::lower_bound(account)),
            (None, None) => Bound::Unbounded,
        };
        let functions = self.0.functions.read().unwrap_or_else(PoisonError::into_inner);
        functions
            .by_name
            .range((from, Bound::Unbounded))
            .map(|(_, function)| function)
            .take_while(|function| account.is_none_or(|account| account.account() == function.name.account()))
            .take(limit)
            .cloned()
            .collect()
    }

    /// How many functions an account has.
    #[must_use]
    pub fn count(&self, account: &str) -> u32 {
        self.0.count(account)
    }

    /// The ids of the accounts that have functions.
    #[must_use]
    pub fn accounts(&self) -> Vec<String> {
        let functions = self.0.functions.read().unwrap_or_else(PoisonError::into_inner);
        functions.by_account.keys().cloned().collect()
    }

    /// Whether [`Self::create`] is known to fail because the name is taken, or the account has as many functions as it may, so that the
    /// zip need not be sent. It is decided again when the function is made.
    ///
    /// # Errors
    ///
    /// [`CatalogError::AlreadyExists`], [`CatalogError::AccountFull`], [`CatalogError::Store`].
    pub async fn check_new(&self, name: &FunctionName, request_id: &str) -> Result<(), CatalogError> {
        let refused = match self.get(name) {
            Some(_) => CatalogError::AlreadyExists(name.clone()),
            None => match self.0.may_create(name.account()) {
                Ok(()) => return Ok(()),
                Err(why) => account_full(name, why),
            },
        };
        let (account, id) = (name.account().to_owned(), request_id.to_owned());
        match self.0.store.request_is_known(account, id).await? {
            true => Ok(()),
            false => Err(refused),
        }
    }

    /// Begins to take a function's zips in.
    ///
    /// # Errors
    ///
    /// [`CatalogError::Busy`] where `limits.concurrent_uploads` zips come in.
    pub fn upload(&self) -> Result<Upload, CatalogError> {
        let limits = self.limits();
        let permit = self.0.uploads.clone().try_acquire_owned();
        let permit = permit.map_err(|_| CatalogError::Busy {
            limit: limits.concurrent_uploads,
        })?;
        Ok(Upload::new(self.0.codes.clone(), limits.zip_mib, permit))
    }

    /// Makes a function, or answers with what the first call with this request id made; an empty id is none. Either all of
    /// it is kept or nothing, whether or not the caller waits for it. A container of it may take `most_scratch_mib` of a
    /// machine's scratch disk.
    ///
    /// # Errors
    ///
    /// [`CatalogError`].
    pub async fn create(
        &self,
        spec: FunctionSpec,
        request_id: String,
        staged: Staged,
        most_scratch_mib: u32,
    ) -> Result<FunctionRecord, CatalogError> {
        let limits = self.limits();
        let limits = ArchiveLimits {
            unzipped_bytes: u64::from(limits.unzipped_mib) << 20,
            entries: limits.zip_entries.try_into().unwrap_or(usize::MAX),
        };
        let (runtime, handler) = (spec.runtime.clone(), spec.handler.clone());
        let checking = tokio::task::spawn_blocking(move || {
            let layers = staged.layers.iter().map(|layer| layer.file.as_file());
            let checked = stoker_archive::check(staged.code.file.as_file(), layers, &runtime, &handler, limits);
            checked.map(|checked| (staged, checked.sizes))
        });
        let (staged, sizes) = checking.await??;
        let unpacked = sizes.iter().map(|size| unpacked_bytes(size.bytes, size.files)).sum();
        let record = FunctionRecord {
            name: spec.name,
            uid: Ulid::generate(),
            runtime: spec.runtime,
            handler: spec.handler,
            environment: spec.environment,
            timeout: spec.timeout,
            amount: spec.amount,
            version: 1,
            code_sha256: staged.code.sha256.clone(),
            code_size: staged.code.size,
            layers: staged.layers.iter().map(Zip::to_layer).collect(),
            unpacked_bytes: Some(unpacked),
            freeze: spec.freeze,
            ephemeral_storage_mib: spec.ephemeral_storage_mib,
            create_time: to_millis(SystemTime::now()),
            resizing: spec.resizing,
            kept: None,
        };
        if record.scratch_mib() > most_scratch_mib {
            return Err(CatalogError::ScratchTooLarge {
                needs_mib: record.scratch_mib(),
                tmp_mib: record.ephemeral_storage_mib,
                most_mib: most_scratch_mib,
            });
        }
        let request_id = Some(request_id).filter(|id| !id.is_empty());
        let catalog = self.clone();
        tokio::spawn(async move { catalog.0.create(record, request_id, staged).await }).await?
    }

    /// Sets how a function's amount is fitted to its use, from the next execution on; as its account has it where `settings` is none.
    ///
    /// # Errors
    ///
    /// [`CatalogError::NotFound`] where the function is not that any more, [`CatalogError::Store`].
    pub async fn set_resizing(&self, function: Arc<Function>, settings: Option<Resize>) -> Result<(), CatalogError> {
        let catalog = self.clone();
        tokio::spawn(async move { catalog.0.set_resizing(&function, settings).await }).await?
    }

    /// What was changed of a function's amount, the youngest first, each with its number: at most `limit` whose number is less than
    /// `before`.
    ///
    /// # Errors
    ///
    /// [`CatalogError::Store`].
    pub async fn resizes(
        &self,
        function: &Function,
        before: Option<u64>,
        limit: usize,
    ) -> Result<Vec<(u64, v1::FunctionResize)>, CatalogError> {
        Ok(self.0.store.resizes(function.uid, before, limit).await?)
    }

    /// Deletes a function, and the code that only it needed.
    ///
    /// # Errors
    ///
    /// [`CatalogError::NotFound`], [`CatalogError::Store`].
    pub async fn delete(&self, name: FunctionName) -> Result<(), CatalogError> {
        let catalog = self.clone();
        tokio::spawn(async move { catalog.0.delete(name).await }).await?
    }
}

// === impl Inner ===

impl Inner {
    fn write(&self) -> RwLockWriteGuard<'_, Functions> {
        self.functions.write().unwrap_or_else(PoisonError::into_inner)
    }

    async fn create(
        &self,
        record: FunctionRecord,
        request_id: Option<String>,
        staged: Staged,
    ) -> Result<FunctionRecord, CatalogError> {
        // Code that was there before is not this call's to remove.
        let mut new_code = BTreeSet::new();
        let created = {
            let _needed = self.collecting.read().await;
            match self.keep(staged, &mut new_code).await {
                Ok(()) => self.insert(&record, request_id).await.map_err(CatalogError::from),
                Err(error) => Err(error.into()),
            }
        };
        if !new_code.is_empty() && !matches!(created, Ok(Created::New)) {
            self.collect(new_code).await;
        }
        match created? {
            Created::New => {
                tracing::info!(
                    function = %record.name,
                    code = record.code_sha256,
                    bytes = record.code_size,
                    layers = record.layers.len(),
                    "created"
                );
                Ok(record)
            }
            Created::Replayed(answered) => Ok(*answered),
            Created::RequestReused => Err(CatalogError::RequestReused),
            Created::Deleted => Err(CatalogError::MadeAndDeleted(record.name)),
            Created::NameTaken => Err(CatalogError::AlreadyExists(record.name)),
            Created::Full => Err(CatalogError::Full {
                limit: self.limits().functions,
            }),
            Created::AccountFull(why) => Err(account_full(&record.name, why)),
        }
    }

    /// Keeps zips, and notes which of them were not there before.
    async fn keep(&self, staged: Staged, new: &mut BTreeSet<String>) -> Result<(), CodeError> {
        for zip in std::iter::once(staged.code).chain(staged.layers) {
            if self.codes.put(&zip.sha256, zip.file.path()).await? {
                new.insert(zip.sha256);
            }
        }
        Ok(())
    }

    fn limits(&self) -> Limits {
        self.limits.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn count(&self, account: &str) -> u32 {
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        functions.by_account.get(account).copied().unwrap_or(0)
    }

    /// Whether an account may have another function.
    fn may_create(&self, account: &str) -> Result<(), TooManyFunctions> {
        (self.may_create)(account, self.count(account))
    }

    async fn insert(&self, record: &FunctionRecord, request_id: Option<String>) -> Result<Created, StoreError> {
        let _alone = self.changing.lock().await;
        let new = NewFunction {
            record: record.clone(),
            request_id,
            limit: self.limits().functions,
            may_create: self.may_create(record.name.account()),
        };
        let created = self.store.create_function(new).await?;
        failpoints::reach(Failpoint::FunctionKept);
        if created == Created::New {
            self.write().insert(Function::new(record.clone(), &self.resizing));
        }
        Ok(created)
    }

    async fn set_resizing(&self, function: &Function, settings: Option<Resize>) -> Result<(), CatalogError> {
        let _alone = self.changing.lock().await;
        if !self.store.set_resizing(function.uid, settings).await? {
            return Err(CatalogError::NotFound(function.name.clone()));
        }
        function.resizing.set(settings, function.amount);
        tracing::info!(function = %function.name, mode = ?function.resize().mode, "set how its amount is fitted");
        Ok(())
    }

    async fn delete(&self, name: FunctionName) -> Result<(), CatalogError> {
        let deleted = {
            let _alone = self.changing.lock().await;
            let deleted = self.store.delete_function(name.clone()).await?;
            failpoints::reach(Failpoint::FunctionDeleted);
            if let Some(function) = self.write().remove(&name) {
                function.deleted.store(true, Ordering::Release);
            }
            deleted
        };
        let Some(deleted) = deleted else {
            return Err(CatalogError::NotFound(name));
        };
        tracing::info!(function = %name, "deleted");
        (self.deleted)(deleted.uid);
        self.collect(deleted.codes).await;
        Ok(())
    }

    /// Removes those of these zips that no function needs any more, after the backups that may need them. What can't be
    /// removed is an orphan.
    async fn collect(&self, codes: BTreeSet<String>) {
        let _alone = self.collecting.write().await;
        for sha256 in self.kept.removable(codes) {
            let removed = async {
                if !self.store.code_in_use(sha256.clone()).await? {
                    self.codes.remove(&sha256).await?;
                }
                Ok::<_, CatalogError>(())
            };
            if let Err(error) = removed.await {
                tracing::warn!(code = sha256, %error, "code that no function needs was left");
            }
        }
    }
}

// === impl Functions ===

impl Functions {
    fn insert(&mut self, function: Function) {
        let function = Arc::new(function);
        self.by_uid.insert(function.uid, function.clone());
        let account = function.name.account().to_owned();
        if self.by_name.insert(function.name.clone(), function).is_none() {
            *self.by_account.entry(account).or_default() += 1;
        }
    }

    fn remove(&mut self, name: &FunctionName) -> Option<Arc<Function>> {
        let function = self.by_name.remove(name)?;
        self.by_uid.remove(&function.uid);
        if let Some(count) = self.by_account.get_mut(name.account()) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.by_account.remove(name.account());
            }
        }
        Some(function)
    }
}

// === impl Function ===

impl Function {
    fn new(record: FunctionRecord, resizing: &ResizingDefaults) -> Self {
        Self {
            resizing: Resizing::new(&record, resizing.mode(record.name.account())),
            record,
            deleted: AtomicBool::new(false),
        }
    }

    /// How its amount is fitted to its use, with what was determined.
    #[must_use]
    pub fn resize(&self) -> Arc<Resize> {
        self.resizing.all()
    }

    /// What it says of that itself.
    #[must_use]
    pub fn own_resizing(&self) -> Option<Resize> {
        self.resizing.own()
    }

    /// What its executions are given now that name no amount of their own.
    #[must_use]
    pub fn effective_amount(&self) -> v1::Amount {
        resizing::effective(&self.record, &self.resizing.all())
    }

    /// Another amount was determined, which whoever decided that has kept.
    pub(crate) fn keep(&self, kept: Kept) {
        self.resizing.keep(kept);
    }

    /// Whether it was deleted since it was looked up. It is, before what runs it hears of that.
    #[must_use]
    pub fn is_deleted(&self) -> bool {
        self.deleted.load(Ordering::Acquire)
    }
}

#[cfg(test)]
impl From<FunctionRecord> for Function {
    fn from(record: FunctionRecord) -> Self {
        Self::new(record, &ResizingDefaults::default())
    }
}

impl Deref for Function {
    type Target = FunctionRecord;

    fn deref(&self) -> &FunctionRecord {
        &self.record
    }
}

fn account_full(name: &FunctionName, why: TooManyFunctions) -> CatalogError {
    CatalogError::AccountFull {
        account: name.parent(),
        why,
    }
}

fn zip_name(layer: Option<usize>) -> String {
    layer.map_or_else(|| "the zip".to_owned(), |number| format!("layer {number}"))
}

/// Time as the database keeps it, so that the first answer is the same as later ones.
fn to_millis(time: SystemTime) -> SystemTime {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let millis = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
    SystemTime::UNIX_EPOCH + Duration::from_millis(millis)
}

#[cfg(test)]
mod tests;
