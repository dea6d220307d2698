//! Examples of each rule, and properties under any sequence of events in virtual time.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::prelude::*;

use super::*;

const RUNTIME: &str = "python3.11";

fn rules() -> Rules {
    Rules {
        standard: Shape {
            vcpus: 2,
            memory_mib: 512,
        },
        reserve_mib: 64,
        max_vcpus: 4,
        max_machines: 4,
        host_memory_mib: 2048,
        warming: BTreeMap::from([(RUNTIME.into(), 1)]),
        concurrent_boots: 2,
        queue_limit: 3,
        queue_timeout: Duration::from_secs(30),
        container_idle: Duration::from_secs(60),
        machine_idle: Duration::from_secs(120),
        boot_backoff: Duration::from_secs(1),
        boot_backoff_max: Duration::from_secs(60),
        boot_failures: 3,
    }
}

fn uid(account: &str, function: &str) -> Arc<str> {
    format!("uid of {account}/{function}").into()
}

fn demand(account: &str, function: &str, version: u64, amount: (u32, u32)) -> Demand {
    Demand {
        account: account.into(),
        runtime: RUNTIME.into(),
        code: Code {
            function: format!("accounts/{account}/functions/{function}").into(),
            uid: uid(account, function),
            version,
        },
        amount: Amount {
            cpu_millis: amount.0,
            memory_mib: amount.1,
        },
    }
}

const SMALL: (u32, u32) = (250, 128);

/// A placement with its clock, and what it asked for that nobody has done yet.
struct World {
    placement: Placement,
    now: Time,
    requests: u64,
    booting: BTreeSet<MachineId>,
    destroying: BTreeSet<MachineId>,
    creating: BTreeSet<ContainerId>,
    running: BTreeMap<ContainerId, RequestId>,
    stopping: BTreeSet<ContainerId>,
    owners: BTreeMap<MachineId, Arc<str>>,
    demands: BTreeMap<RequestId, Demand>,
    amounts: BTreeMap<ContainerId, (RequestId, MachineId)>,
    finished: BTreeMap<RequestId, Finish>,
}

impl World {
    fn new(rules: Rules) -> Self {
        assert_eq!(rules.check(), Ok(()));
        let mut world = Self {
            placement: Placement::new(rules),
            now: Time::ZERO,
            requests: 0,
            booting: BTreeSet::new(),
            destroying: BTreeSet::new(),
            creating: BTreeSet::new(),
            running: BTreeMap::new(),
            stopping: BTreeSet::new(),
            owners: BTreeMap::new(),
            demands: BTreeMap::new(),
            amounts: BTreeMap::new(),
            finished: BTreeMap::new(),
        };
        world.step(Event::Tick);
        world
    }

    /// With its warming pool full.
    fn warm(rules: Rules) -> Self {
        let mut world = Self::new(rules);
        world.boot_all();
        world
    }

    fn boot_all(&mut self) {
        while let Some(machine) = self.booting.first().copied() {
            self.step(Event::MachineReady { machine });
        }
    }

    fn request(&mut self, demand: Demand) -> (RequestId, Vec<Action>) {
        self.requests += 1;
        let request = RequestId(self.requests);
        self.demands.insert(request, demand.clone());
        (request, self.step(Event::Request { request, demand }))
    }

    /// Runs a request to its end where it can run at once; its container is idle afterwards.
    fn serve(&mut self, demand: Demand) -> ContainerId {
        let (request, _) = self.request(demand);
        if let Some(container) = self.creating.first().copied() {
            self.step(Event::ContainerReady { container });
        }
        let container = *self.running.iter().find(|(_, of)| **of == request).unwrap().0;
        self.step(Event::InvocationDone {
            container,
            ended: false,
        });
        container
    }

    fn later(&mut self, time: Duration) -> Vec<Action> {
        self.now += time;
        self.step(Event::Tick)
    }

