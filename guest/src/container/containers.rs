//! All containers of this machine.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stoker_proto::excerpt::Excerpt;
use tokio::sync::broadcast;
use tokio::task::JoinSet;

use super::end::{End, Failure};
use super::execution::Execution;
use super::launch::{LaunchError, Launcher};
use super::life::{Container, CreateError, NewContainer};
use super::{Function, Runtime};
use crate::boot::{self, BootError};
use crate::budget;
use crate::code::FunctionCode;
use crate::credits::Credits;
use crate::logs::Feeds;
use crate::reaper::Reaper;
use crate::scratch::Share;
use crate::telemetry::Telemetry;

/// The first uid that containers run under; each gets the next.
const FIRST_UID: u32 = 100_000;
const UIDS: u32 = 1_000_000_000;
/// Ends that a slow watcher may fall behind by.
const ENDS: usize = 256;

/// Where containers are made.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    /// The root file system of all, read-only.
    pub(crate) image: PathBuf,
    /// The cgroup that holds theirs.
    pub(crate) cgroups: PathBuf,
    /// An empty folder: where, in its own mount namespace, each has its root.
    pub(crate) root: PathBuf,
    /// And where it has a file system in memory.
    pub(crate) tmpfs: PathBuf,
}

/// The containers. Clones are the same.
#[derive(Clone)]
pub(crate) struct Containers(Arc<Inner>);

struct Inner {
    places: Places,
    reaper: Reaper,
    telemetry: Telemetry,
    credits: Credits,
    feeds: Feeds,
    all: Mutex<HashMap<String, Slot>>,
    /// Started ahead of need.
    launcher: Mutex<Option<Launcher>>,
    uid: AtomicU32,
    /// Runtimes that are loaded.
    loaded_runtimes: tokio::sync::Mutex<Vec<Runtime>>,
    ends: broadcast::Sender<(String, Arc<End>)>,
}

enum Slot {
    /// Being made.
    Taken,
    Alive(Arc<Container>),
}

/// A container that initialised, or why not; and what it wrote.
pub(crate) struct Creation {
    pub(crate) result: Result<(), Failure>,
    pub(crate) log: Excerpt,
    /// What its init used, where there was one.
    pub(crate) execution: Option<Execution>,
}

/// There is a container of that name.
#[derive(Debug, thiserror::Error)]
#[error("there is a container {0} already")]
pub(crate) struct Exists(String);

// === impl Places ===

impl Places {
    /// Makes them, in `run` and under the cgroup `cgroups`.
    pub(crate) fn make(image: PathBuf, run: &Path, cgroups: &Path) -> Result<Self, BootError> {
        let places = Self {
            image,
            cgroups: cgroups.to_owned(),
            root: run.join("root"),
            tmpfs: run.join("tmpfs"),
        };
        for path in [&places.root, &places.tmpfs] {
            std::fs::create_dir_all(path).map_err(|source| BootError::Directory {
                path: path.clone(),
                source,
            })?;
        }
        boot::delegate_controllers(cgroups)?;
        Ok(places)
    }
}

// === impl Containers ===

impl Containers {
    pub(crate) fn new(places: Places, reaper: Reaper, telemetry: Telemetry) -> Self {
        let containers = Self(Arc::new(Inner {
            places,
            reaper,
            credits: Credits::new(&telemetry),
            telemetry,
            feeds: Feeds::default(),
            all: Mutex::default(),
            launcher: Mutex::default(),
            uid: AtomicU32::new(0),
            loaded_runtimes: tokio::sync::Mutex::default(),
            ends: broadcast::Sender::new(ENDS),
        }));
        // Once the machine has dialled: there is time then.
        let ahead = containers.clone();
        budget::spawn_uncounted(async move { ahead.prepare() });
        containers
    }

    pub(crate) fn get(&self, id: &str) -> Option<Arc<Container>> {
        match self.all().get(id) {
            Some(Slot::Alive(container)) => Some(Arc::clone(container)),
            _ => None,
        }
    }

    pub(crate) fn list(&self) -> Vec<Arc<Container>> {
        self.all()
            .values()
            .filter_map(|slot| match slot {
                Slot::Alive(container) => Some(Arc::clone(container)),
                Slot::Taken => None,
            })
            .collect()
    }

    /// Where they are made.
    pub(super) fn places(&self) -> &Places {
        &self.0.places
    }

    pub(super) fn reaper(&self) -> &Reaper {
        &self.0.reaper
    }

    pub(crate) fn telemetry(&self) -> &Telemetry {
        &self.0.telemetry
    }

