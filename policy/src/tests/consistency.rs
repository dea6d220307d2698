//! What must hold of a world at any moment: every index says what a look at everything says.

use std::collections::{BTreeMap, BTreeSet};

use crate::world::{HostRoom, RestClass, Sum};
use crate::{Amount, ContainerState, Kind, Machine, MachineId, MachineState, RequestState, World};

impl World {
    /// Looks at everything. Machines that were `found` may be more than the rules allow.
    pub(super) fn check(&self, found: &BTreeSet<MachineId>) {
        self.check_machines(found);
        self.check_launched();
        self.check_containers();
        self.check_requests();
        self.check_amounts();
        assert!(self.touched.is_empty(), "not looked at: {:?}", self.touched);
    }

    fn check_machines(&self, found: &BTreeSet<MachineId>) {
        let sum = |rooms: &mut dyn Iterator<Item = HostRoom>| rooms.fold(HostRoom::default(), HostRoom::plus);
        let used = sum(&mut self.machines().map(|machine| HostRoom::of(machine.shape)));
        assert_eq!(used, self.used);
        let any_found = self.machines().any(|machine| found.contains(&machine.id));
        assert!(
            any_found || used.fits(HostRoom::all(&self.rules)),
            "more than the host has"
        );
        let ends = |state| matches!(state, MachineState::Closing | MachineState::Stopping);
        let ending = self.machines().filter(|machine| ends(machine.state));
        assert_eq!(sum(&mut ending.map(|machine| HostRoom::of(machine.shape))), self.ending);
        let boots = |machine: &&Machine| machine.state == MachineState::Booting && machine.launched.is_none();
        let comes =
            |machine: &&Machine| boots(machine) || (machine.state == MachineState::Found && machine.account.is_none());
        assert_eq!(self.machines().filter(comes).count(), self.booting as usize);
        assert!(self.machines().filter(boots).count() <= self.rules.concurrent_boots);
        let short = self.accounts.iter();
        let short = short.filter_map(|(name, account)| Some((account.short_of_disk?, name.clone())));
        assert_eq!(short.collect::<BTreeSet<_>>(), self.short_of_disk);
        let mut rest = BTreeSet::new();
        let mut accounts: BTreeMap<_, HostRoom> = BTreeMap::new();
        let mut given_millis: BTreeMap<_, u64> = BTreeMap::new();
        for machine in self.machines() {
            let containers = machine.containers.iter().map(|id| self.container(*id).unwrap());
            let given = containers.clone().map(|container| container.kind.amount);
            let is_launched = machine.launched.is_some();
            if !is_launched {
                assert_eq!(given.fold(Amount::default(), Amount::plus), machine.allocated);
            }
            assert!(
                machine.allocated.fits(machine.capacity) || found.contains(&machine.id),
                "more than the machine has"
            );
            let running = containers.filter(|container| container.is_running()).count();
            assert_eq!(running, machine.running as usize);
            let class = match machine.state {
                _ if is_launched => None,
                MachineState::Warming => Some(RestClass::Warming),
                MachineState::Active if running > 0 => None,
                MachineState::Active if machine.containers.is_empty() => Some(RestClass::Empty),
                MachineState::Active => Some(RestClass::Idle),
                _ => None,
            };
            rest.extend(class.map(|class| (class, machine.last_used, machine.id)));
            if let Some(account) = &machine.account {
                let count = accounts.entry(account.clone()).or_default();
                *count = count.plus(HostRoom::of(machine.shape));
                *given_millis.entry(account.clone()).or_default() += u64::from(machine.allocated.cpu_millis);
                if !is_launched {
                    self.check_room(machine, account);
                }
            }
            let warms = self
                .runtime(&machine.runtime)
                .is_some_and(|entry| entry.warming.iter().any(|id| id == machine.id));
            assert_eq!(
                warms,
                machine.state == MachineState::Warming && machine.reserved.is_none()
            );
            if let Some(request) = machine.reserved {
                assert_eq!(self.request(request).unwrap().reserved, Some(machine.id));
            }
        }
        assert_eq!(rest, self.at_rest);
        // Those all of whose machines end have no place among the others.
        let lasting = accounts.keys().filter(|name| self.accounts[*name].is_served());
        let loads: BTreeSet<_> = lasting.map(|name| (self.load(name), name.clone())).collect();
        assert_eq!(loads, self.loads);
        for (name, account) in &self.accounts {
            let given = given_millis.get(name).copied().unwrap_or_default();
            assert_eq!(account.given_millis, given, "{name}");
        }
        for (name, has) in accounts {
            assert_eq!(self.account(&name).unwrap().has, has);
        }
        for (name, entry) in &self.runtimes {
            let booting = self.machines().filter(comes).filter(|m| m.runtime == *name);
            let (own, anyone): (Vec<_>, Vec<_>) = booting.partition(|machine| machine.reserved.is_some());
            assert_eq!(own.len() + anyone.len(), entry.all_booting as usize);
            assert_eq!(anyone.len(), entry.booting as usize);
        }
    }

