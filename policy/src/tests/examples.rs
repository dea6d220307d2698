//! Each rule by an example.

use std::collections::BTreeMap;

use super::driver::{Driver, End, commands, source};
use super::{RUNTIME, SECOND, SMALL, demand, kind, rules, uid};
use crate::{
    Command, Completion, ContainerFailure, Event, MachineState, Purpose, Reason, Refusal, Rules, RulesError, Shape,
    Usage,
};

fn no_pool() -> Rules {
    Rules {
        warming: BTreeMap::new(),
        ..rules()
    }
}

fn one_machine() -> Rules {
    Rules {
        max_machines: 1,
        ..rules()
    }
}

// === the order of preference ===

#[test]
fn the_warming_pool_fills_and_refills() {
    let mut driver = Driver::new(rules());
    assert_eq!(driver.booting.len(), 1);
    driver.boot_all();
    assert_eq!(driver.booting.len(), 0);
    let (_, decisions) = driver.request(demand("a", "f", 1, SMALL));
    assert!(matches!(
        source(&decisions),
        Some(Reason::WarmingMachine { left: 0, .. })
    ));
    assert_eq!(driver.booting.len(), 1, "topped up in the background");
}

#[test]
fn preference_is_idle_then_active_then_warming_then_new() {
    let mut driver = Driver::warm(rules());
    let first = driver.serve(demand("a", "f", 1, SMALL));
    driver.boot_all();
    // The same code, version and amount: the idle container, though a warming machine is there.
    assert_eq!(driver.serve(demand("a", "f", 1, SMALL)), first);
    // Another version, amount or function: another container in the same machine.
    for other in [
        demand("a", "f", 2, SMALL),
        demand("a", "f", 1, (500, 64)),
        demand("a", "g", 1, SMALL),
    ] {
        let (_, decisions) = driver.request(other);
        assert!(matches!(source(&decisions), Some(Reason::RoomInMachine { .. })));
    }
    // Another account: a machine of its own.
    let (_, decisions) = driver.request(demand("b", "f", 1, SMALL));
    assert!(matches!(source(&decisions), Some(Reason::WarmingMachine { .. })));
    // None left: it waits for the one that boots.
    let (waits, decisions) = driver.request(demand("c", "f", 1, SMALL));
    assert_eq!(source(&decisions), None);
    let machine = *driver.booting.first().unwrap();
    driver.now += SECOND;
    let decisions = driver.step(Event::MachineReady { machine });
    assert_eq!(source(&decisions), Some(&Reason::NewMachine { waited: SECOND }));
    assert!(!driver.ended.contains_key(&waits));
}

#[test]
fn an_idle_container_of_any_acceptable_kind_is_taken_in_order() {
    let mut driver = Driver::warm(rules());
    let old = driver.serve(demand("a", "f", 1, SMALL));
    let mut either = demand("a", "f", 2, SMALL);
    either.kinds.push(kind("a", "f", 1, SMALL));
    assert_eq!(driver.serve(either.clone()), old, "the older version serves meanwhile");
    let new = driver.serve(demand("a", "f", 2, SMALL));
    assert_ne!(new, old);
    assert_eq!(driver.serve(either), new);
}

#[test]
fn a_container_made_ahead_waits_for_its_request() {
    let mut driver = Driver::warm(rules());
    let prepared = driver.step(Event::Prepare {
        account: "a".into(),
        runtime: RUNTIME.into(),
        kind: kind("a", "f", 1, SMALL),
    });
    let created = commands(&prepared).into_iter().find_map(|command| match command {
        Command::CreateContainer { container, purpose, .. } => Some((*container, *purpose)),
        _ => None,
    });
    let (container, purpose) = created.unwrap();
    assert_eq!(purpose, Purpose::Ahead);
    driver.step(Event::ContainerReady { container });
    assert_eq!(driver.serve(demand("a", "f", 1, SMALL)), container);
}

#[test]
fn requests_of_one_account_share_the_machine_that_boots() {
    let mut driver = Driver::new(no_pool());
    for _ in 0..3 {
        driver.request(demand("a", "f", 1, SMALL));
    }
    assert_eq!(driver.booting.len(), 1);
    driver.boot_all();
    assert_eq!(driver.creating.len(), 3);
}

