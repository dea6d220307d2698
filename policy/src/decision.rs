//! What is decided: commands, each with its reason in figures.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use stoker_credits::{Class, Credits, Plan};

use crate::scale::{Crossed, Launch, Resource, Size, Taken, Thresholds};
use crate::{Amount, ContainerId, Kind, MachineId, RequestId, Shape};

/// What is to be done, and why. The command has changed the world already; executors carry it out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// The change to carry out.
    pub command: Command,
    /// What led to it, in figures.
    pub reason: Reason,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Start a machine. Acknowledged by `MachineReady` or `MachineEnded`.
    BootMachine {
        /// The machine; new.
        machine: MachineId,
        /// What it must have loaded.
        runtime: Arc<str>,
        /// Its size.
        shape: Shape,
        /// The request that needs a machine larger than the standard one, if it is made for one.
        reserved: Option<RequestId>,
    },
    /// A warming machine belongs to an account from now on.
    AssignMachine {
        /// The machine.
        machine: MachineId,
        /// The account.
        account: Arc<str>,
    },
    /// Make a container. Acknowledged by `ContainerReady` or `ContainerFailed`.
    CreateContainer {
        /// The machine that the container is on.
        machine: MachineId,
        /// The container; new.
        container: ContainerId,
        /// What it is to be.
        kind: Kind,
        /// How large the machine's drive is from now on, in MiB: it is made so large before, where it is not already.
        #[serde(default)]
        drive_mib: u32,
        /// What for.
        purpose: Purpose,
    },
    /// Run the request in the container. Acknowledged by `Completed`.
    Dispatch {
        /// The machine that the container is on.
        machine: MachineId,
        /// The container.
        container: ContainerId,
        /// The request.
        request: RequestId,
    },
    /// End a container that runs nothing. Acknowledged by `ContainerEnded`.
    StopContainer {
        /// The machine that the container is on.
        machine: MachineId,
        /// The container.
        container: ContainerId,
    },
    /// A machine takes no further request or container; it is destroyed once nothing runs in it.
    CloseMachine {
        /// The machine.
        machine: MachineId,
    },
    /// End a machine. Acknowledged by `MachineEnded`.
    DestroyMachine {
        /// The machine.
        machine: MachineId,
        /// Whether its guest is asked to power off first.
        gently: bool,
    },
    /// Give a machine its part of what its account gets of contended CPUs.
    WeighMachine {
        /// The machine.
        machine: MachineId,
        /// Its `cpu.weight`, from 1 to 10,000 (cgroup v2, "CPU Interface Files"; by default 100).
        weight: u32,
        /// The CPU in millicores of which a machine with all of it would have the account's whole weight.
        of_millis: u64,
    },
    /// Let a machine run with this priority, and use so much.
    SetCpu {
        /// The machine.
        machine: MachineId,
        /// Before whom it comes.
        class: Class,
        /// The most that its vCPUs may use, in millicores of one CPU; never less than its baseline.
        allowed_millis: u32,
    },
    /// Settle a machine's account of credits. Acknowledged by `CreditsSettled`.
    SettleCredits {
        /// The machine.
        machine: MachineId,
    },
    /// Let a machine's account go by other terms. Acknowledged by `CreditsSettled`.
    ChangePlan {
        /// The machine.
        machine: MachineId,
        /// What it is to have.
        plan: Plan,
    },
    /// Give a machine credits, which are spent first and outside the cap. Acknowledged by `CreditsSettled`.
    GrantCredits {
        /// The machine.
        machine: MachineId,
        /// How many, in thousandths.
        credits: Credits,
    },
    /// Start a machine for an account, which is its own from now on. Acknowledged by `MachineReady` or `MachineEnded`.
    LaunchMachine {
        /// The machine; new.
        machine: MachineId,
        /// The account.
        account: Arc<str>,
        /// What it is to be.
        launch: Box<Launch>,
    },
    /// Let a machine that was launched have so much. Acknowledged by `MachineResized`, which nobody waits for: its vCPUs are held to
    /// the CPU share at once.
    ResizeMachine {
        /// The machine.
        machine: MachineId,
        /// The number of the request, one more than that of the last; the same where vCPUs and memory stay, and its devices have
        /// nothing to do.
        number: u64,
        /// What it is to have.
        asked: Size,
    },
    /// Tell how far a machine's last resize has come.
    ReportResize {
        /// The machine.
        machine: MachineId,
        /// The number of the request.
        number: u64,
    },
    /// Leave a machine as large as it is, though a threshold is crossed.
    KeepSize {
        /// The machine.
        machine: MachineId,
        /// What the threshold would change.
        resource: Resource,
    },
    /// Let a machine that was launched go by these thresholds.
    SetThresholds {
        /// The machine.
        machine: MachineId,
        /// All of them.
        thresholds: Thresholds,
    },
    /// Keep what is free in a machine, and what comes free there, for a request of its account that waits.
    KeepRoom {
        /// The machine.
        machine: MachineId,
        /// The request.
        request: RequestId,
        /// How large the machine's drive counts from now on, in MiB: it is made so large with the next container.
        #[serde(default)]
        drive_mib: u32,
    },
    /// A request that waits comes before all others of its account: until it has its place none gets a machine that could not
    /// share it, and one of those that the account may run is kept for it.
    PutFirst {
        /// The request.
        request: RequestId,
    },
    /// A machine that was booted for one request is for anyone.
    ReleaseMachine {
        /// The machine.
        machine: MachineId,
    },
    /// The request waits for a place.
    Wait {
        /// The request.
        request: RequestId,
    },
    /// The request ends without an answer of its function.
    Refuse {
        /// The request.
        request: RequestId,
        /// Why, as its caller is told.
        refusal: Refusal,
    },
}

