//! What an earlier agent left, by example.

use ulid::Ulid;

use super::driver::{Driver, End, commands, source};
use super::{RUNTIME, SECOND, SMALL, cold, demand, kind, rules, uid};
use crate::{
    AccountLimits, Command, Completion, ContainerId, ContainerState, Decision, Event, FoundContainer, MachineId,
    MachineState, Now, Reason, Refusal, RequestId, RequestState, Rules, Shape,
};

fn limited(limits: AccountLimits) -> Rules {
    Rules {
        default_limits: limits,
        ..cold()
    }
}

fn machine(n: u128) -> MachineId {
    MachineId(Ulid(n))
}

fn container(n: u128) -> ContainerId {
    ContainerId(Ulid(n))
}

fn request(n: u128) -> RequestId {
    RequestId(Ulid(n))
}

/// One of account `a`.
fn idle(n: u128, function: &str, amount: (u32, u32)) -> FoundContainer {
    FoundContainer {
        container: container(n),
        kind: kind("a", function, 1, amount),
        created: SECOND,
        request: None,
    }
}

/// Likewise; it runs the request of the same number.
fn busy(n: u128, function: &str, amount: (u32, u32)) -> FoundContainer {
    FoundContainer {
        request: Some(request(n)),
        ..idle(n, function, amount)
    }
}

/// With one machine of account `a`, adopted with these in it.
fn adopted(rules: Rules, containers: Vec<FoundContainer>) -> (Driver, Vec<Decision>) {
    let mut driver = Driver::new(rules);
    let shape = driver.world().rules().standard;
    driver.find(machine(1), shape, Some("a"), containers);
    let decisions = driver.adopt(machine(1));
    (driver, decisions)
}

// === before its guest answers ===

#[test]
fn a_machine_of_an_account_counts_and_nothing_is_placed_in_it() {
    let mut driver = Driver::new(Rules {
        max_machines: 2,
        ..limited(AccountLimits {
            machines: 1,
            ..rules().default_limits
        })
    });
    let shape = rules().standard;
    assert_eq!(driver.find(machine(1), shape, Some("a"), Vec::new()), []);
    let found = driver.world().machine(machine(1)).unwrap();
    assert_eq!((found.state, found.ready), (MachineState::Found, None));
    // Its account may have no other, and it has what it has.
    assert!(!driver.world().may_have("a", shape));
    assert_eq!(driver.world().load("a"), 512_000);
    let (own, decisions) = driver.request(demand("a", "f", 1, SMALL));
    assert_eq!(commands(&decisions), [] as [&Command; 0]);
    // The host has room for one more.
    driver.request(demand("b", "f", 1, SMALL));
    driver.request(demand("c", "f", 1, SMALL));
    assert_eq!(driver.booting.len(), 1);
    let decisions = driver.adopt(machine(1));
    assert!(matches!(source(&decisions), Some(Reason::RoomInMachine { .. })));
    driver.settle();
    assert_eq!(driver.ended[&own], End::Answered);
}

#[test]
fn requests_wait_for_guests_that_may_have_their_containers_warm_but_not_for_long() {
    let waits = Reason::MachinesFound { machines: 2 };
    let found = || {
        let mut driver = Driver::warm(rules());
        let shape = driver.world().rules().standard;
        driver.find(machine(1), shape, Some("a"), vec![idle(1, "g", SMALL)]);
        driver.find(machine(2), shape, Some("a"), vec![idle(2, "f", SMALL)]);
        let (request, decisions) = driver.request(demand("a", "f", 1, SMALL));
        assert_eq!(decisions.first().map(|decision| &decision.reason), Some(&waits));
        // There is a machine for others.
        driver.start(demand("b", "f", 1, SMALL));
        (driver, request)
    };
    let (mut driver, request) = found();
    let source_of = |decisions: &[Decision]| source(decisions).cloned();
    assert_eq!(
        source_of(&driver.adopt(machine(1))),
        None,
        "there is room, but not its container"
    );
    let decisions = driver.adopt(machine(2));
    assert!(
        matches!(source(&decisions), Some(Reason::IdleContainer { .. })),
        "{decisions:?}"
    );
    assert_eq!(driver.running[&container(2)], request);

    // One of them ends.
    let (mut driver, _) = found();
    driver.adopt(machine(1));
    let decisions = driver.step(Event::MachineEnded { machine: machine(2) });
    assert!(
        matches!(source(&decisions), Some(Reason::RoomInMachine { .. })),
        "{decisions:?}"
    );

    // One of them is silent.
    let (mut driver, _) = found();
    driver.adopt(machine(1));
    assert_eq!(source_of(&driver.later(2 * SECOND - SECOND / 10)), None);
    let decisions = driver.later(SECOND / 10);
    assert!(
        matches!(source(&decisions), Some(Reason::RoomInMachine { .. })),
        "{decisions:?}"
    );
    // What it has may be used once it has answered.
    driver.adopt(machine(2));
    assert_eq!(driver.start(demand("a", "f", 1, SMALL)).1, container(2));

    // Both are.
    let (mut driver, request) = found();
    driver.later(2 * SECOND);
    driver.boot_all();
    assert!(
        driver
            .world()
            .request(request)
            .is_some_and(|request| request.state != RequestState::Waiting)
    );
}

