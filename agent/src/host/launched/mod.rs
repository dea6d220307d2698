//! Machines that accounts launch from an image: what services ask of them.
//!
//! What becomes of one is decided by the policies (`stoker_policy::scale`); the loop hands what is decided to the tasks here.
//!
//! ```text
//!             LaunchMachine                    Hello                        RunImage
//!  launch ───► event_loop ───► VMM, guest ───► sizes: rest of its memory ───► program ──► runs
//!                  │ ResizeMachine                 ▲                            │ its end
//!                  ├───────────────────────────────┘                            ▼
//!                  └◄── MachineResized ── sizes       watch ── Measured ──► event_loop, machine ends
//! ```
//!
//! | file | is |
//! |---|---|
//! | `program` | starts the image's program |
//! | `sizes` | asks the machine's devices for what was decided, and tells what the guest has of it |
//! | `watch` | hears the guest, and measures what it uses |
//! | `show` | what the API shows of it |
//!
//! An agent that is started anew finds all of it in the machine's record: the program runs on, or is started where it had not been; its
//! devices are asked again for the size that was decided last; thresholds are watched anew; a stop goes on with the time that is left.
//! What was being waited for is not: who asks again, for a launch by its request id, waits anew.

mod program;
mod show;
mod sizes;
mod watch;

use std::collections::VecDeque;
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use stoker_policy::scale::{Bounds, LaunchError, ResizeError, Size, SizeChange, Taken, Thresholds};
use stoker_policy::{Launch, MachineId};
use stoker_proto::v1;
use tokio::sync::oneshot;

pub(super) use self::program::{run, words};
pub(super) use self::show::{etag, launched, metrics};
pub(super) use self::sizes::{Asked, follow};
pub(super) use self::watch::{Counted, watch};
use super::HostHandle;
use super::message::Message;
use crate::machines::{Guest, LaunchRequest, Program, ResizeRecord};
use crate::names::ImageName;

/// What it needs beside its image's own, at least: what a kernel boots with, and records of memory that may come, a 64th of it.
const LEAST_BASE_MIB: u32 = 256;

/// A machine as an account wants it.
#[derive(Debug)]
pub struct Launching {
    /// Whose it is: the account's id.
    pub account: Arc<str>,
    /// Who asks again for a machine of the account with the same has the same machine.
    pub request: Option<LaunchRequest>,
    /// What the image is called.
    pub image: ImageName,
    /// What names the image's content.
    pub digest: String,
    /// The image's root file system, open.
    pub file: Arc<File>,
    /// What runs in it.
    pub program: Program,
    /// What it is to be. `image` is the digest; a `drive_mib` of 0 is what other machines have.
    pub launch: Launch,
    /// Who wants that.
    pub by: Arc<str>,
}