/// What a container is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Purpose {
    /// To serve a request.
    Serve(RequestId),
    /// To be there before a request comes.
    Ahead,
}

/// Why a request has no answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// As many wait as may.
    QueueFull {
        /// How many wait on this host.
        waiting: u32,
    },
    /// As many of its account wait as may.
    AccountQueueFull {
        /// The account's limit.
        limit: u32,
    },
    /// It waited as long as it may.
    QueueTimeout {
        /// How long.
        waited: Duration,
    },
    /// No machine of this host, or that its account may have, could hold its amount.
    TooLarge {
        /// The most that one could.
        largest: Amount,
    },
    /// Machines of its runtime fail to boot.
    BootFailing,
    /// Machines ended under it before it had its answer, or could not make its container.
    MachineLost,
    /// Its function was deleted before it ran.
    FunctionDeleted,
    /// The host takes no more requests.
    Draining,
    /// Its caller has gone.
    CallerLeft,
}

/// Why something was decided, in figures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Reason {
    /// A container of an acceptable kind lay idle.
    IdleContainer {
        /// For how long.
        idle: Duration,
        /// Which of the request's kinds it is, from 0.
        choice: u32,
    },
    /// An active machine of the account had the room: the fullest such one.
    RoomInMachine {
        /// What it had free.
        free: Amount,
    },
    /// The account had no machine with room; the warming pool had one.
    WarmingMachine {
        /// For how long it had been ready.
        ready: Duration,
        /// How many of the runtime are left.
        left: u32,
    },
    /// The machine became ready while the request waited.
    NewMachine {
        /// How long the request had waited.
        waited: Duration,
    },
    /// Its container was made for it.
    MadeForIt,
    /// It has to wait: nothing idle, no room, no warming machine.
    NoPlace {
        /// How many wait on this host, it included.
        waiting: u32,
        /// How many machines boot.
        booting: u32,
    },
    /// It has to wait: its account runs as many as it may.
    Concurrency {
        /// The limit.
        limit: u32,
    },
    /// It has to wait: machines of its account that an earlier agent left have not answered yet.
    MachinesFound {
        /// How many.
        machines: u32,
    },
    /// Requests wait for machines.
    RequestsWait {
        /// How many machines they need at least.
        wanted: u32,
        /// How many of the runtime boot already.
        booting: u32,
    },
    /// The warming pool is below its target.
    BelowTarget {
        /// How many of the runtime are ready.
        warming: u32,
        /// How many boot.
        booting: u32,
        /// How many there should be.
        target: u32,
    },
    /// Nobody wanted it for long enough.
    Idle {
        /// For how long.
        idle: Duration,
    },
    /// The warming pool had more than it should.
    Surplus {
        /// How many of the runtime were ready.
        warming: u32,
        /// How many there should be.
        target: u32,
    },
    /// A request needs the room.
    Room {
        /// The request.
        request: RequestId,
        /// What it needs.
        needs: Amount,
    },
    /// Others of its account went before it for too long.
    Overtaken {
        /// How long it has waited.
        waited: Duration,
    },
    /// The limits of its account do not let it have the machine now.
    Limits {
        /// The account.
        account: Arc<str>,
    },
    /// Requests of an account with less than its share wait, and the host is full.
    Share {
        /// The account that waits.
        account: Arc<str>,
        /// Memory in MiB of its machines, for each unit of its share.
        has_mib: u64,
        /// The same of the account that gives.
        other_has_mib: u64,
    },
    /// What its containers were given changed, or what all of its account were.
    Given {
        /// What its containers have.
        amount: Amount,
        /// The weight that this is.
        weight: u32,
        /// The whole weight of the account.
        whole: u64,
    },
    /// By its balance of credits.
    Balance {
        /// The level of that, 0 to 9.
        level: u32,
        /// What it can spend, in thousandths of a credit.
        millicredits: u64,
        /// What it owes, likewise.
        owed_millicredits: u64,
        /// It serves an account.
        serves: bool,
    },
    /// By what it earns it may have reached its next level.
    NextLevel {
        /// The level that it had, 0 to 9.
        level: u32,
        /// What it could spend then, in thousandths of a credit.
        millicredits: u64,
    },
    /// A threshold of it was crossed.
    Crossed(Crossed),
    /// Its guest has what was asked for.
    Taken {
        /// How long it took.
        took: Duration,
    },
    /// Its guest has not taken what was asked for.
    NotTaken {
        /// What was asked for.
        asked: Size,
        /// What it has.
        taken: Taken,
        /// For how long.
        after: Duration,
    },
    /// Its credits go with its vCPUs.
    Rescaled {
        /// How many it had.
        before: u32,
        /// How many it is to have.
        after: u32,
    },
    /// Somebody asked for it.
    Asked {
        /// Who.
        by: Arc<str>,
    },
    /// It was closed, and nothing runs in it any more.
    Closed,
    /// Its function was deleted.
    FunctionDeleted,
    /// The agent is shutting down.
    Drain,
    /// The caller is told; the refusal says it.
    Refused,
}