    /// Feeds an event in, does the books on what is asked, and checks what must always hold.
    fn step(&mut self, event: Event) -> Vec<Action> {
        match &event {
            Event::MachineReady { machine } => {
                self.booting.remove(machine);
            }
            Event::MachineEnded { machine } => {
                self.booting.remove(machine);
                self.destroying.remove(machine);
                let amounts = &self.amounts;
                let elsewhere = |id: &ContainerId| amounts[id].1 != *machine;
                self.creating.retain(elsewhere);
                self.running.retain(|id, _| elsewhere(id));
                self.stopping.retain(elsewhere);
                self.amounts.retain(|_, (_, of)| of != machine);
            }
            Event::ContainerReady { container } => {
                self.creating.remove(container);
            }
            Event::ContainerFailed { container, .. } => {
                self.creating.remove(container);
                self.amounts.remove(container);
            }
            Event::ContainerEnded { container } if self.stopping.remove(container) => {
                self.amounts.remove(container);
            }
            Event::InvocationDone { container, .. } => {
                self.running.remove(container);
            }
            _ => {}
        }
        let actions = self.placement.step(event, self.now);
        for action in &actions {
            self.note(action);
        }
        self.check();
        actions
    }

    fn note(&mut self, action: &Action) {
        match action.clone() {
            Action::BootMachine { machine, .. } => assert!(self.booting.insert(machine)),
            Action::AssignMachine { machine, account } => {
                assert_eq!(self.owners.insert(machine, account), None, "assigned twice");
            }
            Action::CreateContainer {
                machine,
                container,
                request,
                ..
            } => {
                assert!(!self.finished.contains_key(&request), "runs after its end");
                assert_eq!(self.owners[&machine], self.demands[&request].account);
                assert!(self.creating.insert(container));
                assert!(self.amounts.insert(container, (request, machine)).is_none());
            }
            Action::Dispatch {
                machine,
                container,
                request,
            } => {
                assert!(!self.finished.contains_key(&request), "runs after its end");
                let (first, of) = self.amounts[&container];
                assert_eq!(of, machine);
                let (made, wanted) = (&self.demands[&first], &self.demands[&request]);
                assert_eq!(made.code, wanted.code);
                assert_eq!(made.amount, wanted.amount);
                assert_eq!(self.owners[&machine], wanted.account);
                assert_eq!(self.running.insert(container, request), None, "two at a time");
            }
            Action::StopContainer { container, .. } => {
                assert!(!self.running.contains_key(&container));
                assert!(self.stopping.insert(container));
            }
            Action::DestroyMachine { machine, .. } => {
                self.booting.remove(&machine);
                assert!(self.destroying.insert(machine));
            }
            Action::Finish { request, finish } => {
                assert_eq!(self.finished.insert(request, finish), None, "two ends");
            }
        }
    }

    fn check(&self) {
        let p = &self.placement;
        let memory: u64 = p.machines.values().map(|m| u64::from(m.shape.memory_mib)).sum();
        assert!(memory <= p.rules.host_memory_mib, "host memory");
        assert!(p.machines.len() <= p.rules.max_machines, "machines");
        assert!(p.queue.len() <= p.rules.queue_limit, "queue");
        let booting = p.machines.values().filter(|m| m.state == MachineState::Booting).count();
        assert!(booting <= p.rules.concurrent_boots, "boots");
        for (id, machine) in &p.machines {
            let of = machine.containers.iter().map(|id| p.containers[id].amount);
            assert_eq!(of.fold(Amount::default(), Amount::plus), machine.allocated);
            assert!(machine.allocated.fits(machine.capacity), "over capacity");
            let active = match &machine.state {
                MachineState::Active { account } => Some(account),
                _ => None,
            };
            for (account, ids) in &p.active {
                assert_eq!(ids.contains(id), active == Some(account));
            }
            if let Some(account) = active {
                assert!(p.active[account].contains(id));
            }
        }
        let mut idle = 0;
        for (id, container) in &p.containers {
            assert!(p.machines[&container.machine].containers.contains(id));
            if matches!(container.state, ContainerState::Idle { .. }) {
                idle += 1;
                assert!(p.idle[&(container.code.clone(), container.amount)].contains(id));
            }
        }
        assert_eq!(idle, p.idle.values().map(Vec::len).sum::<usize>(), "stale idle entries");
        assert!(p.idle.values().all(|ids| !ids.is_empty()));
        assert!(p.next_wake().is_none_or(|at| at > self.now), "a wake-up in the past");
        // Every request is somewhere, or has ended.
        let mut held: Vec<_> = p.queue.iter().map(|waiting| waiting.request).collect();
        held.extend(p.containers.values().filter_map(|container| match &container.state {
            ContainerState::Starting(waiting) => Some(waiting.request),
            ContainerState::Busy(request) => Some(*request),
            _ => None,
        }));
        held.extend(self.finished.keys());
        held.sort_unstable();
        assert_eq!(held, self.demands.keys().copied().collect::<Vec<_>>());
    }
}

