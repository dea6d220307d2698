//! What is known of a machine or container beside what the policy decides by.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use stoker_ebpf::CgroupId;
use stoker_proto::v1;
use ulid::Ulid;

use crate::machines::{Guest, Stopper};
use crate::policy::placement::{Machine, MachineId, MachineState, StopReason};
use crate::policy::{Amount, Shape};

#[derive(Debug)]
pub(super) struct MachineRecord {
    pub(super) id: Ulid,
    pub(super) runtime: Arc<str>,
    pub(super) shape: Shape,
    pub(super) create_time: SystemTime,
    pub(super) stopper: Stopper,
    /// Once it was spawned.
    pub(super) pid: u32,
    pub(super) cgroup: String,
    pub(super) cgroup_id: Option<CgroupId>,
    /// Once it was ready.
    pub(super) guest: Option<Guest>,
    pub(super) boot_duration: Option<Duration>,
}

#[derive(Debug)]
pub(super) struct ContainerRecord {
    pub(super) id: Ulid,
    pub(super) machine: MachineId,
    pub(super) machine_name: String,
    pub(super) function: String,
    pub(super) version: u64,
    pub(super) amount: Amount,
    pub(super) state: v1::container::State,
    pub(super) create_time: SystemTime,
    pub(super) invocations: u64,
    pub(super) usage: Option<v1::Usage>,
    pub(super) stopped: Option<StopReason>,
}

// === impl MachineRecord ===

impl MachineRecord {
    pub(super) fn new(runtime: Arc<str>, shape: Shape, stopper: Stopper) -> Self {
        Self {
            id: Ulid::generate(),
            runtime,
            shape,
            create_time: SystemTime::now(),
            stopper,
            pid: 0,
            cgroup: String::new(),
            cgroup_id: None,
            guest: None,
            boot_duration: None,
        }
    }

    pub(super) fn name(&self) -> String {
        format!("machines/{}", self.id)
    }

    /// As the API shows it. `None` for one that the policy has let go.
    pub(super) fn proto(&self, machine: Option<&Machine>) -> v1::Machine {
        use v1::machine::State;
        let (state, account) = match machine.map(Machine::state) {
            Some(MachineState::Booting) => (State::Booting, None),
            Some(MachineState::Warming) => (State::Warming, None),
            Some(MachineState::Active { account }) => (State::Active, Some(account)),
            Some(MachineState::Stopping { account }) => (State::Stopping, account.as_ref()),
            None => (State::Ended, None),
        };
        v1::Machine {
            name: self.name(),
            state: state.into(),
            runtime: self.runtime.to_string(),
            account: account.map(|account| format!("accounts/{account}")).unwrap_or_default(),
            amount: Some(self.shape.capacity(0).into()),
            allocated: machine.map(|machine| machine.allocated().into()),
            pid: self.pid,
            cgroup: self.cgroup.clone(),
            create_time: Some(self.create_time.into()),
            boot_duration: self.boot_duration.and_then(|duration| duration.try_into().ok()),
            usage: None,
            end: None,
        }
    }
}

// === impl ContainerRecord ===

impl ContainerRecord {
    pub(super) fn name(&self) -> String {
        format!("{}/containers/{}", self.machine_name, self.id)
    }

    /// As the API shows it.
    pub(super) fn proto(&self) -> v1::Container {
        v1::Container {
            name: self.name(),
            state: self.state.into(),
            function: self.function.clone(),
            version: self.version,
            amount: Some(self.amount.into()),
            create_time: Some(self.create_time.into()),
            invocations: self.invocations,
            usage: self.usage,
            end_detail: String::new(),
        }
    }
}
