//! What the loop hears.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use stoker_credits::{Account, Credits, Mode};
use stoker_ebpf::CgroupId;
use stoker_policy::pressure::{BalloonMeasures, HostMemory};
use stoker_policy::{
    AccountLimits, AccountUse, Completion, ContainerId, Cpu, Demand, Kind, MachineId, RequestId, Sample,
};
use stoker_proto::guest as proto;
use stoker_proto::v1;
use tokio::sync::{oneshot, watch};
use ulid::Ulid;

use super::call::Told;
use super::container::Made;
use super::error::CreditsError;
use super::journal::Question;
use super::launched::{Counted, Order};
use super::machine::Leftovers;
use super::survey::Known;
use crate::catalog::Function;
use crate::machines::{Guest, RecordFile, Resizer, ScratchDrive};
use crate::metrics::Histograms;
use crate::pacing::Undecided;
use crate::telemetry::credits::Standing;

/// What the loop hears.
#[derive(Debug)]
pub(super) enum Message {
    /// A call wants a place.
    Requested {
        request: RequestId,
        demand: Demand,
        function: Arc<Function>,
        /// The id that its caller gave.
        given: Option<String>,
        /// Its connection is read on once this is dropped.
        undecided: Option<Undecided>,
        tell: oneshot::Sender<Told>,
    },
    /// A container is wanted ahead of requests.
    Prepare {
        function: Arc<Function>,
        kind: Kind,
    },
    CallerLeft {
        request: RequestId,
    },
    /// A call that was placed is over, or has to be placed again.
    Completed {
        container: ContainerId,
        request: RequestId,
        completion: Completion,
        /// Why the container is gone, where it is.
        detail: Option<String>,
        /// Where the next place is told, where it was not begun.
        again: Option<oneshot::Sender<Told>>,
        /// What it used, where its function's amount is looked after.
        executed: Option<Executed>,
    },
    FunctionDeleted {
        uid: Ulid,
    },
    Machine {
        machine: MachineId,
        report: MachineReport,
    },
    ContainerMade {
        container: ContainerId,
        made: Made,
    },
    ContainerStopped {
        container: ContainerId,
    },
    /// A guest about its containers.
    Said {
        machine: MachineId,
        said: proto::WatchResponse,
        /// What the host counted then of the machine, where it was launched.
        counted: Option<Counted>,
        /// Answered once it was taken.
        taken: oneshot::Sender<()>,
    },
    Machines {
        include_ended: bool,
        reply: oneshot::Sender<Vec<(v1::Machine, Option<CgroupId>)>>,
    },
    Containers {
        reply: oneshot::Sender<Vec<v1::Container>>,
    },
    /// A machine's account was settled.
    Settled {
        machine: MachineId,
        account: Account,
        /// Its level had fallen, and so long after that it was held to what it may use.
        held: Option<Duration>,
    },
    /// Whose the accounts are, and how their machines run.
    Credits {
        reply: oneshot::Sender<Vec<Accounted>>,
    },
    /// Somebody wants a machine's account to be another.
    ChangeCredits {
        machine: MachineId,
        change: CreditsChange,
        by: Arc<str>,
        /// Answered once it is so.
        reply: oneshot::Sender<Result<(), CreditsError>>,
    },
    /// An account may have so much from now on.
    SetLimits {
        account: Arc<str>,
        limits: AccountLimits,
        by: Arc<str>,
        /// Answered once it is so.
        reply: oneshot::Sender<()>,
    },
    /// What an account has, or all that have anything.
    AccountUse {
        account: Option<Arc<str>>,
        reply: oneshot::Sender<BTreeMap<Arc<str>, AccountUse>>,
    },
    /// Of machines that accounts launch.
    Launched(Order),
    /// The machines whose balloons are to be looked at, and what reaches these.
    Balloons {
        reply: oneshot::Sender<Vec<(MachineId, Resizer)>>,
    },
    /// The host's memory was looked at, and those balloons.
    HostMemory {
        memory: HostMemory,
        balloons: Vec<(MachineId, BalloonMeasures)>,
        /// Answered with whether both are to be looked at again.
        reply: oneshot::Sender<bool>,
    },
    Decisions(Question),
    Pulse {
        reply: oneshot::Sender<Pulse>,
    },
    Survey {
        reply: oneshot::Sender<Known>,
    },
    /// Answered once all that was decided is kept.
    Leave {
        reply: oneshot::Sender<()>,
    },
    Drain {
        reply: oneshot::Sender<()>,
    },
    DrainExpired {
        reply: oneshot::Sender<()>,
    },
    #[cfg(test)]
    Panic,
}

