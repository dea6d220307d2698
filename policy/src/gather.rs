//! Room for requests that wait too long: one that finds no place for [`PATIENCE`] while younger ones of its account do gets
//! a machine of its account to itself until it fits. Nothing else begins in what comes free there, and what falls idle in it
//! ends. Where no machine of its account could ever hold it, machines of the account are closed for the one that it needs.

use std::sync::Arc;
use std::time::Duration;

use crate::host::Step;
use crate::world::{Group, LOOKED_AT, TRIED};
use crate::{
    Amount, Command, Container, ContainerId, ContainerState, Machine, MachineId, Reason, Request, RequestId, World,
};

/// How long a request waits at most while what comes free in its account goes to younger ones.
pub(crate) const PATIENCE: Duration = Duration::from_secs(1);

impl Step<'_> {
    /// Looks at the requests of a group that have waited too long, until there is one for which a machine of its account can be
    /// kept. One that needs another machine, which may not be had for long, does not stand before those behind it.
    pub(crate) fn overdue(&mut self, account: &Arc<str>, runtime: &Arc<str>) {
        if !self.world.watch_is_over(account, runtime) {
            return;
        }
        self.world.watch(account, runtime);
        let Some(group) = self.world.group(account, runtime) else {
            return;
        };
        let gathers = group.gathering.is_some();
        let overdue: Vec<_> = self.world.overdue(account, runtime).filter_map(needs).collect();
        for (request, needs) in overdue {
            // What is kept for one does not keep another from the machine that it needs instead.
            if gathers && !self.world.is_stuck(request) {
                return;
            }
            let group = self.world.group(account, runtime);
            if let Some(machine) = group.and_then(|group| self.world.easiest(group, request)) {
                self.keep_room(machine, request);
                self.stop_idle(machine, request, needs);
                return;
            }
            self.give_way(request);
            self.world.unsettled.insert(runtime.clone());
        }
    }

    /// Whether a container that became idle has to end for a request that has waited too long. The first container that
    /// gives all that is lacking decides in which machine that is, and for which request: the first that it could help.
    pub(crate) fn gives_way(&mut self, id: ContainerId) -> Option<Reason> {
        let container = self.world.container(id)?;
        let machine = self.world.machine(container.machine)?;
        let (account, runtime) = (machine.account.as_ref()?, &machine.runtime);
        let group = self.world.group(account, runtime)?;
        let gathered = group.gathering.map(|gathering| gathering.machine);
        let request = match group.gathering {
            Some(gathering) => self.world.request(gathering.request)?,
            None => {
                let helps = |request: &Request| {
                    request.demand.kinds.contains(&container.kind) || self.world.may_run_in(request.id, machine.id)
                };
                self.world.overdue(account, runtime).find(|request| helps(request))?
            }
        };
        if request.demand.kinds.contains(&container.kind) {
            return None;
        }
        let machine = machine.id;
        let (request, needs) = needs(request).filter(|(id, _)| self.world.may_run_in(*id, machine))?;
        if gathered.is_some_and(|machine| needs.fits(self.world.room_with(machine, stops))) {
            return None;
        }
        if gathered != Some(machine) {
            let with_it = |container: &Container| stops(container) || container.id == id;
            if !needs.fits(self.world.room_with(machine, with_it)) {
                return None;
            }
            self.keep_room(machine, request);
        }
        Some(Reason::Room { request, needs })
    }

    /// Puts a request that has waited too long before all others of its account, where it does not come first already.
    pub(crate) fn put_first(&mut self, request: RequestId) {
        let account = self.world.request(request).map(|found| &found.demand.account);
        let next = account.and_then(|name| self.world.account(name)?.next);
        if next != Some(request) {
            self.decide(Command::PutFirst { request }, self.overtaken(request));
        }
    }

    fn keep_room(&mut self, machine: MachineId, request: RequestId) {
        let command = Command::KeepRoom {
            machine,
            request,
            drive_mib: self.world.drive_kept(machine, request),
        };
        self.decide(command, self.overtaken(request));
    }

    fn overtaken(&self, request: RequestId) -> Reason {
        let arrived = self.world.request(request).map(|found| found.arrived.mono);
        let waited = arrived.map_or(Duration::ZERO, |arrived| self.since(arrived));
        Reason::Overtaken { waited }
    }

    /// Stops idle containers in a machine, the longest idle first, until what stops there is enough.
    pub(crate) fn stop_idle(&mut self, machine: MachineId, request: RequestId, needs: Amount) {
        let Some(found) = self.world.machine(machine) else {
            return;
        };
        let (reach, mut left) = (self.world.reach(found), self.world.given_but(found, stops));
        let containers = found.containers.iter().filter_map(|id| self.world.container(*id));
        let mut idle: Vec<_> = containers
            .filter(|container| container.state == ContainerState::Idle)
            .map(|container| (container.since, container.id, container.kind.amount))
            .collect();
        idle.sort_unstable();
        for (_, container, amount) in idle {
            if needs.fits(reach.minus(left)) {
                break;
            }
            let command = Command::StopContainer { machine, container };
            if self.decide(command, Reason::Room { request, needs }) {
                left = left.minus(amount);
            }
        }
    }
}

