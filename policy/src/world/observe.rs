//! What happens changes the world here.

use super::{ContainerState, HostRoom, MachineState, Request, RequestState, Timer, Touch, World};
use crate::{Completion, ContainerFailure, ContainerId, Demand, Event, MachineId, Purpose, RequestId};

/// How often a request is placed in vain before it is refused.
pub(crate) const ATTEMPTS: u32 = 3;

impl World {
    /// Takes in what an event says. What is to be decided about it is noted in `touched` and `unsettled`.
    pub(crate) fn observe(&mut self, event: Event) {
        match event {
            // These say what is wanted, not what is so: policies take them.
            Event::Tick
            | Event::CallerLeft { .. }
            | Event::Prepare { .. }
            | Event::Executed { .. }
            | Event::FunctionDeleted { .. }
            | Event::PlanAsked { .. }
            | Event::CreditsGranted { .. }
            | Event::LimitsAsked { .. }
            | Event::LaunchAsked { .. }
            | Event::EndAsked { .. }
            | Event::ResizeAsked { .. }
            | Event::ThresholdsAsked { .. }
            | Event::Measured { .. }
            | Event::HostMemory { .. }
            | Event::DrainExpired => {}
            Event::Requested { request, demand } => self.requested(request, demand),
            Event::MachineReady { machine } => self.machine_ready(machine),
            Event::MachineEnded { machine } => self.machine_ended(machine),
            Event::MachineFound {
                machine,
                runtime,
                shape,
                account,
                created,
                mode,
                launched,
            } => match account.clone().zip(launched) {
                Some((account, launch)) => self.launch_found(machine, &account, &launch, shape, created, mode),
                None => self.machine_found(machine, &runtime, shape, account, created, mode),
            },
            Event::MachineAdopted { machine, containers } => self.machine_adopted(machine, containers),
            Event::ContainerReady { container } => self.container_ready(container),
            Event::ContainerFailed { container, failure } => self.container_failed(container, failure),
            Event::ContainerEnded { container } => self.container_ended(container),
            Event::Completed {
                container,
                request,
                completion,
            } => self.completed(container, request, completion),
            Event::Used { machine, containers } => {
                for (id, usage) in containers {
                    if let Some(container) = self.containers.get_mut(&id)
                        && container.machine == machine
                    {
                        container.usage = Some(usage);
                    }
                }
            }
            Event::CreditsSettled { machine, account } => self.credits_settled(machine, account),
            Event::MachineResized { machine, number, taken } => self.machine_resized(machine, number, taken),
            Event::Drain => {
                self.draining = true;
            }
        }
    }

    fn requested(&mut self, id: RequestId, demand: Demand) {
        if self.requests.contains_key(&id) {
            return;
        }
        let demand = self.with_amounts(demand);
        self.insert_request(id, demand, RequestState::New);
        self.touched.push_back(Touch::Request(id));
    }

    pub(super) fn insert_request(&mut self, id: RequestId, demand: Demand, state: RequestState) {
        self.arrivals += 1;
        let request = Request {
            id,
            demand,
            arrived: self.now,
            state,
            order: self.arrivals,
            attempts: 0,
            lost: Vec::new(),
            withdrawn: None,
            reserved: None,
        };
        self.requests.insert(id, request);
    }

    fn machine_ready(&mut self, id: MachineId) {
        match self.machine(id).filter(|found| found.state == MachineState::Booting) {
            Some(found) if found.launched.is_some() => self.launched_ready(id),
            Some(_) => self.make_warming(id),
            None => {}
        }
    }

    /// The guest of a machine of no account has answered.
    pub(super) fn make_warming(&mut self, id: MachineId) {
        let now = self.now;
        let Some(machine) = self.machines.get_mut(&id) else {
            return;
        };
        machine.state = MachineState::Warming;
        machine.ready = Some(now);
        machine.last_used = now.mono;
        let (runtime, room, reserved) = (machine.runtime.clone(), machine.room(), machine.reserved);
        self.boot_over(&runtime, reserved.is_none());
        let entry = self.runtimes.entry(runtime.clone()).or_default();
        entry.failures = 0;
        entry.not_before = now.mono;
        match reserved {
            Some(request) => self.touched.push_back(Touch::Request(request)),
            None => {
                entry.warming.insert(room, id);
                self.touched.push_back(Touch::Warming(runtime.clone()));
                self.watch_surplus(&runtime);
            }
        }
        self.refresh_rest(id);
    }

    fn machine_ended(&mut self, id: MachineId) {
        let Some(machine) = self.machines.get(&id) else {
            return;
        };
        let (was, runtime, launched) = (machine.state, machine.runtime.clone(), machine.launched.is_some());
        if matches!(was, MachineState::Booting | MachineState::Warming) && !launched {
            self.boot_failed(&runtime);
        }
        self.retire(id);
        let containers = self.machines.get(&id).map(|machine| machine.containers.clone());
        let mut again = Vec::new();
        for container in containers.into_iter().flatten() {
            match self.remove_container(container).map(|container| container.state) {
                Some(ContainerState::Starting(Purpose::Serve(request))) => again.push(request),
                // Refused by the policy: it may have run.
                Some(ContainerState::Busy(request)) => self.touched.push_back(Touch::Request(request)),
                _ => {}
            }
        }
        if let Some(machine) = self.machines.remove(&id) {
            self.forget_balance(id, machine.credits.as_ref());
            let room = HostRoom::of(machine.shape);
            self.used = self.used.minus(room);
            self.ending = self.ending.minus(room);
            if let Some((class, since)) = machine.rest {
                self.at_rest.remove(&(class, since, id));
            }
            if let Some(account) = &machine.account {
                if let Some(account) = self.accounts.get_mut(account).filter(|_| launched) {
                    let given = u64::from(machine.allocated.cpu_millis);
                    account.given_millis = account.given_millis.saturating_sub(given);
                }
                self.count_machine(account, machine.shape, false);
            }
        }
        self.more_disk();
        self.unsettled.append(&mut self.lacking);
        if !launched {
            self.unsettled.insert(runtime);
        }
        for request in again {
            self.again(request, Some(id));
        }
    }