// === impl Command ===

impl Command {
    /// The machine that it is about, if it is about one.
    #[must_use]
    pub fn machine(&self) -> Option<MachineId> {
        match self {
            Self::BootMachine { machine, .. }
            | Self::AssignMachine { machine, .. }
            | Self::CreateContainer { machine, .. }
            | Self::Dispatch { machine, .. }
            | Self::StopContainer { machine, .. }
            | Self::CloseMachine { machine }
            | Self::DestroyMachine { machine, .. }
            | Self::WeighMachine { machine, .. }
            | Self::SetCpu { machine, .. }
            | Self::SettleCredits { machine }
            | Self::ChangePlan { machine, .. }
            | Self::GrantCredits { machine, .. }
            | Self::LaunchMachine { machine, .. }
            | Self::ResizeMachine { machine, .. }
            | Self::ReportResize { machine, .. }
            | Self::KeepSize { machine, .. }
            | Self::SetThresholds { machine, .. }
            | Self::KeepRoom { machine, .. }
            | Self::ReleaseMachine { machine } => Some(*machine),
            Self::PutFirst { .. } | Self::Wait { .. } | Self::Refuse { .. } => None,
        }
    }

    /// The container that it is about, if it is about one.
    #[must_use]
    pub fn container(&self) -> Option<ContainerId> {
        match self {
            Self::CreateContainer { container, .. }
            | Self::Dispatch { container, .. }
            | Self::StopContainer { container, .. } => Some(*container),
            _ => None,
        }
    }