#[test]
fn no_machine_is_booted_for_what_one_of_no_account_will_serve() {
    let mut driver = Driver::warm(rules());
    let warm = driver.world().machines().next().unwrap().id;
    driver.restart(rules());
    assert!(driver.booting.is_empty(), "the pool will be full");
    let (request, decisions) = driver.request(demand("a", "f", 1, SMALL));
    assert_eq!(source(&decisions), None);
    assert_eq!(driver.booting.len(), 1, "for the pool, which gives one away");
    driver.step(Event::MachineReady { machine: warm });
    assert_eq!(driver.world().machine(warm).unwrap().state, MachineState::Found);
    driver.now += SECOND;
    let decisions = driver.adopt(warm);
    assert_eq!(source(&decisions), Some(&Reason::NewMachine { waited: SECOND }));
    assert_eq!(driver.booting.len(), 1);
    driver.settle();
    assert_eq!(driver.ended[&request], End::Answered);
}

#[test]
fn one_that_ends_without_an_answer_is_forgotten_and_no_failed_boot() {
    let mut driver = Driver::new(rules());
    driver.boot_all();
    for n in 1..4 {
        driver.find(machine(n), rules().standard, (n == 1).then_some("a"), Vec::new());
    }
    let (request, _) = driver.request(demand("b", "f", 1, (3000, 900)));
    for n in 1..4 {
        driver.step(Event::MachineEnded { machine: machine(n) });
    }
    assert_eq!(driver.world().runtime(RUNTIME).unwrap().failures, 0);
    assert!(driver.world().account("a").is_none());
    driver.settle();
    assert_eq!(driver.ended[&request], End::Answered);
}

// === taken over ===

#[test]
fn an_agent_that_restarts_has_what_was_there() {
    let mut driver = Driver::warm(rules());
    let idle = driver.serve(demand("a", "f", 1, SMALL));
    let (runs, busy) = driver.start(demand("a", "g", 1, (500, 100)));
    let (starts, _) = driver.request(demand("a", "h", 1, SMALL));
    let machine = driver.machine_of(busy);
    driver.now += 10 * SECOND;
    driver.restart(rules());
    driver.adopt_all();
    let found = driver.world().machine(machine).unwrap();
    assert_eq!(
        (found.state, found.account.as_deref()),
        (MachineState::Active, Some("a"))
    );
    assert_eq!((found.allocated.cpu_millis, found.allocated.memory_mib), (750, 228));
    assert_eq!(
        driver.world().container(busy).unwrap().state,
        ContainerState::Busy(runs)
    );
    assert!(driver.world().request(starts).is_none());
    assert_eq!(driver.serve(demand("a", "f", 1, SMALL)), idle, "warm stays warm");
    driver.complete(busy, Completion::Answered);
    assert_eq!(driver.ended[&runs], End::Answered);
    assert_eq!(driver.serve(demand("a", "g", 1, (500, 100))), busy);
}

#[test]
fn what_is_told_of_a_machine_and_its_containers_is_kept() {
    let mut driver = Driver::new(cold());
    driver.now = 5 * SECOND;
    driver.step(Event::MachineFound {
        machine: machine(1),
        runtime: RUNTIME.into(),
        shape: rules().standard,
        account: Some("a".into()),
        created: SECOND / 2,
        mode: None,
        launched: None,
    });
    driver.step(Event::MachineAdopted {
        machine: machine(1),
        containers: vec![idle(1, "f", SMALL)],
    });
    let then = |wall| Now { mono: 5 * SECOND, wall };
    let found = driver.world().machine(machine(1)).unwrap();
    assert_eq!((found.created, found.ready), (then(SECOND / 2), Some(then(5 * SECOND))));
    assert_eq!(driver.world().container(container(1)).unwrap().created, then(SECOND));
}