#[test]
fn a_large_amount_gets_a_larger_machine_of_its_own() {
    let mut driver = Driver::warm(rules());
    let (large, decisions) = driver.request(demand("a", "f", 1, (3000, 1000)));
    let shape = Shape {
        vcpus: 3,
        memory_mib: 1064,
        drive_mib: 0,
        baseline_millis: 300,
    };
    assert!(commands(&decisions).iter().any(
        |command| matches!(command, Command::BootMachine { shape: its, reserved, .. } if *its == shape && *reserved == Some(large))
    ));
    // One that would fit in a standard machine does not take it.
    driver.request(demand("b", "f", 1, SMALL));
    driver.boot_all();
    assert_eq!(driver.creating.len(), 2);
    let machines: Vec<_> = driver
        .world()
        .machines()
        .filter(|m| m.state == MachineState::Active)
        .collect();
    assert!(
        machines
            .iter()
            .any(|m| m.shape == shape && m.account.as_deref() == Some("a"))
    );
}

#[test]
fn an_amount_larger_than_the_host_or_the_account_is_refused_at_once() {
    let mut driver = Driver::warm(rules());
    for amount in [(4001, 128), (250, 1985), (u32::MAX, u32::MAX)] {
        let (request, _) = driver.request(demand("a", "f", 1, amount));
        assert!(matches!(driver.refusal(request), Some(Refusal::TooLarge { .. })));
    }
    let (request, _) = driver.request(demand("a", "f", 1, (4000, 1984)));
    assert_eq!(driver.refusal(request), None);
    let mut limited = rules();
    limited.default_limits.memory_mib = 512;
    let mut driver = Driver::warm(limited);
    let (request, _) = driver.request(demand("a", "f", 1, (250, 449)));
    let Some(Refusal::TooLarge { largest }) = driver.refusal(request) else {
        panic!("not refused");
    };
    assert_eq!(largest.memory_mib, 448);
    let none = crate::Demand {
        kinds: Vec::new(),
        ..demand("a", "f", 1, SMALL)
    };
    let (request, _) = driver.request(none);
    assert!(matches!(driver.refusal(request), Some(Refusal::TooLarge { .. })));
}

#[test]
fn a_machine_weighs_its_part_of_what_its_account_was_given() {
    let mut driver = Driver::warm(rules());
    let weights = |decisions: &[crate::Decision]| -> Vec<u32> {
        let all = decisions.iter().filter_map(|decision| match decision.command {
            Command::WeighMachine { weight, .. } => Some(weight),
            _ => None,
        });
        all.collect()
    };
    let (_, decisions) = driver.request(demand("a", "f", 1, (250, 64)));
    assert_eq!(weights(&decisions), [1000 * 250 / 256]);
    let (_, decisions) = driver.request(demand("a", "g", 1, (500, 64)));
    assert_eq!(weights(&decisions), [1000 * 750 / 1024]);
    let container = *driver.creating.first().unwrap();
    let left = 750 - driver.world().container(container).unwrap().kind.amount.cpu_millis;
    let decisions = driver.step(Event::ContainerFailed {
        container,
        failure: ContainerFailure::Settled,
    });
    // Of as much as a quarter all are weighed anew.
    let of = if left * 4 < 1024 {
        left.next_power_of_two()
    } else {
        1024
    };
    assert_eq!(weights(&decisions), [1000 * left / of]);
}

#[test]
fn an_account_weighs_the_same_however_many_machines_it_has() {
    let mut driver = Driver::new(Rules {
        host_cpu_millis: 64_000,
        ..rules()
    });
    let mut weights = BTreeMap::new();
    let mut weighed = 0;
    for function in 0..12 {
        driver.request(demand("a", &format!("f{function}"), 1, (900, 400)));
        driver.boot_all();
        for machine in driver.world().machines().filter(|machine| machine.account.is_some()) {
            weighed += usize::from(weights.insert(machine.id, machine.weight) != Some(machine.weight));
        }
        let sum: u32 = weights.values().sum();
        assert!((240..=1000).contains(&sum), "{sum} for {} machines", weights.len());
    }
    assert!(weights.len() >= 4, "{} machines", weights.len());
    // Where the account has doubled all are weighed, and else the one alone.
    assert!(weighed <= 3 * weights.len(), "{weighed} for {}", weights.len());
}

