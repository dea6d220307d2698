//! A host with its clock, and what it asked for that nobody has done yet.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use super::kernel::Kernel;
use crate::world::HostRoom;
use crate::{
    AccountLimits, Command, Completion, ContainerFailure, ContainerId, Decision, Demand, Event, FoundContainer, Host,
    Ids, Kind, Launch, MachineId, MachineState, Now, Purpose, Reason, Refusal, RequestId, ResizeMode, Rules, Shape,
    World,
};

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum End {
    Answered,
    Refused(Refusal),
}

pub(super) struct Driver {
    pub(super) host: Host,
    /// The seed of its ids.
    pub(super) seed: u64,
    /// What it began with.
    pub(super) rules: Rules,
    pub(super) now: Duration,
    /// How far the host's clock is ahead of that.
    pub(super) wall_ahead: Duration,
    /// Who counts and settles.
    pub(super) kernel: Kernel,
    requests: Ids,
    pub(super) booting: BTreeSet<MachineId>,
    pub(super) destroying: BTreeSet<MachineId>,
    pub(super) creating: BTreeSet<ContainerId>,
    pub(super) running: BTreeMap<ContainerId, RequestId>,
    pub(super) stopping: BTreeSet<ContainerId>,
    shapes: BTreeMap<MachineId, (Arc<str>, Shape)>,
    owners: BTreeMap<MachineId, Arc<str>>,
    /// Those that accounts launched, as the agent has written down.
    pub(super) launches: BTreeMap<MachineId, Box<Launch>>,
    /// Machines that the agent found when it started, and has not taken over; what is in them.
    pub(super) found: BTreeMap<MachineId, Vec<FoundContainer>>,
    /// All that it found.
    pub(super) inherited: BTreeSet<MachineId>,
    /// Requests whose callers went with an earlier agent.
    left: BTreeSet<RequestId>,
    pub(super) demands: BTreeMap<RequestId, Demand>,
    made: BTreeMap<ContainerId, (Kind, Purpose, MachineId)>,
    pub(super) ended: BTreeMap<RequestId, End>,
    /// All that went in and came out since the agent started.
    pub(super) record: Vec<(Now, Event, Vec<Decision>)>,
}

impl Driver {
    pub(super) fn new(rules: Rules) -> Self {
        assert_eq!(rules.check(), Ok(()));
        let mut driver = Self {
            host: Host::new(rules.clone(), Ids::new(1)),
            seed: 1,
            rules,
            now: Duration::ZERO,
            wall_ahead: Duration::ZERO,
            kernel: Kernel::default(),
            requests: Ids::new(2),
            booting: BTreeSet::new(),
            destroying: BTreeSet::new(),
            creating: BTreeSet::new(),
            running: BTreeMap::new(),
            stopping: BTreeSet::new(),
            shapes: BTreeMap::new(),
            owners: BTreeMap::new(),
            launches: BTreeMap::new(),
            found: BTreeMap::new(),
            inherited: BTreeSet::new(),
            left: BTreeSet::new(),
            demands: BTreeMap::new(),
            made: BTreeMap::new(),
            ended: BTreeMap::new(),
            record: Vec::new(),
        };
        driver.step(Event::Tick);
        driver
    }

    /// With its warming pool full.
    pub(super) fn warm(rules: Rules) -> Self {
        let mut driver = Self::new(rules);
        driver.boot_all();
        driver
    }

    pub(super) fn world(&self) -> &World {
        self.host.world()
    }

    pub(super) fn boot_all(&mut self) {
        while let Some(machine) = self.booting.first().copied() {
            self.step(Event::MachineReady { machine });
        }
    }