#[test]
fn a_request_that_was_found_runs_and_counts_like_any_other() {
    let (mut driver, _) = adopted(
        limited(AccountLimits {
            concurrency: 1,
            ..rules().default_limits
        }),
        vec![busy(1, "f", SMALL)],
    );
    let found = driver.world().request(request(1)).unwrap();
    assert_eq!(found.state, RequestState::Running(container(1)));
    assert_eq!(found.demand, demand("a", "f", 1, SMALL));
    let (waits, decisions) = driver.request(demand("a", "f", 1, SMALL));
    assert_eq!(decisions[0].reason, Reason::Concurrency { limit: 1 });
    let decisions = driver.complete(container(1), Completion::Answered);
    assert!(matches!(source(&decisions), Some(Reason::IdleContainer { .. })));
    assert_eq!(driver.running[&container(1)], waits);
}

#[test]
fn a_request_that_was_found_is_never_placed_again() {
    let (mut driver, _) = adopted(cold(), vec![busy(1, "f", SMALL), busy(2, "g", SMALL)]);
    driver.complete(container(1), Completion::NotBegun);
    assert_eq!(driver.refusal(request(1)), Some(&Refusal::CallerLeft));
    assert_eq!(driver.step(Event::CallerLeft { request: request(2) }), []);
    driver.step(Event::MachineEnded { machine: machine(1) });
    assert_eq!(driver.refusal(request(2)), Some(&Refusal::MachineLost));
    assert!(driver.booting.is_empty() && driver.world().accounts.is_empty());
}

#[test]
fn what_lies_idle_in_it_is_let_go_in_time() {
    let mut driver = Driver::new(cold());
    driver.now = 1000 * SECOND;
    driver.find(machine(1), rules().standard, Some("a"), vec![idle(1, "f", SMALL)]);
    driver.find(machine(2), rules().standard, Some("a"), Vec::new());
    driver.adopt_all();
    let decisions = driver.later(60 * SECOND);
    assert!(
        matches!(commands(&decisions)[..], [Command::StopContainer { container: stopped, .. }] if *stopped == container(1))
    );
    driver.step(Event::ContainerEnded {
        container: container(1),
    });
    let decisions = driver.later(60 * SECOND);
    assert!(
        matches!(commands(&decisions)[..], [Command::DestroyMachine { machine: ended, .. }] if *ended == machine(2))
    );
    let decisions = driver.later(60 * SECOND);
    assert!(
        matches!(commands(&decisions)[..], [Command::DestroyMachine { machine: ended, .. }] if *ended == machine(1))
    );
}

#[test]
fn a_full_host_makes_room_of_what_was_found() {
    let mut driver = Driver::new(Rules {
        max_machines: 2,
        ..cold()
    });
    driver.find(machine(1), rules().standard, Some("a"), vec![busy(1, "f", SMALL)]);
    driver.find(machine(2), rules().standard, Some("a"), vec![idle(2, "f", SMALL)]);
    let (waits, decisions) = driver.request(demand("b", "f", 1, SMALL));
    assert_eq!(commands(&decisions), [] as [&Command; 0], "it is not known what runs");
    driver.adopt(machine(2));
    driver.adopt(machine(1));
    assert!(driver.destroying.contains(&machine(2)));
    driver.settle();
    assert_eq!(driver.ended[&waits], End::Answered);
}

#[test]
fn one_of_an_account_with_more_is_closed_as_soon_as_it_is_known() {
    let mut driver = Driver::new(Rules {
        max_machines: 2,
        ..cold()
    });
    for n in 1..3 {
        driver.find(machine(n), rules().standard, Some("a"), vec![busy(n, "f", SMALL)]);
    }
    driver.request(demand("b", "f", 1, SMALL));
    let decisions = driver.adopt(machine(1));
    assert!(matches!(commands(&decisions)[..], [Command::CloseMachine { machine: closed }] if *closed == machine(1)));
}