#[test]
fn vcpus_are_admitted_like_memory() {
    let mut driver = Driver::warm(Rules {
        host_cpu_millis: 4000,
        ..rules()
    });
    for account in ["a", "b", "c"] {
        driver.request(demand(account, "f", 1, SMALL));
    }
    driver.boot_all();
    assert_eq!(driver.world().machines().count(), 2, "of 2 vCPUs each");
}

// === the queue ===

#[test]
fn the_queue_is_bounded_and_has_a_deadline() {
    let mut driver = Driver::new(no_pool());
    let waiting: Vec<_> = (0..3)
        .map(|n| driver.request(demand(&format!("a{n}"), "f", 1, SMALL)).0)
        .collect();
    let (over, _) = driver.request(demand("b", "f", 1, SMALL));
    assert_eq!(driver.refusal(over), Some(&Refusal::QueueFull { waiting: 3 }));
    driver.later(29 * SECOND);
    assert_eq!(driver.host.next_wake(), Some(30 * SECOND));
    driver.later(SECOND);
    for request in waiting {
        assert_eq!(
            driver.refusal(request),
            Some(&Refusal::QueueTimeout { waited: 30 * SECOND })
        );
    }
}

#[test]
fn a_caller_that_leaves_the_queue_is_forgotten() {
    let mut driver = Driver::new(rules());
    let (request, _) = driver.request(demand("a", "f", 1, SMALL));
    driver.step(Event::CallerLeft { request });
    assert_eq!(driver.refusal(request), Some(&Refusal::CallerLeft));
    driver.boot_all();
    assert!(driver.creating.is_empty());
}

#[test]
fn a_caller_that_leaves_while_its_container_starts_is_not_queued_again() {
    let mut driver = Driver::warm(rules());
    let (request, _) = driver.request(demand("a", "f", 1, SMALL));
    let container = *driver.creating.first().unwrap();
    driver.step(Event::CallerLeft { request });
    assert_eq!(driver.refusal(request), Some(&Refusal::CallerLeft));
    // Lost: nobody is placed again for it.
    let decisions = driver.step(Event::ContainerFailed {
        container,
        failure: ContainerFailure::Lost,
    });
    assert_eq!(source(&decisions), None);
    // Ready: it serves the next.
    let (request, _) = driver.request(demand("a", "g", 1, SMALL));
    let container = *driver.creating.first().unwrap();
    driver.step(Event::CallerLeft { request });
    assert_eq!(source(&driver.step(Event::ContainerReady { container })), None);
    assert_eq!(driver.serve(demand("a", "g", 1, SMALL)), container);
}

#[test]
fn a_caller_that_leaves_a_running_request_lets_it_finish() {
    let mut driver = Driver::warm(rules());
    let (request, container) = driver.start(demand("a", "f", 1, SMALL));
    assert_eq!(driver.step(Event::CallerLeft { request }), []);
    driver.complete(container, Completion::Answered);
    assert_eq!(driver.ended[&request], End::Answered);
}

#[test]
fn an_old_request_is_not_overtaken_for_ever_by_those_of_a_busy_kind() {
    let mut driver = Driver::warm(Rules {
        queue_limit: 10,
        ..one_machine()
    });
    // Two containers that fill the machine, always busy.
    let busy: Vec<_> = (0..2)
        .map(|_| driver.start(demand("a", "f", 1, (900, 224))).1)
        .collect();
    let (old, _) = driver.request(demand("a", "g", 1, (900, 224)));
    driver.request(demand("a", "f", 1, (900, 224)));
    let decisions = driver.complete(busy[0], Completion::Answered);
    assert!(
        matches!(commands(&decisions)[..], [Command::Dispatch { .. }]),
        "within its patience"
    );
    driver.request(demand("a", "f", 1, (900, 224)));
    driver.now += SECOND;
    let decisions = driver.complete(busy[1], Completion::Answered);
    assert!(
        matches!(commands(&decisions)[..], [Command::StopContainer { .. }]),
        "{decisions:?}"
    );
    let kept = decisions
        .iter()
        .find(|d| matches!(d.command, Command::KeepRoom { request, .. } if request == old));
    assert_eq!(kept.map(|d| &d.reason), Some(&Reason::Overtaken { waited: SECOND }));
    let decisions = driver.step(Event::ContainerEnded { container: busy[1] });
    let made = commands(&decisions).into_iter().find_map(|command| match command {
        Command::CreateContainer { purpose, .. } => Some(*purpose),
        _ => None,
    });
    assert_eq!(made, Some(Purpose::Serve(old)));
}