/// What an execution used of what it was given.
#[derive(Debug)]
pub(super) struct Executed {
    pub(super) sample: Sample,
    /// Hears what that led to, for its caller to be told.
    pub(super) notified: oneshot::Sender<Option<v1::Notification>>,
}

/// What the loop has, told at once where it works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pulse {
    /// How many machines.
    pub machines: usize,
    /// How many containers.
    pub containers: usize,
    /// The last boots of some runtime have failed, one after the other.
    pub boots_fail: bool,
}

/// A machine that has an account.
#[derive(Clone, Debug)]
pub(super) struct Accounted {
    pub(super) machine: MachineId,
    /// Whom it serves.
    pub(super) account: Option<Arc<str>>,
    pub(super) vcpus: u32,
    pub(super) cpu: Option<Cpu>,
}

/// What is wanted of a machine's account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CreditsChange {
    /// It is to go by these from now on.
    Plan {
        /// Its baseline in millicores of one CPU, for all vCPUs together; as it is where absent.
        baseline_millis: Option<u32>,
        /// What becomes of it without credits; as it is where absent.
        mode: Option<Mode>,
    },
    /// It is given so many.
    Grant(Credits),
}

/// What became of a machine.
#[derive(Debug)]
pub(super) enum MachineReport {
    Started(Box<Started>),
    Ready(Box<Answered>),
    Ended(Box<Ended>),
}

/// A machine's process as it runs.
#[derive(Debug)]
pub struct Started {
    /// The VMM's process id; 0 where there is none.
    pub pid: u32,
    /// The VMM's cgroup, a path below the cgroup v2 mount.
    pub cgroup: String,
    /// What its use is counted by.
    pub cgroup_id: Option<CgroupId>,
    /// Its account as it was then, if it has one.
    pub account: Option<Account>,
    /// Takes how urgently it is to run, and how much.
    pub cpu: watch::Sender<Option<Decided>>,
    /// Takes the `cpu.weight` that it is to have, from the first that is given.
    pub cpu_weight: watch::Sender<Option<u32>>,
    /// What the next agent will know of it.
    pub record: RecordFile,
    /// Its scratch drive.
    pub drive: ScratchDrive,
    /// What changes its size.
    pub resizer: Resizer,
}

/// How a machine is to run, as was decided.
#[derive(Clone, Debug)]
pub struct Decided {
    /// How urgently, and how much.
    pub cpu: Cpu,
    /// When its balance fell to the level that this was decided by, in ns of `CLOCK_MONOTONIC`; nothing where it was decided by
    /// something else.
    pub fell_ns: Option<u64>,
    /// Hears how long after that the machine runs so.
    pub delays: Histograms<()>,
}

/// A machine's guest that has answered.
#[derive(Debug)]
pub struct Answered {
    /// The connection to it.
    pub guest: Guest,
    /// From its start to its first answer.
    pub boot_duration: Duration,
    /// The containers that it has already.
    pub containers: BTreeSet<ContainerId>,
    /// What runs in them: the names of invocations.
    pub running: BTreeMap<ContainerId, String>,
    /// It has run the program of its image already, which may have ended since.
    pub has_run: bool,
}

/// A machine that is gone.
#[derive(Debug)]
pub struct Ended {
    /// The reason, and what its VMM or guest reported of it.
    pub end: v1::MachineEnd,
    /// What it used in all.
    pub usage: Option<v1::Usage>,
    /// Its account as it was settled for the last time.
    pub credits: Option<Standing>,
    /// What is to be removed once this is recorded.
    pub leftovers: Option<Leftovers>,
}

// === impl Answered ===

impl Answered {
    /// A guest and what it told of itself; what is not an id is left out.
    #[must_use]
    pub fn new(guest: Guest, boot_duration: Duration, hello: &proto::HelloResponse) -> Self {
        let ulid = |id: &str| Ulid::from_string(id).ok().map(ContainerId);
        let running = |state: &proto::InvocationState| Some((ulid(&state.container)?, state.name.clone()));
        Self {
            guest,
            boot_duration,
            containers: hello.containers.iter().filter_map(|id| ulid(id)).collect(),
            running: hello.invocations.iter().filter_map(running).collect(),
            has_run: !hello.image_container.is_empty(),
        }
    }
}
