//! What keeps a request waiting, or lets an account have more than its part, though nothing need.

use proptest::prelude::*;

use super::driver::{Driver, End, commands};
use super::{LARGE, SECOND, SMALL, cold, demand, rules, uid};
use crate::{AccountLimits, Command, Completion, ContainerFailure, Event, Refusal, Rules};

fn limited(account: &str, change: impl Fn(&mut AccountLimits)) -> Rules {
    let mut limits = rules().default_limits;
    change(&mut limits);
    Rules {
        account_limits: [(account.into(), limits)].into(),
        ..cold()
    }
}

fn ready_all(driver: &mut Driver) {
    driver.boot_all();
    while let Some(container) = driver.creating.first().copied() {
        driver.step(Event::ContainerReady { container });
    }
}

#[test]
fn a_container_goes_to_the_oldest_that_waits_for_its_kind() {
    let mut driver = Driver::new(Rules {
        max_machines: 1,
        ..limited("a", |l| l.concurrency = 2)
    });
    let big = (1500, 400);
    let first = driver.request(demand("a", "f", 1, big)).0;
    ready_all(&mut driver);
    let waits = driver.request(demand("a", "f", 1, big)).0;
    let younger = driver.request(demand("a", "f", 1, big)).0;
    let container = *driver.running.first_key_value().unwrap().0;
    assert_eq!(driver.running[&container], first);
    driver.complete(container, Completion::Answered);
    assert_eq!(driver.running[&container], waits, "not {younger}");
}

#[test]
fn what_is_not_begun_before_its_function_is_deleted_never_runs() {
    let mut driver = Driver::warm(rules());
    let (request, container) = driver.start(demand("a", "f", 1, SMALL));
    driver.step(Event::FunctionDeleted { uid: uid("a", "f") });
    driver.complete(container, Completion::NotBegun);
    assert_eq!(driver.refusal(request), Some(&Refusal::FunctionDeleted));
}

#[test]
fn what_is_not_begun_before_its_caller_leaves_never_runs() {
    let mut driver = Driver::warm(rules());
    let (request, container) = driver.start(demand("a", "f", 1, SMALL));
    driver.step(Event::CallerLeft { request });
    driver.complete(container, Completion::NotBegun);
    assert_eq!(driver.refusal(request), Some(&Refusal::CallerLeft));
}

#[test]
fn machines_that_boot_for_large_requests_count_towards_the_limit() {
    let mut driver = Driver::new(Rules {
        concurrent_boots: 10,
        host_memory_mib: 8192,
        ..limited("a", |l| l.machines = 1)
    });
    for _ in 0..4 {
        driver.request(demand("a", "f", 1, LARGE));
    }
    assert_eq!(driver.booting.len(), 1);
}

#[test]
fn large_requests_of_a_limited_account_hide_no_other() {
    let mut driver = Driver::new(Rules {
        concurrent_boots: 10,
        host_memory_mib: 8192,
        max_machines: 8,
        ..limited("a", |l| l.machines = 1)
    });
    driver.request(demand("a", "f", 1, LARGE));
    ready_all(&mut driver);
    for _ in 0..40 {
        driver.request(demand("a", "f", 1, LARGE));
    }
    let b = driver.request(demand("b", "f", 1, LARGE)).0;
    ready_all(&mut driver);
    assert!(driver.running.values().any(|r| *r == b));
}

#[test]
fn a_large_request_runs_once_its_limits_allow_the_machine() {
    let mut driver = Driver::warm(Rules {
        warming: rules().warming,
        ..limited("a", |l| l.machines = 1)
    });
    let large = driver.request(demand("a", "f", 1, LARGE)).0;
    driver.serve(demand("a", "g", 1, SMALL));
    driver.boot_all();
    driver.settle();
    driver.later(SECOND);
    driver.settle();
    assert_eq!(driver.ended.get(&large), Some(&End::Answered));
}

#[test]
fn two_floods_share_the_host_evenly() {
    let mut driver = Driver::new(cold());
    for _ in 0..20 {
        driver.request(demand("a", "f", 1, (1000, 200)));
    }
    ready_all(&mut driver);
    let mut closed = 0;
    for _ in 0..20 {
        let (_, decisions) = driver.request(demand("b", "f", 1, (1000, 200)));
        closed += commands(&decisions)
            .iter()
            .filter(|c| matches!(c, Command::CloseMachine { .. }))
            .count();
    }
    assert_eq!(closed, 2);
}

#[test]
fn a_large_request_is_served_on_a_host_full_of_another_account() {
    let mut driver = Driver::new(cold());
    for _ in 0..60 {
        driver.request(demand("flood", "f", 1, (1000, 200)));
    }
    ready_all(&mut driver);
    let large = driver.request(demand("b", "f", 1, LARGE)).0;
    for _ in 0..20 {
        driver.later(SECOND / 10);
        let running: Vec<_> = driver.running.keys().copied().collect();
        for container in running {
            if driver.running.contains_key(&container) {
                driver.complete(container, Completion::Answered);
            }
            driver.request(demand("flood", "f", 1, (1000, 200)));
        }
        while let Some(machine) = driver.destroying.first().copied() {
            driver.step(Event::MachineEnded { machine });
        }
        ready_all(&mut driver);
    }
    assert!(driver.ended.contains_key(&large) || driver.running.values().any(|r| *r == large));
}

