//! `stokerd`: puts the parts together, serves, and takes them apart again in order.

mod health;
mod notify;
mod reload;
mod signals;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use stoker_proto::v1;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use ulid::Ulid;

use crate::accounts::Accounts;
use crate::address::AddressError;
use crate::api::accounts::Accounts as AccountService;
use crate::api::admin::Admin;
use crate::api::code::Code;
use crate::api::credits::Credits;
use crate::api::decisions::Decisions;
use crate::api::functions::Functions;
use crate::api::health::Health;
use crate::api::held::Counted;
use crate::api::images::Images as ImageService;
use crate::api::invocations::Invocations;
use crate::api::listen::{self, ListenError, Listeners};
use crate::api::logs;
use crate::api::machines::Machines;
use crate::api::notifications::Notifications;
use crate::api::telemetry::Telemetry;
use crate::api::{self, Api, ApiError};
use crate::boot_files::{self, BootFileError};
use crate::catalog::{Catalog, CatalogError, Deleted, ResizingDefaults};
use crate::code::{CodeError, CodeStore};
use crate::config::Config;
use crate::files::{self, FileError};
use crate::function_logs::Logs;
use crate::host::{self, HostError, HostHandle, MicroVms};
use crate::images::{Images, ImagesError};
use crate::lock::{Lock, LockError};
use crate::logs::Level;
use crate::metrics;
use crate::names::FunctionName;
use crate::report::Reporter;
use crate::store::{Store, StoreError};
use crate::tasks::{Died, Essential, Task};
use reload::Reload;
use signals::Signals;

/// How long the controller has, at the end, to acknowledge what it has not yet. The rest is sent after the next start.
const FLUSH: Duration = Duration::from_secs(2);

/// How long it may take to empty the database's log, which spares the next start to read it.
const EMPTY_LOG: Duration = Duration::from_secs(2);

/// The largest request about machines, in bytes: a program with its environment, and thresholds. One about a program or a connection that
/// goes on is no larger, so that callers who send much are held back.
const MACHINES_MESSAGE: usize = 256 << 10;