    /// Another agent starts, and finds the machines. Who waited is gone with the one before it, and so is what started.
    pub(super) fn restart(&mut self, rules: Rules) {
        assert_eq!(rules.check(), Ok(()));
        self.seed += 2;
        self.host = Host::new(rules.clone(), Ids::new(self.seed));
        self.rules = rules;
        self.record.clear();
        self.demands.retain(|request, _| self.ended.contains_key(request));
        let mut found = std::mem::take(&mut self.found);
        for machine in self.shapes.keys() {
            found.entry(*machine).or_default();
        }
        for (container, (kind, _, machine)) in std::mem::take(&mut self.made) {
            if !self.creating.contains(&container) && !self.destroying.contains(&machine) {
                found.entry(machine).or_default().push(FoundContainer {
                    container,
                    kind,
                    created: Duration::ZERO,
                    request: self.running.remove(&container),
                });
            }
        }
        (self.booting, self.destroying, self.creating) = Default::default();
        (self.running, self.stopping) = Default::default();
        self.inherited = found.keys().copied().collect();
        self.kernel.restart();
        self.found = found;
        for machine in self.shapes.keys().copied().collect::<Vec<_>>() {
            assert_eq!(self.tell_found(machine), [], "before all is known");
        }
        self.step(Event::Tick);
    }

    /// A machine is found, of the standard runtime, and these are in it.
    pub(super) fn find(
        &mut self,
        machine: MachineId,
        shape: Shape,
        account: Option<&str>,
        containers: Vec<FoundContainer>,
    ) -> Vec<Decision> {
        self.shapes.insert(machine, (super::RUNTIME.into(), shape));
        self.owners.extend(account.map(|account| (machine, account.into())));
        self.found.insert(machine, containers);
        self.inherited.insert(machine);
        self.tell_found(machine)
    }

    fn tell_found(&mut self, machine: MachineId) -> Vec<Decision> {
        let (runtime, shape) = self.shapes[&machine].clone();
        let decisions = self.step(Event::MachineFound {
            machine,
            runtime,
            shape,
            account: self.owners.get(&machine).cloned(),
            created: Duration::ZERO,
            mode: self.kernel.mode(machine),
            launched: self.launches.get(&machine).cloned(),
        });
        let found = self.host.world().machine(machine);
        let terms = found.and_then(|found| Some(found.credits.as_ref()?.terms));
        if let Some(terms) = terms {
            self.kernel.take_over(machine, terms, self.now);
        }
        decisions
    }

    /// The guest of a machine that was found answers.
    pub(super) fn adopt(&mut self, machine: MachineId) -> Vec<Decision> {
        self.step(Event::MachineAdopted {
            machine,
            containers: self.found[&machine].clone(),
        })
    }

    pub(super) fn adopt_all(&mut self) {
        while let Some(machine) = self.found.keys().next().copied() {
            self.adopt(machine);
        }
    }

    /// An id that nothing has.
    pub(super) fn new_id(&mut self) -> ulid::Ulid {
        self.requests.next(self.now)
    }

    /// Somebody changes what an account may have.
    pub(super) fn limit(&mut self, account: &str, change: impl FnOnce(&mut AccountLimits)) -> Vec<Decision> {
        let mut limits = Box::new(self.world().rules().limits(account).clone());
        change(&mut limits);
        self.step(Event::LimitsAsked {
            account: account.into(),
            limits,
            by: "someone".into(),
        })
    }

    pub(super) fn request(&mut self, demand: Demand) -> (RequestId, Vec<Decision>) {
        let request = RequestId(self.requests.next(self.now));
        self.demands.insert(request, demand.clone());
        (request, self.step(Event::Requested { request, demand }))
    }

    /// Runs a request to its end where it can run at once; its container is idle afterwards.
    pub(super) fn serve(&mut self, demand: Demand) -> ContainerId {
        let container = self.start(demand).1;
        self.complete(container, Completion::Answered);
        container
    }

    /// Begins a request that can run at once.
    pub(super) fn start(&mut self, demand: Demand) -> (RequestId, ContainerId) {
        let (request, _) = self.request(demand);
        let created = self
            .made
            .iter()
            .find(|(id, (_, purpose, _))| *purpose == Purpose::Serve(request) && self.creating.contains(id))
            .map(|(id, _)| *id);
        if let Some(container) = created {
            self.step(Event::ContainerReady { container });
        }
        let container = *self.running.iter().find(|(_, of)| **of == request).unwrap().0;
        (request, container)
    }