fn source(actions: &[Action]) -> Option<Source> {
    actions.iter().find_map(|action| match action {
        Action::CreateContainer { source, .. } => Some(*source),
        Action::Dispatch { .. } => Some(Source::IdleContainer),
        _ => None,
    })
}

fn refusal(world: &World, request: RequestId) -> Option<&Refusal> {
    match world.finished.get(&request) {
        Some(Finish::Refused(refusal)) => Some(refusal),
        _ => None,
    }
}

// === the order of preference ===

#[test]
fn the_warming_pool_fills_and_refills() {
    let mut world = World::new(rules());
    assert_eq!(world.booting.len(), 1);
    world.boot_all();
    assert_eq!(world.booting.len(), 0);
    let (_, actions) = world.request(demand("a", "f", 1, SMALL));
    assert_eq!(source(&actions), Some(Source::WarmingMachine));
    assert_eq!(world.booting.len(), 1, "topped up in the background");
}

#[test]
fn preference_is_idle_then_active_then_warming_then_new() {
    let mut world = World::warm(rules());
    let first = world.serve(demand("a", "f", 1, SMALL));
    world.boot_all();
    // The same code, version and amount: the idle container, though a warming machine is there.
    assert_eq!(world.serve(demand("a", "f", 1, SMALL)), first);
    // Another version, amount or function: another container in the same machine.
    for other in [
        demand("a", "f", 2, SMALL),
        demand("a", "f", 1, (500, 64)),
        demand("a", "g", 1, SMALL),
    ] {
        let (_, actions) = world.request(other);
        assert_eq!(source(&actions), Some(Source::ActiveMachine));
    }
    // Another account: a machine of its own.
    let (_, actions) = world.request(demand("b", "f", 1, SMALL));
    assert_eq!(source(&actions), Some(Source::WarmingMachine));
    // None left: it waits for the one that boots.
    let (waits, actions) = world.request(demand("c", "f", 1, SMALL));
    assert_eq!(source(&actions), None);
    let machine = *world.booting.first().unwrap();
    let actions = world.step(Event::MachineReady { machine });
    assert_eq!(source(&actions), Some(Source::NewMachine));
    assert!(!world.finished.contains_key(&waits));
}

#[test]
fn requests_of_one_account_share_the_machine_that_boots() {
    let mut world = World::new(Rules {
        warming: BTreeMap::new(),
        ..rules()
    });
    for _ in 0..3 {
        world.request(demand("a", "f", 1, SMALL));
    }
    assert_eq!(world.booting.len(), 1);
    world.boot_all();
    assert_eq!(world.creating.len(), 3);
}

#[test]
fn a_large_amount_gets_a_larger_machine() {
    let mut world = World::warm(rules());
    let (_, actions) = world.request(demand("a", "f", 1, (3000, 1000)));
    let shape = Shape {
        vcpus: 3,
        memory_mib: 1064,
    };
    assert!(
        actions
            .iter()
            .any(|action| matches!(action, Action::BootMachine { shape: its, .. } if *its == shape))
    );
    world.boot_all();
    assert_eq!(world.creating.len(), 1);
}

#[test]
fn an_amount_larger_than_the_host_is_refused_at_once() {
    let mut world = World::warm(rules());
    for amount in [(4001, 128), (250, 1985), (u32::MAX, u32::MAX)] {
        let (request, _) = world.request(demand("a", "f", 1, amount));
        assert!(matches!(refusal(&world, request), Some(Refusal::TooLarge { .. })));
    }
    let (request, _) = world.request(demand("a", "f", 1, (4000, 1984)));
    assert_eq!(refusal(&world, request), None);
}

// === the queue ===

