//! The life of one container: made, initialised, invoked, ended.

use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use stoker_linux::CgroupError;
use stoker_proto::excerpt::Excerpt;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

use super::cgroup::Cgroup;
use super::containers::Places;
use super::end::{End, Failure, Kill};
use super::extensions;
use super::freezer::Freezer;
use super::launch::{LaunchError, Launcher, Order};
use super::log::Log;
use super::pipe::Pipe;
use super::shutdown::Shutdown;
use super::{Function, environment, spec};
use crate::budget::{Budget, Budgets};
use crate::code::FunctionCode;
use crate::logs::{Feeds, platform};
use crate::parts::Parts;
use crate::reaper::{Exit, Reaper};
use crate::runtime_api::{Init, Invocation, Kind, NotBegun, Outcome, RuntimeApi, Sandbox, TelemetryApi};
use crate::telemetry::{Subject, Telemetry, Use};

/// Lambda's size of `/tmp`, the most that a container may write.
const SCRATCH_LIMIT: u64 = 512 << 20;
/// An answer that breaks off may be the first that is seen of the container's end, which says better what was wrong.
const END_AFTER_BREAK: Duration = Duration::from_millis(500);
/// How long the last words of extensions are waited for once all processes are gone.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// A container that has initialised, or did not.
pub(crate) struct Container {
    id: String,
    function: Function,
    cgroup: Arc<Cgroup>,
    freezer: Arc<Freezer>,
    api: RuntimeApi,
    log: Log,
    /// When its init began.
    begun: Instant,
    /// How long that took, until an invocation has told of it.
    init: Mutex<Option<Duration>>,
    subject: Subject,
    budget: Budget,
    /// What it had used at its last answer, or after its init.
    accounted: Mutex<Use>,
    shutdown: Arc<Shutdown>,
    ended: watch::Receiver<Option<Arc<End>>>,
}

/// What a container is made of.
pub(super) struct NewContainer<'a> {
    pub(super) id: String,
    pub(super) uid: u32,
    pub(super) function: Function,
    pub(super) code: FunctionCode,
    pub(super) launcher: Launcher,
    pub(super) reaper: &'a Reaper,
    pub(super) telemetry: &'a Telemetry,
    pub(super) feeds: &'a Feeds,
    pub(super) budgets: &'a Budgets,
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
}

/// What came of an invocation.
pub(crate) struct Answer {
    pub(crate) result: Result<Bytes, Failure>,
    pub(crate) log: Excerpt,
    pub(crate) used: Use,
    /// The container is no more.
    pub(crate) ended: bool,
}

/// What the Runtime API asks of it.
struct Inside {
    subject: Subject,
    log: Log,
}

// === impl Inside ===

impl Sandbox for Inside {
    fn memory_peak_bytes(&self) -> u64 {
        self.subject.used().memory_peak_bytes
    }

    fn read_log(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(self.log.catch_up())
    }
}

/// Kills and removes the cgroup when dropped, unless it was handed to a container.
struct CgroupGuard(Option<Arc<Cgroup>>);

// === impl CgroupGuard ===