    pub(super) fn complete(&mut self, container: ContainerId, completion: Completion) -> Vec<Decision> {
        let request = self.running[&container];
        self.step(Event::Completed {
            container,
            request,
            completion,
        })
    }

    pub(super) fn later(&mut self, time: Duration) -> Vec<Decision> {
        self.now += time;
        self.step(Event::Tick)
    }

    pub(super) fn machine_of(&self, container: ContainerId) -> MachineId {
        self.made[&container].2
    }

    pub(super) fn refusal(&self, request: RequestId) -> Option<&Refusal> {
        match self.ended.get(&request) {
            Some(End::Refused(refusal)) => Some(refusal),
            _ => None,
        }
    }

    /// Tells the agent of an account.
    pub(super) fn tell(&mut self, machine: MachineId) -> Vec<Decision> {
        self.kernel.untold.remove(&machine);
        match self.kernel.get(machine).map(|kept| kept.account) {
            Some(account) => self.step(Event::CreditsSettled { machine, account }),
            None => Vec::new(),
        }
    }

    /// Goes on until then, with all that accounts do of themselves.
    pub(super) fn run_until(&mut self, end: Duration) {
        while self.now < end || !self.kernel.untold.is_empty() {
            if let Some(machine) = self.kernel.untold.first().copied() {
                self.tell(machine);
                continue;
            }
            let (crosses, wakes) = (self.kernel.next(), self.host.next_wake());
            let next = crosses.into_iter().chain(wakes).chain([end]).min().unwrap_or(end);
            self.now = next.max(self.now);
            self.kernel.pass(self.now);
            if self.kernel.untold.is_empty() {
                self.step(Event::Tick);
            }
        }
    }

    /// Does everything that is asked until nothing is, without time passing.
    pub(super) fn settle(&mut self) {
        for _ in 0..10_000 {
            let event = if let Some(machine) = self.destroying.first().copied() {
                Event::MachineEnded { machine }
            } else if let Some(machine) = self.found.keys().next().copied() {
                self.adopt(machine);
                continue;
            } else if let Some(machine) = self.booting.first().copied() {
                Event::MachineReady { machine }
            } else if let Some(container) = self.stopping.first().copied() {
                Event::ContainerEnded { container }
            } else if let Some(container) = self.creating.first().copied() {
                Event::ContainerReady { container }
            } else if let Some((container, request)) = self.running.first_key_value() {
                Event::Completed {
                    container: *container,
                    request: *request,
                    completion: Completion::Answered,
                }
            } else {
                return;
            };
            self.step(event);
        }
        panic!("never settles");
    }

