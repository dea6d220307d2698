//! The `Functions` service.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use stoker_proto::v1;
use stoker_proto::v1::create_function_request::Part;
use stoker_proto::v1::functions_server;
use tempfile::NamedTempFile;
use tokio::sync::{RwLock, Semaphore, mpsc};
use tonic::{Request, Response, Status, Streaming};
use ulid::Ulid;

use super::errors::{Violations, already_exists, exhausted, internal, invalid, not_found};
use super::validate::{self, Draft};
use crate::capacity::Capacity;
use crate::code::{CodeError, CodeStore};
use crate::config::Limits;
use crate::names::{AccountName, FunctionName};
use crate::store::{Created, FunctionRecord, NewFunction, RequestId, Store};
use stoker_archive::{self as archive, ArchiveError, Limits as ArchiveLimits};

/// The most bytes of a zip in one message.
const MAX_CHUNK: usize = 1 << 20;

/// How many messages of a zip wait to be written.
const CHUNK_QUEUE: usize = 4;

/// How long a caller may pause in the middle of a zip.
const UPLOAD_PAUSE: Duration = Duration::from_secs(60);

/// How long a zip may take to come in: who sends one byte a minute would else keep others from it.
const UPLOAD_LIMIT: Duration = Duration::from_secs(15 * 60);

/// Functions on a page where the caller names no number, and the most on one.
const PAGE: (usize, usize) = (100, 1000);

/// Told the unique id of every function that is deleted, so that what runs it can end.
pub type Deleted = Arc<dyn Fn(String) + Send + Sync>;

/// Deploys, shows and deletes functions.
pub struct Functions {
    shared: Arc<Shared>,
    uploads: Arc<Semaphore>,
}

struct Shared {
    store: Store,
    codes: CodeStore,
    limits: Limits,
    capacity: Capacity,
    deleted: Deleted,
    /// Held for reading from keeping code until a function needs it, for writing while code that no function needs is
    /// removed: so that nobody removes what another is about to need.
    gate: RwLock<()>,
}

/// A zip that has come in.
struct Staged {
    file: NamedTempFile,
    sha256: String,
    size: u64,
}

// === impl Functions ===

impl Functions {
    /// A service over this state.
    pub fn new(store: Store, codes: CodeStore, limits: Limits, capacity: Capacity, deleted: Deleted) -> Self {
        let uploads = limits.concurrent_uploads.try_into().unwrap_or(usize::MAX);
        Self {
            shared: Arc::new(Shared {
                store,
                codes,
                limits,
                capacity,
                deleted,
                gate: RwLock::new(()),
            }),
            uploads: Arc::new(Semaphore::new(uploads.min(Semaphore::MAX_PERMITS))),
        }
    }

    /// Writes a zip to a file as it comes in, and hashes it.
    async fn receive(&self, parts: &mut Streaming<v1::CreateFunctionRequest>) -> Result<Staged, Status> {
        let limit = u64::from(self.shared.limits.zip_mib) << 20;
        let (chunks, writing) = stage(self.shared.codes.clone());
        let mut size = 0;
        loop {
            let part = tokio::time::timeout(UPLOAD_PAUSE, parts.message())
                .await
                .map_err(|_| Status::deadline_exceeded(format!("no part of the zip came for {UPLOAD_PAUSE:?}")))??;
            let Some(part) = part else { break };
            let chunk = match part.part {
                Some(Part::Chunk(chunk)) => chunk,
                Some(Part::Header(_)) => {
                    return Err(invalid("header", "must be the first message only"));
                }
                None => return Err(invalid("part", "must be a chunk of the zip")),
            };
            if chunk.len() > MAX_CHUNK {
                return Err(invalid("chunk", format!("must be at most {MAX_CHUNK} bytes")));
            }
            size += chunk.len() as u64;
            if size > limit {
                return Err(exhausted(
                    "code",
                    format!(
                        "the zip is larger than {} MiB; leave out what the function does not need",
                        self.shared.limits.zip_mib
                    ),
                ));
            }
            if chunks.send(chunk).await.is_err() {
                break;
            }
        }
        drop(chunks);
        match writing.await {
            Ok(staged) => staged.map_err(|error| internal("take in the zip", &error)),
            Err(error) => Err(internal("take in the zip", &error)),
        }
    }
}

/// Starts a thread that writes what is sent to it; it ends, with the file, when the sender is dropped.
fn stage(codes: CodeStore) -> (mpsc::Sender<Bytes>, tokio::task::JoinHandle<Result<Staged, CodeError>>) {
    let (sender, mut chunks) = mpsc::channel::<Bytes>(CHUNK_QUEUE);
    let writing = tokio::task::spawn_blocking(move || {
        let mut file = codes.stage()?;
        let mut hash = Sha256::new();
        let mut size = 0;
        while let Some(chunk) = chunks.blocking_recv() {
            hash.update(&chunk);
            size += chunk.len() as u64;
            file.write_all(&chunk).map_err(|source| CodeError::Staging {
                operation: "write",
                source,
            })?;
        }
        Ok(Staged {
            file,
            sha256: hex(&hash.finalize()),
            size,
        })
    });
    (sender, writing)
}

