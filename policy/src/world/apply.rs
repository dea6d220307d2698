//! What is decided changes the world here, and what must never be is refused.

use std::sync::Arc;

use super::{ContainerState, Cpu, HostRoom, Machine, MachineState, RequestState, Touch, World};
use crate::{Command, ContainerId, Kind, MachineId, Purpose, RequestId, Shape};

/// Why a command is refused. A policy that asks for such a thing has a fault; the world stays as it was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    /// There is none of that id.
    #[error("there is no {0}")]
    Unknown(&'static str),
    /// There is one of that id.
    #[error("there is a {0} of that id")]
    Exists(&'static str),
    /// It is in a state in which that can't be done.
    #[error("the {0} is in another state")]
    State(&'static str),
    /// The machine belongs to another account.
    #[error("the machine does not belong to the account")]
    Account,
    /// More would be given than there is, or than the account may have.
    #[error("there is not enough {0}")]
    Room(&'static str),
    /// Something runs in it.
    #[error("the {0} is busy")]
    Busy(&'static str),
    /// A limit of an account that must be at least one.
    #[error("the limit {0} is zero")]
    Zero(&'static str),
}

type Applied = Result<(), ApplyError>;

impl World {
    /// Carries a command out on the world.
    ///
    /// # Errors
    /// [`ApplyError`] for what must never be: two accounts in a machine, more given than there is, a busy container
    /// stopped. Nothing has changed then.
    pub(crate) fn apply(&mut self, command: &Command) -> Applied {
        match command {
            Command::BootMachine {
                machine,
                runtime,
                shape,
                reserved,
            } => self.boot(*machine, runtime, *shape, *reserved),
            Command::AssignMachine { machine, account } => self.assign(*machine, account),
            Command::CreateContainer {
                machine,
                container,
                kind,
                drive_mib,
                purpose,
            } => self.create(*machine, *container, *kind, *drive_mib, *purpose),
            Command::Dispatch {
                machine,
                container,
                request,
            } => self.dispatch(*machine, *container, *request),
            Command::StopContainer { machine, container } => self.stop_idle(*machine, *container),
            Command::CloseMachine { machine } => self.close(*machine),
            Command::DestroyMachine { machine, .. } => self.destroy(*machine),
            Command::WeighMachine {
                machine,
                weight,
                of_millis,
            } => self.weigh(*machine, *weight, *of_millis),
            Command::SetCpu {
                machine,
                class,
                allowed_millis,
            } => self.set_cpu(
                *machine,
                Cpu {
                    class: *class,
                    allowed_millis: *allowed_millis,
                },
            ),
            Command::SettleCredits { machine } => self.settle_credits(*machine),
            Command::ChangePlan { machine, plan } => self.change_plan(*machine, *plan),
            Command::GrantCredits { machine, .. } => self.grant_credits(*machine),
            Command::LaunchMachine {
                machine,
                account,
                launch,
            } => self.launch(*machine, account, launch),
            Command::ResizeMachine { machine, number, asked } => self.resize(*machine, *number, *asked),
            Command::ReportResize { machine, number } => self.report_resize(*machine, *number),
            Command::KeepSize { machine, .. } => self.keep_size(*machine),
            Command::SetBalloon { machine, mib } => self.set_balloon(*machine, *mib),
            Command::SetThresholds { machine, thresholds } => self.set_thresholds(*machine, thresholds),
            Command::KeepRoom {
                machine,
                request,
                drive_mib,
            } => self.keep_room(*machine, *request, *drive_mib),
            Command::PutFirst { request } => self.put_first(*request),
            Command::ReleaseMachine { machine } => self.release_reserved(*machine),
            Command::SetLimits { account, limits } => self.set_limits(account, limits),
            Command::SetAmount { code, kept } => self.set_amount(*code, *kept),
            // Tells, and changes nothing.
            Command::Notify { .. } => Ok(()),
            Command::Wait { request } => self.wait(*request),
            Command::Refuse { request, .. } => self.refuse(*request),
        }
    }

    fn boot(&mut self, id: MachineId, runtime: &Arc<str>, shape: Shape, reserved: Option<RequestId>) -> Applied {
        if self.machines.contains_key(&id) {
            return Err(ApplyError::Exists("machine"));
        }
        let room = HostRoom::of(shape);
        if !room.fits(self.free()) {
            return Err(ApplyError::Room("room on the host"));
        }
        if let Some(request) = reserved {
            let found = self.requests.get_mut(&request).ok_or(ApplyError::Unknown("request"))?;
            if found.state != RequestState::Waiting || found.reserved.is_some() {
                return Err(ApplyError::State("request"));
            }
            found.reserved = Some(id);
            let (order, account) = (found.order, found.demand.account.clone());
            self.large_no_longer(&account, order);
            self.count_reserved(&account, shape, true);
        }
        self.insert_machine(Machine {
            reserved,
            ..self.new_machine(id, runtime, shape, MachineState::Booting)
        });
        self.boot_begun(runtime, reserved.is_none());
        Ok(())
    }

    fn assign(&mut self, id: MachineId, account: &Arc<str>) -> Applied {
        let machine = self.machines.get(&id).ok_or(ApplyError::Unknown("machine"))?;
        if machine.state != MachineState::Warming {
            return Err(ApplyError::State("machine"));
        }
        if machine.account.is_some() {
            return Err(ApplyError::Account);
        }
        if !self.may_have(account, machine.shape) {
            return Err(ApplyError::Room("room in the account's limits"));
        }
        let (runtime, shape, room) = (machine.runtime.clone(), machine.shape, machine.room());
        let entry = self.runtimes.entry(runtime.clone()).or_default();
        entry.warming.remove(room.free, id);
        self.unsettled.insert(runtime.clone());
        let mono = self.now.mono;
        if let Some(machine) = self.machines.get_mut(&id) {
            machine.state = MachineState::Active;
            machine.account = Some(account.clone());
            (machine.assigned, machine.last_used) = (mono, mono);
            self.serving.insert((mono, id));
            if let Some(request) = machine.reserved.take()
                && let Some(request) = self.requests.get_mut(&request)
            {
                request.reserved = None;
                self.count_reserved(account, shape, false);
            }
        }
        self.count_machine(account, shape, true);
        let group = self.accounts.entry(account.clone()).or_default();
        let group = group.groups.entry(runtime).or_default();
        group.rooms.insert(room, id);
        self.touched.push_back(Touch::Credits(id));
        // Beside the one that it is assigned for, others of the account may fit.
        self.touched.push_back(Touch::Room(id));
        self.refresh_rest(id);
        Ok(())
    }

    fn create(&mut self, machine: MachineId, id: ContainerId, kind: Kind, drive_mib: u32, purpose: Purpose) -> Applied {
        if self.containers.contains_key(&id) {
            return Err(ApplyError::Exists("container"));
        }
        let found = self.machines.get(&machine).ok_or(ApplyError::Unknown("machine"))?;
        if found.state != MachineState::Active || found.launched.is_some() {
            return Err(ApplyError::State("machine"));
        }
        let Some(name) = found.account.clone() else {
            return Err(ApplyError::Account);
        };
        self.check_growth(found, drive_mib)?;
        let more = drive_mib.saturating_sub(found.shape.drive_mib);
        if !kind.amount.fits(found.room().with(more)) {
            return Err(ApplyError::Room("room in the machine"));
        }
        if let Purpose::Serve(request) = purpose {
            let request = self.requests.get(&request).ok_or(ApplyError::Unknown("request"))?;
            if request.demand.account != name {
                return Err(ApplyError::Account);
            }
            if !matches!(request.state, RequestState::New | RequestState::Waiting) {
                return Err(ApplyError::State("request"));
            }
            if !self.may_run(&name) {
                return Err(ApplyError::Room("room in the account's concurrency"));
            }
        }
        if let Purpose::Serve(request) = purpose {
            self.place(request, RequestState::Starting(id));
        }
        self.grow(machine, drive_mib);
        self.insert_container(id, machine, kind, ContainerState::Starting(purpose), self.now);
        self.note_made(kind, id, purpose);
        self.refresh_rest(machine);
        Ok(())
    }

    fn dispatch(&mut self, machine: MachineId, id: ContainerId, request: RequestId) -> Applied {
        let container = self.containers.get(&id).ok_or(ApplyError::Unknown("container"))?;
        if container.machine != machine {
            return Err(ApplyError::Unknown("container"));
        }
        let found = self.machines.get(&machine).ok_or(ApplyError::Unknown("machine"))?;
        let asked = self.requests.get(&request).ok_or(ApplyError::Unknown("request"))?;
        if found.account.as_ref() != Some(&asked.demand.account) {
            return Err(ApplyError::Account);
        }
        let account = &asked.demand.account;
        if !asked.is_running() && !self.may_run(account) {
            return Err(ApplyError::Room("room in the account's concurrency"));
        }
        let allowed = match (container.state, asked.state) {
            (ContainerState::Idle, RequestState::New | RequestState::Waiting) => {
                found.state == MachineState::Active && asked.demand.kinds.contains(&container.kind)
            }
            (ContainerState::Starting(Purpose::Serve(of)), RequestState::Starting(at)) => of == request && at == id,
            _ => false,
        };
        if !allowed {
            return Err(ApplyError::State("container"));
        }
        let container = container.clone();
        self.forget_idle(&container);
        self.place(request, RequestState::Running(id));
        let mono = self.now.mono;
        if let Some(found) = self.containers.get_mut(&id) {
            found.state = ContainerState::Busy(request);
            found.since = mono;
        }
        if !container.is_running()
            && let Some(found) = self.machines.get_mut(&machine)
        {
            found.running += 1;
        }
        self.refresh_rest(machine);
        Ok(())
    }

    /// A request has a place: it waits no longer.
    fn place(&mut self, id: RequestId, state: RequestState) {
        self.dequeue(id);
        let Some(request) = self.requests.get_mut(&id) else {
            return;
        };
        let was_running = request.is_running();
        request.state = state;
        let reserved = request.reserved.take();
        let name = request.demand.account.clone();
        if !was_running {
            self.count_running(&name, true);
        }
        if let Some(machine) = reserved {
            self.release(machine, &name);
        }
    }

    fn stop_idle(&mut self, machine: MachineId, id: ContainerId) -> Applied {
        let container = self.containers.get(&id).ok_or(ApplyError::Unknown("container"))?;
        if container.machine != machine {
            return Err(ApplyError::Unknown("container"));
        }
        match container.state {
            ContainerState::Idle => {}
            ContainerState::Busy(_) | ContainerState::Starting(_) => return Err(ApplyError::Busy("container")),
            ContainerState::Stopping => return Err(ApplyError::State("container")),
        }
        self.amounts.stopped(container.kind);
        self.stop(id);
        Ok(())
    }

    fn close(&mut self, id: MachineId) -> Applied {
        let machine = self.machines.get(&id).ok_or(ApplyError::Unknown("machine"))?;
        if machine.state != MachineState::Active || machine.launched.is_some() {
            return Err(ApplyError::State("machine"));
        }
        self.ending = self.ending.plus(HostRoom::of(machine.shape));
        self.withdraw(id, MachineState::Closing);
        self.refresh_rest(id);
        Ok(())
    }

    fn destroy(&mut self, id: MachineId) -> Applied {
        let machine = self.machines.get(&id).ok_or(ApplyError::Unknown("machine"))?;
        if machine.state == MachineState::Stopping {
            return Err(ApplyError::State("machine"));
        }
        if machine.running > 0 {
            return Err(ApplyError::Busy("machine"));
        }
        self.retire(id);
        Ok(())
    }

    fn weigh(&mut self, id: MachineId, weight: u32, of_millis: u64) -> Applied {
        let machine = self.machines.get_mut(&id).ok_or(ApplyError::Unknown("machine"))?;
        let account = machine.account.as_ref().ok_or(ApplyError::State("machine"))?;
        let account = self.accounts.get_mut(account).ok_or(ApplyError::Unknown("account"))?;
        account.weighed_of = of_millis;
        machine.weight = weight;
        Ok(())
    }

    fn keep_room(&mut self, machine: MachineId, request: RequestId, drive_mib: u32) -> Applied {
        let found = self.machines.get(&machine).ok_or(ApplyError::Unknown("machine"))?;
        let asked = self.requests.get(&request).ok_or(ApplyError::Unknown("request"))?;
        if found.state != MachineState::Active {
            return Err(ApplyError::State("machine"));
        }
        if asked.state != RequestState::Waiting {
            return Err(ApplyError::State("request"));
        }
        let demand = &asked.demand;
        if found.account.as_ref() != Some(&demand.account) || found.runtime != demand.runtime {
            return Err(ApplyError::Account);
        }
        self.check_growth(found, drive_mib)?;
        let mut capacity = found.capacity;
        capacity.scratch_mib = capacity
            .scratch_mib
            .saturating_add(drive_mib.saturating_sub(found.shape.drive_mib));
        if !asked.first().is_some_and(|kind| kind.amount.fits(capacity)) {
            return Err(ApplyError::Room("room in the machine"));
        }
        let (account, runtime) = (demand.account.clone(), demand.runtime.clone());
        self.gather(&account, &runtime, request, machine);
        self.grow(machine, drive_mib);
        Ok(())
    }

    fn put_first(&mut self, id: RequestId) -> Applied {
        let request = self.requests.get(&id).ok_or(ApplyError::Unknown("request"))?;
        if request.state != RequestState::Waiting {
            return Err(ApplyError::State("request"));
        }
        let account = request.demand.account.clone();
        self.set_first(&account, Some(id));
        Ok(())
    }

    fn release_reserved(&mut self, id: MachineId) -> Applied {
        let machine = self.machines.get(&id).ok_or(ApplyError::Unknown("machine"))?;
        let request = machine.reserved.ok_or(ApplyError::State("machine"))?;
        let request = self.requests.get(&request).ok_or(ApplyError::Unknown("request"))?;
        let (request, account) = (request.id, request.demand.account.clone());
        self.unreserve(request);
        self.release(id, &account);
        Ok(())
    }

    fn wait(&mut self, id: RequestId) -> Applied {
        let request = self.requests.get(&id).ok_or(ApplyError::Unknown("request"))?;
        if request.state != RequestState::New {
            return Err(ApplyError::State("request"));
        }
        self.enqueue(id);
        Ok(())
    }

    fn refuse(&mut self, id: RequestId) -> Applied {
        let request = self.requests.get(&id).ok_or(ApplyError::Unknown("request"))?;
        match request.state {
            RequestState::Waiting => self.dequeue(id),
            // What is made for it serves another.
            RequestState::Starting(container) => {
                if let Some(container) = self.containers.get_mut(&container) {
                    container.state = ContainerState::Starting(Purpose::Ahead);
                }
            }
            // Its machine has ended or has to: so has the container.
            RequestState::Running(container) => self.stop(container),
            RequestState::New => {}
        }
        self.finish(id);
        Ok(())
    }
}