#[test]
fn a_request_lost_on_the_only_machine_gets_another() {
    let mut driver = Driver::new(limited("a", |l| l.machines = 1));
    driver.request(demand("a", "g", 1, SMALL));
    driver.settle();
    let (request, _) = driver.request(demand("a", "f", 1, SMALL));
    let container = *driver.creating.first().unwrap();
    driver.step(Event::ContainerFailed {
        container,
        failure: ContainerFailure::Lost,
    });
    driver.settle();
    assert_eq!(driver.ended.get(&request), Some(&End::Answered));
}

#[test]
fn one_that_has_much_gives_up_its_own_machines_first() {
    let mut driver = Driver::new(cold());
    driver.request(demand("victim", "f", 1, SMALL));
    driver.settle();
    driver.later(SECOND);
    for _ in 0..3 {
        driver.request(demand("hog", "f", 1, (2000, 400)));
    }
    driver.settle();
    driver.later(SECOND);
    assert_eq!(driver.world().machines().count(), 4);
    driver.request(demand("hog", "f", 1, LARGE));
    driver.settle();
    assert!(
        driver
            .world()
            .machines()
            .any(|m| m.account.as_deref() == Some("victim")),
        "taken"
    );
}

#[test]
fn limited_accounts_hide_no_other() {
    let named = rules().default_limits;
    let mut driver = Driver::new(Rules {
        max_machines: 100,
        host_memory_mib: 51200,
        host_cpu_millis: 1_000_000,
        host_baseline_millis: 100_000,
        concurrent_boots: 100,
        queue_limit: 1000,
        default_limits: AccountLimits {
            machines: 1,
            ..named.clone()
        },
        account_limits: [(
            "b".into(),
            AccountLimits {
                machines: 10,
                memory_mib: 51200,
                ..named
            },
        )]
        .into(),
        ..cold()
    });
    for n in 0..40 {
        let name = format!("acc{n}");
        for _ in 0..2 {
            driver.request(demand(&name, "f", 1, (2000, 400)));
        }
    }
    ready_all(&mut driver);
    driver.request(demand("b", "f", 1, (2000, 400)));
    ready_all(&mut driver);
    driver.request(demand("b", "f", 1, (2000, 400)));
    ready_all(&mut driver);
    let r = driver.request(demand("b", "f", 1, (2000, 400))).0;
    ready_all(&mut driver);
    assert!(driver.running.values().any(|x| *x == r));
}

#[test]
fn only_what_runs_counts_towards_the_concurrency() {
    let mut driver = Driver::new(Rules {
        max_machines: 2,
        ..limited("a", |l| l.concurrency = 2)
    });
    driver.request(demand("b", "f", 1, SMALL));
    driver.request(demand("a", "f", 1, SMALL));
    ready_all(&mut driver);
    assert_eq!(driver.running.len(), 2);
    // The host has no room for those: they wait, and run nothing.
    for _ in 0..2 {
        driver.request(demand("a", "g", 1, LARGE));
    }
    let small = driver.request(demand("a", "h", 1, SMALL)).0;
    ready_all(&mut driver);
    assert!(driver.running.values().any(|r| *r == small), "one of two");
    let over = driver.request(demand("a", "h", 1, SMALL)).0;
    ready_all(&mut driver);
    assert!(!driver.running.values().any(|r| *r == over), "it would be the third");
    assert_eq!(driver.world().waiting(), 3);
    let container = *driver.running.iter().find(|(_, r)| **r == small).unwrap().0;
    driver.complete(container, Completion::Answered);
    assert_eq!(driver.running[&container], over);
}

#[test]
fn the_oldest_gets_the_next_place_of_an_account_that_runs_all_it_may() {
    let mut driver = Driver::new(limited("a", |l| l.concurrency = 1));
    driver.request(demand("a", "f", 1, SMALL));
    ready_all(&mut driver);
    let container = *driver.running.first_key_value().unwrap().0;
    let older = driver.request(demand("a", "g", 1, SMALL)).0;
    let younger = driver.request(demand("a", "f", 1, SMALL)).0;
    driver.complete(container, Completion::Answered);
    ready_all(&mut driver);
    assert!(driver.running.values().any(|r| *r == older), "not {younger}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Accounts of several shares and limits want more of two runtimes than the host has; all that is begun is finished.
    #[test]
    fn all_that_may_wait_are_served(
        wanted in prop::collection::vec((0..4_u8, 0..3_u8, 0..4_usize, any::<bool>(), 0..3_u8), 1..40),
        machines in 1..4_u32,
        concurrency in 1..6_u32,
        share in 1..4_u32,
        max_machines in 1..5_usize,
    ) {
        let limits = AccountLimits { machines, concurrency, share, ..rules().default_limits };
        let mut driver = Driver::new(Rules {
            max_machines,
            account_limits: [("account1".into(), limits)].into(),
            ..cold()
        });
        let amounts = [SMALL, (500, 200), (2000, 448), LARGE];
        let mut requests = Vec::new();
        for (account, function, amount, other, steps) in wanted {
            let mut of = demand(&format!("account{account}"), &format!("function{function}"), 1, amounts[amount]);
            if other {
                of.runtime = "nodejs20.x".into();
                of.kinds[0].code.version = 2;
            }
            requests.push(driver.request(of).0);
            for _ in 0..steps {
                ready_all(&mut driver);
            }
        }
        driver.settle();
        for request in requests {
            prop_assert_eq!(driver.ended.get(&request), Some(&End::Answered));
        }
    }
}