    /// What they may spend.
    pub(crate) fn credits(&self) -> &Credits {
        &self.0.credits
    }

    /// What they write, line by line.
    pub(crate) fn feeds(&self) -> &Feeds {
        &self.0.feeds
    }

    /// Ends of containers that nobody asked for, from now on.
    pub(crate) fn ends(&self) -> broadcast::Receiver<(String, Arc<End>)> {
        self.0.ends.subscribe()
    }

    /// Makes a container, with `/tmp` in `share` of the drive or else in memory, and waits for its init. Where who wants it has
    /// `left` before, it is ended.
    pub(crate) async fn create(
        &self,
        id: String,
        function: Function,
        code: FunctionCode,
        share: Option<Share>,
        left: impl Future<Output = ()>,
    ) -> Result<Creation, Exists> {
        {
            let mut all = self.all();
            if all.contains_key(&id) {
                return Err(Exists(id));
            }
            all.insert(id.clone(), Slot::Taken);
        }
        let container = match self.launch(id.clone(), function, code, share).await {
            Ok(container) => Arc::new(container),
            Err(error) => {
                self.all().remove(&id);
                let failure = match error {
                    CreateError::Launch(LaunchError::NotExecutable(why)) => Failure::entrypoint(why),
                    error => Failure::setup(error.to_string()),
                };
                return Ok(Creation {
                    result: Err(failure),
                    log: Excerpt::default(),
                    execution: None,
                });
            }
        };
        // Entered first and then looked at: one that ends now either finds itself here or is seen to be over.
        self.all().insert(id.clone(), Slot::Alive(Arc::clone(&container)));
        if container.over() {
            self.all().remove(&id);
        }
        let (result, execution) = tokio::select! {
            biased;
            (result, execution) = container.initialise() => (result, Some(execution)),
            () = left => {
                container.stop().await;
                (Err(Failure::setup("nobody waits for it any more".to_owned())), None)
            }
        };
        Ok(Creation {
            result,
            execution,
            log: container.take_log(),
        })
    }

    /// Stops all of them, at once: each may take its time.
    pub(crate) async fn stop_all(&self) {
        let mut stopping = JoinSet::new();
        for container in self.list() {
            stopping.spawn(async move { container.stop().await });
        }
        stopping.join_all().await;
    }

    async fn launch(
        &self,
        id: String,
        function: Function,
        code: FunctionCode,
        share: Option<Share>,
    ) -> Result<Container, CreateError> {
        let launcher = self.take_launcher()?;
        let uid = FIRST_UID + self.0.uid.fetch_add(1, Ordering::Relaxed) % UIDS;
        let new = NewContainer {
            id: id.clone(),
            uid,
            function,
            code,
            share,
            launcher,
            reaper: &self.0.reaper,
            telemetry: &self.0.telemetry,
            credits: &self.0.credits,
            feeds: &self.0.feeds,
            places: &self.0.places,
        };
        let containers = Arc::downgrade(&self.0);
        let made = Container::create(new, move |end| {
            if let Some(inner) = containers.upgrade() {
                Self(inner).forget(&id, end);
            }
        })
        .await;
        self.prepare();
        made
    }

    fn forget(&self, id: &str, end: Arc<End>) {
        self.all().remove(id);
        if !end.stopped {
            // There may be nobody who watches.
            let _ = self.0.ends.send((id.to_owned(), end));
        }
    }

    /// The launcher that was started ahead, or another.
    pub(super) fn take_launcher(&self) -> Result<Launcher, LaunchError> {
        let mut prepared = self.launcher().take();
        // The kernel may have killed it, for want of memory.
        prepared.take_if(|launcher| !launcher.is_alive());
        match prepared {
            Some(launcher) => Ok(launcher),
            None => Launcher::start(&self.0.reaper),
        }
    }

    /// Starts a launcher for the next container.
    fn prepare(&self) {
        let mut place = self.launcher();
        if place.is_none() {
            match Launcher::start(&self.0.reaper) {
                Ok(launcher) => *place = Some(launcher),
                // The next request tries again, and tells.
                Err(error) => tracing::error!("{error}"),
            }
        }
    }

    /// Runtimes that are loaded. Locked while one is being loaded.
    pub(super) async fn loaded_runtimes(&self) -> tokio::sync::MutexGuard<'_, Vec<Runtime>> {
        self.0.loaded_runtimes.lock().await
    }

    fn all(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.0.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn launcher(&self) -> MutexGuard<'_, Option<Launcher>> {
        self.0.launcher.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