#[test]
fn the_queue_is_bounded_and_has_a_deadline() {
    let mut world = World::new(Rules {
        warming: BTreeMap::new(),
        ..rules()
    });
    let waiting: Vec<_> = (0..3)
        .map(|n| world.request(demand(&format!("a{n}"), "f", 1, SMALL)).0)
        .collect();
    let (over, _) = world.request(demand("b", "f", 1, SMALL));
    assert_eq!(refusal(&world, over), Some(&Refusal::QueueFull));
    assert_eq!(world.placement.next_wake(), Some(Duration::from_secs(30)));
    world.later(Duration::from_secs(30));
    for request in waiting {
        assert_eq!(refusal(&world, request), Some(&Refusal::QueueTimeout));
    }
}

#[test]
fn a_caller_that_leaves_the_queue_is_forgotten() {
    let mut world = World::new(rules());
    let (request, _) = world.request(demand("a", "f", 1, SMALL));
    world.step(Event::Cancelled { request });
    assert_eq!(refusal(&world, request), Some(&Refusal::Cancelled));
    world.boot_all();
    assert!(world.creating.is_empty());
}

// === room on a full host ===

#[test]
fn a_full_host_makes_room_of_idle_machines() {
    let mut world = World::warm(Rules {
        max_machines: 1,
        ..rules()
    });
    world.serve(demand("a", "f", 1, SMALL));
    let (request, actions) = world.request(demand("b", "f", 1, SMALL));
    assert!(matches!(
        actions[..],
        [Action::DestroyMachine {
            reason: DestroyReason::Room,
            ..
        }]
    ));
    let machine = *world.destroying.first().unwrap();
    world.step(Event::MachineEnded { machine });
    world.boot_all();
    let container = *world.creating.first().unwrap();
    world.step(Event::ContainerReady { container });
    assert_eq!(world.running[&container], request);
}

#[test]
fn a_full_host_never_takes_a_machine_that_runs_a_request() {
    let mut world = World::warm(Rules {
        max_machines: 1,
        ..rules()
    });
    let (_, _) = world.request(demand("a", "f", 1, SMALL));
    let (_, actions) = world.request(demand("b", "f", 1, SMALL));
    assert_eq!(actions, []);
    let container = *world.creating.first().unwrap();
    world.step(Event::ContainerReady { container });
    assert_eq!(world.destroying.len(), 0);
    world.step(Event::InvocationDone {
        container,
        ended: false,
    });
    assert_eq!(world.destroying.len(), 1, "free now");
}

#[test]
fn an_account_makes_room_of_its_own_idle_containers() {
    let mut world = World::warm(Rules {
        max_machines: 1,
        ..rules()
    });
    let oldest = world.serve(demand("a", "f", 1, (500, 200)));
    world.later(Duration::from_secs(1));
    world.serve(demand("a", "g", 1, (500, 200)));
    let (_, actions) = world.request(demand("a", "h", 1, (500, 200)));
    assert!(matches!(actions[..], [
        Action::StopContainer { container, reason: StopReason::Room, .. }
    ] if container == oldest));
    assert_eq!(world.later(Duration::from_secs(1)), [], "asked once");
    let actions = world.step(Event::ContainerEnded { container: oldest });
    assert_eq!(source(&actions), Some(Source::ActiveMachine));
}

// === letting go ===

#[test]
fn idle_containers_and_then_machines_are_let_go() {
    let mut world = World::warm(rules());
    let container = world.serve(demand("a", "f", 1, SMALL));
    world.boot_all();
    assert_eq!(world.placement.next_wake(), Some(Duration::from_secs(60)));
    let actions = world.later(Duration::from_secs(60));
    assert!(matches!(
        actions[..],
        [Action::StopContainer {
            reason: StopReason::Idle,
            ..
        }]
    ));
    world.step(Event::ContainerEnded { container });
    assert_eq!(world.placement.next_wake(), Some(Duration::from_secs(180)));
    let actions = world.later(Duration::from_secs(120));
    assert!(matches!(
        actions[..],
        [Action::DestroyMachine {
            reason: DestroyReason::Idle,
            ..
        }]
    ));
    let machine = *world.destroying.first().unwrap();
    world.step(Event::MachineEnded { machine });
    assert_eq!(world.placement.machines.len(), 1, "the warming one");
    assert_eq!(world.placement.next_wake(), None);
}