    /// Feeds an event in, does the books on what is asked, and checks what must always hold.
    pub(super) fn step(&mut self, event: Event) -> Vec<Decision> {
        match &event {
            Event::MachineReady { machine } => {
                self.booting.remove(machine);
            }
            Event::MachineAdopted { machine, containers } if self.found.remove(machine).is_some() => {
                for found in containers {
                    self.take_over(*machine, found);
                }
            }
            Event::MachineEnded { machine } => {
                self.launches.remove(machine);
                self.shapes.remove(machine);
                self.found.remove(machine);
                self.booting.remove(machine);
                self.destroying.remove(machine);
                let made = &self.made;
                let elsewhere = |id: &ContainerId| made[id].2 != *machine;
                self.creating.retain(elsewhere);
                self.kernel.close(*machine, self.now);
                self.running.retain(|id, _| elsewhere(id));
                self.stopping.retain(elsewhere);
                self.made.retain(|_, (_, _, of)| of != machine);
            }
            Event::ContainerReady { container } => {
                self.creating.remove(container);
            }
            Event::ContainerFailed { container, failure } => {
                let asked = self.creating.remove(container);
                let made = self.made.remove(container);
                if let Some((_, Purpose::Serve(request), _)) = made
                    && asked
                    && *failure == ContainerFailure::Settled
                    && self.world().request(request).is_some()
                {
                    self.end(request, End::Answered);
                }
            }
            Event::ContainerEnded { container } if self.stopping.remove(container) => {
                self.made.remove(container);
            }
            Event::Completed {
                container,
                request,
                completion,
            } if self.running.get(container) == Some(request) => {
                self.running.remove(container);
                // One whose request was refused meanwhile is over without an answer.
                if *completion != Completion::NotBegun && self.world().request(*request).is_some() {
                    self.end(*request, End::Answered);
                }
            }
            _ => {}
        }
        let now = Now {
            mono: self.now,
            wall: self.now + self.wall_ahead,
        };
        let had = self.world().accounts.iter();
        let had: BTreeMap<_, _> = had.map(|(name, of)| (name.clone(), (of.has, of.running))).collect();
        let decisions = self.host.step(now, event.clone());
        if !matches!(event, Event::MachineFound { .. }) {
            let adopts = matches!(event, Event::MachineAdopted { .. });
            self.check_limits(&had, adopts);
        }
        for decision in &decisions {
            self.note(&decision.command);
            self.check_start(decision);
        }
        assert_eq!(self.host.take_faults(), []);
        self.check();
        self.record.push((now, event, decisions.clone()));
        decisions
    }

    fn take_over(&mut self, machine: MachineId, found: &FoundContainer) {
        let is_found = |found: &crate::Machine| found.state == MachineState::Found;
        if !self.world().machine(machine).is_some_and(is_found) {
            return;
        }
        let (runtime, account) = (self.shapes[&machine].0.clone(), self.owners[&machine].clone());
        self.made.insert(found.container, (found.kind, Purpose::Ahead, machine));
        if let Some(request) = found.request {
            self.running.insert(found.container, request);
            self.left.insert(request);
            let kinds = vec![found.kind];
            self.demands.insert(
                request,
                Demand {
                    account,
                    runtime,
                    kinds,
                    resize: None,
                    own_amount: false,
                },
            );
        }
    }

    fn end(&mut self, request: RequestId, end: End) {
        assert_eq!(self.ended.insert(request, end), None, "two ends");
    }

