//! The image that the machine was launched from, and its one container, which has all of the machine.
//!
//! ```text
//!   RunImage ──► run ──► launch ──► PID 1 of the container ──► its program
//!                  │                        │ ends with it
//!   StopImage ──► signal, then SIGKILL      ▼
//!   Exec ──► exec: programs beside it     Ended ──► its last lines ──► Over
//!   ForwardPort ──► port                                                │
//!                                                                       ▼
//!                                      Watch: told to each who watches, as long as the machine is there
//! ```
//!
//! Of functions' containers ([`super::life`]) it has nothing but what makes them: no Runtime API, no freezer, no credits. What it
//! writes goes to the scratch drive, and ends with the machine.

mod exec;
mod make;
mod memory;
mod port;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use stoker_linux::users::User;
use tokio::sync::{Semaphore, watch};

use self::make::MakeError;
use self::memory::MemoryLimit;
use super::cgroup::HeldCgroup;
use super::containers::Containers;
use super::end::Failure;
use super::launch::{Control, LaunchError};
use super::log::Log;
use crate::budget;
use crate::reaper::Exit;
use crate::scratch::Scratch;
use crate::telemetry::{Subject, Use};

pub(crate) use exec::{END_OF_INPUT, End, Exec, ExecError, Input, Process, Read, signal};
pub(crate) use port::{Connection, PortError};

/// After SIGKILL processes are gone this soon.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long an agent may take for what a program wrote last before the program's end is told, and again before the machine goes
/// off. Both are well within the time that an agent waits for that.
const LAST_LINES: Duration = Duration::from_secs(1);

/// The image. Clones are the same.
#[derive(Clone)]
pub(crate) struct Workload(Arc<Inner>);

struct Inner {
    containers: Containers,
    launched_from: Option<LaunchedFrom>,
    state: watch::Sender<State>,
}

/// What a machine was launched from.
#[derive(Clone)]
pub(crate) struct LaunchedFrom {
    /// The drive with the image.
    pub(crate) device: PathBuf,
    /// The folder where it is mounted.
    pub(crate) on: PathBuf,
    /// The drive that it writes to; in memory where there is none.
    pub(crate) scratch: Option<Scratch>,
}

/// How the image's program is run.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    /// Of its container.
    pub(crate) id: String,
    pub(crate) command: Vec<String>,
    /// `NAME=VALUE`
    pub(crate) environment: Vec<String>,
    pub(crate) working_dir: String,
    pub(crate) user: User,
    pub(crate) hostname: String,
}

/// How far it is.
#[derive(Clone, Default)]
enum State {
    #[default]
    New,
    /// By this id.
    Starting(String),
    Runs(Arc<Running>),
    /// Its last lines may not be on their way yet.
    Ended(Arc<Ended>),
    /// That is told.
    Over(Arc<Ended>),
}

/// The container while its program runs.
struct Running {
    program: Program,
    /// Whether the image gives `HOME` itself.
    has_home: bool,
    control: Control,
    /// Its PID 1, whatever has its number later.
    pidfd: OwnedFd,
    cgroup: HeldCgroup,
    subject: Subject,
    memory: MemoryLimit,
    log: Log,
    execs: Arc<Semaphore>,
    ports: Arc<Semaphore>,
}

/// What came of it.
#[derive(Clone, Debug)]
pub(crate) struct Ended {
    pub(crate) id: String,
    pub(crate) failure: Failure,
    /// As shells have it; none where the program was never started.
    pub(crate) exit_status: Option<i32>,
}

/// Why the image is not run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RunError {
    #[error("this machine was not launched from an image")]
    NoImage,
    #[error("the image runs, or ran, in the container {0}")]
    Again(String),
    /// It was tried.
    #[error("{}", .0.message)]
    Failed(Failure),
}

/// Why nothing can be asked of it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotRunning {
    #[error("the image was not run yet")]
    NotYet,
    #[error("the image's program has ended: {}", .0.failure.message)]
    Ended(Arc<Ended>),
}

// === impl Workload ===

impl Workload {
    pub(crate) fn new(containers: Containers, launched_from: Option<LaunchedFrom>) -> Self {
        Self(Arc::new(Inner {
            containers,
            launched_from,
            state: watch::Sender::default(),
        }))
    }

    /// Whether the machine was launched from an image.
    pub(crate) fn is_launched(&self) -> bool {
        self.0.launched_from.is_some()
    }

    /// The id of its container, where there was one ever.
    pub(crate) fn id(&self) -> Option<String> {
        match &*self.0.state.borrow() {
            State::New => None,
            State::Starting(id) => Some(id.clone()),
            State::Runs(running) => Some(running.program.id.clone()),
            State::Ended(ended) | State::Over(ended) => Some(ended.id.clone()),
        }
    }

    /// What it has used so far, while it runs.
    pub(crate) fn used(&self) -> Option<(String, Use)> {
        let running = self.running().ok()?;
        Some((running.program.id.clone(), running.subject.used()))
    }

    /// Lets it have what the machine has come to have.
    pub(crate) fn follow_machine(&self) {
        if let Ok(running) = self.running() {
            running.memory.follow(&running.cgroup);
        }
    }