/// Why a machine was not launched.
#[derive(Debug, thiserror::Error)]
pub enum LaunchFailure {
    /// It can't be had.
    #[error(transparent)]
    Refused(#[from] LaunchError),
    /// Its caller gave the id of a request with other content.
    #[error("the request id was used for a request with other content; use a new one")]
    Reused,
    /// It ended before its program ran; why is in its `end`.
    #[error("the machine ended before its program ran: {}", detail(.0))]
    Ended(Box<v1::Machine>),
    /// The agent ended.
    #[error("the agent is ending; it is not known whether the machine was launched")]
    Gone,
}

/// Why a machine was not resized.
#[derive(Debug, thiserror::Error)]
pub enum ResizeFailure {
    /// It can't have that size.
    #[error(transparent)]
    Refused(#[from] ResizeError),
    /// It ended meanwhile; why is in its `end`.
    #[error("the machine ended: {}", detail(.0))]
    Ended(Box<v1::Machine>),
    /// The agent ended.
    #[error("the agent is ending; it is not known whether the machine was resized")]
    Gone,
}

/// Why something could not be done with a machine that was launched.
#[derive(Debug, thiserror::Error)]
pub enum LaunchedError {
    /// It is not there, or was not launched by an account.
    #[error("there is no such machine, or it was not launched by an account")]
    Unknown,
    /// Its program does not run yet.
    #[error("the machine's program has not been started yet")]
    Starting,
    /// It ends.
    #[error("the machine ends")]
    Ending,
    /// Its thresholds are not those that were read.
    #[error("the machine's thresholds have been changed meanwhile; read them again")]
    Changed,
    /// It has ended; why is in its `end`.
    #[error("the machine ended: {}", detail(.0))]
    Ended(Box<v1::Machine>),
    /// The agent ended, or could not write it down.
    #[error("the agent is ending, or could not write it down: its log says why")]
    Failed,
}

/// Answers a question.
pub(super) type Reply<T> = oneshot::Sender<T>;

/// What the loop hears of machines that were launched.
#[derive(Debug)]
pub(super) enum Order {
    Launch {
        launching: Box<Launching>,
        reply: Reply<Result<v1::Machine, LaunchFailure>>,
    },
    /// Answered as what an earlier request of that id was; dropped where there was none.
    LaunchAgain {
        account: Arc<str>,
        request: LaunchRequest,
        reply: Reply<Result<v1::Machine, LaunchFailure>>,
    },
    Resize {
        machine: MachineId,
        change: SizeChange,
        by: Arc<str>,
        reply: Reply<Result<Resizing, ResizeFailure>>,
    },
    SetThresholds {
        machine: MachineId,
        thresholds: Thresholds,
        /// What those are known by that are to be replaced; whichever there are where absent.
        etag: Option<String>,
        by: Arc<str>,
        reply: Reply<Result<v1::Machine, LaunchedError>>,
    },
    Stop {
        machine: MachineId,
        grace: Duration,
        by: Arc<str>,
        reply: Reply<Result<oneshot::Receiver<v1::Machine>, LaunchedError>>,
    },
    /// Resolves with the machine once it has ended; dropped where there is none.
    End {
        machine: MachineId,
        reply: Reply<v1::Machine>,
    },
    Resizes {
        machine: MachineId,
        reply: Reply<Option<VecDeque<ResizeRecord>>>,
    },
    Guest {
        machine: MachineId,
        reply: Reply<Result<Guest, LaunchedError>>,
    },
    /// Of a machine that an account may launch.
    BoundsFor { account: Arc<str>, reply: Reply<Bounds> },
    /// Of one that is there.
    BoundsOf {
        machine: MachineId,
        reply: Reply<Option<Bounds>>,
    },
    /// What the guest has of what request `number` asked for.
    Resized {
        machine: MachineId,
        number: u64,
        taken: Taken,
    },
    /// Its program has been started.
    Runs { machine: MachineId },
}

/// A resize that was decided.
#[derive(Debug)]
pub(super) struct Resizing {
    /// As it began.
    pub(super) resize: ResizeRecord,
    /// Resolves with how it is once the guest has all of it, and is dropped where another came after it.
    pub(super) taken: oneshot::Receiver<ResizeRecord>,
}

/// The memory that a machine is booted with, in MiB, and can't give back: as little as lets it come to its ceiling, for the kernel's
/// records of memory that is plugged are a 64th of it and lie in what it was booted with.
#[must_use]
pub fn base_mib(size: Size, ceiling: Size) -> u32 {
    let block = stoker_policy::scale::BLOCK_MIB;
    let least = (ceiling.memory_mib / 4).max(LEAST_BASE_MIB);
    least.next_multiple_of(block).min(size.memory_mib)
}

fn detail(machine: &v1::Machine) -> &str {
    machine.end.as_ref().map_or("", |end| end.detail.as_str())
}

// === impl HostHandle ===

impl HostHandle {
    /// Launches a machine, and resolves once its program runs. Where the caller leaves it goes on.
    ///
    /// # Errors
    /// [`LaunchFailure`].
    pub async fn launch(&self, launching: Launching) -> Result<v1::Machine, LaunchFailure> {
        let launching = Box::new(launching);
        self.order(|reply| Order::Launch { launching, reply })
            .await
            .unwrap_or(Err(LaunchFailure::Gone))
    }

    /// What comes of an earlier request of an account by the same id, as [`Self::launch`] has it; nothing where there was none. What it
    /// was launched from may be gone since.
    pub async fn launched_before(
        &self,
        account: Arc<str>,
        request: LaunchRequest,
    ) -> Option<Result<v1::Machine, LaunchFailure>> {
        let order = |reply| Order::LaunchAgain {
            account,
            request,
            reply,
        };
        self.order(order).await
    }