// === room on a full host ===

#[test]
fn a_full_host_makes_room_of_idle_machines() {
    let mut driver = Driver::warm(one_machine());
    driver.serve(demand("a", "f", 1, SMALL));
    let container = driver.world().containers().next().unwrap().id;
    driver.later(60 * SECOND);
    driver.step(Event::ContainerEnded { container });
    let (request, decisions) = driver.request(demand("b", "f", 1, SMALL));
    assert!(matches!(
        commands(&decisions)[..],
        [Command::DestroyMachine { gently: false, .. }]
    ));
    driver.settle();
    assert_eq!(driver.ended[&request], End::Answered);
}

#[test]
fn a_full_host_never_takes_a_machine_that_runs_a_request() {
    let mut driver = Driver::warm(one_machine());
    let (_, container) = driver.start(demand("a", "f", 1, SMALL));
    let (waits, decisions) = driver.request(demand("b", "f", 1, SMALL));
    assert_eq!(commands(&decisions), [] as [&Command; 0]);
    driver.complete(container, Completion::Answered);
    assert_eq!(driver.destroying.len(), 1, "free now");
    driver.settle();
    assert_eq!(driver.ended[&waits], End::Answered);
}

#[test]
fn an_account_makes_room_of_its_own_idle_containers() {
    let mut driver = Driver::warm(one_machine());
    let oldest = driver.serve(demand("a", "f", 1, (500, 200)));
    driver.later(SECOND);
    driver.serve(demand("a", "g", 1, (500, 200)));
    let (_, decisions) = driver.request(demand("a", "h", 1, (500, 200)));
    assert!(matches!(commands(&decisions)[..], [Command::StopContainer { container, .. }] if *container == oldest));
    assert_eq!(commands(&driver.later(SECOND)), [] as [&Command; 0], "asked once");
    let decisions = driver.step(Event::ContainerEnded { container: oldest });
    assert!(matches!(source(&decisions), Some(Reason::RoomInMachine { .. })));
}

// === letting go ===

#[test]
fn idle_containers_and_then_machines_are_let_go() {
    let mut driver = Driver::warm(rules());
    let container = driver.serve(demand("a", "f", 1, SMALL));
    driver.boot_all();
    let decisions = driver.later(60 * SECOND);
    assert!(matches!(commands(&decisions)[..], [Command::StopContainer { .. }]));
    assert_eq!(decisions[0].reason, Reason::Idle { idle: 60 * SECOND });
    driver.step(Event::ContainerEnded { container });
    let decisions = driver.later(120 * SECOND);
    assert!(matches!(
        commands(&decisions)[..],
        [Command::DestroyMachine { gently: true, .. }]
    ));
    assert_eq!(decisions[0].reason, Reason::Idle { idle: 120 * SECOND });
    let machine = *driver.destroying.first().unwrap();
    driver.step(Event::MachineEnded { machine });
    assert_eq!(driver.world().machines().count(), 1, "the warming one");
    assert_eq!(driver.host.next_wake(), None);
}

#[test]
fn a_container_in_use_is_not_let_go_and_sets_one_timer() {
    let mut driver = Driver::warm(rules());
    for _ in 0..100 {
        driver.serve(demand("a", "f", 1, SMALL));
        driver.later(SECOND);
    }
    assert_eq!(driver.world().containers().count(), 1);
    driver.later(59 * SECOND);
    assert!(!driver.stopping.is_empty());
}