#[tonic::async_trait]
impl functions_server::Functions for Functions {
    async fn create_function(
        &self,
        request: Request<Streaming<v1::CreateFunctionRequest>>,
    ) -> Result<Response<v1::Function>, Status> {
        let mut parts = request.into_inner();
        let header = match parts.message().await?.and_then(|first| first.part) {
            Some(Part::Header(header)) => header,
            _ => return Err(invalid("header", "must be the first message")),
        };
        let mut violations = Violations::default();
        let draft = validate::function(&header, self.shared.capacity, &mut violations);
        violations.check()?;
        let draft = draft.ok_or_else(|| invalid("function", "is missing"))?;
        self.shared.refuse_early(&draft.name, &header.request_id).await?;
        // Never closed.
        let _permit = self.uploads.clone().acquire_owned().await;
        let received = tokio::time::timeout(UPLOAD_LIMIT, self.receive(&mut parts)).await;
        let staged =
            received.map_err(|_| Status::deadline_exceeded(format!("the zip took more than {UPLOAD_LIMIT:?}")))??;
        let staged = check(staged, &draft, &self.shared.limits).await?;
        // Not given up in the middle where the caller leaves: either all of it is kept or nothing.
        let keeping = tokio::spawn(self.shared.clone().keep(draft, header.request_id, staged));
        match keeping.await {
            Ok(kept) => kept.map(Response::new),
            Err(error) => Err(internal("keep the function", &error)),
        }
    }

    async fn get_function(&self, request: Request<v1::GetFunctionRequest>) -> Result<Response<v1::Function>, Status> {
        let name = function_name(&request.into_inner().name)?;
        let found = self.shared.store.function(name.clone()).await;
        match found.map_err(|error| internal("look up the function", &error))? {
            Some(record) => Ok(Response::new((&record).into())),
            None => Err(not_found("function", &name.to_string())),
        }
    }

    async fn list_functions(
        &self,
        request: Request<v1::ListFunctionsRequest>,
    ) -> Result<Response<v1::ListFunctionsResponse>, Status> {
        let request = request.into_inner();
        let page = Page::of(&request)?;
        let mut records = self
            .shared
            .store
            .functions(page.account, page.after, page.size + 1)
            .await
            .map_err(|error| internal("list functions", &error))?;
        let more = records.len() > page.size;
        records.truncate(page.size);
        let next_page_token = match records.last() {
            Some(last) if more => last.name.to_string(),
            _ => String::new(),
        };
        Ok(Response::new(v1::ListFunctionsResponse {
            functions: records.iter().map(Into::into).collect(),
            next_page_token,
        }))
    }

    async fn delete_function(&self, request: Request<v1::DeleteFunctionRequest>) -> Result<Response<()>, Status> {
        let name = function_name(&request.into_inner().name)?;
        let shared = self.shared.clone();
        let deleting = tokio::spawn(async move { shared.delete(name).await });
        match deleting.await {
            Ok(deleted) => deleted.map(Response::new),
            Err(error) => Err(internal("delete the function", &error)),
        }
    }
}

/// Checks a zip on a thread of its own.
async fn check(staged: Staged, draft: &Draft, limits: &Limits) -> Result<Staged, Status> {
    let limits = ArchiveLimits {
        unzipped_bytes: u64::from(limits.unzipped_mib) << 20,
        entries: limits.zip_entries.try_into().unwrap_or(usize::MAX),
    };
    let (runtime, handler) = (draft.runtime.clone(), draft.handler.clone());
    let checking = tokio::task::spawn_blocking(move || {
        let checked = archive::check(staged.file.as_file(), &runtime, &handler, limits);
        checked.map(|_| staged)
    });
    match checking.await {
        Ok(Ok(staged)) => Ok(staged),
        Ok(Err(error)) => Err(refused(&error)),
        Err(error) => Err(internal("check the zip", &error)),
    }
}

fn refused(error: &ArchiveError) -> Status {
    match error {
        ArchiveError::Io(_) => internal("read the zip", error),
        ArchiveError::TooLarge { .. } | ArchiveError::TooManyEntries { .. } => exhausted("code", error.to_string()),
        ArchiveError::Handler(_) => invalid("function.handler", error.to_string()),
        _ => invalid("code", error.to_string()),
    }
}

// === impl Shared ===

impl Shared {
    /// Spares a caller the upload where its name is taken. It is decided again when the function is made.
    async fn refuse_early(&self, name: &FunctionName, request_id: &str) -> Result<(), Status> {
        let failed = |error| internal("look up the function", &error);
        let taken = self.store.function(name.clone()).await.map_err(failed)?.is_some();
        let (account, id) = (name.account().to_owned(), request_id.to_owned());
        if taken && !self.store.request_is_known(account, id).await.map_err(failed)? {
            return Err(already_exists("function", &name.to_string()));
        }
        Ok(())
    }