#[test]
fn surplus_machines_are_let_go() {
    let mut world = World::new(rules());
    let (first, _) = world.request(demand("a", "f", 1, SMALL));
    let (second, _) = world.request(demand("b", "f", 1, SMALL));
    world.step(Event::Cancelled { request: first });
    world.step(Event::Cancelled { request: second });
    world.boot_all();
    assert_eq!(world.placement.machines.len(), 2);
    let actions = world.later(Duration::from_secs(120));
    assert!(matches!(
        actions[..],
        [Action::DestroyMachine {
            reason: DestroyReason::Surplus,
            ..
        }]
    ));
}

#[test]
fn a_deleted_function_keeps_no_container_and_finishes_what_runs() {
    let mut world = World::warm(rules());
    let idle = world.serve(demand("a", "f", 1, SMALL));
    let (running, _) = world.request(demand("a", "f", 1, (500, 200)));
    let starting = *world.creating.first().unwrap();
    // One of its name, made after it.
    assert!(
        world
            .step(Event::FunctionDeleted {
                uid: uid("a", "another f")
            })
            .is_empty()
    );
    let actions = world.step(Event::FunctionDeleted { uid: uid("a", "f") });
    assert!(matches!(actions[..], [Action::StopContainer { container, .. }] if container == idle));
    world.step(Event::ContainerReady { container: starting });
    let actions = world.step(Event::InvocationDone {
        container: starting,
        ended: false,
    });
    assert!(matches!(actions[..], [
        Action::Finish { finish: Finish::Settled, request },
        Action::StopContainer { reason: StopReason::FunctionDeleted, .. }
    ] if request == running));
}

// === what goes wrong ===

#[test]
fn a_lost_machine_ends_what_ran_and_places_the_rest_again() {
    let mut world = World::warm(rules());
    let (ran, _) = world.request(demand("a", "f", 1, SMALL));
    let container = *world.creating.first().unwrap();
    world.step(Event::ContainerReady { container });
    let (starts, _) = world.request(demand("a", "g", 1, SMALL));
    let machine = world.amounts[&container].1;
    world.step(Event::MachineEnded { machine });
    assert_eq!(refusal(&world, ran), Some(&Refusal::MachineLost));
    world.boot_all();
    assert!(!world.finished.contains_key(&starts));
    assert_eq!(world.creating.len(), 1);
}

#[test]
fn a_request_that_loses_its_machine_again_and_again_is_given_up() {
    let mut world = World::warm(rules());
    let (request, _) = world.request(demand("a", "f", 1, SMALL));
    for _ in 0..=MAX_LOST {
        assert_eq!(refusal(&world, request), None);
        let container = *world.creating.first().unwrap();
        let machine = world.amounts[&container].1;
        world.step(Event::ContainerFailed {
            container,
            failure: ContainerFailure::Lost,
        });
        world.boot_all();
        assert!(
            world.creating.iter().all(|id| world.amounts[id].1 != machine),
            "there again"
        );
    }
    assert_eq!(refusal(&world, request), Some(&Refusal::MachineLost));
}

#[test]
fn failing_boots_back_off_and_then_refuse() {
    let mut world = World::new(rules());
    let (request, _) = world.request(demand("a", "f", 1, SMALL));
    let mut gaps = Vec::new();
    for _ in 0..3 {
        while let Some(machine) = world.booting.first().copied() {
            world.step(Event::MachineEnded { machine });
        }
        assert!(world.booting.is_empty(), "no hot loop");
        let wake = world.placement.boots[RUNTIME].not_before;
        gaps.push((wake - world.now).as_secs());
        if refusal(&world, request).is_none() {
            world.later(wake - world.now);
            assert_eq!(world.booting.len(), 1, "one at a time");
        }
    }
    assert_eq!(refusal(&world, request), Some(&Refusal::BootFailing));
    assert!(gaps.is_sorted() && gaps[0] >= 1, "{gaps:?}");
    let (next, _) = world.request(demand("a", "f", 1, SMALL));
    assert_eq!(refusal(&world, next), Some(&Refusal::BootFailing), "at once");
    world.later(Duration::from_secs(60));
    world.boot_all();
    let (good, actions) = world.request(demand("a", "f", 1, SMALL));
    assert_eq!(source(&actions), Some(Source::WarmingMachine));
    assert_eq!(refusal(&world, good), None);
}