#[test]
fn surplus_machines_are_let_go() {
    let mut driver = Driver::new(rules());
    let (first, _) = driver.request(demand("a", "f", 1, SMALL));
    let (second, _) = driver.request(demand("b", "f", 1, SMALL));
    driver.step(Event::CallerLeft { request: first });
    driver.step(Event::CallerLeft { request: second });
    driver.boot_all();
    assert_eq!(driver.world().machines().count(), 2);
    let decisions = driver.later(120 * SECOND);
    assert!(matches!(commands(&decisions)[..], [Command::DestroyMachine { .. }]));
    assert_eq!(decisions[0].reason, Reason::Surplus { warming: 2, target: 1 });
}

#[test]
fn a_machine_booted_for_a_request_that_left_is_for_anyone() {
    let mut driver = Driver::warm(rules());
    let (large, _) = driver.request(demand("a", "f", 1, (3000, 1000)));
    driver.step(Event::CallerLeft { request: large });
    driver.boot_all();
    assert_eq!(
        driver
            .world()
            .machines()
            .filter(|m| m.state == MachineState::Warming)
            .count(),
        2
    );
    driver.later(120 * SECOND);
    let largest = driver.world().machines().find(|m| m.shape.vcpus == 3).unwrap();
    assert_eq!(largest.state, MachineState::Stopping);
}

#[test]
fn a_deleted_function_keeps_no_container_and_finishes_what_runs() {
    let mut driver = Driver::warm(rules());
    let idle = driver.serve(demand("a", "f", 1, SMALL));
    let (running, busy) = driver.start(demand("a", "f", 1, (500, 100)));
    let (starts, _) = driver.request(demand("a", "f", 2, SMALL));
    let starting = *driver.creating.first().unwrap();
    // One of its name, made after it.
    let another = Event::FunctionDeleted {
        uid: uid("a", "another f"),
    };
    assert!(driver.step(another).is_empty());
    let decisions = driver.step(Event::FunctionDeleted { uid: uid("a", "f") });
    assert!(
        commands(&decisions)
            .iter()
            .any(|c| matches!(c, Command::StopContainer { container, .. } if *container == idle))
    );
    assert_eq!(
        driver.refusal(starts),
        Some(&Refusal::FunctionDeleted),
        "it had not begun"
    );
    let decisions = driver.step(Event::ContainerReady { container: starting });
    assert!(matches!(commands(&decisions)[..], [Command::StopContainer { .. }]));
    let decisions = driver.complete(busy, Completion::Answered);
    assert_eq!(driver.ended[&running], End::Answered);
    assert!(matches!(commands(&decisions)[..], [Command::StopContainer { .. }]));
}

// === what goes wrong ===

#[test]
fn a_lost_machine_ends_what_ran_and_places_the_rest_again() {
    let mut driver = Driver::warm(rules());
    let (ran, container) = driver.start(demand("a", "f", 1, SMALL));
    let (starts, _) = driver.request(demand("a", "g", 1, SMALL));
    let machine = driver.machine_of(container);
    driver.step(Event::MachineEnded { machine });
    assert_eq!(driver.refusal(ran), Some(&Refusal::MachineLost));
    driver.boot_all();
    assert!(!driver.ended.contains_key(&starts));
    assert_eq!(driver.creating.len(), 1);
}

#[test]
fn a_request_that_did_not_begin_is_placed_again() {
    let mut driver = Driver::warm(rules());
    driver.serve(demand("a", "f", 1, SMALL));
    // Its runtime exited after the last answer, and nobody knew.
    let (request, container) = driver.start(demand("a", "f", 1, SMALL));
    let decisions = driver.complete(container, Completion::NotBegun);
    assert!(matches!(source(&decisions), Some(Reason::RoomInMachine { .. })));
    assert!(driver.world().container(container).is_none());
    driver.settle();
    assert_eq!(driver.ended[&request], End::Answered);
}

