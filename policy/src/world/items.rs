//! Machines, containers and requests.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::credits::{Balance, Cpu};
use super::launched::Launched;
use super::rooms::Room;
use crate::{Amount, ContainerId, Demand, Kind, MachineId, Mono, Now, Purpose, Refusal, RequestId, Shape, Usage};

/// A machine.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Its id.
    pub id: MachineId,
    /// What it has loaded.
    pub runtime: Arc<str>,
    /// Its size; of one that an account launched, what counts of it.
    pub shape: Shape,
    /// Where it is in its life.
    pub state: MachineState,
    /// The one account that it ever serves, once it does.
    pub account: Option<Arc<str>>,
    /// What its containers were given; all that it is to have, where an account launched it.
    pub allocated: Amount,
    /// Its containers.
    pub containers: BTreeSet<ContainerId>,
    /// How urgently it runs, and how much, as was decided last; nothing where an earlier agent did.
    pub cpu: Option<Cpu>,
    /// Its account of credits; nothing in recordings of before there were any.
    pub credits: Option<Balance>,
    /// What is to be said of it beside the rest where an account launched it.
    pub launched: Option<Box<Launched>>,
    /// When it was decided to boot it, or it was found: then by the host's clock as it was told.
    pub created: Now,
    /// When its guest answered this agent.
    pub ready: Option<Now>,
    /// What it can give to containers.
    pub(crate) capacity: Amount,
    /// How much larger its drive may be made, in MiB.
    pub(crate) growth_mib: u32,
    /// The request that it is booted for, where that needs more than a standard machine.
    pub(crate) reserved: Option<RequestId>,
    /// Containers that start or run something.
    pub(crate) running: u32,
    /// When it came to its account.
    pub(crate) assigned: Mono,
    /// Since when nothing was used in it.
    pub(crate) last_used: Mono,
    /// Its place among machines that run nothing.
    pub(crate) rest: Option<Rest>,
    /// There is a timer for its idleness.
    pub(crate) timed: bool,
    /// The `cpu.weight` that it was given last; 0 where none was.
    pub(crate) weight: u32,
}

/// Where a machine is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineState {
    /// Started; its guest has not answered.
    Booting,
    /// Started by an earlier agent; its guest has not answered this one.
    Found,
    /// Ready, and of no account.
    Warming,
    /// Serves its account.
    Active,
    /// Serves its account until nothing runs in it, and takes nothing new.
    Closing,
    /// Told to end.
    Stopping,
}

/// The order in which machines that run nothing are given up for others: the class, then the longest unused.
pub(crate) type Rest = (RestClass, Mono);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum RestClass {
    /// An account's, without containers.
    Empty,
    /// In the warming pool.
    Warming,
    /// An account's, with idle containers.
    Idle,
}

/// A container.
#[derive(Clone, Debug)]
pub struct Container {
    /// Its id.
    pub id: ContainerId,
    /// Where it is.
    pub machine: MachineId,
    /// What it is.
    pub kind: Kind,
    /// Where it is in its life.
    pub state: ContainerState,
    /// When it was decided to make it, or it was taken over: then by the host's clock as it was told.
    pub created: Now,
    /// How many requests it has taken.
    pub invocations: u64,
    /// What it has used, as last told.
    pub usage: Option<Usage>,
    /// Since when it is in its state.
    pub(crate) since: Mono,
    /// Its function was deleted: it takes no further request.
    pub(crate) deleted: bool,
    /// Its guest said that it ended while a call on it is on its way.
    pub(crate) ended: bool,
    /// There is a timer for its idleness.
    pub(crate) timed: bool,
}

/// Where a container is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContainerState {
    /// Being made.
    Starting(Purpose),
    /// Can take a request.
    Idle,
    /// Runs a request.
    Busy(RequestId),
    /// Told to end.
    Stopping,
}

/// A request that has not come to its end.
#[derive(Clone, Debug)]
pub struct Request {
    /// Its id.
    pub id: RequestId,
    /// What it needs.
    pub demand: Demand,
    /// When it came.
    pub arrived: Now,
    /// Where it is in its life.
    pub state: RequestState,
    /// Its place in the order of arrival.
    pub(crate) order: u64,
    /// How often it was placed in vain.
    pub(crate) attempts: u32,
    /// Machines that were lost under it or could not make its container.
    pub(crate) lost: Vec<MachineId>,
    /// Why it is not placed again if its guest does not begin it.
    pub(crate) withdrawn: Option<Refusal>,
    /// The machine that boots for it alone.
    pub(crate) reserved: Option<MachineId>,
}

/// Where a request is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestState {
    /// Has just come, or comes again.
    New,
    /// Waits for a place, or for its account to run fewer.
    Waiting,
    /// Its container is being made.
    Starting(ContainerId),
    /// It runs.
    Running(ContainerId),
}

// === impl Machine ===

impl Machine {
    /// What it can still give to containers.
    #[must_use]
    pub fn free(&self) -> Amount {
        self.capacity.minus(self.allocated)
    }

    /// The same, and what its drive may come to have.
    pub(crate) fn room(&self) -> Room {
        Room {
            free: self.free(),
            scratch_mib: i64::from(self.capacity.scratch_mib) - i64::from(self.allocated.scratch_mib),
            growth_mib: self.growth_mib,
        }
    }

    /// How many vCPUs it is to have.
    pub(crate) fn vcpus(&self) -> u32 {
        let launched = self.launched.as_ref();
        launched.map_or(self.shape.vcpus, |launched| launched.asked.vcpus)
    }

    /// How large its drive has to be to hold so much more, in MiB.
    pub(crate) fn drive_for(&self, scratch_mib: u32) -> u32 {
        self.shape.drive_mib.saturating_add(self.room().lacks(scratch_mib))
    }
}

// === impl Container ===

impl Container {
    /// It starts or runs something.
    pub(crate) fn is_running(&self) -> bool {
        matches!(self.state, ContainerState::Starting(_) | ContainerState::Busy(_))
    }
}

// === impl Request ===

impl Request {
    /// It counts towards its account's concurrency.
    pub(crate) fn is_running(&self) -> bool {
        matches!(self.state, RequestState::Starting(_) | RequestState::Running(_))
    }

    /// The kind of container that is made for it.
    pub(crate) fn first(&self) -> Option<Kind> {
        self.demand.kinds.first().copied()
    }
}
