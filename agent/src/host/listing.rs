//! Machines and containers as the API shows them: what the world knows, and the handles beside it.

use std::time::{Duration, SystemTime};

use stoker_policy::{
    Amount, Container, ContainerId, ContainerState, Machine, MachineId, MachineState, Now, RequestId, Usage,
};
use stoker_proto::v1;

use super::call::uuid;
use super::event_loop::{ContainerHandle, MachineHandle};

/// `machines/{machine}`
pub(super) fn machine_name(id: MachineId) -> String {
    format!("machines/{id}")
}

/// The machine of that name.
pub(super) fn machine_id(name: &str) -> Option<MachineId> {
    let id = name.strip_prefix("machines/")?;
    id.parse().ok().map(MachineId)
}

/// `machines/{machine}/containers/{container}`
pub(super) fn container_name(machine: MachineId, id: ContainerId) -> String {
    format!("machines/{machine}/containers/{id}")
}

/// `requests/{request}`
pub(super) fn request_name(id: RequestId) -> String {
    format!("requests/{}", uuid(id))
}

/// An amount as decisions go by it, with what is taken of the machine's scratch disk.
pub(super) fn amount(amount: v1::Amount, scratch_mib: u32) -> Amount {
    Amount {
        cpu_millis: amount.cpu_millis,
        memory_mib: amount.memory_mib,
        scratch_mib,
    }
}

/// An amount as the API shows it.
pub(super) fn proto_amount(amount: Amount) -> v1::Amount {
    v1::Amount {
        cpu_millis: amount.cpu_millis,
        memory_mib: amount.memory_mib,
    }
}

/// A use as decisions go by it.
pub(super) fn usage(usage: &v1::Usage) -> Usage {
    let measured = usage.measure_time.and_then(|time| SystemTime::try_from(time).ok());
    Usage {
        cpu_ns: usage.cpu_ns,
        wait_ns: usage.wait_ns,
        memory_bytes: usage.memory_bytes,
        memory_peak_bytes: usage.memory_peak_bytes,
        wall: measured.map_or(Duration::ZERO, since_1970),
    }
}

/// The time since 1970; 0 before that.
pub(super) fn since_1970(time: SystemTime) -> Duration {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

/// A time since 1970 as the API shows it.
pub(super) fn timestamp(wall: Duration) -> prost_types::Timestamp {
    SystemTime::UNIX_EPOCH
        .checked_add(wall)
        .map(Into::into)
        .unwrap_or_default()
}

/// A machine's state as the API shows it.
pub(super) fn machine_state(state: MachineState) -> v1::machine::State {
    use v1::machine::State;
    match state {
        MachineState::Booting | MachineState::Found => State::Booting,
        MachineState::Warming => State::Warming,
        MachineState::Active | MachineState::Closing => State::Active,
        MachineState::Stopping => State::Stopping,
    }
}

/// A container's state as the API shows it.
pub(super) fn container_state(state: ContainerState) -> v1::container::State {
    use v1::container::State;
    match state {
        ContainerState::Starting(_) => State::Starting,
        ContainerState::Idle => State::Idle,
        ContainerState::Busy(_) => State::Busy,
        ContainerState::Stopping => State::Stopping,
    }
}

/// A machine as it stands.
pub(super) fn machine(machine: &Machine, handle: Option<&MachineHandle>) -> v1::Machine {
    let started = handle.and_then(|handle| handle.started.as_ref());
    let boot_duration = handle.and_then(|handle| handle.boot_duration);
    let launched = machine.launched.as_deref();
    let launched = launched.zip(handle.and_then(|handle| handle.launched.as_deref()));
    v1::Machine {
        name: machine_name(machine.id),
        state: machine_state(machine.state).into(),
        runtime: match machine.launched {
            None => machine.runtime.to_string(),
            Some(_) => String::new(),
        },
        account: machine
            .account
            .as_ref()
            .map(|account| format!("accounts/{account}"))
            .unwrap_or_default(),
        amount: Some(proto_amount(machine.shape.amount())),
        allocated: Some(proto_amount(machine.allocated)),
        pid: started.map_or(0, |started| started.pid),
        cgroup: started.map(|started| started.cgroup.clone()).unwrap_or_default(),
        create_time: Some(created(machine.created)),
        boot_duration: boot_duration.and_then(|duration| duration.try_into().ok()),
        usage: None,
        end: None,
        credits: None,
        scratch_mib: machine.shape.drive_mib,
        scratch_allocated_mib: machine.allocated.scratch_mib,
        launched: launched.map(|(known, handle)| handle.shown(known, machine.state)),
    }
}

/// Takes out of a machine what is kept for the next agent alone.
pub(super) fn withhold(machine: &mut v1::Machine) {
    if let Some(launched) = &mut machine.launched {
        launched.request_sha256.clear();
    }
}

/// A container as it stands.
pub(super) fn container(container: &Container, handle: Option<&ContainerHandle>) -> v1::Container {
    let used = container.usage.map(|usage| v1::Usage {
        cpu_ns: usage.cpu_ns,
        wait_ns: usage.wait_ns,
        memory_bytes: usage.memory_bytes,
        memory_peak_bytes: usage.memory_peak_bytes,
        measure_time: Some(timestamp(usage.wall)),
    });
    v1::Container {
        name: container_name(container.machine, container.id),
        state: container_state(container.state).into(),
        function: handle.map(|handle| handle.function.to_string()).unwrap_or_default(),
        version: container.kind.code.version,
        amount: Some(proto_amount(container.kind.amount)),
        create_time: Some(created(container.created)),
        invocations: container.invocations,
        usage: used,
        end_detail: String::new(),
    }
}

fn created(at: Now) -> prost_types::Timestamp {
    timestamp(at.wall)
}
