//! The vCPUs and the memory of a machine, which its VMM changes while it runs.
//!
//! What is asked for the guest takes in its own time, or not: nobody waits for it. The host lets the machine have enough for both, what it
//! was asked to have and what it has still; where it is to have fewer vCPUs, they are held to that at once.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use stoker_linux::{Cgroup, CgroupError};
pub use stoker_policy::scale::{Size, Taken};
use stoker_proto::vmm::Status;
use stoker_vmm::control::{Client, ClientError};
use tokio::sync::{Mutex, Semaphore};

use super::bounds::Bounds;
use super::ceiling::BLOCK_MIB;
use super::cpu::{Cpu, CpuError, Vcpus};
use super::{Ceiling, RecordFile};

mod balloon;
mod taking;

use taking::Pauses;
pub use taking::Taking;

/// How long a VMM may take to answer.
const ANSWER: Duration = Duration::from_secs(10);

/// How long a guest may take before it is asked again, at first and at last: Linux, where memory was in use, tries again by itself after a
/// minute, and at once where it is asked.
const ASK_AGAIN: Pauses = Pauses {
    first: Duration::from_secs(2),
    last: Duration::from_secs(60),
};

/// How large a machine is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Amounts {
    /// What it is to have.
    pub asked: Size,
    /// What its guest has.
    pub taken: Taken,
    /// Why it has another number of vCPUs, where somebody has said so.
    pub refused: String,
}

/// Changes the size of a machine. Clones are the same machine's.
#[derive(Clone)]
pub struct Resizer(Arc<Inner>);

/// What a VMM is asked, and answers. Blocks.
type Call = dyn Fn(Ask) -> Result<Status, ClientError> + Send + Sync;

/// What a VMM is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ask {
    /// How things are.
    Status,
    /// To let its guest have so much.
    Size(Size),
    /// To let the balloon have so many MiB.
    Balloon(u32),
}

struct Inner {
    call: Box<Call>,
    limits: Limits,
    /// What it started with, in MiB.
    least_mib: u32,
    record: RecordFile,
    ask_again: Pauses,
    /// Locked while the machine is asked.
    state: Mutex<State>,
    /// One, for who asks about the balloon: held for as long as the VMM is asked, whether anybody still waits for its answer or not.
    balloon: Arc<Semaphore>,
}

/// What the host bounds a machine by.
#[derive(Clone)]
pub(super) struct Limits {
    pub(super) cgroup: Cgroup,
    pub(super) controllers: &'static [&'static str],
    pub(super) cpu: Cpu,
    pub(super) ceiling: Ceiling,
}

struct State {
    /// The CPU share; all of its vCPUs' time where none was asked for.
    cpu_millis: Option<u32>,
    /// What this agent has set last, where it has set anything.
    set: Option<(Bounds, Vcpus)>,
}

