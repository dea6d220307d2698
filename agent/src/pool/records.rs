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
    /// Why it ended, where its guest said so before the call in flight on it was answered.
    pub(super) ended: Option<String>,
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

    /// Its guest said that it ended while a call on it is in flight; only the first word counts.
    pub(super) fn says_ended(&mut self, detail: String) -> bool {
        let first = self.ended.is_none();
        if first {
            self.ended = Some(detail);
        }
        first
    }

    /// The call in flight on it is over: why it is gone, if it is. `answered` is what the answer says of that.
    pub(super) fn gone(&mut self, answered: Option<String>) -> Option<String> {
        answered.or(self.ended.take())
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

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> ContainerRecord {
        ContainerRecord {
            id: Ulid::generate(),
            machine: MachineId(1),
            machine_name: "machines/m".into(),
            function: "accounts/a/functions/f".into(),
            version: 1,
            amount: Amount {
                cpu_millis: 250,
                memory_mib: 128,
            },
            state: v1::container::State::Busy,
            create_time: SystemTime::now(),
            invocations: 0,
            usage: None,
            stopped: None,
            ended: None,
        }
    }

    #[test]
    fn an_end_during_a_call_is_remembered_until_its_answer() {
        let mut record = record();
        assert!(record.says_ended("it crashed".into()));
        assert!(!record.says_ended("it crashed again".into()), "only the first is news");
        assert_eq!(record.gone(None).as_deref(), Some("it crashed"));
    }

    #[test]
    fn the_answer_says_more_than_the_watch() {
        let mut record = record();
        assert_eq!(record.gone(None), None);
        record.says_ended("it ended".into());
        assert_eq!(
            record.gone(Some("out of memory".into())).as_deref(),
            Some("out of memory")
        );
    }
}
