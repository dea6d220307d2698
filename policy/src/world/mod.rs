//! The only copy of what machines, containers and requests there are.
//!
//! ```text
//!  machine                                                 container
//!
//!   BootMachine                                             CreateContainer
//!       │                                                        │
//!   Booting ── MachineEnded ──► gone                        Starting ── ContainerFailed ──► gone
//!       │ MachineReady                                           │ ContainerReady
//!   Warming ── DestroyMachine ───┐                              Idle ── StopContainer ──► Stopping ── ContainerEnded ──► gone
//!       │ AssignMachine          │                       Dispatch│ ▲ Completed
//!   Active ── DestroyMachine ────┤                              Busy ── Completed(Ended, NotBegun) ──► gone
//!       │ CloseMachine           │
//!   Closing ── DestroyMachine ── Stopping ── MachineEnded ──► gone
//! ```
//!
//! What happens changes it by [`observe`], what is decided by [`apply`] alone; both keep the indexes, and note what they
//! touched, so that policies look at that and at nothing else. Policies take the timers that are due, and mark what an event
//! says of requests and containers (their caller has left, their function was deleted).

mod account;
mod apply;
mod gathering;
mod items;
mod observe;
mod rooms;
mod timers;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

pub(crate) use account::{Account, Group, LOOKED_AT, TRIED};
pub use apply::ApplyError;
pub use items::{Container, ContainerState, Machine, MachineState, Request, RequestState};
pub(crate) use items::{Rest, RestClass};
pub(crate) use observe::ATTEMPTS;
pub(crate) use rooms::Rooms;
pub(crate) use timers::{Timer, Timers};
use ulid::Ulid;

use crate::{AccountLimits, ContainerId, IdMap, MachineId, Mono, Now, Refusal, RequestId, Rules, Shape};

/// How many accounts with requests that need a larger machine are looked at for one event: those of which one waits longest.
const LARGE_TRIED: usize = 128;

/// Loads and queues are compared per unit of share, in thousandths.
pub(crate) const SHARE_SCALE: u64 = 1000;

/// What machines, containers and requests there are, and the indexes that decisions need.
#[derive(Clone, Debug)]
pub struct World {
    pub(crate) rules: Rules,
    pub(crate) now: Now,
    pub(crate) draining: bool,
    pub(crate) timers: Timers,
    /// What the event touched that policies have not looked at.
    pub(crate) touched: VecDeque<Touch>,
    /// Runtimes whose supply of machines may have to change.
    pub(crate) unsettled: BTreeSet<Arc<str>>,
    /// Runtimes that lack machines for want of something: looked at again when a machine ends or a boot does.
    pub(crate) lacking: BTreeSet<Arc<str>>,
    pub(crate) runtimes: BTreeMap<Arc<str>, Runtime>,
    pub(crate) accounts: BTreeMap<Arc<str>, Account>,
    /// Accounts with machines, by their memory for each unit of share.
    pub(crate) loads: BTreeSet<(u64, Arc<str>)>,
    /// Accounts of which requests wait, by how many for each unit of share.
    pub(crate) lines: BTreeSet<(u64, Arc<str>)>,
    /// Machines that run nothing, in the order in which they are given up.
    pub(crate) at_rest: BTreeSet<(RestClass, Mono, MachineId)>,
    /// Active machines, the one that serves its account longest first.
    pub(crate) serving: BTreeSet<(Mono, MachineId)>,
    /// Accounts of which requests wait for a machine larger than the standard one and have none booting, by the order of the
    /// first of these.
    pub(crate) large: BTreeSet<(u64, Arc<str>)>,
    /// All machines together, and those of them that end without more being decided.
    pub(crate) used: HostRoom,
    pub(crate) ending: HostRoom,
    pub(crate) booting: u32,
    machines: IdMap<MachineId, Machine>,
    containers: IdMap<ContainerId, Container>,
    requests: IdMap<RequestId, Request>,
    functions: BTreeMap<Ulid, Function>,
    waiting: u32,
    arrivals: u64,
}

/// Something that a policy has to look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Touch {
    /// A request that needs a place.
    Request(RequestId),
    /// A container that can take a request.
    Idle(ContainerId),
    /// What the containers of an active machine were given changed.
    Room(MachineId),
    /// The warming pool of a runtime has a machine, or an account may take one again.
    Warming(Arc<str>),
    /// An account runs fewer requests than it did.
    Slot(Arc<str>),
    /// Nothing runs in a machine that is to go.
    Quiet(MachineId),
}