#[test]
fn an_end_that_the_guest_reports_first_waits_for_the_answer() {
    let mut world = World::warm(rules());
    let (request, _) = world.request(demand("a", "f", 1, SMALL));
    let container = *world.creating.first().unwrap();
    world.step(Event::ContainerReady { container });
    world.step(Event::ContainerEnded { container });
    assert!(!world.finished.contains_key(&request));
    world.step(Event::InvocationDone {
        container,
        ended: false,
    });
    assert_eq!(world.finished[&request], Finish::Settled);
    assert!(world.placement.containers.is_empty());
}

// === draining ===

#[test]
fn draining_finishes_what_runs_and_ends_everything() {
    let mut world = World::warm(rules());
    let (runs, _) = world.request(demand("a", "f", 1, SMALL));
    let container = *world.creating.first().unwrap();
    world.step(Event::ContainerReady { container });
    world.step(Event::Drain);
    let (late, _) = world.request(demand("a", "f", 1, SMALL));
    assert_eq!(refusal(&world, late), Some(&Refusal::Draining));
    world.step(Event::InvocationDone {
        container,
        ended: false,
    });
    assert_eq!(world.finished[&runs], Finish::Settled);
    while let Some(machine) = world.destroying.first().copied() {
        world.step(Event::MachineEnded { machine });
    }
    assert!(world.placement.is_drained());
}

#[test]
fn rules_that_cannot_work_are_refused() {
    let bad = |change: fn(&mut Rules)| {
        let mut rules = rules();
        change(&mut rules);
        rules.check().unwrap_err()
    };
    assert!(matches!(bad(|r| r.max_machines = 0), RulesError::Zero(_)));
    assert!(matches!(bad(|r| r.standard.vcpus = 5), RulesError::TooManyCpus { .. }));
    assert!(matches!(
        bad(|r| r.standard.memory_mib = 64),
        RulesError::NoCapacity { .. }
    ));
    assert!(matches!(
        bad(|r| r.host_memory_mib = 511),
        RulesError::HostTooSmall { .. }
    ));
    assert!(matches!(
        bad(|r| r.warming = BTreeMap::from([(RUNTIME.into(), 5)])),
        RulesError::WarmingTooLarge { machines: 5, max: 4 }
    ));
}

// === any sequence of events ===

/// One thing that happens; numbers choose among what can.
#[derive(Clone, Debug)]
enum Op {
    Request {
        account: u8,
        function: u8,
        version: u8,
        amount: u8,
    },
    Cancel(u8),
    Ready(u8),
    BootFails(u8),
    MachineDies(u8),
    Created(u8),
    InitFails(u8, bool),
    Done(u8, bool),
    ContainerDies(u8),
    Stopped(u8),
    Destroyed(u8),
    Deleted {
        account: u8,
        function: u8,
    },
    Late(u8),
    Pass(u16),
    Wake,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0..3_u8, 0..3_u8, 1..3_u8, 0..5_u8).prop_map(
            |(account, function, version, amount)| Op::Request { account, function, version, amount }
        ),
        1 => any::<u8>().prop_map(Op::Cancel),
        4 => any::<u8>().prop_map(Op::Ready),
        1 => any::<u8>().prop_map(Op::BootFails),
        1 => any::<u8>().prop_map(Op::MachineDies),
        5 => any::<u8>().prop_map(Op::Created),
        1 => any::<(u8, bool)>().prop_map(|(n, lost)| Op::InitFails(n, lost)),
        5 => any::<(u8, bool)>().prop_map(|(n, ended)| Op::Done(n, ended)),
        1 => any::<u8>().prop_map(Op::ContainerDies),
        3 => any::<u8>().prop_map(Op::Stopped),
        3 => any::<u8>().prop_map(Op::Destroyed),
        1 => (0..3_u8, 0..3_u8).prop_map(|(account, function)| Op::Deleted { account, function }),
        1 => any::<u8>().prop_map(Op::Late),
        2 => (0..20_000_u16).prop_map(Op::Pass),
        2 => Just(Op::Wake),
    ]
}