    /// Lets a machine have another size, and resolves once its guest has taken it, or has had so long for that.
    ///
    /// # Errors
    /// [`ResizeFailure`].
    pub async fn resize(
        &self,
        machine: MachineId,
        change: SizeChange,
        by: Arc<str>,
        timeout: Duration,
    ) -> Result<v1::Resize, ResizeFailure> {
        let order = |reply| Order::Resize {
            machine,
            change,
            by,
            reply,
        };
        let Resizing { resize, taken } = self.order(order).await.unwrap_or(Err(ResizeFailure::Gone))?;
        let at = resize.at;
        if let Ok(Ok(taken)) = tokio::time::timeout(timeout, taken).await {
            return Ok(show::resize(&taken));
        }
        // As far as it has come.
        let all = self.order(|reply| Order::Resizes { machine, reply }).await.flatten();
        let now = all.and_then(|all| all.into_iter().find(|one| one.at == at));
        match self.ended(machine).await {
            Some(ended) => Err(ResizeFailure::Ended(Box::new(ended))),
            None => Ok(show::resize(&now.unwrap_or(resize))),
        }
    }

    /// Lets a machine go by these thresholds, and by no others. They have been checked within what [`Self::bounds_of`] says. With an
    /// `etag` they replace those of that alone.
    ///
    /// # Errors
    /// [`LaunchedError`].
    pub async fn set_thresholds(
        &self,
        machine: MachineId,
        thresholds: Thresholds,
        etag: Option<String>,
        by: Arc<str>,
    ) -> Result<v1::Machine, LaunchedError> {
        let order = |reply| Order::SetThresholds {
            machine,
            thresholds,
            etag,
            by,
            reply,
        };
        self.order(order).await.unwrap_or(Err(LaunchedError::Failed))
    }

    /// Ends a machine, once its program has had so long to end, and resolves once it has ended; at once where it had.
    ///
    /// # Errors
    /// [`LaunchedError`].
    pub async fn stop(&self, machine: MachineId, grace: Duration, by: Arc<str>) -> Result<v1::Machine, LaunchedError> {
        let order = |reply| Order::Stop {
            machine,
            grace,
            by,
            reply,
        };
        let ended = self.order(order).await.unwrap_or(Err(LaunchedError::Failed))?;
        ended.await.map_err(|_| LaunchedError::Failed)
    }

    /// A machine's resizes, the youngest first, as long as the machine is remembered; nothing of one that was not launched.
    pub async fn resizes(&self, machine: MachineId) -> Option<Vec<v1::Resize>> {
        let all = self.order(|reply| Order::Resizes { machine, reply }).await.flatten()?;
        Some(all.iter().rev().map(show::resize).collect())
    }

    /// What a machine that an account launches has to stay within: `machine` is the most that it may have, what its ceiling may be. To
    /// check thresholds, it and `base_mib` are to be those of the machine.
    pub async fn bounds_for(&self, account: Arc<str>) -> Option<Bounds> {
        self.order(|reply| Order::BoundsFor { account, reply }).await
    }

    /// What the thresholds of a machine have to stay within; nothing of one that is not there, or was not launched.
    pub async fn bounds_of(&self, machine: MachineId) -> Option<Bounds> {
        self.order(|reply| Order::BoundsOf { machine, reply }).await.flatten()
    }

    /// The guest of a machine whose program runs, for calls on it: [`Guest::exec`] and [`Guest::forward_port`].
    ///
    /// # Errors
    /// [`LaunchedError`].
    pub async fn guest(&self, machine: MachineId) -> Result<Guest, LaunchedError> {
        self.order(|reply| Order::Guest { machine, reply })
            .await
            .unwrap_or(Err(LaunchedError::Failed))
    }

    /// Resolves with a machine that was launched once it has ended; with nothing where there is none. Who makes calls on a guest learns
    /// from it why they broke.
    pub async fn end_of(&self, machine: MachineId) -> Option<v1::Machine> {
        self.order(|reply| Order::End { machine, reply }).await
    }

    /// The machine, if it has ended.
    async fn ended(&self, machine: MachineId) -> Option<v1::Machine> {
        match self.order(|reply| Order::Guest { machine, reply }).await {
            Some(Err(LaunchedError::Ended(machine))) => Some(*machine),
            _ => None,
        }
    }

    async fn order<T>(&self, order: impl FnOnce(oneshot::Sender<T>) -> Order) -> Option<T> {
        self.ask(|reply| Message::Launched(order(reply))).await
    }
}
