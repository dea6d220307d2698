//! What is to be done.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use stoker_credits::{Class, Credits, Plan};

use super::Refusal;
use crate::scale::{Launch, Resource, Size, Thresholds};
use crate::{AccountLimits, Code, ContainerId, Kept, Kind, MachineId, Notice, RequestId, Shape};

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
    /// Let an account have so much from now on; what it has stays, whatever that is.
    SetLimits {
        /// The account.
        account: Arc<str>,
        /// All limits of it.
        limits: Box<AccountLimits>,
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
    /// Ask the guest of a machine that was launched for so much of its memory, or give it back. How much its balloon has is told with
    /// the next `HostMemory`.
    SetBalloon {
        /// The machine.
        machine: MachineId,
        /// What its balloon is to have, in MiB; 0 lets its guest have all.
        mib: u32,
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
    /// Containers of this version of a function are made with another amount from now on. Whoever keeps it tells it again with each
    /// request (`Resize::kept`).
    SetAmount {
        /// The function and its version.
        code: Code,
        /// What was determined.
        kept: Kept,
    },
    /// Tell the user of a function that an amount does not fit.
    Notify {
        /// What.
        notice: Notice,
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
            | Self::SetBalloon { machine, .. }
            | Self::SetThresholds { machine, .. }
            | Self::KeepRoom { machine, .. }
            | Self::ReleaseMachine { machine } => Some(*machine),
            Self::PutFirst { .. }
            | Self::SetLimits { .. }
            | Self::SetAmount { .. }
            | Self::Notify { .. }
            | Self::Wait { .. }
            | Self::Refuse { .. } => None,
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
            Self::SetLimits { .. } => "set limits",
            Self::LaunchMachine { .. } => "launch machine",
            Self::ResizeMachine { .. } => "resize machine",
            Self::ReportResize { .. } => "report resize",
            Self::KeepSize { .. } => "keep size",
            Self::SetBalloon { .. } => "set balloon",
            Self::SetThresholds { .. } => "set thresholds",
            Self::KeepRoom { .. } => "keep room",
            Self::PutFirst { .. } => "put first",
            Self::ReleaseMachine { .. } => "release machine",
            Self::SetAmount { .. } => "set amount",
            Self::Notify { .. } => "notify",
            Self::Wait { .. } => "wait",
            Self::Refuse { .. } => "refuse",
        }
    }
}