fn pick<T: Copy>(from: impl IntoIterator<Item = T>, n: u8) -> Option<T> {
    let all: Vec<_> = from.into_iter().collect();
    (!all.is_empty()).then(|| all[usize::from(n) % all.len()])
}

impl World {
    fn apply(&mut self, op: Op) {
        let event = match op {
            Op::Request {
                account,
                function,
                version,
                amount,
            } => {
                let amounts = [SMALL, (500, 200), (2000, 448), (3000, 900), (5000, 100)];
                let of = demand(
                    &format!("account{account}"),
                    &format!("function{function}"),
                    version.into(),
                    amounts[usize::from(amount)],
                );
                let before = self.standing();
                let (request, actions) = self.request(of);
                self.check_preference(request, &before, &actions);
                return;
            }
            Op::Cancel(n) => pick(self.demands.keys().copied(), n).map(|request| Event::Cancelled { request }),
            Op::Ready(n) => pick(self.booting.iter().copied(), n).map(|machine| Event::MachineReady { machine }),
            Op::BootFails(n) => pick(self.booting.iter().copied(), n).map(|machine| Event::MachineEnded { machine }),
            Op::MachineDies(n) => {
                pick(self.placement.machines.keys().copied(), n).map(|machine| Event::MachineEnded { machine })
            }
            Op::Created(n) => {
                pick(self.creating.iter().copied(), n).map(|container| Event::ContainerReady { container })
            }
            Op::InitFails(n, lost) => pick(self.creating.iter().copied(), n).map(|container| {
                let failure = if lost {
                    ContainerFailure::Lost
                } else {
                    ContainerFailure::Settled
                };
                Event::ContainerFailed { container, failure }
            }),
            Op::Done(n, ended) => {
                pick(self.running.keys().copied(), n).map(|container| Event::InvocationDone { container, ended })
            }
            Op::ContainerDies(n) => {
                pick(self.placement.containers.keys().copied(), n).map(|container| Event::ContainerEnded { container })
            }
            Op::Stopped(n) => {
                pick(self.stopping.iter().copied(), n).map(|container| Event::ContainerEnded { container })
            }
            Op::Destroyed(n) => pick(self.destroying.iter().copied(), n).map(|machine| Event::MachineEnded { machine }),
            Op::Deleted { account, function } => Some(Event::FunctionDeleted {
                uid: uid(&format!("account{account}"), &format!("function{function}")),
            }),
            // Reports about what is long gone, or never was.
            Op::Late(n) => {
                let (machine, container) = (MachineId(1000 + u64::from(n)), ContainerId(1000));
                let events = [
                    Event::MachineReady { machine },
                    Event::MachineEnded { machine },
                    Event::ContainerReady { container },
                    Event::ContainerEnded { container },
                    Event::InvocationDone { container, ended: true },
                    Event::Cancelled {
                        request: RequestId(u64::MAX),
                    },
                ];
                events.into_iter().nth(usize::from(n) % 6)
            }
            Op::Pass(ms) => {
                self.now += Duration::from_millis(ms.into());
                Some(Event::Tick)
            }
            Op::Wake => {
                if let Some(at) = self.placement.next_wake() {
                    self.now = at;
                }
                Some(Event::Tick)
            }
        };
        if let Some(event) = event {
            self.step(event);
        }
    }

    /// What could serve whom before a request: idle containers, active machines, warming machines.
    fn standing(&self) -> Standing {
        let p = &self.placement;
        Standing {
            queued: p.queue.len(),
            idle: p.idle.keys().cloned().collect(),
            active: p
                .machines
                .values()
                .filter_map(|m| match &m.state {
                    MachineState::Active { account } => Some((account.clone(), m.free())),
                    _ => None,
                })
                .collect(),
            warming: p
                .machines
                .values()
                .filter(|m| m.state == MachineState::Warming)
                .map(|m| m.capacity)
                .collect(),
        }
    }