    fn boot_failed(&mut self, runtime: &std::sync::Arc<str>) {
        let entry = self.runtimes.entry(runtime.clone()).or_default();
        entry.failures = entry.failures.saturating_add(1);
        let doublings = (entry.failures - 1).min(16);
        let backoff = self.rules.boot_backoff.saturating_mul(1 << doublings);
        entry.not_before = self.now.mono.saturating_add(backoff.min(self.rules.boot_backoff_max));
        self.timers.set(entry.not_before, Timer::Backoff(runtime.clone()));
    }

    fn container_ready(&mut self, id: ContainerId) {
        let Some(container) = self.containers.get(&id) else {
            return;
        };
        let ContainerState::Starting(purpose) = container.state else {
            return;
        };
        if container.ended {
            return self.container_failed(id, ContainerFailure::Lost);
        }
        match purpose {
            Purpose::Serve(request) => self.touched.push_back(Touch::Request(request)),
            Purpose::Ahead => self.make_idle(id),
        }
    }

    /// A container can take a request, unless its function is no more.
    pub(super) fn make_idle(&mut self, id: ContainerId) {
        let mono = self.now.mono;
        let idle_limit = self.rules.container_idle;
        let Some(container) = self.containers.get_mut(&id) else {
            return;
        };
        let was_running = container.is_running();
        container.state = ContainerState::Idle;
        container.since = mono;
        if !container.timed {
            container.timed = true;
            self.timers
                .set(mono.saturating_add(idle_limit), Timer::ContainerIdle(id));
        }
        let kind = container.kind;
        self.amounts.made(kind.code, id, true);
        let Some(machine) = self.machines.get_mut(&container.machine) else {
            return;
        };
        machine.last_used = mono;
        if was_running {
            machine.running = machine.running.saturating_sub(1);
        }
        let (id_of_machine, active) = (machine.id, machine.state == MachineState::Active);
        if let Some(account) = machine.account.as_ref().and_then(|name| self.accounts.get_mut(name)) {
            let group = account.groups.entry(machine.runtime.clone()).or_default();
            group.add_idle(kind, mono, id);
        }
        if active {
            self.touched.push_back(Touch::Idle(id));
        } else {
            self.stop(id);
        }
        self.refresh_rest(id_of_machine);
    }

    fn container_failed(&mut self, id: ContainerId, failure: ContainerFailure) {
        let Some(container) = self.containers.get(&id) else {
            return;
        };
        if !matches!(container.state, ContainerState::Starting(_) | ContainerState::Stopping) {
            return;
        }
        let machine = container.machine;
        let state = self.remove_container(id).map(|container| container.state);
        if let Some(ContainerState::Starting(Purpose::Serve(request))) = state {
            match failure {
                ContainerFailure::Settled => self.finish(request),
                ContainerFailure::Lost => self.again(request, Some(machine)),
            }
        }
    }

    fn container_ended(&mut self, id: ContainerId) {
        let Some(container) = self.containers.get_mut(&id) else {
            return;
        };
        match container.state {
            // The call on its way says so too, and has the request's answer.
            ContainerState::Starting(_) | ContainerState::Busy(_) => container.ended = true,
            ContainerState::Idle | ContainerState::Stopping => {
                self.remove_container(id);
            }
        }
    }

    fn completed(&mut self, id: ContainerId, request: RequestId, completion: Completion) {
        let Some(container) = self.containers.get_mut(&id) else {
            return;
        };
        if container.state != ContainerState::Busy(request) {
            return;
        }
        if completion != Completion::NotBegun {
            container.invocations += 1;
        }
        let ended = container.ended || completion != Completion::Answered;
        if ended {
            self.remove_container(id);
        }
        if !ended {
            self.make_idle(id);
        }
        if completion == Completion::NotBegun {
            // Its machine is not to blame: it may be placed there again.
            self.again(request, None);
        } else {
            self.finish(request);
        }
    }

    /// A request that has not begun comes again.
    fn again(&mut self, id: RequestId, lost: Option<MachineId>) {
        let kinds = self.requests.get(&id).map(|request| self.kinds_for(&request.demand));
        let Some((request, kinds)) = self.requests.get_mut(&id).zip(kinds) else {
            return;
        };
        request.demand.kinds = kinds;
        let (was_running, account) = (request.is_running(), request.demand.account.clone());
        request.state = RequestState::New;
        request.attempts += 1;
        request.lost.extend(lost);
        if was_running {
            self.count_running(&account, false);
        }
        // Before others of its account, which is one request short now.
        self.touched.push_front(Touch::Request(id));
    }
}