    /// Keeps code and function, or nothing.
    async fn keep(self: Arc<Self>, draft: Draft, request_id: String, staged: Staged) -> Result<v1::Function, Status> {
        let record = FunctionRecord {
            name: draft.name,
            uid: Ulid::generate(),
            runtime: draft.runtime,
            handler: draft.handler,
            environment: draft.environment,
            timeout: draft.timeout,
            amount: draft.amount,
            version: 1,
            code_sha256: staged.sha256.clone(),
            code_size: staged.size,
            create_time: to_millis(SystemTime::now()),
        };
        let request = (!request_id.is_empty()).then(|| RequestId {
            id: request_id,
            fingerprint: fingerprint(&record),
        });
        let name = record.name.to_string();
        let created = {
            let _needed = self.gate.read().await;
            self.codes
                .put(&staged.sha256, staged.file.path())
                .await
                .map_err(|error| internal("keep the zip", &error))?;
            let new = NewFunction {
                record: record.clone(),
                request,
                limit: self.limits.functions,
            };
            self.store.create_function(new).await
        };
        if !matches!(created, Ok(Created::New)) {
            self.collect([staged.sha256].into()).await;
        }
        match created.map_err(|error| internal("keep the function", &error))? {
            Created::New => {
                tracing::info!(
                    function = name,
                    code = record.code_sha256,
                    bytes = record.code_size,
                    "created"
                );
                Ok((&record).into())
            }
            Created::Replayed(function) => Ok(*function),
            Created::RequestReused => Err(invalid(
                "request_id",
                "was used for a request with other content; use a new one",
            )),
            Created::NameTaken => Err(already_exists("function", &name)),
            Created::Full => Err(exhausted(
                "functions",
                format!(
                    "this host has as many functions as it may ({}); delete some or raise limits.functions",
                    self.limits.functions
                ),
            )),
        }
    }

    async fn delete(&self, name: FunctionName) -> Result<(), Status> {
        let deleted = self.store.delete_function(name.clone()).await;
        let deleted = deleted
            .map_err(|error| internal("delete the function", &error))?
            .ok_or_else(|| not_found("function", &name.to_string()))?;
        tracing::info!(function = %name, "deleted");
        (self.deleted)(deleted.uid);
        self.collect(deleted.codes).await;
        Ok(())
    }

    /// Removes those of these zips that no function needs any more. Where that fails, the next start does it.
    async fn collect(&self, codes: BTreeSet<String>) {
        let _alone = self.gate.write().await;
        for sha256 in codes {
            let removed = match self.store.code_in_use(sha256.clone()).await {
                Ok(true) => Ok(()),
                Ok(false) => self.codes.remove(&sha256).await.map_err(|e| e.to_string()),
                Err(error) => Err(error.to_string()),
            };
            if let Err(error) = removed {
                tracing::warn!(code = sha256, error, "code that nobody needs was left");
            }
        }
    }
}

/// A digest of all that was asked for, so that a request id is not used for two things.
fn fingerprint(record: &FunctionRecord) -> String {
    let mut hash = Sha256::new();
    let mut part = |bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    part(record.name.to_string().as_bytes());
    part(record.runtime.as_bytes());
    part(record.handler.as_bytes());
    part(&record.timeout.as_nanos().to_le_bytes());
    part(&record.amount.cpu_millis.to_le_bytes());
    part(&record.amount.memory_mib.to_le_bytes());
    part(record.code_sha256.as_bytes());
    for (name, value) in &record.environment {
        part(name.as_bytes());
        part(value.as_bytes());
    }
    hex(&hash.finalize())
}

/// What of a list is asked for.
struct Page {
    account: Option<String>,
    after: Option<FunctionName>,
    size: usize,
}

impl Page {
    /// A page token is the last name of the page before.
    fn of(request: &v1::ListFunctionsRequest) -> Result<Self, Status> {
        let mut violations = Violations::default();
        let account = match request.parent.as_str() {
            "accounts/-" => None,
            parent => match parent.parse::<AccountName>() {
                Ok(name) => Some(name.account().to_owned()),
                Err(error) => {
                    violations.add("parent", format!("{error}; `accounts/-` lists those of all"));
                    None
                }
            },
        };
        let size = match usize::try_from(request.page_size) {
            Ok(0) => PAGE.0,
            Ok(size) => size.min(PAGE.1),
            Err(_) => {
                violations.add("page_size", "must not be negative");
                PAGE.0
            }
        };
        let after = match request.page_token.as_str() {
            "" => None,
            token => {
                let name = token.parse::<FunctionName>().ok();
                let fits = name
                    .as_ref()
                    .is_some_and(|name| account.as_deref().is_none_or(|a| a == name.account()));
                if !fits {
                    violations.add("page_token", "is not one that the list of this parent gave");
                }
                name
            }
        };
        violations.check()?;
        Ok(Self { account, after, size })
    }
}

fn function_name(name: &str) -> Result<FunctionName, Status> {
    name.parse()
        .map_err(|error: crate::names::NameError| invalid("name", error.to_string()))
}

/// Time as the database keeps it, so that the first answer is the same as later ones.
fn to_millis(time: SystemTime) -> SystemTime {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let millis = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
    SystemTime::UNIX_EPOCH + Duration::from_millis(millis)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
