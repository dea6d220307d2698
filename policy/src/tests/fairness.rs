//! Accounts that contend.

use std::time::Duration;

use super::driver::{Driver, End, commands};
use super::{SMALL, demand, rules};
use crate::{AccountLimits, Command, Completion, MachineState, Reason, Refusal, Rules};

fn contended() -> Rules {
    Rules {
        queue_limit: 100,
        warming: Default::default(),
        ..rules()
    }
}

fn limits() -> AccountLimits {
    rules().default_limits
}

fn with_limits(account: &str, limits: AccountLimits) -> Rules {
    Rules {
        account_limits: [(account.into(), limits)].into(),
        ..contended()
    }
}

fn machines(driver: &Driver, account: &str) -> usize {
    let of = driver
        .world()
        .machines()
        .filter(|m| m.account.as_deref() == Some(account));
    of.filter(|m| m.state != MachineState::Stopping).count()
}

#[test]
fn an_account_runs_no_more_than_it_may_and_the_rest_wait() {
    let limited = with_limits(
        "a",
        AccountLimits {
            concurrency: 2,
            waiting: 2,
            ..limits()
        },
    );
    let mut driver = Driver::warm(Rules {
        warming: rules().warming,
        ..limited
    });
    let requests: Vec<_> = (0..5).map(|_| driver.request(demand("a", "f", 1, SMALL)).0).collect();
    assert_eq!(
        driver.refusal(requests[4]),
        Some(&Refusal::AccountQueueFull { limit: 2 })
    );
    driver.settle();
    for request in &requests[..4] {
        assert_eq!(driver.ended[request], End::Answered);
    }
    assert!(driver.world().containers().count() <= 2);
}

#[test]
fn an_account_has_no_more_machines_than_it_may() {
    let mut driver = Driver::new(with_limits(
        "a",
        AccountLimits {
            machines: 1,
            ..limits()
        },
    ));
    let requests: Vec<_> = (0..6)
        .map(|_| driver.request(demand("a", "f", 1, (1000, 200))).0)
        .collect();
    driver.boot_all();
    assert_eq!(
        (machines(&driver, "a"), driver.world().machines().count()),
        (1, 1),
        "none is booted for it"
    );
    driver.settle();
    assert!(requests.iter().all(|request| driver.ended[request] == End::Answered));
}

#[test]
fn machines_that_become_ready_go_to_the_account_with_the_least() {
    let mut driver = Driver::new(contended());
    for _ in 0..20 {
        driver.request(demand("flood", "f", 1, (1000, 200)));
    }
    let (other, _) = driver.request(demand("b", "f", 1, SMALL));
    driver.boot_all();
    assert_eq!(machines(&driver, "b"), 1);
    assert!(!driver.ended.contains_key(&other));
    assert_eq!(driver.world().waiting(), 20 - 2 * 3);
}

#[test]
fn a_share_of_two_gets_twice_the_machines() {
    let rules = Rules {
        max_machines: 6,
        host_memory_mib: 6 * 512,
        ..with_limits(
            "twice",
            AccountLimits {
                share: 2,
                machines: 6,
                memory_mib: 6 * 512,
                ..limits()
            },
        )
    };
    let mut driver = Driver::new(Rules {
        default_limits: AccountLimits {
            machines: 6,
            memory_mib: 6 * 512,
            ..limits()
        },
        ..rules
    });
    for _ in 0..15 {
        driver.request(demand("once", "f", 1, (1000, 200)));
        driver.request(demand("twice", "f", 1, (1000, 200)));
    }
    driver.boot_all();
    assert_eq!((machines(&driver, "once"), machines(&driver, "twice")), (2, 4));
}

#[test]
fn a_flood_takes_no_idle_machine_of_an_account_that_has_less() {
    let mut driver = Driver::new(contended());
    driver.request(demand("quiet", "f", 1, SMALL));
    driver.settle();
    for _ in 0..30 {
        driver.request(demand("flood", "f", 1, (1000, 200)));
    }
    driver.boot_all();
    assert_eq!((machines(&driver, "quiet"), machines(&driver, "flood")), (1, 3));
    let quiet = driver
        .world()
        .containers()
        .find(|c| c.kind.amount.cpu_millis == 250)
        .unwrap()
        .id;
    assert_eq!(driver.serve(demand("quiet", "f", 1, SMALL)), quiet, "still warm");
}

#[test]
fn an_account_without_a_machine_gets_one_of_those_that_have_many() {
    let mut driver = Driver::new(contended());
    let flood: Vec<_> = (0..30)
        .map(|_| driver.request(demand("flood", "f", 1, (1000, 200))).0)
        .collect();
    driver.boot_all();
    while let Some(container) = driver.creating.first().copied() {
        driver.step(crate::Event::ContainerReady { container });
    }
    assert_eq!(machines(&driver, "flood"), 4);
    let (other, decisions) = driver.request(demand("b", "f", 1, SMALL));
    let [Command::CloseMachine { machine }] = commands(&decisions)[..] else {
        panic!("{decisions:?}");
    };
    let machine = *machine;
    assert!(decisions.iter().any(|d| matches!(
        d.reason,
        Reason::Share {
            has_mib: 0,
            other_has_mib: 2048,
            ..
        }
    )));
    // What runs in it is finished, and nothing more begins there.
    let inside: Vec<_> = driver
        .world()
        .machine(machine)
        .unwrap()
        .containers
        .iter()
        .copied()
        .collect();
    for container in inside {
        let decisions = driver.complete(container, Completion::Answered);
        assert!(decisions.iter().all(|d| !matches!(d.command, Command::Dispatch { .. })));
    }
    assert!(driver.destroying.contains(&machine));
    driver.settle();
    assert_eq!(driver.ended[&other], End::Answered);
    assert!(flood.iter().all(|request| driver.ended[request] == End::Answered));
}

#[test]
fn a_full_queue_refuses_the_youngest_of_the_account_with_the_most() {
    let mut driver = Driver::new(Rules {
        queue_limit: 10,
        ..contended()
    });
    let flood: Vec<_> = (0..10)
        .map(|_| driver.request(demand("flood", "f", 1, SMALL)).0)
        .collect();
    let (other, _) = driver.request(demand("b", "f", 1, SMALL));
    assert_eq!(driver.refusal(other), None);
    assert_eq!(driver.refusal(flood[9]), Some(&Refusal::QueueFull { waiting: 10 }));
    let (more, _) = driver.request(demand("flood", "f", 1, SMALL));
    assert_eq!(driver.refusal(more), Some(&Refusal::QueueFull { waiting: 10 }));
    driver.later(Duration::from_secs(1));
    driver.settle();
    assert_eq!(driver.ended[&other], End::Answered);
}
