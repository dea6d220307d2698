//! What an account may have changes while it has something: functions. Machines that it launches are in `scale`.

use std::sync::Arc;

use super::driver::{Driver, commands, source};
use super::{LARGE, RUNTIME, SMALL, cold, demand, kind, rules};
use crate::{
    Amount, Code, Command, Completion, Demand, Event, MachineState, NoticeKind, Reason, Refusal, Resize, ResizeMode,
    Rules, Sample,
};

/// One container fills a standard machine.
const WHOLE: (u32, u32) = (2000, 448);

fn machines(driver: &Driver, account: &str) -> u32 {
    driver.world().account_use(account).machines
}

/// A host on which `a` runs a request in each of so many machines.
fn running(n: u32) -> Driver {
    let mut driver = Driver::new(cold());
    for _ in 0..n {
        driver.request(demand("a", "f", 1, WHOLE));
    }
    driver.boot_all();
    for container in driver.creating.clone() {
        driver.step(Event::ContainerReady { container });
    }
    assert_eq!((machines(&driver, "a"), driver.running.len()), (n, n as usize));
    driver
}

#[test]
fn less_takes_nothing_away_and_keeps_it_from_more() {
    let mut driver = running(3);
    let decisions = driver.limit("a", |limits| limits.machines = 2);
    let Command::SetLimits { account, limits } = &decisions[0].command else {
        panic!("{decisions:?}");
    };
    assert_eq!((&**account, limits.machines), ("a", 2));
    assert_eq!(decisions[0].reason, Reason::Asked { by: "someone".into() });
    assert_eq!(decisions.len(), 1, "nothing ends");
    let used = driver.world().account_use("a");
    assert_eq!((used.machines, used.cpu_millis, used.memory_mib), (3, 6000, 1536));
    assert_eq!((used.running, used.waiting, used.given_millis), (3, 0, 6000));
    // What comes now waits for what it has.
    let (waits, _) = driver.request(demand("a", "f", 1, WHOLE));
    assert!(driver.booting.is_empty() && driver.refusal(waits).is_none());
    let container = *driver.running.keys().next().unwrap();
    let decisions = driver.complete(container, Completion::Answered);
    assert!(matches!(source(&decisions), Some(Reason::IdleContainer { .. })));
    driver.settle();
    assert!(driver.ended.contains_key(&waits));
    // Others are as they were.
    assert_eq!(driver.world().rules().limits("b"), &cold().default_limits);
}

#[test]
fn each_limit_keeps_functions_from_another_machine_and_more_gives_it_at_once() {
    // Of three machines of 2 vCPUs and 512 MiB.
    for (limit, less, more) in [("machines", 3, 4), ("cpu", 7000, 8000), ("memory", 2000, 2048)] {
        let mut driver = running(3);
        let change = |driver: &mut Driver, to: u64| {
            driver.limit("a", |limits| match limit {
                "machines" => limits.machines = u32::try_from(to).unwrap(),
                "cpu" => limits.cpu_millis = to,
                _ => limits.memory_mib = to,
            })
        };
        change(&mut driver, less);
        let (waits, _) = driver.request(demand("a", "f", 1, WHOLE));
        assert!(driver.booting.is_empty(), "{limit}");
        // Nor is a container made ahead in a machine that is ready for anyone.
        let (other, _) = driver.request(demand("b", "f", 1, WHOLE));
        let machine = *driver.booting.first().unwrap();
        driver.step(Event::CallerLeft { request: other });
        driver.step(Event::MachineReady { machine });
        driver.step(Event::Prepare {
            account: "a".into(),
            runtime: RUNTIME.into(),
            kind: kind("a", "g", 1, WHOLE),
        });
        assert_eq!(driver.world().machine(machine).unwrap().state, MachineState::Warming);
        let decisions = change(&mut driver, more);
        let assigned = commands(&decisions)
            .into_iter()
            .any(|command| matches!(command, Command::AssignMachine { machine: of, .. } if *of == machine));
        assert!(assigned, "{limit}: {decisions:?}");
        driver.settle();
        assert!(driver.ended.contains_key(&waits) && driver.refusal(waits).is_none());
    }
}

#[test]
fn a_machine_that_boots_for_one_request_is_not_its_own_where_the_limit_fell() {
    let mut driver = Driver::new(cold());
    let (request, _) = driver.request(demand("a", "f", 1, LARGE));
    let machine = *driver.booting.first().unwrap();
    driver.limit("a", |limits| limits.cpu_millis = 2000);
    let decisions = driver.step(Event::MachineReady { machine });
    let released = decisions
        .iter()
        .find(|decision| decision.command == Command::ReleaseMachine { machine });
    assert_eq!(released.unwrap().reason, Reason::Limits { account: "a".into() });
    assert_eq!(machines(&driver, "a"), 0);
    // It waits no longer than any.
    driver.later(rules().queue_timeout);
    assert!(matches!(driver.refusal(request), Some(Refusal::QueueTimeout { .. })));
}

#[test]
fn what_is_there_serves_what_no_new_machine_could() {
    let mut driver = running(1);
    driver.limit("a", |limits| limits.memory_mib = 300);
    let container = *driver.running.keys().next().unwrap();
    driver.complete(container, Completion::Answered);
    let (_, decisions) = driver.request(demand("a", "f", 1, WHOLE));
    assert!(matches!(source(&decisions), Some(Reason::IdleContainer { .. })));
    let (refused, _) = driver.request(demand("a", "f", 1, WHOLE));
    let largest = Amount {
        cpu_millis: 4000,
        memory_mib: 300 - 64,
        scratch_mib: 0,
    };
    assert_eq!(driver.refusal(refused), Some(&Refusal::TooLarge { largest }));
}