#[test]
fn those_that_serve_longest_give_way_to_accounts_that_have_none() {
    let mut driver = Driver::new(Rules {
        max_machines: 1,
        ..cold()
    });
    driver.find(machine(1), rules().standard, Some("a"), vec![busy(1, "f", SMALL)]);
    driver.adopt(machine(1));
    driver.request(demand("b", "f", 1, SMALL));
    driver.later(5 * SECOND);
    assert_eq!(driver.world().machine(machine(1)).unwrap().state, MachineState::Closing);
    driver.complete(container(1), Completion::Answered);
    assert!(driver.destroying.contains(&machine(1)));
}

#[test]
fn weights_are_decided_anew() {
    let (mut driver, decisions) = adopted(cold(), vec![idle(1, "f", SMALL), busy(2, "g", (750, 64))]);
    let weights = |decisions: &[Decision]| {
        let mut weights: Vec<_> = decisions.iter().map(|decision| decision.command.clone()).collect();
        weights.retain(|command| matches!(command, Command::WeighMachine { .. }));
        weights
    };
    let weigh = |n, weight, of_millis| Command::WeighMachine {
        machine: machine(n),
        weight,
        of_millis,
    };
    assert_eq!(weights(&decisions), [weigh(1, 976, 1024)]);
    driver.find(machine(2), rules().standard, Some("a"), vec![idle(3, "f", SMALL)]);
    assert_eq!(
        weights(&driver.adopt(machine(2))),
        [weigh(1, 488, 2048), weigh(2, 122, 2048)]
    );
}

#[test]
fn a_function_that_is_deleted_takes_what_was_found_of_it() {
    let (mut driver, _) = adopted(cold(), vec![idle(1, "f", SMALL), busy(2, "f", SMALL)]);
    let decisions = driver.step(Event::FunctionDeleted { uid: uid("a", "f") });
    assert!(
        matches!(commands(&decisions)[..], [Command::StopContainer { container: stopped, .. }] if *stopped == container(1))
    );
    let decisions = driver.complete(container(2), Completion::Answered);
    assert!(matches!(commands(&decisions)[..], [Command::StopContainer { .. }]));
}

#[test]
fn one_of_no_account_comes_to_the_pool_and_what_is_in_it_is_ignored() {
    let mut driver = Driver::new(cold());
    driver.step(Event::MachineFound {
        machine: machine(1),
        runtime: RUNTIME.into(),
        shape: rules().standard,
        account: None,
        created: SECOND,
        mode: None,
        launched: None,
    });
    driver.step(Event::MachineAdopted {
        machine: machine(1),
        containers: vec![busy(1, "f", SMALL)],
    });
    assert_eq!(driver.world().machine(machine(1)).unwrap().state, MachineState::Warming);
    assert!(driver.world().container(container(1)).is_none() && driver.world().request(request(1)).is_none());
    // The pool should have none.
    let decisions = driver.later(120 * SECOND);
    assert_eq!(decisions[0].reason, Reason::Surplus { warming: 1, target: 0 });
}

// === what is known already ===

#[test]
fn what_is_known_already_is_ignored_and_the_rest_holds() {
    let mut driver = Driver::new(cold());
    let waits = driver.request(demand("a", "w", 1, SMALL)).0;
    let shape = rules().standard;
    driver.find(machine(1), shape, Some("a"), vec![busy(1, "f", SMALL)]);
    driver.adopt(machine(1));
    // A machine that is there, whatever is told of it.
    for n in [1, 2] {
        driver.step(Event::MachineFound {
            machine: machine(n),
            runtime: "another".into(),
            shape: Shape {
                vcpus: 4,
                memory_mib: 1000,
                drive_mib: 0,
                baseline_millis: 0,
            },
            account: (n == 1).then(|| "b".into()),
            created: SECOND,
            mode: None,
            launched: None,
        });
    }
    driver.step(Event::MachineEnded { machine: machine(2) });
    let decisions = driver.step(Event::MachineAdopted {
        machine: machine(1),
        containers: vec![idle(9, "f", SMALL)],
    });
    assert_eq!(decisions, []);
    let found = driver.world().machine(machine(1)).unwrap();
    assert_eq!(
        (&*found.runtime, found.shape, found.containers.len()),
        (RUNTIME, shape, 2)
    );
    let again = FoundContainer {
        request: Some(waits),
        ..idle(5, "f", SMALL)
    };
    driver.step(Event::MachineFound {
        machine: machine(2),
        runtime: RUNTIME.into(),
        shape,
        account: Some("a".into()),
        created: SECOND,
        mode: None,
        launched: None,
    });
    driver.step(Event::MachineAdopted {
        machine: machine(2),
        // One of another machine, one named twice, requests that run or wait elsewhere.
        containers: vec![
            idle(1, "f", SMALL),
            idle(2, "f", SMALL),
            busy(2, "f", SMALL),
            FoundContainer {
                request: Some(request(1)),
                ..idle(4, "f", SMALL)
            },
            again,
        ],
    });
    let found = driver.world().machine(machine(2)).unwrap();
    assert_eq!(Vec::from_iter(&found.containers), [&container(2)]);
    assert_eq!(found.allocated.cpu_millis, 250);
    assert_eq!(
        driver.world().account("a").unwrap().running,
        2,
        "the one found and the one that waited"
    );
}