/// What there is of a runtime.
#[derive(Clone, Debug, Default)]
pub(crate) struct Runtime {
    /// Its machines in the warming pool by what they can hold.
    pub(crate) warming: Rooms,
    /// Its machines that boot and are for anyone.
    pub(crate) booting: u32,
    /// All that boot.
    pub(crate) all_booting: u32,
    /// Accounts of which requests wait for a place, the one with the least for its share first, of those the one that waits
    /// longest.
    pub(crate) claimants: BTreeSet<Claimant>,
    /// Likewise those that may have no machine more now.
    pub(crate) limited: BTreeSet<Claimant>,
    /// How many machines they want.
    pub(crate) wanted: u32,
    /// Boots that failed in a row, and when one may be tried again.
    pub(crate) failures: u32,
    pub(crate) not_before: Mono,
}

/// An account of which requests wait: what its machines are for its share, since when it waits, and its name.
pub(crate) type Claimant = (u64, Mono, Arc<str>);

/// What there is of a function.
#[derive(Clone, Debug, Default)]
struct Function {
    containers: BTreeSet<ContainerId>,
    waiting: BTreeSet<RequestId>,
}

/// Part of the host: a number of machines, their memory and their vCPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct HostRoom {
    pub(crate) machines: u64,
    pub(crate) memory_mib: u64,
    pub(crate) cpu_millis: u64,
}

// === impl World ===

impl World {
    pub(crate) fn new(rules: Rules) -> Self {
        let unsettled = rules.warming.keys().cloned().collect();
        Self {
            rules,
            now: Now::default(),
            draining: false,
            timers: Timers::default(),
            touched: VecDeque::new(),
            unsettled,
            lacking: BTreeSet::new(),
            runtimes: BTreeMap::new(),
            accounts: BTreeMap::new(),
            loads: BTreeSet::new(),
            lines: BTreeSet::new(),
            at_rest: BTreeSet::new(),
            serving: BTreeSet::new(),
            large: BTreeSet::new(),
            used: HostRoom::default(),
            ending: HostRoom::default(),
            booting: 0,
            machines: IdMap::default(),
            containers: IdMap::default(),
            requests: IdMap::default(),
            functions: BTreeMap::new(),
            waiting: 0,
            arrivals: 0,
        }
    }

    /// A machine, unless it is gone.
    #[must_use]
    pub fn machine(&self, id: MachineId) -> Option<&Machine> {
        self.machines.get(&id)
    }

    /// A container, unless it is gone.
    #[must_use]
    pub fn container(&self, id: ContainerId) -> Option<&Container> {
        self.containers.get(&id)
    }

    /// A request, unless it has come to its end.
    #[must_use]
    pub fn request(&self, id: RequestId) -> Option<&Request> {
        self.requests.get(&id)
    }

    /// All machines, in no particular order.
    pub fn machines(&self) -> impl Iterator<Item = &Machine> {
        self.machines.values()
    }

    /// All containers, in no particular order.
    pub fn containers(&self) -> impl Iterator<Item = &Container> {
        self.containers.values()
    }

    /// How many requests wait.
    #[must_use]
    pub fn waiting(&self) -> u32 {
        self.waiting
    }

