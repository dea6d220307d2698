use std::sync::Arc;

use crate::policy::{Amount, Shape};

/// A machine, numbered by the policy; the executor knows its ULID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MachineId(pub u64);

/// A container, numbered by the policy; the executor knows its ULID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ContainerId(pub u64);

/// A request, numbered by the executor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// One version of a function.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Code {
    /// The function's resource name.
    pub function: Arc<str>,
    /// Its unique id: a function deleted and made again under the same name is another.
    pub uid: Arc<str>,
    /// Its version.
    pub version: u64,
}

/// What a request needs.
#[derive(Clone, Debug)]
pub struct Demand {
    /// Whose it is.
    pub account: Arc<str>,
    /// What its machine must have loaded.
    pub runtime: Arc<str>,
    /// What runs.
    pub code: Code,
    /// What its container is given.
    pub amount: Amount,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// Time passed.
    Tick,
    /// Someone wants a function run. The id is new.
    Request {
        /// Its number.
        request: RequestId,
        /// What it needs.
        demand: Demand,
    },
    /// The caller has gone. Only a request that still waits ends by it.
    Cancelled {
        /// Its number.
        request: RequestId,
    },
    /// The guest of a machine that was booted has answered.
    MachineReady {
        /// Which.
        machine: MachineId,
    },
    /// A machine is gone, asked or not; process, cgroup and files.
    MachineEnded {
        /// Which.
        machine: MachineId,
    },
    /// A container that was made waits for its first request.
    ContainerReady {
        /// Which.
        container: ContainerId,
    },
    /// A container could not be made, and is gone.
    ContainerFailed {
        /// Which.
        container: ContainerId,
        /// What that means for its request.
        failure: ContainerFailure,
    },
    /// A container ended of itself or because it was stopped.
    ContainerEnded {
        /// Which.
        container: ContainerId,
    },
    /// The request in a container has its answer.
    InvocationDone {
        /// Which.
        container: ContainerId,
        /// The container ended with it.
        ended: bool,
    },
    /// A function is no more.
    FunctionDeleted {
        /// Its unique id: another may have its name by now.
        uid: Arc<str>,
    },
    /// Take no new request, finish what runs, let every machine go.
    Drain,
    /// Whatever still runs is ended now.
    DrainExpired,
}

/// What a container that could not be made means for its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContainerFailure {
    /// The executor holds the request's answer: the function failed at init, or its code can't be had.
    Settled,
    /// The machine is to blame; another may serve the request.
    Lost,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Start a machine. Answered by `MachineReady` or `MachineEnded`.
    BootMachine {
        /// Which.
        machine: MachineId,
        /// What it must have loaded.
        runtime: Arc<str>,
        /// Its size.
        shape: Shape,
    },
    /// A warming machine is an account's from now on.
    AssignMachine {
        /// Which.
        machine: MachineId,
        /// Whose.
        account: Arc<str>,
    },
    /// Make a container for a request. Answered by `ContainerReady` or `ContainerFailed`.
    CreateContainer {
        /// Where.
        machine: MachineId,
        /// Which.
        container: ContainerId,
        /// For whom.
        request: RequestId,
        /// Why here.
        source: Source,
    },
    /// Run the request in the container. Answered by `InvocationDone`.
    Dispatch {
        /// Where.
        machine: MachineId,
        /// Which.
        container: ContainerId,
        /// What.
        request: RequestId,
    },
    /// End a container. Answered by `ContainerEnded`.
    StopContainer {
        /// Where.
        machine: MachineId,
        /// Which.
        container: ContainerId,
        /// Why.
        reason: StopReason,
    },
    /// End a machine. Answered by `MachineEnded`.
    DestroyMachine {
        /// Which.
        machine: MachineId,
        /// Why.
        reason: DestroyReason,
    },
    /// The request has come to its end; once for each.
    Finish {
        /// Which.
        request: RequestId,
        /// How.
        finish: Finish,
    },
}

/// Why a request runs where it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// An idle container of its code, version and amount: `Dispatch` without `CreateContainer`.
    IdleContainer,
    /// A new container in an active machine of its account.
    ActiveMachine,
    /// A new container in a machine that was in the warming pool when it came.
    WarmingMachine,
    /// A new container in a machine that it had to wait for.
    NewMachine,
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finish {
    /// As the executor found and keeps.
    Settled,
    /// Without an answer.
    Refused(Refusal),
}

/// Why a request has no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// As many wait as may.
    QueueFull,
    /// It waited as long as it may.
    QueueTimeout,
    /// No machine of this host could hold its amount.
    TooLarge {
        /// The most that one could.
        largest: Amount,
    },
    /// Machines of its runtime fail to boot.
    BootFailing,
    /// Its machine ended under it.
    MachineLost,
    /// Its function was deleted while it waited.
    FunctionDeleted,
    /// The host takes no more requests.
    Draining,
    /// Its caller has gone.
    Cancelled,
}

/// Why a container is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// Nobody wanted it for long enough.
    Idle,
    /// Its account needs the room.
    Room,
    /// Its function was deleted.
    FunctionDeleted,
}

/// Why a machine is destroyed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DestroyReason {
    /// Its account had nothing in it for long enough.
    Idle,
    /// The warming pool has more than it should.
    Surplus,
    /// The host needs the room for a request.
    Room,
    /// The agent is being shut down.
    Drain,
}

// === impl DestroyReason ===

impl DestroyReason {
    /// The reason in words, for reports.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Self::Idle => "its account left it idle",
            Self::Surplus => "the warming pool had more than it should",
            Self::Room => "the host needed the room for a request",
            Self::Drain => "the agent is shutting down",
        }
    }
}

// === impl StopReason ===

impl StopReason {
    /// The reason in words, for reports.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Self::Idle => "nobody wanted it for long enough",
            Self::Room => "its account needed the room",
            Self::FunctionDeleted => "its function was deleted",
        }
    }
}
