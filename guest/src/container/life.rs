//! The life of one container: made, initialised, invoked, ended.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use stoker_linux::CgroupError;
use stoker_proto::excerpt::Excerpt;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::cgroup::Cgroup;
use super::containers::Places;
use super::end::{End, Failure, Kill};
use super::execution::{Execution, Meter};
use super::extensions;
use super::freezer::Freezer;
use super::launch::{Contents, LaunchError, Launcher, Order};
use super::log::Log;
use super::shutdown::Shutdown;
use super::{Function, environment, spec};
use crate::blocking;
use crate::budget::{self, Budget};
use crate::code::FunctionCode;
use crate::credits::{self, Credits};
use crate::logs::{Feeds, platform};
use crate::parts::Parts;
use crate::reaper::{Exit, Reaper};
use crate::runtime_api::{CreditsReport, Init, Invocation, Kind, NotBegun, Outcome, RuntimeApi, Sandbox, TelemetryApi};
use crate::scratch::{Folder, FolderError, Share};
use crate::telemetry::{Subject, Telemetry, Use};

/// The most that a container may write to file systems in memory, in bytes: Lambda's size of `/tmp`, which is there where the
/// machine has no drive.
const TMPFS_LIMIT: u64 = 512 << 20;
/// An answer that breaks off may be the first that is seen of the container's end, which says better what was wrong.
const END_AFTER_BREAK: Duration = Duration::from_millis(500);

/// A container that has initialised, or did not.
pub(crate) struct Container {
    id: String,
    function: Function,
    freezer: Arc<Freezer>,
    api: RuntimeApi,
    log: Log,
    /// When its init began.
    begun: Instant,
    /// How long that took, until an invocation has told of it.
    init: Mutex<Option<Duration>>,
    subject: Subject,
    credits: credits::Share,
    meter: Meter,
    shutdown: Arc<Shutdown>,
    ended: watch::Receiver<Option<Arc<End>>>,
}

/// What a container is made of.
pub(super) struct NewContainer<'a> {
    pub(super) id: String,
    pub(super) uid: u32,
    pub(super) function: Function,
    pub(super) code: FunctionCode,
    /// For `/tmp`.
    pub(super) share: Option<Share>,
    pub(super) launcher: Launcher,
    pub(super) reaper: &'a Reaper,
    pub(super) telemetry: &'a Telemetry,
    pub(super) credits: &'a Credits,
    pub(super) feeds: &'a Feeds,
    pub(super) places: &'a Places,
}

/// Why a container did not come to life.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CreateError {
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error("cannot make a pipe for the log: {0}")]
    Log(std::io::Error),
    #[error("cannot count what the container uses: {0}")]
    Telemetry(String),
    #[error(transparent)]
    Tmp(#[from] FolderError),
    #[error("cannot run a thread for the container: {0}")]
    Thread(std::io::Error),
}

/// What came of an invocation.
pub(crate) struct Answer {
    pub(crate) result: Result<Bytes, Failure>,
    pub(crate) log: Excerpt,
    pub(crate) execution: Execution,
    /// The container is no more.
    pub(crate) ended: bool,
}

/// What the Runtime API asks of it.
struct Inside {
    subject: Subject,
    credits: credits::Share,
    log: Log,
}

// === impl Inside ===

impl Sandbox for Inside {
    fn memory_peak_bytes(&self) -> u64 {
        self.subject.used().memory_peak_bytes
    }

    fn read_log(&self) {
        self.log.catch_up();
    }

    fn credits(&self) -> CreditsReport<'_> {
        Box::pin(self.credits.report())
    }
}

/// Kills and removes the cgroup when dropped, and then `/tmp`, unless it was handed to a container.
struct CgroupGuard {
    cgroup: Option<Arc<Cgroup>>,
    tmp: Option<Folder>,
}

// === impl CgroupGuard ===

impl Drop for CgroupGuard {
    fn drop(&mut self) {
        if let Some(cgroup) = self.cgroup.take() {
            let tmp = self.tmp.take();
            budget::spawn_uncounted(async move {
                discard(&cgroup).await;
                drop(tmp);
            });
        }
    }
}

// === impl Container ===