    /// Runs the image, and resolves once its program has been started. Where it fails and nobody is there to be told (`left`), its
    /// end is as one of a program that ran; else it may be run again.
    pub(crate) async fn run(&self, program: Program, left: impl Fn() -> bool) -> Result<(), RunError> {
        let launched_from = self.0.launched_from.as_ref().ok_or(RunError::NoImage)?;
        let id = program.id.clone();
        let mut again = false;
        self.0.state.send_if_modified(|state| match state {
            State::New => {
                *state = State::Starting(id.clone());
                true
            }
            _ => {
                again = true;
                false
            }
        });
        if again {
            return Err(RunError::Again(self.id().unwrap_or_default()));
        }
        match self.make(launched_from, program).await {
            Ok((running, launched)) => {
                let running = Arc::new(running);
                self.0.state.send_replace(State::Runs(Arc::clone(&running)));
                let workload = self.clone();
                budget::spawn_uncounted(async move {
                    let exit = {
                        let mut exit = std::pin::pin!(launched.exit());
                        tokio::select! {
                            biased;
                            exit = &mut exit => exit,
                            followed = running.memory.follow_at_once(&running.cgroup) => {
                                if let Err(error) = followed {
                                    tracing::warn!("plugged memory is not seen at once: {error}");
                                }
                                exit.await
                            }
                        }
                    };
                    let ended = workload.ended(&running, exit);
                    let log = running.log.clone();
                    drop(running);
                    workload.last_lines(&log).await;
                    workload.0.state.send_replace(State::Over(ended));
                });
                Ok(())
            }
            Err(error) => {
                let failure = match error {
                    MakeError::Launch(LaunchError::NotExecutable(why)) => Failure::entrypoint(why),
                    error => Failure::setup(error.to_string()),
                };
                self.0.state.send_replace(if left() {
                    State::Over(Arc::new(Ended {
                        id,
                        failure: failure.clone(),
                        exit_status: None,
                    }))
                } else {
                    State::New
                });
                Err(RunError::Failed(failure))
            }
        }
    }

    /// Its first process is gone, and with it all others.
    fn ended(&self, running: &Running, exit: Option<Exit>) -> Arc<Ended> {
        let memory = exit == Some(Exit::Signal(libc::SIGKILL)) && running.cgroup.ran_out_of_memory();
        let ended = Ended {
            id: running.program.id.clone(),
            failure: Failure::of_program(exit, memory),
            exit_status: exit.map(Exit::status),
        };
        let ended = Arc::new(ended);
        self.0.state.send_replace(State::Ended(Arc::clone(&ended)));
        ended
    }

    /// Lets the agent have what it wrote last: who hears of its end may power the machine off at once.
    async fn last_lines(&self, log: &Log) {
        let feeds = self.0.containers.feeds();
        let all = async {
            while !log.catch_up_at_end() {
                feeds.sent().await;
            }
            feeds.sent().await;
        };
        if tokio::time::timeout(LAST_LINES, all).await.is_err() {
            tracing::debug!("nobody takes what the image wrote last");
        }
    }

    /// Resolves when the agent has what the image wrote up to now, or has had time for that.
    pub(crate) async fn lines_sent(&self) {
        if self.is_launched() {
            // An agent that has just come may begin to follow only now.
            let _ = tokio::time::timeout(LAST_LINES, self.0.containers.feeds().sent()).await;
        }
    }

    /// Sends its program a signal, and ends all of it where that has not ended after `grace`. Resolves when it is no more.
    pub(crate) async fn stop(&self, signal: i32, grace: Duration) -> Result<(), NotRunning> {
        match self.running() {
            Ok(running) => {
                running.control.signal(signal);
                drop(running);
                if tokio::time::timeout(grace, self.end()).await.is_err() {
                    self.kill().await;
                }
                Ok(())
            }
            Err(NotRunning::Ended(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Ends all of it; resolves when it is over, if it ever was.
    pub(crate) async fn kill(&self) {
        let mut state = self.0.state.subscribe();
        let started = state.wait_for(|state| !matches!(state, State::Starting(_))).await;
        match started.map(|state| state.clone()) {
            Ok(State::Runs(running)) => {
                if let Err(error) = running.cgroup.kill() {
                    tracing::debug!("{error}");
                }
            }
            Ok(State::Ended(_)) => {}
            _ => return,
        }
        if tokio::time::timeout(KILL_TIMEOUT, self.over()).await.is_err() {
            tracing::error!("the image does not go away after SIGKILL");
        }
    }

    /// Resolves with its end, at once where that was before.
    pub(crate) async fn end(&self) -> Arc<Ended> {
        self.until(|state| match state {
            State::Ended(ended) | State::Over(ended) => Some(ended),
            _ => None,
        })
        .await
    }

    /// Resolves with its end once its last lines are on their way to the agent, or had time for that; at once where that was before.
    pub(crate) async fn over(&self) -> Arc<Ended> {
        self.until(|state| match state {
            State::Over(ended) => Some(ended),
            _ => None,
        })
        .await
    }

    async fn until(&self, of: impl Fn(&State) -> Option<&Arc<Ended>>) -> Arc<Ended> {
        let mut state = self.0.state.subscribe();
        loop {
            if let Some(ended) = of(&state.borrow_and_update()) {
                return Arc::clone(ended);
            }
            if state.changed().await.is_err() {
                // It is there as long as this is.
                std::future::pending::<()>().await;
            }
        }
    }

    fn running(&self) -> Result<Arc<Running>, NotRunning> {
        match &*self.0.state.borrow() {
            State::Runs(running) => Ok(Arc::clone(running)),
            State::Ended(ended) | State::Over(ended) => Err(NotRunning::Ended(Arc::clone(ended))),
            State::New | State::Starting(_) => Err(NotRunning::NotYet),
        }
    }
}