/// Why the agent did not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Another agent is running, or the lock can't be taken.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A folder is not this user's alone.
    #[error(transparent)]
    Folder(#[from] FileError),
    /// A file that machines boot is missing or damaged.
    #[error(transparent)]
    BootFile(#[from] BootFileError),
    /// It can't listen where it should.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The code store.
    #[error(transparent)]
    Code(#[from] CodeError),
    /// The functions can't be read.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// Images can't be used.
    #[error(transparent)]
    Images(#[from] ImagesError),
    /// The controller's address, which the configuration's check would have found.
    #[error("controller.address: {0}")]
    Address(#[from] AddressError),
    /// Machines can't be run here.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The API can't be served.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// A part of starting panicked; the log says where.
    #[error("a part of the agent panicked: {0}")]
    Panicked(#[from] tokio::task::JoinError),
    /// It can't hear signals.
    #[error("can't listen to signals: {0}")]
    Signals(#[source] std::io::Error),
    /// A task has ended that it can't go on without.
    #[error(transparent)]
    Died(#[from] Died),
}

// === impl DaemonError ===

impl DaemonError {
    /// Whether the configuration is wrong, so that another start with it fails too.
    #[must_use]
    pub fn is_of_configuration(&self) -> bool {
        matches!(self, Self::Address(_) | Self::Host(HostError::Rules(_)))
    }
}

/// What is ready before anything is served.
struct Ready {
    config: Config,
    store: Store,
    codes: CodeStore,
    images: Images,
    /// Held as long as the agent runs.
    _locks: Vec<Lock>,
}

/// Runs the agent, by a configuration that was read from a file, until it is told to stop, or an essential task ends. The
/// process has to end then without ending its tasks first, for these hold the machines' connections.
///
/// # Errors
///
/// [`DaemonError`] says what is wrong and what to do.
pub async fn run(config: Config, file: Option<PathBuf>, level: Level) -> Result<(), DaemonError> {
    let begun = Instant::now();
    let essential = Essential::default();
    // As the file has it.
    let running = config.clone();
    let Signals {
        leave,
        drain: stop,
        reload,
    } = Signals::listen(&essential).map_err(DaemonError::Signals)?;
    let address = config.controller.address.as_deref().map(str::parse).transpose()?;
    let Ready {
        config,
        store,
        codes,
        images,
        _locks,
    } = tokio::task::spawn_blocking(move || prepare(config)).await??;
    tracing::debug!(after = ?begun.elapsed(), "the database is open");
    let listeners = Listeners::bind(&config.api).await?;
    let scraped = match config.metrics.address {
        Some(address) => Some(listen::tcp(address, "metrics.address").await?),
        None => None,
    };
    let ended = CancellationToken::new();
    let _end = ended.clone().drop_guard();
    let database = store.clone();
    essential.spawn(Task::Store, async move { database.ended().await });
    let reporter = Reporter::start(store.clone(), address, &config.controller, &essential, ended.clone());
    // Of rules that can't work one hears before machines are looked for.
    let accounts = Accounts::open(&config, host::rules(&config)?, store.clone()).await?;
    let (of_machines, owner) = (config.machines.clone(), store.owner().clone());
    let launcher = tokio::task::spawn_blocking(move || MicroVms::open(&of_machines, owner));
    let (deleted, deletions) = mpsc::unbounded_channel();
    let catalog = catalog(&config, &accounts, &store, codes.clone(), deleted).await?;
    let launcher = launcher.await??;
    tracing::debug!(after = ?begun.elapsed(), "machines are found, and counted");
    let functions = catalog.clone();
    let exists = move |name: &FunctionName, uid: Ulid| functions.get(name).is_some_and(|function| function.uid == uid);
    let logs = Logs::start(&config.store.path, &config.logs, Arc::new(exists), &essential);
    let functions = catalog.clone();
    let host = HostHandle::start(host::Deps {
        config: config.clone(),
        limits: accounts.all_set(),
        launcher: Arc::new(launcher.clone()),
        store: store.clone(),
        code: codes,
        logs: logs.clone(),
        find: Arc::new(move |uid| functions.find(uid)),
        reporter: reporter.clone(),
        essential: essential.clone(),
    })
    .await?;
    tracing::debug!(after = ?begun.elapsed(), "kept answers are known");
    let (interval, intervals) = watch::channel(config.telemetry.interval);
    let usage = host::report_use(host.clone(), reporter.clone(), intervals, ended);
    essential.spawn(Task::Usage, usage);
    essential.spawn(
        Task::Deletions,
        tell_of_deletions(host.clone(), logs.clone(), deletions),
    );
    essential.spawn(Task::Images, images.clone().sweep());
    let reloading = Reload {
        file,
        running,
        parts: reload::Parts {
            level,
            catalog: catalog.clone(),
            interval,
        },
    };
    let api = services(&config, accounts, catalog, images, &store, &host, logs, &stop)?;
    tracing::info!(
        socket = %config.api.socket.display(),
        tcp = ?config.api.tcp,
        metrics = ?config.metrics.address,
        host = %store.host(),
        version = env!("CARGO_PKG_VERSION"),
        started_in = ?begun.elapsed(),
        "serving"
    );
    notify::ready().await;
    // Not before: what they tell systemd is of an agent that serves.
    essential.spawn(Task::Reload, reload::run(reloading, reload));
    let (health, healthy) = watch::channel(Health::GOOD);
    essential.spawn(Task::Health, health::run(host.clone(), store.clone(), health));
    if let Some(listener) = scraped {
        let telemetry = launcher.telemetry().clone();
        let sources = metrics::Sources::new(&config, host.clone(), store.clone(), telemetry, healthy.clone());
        essential.spawn(Task::Metrics, metrics::serve(listener, sources));
    }
    let drain = config.api.drain_timeout;
    let drained = async {
        stop.cancelled().await;
        notify::stopping().await;
        tracing::info!(limit = ?drain, "stopping: no new calls, what runs is finished");
        host.drain(drain).await;
        Ok(())
    };
    let serving = api.serve(listeners, &config.limits, drain, stop.clone(), healthy);
    let served = tokio::select! {
        served = async { tokio::try_join!(serving, drained) } => served.map(|_| ()).map_err(DaemonError::from),
        died = essential.died() => Err(died.into()),
        () = leave.cancelled() => {
            self::leave(&host, &store).await;
            tracing::info!("stopped; machines go on, and the next start takes them over");
            return Ok(());
        }
    };
    if served.is_err() {
        // As much as can be kept: what is dead answers at once or not in time. Machines go on.
        self::leave(&host, &store).await;
        return served;
    }
    launcher.stop_counting();
    if !reporter.flush(FLUSH).await {
        tracing::info!("some reports are not acknowledged; they are kept and sent after the next start");
    }
    tracing::info!("stopped");
    Ok(())
}

/// Ends without the machines, for an agent that takes them over.
async fn leave(host: &HostHandle, store: &Store) {
    notify::stopping().await;
    host.leave().await;
    if !matches!(tokio::time::timeout(EMPTY_LOG, store.empty_log()).await, Ok(Ok(()))) {
        tracing::warn!("the database's log of changes is not empty; the next start reads it");
    }
}

/// Everything that blocks: locks, files, database. Answers with the configuration, the VMM's path found out.
fn prepare(mut config: Config) -> Result<Ready, DaemonError> {
    for folder in [&config.store.path, &config.code.path] {
        files::make_own_dir(folder)?;
    }
    files::make_own_dir(&config.machines.scratch_dir)?;
    let mut locks = vec![Lock::folder(&config.store.path, "store.path")?];
    if config.code.path != config.store.path {
        locks.push(Lock::folder(&config.code.path, "code.path")?);
    }
    config.machines.vmm = boot_files::check(&config.machines)?;
    let store = Store::open_with_key(&config.store.path, &config.store.key())?;
    let codes = CodeStore::open(&config.code.path, store.owner())?;
    let images = Images::open(&config)?;
    Ok(Ready {
        config,
        store,
        codes,
        images,
        _locks: locks,
    })
}

/// The functions; `to` hears of those that are deleted.
async fn catalog(
    config: &Config,
    accounts: &Accounts,
    store: &Store,
    codes: CodeStore,
    to: mpsc::UnboundedSender<String>,
) -> Result<Catalog, CatalogError> {
    let deleted: Deleted = Arc::new(move |uid| {
        // Without a host there are no containers of it.
        let _ = to.send(uid);
    });
    let (limits, grace) = (config.limits.clone(), config.code.orphan_grace);
    let resizing = ResizingDefaults::of(config);
    let may_create = accounts.may_create();
    Catalog::open(store.clone(), codes, limits, grace, resizing, may_create, deleted).await
}

/// Lets the host end the containers of functions that are no more, and removes what they have written.
async fn tell_of_deletions(host: HostHandle, logs: Logs, mut deletions: mpsc::UnboundedReceiver<String>) {
    while let Some(uid) = deletions.recv().await {
        match uid.parse() {
            Ok(uid) => {
                host.function_deleted(uid).await;
                logs.function_deleted(uid).await;
            }
            Err(error) => tracing::error!(uid, %error, "a function's containers are left"),
        }
    }
}

#[expect(clippy::too_many_arguments, reason = "all that services stand on, once")]
fn services(
    config: &Config,
    accounts: Accounts,
    catalog: Catalog,
    images: Images,
    store: &Store,
    host: &HostHandle,
    logs: Logs,
    stop: &CancellationToken,
) -> Result<Api, DaemonError> {
    let accounts_service = AccountService::new(accounts, catalog.clone(), host.clone());
    let functions = Functions::new(catalog.clone(), host.largest_amount());
    let invocations = Invocations::new(catalog.clone(), host.clone());
    let max_message = api::max_message(&config.limits);
    Ok(Api::new()?
        .with(v1::functions_server::FunctionsServer::new(functions))
        .with(v1::code_server::CodeServer::new(Code::new(catalog.clone())))
        .with(v1::images_server::ImagesServer::new(ImageService::new(
            images.clone(),
            catalog.clone(),
        )))
        .with(v1::logs_server::LogsServer::new(logs::Logs::new(
            catalog.clone(),
            host.clone(),
            logs,
            stop.clone(),
        )))
        .with(v1::admin_server::AdminServer::new(Admin::new(catalog, store.clone())))
        .with(Counted::new(
            v1::invocations_server::InvocationsServer::new(invocations)
                .max_decoding_message_size(max_message)
                .max_encoding_message_size(max_message),
            host.memory().clone(),
        ))
        .with(
            v1::machines_server::MachinesServer::new(Machines::new(host.clone(), images))
                .max_decoding_message_size(MACHINES_MESSAGE),
        )
        .with(v1::credits_server::CreditsServer::new(Credits::new(host.clone())))
        .with(v1::accounts_server::AccountsServer::new(accounts_service))
        .with(v1::notifications_server::NotificationsServer::new(Notifications::new(
            store.clone(),
            host.clone(),
            stop.clone(),
        )))
        .with(v1::decisions_server::DecisionsServer::new(Decisions::new(host.clone())))
        .with(v1::telemetry_server::TelemetryServer::new(Telemetry::new(
            host.clone(),
            stop.clone(),
        ))))
}