    /// A machine of an account is among those with room, or is kept for a request.
    fn check_room(&self, machine: &Machine, account: &str) {
        let group = self.group(account, &machine.runtime).unwrap();
        let has_room = group.rooms.iter().any(|id| id == machine.id);
        assert_eq!(group.rooms.get(machine.id), has_room.then(|| machine.room()));
        let is_kept = group.gathering.is_some_and(|gathering| gathering.machine == machine.id);
        assert_eq!(has_room != is_kept, machine.state == MachineState::Active);
    }

    /// What is said of machines that accounts launched.
    fn check_launched(&self) {
        for (name, account) in &self.accounts {
            let own = |machine: &&Machine| machine.launched.is_some() && machine.account.as_ref() == Some(name);
            let last = |machine: &&Machine| machine.state != MachineState::Stopping;
            let machines: Vec<_> = self.machines().filter(own).filter(last).collect();
            let ids: BTreeSet<_> = machines.iter().map(|machine| machine.id).collect();
            assert_eq!(ids, account.launched);
            let mib: i64 = machines.iter().map(|machine| i64::from(machine.shape.memory_mib)).sum();
            assert_eq!(mib, account.launched_mib);
        }
        for machine in self.machines() {
            let Some(launched) = &machine.launched else { continue };
            let (asked, taken, shape) = (launched.asked, launched.taken, machine.shape);
            assert!(machine.containers.is_empty() && machine.rest.is_none() && machine.account.is_some());
            assert!(
                shape.vcpus >= asked.vcpus.max(taken.vcpus),
                "less counts than it may have"
            );
            assert!(
                shape.memory_mib >= asked.memory_mib.max(taken.memory_mib),
                "less counts than it may have"
            );
            assert_eq!(machine.allocated.cpu_millis, asked.cpu_millis);
            if let Some(balance) = &machine.credits {
                assert_eq!(balance.plan.baseline_millis, shape.baseline_millis);
                assert_eq!(balance.plan.vcpus, asked.vcpus, "credits go with what it is to have");
            }
        }
    }

    fn check_containers(&self) {
        let mut idle = 0;
        for container in self.containers() {
            let machine = self.machine(container.machine).unwrap();
            assert!(machine.containers.contains(&container.id));
            let account = machine.account.as_ref().unwrap();
            if container.state == ContainerState::Idle {
                idle += 1;
                assert_eq!(machine.state, MachineState::Active, "idle where nothing is taken");
                assert!(!container.deleted, "idle for a function that is no more");
                let group = self.group(account, &machine.runtime).unwrap();
                assert!(group.idle[&container.kind].contains(&(container.since, container.id)));
                assert!(group.idle_order.contains(&(container.since, container.id)));
            }
        }
        let groups = || self.accounts.values().flat_map(|account| account.groups.values());
        assert_eq!(groups().map(|group| group.idle_order.len()).sum::<usize>(), idle);
        assert_eq!(
            groups()
                .flat_map(|group| group.idle.values())
                .map(BTreeSet::len)
                .sum::<usize>(),
            idle
        );
        for (name, account) in &self.accounts {
            for (runtime, group) in &account.groups {
                let stopping = self.containers().filter(|container| {
                    let machine = self.machine(container.machine).unwrap();
                    container.state == ContainerState::Stopping
                        && machine.state == MachineState::Active
                        && machine.account.as_ref() == Some(name)
                        && machine.runtime == *runtime
                });
                let mut sum = Sum::default();
                stopping.for_each(|container| sum.add(container.kind.amount));
                assert_eq!(group.stopping, sum);
            }
        }
    }