impl World {
    /// The requests for a runtime that have waited too long and have no machine booting for them, the first of each kind: the
    /// one that comes first in its account, then the oldest.
    pub(crate) fn overdue(&self, account: &str, runtime: &str) -> impl Iterator<Item = &Request> {
        let next = self.next_of(account, runtime);
        let group = self.group(account, runtime).into_iter();
        let heads = group.flat_map(|group| group.queue.heads().take(TRIED));
        let heads = heads.map(|(_, id)| id).filter(move |id| next != Some(*id));
        let requests = next.into_iter().chain(heads).filter_map(|id| self.request(id));
        requests.filter(|request| request.reserved.is_none() && self.is_overdue(request))
    }

    pub(crate) fn is_overdue(&self, request: &Request) -> bool {
        request.arrived.mono.saturating_add(PATIENCE) <= self.now.mono && !self.awaits(&request.demand.account)
    }

    /// No machine that its account has could ever hold a request that has waited too long.
    pub(crate) fn is_stuck(&self, id: RequestId) -> bool {
        let Some(request) = self.request(id).filter(|request| self.is_overdue(request)) else {
            return false;
        };
        let group = self.group(&request.demand.account, &request.demand.runtime);
        let machines = group.into_iter().flat_map(Group::machines).take(LOOKED_AT);
        !machines.into_iter().any(|machine| self.may_run_in(id, machine))
    }

    /// A machine could hold a request if it held nothing else.
    pub(crate) fn may_run_in(&self, id: RequestId, machine: MachineId) -> bool {
        let (Some(request), Some(machine)) = (self.request(id), self.machine(machine)) else {
            return false;
        };
        let fits = request
            .first()
            .is_some_and(|kind| kind.amount.fits(self.reach(machine)));
        fits && !request.lost.contains(&machine.id)
    }

    /// The machine in which a request lacks the least, beside what is idle or stops there. Containers that could serve it
    /// stay.
    fn easiest(&self, group: &Group, id: RequestId) -> Option<MachineId> {
        let request = self.request(id)?;
        let needs = request.first()?.amount;
        let machines = group.rooms.roomiest().take(LOOKED_AT);
        let machines = machines.filter(|machine| self.may_run_in(id, *machine));
        let lacking = machines.filter_map(|machine| {
            let found = self.machine(machine)?;
            let serves = |container: &Container| request.demand.kinds.contains(&container.kind);
            let stays = self.given_but(found, |container| !serves(container));
            if !needs.fits(self.reach(found).minus(stays)) {
                return None;
            }
            let lacks = needs.minus(self.room_with(machine, runs_nothing));
            let part = |lacks: u32, of: u32| u64::from(lacks) * 1000 / u64::from(of).max(1);
            let by_cpu = part(lacks.cpu_millis, found.capacity.cpu_millis);
            let by_memory = part(lacks.memory_mib, found.capacity.memory_mib);
            let by_scratch = part(lacks.scratch_mib, found.capacity.scratch_mib);
            Some((by_cpu.max(by_memory).max(by_scratch), machine))
        });
        lacking.min().map(|(_, machine)| machine)
    }

    /// How large the drive of a machine has to be, in MiB, to hold a request beside the containers that could serve it.
    fn drive_kept(&self, machine: MachineId, request: RequestId) -> u32 {
        let Some((machine, request)) = self.machine(machine).zip(self.request(request)) else {
            return 0;
        };
        let needs = request.first().map_or(0, |kind| kind.amount.scratch_mib);
        if needs == 0 {
            return machine.shape.drive_mib;
        }
        let stays = |container: &Container| !stops(container) && request.demand.kinds.contains(&container.kind);
        let given = self.given_but(machine, |container| !stays(container)).scratch_mib;
        let needs = needs.saturating_add(given);
        let lacks = needs.saturating_sub(machine.capacity.scratch_mib);
        machine.shape.drive_mib.saturating_add(lacks)
    }

    /// What a machine would have free if such containers of it had ended.
    pub(crate) fn room_with(&self, machine: MachineId, ends: impl Fn(&Container) -> bool) -> Amount {
        let machine = self.machine(machine);
        machine.map_or_else(Amount::default, |found| {
            self.reach(found).minus(self.given_but(found, ends))
        })
    }

    /// What the containers of a machine were given, but such as end.
    fn given_but(&self, machine: &Machine, ends: impl Fn(&Container) -> bool) -> Amount {
        let containers = machine.containers.iter().filter_map(|id| self.container(*id));
        let stay = containers.filter(|container| !ends(container));
        stay.fold(Amount::default(), |sum, container| sum.plus(container.kind.amount))
    }
}

fn stops(container: &Container) -> bool {
    container.state == ContainerState::Stopping
}

/// It is idle or stops.
pub(crate) fn runs_nothing(container: &Container) -> bool {
    !container.is_running()
}

fn needs(request: &Request) -> Option<(RequestId, Amount)> {
    Some((request.id, request.first()?.amount))
}