    /// What decisions go by.
    #[must_use]
    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.machines.is_empty()
    }

    pub(crate) fn account(&self, name: &str) -> Option<&Account> {
        self.accounts.get(name)
    }

    pub(crate) fn group(&self, account: &str, runtime: &str) -> Option<&Group> {
        self.accounts.get(account)?.groups.get(runtime)
    }

    fn group_mut(&mut self, account: &str, runtime: &str) -> Option<&mut Group> {
        self.accounts.get_mut(account)?.groups.get_mut(runtime)
    }

    pub(crate) fn runtime(&self, name: &str) -> Option<&Runtime> {
        self.runtimes.get(name)
    }

    /// Memory in MiB of an account's machines for each unit of its share, in thousandths. Those that end count no longer.
    pub(crate) fn load(&self, account: &str) -> u64 {
        self.load_with(account, 0)
    }

    /// The same if it had so much memory more.
    pub(crate) fn load_with(&self, account: &str, more_mib: u64) -> u64 {
        let memory = self.accounts.get(account).map_or(0, Account::lasting_mib);
        per_share(memory + more_mib, self.rules.limits(account))
    }

    /// The same if it had so much memory less.
    pub(crate) fn load_without(&self, account: &str, less_mib: u64) -> u64 {
        let memory = self.accounts.get(account).map_or(0, Account::lasting_mib);
        per_share(memory.saturating_sub(less_mib), self.rules.limits(account))
    }

    /// How many requests of an account wait for each unit of its share, `more` ones included.
    pub(crate) fn line_with(&self, account: &str, more: u64) -> u64 {
        let waiting = self.accounts.get(account).map_or(0, |account| account.line.len());
        per_share(
            u64::try_from(waiting).unwrap_or(u64::MAX) + more,
            self.rules.limits(account),
        )
    }

    /// Its limits let an account have a machine of this shape more.
    pub(crate) fn may_have(&self, account: &str, shape: Shape) -> bool {
        let limits = self.rules.limits(account);
        let (machines, memory) = self
            .accounts
            .get(account)
            .map_or((0, 0), |account| (account.machines, account.memory_mib));
        machines < limits.machines && memory + u64::from(shape.memory_mib) <= limits.memory_mib
    }

    /// Its limits let an account run a request more.
    pub(crate) fn may_run(&self, account: &str) -> bool {
        let limit = self.rules.limits(account).concurrency;
        self.accounts.get(account).is_none_or(|account| account.running < limit)
    }

    /// How many more an account may run beside the request that comes first, or of `of` it, if there is one.
    pub(crate) fn slots(&self, account: &str, of: Option<RequestId>) -> u32 {
        let limit = self.rules.limits(account).concurrency;
        let found = self.account(account);
        let kept = found.is_some_and(|found| found.next.is_some() && found.next != of);
        limit.saturating_sub(found.map_or(0, |found| found.running) + u32::from(kept))
    }

    /// Its limits let an account have a machine of this shape for one request alone, beside those that boot likewise.
    pub(crate) fn may_reserve(&self, account: &str, shape: Shape) -> bool {
        let limits = self.rules.limits(account);
        self.accounts.get(account).is_none_or(|account| {
            account.running.saturating_add(account.reserved) < limits.concurrency
                && account.machines.saturating_add(account.reserved) < limits.machines
                && account.memory_mib + account.reserved_mib + u64::from(shape.memory_mib) <= limits.memory_mib
        })
    }

    /// The first of each account's requests that need a machine larger than the standard one.
    pub(crate) fn first_large(&self) -> impl Iterator<Item = RequestId> {
        let names = self.large.iter().take(LARGE_TRIED);
        let accounts = names.filter_map(|(_, name)| self.accounts.get(name));
        accounts.filter_map(|account| {
            let mut large = account.large.values().copied();
            large.find(|id| account.next.is_none_or(|next| next == *id))
        })
    }

    /// Those that are tried for what became free: the first of each kind, in order of arrival; with those after it where it is
    /// not to run on every machine.
    pub(crate) fn candidates(&self, group: &Group) -> Vec<RequestId> {
        let mut ids = Vec::new();
        for (kind, _) in group.queue.heads().take(TRIED) {
            for id in group.queue.of(kind) {
                ids.push(id);
                if ids.len() >= TRIED || self.request(id).is_none_or(|request| request.lost.is_empty()) {
                    break;
                }
            }
        }
        ids.dedup();
        ids
    }

    /// The same once its machines that end have ended.
    pub(crate) fn will_have(&self, account: &str, shape: Shape) -> bool {
        let limits = self.rules.limits(account);
        self.accounts.get(account).is_none_or(|account| {
            let memory = account.lasting_mib();
            account.machines.saturating_sub(account.ending) < limits.machines
                && memory + u64::from(shape.memory_mib) <= limits.memory_mib
        })
    }

    /// What may still be started now.
    pub(crate) fn free(&self) -> HostRoom {
        HostRoom::all(&self.rules).minus(self.used)
    }

    pub(crate) fn capacity(&self) -> crate::Amount {
        self.rules.standard.capacity(self.rules.reserve_mib)
    }

    /// Requests that wait for a function.
    pub(crate) fn waiting_for(&self, uid: Ulid) -> Vec<RequestId> {
        let waiting = self
            .functions
            .get(&uid)
            .map(|function| function.waiting.iter().copied().collect());
        waiting.unwrap_or_default()
    }

    /// Containers of a function that is no more take no further request; which they are.
    pub(crate) fn delete_function(&mut self, uid: Ulid) -> Vec<ContainerId> {
        let Some(function) = self.functions.get(&uid) else {
            return Vec::new();
        };
        for id in &function.containers {
            if let Some(container) = self.containers.get_mut(id) {
                container.deleted = true;
            }
        }
        function.containers.iter().copied().collect()
    }

    /// Where an idle container is and for how long it has been idle, if that is too long; else it is looked at later.
    pub(crate) fn idle_container_due(&mut self, id: ContainerId) -> Option<(MachineId, Mono)> {
        let (now, limit) = (self.now.mono, self.rules.container_idle);
        let container = self.containers.get_mut(&id)?;
        container.timed = false;
        if container.state != ContainerState::Idle {
            return None;
        }
        let due = container.since.saturating_add(limit);
        if due <= now {
            return Some((container.machine, now.saturating_sub(container.since)));
        }
        container.timed = true;
        self.timers.set(due, Timer::ContainerIdle(id));
        None
    }

    /// For how long an account's machine has been empty, if that is too long; else it is looked at later.
    pub(crate) fn idle_machine_due(&mut self, id: MachineId) -> Option<Mono> {
        let (now, limit) = (self.now.mono, self.rules.machine_idle);
        let machine = self.machines.get_mut(&id)?;
        machine.timed = false;
        if machine.state != MachineState::Active || !machine.containers.is_empty() {
            return None;
        }
        let due = machine.last_used.saturating_add(limit);
        if due <= now {
            return Some(now.saturating_sub(machine.last_used));
        }
        machine.timed = true;
        self.timers.set(due, Timer::MachineIdle(id));
        None
    }

    /// A request that runs goes on, but is not placed again.
    pub(crate) fn withdraw_request(&mut self, id: RequestId, why: Refusal) {
        if let Some(request) = self.requests.get_mut(&id) {
            request.withdrawn.get_or_insert(why);
        }
    }

    // --- what both observe and apply change the world by ---

    /// Puts a request in line.
    fn enqueue(&mut self, id: RequestId) {
        let capacity = self.capacity();
        let Some(request) = self.requests.get_mut(&id) else {
            return;
        };
        let (name, runtime) = (request.demand.account.clone(), request.demand.runtime.clone());
        let account = self.accounts.entry(name.clone()).or_default();
        account.line.insert(request.order, id);
        self.waiting += 1;
        if let Some(kind) = request.first() {
            self.functions.entry(kind.code.uid).or_default().waiting.insert(id);
        }
        let deadline = request.arrived.mono.saturating_add(self.rules.queue_timeout);
        self.timers.set(deadline, Timer::Deadline(id));
        request.state = RequestState::Waiting;
        let group = account.groups.entry(runtime.clone()).or_default();
        group.queue.insert(request.order, id, &request.demand.kinds);
        let (order, mut large) = (request.order, false);
        if let Some(kind) = request.first() {
            if kind.amount.fits(capacity) {
                group.queue.add_standard(order, id, kind.amount);
            } else {
                large = request.reserved.is_none();
            }
        }
        let watched = group.watched.is_some();
        if large {
            self.unsettled.insert(runtime.clone());
            self.change_large(&name, |requests| {
                requests.insert(order, id);
            });
        }
        self.refresh_line(&name);
        self.refresh_group(&name, &runtime);
        if !watched {
            self.watch(&name, &runtime);
        }
    }

    /// Takes a request out of line.
    pub(crate) fn dequeue(&mut self, id: RequestId) {
        let Some(request) = self.requests.get_mut(&id) else {
            return;
        };
        if request.state != RequestState::Waiting {
            return;
        }
        request.state = RequestState::New;
        let (name, runtime) = (request.demand.account.clone(), request.demand.runtime.clone());
        let deadline = request.arrived.mono.saturating_add(self.rules.queue_timeout);
        self.timers.clear(deadline, Timer::Deadline(id));
        if let Some(uid) = request.first().map(|kind| kind.code.uid)
            && let Some(function) = self.functions.get_mut(&uid)
        {
            function.waiting.remove(&id);
            if function.is_empty() {
                self.functions.remove(&uid);
            }
        }
        let Some(account) = self.accounts.get_mut(&name) else {
            return;
        };
        account.line.remove(&request.order);
        self.waiting = self.waiting.saturating_sub(1);
        if let Some(group) = account.groups.get_mut(&runtime) {
            group.queue.remove(request.order, &request.demand.kinds);
            if let Some(kind) = request.first() {
                group.queue.remove_standard(request.order, kind.amount);
            }
            let order = request.order;
            self.large_no_longer(&name, order);
        }
        self.no_longer_kept_for(id, &name, &runtime);
        self.refresh_line(&name);
        self.refresh_group(&name, &runtime);
    }

    /// Ends a request that is not in line; its account may run another.
    fn finish(&mut self, id: RequestId) {
        let Some(request) = self.requests.remove(&id) else {
            return;
        };
        if let Some(machine) = request.reserved {
            self.release(machine, &request.demand.account);
        }
        let name = &request.demand.account;
        if request.is_running() {
            self.count_running(name, false);
        }
        self.forget_account(name);
    }

    /// An account runs one request more (`true`) or less.
    fn count_running(&mut self, name: &Arc<str>, more: bool) {
        let limit = self.rules.limits(name).concurrency;
        let account = self.accounts.entry(name.clone()).or_default();
        let before = account.running;
        account.running = if more { before + 1 } else { before.saturating_sub(1) };
        // One is kept for the request that comes first.
        let kept = u32::from(account.next.is_some());
        let least = limit.saturating_sub(before.max(account.running).saturating_add(kept));
        if account.line.len() <= usize::try_from(least).unwrap_or(usize::MAX) {
            return;
        }
        // How many of those that wait may run has changed, and with it how many machines they want.
        for runtime in account.groups.keys().cloned().collect::<Vec<_>>() {
            self.refresh_group(name, &runtime);
        }
        if !more && before.saturating_add(kept) >= limit {
            // The one that waits longest comes before what else became free.
            self.touched.push_front(Touch::Slot(name.clone()));
        }
    }

    /// A request waits for a machine larger than the standard one no longer, or has one that boots.
    fn large_no_longer(&mut self, account: &Arc<str>, order: u64) {
        self.change_large(account, |requests| {
            requests.remove(&order);
        });
    }

    /// Changes which requests of an account need a machine larger than the standard one, and its place by the first.
    fn change_large(&mut self, name: &Arc<str>, change: impl FnOnce(&mut BTreeMap<u64, RequestId>)) {
        let Some(account) = self.accounts.get_mut(name) else {
            return;
        };
        let place = |requests: &BTreeMap<u64, RequestId>| Some((*requests.first_key_value()?.0, name.clone()));
        let before = place(&account.large);
        change(&mut account.large);
        let after = place(&account.large);
        if before != after {
            if let Some(before) = before {
                self.large.remove(&before);
            }
            self.large.extend(after);
        }
    }

    /// A machine more (`true`) or less is for a request of an account alone.
    fn count_reserved(&mut self, account: &Arc<str>, shape: Shape, more: bool) {
        let Some(account) = self.accounts.get_mut(account) else {
            return;
        };
        let memory = u64::from(shape.memory_mib);
        if more {
            account.reserved += 1;
            account.reserved_mib += memory;
        } else {
            account.reserved = account.reserved.saturating_sub(1);
            account.reserved_mib = account.reserved_mib.saturating_sub(memory);
        }
    }

    /// A machine that was booted for a request of an account is for anyone now.
    fn release(&mut self, id: MachineId, account: &Arc<str>) {
        let Some(machine) = self.machines.get_mut(&id) else {
            return;
        };
        machine.reserved = None;
        let (runtime, shape) = (machine.runtime.clone(), machine.shape);
        self.count_reserved(account, shape, false);
        let Some(machine) = self.machines.get(&id) else {
            return;
        };
        match machine.state {
            MachineState::Booting => self.runtimes.entry(runtime.clone()).or_default().booting += 1,
            MachineState::Warming => {
                let entry = self.runtimes.entry(runtime.clone()).or_default();
                entry.warming.insert(machine.capacity, id);
                self.touched.push_back(Touch::Warming(runtime.clone()));
                self.watch_surplus(&runtime);
            }
            _ => {}
        }
        self.unsettled.insert(runtime);
    }

    /// Takes a container out of the world and gives back what it had.
    fn remove_container(&mut self, id: ContainerId) -> Option<Container> {
        let container = self.containers.remove(&id)?;
        let uid = container.kind.code.uid;
        if let Some(function) = self.functions.get_mut(&uid) {
            function.containers.remove(&id);
            if function.is_empty() {
                self.functions.remove(&uid);
            }
        }
        self.forget_idle(&container);
        let mono = self.now.mono;
        let machine = self.machines.get_mut(&container.machine)?;
        machine.containers.remove(&id);
        let before = machine.free();
        machine.allocated = machine.allocated.minus(container.kind.amount);
        machine.last_used = mono;
        if container.is_running() {
            machine.running = machine.running.saturating_sub(1);
        }
        let after = machine.free();
        if let Some(name) = machine.account.clone() {
            let (state, runtime) = (machine.state, machine.runtime.clone());
            if let Some(account) = self.accounts.get_mut(&name) {
                let group = account.groups.entry(runtime.clone()).or_default();
                if state == MachineState::Active {
                    if container.state == ContainerState::Stopping {
                        group.stopping.subtract(container.kind.amount);
                    }
                    if group
                        .gathering
                        .is_none_or(|gathering| gathering.machine != container.machine)
                    {
                        group.rooms.remove(before, container.machine);
                        group.rooms.insert(after, container.machine);
                    }
                    self.touched.push_back(Touch::Room(container.machine));
                }
            }
            self.refresh_group(&name, &runtime);
        }
        self.refresh_rest(container.machine);
        Some(container)
    }

    /// An idle container is so no longer.
    fn forget_idle(&mut self, container: &Container) {
        if container.state != ContainerState::Idle {
            return;
        }
        let Some(machine) = self.machines.get(&container.machine) else {
            return;
        };
        let Some(account) = machine.account.as_ref().and_then(|name| self.accounts.get_mut(name)) else {
            return;
        };
        if let Some(group) = account.groups.get_mut(&machine.runtime) {
            group.remove_idle(container.kind, container.since, container.id);
        }
    }

    /// A container begins to stop, whatever it does: what it has will be free.
    pub(crate) fn stop(&mut self, id: ContainerId) {
        let mono = self.now.mono;
        let Some(container) = self.containers.get(&id).cloned() else {
            return;
        };
        if container.state == ContainerState::Stopping {
            return;
        }
        self.forget_idle(&container);
        if let Some(container) = self.containers.get_mut(&id) {
            container.state = ContainerState::Stopping;
            container.since = mono;
        }
        let Some(machine) = self.machines.get_mut(&container.machine) else {
            return;
        };
        if container.is_running() {
            machine.running = machine.running.saturating_sub(1);
        }
        if let (MachineState::Active, Some(name)) = (machine.state, machine.account.clone()) {
            let runtime = machine.runtime.clone();
            if let Some(account) = self.accounts.get_mut(&name) {
                let group = account.groups.entry(runtime.clone()).or_default();
                group.stopping.add(container.kind.amount);
            }
            self.refresh_group(&name, &runtime);
        }
        self.refresh_rest(container.machine);
    }

    /// An active machine takes nothing new: its room is its account's no longer, and what is idle in it stops.
    fn withdraw(&mut self, id: MachineId, state: MachineState) {
        let Some(machine) = self.machines.get_mut(&id) else {
            return;
        };
        machine.state = state;
        self.serving.remove(&(machine.assigned, id));
        let (free, runtime) = (machine.free(), machine.runtime.clone());
        let containers: Vec<_> = machine.containers.iter().copied().collect();
        let Some(name) = machine.account.clone() else {
            return;
        };
        let memory = u64::from(machine.shape.memory_mib);
        self.count(&name, |account| {
            account.ending += 1;
            account.ending_mib += memory;
        });
        for id in containers {
            let Some(container) = self.containers.get(&id) else {
                continue;
            };
            if container.state == ContainerState::Idle {
                self.stop(id);
            } else if container.state == ContainerState::Stopping
                && let Some(group) = self.accounts.get_mut(&name).and_then(|a| a.groups.get_mut(&runtime))
            {
                group.stopping.subtract(container.kind.amount);
            }
        }
        if let Some(group) = self.group_mut(&name, &runtime) {
            group.gathering.take_if(|gathering| gathering.machine == id);
            group.rooms.remove(free, id);
        }
        self.refresh_group(&name, &runtime);
    }

    /// Sets a machine's place among those that run nothing, and says so where it waits for that.
    fn refresh_rest(&mut self, id: MachineId) {
        let Some(machine) = self.machines.get_mut(&id) else {
            return;
        };
        let class = match machine.state {
            MachineState::Warming => Some(RestClass::Warming),
            MachineState::Active if machine.running > 0 => None,
            MachineState::Active if machine.containers.is_empty() => Some(RestClass::Empty),
            MachineState::Active => Some(RestClass::Idle),
            MachineState::Booting | MachineState::Closing | MachineState::Stopping => None,
        };
        let rest: Option<Rest> = class.map(|class| (class, machine.last_used));
        if rest != machine.rest {
            if let Some((class, since)) = machine.rest {
                self.at_rest.remove(&(class, since, id));
            }
            if let Some((class, since)) = rest {
                self.at_rest.insert((class, since, id));
                // It may be given up for what others lack.
                self.unsettled.append(&mut self.lacking);
            }
            machine.rest = rest;
        }
        if class == Some(RestClass::Empty) && !machine.timed {
            machine.timed = true;
            let at = machine.last_used.saturating_add(self.rules.machine_idle);
            self.timers.set(at, Timer::MachineIdle(id));
        }
        let goes = machine.state == MachineState::Closing || (self.draining && machine.state != MachineState::Stopping);
        if goes && machine.running == 0 {
            self.touched.push_back(Touch::Quiet(id));
        }
    }

    /// Sets an account's place among those of which requests wait.
    fn refresh_line(&mut self, name: &Arc<str>) {
        let Some(account) = self.accounts.get_mut(name) else {
            return;
        };
        let limits = self.rules.limits(name);
        let waiting = u64::try_from(account.line.len()).unwrap_or(u64::MAX);
        let weight = (waiting > 0).then(|| per_share(waiting, limits));
        if weight != account.line_weight {
            if let Some(old) = account.line_weight {
                self.lines.remove(&(old, name.clone()));
            }
            if let Some(new) = weight {
                self.lines.insert((new, name.clone()));
            }
            account.line_weight = weight;
        }
    }

    /// Sets what an account's requests for a runtime want of its supply.
    fn refresh_group(&mut self, name: &Arc<str>, runtime: &Arc<str>) {
        let standard = self.rules.standard;
        let capacity = self.capacity();
        let load = self.load(name);
        let first = self.may_go_first(name, runtime);
        let slots = self.slots(name, self.next_of(name, runtime));
        let limits = self.rules.limits(name);
        let Some(account) = self.accounts.get_mut(name) else {
            return;
        };
        let by_memory = limits.memory_mib.saturating_sub(account.memory_mib) / u64::from(standard.memory_mib).max(1);
        let allowed = limits
            .machines
            .saturating_sub(account.machines)
            .min(u32::try_from(by_memory).unwrap_or(u32::MAX))
            .min(if first { u32::MAX } else { 0 });
        let waiting = u32::try_from(account.line.len()).unwrap_or(u32::MAX);
        let Some(group) = account.groups.get_mut(runtime) else {
            return;
        };
        // Of those that wait, only so many may run.
        let need = group.machines_wanted(capacity, slots.min(waiting), waiting);
        let wanted = need.min(allowed);
        let oldest = group.queue.oldest().and_then(|id| self.requests.get(&id));
        // One that has just lost its last machine has not waited longer than others that have none.
        let since = oldest.map(|request| request.arrived.mono.max(account.without_since));
        let claim = since.filter(|_| slots > 0).map(|since| (allowed == 0, load, since));
        if wanted == group.wanted && claim == group.claim && need == group.need {
            return;
        }
        group.need = need;
        let entry = self.runtimes.entry(runtime.clone()).or_default();
        let place = |claim: (bool, u64, Mono)| (claim.0, claim.1);
        let only_since = wanted == group.wanted && claim.map(place) == group.claim.map(place);
        if claim != group.claim {
            if let Some((limited, load, since)) = group.claim {
                entry.waiting_mut(limited).remove(&(load, since, name.clone()));
            }
            if let Some((limited, load, since)) = claim {
                entry.waiting_mut(limited).insert((load, since, name.clone()));
            }
            group.claim = claim;
        }
        if only_since {
            return;
        }
        entry.wanted = (entry.wanted + wanted).saturating_sub(group.wanted);
        group.wanted = wanted;
        self.unsettled.insert(runtime.clone());
    }

    /// An account has a machine more (`true`) or less.
    fn count_machine(&mut self, name: &Arc<str>, shape: Shape, more: bool) {
        let memory = u64::from(shape.memory_mib);
        let runtimes = self.count(name, |account| {
            if more {
                account.machines += 1;
                account.memory_mib += memory;
            } else {
                // It has been retired, so that it counts among those that end.
                account.machines = account.machines.saturating_sub(1);
                account.memory_mib = account.memory_mib.saturating_sub(memory);
                account.ending = account.ending.saturating_sub(1);
                account.ending_mib = account.ending_mib.saturating_sub(memory);
            }
        });
        for runtime in runtimes {
            let waits = self.group(name, &runtime).is_some_and(|group| !group.queue.is_empty());
            if !more && waits {
                // Its limits may let it have another.
                self.touched.push_back(Touch::Warming(runtime));
            }
        }
        if !more {
            self.forget_account(name);
        }
    }

    /// Changes how many machines an account has, and its place by that; says which runtimes it uses.
    fn count(&mut self, name: &Arc<str>, change: impl FnOnce(&mut Account)) -> Vec<Arc<str>> {
        let old = self.load(name);
        self.loads.remove(&(old, name.clone()));
        let account = self.accounts.entry(name.clone()).or_default();
        change(account);
        let has_machines = account.machines > account.ending;
        if !has_machines {
            account.without_since = self.now.mono;
        }
        let runtimes: Vec<_> = account.groups.keys().cloned().collect();
        if has_machines {
            self.loads.insert((self.load(name), name.clone()));
        }
        for runtime in &runtimes {
            self.refresh_group(name, runtime);
        }
        runtimes
    }

    fn forget_account(&mut self, name: &str) {
        if self.accounts.get(name).is_some_and(Account::is_empty) {
            self.accounts.remove(name);
        }
    }

    /// Watches whether the warming pool of a runtime keeps more than it should.
    fn watch_surplus(&mut self, runtime: &Arc<str>) {
        let target = self.rules.warming.get(runtime).copied().unwrap_or(0);
        if self
            .runtimes
            .get(runtime)
            .is_some_and(|entry| entry.warming.len() > target)
        {
            let at = self.now.mono.saturating_add(self.rules.machine_idle);
            self.timers.set(at, Timer::Surplus(runtime.clone()));
        }
    }

    /// Takes a machine from those that serve or boot; it counts until it has ended.
    fn retire(&mut self, id: MachineId) {
        let Some(machine) = self.machines.get_mut(&id) else {
            return;
        };
        let (was, runtime, capacity) = (machine.state, machine.runtime.clone(), machine.capacity);
        let (shape, reserved) = (machine.shape, machine.reserved.take());
        let room = HostRoom::of(shape);
        if was == MachineState::Stopping {
            return;
        }
        if was == MachineState::Active {
            self.withdraw(id, MachineState::Stopping);
        } else {
            machine.state = MachineState::Stopping;
        }
        if was != MachineState::Closing {
            self.ending = self.ending.plus(room);
        }
        let entry = self.runtimes.entry(runtime.clone()).or_default();
        match was {
            MachineState::Booting => self.boot_over(&runtime, reserved.is_none()),
            MachineState::Warming => entry.warming.remove(capacity, id),
            _ => {}
        }
        self.unsettled.insert(runtime);
        if let Some(request) = reserved {
            if let Some(account) = self
                .requests
                .get(&request)
                .map(|request| request.demand.account.clone())
            {
                self.count_reserved(&account, shape, false);
            }
            self.unreserve(request);
        }
        self.refresh_rest(id);
    }

    /// A machine of a runtime boots no longer.
    fn boot_over(&mut self, runtime: &Arc<str>, for_anyone: bool) {
        let entry = self.runtimes.entry(runtime.clone()).or_default();
        entry.all_booting = entry.all_booting.saturating_sub(1);
        if for_anyone {
            entry.booting = entry.booting.saturating_sub(1);
        }
        self.booting = self.booting.saturating_sub(1);
        self.unsettled.insert(runtime.clone());
        self.unsettled.append(&mut self.lacking);
    }

    /// The machine that boots for a request alone is not to be had: it needs another.
    fn unreserve(&mut self, id: RequestId) {
        if let Some(request) = self.requests.get_mut(&id) {
            request.reserved = None;
            if request.state == RequestState::Waiting {
                let account = request.demand.account.clone();
                self.unsettled.insert(request.demand.runtime.clone());
                let order = request.order;
                self.change_large(&account, |requests| {
                    requests.insert(order, id);
                });
            }
        }
    }
}