impl Drop for CgroupGuard {
    fn drop(&mut self) {
        if let Some(cgroup) = self.0.take() {
            tokio::spawn(async move { discard(&cgroup).await });
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
            launcher,
            reaper,
            telemetry,
            feeds,
            budgets,
            places,
        } = with;
        let budget = budgets.budget();
        let cgroup = Arc::new(Cgroup::create(&places.cgroups, &id, &function.amount)?);
        let mut guard = CgroupGuard(Some(Arc::clone(&cgroup)));
        cgroup.boost_cpu(&function.amount)?;
        let subject = telemetry
            .count(&cgroup, &budget)
            .await
            .map_err(|error| CreateError::Telemetry(error.to_string()))?;
        let identity = environment::identity(&function);
        let telemetry_api = TelemetryApi::new(identity.clone());
        let listener_of_log = telemetry_api.clone();
        let listener_of_log = move |data: &[u8]| listener_of_log.write(Kind::Function, data);
        let feed = feeds.feed(id.clone(), budget.clone());
        let (log, log_end) = Log::open(uid, feed, &budget, listener_of_log).map_err(CreateError::Log)?;
        log.lines().platform(&platform::init_start(function.runtime));
        let begun = Instant::now();
        let listener = launcher.ready().await?;
        let order = order(&id, uid, &function, &code, places, &cgroup);
        let created = launcher.create(reaper, order, log_end).await?;
        let inside = Inside {
            subject: subject.clone(),
            log: log.clone(),
        };
        let api = RuntimeApi::new(identity, telemetry_api, inside, budget.clone());
        // They end with the container, or where it does not come to life.
        let mut tasks = JoinSet::new();
        tasks.spawn(api.clone().serve(listener));
        let mut launched = created.start().await?;
        guard.0 = None;
        let (sender, ended) = watch::channel(None);
        let freezer = Freezer::new(Arc::clone(&cgroup), api.clone(), budget.clone());
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
        tasks.spawn(extensions::end_with_extension(api.clone(), Arc::clone(&shutdown)));
        if function.freeze {
            tasks.spawn(Arc::clone(&freezer).run());
        }
        let extension_log = launched.external.take().map(|external| {
            api.expect_extensions(external.names);
            tasks.spawn(extensions::attend(Arc::clone(&shutdown)));
            let output = Arc::new(Pipe::new(external.output));
            let follow = extensions::follow(Arc::clone(&output), log.clone(), api.clone());
            tokio::spawn(budget.throttle(follow, output))
        });
        let cleanup = Cleanup {
            cgroup: Arc::clone(&cgroup),
            subject: subject.clone(),
            shutdown: Arc::clone(&shutdown),
            api: api.clone(),
            tasks,
            extension_log,
            _code: code,
        };
        tokio::spawn(budget.charge(async move {
            let exit = launched.exit().await;
            let end = Arc::new(cleanup.run(exit).await);
            sender.send_replace(Some(Arc::clone(&end)));
            over(end);
        }));
        Ok(Self {
            id,
            function,
            cgroup,
            freezer,
            api,
            log,
            begun,
            init: Mutex::default(),
            subject,
            budget,
            accounted: Mutex::default(),
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

    /// What it wrote since it was last asked.
    pub(crate) async fn take_log(&self) -> Excerpt {
        self.log.take().await
    }

    /// Waits until the function has initialised. Where it does not the container is gone.
    pub(super) async fn initialise(&self) -> Result<(), Failure> {
        let initialised = self.until_initialised().await;
        let duration = self.begun.elapsed();
        match &initialised {
            Ok(()) => *self.init() = Some(duration),
            Err(failure) => {
                let report = platform::InitReport { duration, failure };
                self.log.catch_up().await;
                self.log.lines().platform(&report.to_string());
            }
        }
        initialised
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
                    self.end_boost();
                    self.account(self.used());
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
        self.budget
            .charge(self.carry_out(request, payload, timeout, parts))
            .await
    }

    async fn carry_out(
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
        // What it wrote before is not of this invocation.
        self.log.catch_up().await;
        if self.killed() {
            return Err(NotBegun::Ended);
        }
        let lines_of: Arc<str> = request.as_str().into();
        let invocation = Invocation {
            id: request,
            payload,
            deadline_ms: u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX),
        };
        let parts = parts.map(|parts| parts.of(&self.budget));
        let outcome = self.api.invoke(invocation, parts)?;
        self.budget.grant_call();
        // Nothing runs between: the runtime is handed the invocation by another task of this thread.
        let begun = Instant::now();
        let lines = self.log.lines();
        lines.of_request(Some(Arc::clone(&lines_of)));
        lines.platform(&platform::start(&lines_of, self.function.version));
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
                    lines.of_request(None);
                    return Err(NotBegun::Ended);
                }
                Err(end.failure.clone())
            }
            () = tokio::time::sleep_until(deadline) => Err(self.kill(Kill::Timeout(timeout)).await),
        };
        let duration = begun.elapsed();
        let log = self.take_log().await;
        let end = self.ended.borrow().clone();
        let after = end.as_ref().map_or_else(|| self.used(), |end| end.used);
        let report = platform::Report {
            request: &lines_of,
            duration,
            init: self.init().take(),
            memory_mib: self.function.amount.memory_mib,
            peak_bytes: after.memory_peak_bytes,
            failure: result.as_ref().err(),
        };
        lines.platform(&report.to_string());
        lines.of_request(None);
        Ok(Answer {
            result,
            log,
            used: self.account(after),
            ended: end.is_some() || self.killed(),
        })
    }

    fn init(&self) -> MutexGuard<'_, Option<Duration>> {
        self.init.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it used since this was last called, where it has used so much by now.
    fn account(&self, now: Use) -> Use {
        let mut accounted = self.accounted.lock().unwrap_or_else(PoisonError::into_inner);
        now.since(&std::mem::replace(&mut accounted, now))
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

    fn end_boost(&self) {
        if let Err(error) = self.cgroup.limit_cpu(self.function.amount.cpu_millis) {
            tracing::error!("{error}");
        }
    }
}

/// What is left to do when a container has ended.
struct Cleanup {
    cgroup: Arc<Cgroup>,
    subject: Subject,
    shutdown: Arc<Shutdown>,
    api: RuntimeApi,
    tasks: JoinSet<()>,
    /// Passes on what external extensions write.
    extension_log: Option<JoinHandle<std::io::Result<()>>>,
    /// Kept while the container lives.
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
        discard(&self.cgroup).await;
        if let Some(log) = self.extension_log {
            // They are gone, so that it has an end.
            let _ = tokio::time::timeout(LAST_WORDS, log).await;
        }
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

fn order(id: &str, uid: u32, function: &Function, code: &FunctionCode, places: &Places, cgroup: &Cgroup) -> Order {
    // What is written is memory of the container's: half of it may be, so that a function that writes without end sees a
    // full disk before it runs out of memory.
    let scratch_bytes = (u64::from(function.amount.memory_mib) << 19).min(SCRATCH_LIMIT);
    let cgroup_path = cgroup
        .path()
        .strip_prefix("/sys/fs/cgroup")
        .map_or_else(|_| cgroup.path().to_owned(), |path| PathBuf::from("/").join(path));
    let spec = spec::build(
        function,
        id,
        uid,
        &spec::Parts {
            code: code.own.path(),
            layers: !code.layers.is_empty(),
            scratch: &places.scratch,
            root: &places.root,
            cgroup: &cgroup_path,
        },
    );
    Order {
        id: id.to_owned(),
        uid,
        spec,
        image: places.image.clone(),
        root: places.root.clone(),
        scratch: places.scratch.clone(),
        scratch_bytes,
        layers: code.layers.iter().map(|layer| layer.path().to_owned()).collect(),
    }
}