// === more than the rules allow ===

#[test]
fn a_host_that_may_have_less_takes_over_what_there_is_and_starts_nothing() {
    let smaller = Rules {
        max_machines: 2,
        host_memory_mib: 1200,
        host_cpu_millis: 6000,
        ..cold()
    };
    let mut driver = Driver::new(smaller);
    for n in 1..5 {
        driver.find(machine(n), rules().standard, Some("a"), vec![busy(n, "f", SMALL)]);
    }
    let (waits, _) = driver.request(demand("b", "f", 1, SMALL));
    driver.adopt_all();
    assert_eq!(driver.running.len(), 4);
    driver.later(6 * SECOND);
    // Room for one of another takes three of the four.
    let closing = |driver: &Driver| {
        let machines = driver.world().machines();
        machines.filter(|found| found.state == MachineState::Closing).count()
    };
    assert_eq!(closing(&driver), 3);
    for n in 1..4 {
        assert!(driver.booting.is_empty());
        driver.complete(container(n), Completion::Answered);
        driver.step(Event::MachineEnded { machine: machine(n) });
    }
    assert_eq!(driver.booting.len(), 1);
    driver.settle();
    assert_eq!(driver.ended[&waits], End::Answered);
}

#[test]
fn an_account_that_may_have_less_keeps_what_it_has_and_gets_no_more() {
    let mut driver = Driver::new(limited(AccountLimits {
        machines: 1,
        memory_mib: 512,
        concurrency: 1,
        ..rules().default_limits
    }));
    for n in 1..3 {
        let containers = vec![busy(n, "f", SMALL), busy(10 + n, "f", SMALL)];
        driver.find(machine(n), rules().standard, Some("a"), containers);
    }
    driver.adopt_all();
    assert_eq!(driver.world().account("a").unwrap().running, 4);
    let (waits, _) = driver.request(demand("a", "f", 1, SMALL));
    for n in [1, 2, 11] {
        driver.complete(container(n), Completion::Answered);
        assert!(!driver.running.values().any(|of| *of == waits), "one runs still");
    }
    driver.complete(container(12), Completion::Answered);
    assert!(driver.running.values().any(|of| *of == waits));
    assert!(driver.booting.is_empty());
}

#[test]
fn one_that_comes_first_gets_the_larger_machine_that_was_found() {
    let mut driver = Driver::new(Rules {
        max_machines: 1,
        ..limited(AccountLimits {
            machines: 2,
            ..rules().default_limits
        })
    });
    for n in 1..3 {
        driver.find(machine(n), rules().standard, Some("a"), vec![busy(n, "f", SMALL)]);
    }
    let larger = Shape {
        vcpus: 3,
        memory_mib: 964,
        drive_mib: 0,
        baseline_millis: 300,
    };
    driver.find(machine(3), larger, None, Vec::new());
    driver.adopt_all();
    let (large, _) = driver.request(demand("a", "g", 1, (3000, 900)));
    driver.later(SECOND);
    assert_eq!(driver.world().account("a").unwrap().next, Some(large));
    let closing = driver
        .world()
        .machines()
        .find(|found| found.state == MachineState::Closing);
    let closing = closing.unwrap().id;
    driver.complete(ContainerId(closing.0), Completion::Answered);
    let decisions = driver.step(Event::MachineEnded { machine: closing });
    assert_eq!(source(&decisions), Some(&Reason::NewMachine { waited: SECOND }));
    assert_eq!(
        driver.world().machine(machine(3)).unwrap().account.as_deref(),
        Some("a")
    );
}

