//! Where a request runs (R4 pools).
//!
//! ```text
//!  machine                                                     container
//!
//!   BootMachine                                                 CreateContainer
//!       │                                                            │
//!   Booting ── MachineEnded: backoff ──► gone                    Starting ── ContainerFailed ──► gone
//!       │ MachineReady                                               │ ContainerReady
//!   Warming ── surplus or reclaimed ──┐                             Busy ◄── Dispatch ── Idle
//!       │ AssignMachine               │                              │ InvocationDone      ▲ │ idle too long,
//!   Active ── empty too long ─────────┤                              ├─────────────────────┘ │ function deleted
//!       │     or reclaimed            │                              │ ended                 ▼ StopContainer
//!       │ MachineEnded      DestroyMachine                          gone ◄─ContainerEnded─ Stopping
//!      gone ◄── MachineEnded ──── Stopping
//! ```
//!
//! A request is tried, in this order: an idle container of its code, version and amount; a new container in an active
//! machine of its account with the amount free; a machine from the warming pool, which is the account's from then on.
//! Else it waits in a bounded queue until a deadline, and machines are booted for those that wait before the warming
//! pool is topped up. On a full host room is made of what lies idle. A machine goes one way only: it never serves
//! two accounts and is never returned.

mod idle;
mod place;
mod rules;
mod supply;
#[cfg(test)]
mod tests;
mod types;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

pub use rules::{Rules, RulesError};
pub use types::{
    Action, Code, ContainerFailure, ContainerId, Demand, DestroyReason, Event, Finish, MachineId, Refusal, RequestId,
    Source, StopReason,
};

use super::{Amount, Shape, Time};

/// The state of all placement on one host.
#[derive(Debug)]
pub struct Placement {
    rules: Rules,
    now: Time,
    machines: BTreeMap<MachineId, Machine>,
    containers: BTreeMap<ContainerId, Container>,
    /// Idle containers by what they are good for, the most recently used last.
    idle: HashMap<(Code, Amount), Vec<ContainerId>>,
    /// Active machines by account.
    active: HashMap<Arc<str>, BTreeSet<MachineId>>,
    /// Requests that wait for a place, in order of arrival.
    queue: VecDeque<Waiting>,
    /// How boots of a runtime went lately.
    boots: HashMap<Arc<str>, Boots>,
    draining: bool,
    last_id: u64,
}

/// A machine as the policy sees it.
#[derive(Debug)]
pub struct Machine {
    runtime: Arc<str>,
    shape: Shape,
    capacity: Amount,
    state: MachineState,
    allocated: Amount,
    containers: BTreeSet<ContainerId>,
    ready_at: Time,
    last_used: Time,
}

/// Where a machine is in its life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MachineState {
    /// Started; its guest has not answered.
    Booting,
    /// Ready and nobody's.
    Warming,
    /// Serves one account.
    Active {
        /// The one account that it ever serves.
        account: Arc<str>,
    },
    /// Told to end.
    Stopping {
        /// The account that it served, if any.
        account: Option<Arc<str>>,
    },
}

/// A container as the policy sees it.
#[derive(Debug)]
pub struct Container {
    machine: MachineId,
    code: Code,
    amount: Amount,
    state: ContainerState,
    /// Its function was deleted: it takes no further request.
    doomed: bool,
    /// The guest said that it ended while a call on it is in flight.
    gone: bool,
}

#[derive(Debug)]
enum ContainerState {
    Starting(Waiting),
    Idle { since: Time },
    Busy(RequestId),
    Stopping,
}

#[derive(Clone, Debug)]
struct Waiting {
    request: RequestId,
    demand: Demand,
    arrived: Time,
    deadline: Time,
    /// It found no place when it came.
    queued: bool,
    /// Machines that were lost under it, or could not make its container, before it ran.
    lost: Vec<MachineId>,
}

#[derive(Debug, Default)]
struct Boots {
    /// Failures in a row.
    failures: u32,
    not_before: Time,
}

/// How often a request that has not begun to run is placed again, in another machine.
const MAX_LOST: usize = 2;

// === impl Placement ===

impl Placement {
    /// Starts with nothing; the first `Tick` begins to fill the warming pool.
    #[must_use]
    pub fn new(rules: Rules) -> Self {
        Self {
            rules,
            now: Time::ZERO,
            machines: BTreeMap::new(),
            containers: BTreeMap::new(),
            idle: HashMap::new(),
            active: HashMap::new(),
            queue: VecDeque::new(),
            boots: HashMap::new(),
            draining: false,
            last_id: 0,
        }
    }

