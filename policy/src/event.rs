//! What happens: the only input of decisions.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use stoker_credits::{Account, Credits, Mode};
use ulid::Ulid;

use crate::pressure::{BalloonMeasures, HostMemory};
use crate::scale::{Launch, Measures, SizeChange, Taken, Thresholds};
use crate::{AccountLimits, Amount, ContainerId, MachineId, RequestId, Resize, Sample, Shape};

/// One version of a function's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Code {
    /// The function's unique id: one deleted and made again under the same name is another.
    pub uid: Ulid,
    /// Its version, from 1.
    pub version: u64,
}

/// A kind of container: what runs in it, and what it is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Kind {
    /// What runs in it.
    pub code: Code,
    /// What it is given.
    pub amount: Amount,
}

/// What a request needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Demand {
    /// The account that it belongs to.
    pub account: Arc<str>,
    /// What its machine must have loaded.
    pub runtime: Arc<str>,
    /// The kinds of container that may serve it, the best first. An idle one of any is taken in that order; a new one is of
    /// the first kind. One without any is refused.
    pub kinds: Vec<Kind>,
    /// How the amount of its first kind is looked after; not at all in recordings of before there was a resizer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resize: Option<Arc<Resize>>,
    /// It names its amount itself, which is compared with what it uses, and is nobody else's.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub own_amount: bool,
}

/// What happened. An event about something that is no more is ignored, so an executor may report late.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Event {
    /// Time passed.
    Tick,
    /// Someone wants a function run. The id is new.
    Requested {
        /// The request.
        request: RequestId,
        /// What it needs.
        demand: Demand,
    },
    /// The caller has gone: a request that waits ends by it, one whose container starts is not begun or placed again, and one
    /// that runs goes on.
    CallerLeft {
        /// The request.
        request: RequestId,
    },
    /// Someone wants a container ready ahead of requests.
    Prepare {
        /// The account that it belongs to.
        account: Arc<str>,
        /// What its machine must have loaded.
        runtime: Arc<str>,
        /// What it is to be.
        kind: Kind,
    },
    /// The guest of a machine that was booted has answered.
    MachineReady {
        /// The machine.
        machine: MachineId,
    },
    /// A machine is gone, asked or not: process, cgroup and files.
    MachineEnded {
        /// The machine.
        machine: MachineId,
    },
    /// A machine that an earlier agent left lives; its guest has not answered this one yet. It counts, whatever the rules allow
    /// now, and nothing is placed in it. No machine is booted before the next event of another kind: more may be found.
    MachineFound {
        /// The machine; one that is known already is ignored.
        machine: MachineId,
        /// What it has loaded.
        runtime: Arc<str>,
        /// Its size.
        shape: Shape,
        /// The one account that it serves, if it has been assigned.
        account: Option<Arc<str>>,
        /// When it was booted: time since 1970, by the host's clock.
        created: Duration,
        /// What becomes of it without credits; as the rules have it where nothing else was asked for.
        #[serde(default)]
        mode: Option<Mode>,
        /// How an account launched it, with what was asked for last; nothing of any other. It counts as `shape` says, which may be
        /// more.
        #[serde(default)]
        launched: Option<Box<Launch>>,
    },
    /// The guest of a machine that was found has answered: it is taken over.
    MachineAdopted {
        /// The machine; one that is not found, or was adopted already, is ignored.
        machine: MachineId,
        /// The containers in it; those in a machine of no account are ignored.
        containers: Vec<FoundContainer>,
    },
    /// A container that was made can take a request.
    ContainerReady {
        /// The container.
        container: ContainerId,
    },
    /// A container could not be made, and is gone.
    ContainerFailed {
        /// The container.
        container: ContainerId,
        /// What that means for its request.
        failure: ContainerFailure,
    },
    /// A container ended of itself or because it was stopped.
    ContainerEnded {
        /// The container.
        container: ContainerId,
    },
    /// A request that was dispatched has come to its end.
    Completed {
        /// The container that it ran in.
        container: ContainerId,
        /// The request.
        request: RequestId,
        /// Whether it was answered, and whether its container takes the next.
        completion: Completion,
    },
    /// What a container used for the request that it runs, or for its start: told before the end of either, and ignored after it.
    Executed {
        /// The container.
        container: ContainerId,
        /// What ran.
        code: Code,
        /// What it used.
        sample: Sample,
    },
    /// A function is no more.
    FunctionDeleted {
        /// Its unique id: another may have its name by now.
        uid: Ulid,
    },
    /// What a machine's containers have used so far.
    Used {
        /// The machine.
        machine: MachineId,
        /// Containers and their use; those of other machines are ignored.
        containers: Vec<(ContainerId, Usage)>,
    },
    /// A machine's account of credits was settled up to now: told when it is opened, whenever its level changes, and where that
    /// was decided.
    CreditsSettled {
        /// The machine.
        machine: MachineId,
        /// Its account; one that was settled before another that was told is ignored.
        account: Account,
    },
    /// Somebody wants a machine's account to go by other terms. Ignored where `World::plan_for` refuses it.
    PlanAsked {
        /// The machine.
        machine: MachineId,
        /// Its baseline in millicores of one CPU, for all its vCPUs together; as it is where absent.
        baseline_millis: Option<u32>,
        /// What becomes of it without credits; as it is where absent.
        mode: Option<Mode>,
        /// Who wants that.
        by: Arc<str>,
    },
    /// Somebody gives a machine credits.
    CreditsGranted {
        /// The machine.
        machine: MachineId,
        /// How many.
        credits: Credits,
        /// Who gives them.
        by: Arc<str>,
    },
    /// Somebody wants an account to have other limits from now on. Ignored where one is zero that must be at least one.
    LimitsAsked {
        /// The account.
        account: Arc<str>,
        /// All of them.
        limits: Box<AccountLimits>,
        /// Who wants that.
        by: Arc<str>,
    },
    /// An account wants a machine of its own. Ignored where `World::may_launch` refuses it.
    LaunchAsked {
        /// The machine; the id is new.
        machine: MachineId,
        /// The account.
        account: Arc<str>,
        /// What it is to be.
        launch: Box<Launch>,
        /// Who wants that.
        by: Arc<str>,
    },
    /// Somebody wants a machine that was launched to end.
    EndAsked {
        /// The machine; one that was not launched is ignored.
        machine: MachineId,
        /// Who wants that.
        by: Arc<str>,
    },
    /// Somebody wants a machine that was launched to have another size. Ignored where `World::resize_for` refuses it.
    ResizeAsked {
        /// The machine.
        machine: MachineId,
        /// What it is to have.
        change: SizeChange,
        /// Who wants that.
        by: Arc<str>,
    },
    /// Somebody wants a machine that was launched to go by these thresholds, and by no others.
    ThresholdsAsked {
        /// The machine; one that was not launched is ignored.
        machine: MachineId,
        /// The thresholds, none where it is to keep its size.
        thresholds: Thresholds,
        /// Who wants that.
        by: Arc<str>,
    },
    /// A machine that was launched was measured: once a second, or more often.
    Measured {
        /// The machine; one that does not run is ignored.
        machine: MachineId,
        /// What was measured.
        measures: Measures,
    },
    /// What the guest of a machine that was launched has taken so far, as its devices tell: whenever that changes, and once after
    /// each `ResizeMachine`.
    MachineResized {
        /// The machine.
        machine: MachineId,
        /// The number of the last `ResizeMachine` that had reached the devices by then, 0 where none of this agent's had. Where
        /// there is a later one it is old, and ignored.
        number: u64,
        /// What it has.
        taken: Taken,
    },
    /// The host's memory was looked at, and balloons with it: a second after it was pressed, and once a second as long as
    /// `World::watches_memory`.
    HostMemory {
        /// What it is and was.
        memory: HostMemory,
        /// The balloons of machines that were launched; none where it was not watched. Machines that do not run are ignored.
        balloons: Vec<(MachineId, BalloonMeasures)>,
    },
    /// Take no new request, finish what runs, let every machine go.
    Drain,
    /// Whatever still runs is ended now.
    DrainExpired,
}