impl Container {
    /// Makes a container and runs the function's program in it. `over` is called when the container is no more.
    pub(super) async fn create(
        with: NewContainer<'_>,
        over: impl FnOnce(Arc<End>) + Send + 'static,
    ) -> Result<Self, CreateError> {
        let NewContainer {
            id,
            uid,
            function,
            code,
            share,
            launcher,
            reaper,
            telemetry,
            credits,
            feeds,
            places,
        } = with;
        let tmp = match share {
            Some(share) => {
                let made = blocking::on_a_thread("tmp", move || share.for_container(uid)).await;
                Some(made.map_err(CreateError::Thread)??)
            }
            None => None,
        };
        let cgroup = Arc::new(Cgroup::create(&places.cgroups, &id, &function.amount)?);
        let tmp_path = tmp.as_ref().map(|tmp| tmp.path().to_owned());
        let mut guard = CgroupGuard {
            cgroup: Some(Arc::clone(&cgroup)),
            tmp,
        };
        cgroup.boost_cpu(&function.amount)?;
        let subject = telemetry
            .count(&cgroup)
            .await
            .map_err(|error| CreateError::Telemetry(error.to_string()))?;
        let credits = credits.share(&cgroup, &subject, &function.amount);
        let budget = subject.budget().clone();
        let identity = environment::identity(&function);
        let telemetry_api = TelemetryApi::new(identity.clone());
        let listener_of_log = telemetry_api.clone();
        let tell = move |data: &[u8]| listener_of_log.write(Kind::Function, data);
        let (log, log_end) = Log::open(uid, feeds.feed(id.clone()), tell, &budget).map_err(CreateError::Log)?;
        log.lines().platform(&platform::init_start(function.runtime));
        let begun = Instant::now();
        let listener = launcher.ready().await?;
        let order = order(&id, uid, &function, &code, places, tmp_path.as_deref(), &cgroup);
        let created = launcher.create(reaper, order, log_end).await?;
        let inside = Inside {
            subject: subject.clone(),
            credits: credits.clone(),
            log: log.clone(),
        };
        let api = RuntimeApi::new(identity, telemetry_api, inside);
        // They end with the container, or where it does not come to life.
        let mut tasks = JoinSet::new();
        tasks.spawn(api.clone().serve(listener, budget.clone()));
        let mut launched = created.start().await?;
        let mut extension_names = None;
        if let Some(external) = launched.external.take() {
            let listener = api.telemetry().clone();
            let tell = move |data: &[u8]| listener.write(Kind::Extension, data);
            let added = log.add_extensions(external.output, tell, &budget);
            added.map_err(CreateError::Log)?;
            extension_names = Some(external.names);
        }
        guard.cgroup = None;
        let (sender, ended) = watch::channel(None);
        let freezer = Freezer::new(Arc::clone(&cgroup), api.clone());
        let shutdown = Arc::new(Shutdown {
            id: id.clone(),
            cgroup: Arc::clone(&cgroup),
            control: launched.control.clone(),
            freezer: Arc::clone(&freezer),
            api: api.clone(),
            runtime_runs: watch::Sender::new(false),
            ended: ended.clone(),
            why: Mutex::default(),
        });
        tasks.spawn(budget.counted(extensions::end_with_extension(api.clone(), Arc::clone(&shutdown))));
        if function.freeze {
            tasks.spawn(budget.counted(Arc::clone(&freezer).run()));
        }
        if let Some(names) = extension_names {
            api.expect_extensions(names);
            tasks.spawn(budget.counted(extensions::attend(Arc::clone(&shutdown))));
        }
        let cleanup = Cleanup {
            cgroup: Arc::clone(&cgroup),
            subject: subject.clone(),
            credits: credits.clone(),
            shutdown: Arc::clone(&shutdown),
            api: api.clone(),
            tasks,
            log: log.clone(),
            _tmp: guard.tmp.take(),
            _code: code,
        };
        budget::spawn_uncounted(async move {
            let exit = launched.exit().await;
            let end = Arc::new(cleanup.run(exit).await);
            sender.send_replace(Some(Arc::clone(&end)));
            over(end);
        });
        Ok(Self {
            id,
            function,
            freezer,
            api,
            log,
            begun,
            init: Mutex::default(),
            meter: Meter::new(subject.clone(), credits.clone()),
            subject,
            credits,
            shutdown,
            ended,
        })
    }

    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// Whether it has initialised and is not being ended.
    pub(crate) fn is_ready(&self) -> bool {
        self.api.is_initialised() && !self.killed() && !self.over()
    }