    fn check_amounts(&self) {
        for (code, entry) in self.amounts.iter() {
            // Its account may have had more when it was determined.
            let possible = self.rules.shape_for(entry.amount).is_some() || entry.amount == entry.first();
            assert!(possible, "{} is more than there can be", entry.amount);
            if let Some(container) = entry.ahead.map(|id| self.container(id).unwrap()) {
                let amount = entry.amount;
                assert_eq!(container.kind, Kind { code: *code, amount });
                let starts = matches!(container.state, ContainerState::Starting(_) | ContainerState::Stopping);
                assert!(starts, "{:?}", container.state);
            }
        }
    }

    fn check_requests(&self) {
        let lines: usize = self.accounts.values().map(|account| account.line.len()).sum();
        assert_eq!(lines, self.waiting() as usize);
        // Those that come again wait beside those that are counted.
        let lines = self.accounts.values().flat_map(|account| account.line.values());
        let first = lines.filter(|id| self.request(**id).unwrap().attempts == 0);
        assert!(first.count() <= self.rules.queue_limit);
        for (name, account) in &self.accounts {
            assert!(!account.is_empty(), "{name} is kept for nothing");
            let running = self.containers().filter(|container| {
                let machine = self.machine(container.machine).unwrap();
                let serves = matches!(
                    container.state,
                    ContainerState::Starting(crate::Purpose::Serve(_)) | ContainerState::Busy(_)
                );
                serves && machine.account.as_ref() == Some(name)
            });
            assert_eq!(running.count(), account.running as usize, "{name}");
            let waits = account
                .line
                .values()
                .all(|id| self.request(*id).unwrap().state == RequestState::Waiting);
            assert!(waits, "in line and not waiting");
            for (runtime, group) in &account.groups {
                let entry = self.runtime(runtime);
                let claims = entry.is_some_and(|entry| {
                    let first = self.may_go_first(name, runtime) || self.next_of(name, runtime).is_some();
                    let allowed = first && self.may_have(name, self.rules.standard);
                    let of = |(load, _, of): &&crate::world::Claimant| *load == self.load(name) && of == name;
                    let (claims, limited) = (entry.claimants.iter().find(of), entry.limited.iter().find(of));
                    assert!(claims.is_none() || allowed);
                    assert!(limited.is_none() || !allowed);
                    claims.or(limited).is_some()
                });
                let slots = self.slots(name, self.next_of(name, runtime));
                assert_eq!(claims, !group.queue.is_empty() && slots > 0);
                if let Some(gathering) = group.gathering {
                    let request = self.request(gathering.request).unwrap();
                    let machine = self.machine(gathering.machine).unwrap();
                    assert_eq!((&request.demand.account, &request.demand.runtime), (name, runtime));
                    assert_eq!(
                        (request.state, machine.state),
                        (RequestState::Waiting, MachineState::Active)
                    );
                    assert_eq!((machine.account.as_ref(), &machine.runtime), (Some(name), runtime));
                    let needs = request.first().unwrap().amount;
                    let may_run = self.slots(name, Some(request.id)) > 0;
                    assert!(!may_run || !needs.fits(self.room(machine)), "kept and not used");
                }
                // Nobody waits for what is there.
                for id in self
                    .candidates(group)
                    .into_iter()
                    .filter(|id| self.slots(name, Some(*id)) > 0)
                {
                    let request = self.request(id).unwrap();
                    let amount = request.first().unwrap().amount;
                    let spare = self.spare_disk(name);
                    let room = group.rooms.tightest(amount, spare, &request.lost);
                    assert_eq!(room, None, "waits while there is room");
                    for kind in &request.demand.kinds {
                        assert!(!group.idle.contains_key(kind), "waits while its kind is idle");
                    }
                    let warming = entry.and_then(|entry| entry.warming.tightest(amount, spare, &[]));
                    let next = self.accounts[name].next == Some(id);
                    let first = next || self.may_go_first(name, runtime);
                    // Smaller ones of other rules are for those that could have one as they are now.
                    let allowed = first && self.may_have(name, self.rules.standard);
                    let allowed = warming.filter(|id| allowed && self.may_have(name, self.machine(*id).unwrap().shape));
                    assert_eq!(allowed, None, "waits while a machine is ready");
                }
            }
        }
        for (name, entry) in &self.runtimes {
            let wanted = self.accounts.values().filter_map(|account| account.groups.get(name));
            assert_eq!(wanted.map(|group| group.wanted).sum::<u32>(), entry.wanted);
        }
    }
}