    /// Takes one event and says what is to be done. An event about something that is no more is ignored, so an
    /// executor may report late.
    #[must_use]
    pub fn step(&mut self, event: Event, now: Time) -> Vec<Action> {
        self.now = self.now.max(now);
        let mut actions = Vec::new();
        self.take(event, &mut actions);
        self.expire(&mut actions);
        self.serve_queue(&mut actions);
        self.let_go(&mut actions);
        self.supply(&mut actions);
        actions
    }

    /// When a `Tick` is next needed, if no other event comes before.
    #[must_use]
    pub fn next_wake(&self) -> Option<Time> {
        if self.draining {
            return None;
        }
        let deadlines = self.queue.iter().map(|waiting| waiting.deadline);
        deadlines.chain(self.idle_wakes()).chain(self.supply_wakes()).min()
    }

    /// A machine, unless it is gone.
    #[must_use]
    pub fn machine(&self, id: MachineId) -> Option<&Machine> {
        self.machines.get(&id)
    }

    /// It drains, and nothing is left.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.draining && self.machines.is_empty()
    }

    /// Number of requests that wait for a place.
    #[must_use]
    pub fn queue_len(&self) -> usize {
        self.queue.len()
    }

    fn take(&mut self, event: Event, actions: &mut Vec<Action>) {
        match event {
            Event::Tick => {}
            Event::Request { request, demand } => self.request(request, demand, actions),
            Event::Cancelled { request } => {
                if let Some(at) = self.queue.iter().position(|waiting| waiting.request == request) {
                    self.queue.remove(at);
                    refuse(request, Refusal::Cancelled, actions);
                }
            }
            Event::MachineReady { machine } => {
                if let Some(found) = self.machines.get_mut(&machine)
                    && found.state == MachineState::Booting
                {
                    found.state = MachineState::Warming;
                    found.ready_at = self.now;
                    found.last_used = self.now;
                    self.boots.remove(&found.runtime);
                }
            }
            Event::MachineEnded { machine } => self.machine_ended(machine, actions),
            Event::ContainerReady { container } => self.container_ready(container, actions),
            Event::ContainerFailed { container, failure } => {
                self.container_failed(container, failure, actions);
            }
            Event::ContainerEnded { container } => {
                if let Some(found) = self.containers.get_mut(&container) {
                    match found.state {
                        // The call in flight will say so too, and carries the request's answer.
                        ContainerState::Starting(_) | ContainerState::Busy(_) => found.gone = true,
                        ContainerState::Idle { .. } | ContainerState::Stopping => {
                            self.remove_container(container);
                        }
                    }
                }
            }
            Event::InvocationDone { container, ended } => {
                self.invocation_done(container, ended, actions);
            }
            Event::FunctionDeleted { uid } => self.function_deleted(&uid, actions),
            Event::Drain => self.drain(actions),
            Event::DrainExpired => {
                self.drain(actions);
                self.abandon(actions);
            }
        }
    }

    fn request(&mut self, request: RequestId, demand: Demand, actions: &mut Vec<Action>) {
        if self.draining {
            return refuse(request, Refusal::Draining, actions);
        }
        if self.rules.shape_for(demand.amount).is_none() {
            let largest = self.rules.largest_amount();
            return refuse(request, Refusal::TooLarge { largest }, actions);
        }
        let mut waiting = Waiting {
            request,
            demand,
            arrived: self.now,
            deadline: self.now.saturating_add(self.rules.queue_timeout),
            queued: false,
            lost: Vec::new(),
        };
        // Those that wait already come first, so that nobody overtakes them for a place that both could use.
        self.serve_queue(actions);
        if !self.place(&waiting, actions) {
            if self.queue.len() >= self.rules.queue_limit {
                return refuse(request, Refusal::QueueFull, actions);
            }
            waiting.queued = true;
            self.queue.push_back(waiting);
        }
    }

    fn expire(&mut self, actions: &mut Vec<Action>) {
        let now = self.now;
        self.queue.retain(|waiting| {
            let keep = waiting.deadline > now;
            if !keep {
                refuse(waiting.request, Refusal::QueueTimeout, actions);
            }
            keep
        });
    }

    fn serve_queue(&mut self, actions: &mut Vec<Action>) {
        // No early end at the first that finds no place: a later one may fit where it does not.
        for _ in 0..self.queue.len() {
            if let Some(waiting) = self.queue.pop_front()
                && !self.place(&waiting, actions)
            {
                self.queue.push_back(waiting);
            }
        }
    }

    fn machine_ended(&mut self, id: MachineId, actions: &mut Vec<Action>) {
        let Some(machine) = self.machines.get(&id) else { return };
        let runtime = machine.runtime.clone();
        let containers: Vec<_> = machine.containers.iter().copied().collect();
        if matches!(machine.state, MachineState::Booting | MachineState::Warming) {
            self.boot_failed(runtime);
        }
        self.retire(id);
        let mut again = Vec::new();
        for container in containers {
            match self.remove_container(container) {
                Some(ContainerState::Starting(waiting)) => again.push(waiting),
                Some(ContainerState::Busy(request)) => {
                    refuse(request, Refusal::MachineLost, actions);
                }
                _ => {}
            }
        }
        self.machines.remove(&id);
        for waiting in again.into_iter().rev() {
            self.place_again(waiting, id, actions);
        }
    }

    fn container_ready(&mut self, id: ContainerId, actions: &mut Vec<Action>) {
        let Some(container) = self.containers.get_mut(&id) else {
            return;
        };
        let ContainerState::Starting(waiting) = &container.state else {
            return;
        };
        if container.gone {
            return self.container_failed(id, ContainerFailure::Lost, actions);
        }
        let request = waiting.request;
        container.state = ContainerState::Busy(request);
        actions.push(Action::Dispatch {
            machine: container.machine,
            container: id,
            request,
        });
    }

    fn container_failed(&mut self, id: ContainerId, failure: ContainerFailure, actions: &mut Vec<Action>) {
        let Some(container) = self.containers.get(&id) else {
            return;
        };
        let machine = container.machine;
        match container.state {
            ContainerState::Starting(_) => {}
            // It was abandoned while it started: now it is gone.
            ContainerState::Stopping => {
                self.remove_container(id);
                return;
            }
            _ => return,
        }
        if let Some(ContainerState::Starting(waiting)) = self.remove_container(id) {
            match failure {
                ContainerFailure::Settled => {
                    actions.push(Action::Finish {
                        request: waiting.request,
                        finish: Finish::Settled,
                    });
                }
                ContainerFailure::Lost => self.place_again(waiting, machine, actions),
            }
        }
    }

    fn place_again(&mut self, mut waiting: Waiting, machine: MachineId, actions: &mut Vec<Action>) {
        waiting.lost.push(machine);
        if waiting.lost.len() > MAX_LOST {
            refuse(waiting.request, Refusal::MachineLost, actions);
        } else if self.draining {
            refuse(waiting.request, Refusal::Draining, actions);
        } else if self.queue.len() >= self.rules.queue_limit {
            refuse(waiting.request, Refusal::QueueFull, actions);
        } else {
            waiting.queued = true;
            self.queue.push_front(waiting);
        }
    }

    fn invocation_done(&mut self, id: ContainerId, ended: bool, actions: &mut Vec<Action>) {
        let now = self.now;
        let Some(container) = self.containers.get_mut(&id) else {
            return;
        };
        let ContainerState::Busy(request) = container.state else {
            return;
        };
        actions.push(Action::Finish {
            request,
            finish: Finish::Settled,
        });
        if let Some(machine) = self.machines.get_mut(&container.machine) {
            machine.last_used = now;
        }
        if ended || container.gone {
            self.remove_container(id);
        } else if container.doomed {
            container.state = ContainerState::Stopping;
            let machine = container.machine;
            let reason = StopReason::FunctionDeleted;
            actions.push(Action::StopContainer {
                machine,
                container: id,
                reason,
            });
        } else {
            container.state = ContainerState::Idle { since: now };
            let key = (container.code.clone(), container.amount);
            self.idle.entry(key).or_default().push(id);
        }
    }

    fn function_deleted(&mut self, uid: &str, actions: &mut Vec<Action>) {
        self.queue.retain(|waiting| {
            let keep = &*waiting.demand.code.uid != uid;
            if !keep {
                refuse(waiting.request, Refusal::FunctionDeleted, actions);
            }
            keep
        });
        let mut idle = Vec::new();
        for (id, container) in &mut self.containers {
            if &*container.code.uid == uid {
                container.doomed = true;
                if matches!(container.state, ContainerState::Idle { .. }) {
                    idle.push(*id);
                }
            }
        }
        for id in idle {
            self.stop_container(id, StopReason::FunctionDeleted, actions);
        }
    }

    fn drain(&mut self, actions: &mut Vec<Action>) {
        self.draining = true;
        for waiting in self.queue.drain(..) {
            refuse(waiting.request, Refusal::Draining, actions);
        }
    }

    /// Ends every request and every machine, whatever they are doing.
    fn abandon(&mut self, actions: &mut Vec<Action>) {
        for container in self.containers.values_mut() {
            match std::mem::replace(&mut container.state, ContainerState::Stopping) {
                ContainerState::Starting(waiting) => {
                    refuse(waiting.request, Refusal::Draining, actions);
                }
                // It may have run: not the refusal that says to try again.
                ContainerState::Busy(request) => refuse(request, Refusal::MachineLost, actions),
                ContainerState::Idle { .. } | ContainerState::Stopping => {}
            }
        }
        self.idle.clear();
        let all: Vec<_> = self.machines.keys().copied().collect();
        for id in all {
            self.destroy(id, DestroyReason::Drain, actions);
        }
    }

    // --- what every part of the policy changes state by ---

    fn new_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    /// Takes a container out of every book and gives its amount back.
    fn remove_container(&mut self, id: ContainerId) -> Option<ContainerState> {
        let container = self.containers.remove(&id)?;
        if matches!(container.state, ContainerState::Idle { .. }) {
            self.forget_idle(id, container.code, container.amount);
        }
        if let Some(machine) = self.machines.get_mut(&container.machine) {
            machine.containers.remove(&id);
            machine.allocated = machine.allocated.minus(container.amount);
            machine.last_used = self.now;
        }
        Some(container.state)
    }

    /// Stops an idle container; its amount is free once it has ended.
    fn stop_container(&mut self, id: ContainerId, reason: StopReason, actions: &mut Vec<Action>) {
        let Some(container) = self.containers.get_mut(&id) else {
            return;
        };
        if !matches!(container.state, ContainerState::Idle { .. }) {
            return;
        }
        container.state = ContainerState::Stopping;
        let (machine, code, amount) = (container.machine, container.code.clone(), container.amount);
        self.forget_idle(id, code, amount);
        actions.push(Action::StopContainer {
            machine,
            container: id,
            reason,
        });
    }

    fn forget_idle(&mut self, id: ContainerId, code: Code, amount: Amount) {
        let key = (code, amount);
        if let Some(ids) = self.idle.get_mut(&key) {
            ids.retain(|other| *other != id);
            if ids.is_empty() {
                self.idle.remove(&key);
            }
        }
    }

    /// Destroys a machine that runs no request; its memory is the host's again once it has ended.
    fn destroy(&mut self, id: MachineId, reason: DestroyReason, actions: &mut Vec<Action>) {
        let Some(machine) = self.machines.get(&id) else { return };
        if matches!(machine.state, MachineState::Stopping { .. }) {
            return;
        }
        let containers: Vec<_> = machine.containers.iter().copied().collect();
        for container in containers {
            if let Some(found) = self.containers.get_mut(&container) {
                let was = std::mem::replace(&mut found.state, ContainerState::Stopping);
                if matches!(was, ContainerState::Idle { .. }) {
                    let (code, amount) = (found.code.clone(), found.amount);
                    self.forget_idle(container, code, amount);
                }
            }
        }
        self.retire(id);
        actions.push(Action::DestroyMachine { machine: id, reason });
    }

    /// Takes a machine from those that serve.
    fn retire(&mut self, id: MachineId) {
        let Some(machine) = self.machines.get_mut(&id) else {
            return;
        };
        let account = match &machine.state {
            MachineState::Active { account } => {
                let account = account.clone();
                if let Some(ids) = self.active.get_mut(&account) {
                    ids.remove(&id);
                    if ids.is_empty() {
                        self.active.remove(&account);
                    }
                }
                Some(account)
            }
            MachineState::Stopping { account } => account.clone(),
            MachineState::Booting | MachineState::Warming => None,
        };
        machine.state = MachineState::Stopping { account };
    }

    /// No container of the machine is starting or busy.
    fn at_rest(&self, machine: &Machine) -> bool {
        machine.containers.iter().all(|id| {
            self.containers.get(id).is_none_or(|container| {
                matches!(container.state, ContainerState::Idle { .. } | ContainerState::Stopping)
            })
        })
    }
}

fn refuse(request: RequestId, refusal: Refusal, actions: &mut Vec<Action>) {
    actions.push(Action::Finish {
        request,
        finish: Finish::Refused(refusal),
    });
}

// === impl Machine ===

impl Machine {
    /// Where it is in its life.
    #[must_use]
    pub fn state(&self) -> &MachineState {
        &self.state
    }

    /// What its containers were given.
    #[must_use]
    pub fn allocated(&self) -> Amount {
        self.allocated
    }

    fn free(&self) -> Amount {
        self.capacity.minus(self.allocated)
    }
}