/// A container in a machine that an earlier agent left. It is not taken over where its id, or that of its request, is known
/// already: whoever reports it ends it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundContainer {
    /// The container.
    pub container: ContainerId,
    /// What it is.
    pub kind: Kind,
    /// When it was made: time since 1970, by the host's clock.
    pub created: Duration,
    /// The request that it runs, if it runs one. It ends by `Completed` like any other; its caller is gone, so it is not placed
    /// again.
    pub request: Option<RequestId>,
}

/// What a container that could not be made means for its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ContainerFailure {
    /// The request has its answer by that: the function failed at init, or its code can't be had.
    Settled,
    /// The machine is to blame; another may serve the request.
    Lost,
}

/// How a dispatched request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Completion {
    /// It has its answer, and its container takes the next.
    Answered,
    /// It has its answer, and its container ended with it.
    Ended,
    /// Its guest did not begin it, and its container is gone: it is placed again.
    NotBegun,
}

/// What a container or machine has used since it was made, as eBPF counts it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// CPU time in ns.
    pub cpu_ns: u64,
    /// Time in ns that its threads were runnable and waited for a CPU.
    pub wait_ns: u64,
    /// Resident memory now, in bytes.
    pub memory_bytes: u64,
    /// The most resident memory so far, in bytes.
    pub memory_peak_bytes: u64,
    /// When it was measured: time since 1970, by the host's clock.
    pub wall: Duration,
}