    fn note(&mut self, command: &Command) {
        match command.clone() {
            Command::BootMachine {
                machine,
                runtime,
                shape,
                ..
            } => {
                assert!(self.booting.insert(machine));
                let balance = self.host.world().machine(machine).unwrap().credits.as_ref();
                if let Some(terms) = balance.map(|balance| balance.terms) {
                    self.kernel.open(machine, terms, self.now);
                }
                self.shapes.insert(machine, (runtime, shape));
            }
            Command::AssignMachine { machine, account } => {
                assert_eq!(self.owners.insert(machine, account), None, "assigned twice");
            }
            Command::CreateContainer {
                machine,
                container,
                kind,
                drive_mib,
                purpose,
            } => {
                self.grow(machine, drive_mib);
                if let Purpose::Serve(request) = purpose {
                    assert!(!self.left.contains(&request), "placed again for nobody");
                    assert!(!self.ended.contains_key(&request), "runs after its end");
                    assert_eq!(self.owners[&machine], self.demands[&request].account);
                    assert_eq!(self.asks_for(request)[0], kind);
                }
                assert!(self.creating.insert(container));
                assert!(self.made.insert(container, (kind, purpose, machine)).is_none());
            }
            Command::Dispatch {
                machine,
                container,
                request,
            } => {
                assert!(!self.left.contains(&request), "placed again for nobody");
                assert!(!self.ended.contains_key(&request), "runs after its end");
                let (kind, _, of) = self.made[&container];
                assert_eq!(of, machine);
                let demand = &self.demands[&request];
                assert!(self.asks_for(request).contains(&kind));
                assert_eq!(self.owners[&machine], demand.account);
                assert_eq!(self.running.insert(container, request), None, "two at a time");
            }
            Command::StopContainer { container, .. } => {
                assert!(!self.running.contains_key(&container));
                assert!(self.stopping.insert(container));
            }
            Command::DestroyMachine { machine, .. } => {
                self.booting.remove(&machine);
                self.found.remove(&machine);
                assert!(self.destroying.insert(machine));
            }
            Command::SetCpu {
                machine,
                allowed_millis,
                ..
            } => self.kernel.limit(machine, allowed_millis, self.now),
            Command::SettleCredits { machine } => self.kernel.settle(machine, self.now),
            Command::ChangePlan { machine, plan } => {
                self.shapes.get_mut(&machine).unwrap().1.baseline_millis = plan.baseline_millis;
                self.kernel.set_terms(machine, plan.terms().unwrap(), self.now);
            }
            Command::GrantCredits { machine, credits } => self.kernel.grant(machine, credits.ps(), self.now),
            Command::LaunchMachine {
                machine,
                account,
                launch,
            } => {
                assert!(self.booting.insert(machine));
                let found = self.host.world().machine(machine).unwrap();
                let (shape, terms) = (found.shape, found.credits.as_ref().map(|balance| balance.terms));
                if let Some(terms) = terms {
                    self.kernel.open(machine, terms, self.now);
                }
                self.shapes.insert(machine, (launch.image.clone(), shape));
                assert_eq!(self.owners.insert(machine, account), None, "launched twice");
                self.launches.insert(machine, launch);
            }
            Command::ResizeMachine { machine, asked, .. } => self.launches.get_mut(&machine).unwrap().size = asked,
            Command::SetThresholds { machine, thresholds } => {
                self.launches.get_mut(&machine).unwrap().thresholds = thresholds;
            }
            Command::ReportResize { .. }
            | Command::SetBalloon { .. }
            | Command::KeepSize { .. }
            | Command::CloseMachine { .. }
            | Command::WeighMachine { .. }
            | Command::KeepRoom { .. }
            | Command::PutFirst { .. }
            | Command::ReleaseMachine { .. }
            | Command::SetAmount { .. }
            | Command::SetLimits { .. }
            | Command::Notify { .. }
            | Command::Wait { .. } => {}
            Command::Refuse { request, refusal } => self.end(request, End::Refused(refusal)),
        }
    }

    /// The kinds of container that may serve a request: what it asked for, unless amounts change by themselves.
    pub(super) fn asks_for(&self, request: RequestId) -> Vec<Kind> {
        let asked = &self.demands[&request];
        let auto = asked
            .resize
            .as_ref()
            .is_some_and(|resize| resize.mode == ResizeMode::Auto);
        match self.world().request(request).filter(|_| auto && !asked.own_amount) {
            Some(request) => request.demand.kinds.clone(),
            None => asked.kinds.clone(),
        }
    }

    /// A machine's drive is made so large.
    fn grow(&mut self, machine: MachineId, drive_mib: u32) {
        let rules = self.world().rules().clone();
        let before = &mut self.shapes.get_mut(&machine).unwrap().1.drive_mib;
        assert!(drive_mib >= *before, "a smaller drive");
        if drive_mib == *before {
            return;
        }
        assert!(*before > 0 && drive_mib <= rules.max_drive_mib);
        *before = drive_mib;
        let all: u64 = self.shapes.values().map(|(_, shape)| u64::from(shape.drive_mib)).sum();
        assert!(all <= rules.host_scratch_mib, "more than the host's disk has");
    }

    /// Nobody counts on more of a drive than it holds.
    fn check_drives(&self) {
        let rules = self.world().rules();
        let mut given: BTreeMap<MachineId, u64> = BTreeMap::new();
        let made = self
            .made
            .iter()
            .filter(|(id, _)| self.world().container(**id).is_some());
        for (_, (kind, _, machine)) in made {
            *given.entry(*machine).or_default() += u64::from(kind.amount.scratch_mib);
        }
        for (machine, given) in given {
            let drive_mib = u64::from(self.shapes[&machine].1.drive_mib);
            let holds = drive_mib.saturating_sub(rules.drive_reserve_mib.into());
            assert!(
                given <= holds || self.inherited.contains(&machine),
                "more than the drive holds"
            );
        }
    }