    fn check_preference(&self, request: RequestId, before: &Standing, actions: &[Action]) {
        // With others in the queue the places may have gone to them.
        if before.queued > 0 || self.placement.rules.shape_for(self.demands[&request].amount).is_none() {
            return;
        }
        let Demand {
            account, code, amount, ..
        } = &self.demands[&request];
        let expected = if before.idle.contains(&(code.clone(), *amount)) {
            Some(Source::IdleContainer)
        } else if before
            .active
            .iter()
            .any(|(of, free)| of == account && amount.fits(*free))
        {
            Some(Source::ActiveMachine)
        } else if before.warming.iter().any(|capacity| amount.fits(*capacity)) {
            Some(Source::WarmingMachine)
        } else {
            None
        };
        assert_eq!(source(actions), expected);
    }

    /// Lets everything that was begun come to its end.
    fn finish(&mut self) {
        self.step(Event::Drain);
        for _ in 0..10_000 {
            let event = if let Some(container) = self.creating.first().copied() {
                Event::ContainerReady { container }
            } else if let Some(container) = self.running.keys().next().copied() {
                Event::InvocationDone {
                    container,
                    ended: false,
                }
            } else if let Some(machine) = self.destroying.first().copied() {
                Event::MachineEnded { machine }
            } else {
                break;
            };
            self.step(event);
        }
        let p = &self.placement;
        assert!(p.machines.is_empty() && p.containers.is_empty() && p.queue.is_empty());
        assert!(p.idle.is_empty() && p.active.is_empty(), "leaked");
        assert_eq!(self.finished.len(), self.demands.len(), "every request ended");
    }
}

struct Standing {
    queued: usize,
    idle: BTreeSet<(Code, Amount)>,
    active: Vec<(Arc<str>, Amount)>,
    warming: Vec<Amount>,
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn holds_under_any_sequence_of_events(
        ops in prop::collection::vec(op(), 1..150),
        max_machines in 1..5_usize,
        host_memory_mib in 512..3000_u64,
        abandon in any::<bool>(),
    ) {
        let mut world = World::new(Rules { max_machines, host_memory_mib, ..rules() });
        for op in ops {
            world.apply(op);
        }
        if abandon {
            world.step(Event::DrainExpired);
        }
        world.finish();
    }

    /// With nothing going wrong any more and everything that is begun being finished, nobody waits for ever and
    /// nobody is refused for want of a place that could be made.
    #[test]
    fn a_quiet_host_serves_everyone(
        ops in prop::collection::vec(op(), 0..80),
        wanted in prop::collection::vec((0..3_u8, 0..3_u8, 0..4_u8), 1..4),
    ) {
        let mut world = World::new(rules());
        for op in ops {
            world.apply(op);
        }
        world.settle();
        world.now += Duration::from_secs(3600);
        world.step(Event::Tick);
        world.settle();
        let amounts = [SMALL, (500, 200), (2000, 448), (3000, 900)];
        let requests: Vec<_> = wanted
            .into_iter()
            .map(|(account, function, amount)| {
                world.request(demand(
                    &format!("account{account}"),
                    &format!("function{function}"),
                    1,
                    amounts[usize::from(amount)],
                )).0
            })
            .collect();
        world.settle();
        for request in requests {
            prop_assert_eq!(world.finished.get(&request), Some(&Finish::Settled));
        }
    }
}

impl World {
    /// Does everything that is asked until nothing is, without time passing.
    fn settle(&mut self) {
        for _ in 0..10_000 {
            let event = if let Some(machine) = self.destroying.first().copied() {
                Event::MachineEnded { machine }
            } else if let Some(machine) = self.booting.first().copied() {
                Event::MachineReady { machine }
            } else if let Some(container) = self.stopping.first().copied() {
                Event::ContainerEnded { container }
            } else if let Some(container) = self.creating.first().copied() {
                Event::ContainerReady { container }
            } else if let Some(container) = self.running.keys().next().copied() {
                Event::InvocationDone {
                    container,
                    ended: false,
                }
            } else {
                return;
            };
            self.step(event);
        }
        panic!("never settles");
    }
}

impl PartialOrd for Code {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Code {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (&self.function, &self.uid, self.version).cmp(&(&other.function, &other.uid, other.version))
    }
}