    /// The request that it is about, if it is about one.
    #[must_use]
    pub fn request(&self) -> Option<RequestId> {
        match self {
            Self::BootMachine { reserved, .. } => *reserved,
            Self::CreateContainer {
                purpose: Purpose::Serve(request),
                ..
            }
            | Self::Dispatch { request, .. }
            | Self::KeepRoom { request, .. }
            | Self::PutFirst { request }
            | Self::Wait { request }
            | Self::Refuse { request, .. } => Some(*request),
            _ => None,
        }
    }

    /// What it does, in a word or two: the same for each command of its kind.
    #[must_use]
    pub fn verb(&self) -> &'static str {
        match self {
            Self::BootMachine { .. } => "boot machine",
            Self::AssignMachine { .. } => "assign machine",
            Self::CreateContainer { .. } => "create container",
            Self::Dispatch { .. } => "dispatch",
            Self::StopContainer { .. } => "stop container",
            Self::CloseMachine { .. } => "close machine",
            Self::DestroyMachine { .. } => "destroy machine",
            Self::WeighMachine { .. } => "weigh machine",
            Self::SetCpu { .. } => "set cpu",
            Self::SettleCredits { .. } => "settle credits",
            Self::ChangePlan { .. } => "change plan",
            Self::GrantCredits { .. } => "grant credits",
            Self::LaunchMachine { .. } => "launch machine",
            Self::ResizeMachine { .. } => "resize machine",
            Self::ReportResize { .. } => "report resize",
            Self::KeepSize { .. } => "keep size",
            Self::SetThresholds { .. } => "set thresholds",
            Self::KeepRoom { .. } => "keep room",
            Self::PutFirst { .. } => "put first",
            Self::ReleaseMachine { .. } => "release machine",
            Self::Wait { .. } => "wait",
            Self::Refuse { .. } => "refuse",
        }
    }
}

// === impl Refusal ===

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::QueueFull { waiting } => write!(f, "{waiting} requests wait on this host already"),
            Self::AccountQueueFull { limit } => {
                write!(f, "{limit} requests of the account wait already, as many as may")
            }
            Self::QueueTimeout { waited } => write!(f, "no place became free within {}", Rounded(*waited)),
            Self::TooLarge { largest } => write!(f, "the largest container can have {largest}"),
            Self::BootFailing => f.write_str("machines of its runtime fail to boot"),
            Self::MachineLost => f.write_str("its machines ended or could not make its container"),
            Self::FunctionDeleted => f.write_str("its function was deleted before it ran"),
            Self::Draining => f.write_str("the agent is shutting down"),
            Self::CallerLeft => f.write_str("its caller has gone"),
        }
    }
}

/// A time as people read it: whole microseconds or milliseconds, or tenths of a second.
pub(crate) struct Rounded(pub(crate) Duration);

impl fmt::Display for Rounded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_nanos() {
            0..1_000_000 => write!(f, "{} us", self.0.as_micros()),
            1_000_000..1_000_000_000 => write!(f, "{} ms", self.0.as_millis()),
            _ => write!(f, "{:.1} s", self.0.as_secs_f64()),
        }
    }
}