fn per_share(value: u64, limits: &AccountLimits) -> u64 {
    value.saturating_mul(SHARE_SCALE) / u64::from(limits.share.max(1))
}

// === impl Runtime ===

impl Runtime {
    fn waiting_mut(&mut self, limited: bool) -> &mut BTreeSet<Claimant> {
        if limited {
            &mut self.limited
        } else {
            &mut self.claimants
        }
    }
}

// === impl Function ===

impl Function {
    fn is_empty(&self) -> bool {
        self.containers.is_empty() && self.waiting.is_empty()
    }
}

// === impl HostRoom ===

impl HostRoom {
    /// The whole host.
    pub(crate) fn all(rules: &Rules) -> Self {
        Self {
            machines: u64::try_from(rules.max_machines).unwrap_or(u64::MAX),
            memory_mib: rules.host_memory_mib,
            cpu_millis: rules.host_cpu_millis,
        }
    }

    /// What one machine takes.
    pub(crate) fn of(shape: Shape) -> Self {
        Self {
            machines: 1,
            memory_mib: shape.memory_mib.into(),
            cpu_millis: u64::from(shape.vcpus) * 1000,
        }
    }

    pub(crate) fn plus(self, other: Self) -> Self {
        Self {
            machines: self.machines + other.machines,
            memory_mib: self.memory_mib + other.memory_mib,
            cpu_millis: self.cpu_millis + other.cpu_millis,
        }
    }

    pub(crate) fn minus(self, other: Self) -> Self {
        Self {
            machines: self.machines.saturating_sub(other.machines),
            memory_mib: self.memory_mib.saturating_sub(other.memory_mib),
            cpu_millis: self.cpu_millis.saturating_sub(other.cpu_millis),
        }
    }

    pub(crate) fn fits(self, room: Self) -> bool {
        self.machines <= room.machines && self.memory_mib <= room.memory_mib && self.cpu_millis <= room.cpu_millis
    }
}