/// Why a machine does not have another size. It is as it was, but for what its guest does by itself.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// No machine may have that.
    #[error("{asked} can't be: this machine may have 1 to {} vCPUs, and {least_mib} to {} MiB of memory in steps of 2", .ceiling.vcpus, .ceiling.memory_mib)]
    Impossible {
        /// What was asked for.
        asked: Size,
        /// What it started with, in MiB.
        least_mib: u32,
        /// The most that it may have.
        ceiling: Ceiling,
    },
    /// The host can't be told what it may have.
    #[error("what the machine may have of the host can't be changed: {0}")]
    Bounds(#[from] CgroupError),
    /// Nor what its vCPUs may use.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// The VMM refuses, or does not answer.
    #[error("the machine's VMM did not change its size: {0}")]
    Vmm(#[from] ClientError),
    /// The VMM takes too long.
    #[error("the machine's VMM did not answer within {ANSWER:?}")]
    Late,
    /// The VMM is of a version that tells nothing of it.
    #[error("the machine's VMM is too old: it does not tell what its guest has")]
    TooOld,
    /// It is not written down, so that the next agent would not know.
    #[error("it can't be written down: {0}")]
    Record(std::io::Error),
    /// The task that did it panicked.
    #[error("the agent's task for it panicked")]
    Panicked,
}

/// What is enough for a machine of that size.
fn bounds(size: Size) -> Bounds {
    Bounds {
        vcpus: size.vcpus,
        memory_mib: size.memory_mib,
    }
}

// === impl Amounts ===

impl Amounts {
    /// What a VMM says; nothing where it does not. `cpu_millis` is the CPU share that was asked for.
    fn of(status: &Status, cpu_millis: Option<u32>) -> Option<Self> {
        let amounts = status.amounts.as_ref()?;
        let all = Size::whole(amounts.vcpus_asked, amounts.memory_asked_mib);
        Some(Self {
            asked: Size {
                cpu_millis: cpu_millis.map_or(all.cpu_millis, |asked| asked.min(all.cpu_millis)),
                ..all
            },
            taken: Taken {
                vcpus: amounts.vcpus_taken,
                memory_mib: amounts.memory_taken_mib,
            },
            refused: amounts.vcpus_refused.clone(),
        })
    }

    /// Whether the guest has just what it is to have.
    #[must_use]
    pub fn are_taken(&self) -> bool {
        let Size { vcpus, memory_mib, .. } = self.asked;
        self.taken == Taken { vcpus, memory_mib }
    }
}

// === impl Resizer ===

impl Resizer {
    /// Of the machine whose VMM listens on that socket.
    pub(super) fn of_vmm(control: PathBuf, limits: Limits, record: RecordFile) -> Self {
        let call = move |ask| {
            let mut client = Client::connect(&control, ANSWER)?;
            match ask {
                Ask::Status => client.query(),
                Ask::Size(asked) => client.resize(Some(asked.vcpus), Some(asked.memory_mib)),
                Ask::Balloon(mib) => client.set_balloon(mib),
            }
        };
        Self::new(Box::new(call), limits, record, ASK_AGAIN)
    }

    fn new(call: Box<Call>, limits: Limits, record: RecordFile, ask_again: Pauses) -> Self {
        let known = record.get();
        let state = State {
            cpu_millis: known.size.map(|size| size.cpu_millis),
            set: None,
        };
        Self(Arc::new(Inner {
            call,
            limits,
            least_mib: known.shape.memory_mib,
            record,
            ask_again,
            state: Mutex::new(state),
            balloon: Arc::new(Semaphore::new(1)),
        }))
    }

    /// The most that the machine may ever have.
    #[must_use]
    pub fn ceiling(&self) -> Ceiling {
        self.0.limits.ceiling
    }

    /// Asks the guest to have so much, and lets the machine have what that takes. What the guest has taken at once is in what this
    /// answers; [`Self::until_taken`] waits for the rest.
    ///
    /// # Errors
    /// [`ResizeError`].
    pub async fn resize(&self, asked: Size) -> Result<Amounts, ResizeError> {
        self.check(asked)?;
        let mut state = self.0.state.lock().await;
        // The next agent knows it, whatever comes of it.
        self.0.record.change(|record| record.size = Some(asked));
        self.0.record.save().await.map_err(ResizeError::Record)?;
        self.ask(&mut state, asked).await
    }

    /// How large the machine is. What its guest has given back the host does not let it have any more.
    ///
    /// # Errors
    /// [`ResizeError`].
    pub async fn amounts(&self) -> Result<Amounts, ResizeError> {
        let mut state = self.0.state.lock().await;
        let status = self.call(Ask::Status).await?;
        self.settle(&mut state, &status).await
    }

    /// Follows what the guest takes.
    #[must_use]
    pub fn taking(&self) -> Taking {
        Taking::new(self.clone())
    }

    /// Follows what the guest takes until it has just what it is to have. `tell` hears of each change, and of how it is at first.
    ///
    /// # Errors
    /// [`ResizeError`]; also once the machine has ended.
    pub async fn until_taken(&self, mut tell: impl FnMut(&Amounts)) -> Result<Amounts, ResizeError> {
        let mut taking = self.taking();
        loop {
            let (amounts, is_news) = taking.look().await?;
            if is_news {
                tell(&amounts);
            }
            if amounts.are_taken() {
                return Ok(amounts);
            }
            taking.pause().await;
        }
    }

    fn check(&self, asked: Size) -> Result<(), ResizeError> {
        let (ceiling, least_mib) = (self.ceiling(), self.0.least_mib);
        let fits = (1..=ceiling.vcpus).contains(&asked.vcpus)
            && (least_mib..=ceiling.memory_mib).contains(&asked.memory_mib)
            && (asked.memory_mib - least_mib).is_multiple_of(BLOCK_MIB);
        fits.then_some(()).ok_or(ResizeError::Impossible {
            asked,
            least_mib,
            ceiling,
        })
    }

    /// What it was asked for last, once more.
    async fn ask_again(&self) -> Result<Amounts, ResizeError> {
        let mut state = self.0.state.lock().await;
        let status = self.call(Ask::Status).await?;
        let Amounts { asked, .. } = self.settle(&mut state, &status).await?;
        self.ask(&mut state, asked).await
    }

    async fn ask(&self, state: &mut State, asked: Size) -> Result<Amounts, ResizeError> {
        let (bounds, vcpus) = match state.set {
            Some(set) => set,
            None => {
                let status = self.call(Ask::Status).await?;
                self.settle(state, &status).await?;
                state.set.ok_or(ResizeError::TooOld)?
            }
        };
        // More is let have before it is asked for.
        self.set(state, bounds.max(self::bounds(asked)), vcpus).await?;
        let answer = self.call(Ask::Size(asked)).await;
        if answer.is_ok() {
            state.cpu_millis = Some(asked.cpu_millis);
        }
        let status = match &answer {
            Ok(status) => status,
            Err(_) => &self.call(Ask::Status).await?,
        };
        let amounts = self.settle(state, status).await?;
        answer.map(|_| amounts)
    }

    /// Lets the machine have what is asked of it and what it has, and no more.
    async fn settle(&self, state: &mut State, status: &Status) -> Result<Amounts, ResizeError> {
        let amounts = Amounts::of(status, state.cpu_millis).ok_or(ResizeError::TooOld)?;
        let Amounts { asked, taken, .. } = amounts;
        let has = Bounds {
            vcpus: status.vcpus,
            memory_mib: taken.memory_mib,
        };
        let vcpus = Vcpus {
            plugged: status.vcpus,
            share_millis: asked.cpu_millis,
        };
        self.set(state, bounds(asked).max(has), vcpus).await?;
        Ok(amounts)
    }

    async fn set(&self, state: &mut State, bounds: Bounds, vcpus: Vcpus) -> Result<(), ResizeError> {
        let (bounds_before, vcpus_before) = state.set.take().unzip();
        let limits = self.0.limits.clone();
        let set = move || {
            if bounds_before != Some(bounds) {
                bounds.set(&limits.cgroup, limits.controllers, limits.ceiling)?;
            }
            if vcpus_before != Some(vcpus) {
                limits.cpu.set_vcpus(vcpus)?;
            }
            Ok(())
        };
        if (bounds_before, vcpus_before) != (Some(bounds), Some(vcpus)) {
            let set = tokio::task::spawn_blocking(set).await;
            set.map_err(|_| ResizeError::Panicked).flatten()?;
        }
        state.set = Some((bounds, vcpus));
        Ok(())
    }

    async fn call(&self, ask: Ask) -> Result<Status, ResizeError> {
        let this = self.clone();
        let calling = tokio::task::spawn_blocking(move || (this.0.call)(ask));
        match tokio::time::timeout(ANSWER, calling).await {
            Ok(Ok(answer)) => Ok(answer?),
            Ok(Err(_)) => Err(ResizeError::Panicked),
            Err(_) => Err(ResizeError::Late),
        }
    }
}

impl fmt::Debug for Resizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resizer").finish_non_exhaustive()
    }
}

#[cfg(test)]
pub(crate) mod tests;