    /// Where an account has more of anything than it had, its limits allow what it has; but what runs in a machine that it takes over
    /// runs on.
    fn check_limits(&self, had: &BTreeMap<Arc<str>, (HostRoom, u32)>, adopts: bool) {
        for (name, account) in &self.world().accounts {
            let (had, had_running) = had.get(name).copied().unwrap_or_default();
            let limits = self.world().rules().limits(name);
            let (has, allowed) = (account.has, HostRoom::allowed(limits));
            for (has, had, allowed) in [
                (has.machines, had.machines, allowed.machines),
                (has.memory_mib, had.memory_mib, allowed.memory_mib),
                (has.cpu_millis, had.cpu_millis, allowed.cpu_millis),
            ] {
                assert!(
                    has <= had.max(allowed),
                    "{name} had {had}, may have {allowed}, and has {has}"
                );
            }
            let may_run = had_running.max(limits.concurrency);
            assert!(adopts || account.running <= may_run, "over its concurrency");
        }
    }

    /// Whatever was found, nothing is started for which there is no room.
    fn check_start(&self, decision: &Decision) {
        let (world, rules) = (self.world(), self.world().rules());
        let may_run = |account: &Arc<str>| {
            let running = world.account(account).map_or(0, |found| found.running);
            assert!(running <= rules.limits(account).concurrency, "over its concurrency");
        };
        match &decision.command {
            Command::BootMachine { .. } => assert!(world.used.fits(HostRoom::all(rules))),
            Command::LaunchMachine { account, .. } => {
                assert!(world.used.fits(HostRoom::all(rules)) || !self.inherited.is_empty());
                assert!(world.accounts[account].has.within(rules.limits(account)));
            }
            Command::AssignMachine { account, .. } => {
                assert!(world.accounts[account].has.within(rules.limits(account)));
            }
            Command::CreateContainer { machine, purpose, .. } => {
                let found = world.machine(*machine).unwrap();
                assert!(found.allocated.fits(found.capacity), "on top of what is too much");
                if matches!(purpose, Purpose::Serve(_)) {
                    may_run(&self.owners[machine]);
                }
            }
            // One whose container was made for it counted already.
            Command::Dispatch { machine, .. } if decision.reason != Reason::MadeForIt => may_run(&self.owners[machine]),
            _ => {}
        }
    }

    fn check(&self) {
        let world = self.world();
        world.check(&self.inherited);
        self.check_drives();
        self.kernel.check();
        assert!(
            self.host.next_wake().is_none_or(|at| at > self.now),
            "a wake-up in the past"
        );
        // Every request is somewhere, or has ended.
        for request in self.demands.keys() {
            let is_there = world.request(*request).is_some();
            assert!(is_there != self.ended.contains_key(request), "{request}");
        }
    }
}

/// Why a request got the container that it did.
pub(super) fn source(decisions: &[Decision]) -> Option<&Reason> {
    decisions.iter().find_map(|decision| match decision.command {
        Command::CreateContainer { .. } | Command::Dispatch { .. } => Some(&decision.reason),
        _ => None,
    })
}

/// The commands alone that executors carry out, without the weighing that goes with them.
pub(super) fn commands(decisions: &[Decision]) -> Vec<&Command> {
    let all = decisions.iter().map(|decision| &decision.command);
    all.filter(|command| {
        !matches!(
            command,
            Command::WeighMachine { .. }
                | Command::SetCpu { .. }
                | Command::SettleCredits { .. }
                | Command::Wait { .. }
                | Command::KeepRoom { .. }
                | Command::PutFirst { .. }
                | Command::ReleaseMachine { .. }
        )
    })
    .collect()
}