#[test]
fn a_request_that_loses_its_machine_again_and_again_is_given_up() {
    let mut driver = Driver::warm(rules());
    let (request, _) = driver.request(demand("a", "f", 1, SMALL));
    for _ in 0..3 {
        assert_eq!(driver.refusal(request), None);
        let container = *driver.creating.first().unwrap();
        let machine = driver.machine_of(container);
        driver.step(Event::ContainerFailed {
            container,
            failure: ContainerFailure::Lost,
        });
        driver.boot_all();
        assert!(
            driver.creating.iter().all(|id| driver.machine_of(*id) != machine),
            "there again"
        );
    }
    assert_eq!(driver.refusal(request), Some(&Refusal::MachineLost));
}

#[test]
fn failing_boots_back_off_and_then_refuse() {
    let mut driver = Driver::new(rules());
    let (request, _) = driver.request(demand("a", "f", 1, SMALL));
    let mut gaps = Vec::new();
    for _ in 0..3 {
        while let Some(machine) = driver.booting.first().copied() {
            driver.step(Event::MachineEnded { machine });
        }
        assert!(driver.booting.is_empty(), "no hot loop");
        let wake = driver.world().runtime(RUNTIME).unwrap().not_before;
        gaps.push((wake - driver.now).as_secs());
        if driver.refusal(request).is_none() {
            driver.later(wake - driver.now);
            assert_eq!(driver.booting.len(), 1, "one at a time");
        }
    }
    assert_eq!(driver.refusal(request), Some(&Refusal::BootFailing));
    assert!(gaps.is_sorted() && gaps[0] >= 1, "{gaps:?}");
    let (next, _) = driver.request(demand("a", "f", 1, SMALL));
    assert_eq!(driver.refusal(next), Some(&Refusal::BootFailing), "at once");
    driver.later(60 * SECOND);
    driver.boot_all();
    let (good, decisions) = driver.request(demand("a", "f", 1, SMALL));
    assert!(matches!(source(&decisions), Some(Reason::WarmingMachine { .. })));
    assert_eq!(driver.refusal(good), None);
}

#[test]
fn an_end_that_the_guest_reports_first_waits_for_the_answer() {
    let mut driver = Driver::warm(rules());
    let (request, container) = driver.start(demand("a", "f", 1, SMALL));
    driver.step(Event::ContainerEnded { container });
    assert!(!driver.ended.contains_key(&request));
    driver.complete(container, Completion::Answered);
    assert_eq!(driver.ended[&request], End::Answered);
    assert!(driver.world().containers().next().is_none());
}

#[test]
fn what_guests_say_is_kept_where_it_belongs() {
    let mut driver = Driver::warm(rules());
    let container = driver.serve(demand("a", "f", 1, SMALL));
    let machine = driver.machine_of(container);
    driver.boot_all();
    let other = driver.world().machines().find(|m| m.id != machine).unwrap().id;
    let usage = |cpu_ns| Usage {
        cpu_ns,
        ..Usage::default()
    };
    let used = |machine, cpu_ns| Event::Used {
        machine,
        containers: vec![(container, usage(cpu_ns))],
    };
    driver.step(used(machine, 5));
    driver.step(used(other, 6));
    assert_eq!(driver.world().container(container).unwrap().usage, Some(usage(5)));
}

// === draining ===

#[test]
fn draining_finishes_what_runs_and_ends_everything() {
    let mut driver = Driver::warm(rules());
    let (runs, container) = driver.start(demand("a", "f", 1, SMALL));
    driver.step(Event::Drain);
    let (late, _) = driver.request(demand("a", "f", 1, SMALL));
    assert_eq!(driver.refusal(late), Some(&Refusal::Draining));
    driver.complete(container, Completion::Answered);
    assert_eq!(driver.ended[&runs], End::Answered);
    driver.settle();
    assert!(driver.host.is_drained());
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
        bad(|r| r.host_cpu_millis = 1999),
        RulesError::TooFewCpus { .. }
    ));
    assert!(matches!(
        bad(|r| r.default_limits.share = 0),
        RulesError::ZeroLimit { field: "share", .. }
    ));
    assert!(matches!(
        bad(|r| r.warming = BTreeMap::from([(RUNTIME.into(), 5)])),
        RulesError::WarmingTooLarge {
            machines: 5,
            max: 4,
            ..
        }
    ));
}