#[test]
fn a_machine_that_holds_too_much_gets_nothing_on_top() {
    let wide = (900, 300);
    let containers = vec![idle(1, "f", wide), idle(2, "f", wide), busy(3, "g", (100, 100))];
    let (mut driver, _) = adopted(
        limited(AccountLimits {
            machines: 1,
            ..rules().default_limits
        }),
        containers,
    );
    let found = driver.world().machine(machine(1)).unwrap();
    assert_eq!((found.allocated.memory_mib, found.free().memory_mib), (700, 0));
    // Of 448 MiB there are 348 beside what runs: for one of 100 both that are idle have to go.
    let (other, decisions) = driver.request(demand("a", "h", 1, (100, 100)));
    assert_eq!(commands(&decisions).len(), 2);
    driver.step(Event::ContainerEnded {
        container: container(1),
    });
    assert!(driver.creating.is_empty(), "400 of 448 are given");
    driver.step(Event::ContainerEnded {
        container: container(2),
    });
    assert_eq!(driver.creating.len(), 1);
    driver.settle();
    assert_eq!(driver.ended[&other], End::Answered);
}

#[test]
fn the_largest_and_smallest_sizes_break_nothing() {
    let mut driver = Driver::new(rules());
    let (all, half) = (u32::MAX, (u32::MAX / 2, u32::MAX / 2));
    for n in 1..4 {
        let shape = Shape {
            vcpus: all,
            memory_mib: all,
            drive_mib: all,
            baseline_millis: all,
        };
        let containers = vec![idle(n, "f", half), busy(10 + n, "g", half)];
        driver.find(machine(n), shape, (n != 3).then_some("a"), containers);
    }
    let nothing = Shape {
        vcpus: 0,
        memory_mib: 0,
        drive_mib: 0,
        baseline_millis: 0,
    };
    driver.find(machine(4), nothing, Some("b"), vec![busy(4, "f", (0, 0))]);
    driver.request(demand("a", "h", 1, SMALL));
    driver.step(Event::MachineAdopted {
        machine: machine(3),
        containers: Vec::new(),
    });
    for n in [1, 2, 4] {
        driver.adopt(machine(n));
    }
    for n in [11, 12, 4] {
        driver.complete(container(n), Completion::Answered);
    }
    driver.later(3600 * SECOND);
    driver.settle();
}

// === draining ===

#[test]
fn what_is_found_while_draining_ends_when_nothing_runs_in_it() {
    let mut driver = Driver::new(cold());
    let shape = rules().standard;
    driver.find(
        machine(1),
        shape,
        Some("a"),
        vec![busy(1, "f", SMALL), idle(2, "f", SMALL)],
    );
    driver.find(machine(2), shape, None, Vec::new());
    driver.step(Event::Drain);
    // One of no account runs nothing; of the other it is not known.
    assert_eq!(Vec::from_iter(&driver.destroying), [&machine(2)]);
    driver.find(machine(3), shape, Some("a"), vec![idle(3, "f", SMALL)]);
    driver.find(machine(4), shape, None, Vec::new());
    assert_eq!(Vec::from_iter(&driver.destroying), [&machine(2), &machine(4)]);
    driver.adopt(machine(3));
    assert!(driver.destroying.contains(&machine(3)));
    driver.adopt(machine(1));
    assert!(!driver.destroying.contains(&machine(1)));
    driver.complete(container(1), Completion::Answered);
    assert_eq!(driver.ended[&request(1)], End::Answered);
    driver.settle();
    assert!(driver.host.is_drained());
}

#[test]
fn what_is_found_ends_at_once_where_draining_took_too_long() {
    let mut driver = Driver::new(cold());
    for n in 1..4 {
        driver.find(
            machine(n),
            rules().standard,
            (n < 3).then_some("a"),
            vec![busy(n, "f", SMALL)],
        );
    }
    driver.adopt(machine(1));
    driver.step(Event::DrainExpired);
    assert_eq!(driver.destroying.len(), 3);
    assert_eq!(driver.refusal(request(1)), Some(&Refusal::MachineLost));
    // Its guest answers after all.
    let late = driver.step(Event::MachineAdopted {
        machine: machine(2),
        containers: vec![busy(2, "f", SMALL)],
    });
    assert_eq!(late, []);
    driver.settle();
    assert!(driver.host.is_drained());
}
