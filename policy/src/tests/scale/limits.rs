//! What an account may have changes while machines that it launched run.

use super::super::driver::Driver;
use super::super::{SMALL, demand};
use super::run::Run;
use super::{grow, host, launch, of_memory};
use crate::scale::{LaunchError, Obstacle, Part, ResizeError, Resource, SizeChange};
use crate::{Command, MachineState};

fn vcpus(n: u32) -> SizeChange {
    SizeChange {
        vcpus: Some(n),
        ..SizeChange::default()
    }
}

fn memory(mib: u32) -> SizeChange {
    SizeChange {
        memory_mib: Some(mib),
        ..SizeChange::default()
    }
}

#[test]
fn each_limit_keeps_it_from_a_launch() {
    for (part, needs, left) in [
        (Part::Machines, 1, 0),
        (Part::Memory, 512, 256),
        (Part::Cpu, 2000, 1000),
    ] {
        let mut driver = Driver::new(host());
        let first = driver.launch("a", launch(2, 512)).unwrap();
        driver.limit("a", |limits| match part {
            Part::Machines => limits.machines = 1,
            Part::Memory => limits.memory_mib = 768,
            _ => limits.cpu_millis = 3000,
        });
        let refused = driver.launch("a", launch(2, 512)).unwrap_err();
        assert_eq!(refused, LaunchError::Account { part, needs, left });
        assert_eq!(driver.world().machine(first).unwrap().state, MachineState::Booting);
        driver.limit("a", |limits| *limits = host().default_limits);
        driver.launch("a", launch(2, 512)).unwrap();
    }
}

#[test]
fn with_more_than_it_may_have_it_can_grow_in_nothing_that_is_over_and_shrink_in_all() {
    let mut run = Run::new(host(), launch(4, 1024), &[]);
    run.seconds(2);
    run.driver.limit("a", |limits| {
        (limits.cpu_millis, limits.memory_mib) = (2000, 1200);
    });
    run.seconds(2);
    assert_eq!(run.vcpus(), [], "nothing is taken from it");
    let refused = run.driver.world().resize_for(run.machine, vcpus(5)).unwrap_err();
    assert_eq!(
        refused,
        ResizeError::Obstacle {
            resource: Resource::Vcpus,
            wanted: 5,
            obstacle: Obstacle::Account(4)
        }
    );
    // Of memory it has less than it may.
    let refused = run.driver.world().resize_for(run.machine, memory(1202)).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "memory can't be 1202 MiB: the limits of its account leave it 1200 MiB"
    );
    run.resize(memory(1200));
    assert_eq!(run.asked().memory_mib, 1200);
    run.seconds(2);
    run.resize(vcpus(3));
    assert_eq!(run.asked().vcpus, 3);
}

#[test]
fn thresholds_grow_it_as_far_as_its_account_may_go_now() {
    let specs = [grow(80.0), of_memory(grow(80.0), 256)];
    let mut run = Run::new(host(), launch(1, 512), &specs);
    run.driver.limit("a", |limits| {
        (limits.cpu_millis, limits.memory_mib) = (2000, 768);
    });
    (run.wants_millis, run.wants_mib) = (9000, 9000);
    run.seconds(60);
    assert_eq!((run.asked().vcpus, run.asked().memory_mib), (2, 768));
    let kept = run.kept();
    for words in ["leave it 2 vCPUs", "leave it 768 MiB"] {
        assert!(kept.iter().any(|said| said.ends_with(words)), "{kept:?}");
    }
    run.driver.limit("a", |limits| limits.cpu_millis = 3000);
    run.seconds(30);
    assert_eq!(run.asked().vcpus, 3);
    run.driver.limit("a", |limits| limits.cpu_millis = 1000);
    let before = run.told.len();
    run.seconds(60);
    let resized = run.told[before..]
        .iter()
        .any(|(_, decision)| matches!(decision.command, Command::ResizeMachine { .. }));
    assert!(!resized, "it is left what it has");
}

#[test]
fn functions_and_machines_have_one_limit() {
    let mut driver = Driver::new(host());
    driver.request(demand("a", "f", 1, SMALL));
    driver.boot_all();
    driver.limit("a", |limits| limits.cpu_millis = 3000);
    assert!(
        driver.launch("a", launch(2, 512)).is_err(),
        "functions have two of three"
    );
    driver.launch("a", launch(1, 512)).unwrap();
    driver.limit("a", |limits| limits.cpu_millis = 4000);
    let before = driver.world().account_use("a");
    assert_eq!((before.machines, before.launched, before.cpu_millis), (2, 1, 3000));
    // A second machine of functions needs two.
    for _ in 0..12 {
        driver.request(demand("a", "f", 1, SMALL));
    }
    driver.boot_all();
    assert_eq!(driver.world().account_use("a").machines, 2);
    driver.limit("a", |limits| limits.cpu_millis = 5000);
    driver.boot_all();
    assert_eq!(driver.world().account_use("a").machines, 3);
}