// === impl Reason ===

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::IdleContainer { idle, choice: 0 } => write!(f, "it had been idle for {}", Rounded(*idle)),
            Self::IdleContainer { idle, choice } => {
                write!(
                    f,
                    "it had been idle for {} and is choice {} of the request",
                    Rounded(*idle),
                    choice + 1
                )
            }
            Self::RoomInMachine { free } => write!(f, "the machine had {free} free, the least of those with room"),
            Self::WarmingMachine { ready, left } => write!(
                f,
                "no machine of the account had room; this one had been ready for {}, {left} more are",
                Rounded(*ready)
            ),
            Self::NewMachine { waited } => {
                let waited = Rounded(*waited);
                write!(f, "the machine became ready after the request had waited {waited}")
            }
            Self::MadeForIt => f.write_str("its container was made for it"),
            Self::NoPlace { waiting, booting } => {
                write!(
                    f,
                    "nothing was idle and nothing had room; {waiting} wait and {booting} machines boot"
                )
            }
            Self::Concurrency { limit } => write!(f, "its account runs {limit} requests, as many as it may"),
            Self::MachinesFound { machines } => {
                write!(
                    f,
                    "machines that an earlier agent left of its account have not answered yet: {machines}"
                )
            }
            Self::RequestsWait { wanted, booting } => {
                write!(f, "requests that wait need {wanted} machines and {booting} boot")
            }
            Self::BelowTarget {
                warming,
                booting,
                target,
            } => {
                write!(
                    f,
                    "{warming} machines are ready and {booting} boot, of {target} that there should be"
                )
            }
            Self::Idle { idle } => write!(f, "nobody wanted it for {}", Rounded(*idle)),
            Self::Surplus { warming, target } => {
                write!(f, "{warming} machines were ready, and {target} should be")
            }
            Self::Room { request, needs } => write!(f, "request {request} needs {needs}"),
            Self::Share {
                account,
                has_mib,
                other_has_mib,
            } => write!(
                f,
                "{account} waits and has {has_mib} MiB of machines for each share, the account that gives {other_has_mib} MiB"
            ),
            Self::Overtaken { waited } => {
                write!(
                    f,
                    "it has waited for {}, and others of its account went before it",
                    Rounded(*waited)
                )
            }
            Self::Limits { account } => write!(f, "the limits of {account} do not let it have this machine now"),
            Self::Given { amount, weight, whole } => {
                write!(
                    f,
                    "its containers have {amount}, {weight} of the {whole} that its account weighs"
                )
            }
            Self::Balance {
                level,
                millicredits,
                owed_millicredits,
                serves,
            } => {
                let left = Credits::from_millis(*millicredits);
                match owed_millicredits {
                    0 => write!(f, "it has {left} left")?,
                    owed => write!(f, "it has nothing left and owes {}", Credits::from_millis(*owed))?,
                }
                write!(f, ", level {level} of 9")?;
                match serves {
                    true => Ok(()),
                    false => f.write_str("; while it serves no account it comes before nobody"),
                }
            }
            Self::NextLevel { level, millicredits } => {
                let left = Credits::from_millis(*millicredits);
                write!(
                    f,
                    "it had {left} at level {level} of 9, and may have earned enough for the next"
                )
            }
            Self::Crossed(crossed) => crossed.fmt(f),
            Self::Taken { took } => write!(f, "its guest has what was asked for, after {}", Rounded(*took)),
            Self::NotTaken { asked, taken, after } => write!(
                f,
                "after {} its guest has {} vCPUs and {} MiB of the {asked} that it was asked to have",
                Rounded(*after),
                taken.vcpus,
                taken.memory_mib
            ),
            Self::Rescaled { before, after } => {
                write!(f, "its credits go with its vCPUs: {after} instead of {before}")
            }
            Self::Asked { by } => write!(f, "{by} asked for it"),
            Self::Closed => f.write_str("it was closed, and nothing runs in it any more"),
            Self::FunctionDeleted => f.write_str("its function was deleted"),
            Self::Drain => f.write_str("the agent is shutting down"),
            Self::Refused => f.write_str("it can't be served"),
        }
    }
}