    /// What it has used so far.
    pub(crate) fn used(&self) -> Use {
        self.subject.used()
    }

    /// What may be spent on it.
    pub(crate) fn budget(&self) -> &Budget {
        self.subject.budget()
    }

    /// What it wrote since it was last asked.
    pub(crate) fn take_log(&self) -> Excerpt {
        self.log.take()
    }

    /// Waits until the function has initialised, and tells what that used. Where it does not the container is gone.
    pub(super) async fn initialise(&self) -> (Result<(), Failure>, Execution) {
        let initialised = self.until_initialised().await;
        let duration = self.begun.elapsed();
        let execution = self.executed(duration);
        match &initialised {
            Ok(()) => *self.init() = Some(duration),
            Err(failure) => {
                let report = platform::InitReport { duration, failure };
                self.log.lines().platform(&report.to_string());
            }
        }
        (initialised, execution)
    }

    async fn until_initialised(&self) -> Result<(), Failure> {
        let timeout = self.function.init_timeout;
        let mut ended = self.ended.clone();
        tokio::select! {
            biased;
            init = self.api.initialised() => match init {
                Init::Failed(outcome) => {
                    self.kill(Kill::InitFailed).await;
                    // A runtime that reports an "answer" to init does not come by the API.
                    Err(Failure::of_outcome(outcome).err().unwrap_or_else(|| Failure::setup(String::new())))
                }
                Init::Done | Init::Running => {
                    self.credits.initialised();
                    Ok(())
                }
            },
            end = end_of(&mut ended) => Err(end.failure.clone()),
            () = tokio::time::sleep(timeout) => Err(self.kill(Kill::InitTimeout(timeout)).await),
        }
    }

    /// Hands the function an invocation and waits for what comes of it. Where the container ends first, that is an answer
    /// only if the function may have begun. What it streams goes to `parts` where there are any, and the answer is its rest.
    pub(crate) async fn invoke(
        &self,
        request: String,
        payload: Bytes,
        timeout: Duration,
        parts: Option<Parts>,
    ) -> Result<Answer, NotBegun> {
        let deadline = Instant::now() + timeout;
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default() + timeout;
        let mut ended = self.ended.clone();
        tokio::select! {
            biased;
            () = self.api.extensions_ready() => {}
            _ = end_of(&mut ended) => return Err(NotBegun::Ended),
            () = tokio::time::sleep_until(deadline) => {
                // One of them is at work for the invocation before, and has had the time of both.
                self.kill(Kill::Timeout(timeout)).await;
                return Err(NotBegun::Ended);
            }
        }
        if self.killed() {
            return Err(NotBegun::Ended);
        }
        let lines_of: Arc<str> = request.as_str().into();
        let invocation = Invocation {
            id: request,
            payload,
            deadline_ms: u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX),
        };
        let outcome = self.api.invoke(invocation, parts)?;
        self.credits.wake();
        self.meter.begin();
        // Nothing runs between: the runtime is handed the invocation by another task of this thread.
        let begun = Instant::now();
        let lines = self.log.lines();
        lines.of_request(Some(Arc::clone(&lines_of)));
        lines.platform(&platform::start(&lines_of, environment::VERSION));
        self.freezer.thaw();
        let result = tokio::select! {
            biased;
            Ok(outcome) = outcome => {
                if outcome == Outcome::BrokenOff
                    && let Ok(end) = tokio::time::timeout(END_AFTER_BREAK, end_of(&mut ended)).await
                {
                    Err(end.failure.clone())
                } else {
                    Failure::of_outcome(outcome)
                }
            }
            end = end_of(&mut ended) => {
                if self.api.has_not_begun() {
                    self.log.lines().of_request(None);
                    return Err(NotBegun::Ended);
                }
                Err(end.failure.clone())
            }
            () = tokio::time::sleep_until(deadline) => Err(self.kill(Kill::Timeout(timeout)).await),
        };
        let duration = begun.elapsed();
        let execution = self.executed(duration);
        let log = self.take_log();
        let report = platform::Report {
            request: &lines_of,
            duration,
            init: self.init().take(),
            memory_mib: self.function.amount.memory_mib,
            peak_bytes: execution.used.memory_peak_bytes,
            failure: result.as_ref().err(),
        };
        lines.platform(&report.to_string());
        lines.of_request(None);
        Ok(Answer {
            result,
            log,
            execution,
            ended: self.over() || self.killed(),
        })
    }

    fn init(&self) -> MutexGuard<'_, Option<Duration>> {
        self.init.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it used since this was last called, in an execution that took so long.
    fn executed(&self, wall: Duration) -> Execution {
        let end = self.ended.borrow().clone();
        match end {
            Some(end) => self.meter.end(wall, end.used, true),
            None => self.meter.end(wall, self.used(), self.killed()),
        }
    }

    /// Ends it and everything in it; resolves when it is gone. One with extensions has time to end by itself.
    pub(crate) async fn stop(&self) {
        self.kill(Kill::Stop).await;
    }

    /// Whether it is no more.
    pub(super) fn over(&self) -> bool {
        self.ended.borrow().is_some()
    }

    /// Whether it is being killed.
    fn killed(&self) -> bool {
        self.shutdown.why().is_some()
    }

    async fn kill(&self, why: Kill) -> Failure {
        self.shutdown.run(why).await
    }
}