#[test]
fn concurrency_and_places_in_line_are_as_they_are_now() {
    let mut driver = Driver::warm(rules());
    driver.limit("a", |limits| (limits.concurrency, limits.waiting) = (1, 2));
    let requests: Vec<_> = (0..3).map(|_| driver.request(demand("a", "f", 1, SMALL)).0).collect();
    let used = driver.world().account_use("a");
    assert_eq!((used.running, used.waiting), (1, 2));
    // Those that wait stay, and no other comes to it.
    driver.limit("a", |limits| limits.waiting = 0);
    let (refused, _) = driver.request(demand("a", "f", 1, SMALL));
    assert_eq!(driver.refusal(refused), Some(&Refusal::AccountQueueFull { limit: 0 }));
    assert_eq!(driver.world().account_use("a").waiting, 2);
    let decisions = driver.limit("a", |limits| limits.concurrency = 2);
    assert!(matches!(source(&decisions), Some(Reason::RoomInMachine { .. })));
    let used = driver.world().account_use("a");
    assert_eq!((used.running, used.waiting), (2, 1));
    driver.settle();
    assert!(requests.iter().all(|request| driver.refusal(*request).is_none()));
}

#[test]
fn a_share_is_of_contended_cpus_and_of_machines() {
    let mut driver = running(2);
    let weights = |driver: &Driver| driver.world().machines().map(|machine| machine.weight).sum::<u32>();
    let load = driver.world().load("a");
    assert_eq!(weights(&driver), 2 * 488, "each 2000 of 4096");
    let decisions = driver.limit("a", |limits| limits.share = 4);
    let weighed = decisions
        .iter()
        .filter(|decision| matches!(decision.command, Command::WeighMachine { .. }));
    assert_eq!(weighed.count(), 2);
    assert_eq!((weights(&driver), driver.world().load("a")), (2 * 1953, load / 4));
    assert_eq!(driver.limit("a", |limits| limits.share = 4).len(), 1, "it has it");
}

#[test]
fn what_can_not_be_changes_nothing_and_who_has_nothing_may_have_limits() {
    let mut driver = running(1);
    for zero in [
        driver.limit("a", |limits| limits.machines = 0),
        driver.limit("a", |limits| limits.concurrency = 0),
        driver.limit("a", |limits| limits.share = 0),
    ] {
        assert_eq!(zero, []);
    }
    assert_eq!(driver.world().rules(), &cold());
    driver.limit("b", |limits| limits.machines = 1);
    assert_eq!(driver.world().rules().limits("b").machines, 1);
    assert_eq!(driver.world().accounts().count(), 1, "it has nothing");
    driver.limit("b", |limits| limits.machines = cold().default_limits.machines);
    assert!(driver.world().rules().account_limits.is_empty(), "as any other");
}

/// What `f` of `a` asks for, and what it turns out to need once it was killed.
const FIRST: (u32, u32) = (500, 300);
const DOUBLED: (u32, u32) = (500, 600);

fn auto() -> Demand {
    Demand {
        resize: Some(Arc::new(Resize {
            mode: ResizeMode::Auto,
            ..Resize::default()
        })),
        ..demand("a", "f", 1, FIRST)
    }
}

fn killed(amount: (u32, u32)) -> Sample {
    Sample {
        wall_ns: 1_000_000_000,
        cpu_ns: 1,
        throttled_ns: 0,
        wait_ns: 0,
        memory_peak_bytes: u64::from(amount.1) << 20,
        oom_killed: true,
        amount: amount.into(),
    }
}

#[test]
fn what_was_determined_and_may_be_no_more_is_forgotten() {
    let mut driver = Driver::warm(Rules {
        warming: Default::default(),
        ..cold()
    });
    driver.request(auto());
    driver.boot_all();
    let container = *driver.creating.first().unwrap();
    driver.step(Event::ContainerReady { container });
    let code: Code = driver.world().container(container).unwrap().kind.code;
    let decisions = driver.step(Event::Executed {
        container,
        code,
        sample: killed(FIRST),
    });
    let told = decisions.iter().any(
        |decision| matches!(decision.command, Command::Notify { notice } if matches!(notice.kind, NoticeKind::IncreaseBy(_))),
    );
    assert!(told, "{decisions:?}");
    assert_eq!(driver.world().amount_for(code), Some(DOUBLED.into()));
    driver.complete(container, Completion::Ended);
    // A machine that could hold it is more than the account may have by now.
    driver.limit("a", |limits| limits.memory_mib = 600);
    let (request, decisions) = driver.request(auto());
    assert_eq!(driver.world().amount_for(code), None);
    assert!(source(&decisions).is_some() && driver.refusal(request).is_none());
    let container = *driver.creating.first().unwrap();
    assert_eq!(driver.world().container(container).unwrap().kind.amount, FIRST.into());
}

#[test]
fn what_ran_with_more_than_may_be_now_determines_nothing_that_may_not() {
    let mut driver = Driver::new(cold());
    driver.request(auto());
    driver.boot_all();
    let container = *driver.creating.first().unwrap();
    driver.step(Event::ContainerReady { container });
    let code: Code = driver.world().container(container).unwrap().kind.code;
    // Less than any machine has.
    driver.limit("a", |limits| limits.memory_mib = 400);
    let decisions = driver.step(Event::Executed {
        container,
        code,
        sample: killed(FIRST),
    });
    let set = decisions
        .iter()
        .any(|decision| matches!(decision.command, Command::SetAmount { .. }));
    assert!(!set, "{decisions:?}");
    assert_eq!(driver.world().amount_for(code), None);
    driver.settle();
}