/// What is left to do when a container has ended.
struct Cleanup {
    cgroup: Arc<Cgroup>,
    subject: Subject,
    credits: credits::Share,
    shutdown: Arc<Shutdown>,
    api: RuntimeApi,
    tasks: JoinSet<()>,
    log: Log,
    /// Kept while the container lives, as the next.
    _tmp: Option<Folder>,
    _code: FunctionCode,
}

// === impl Cleanup ===

impl Cleanup {
    async fn run(self, exit: Option<Exit>) -> End {
        self.api.end();
        drop(self.tasks);
        let out_of_memory = self.cgroup.ran_out_of_memory();
        let kill = self.shutdown.why();
        let used = self.subject.used();
        self.credits.end();
        discard(&self.cgroup).await;
        // They are gone: all that they wrote is there.
        self.log.catch_up();
        End {
            stopped: kill.as_ref().is_some_and(Kill::is_told),
            failure: Failure::of_end(kill, out_of_memory, exit),
            used,
        }
    }
}

async fn end_of(ended: &mut watch::Receiver<Option<Arc<End>>>) -> Arc<End> {
    let end = ended.wait_for(Option::is_some).await;
    let end = end.ok().and_then(|end| end.clone());
    match end {
        Some(end) => end,
        // Its task tells before it ends.
        None => std::future::pending().await,
    }
}

async fn discard(cgroup: &Cgroup) {
    if let Err(error) = cgroup.remove().await {
        tracing::error!("{error}");
    }
}

fn order(
    id: &str,
    uid: u32,
    function: &Function,
    code: &FunctionCode,
    places: &Places,
    tmp: Option<&Path>,
    cgroup: &Cgroup,
) -> Order {
    // What is written there is memory of the container's: half of it may be, so that a function that writes without end
    // sees a full disk before it runs out of memory.
    let tmpfs_bytes = (u64::from(function.amount.memory_mib) << 19).min(TMPFS_LIMIT);
    let cgroup_path = cgroup.path_in_hierarchy();
    let spec = spec::build(
        function,
        id,
        uid,
        &spec::Parts {
            code: code.own.path(),
            layers: !code.layers.is_empty(),
            tmpfs: &places.tmpfs,
            tmp,
            root: &places.root,
            cgroup: &cgroup_path,
        },
    );
    Order {
        id: id.to_owned(),
        spec,
        root: places.root.clone(),
        tmpfs: places.tmpfs.clone(),
        tmpfs_bytes,
        contents: Contents::Function {
            uid,
            image: places.image.clone(),
            layers: code.layers.iter().map(|layer| layer.path().to_owned()).collect(),
        },
    }
}
