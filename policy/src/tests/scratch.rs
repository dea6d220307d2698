//! Machines' drives, and what the host's disk has for them.

use std::time::Duration;

use super::driver::{Driver, End, commands, source};
use super::simulation::Simulation;
use super::{RUNTIME, SECOND, cold, demand, kind, rules, with_drives};
use crate::{
    ApplyError, Command, Completion, ContainerId, Decision, Event, FoundContainer, Host, Ids, MachineId, MachineState,
    Now, Purpose, Reason, Refusal, RequestId, Rules, Shape,
};

/// So much of the host's disk for drives of 1 GiB, and none is booted ahead of requests.
fn disk(host_scratch_mib: u64) -> Rules {
    Rules {
        host_scratch_mib,
        ..with_drives(cold())
    }
}

/// The drive that the container of a request is made on, where one is made.
fn drive(decisions: &[Decision]) -> Option<u32> {
    decisions.iter().find_map(|decision| match decision.command {
        Command::CreateContainer { drive_mib, .. } => Some(drive_mib),
        _ => None,
    })
}

/// How large the drives are of all machines that boot.
fn booted(decisions: &[Decision]) -> Vec<u32> {
    let booted = decisions.iter().filter_map(|decision| match decision.command {
        Command::BootMachine { shape, .. } => Some(shape.drive_mib),
        _ => None,
    });
    booted.collect()
}

fn machine(n: u128) -> MachineId {
    MachineId(ulid::Ulid(n))
}

impl Driver {
    fn drive_of(&self, container: ContainerId) -> u32 {
        self.world()
            .machine(self.machine_of(container))
            .unwrap()
            .shape
            .drive_mib
    }
}

#[test]
fn a_drive_grows_by_what_is_missing_and_never_shrinks() {
    let mut driver = Driver::warm(with_drives(rules()));
    let of = |function| demand("a", function, 1, (100, 50, 500));
    assert_eq!(drive(&driver.request(of("f")).1), Some(1024), "960 MiB were free");
    assert_eq!(drive(&driver.request(of("g")).1), Some(1064));
    assert_eq!(drive(&driver.request(of("h")).1), Some(1564));
    driver.settle();
    // They are idle, and end.
    driver.later(Duration::from_secs(60));
    driver.settle();
    assert!(driver.world().containers().next().is_none());
    assert_eq!(drive(&driver.request(of("f")).1), Some(1564));
    // Each knows what there is: two machines of 1024 beside it.
    assert_eq!(driver.world().free().scratch_mib, 8192 - 1564 - 1024);
}

#[test]
fn a_machine_of_the_warming_pool_grows_for_who_gets_it() {
    let mut driver = Driver::warm(with_drives(rules()));
    let (_, decisions) = driver.request(demand("a", "f", 1, (100, 50, 2000)));
    assert!(matches!(source(&decisions), Some(Reason::WarmingMachine { .. })));
    assert_eq!(drive(&decisions), Some(2064));
}

#[test]
fn a_machine_is_booted_with_the_drive_that_its_request_needs() {
    let mut driver = Driver::new(disk(8192));
    let (large, decisions) = driver.request(demand("a", "f", 1, (100, 50, 2000)));
    let (small, more) = driver.request(demand("a", "g", 1, (100, 50, 900)));
    assert_eq!((booted(&decisions), booted(&more)), (vec![2064], vec![1024]));
    driver.settle();
    for request in [large, small] {
        assert_eq!(driver.ended.get(&request), Some(&End::Answered));
    }
}

#[test]
fn what_fits_into_no_drive_is_refused_at_once() {
    for (host, most) in [(8192, 4096 - 64), (3000, 3000 - 64)] {
        let mut driver = Driver::new(disk(host));
        let (fits, _) = driver.request(demand("a", "f", 1, (100, 50, most)));
        assert_eq!(driver.refusal(fits), None);
        let (refused, _) = driver.request(demand("a", "f", 1, (100, 50, most + 1)));
        let Some(Refusal::TooLarge { largest }) = driver.refusal(refused) else {
            panic!("it waits");
        };
        assert_eq!(largest.scratch_mib, most);
        let says = Refusal::TooLarge { largest: *largest }.to_string();
        assert!(says.contains(&format!("and {most} MiB of scratch disk")), "{says}");
    }
}

#[test]
fn who_lacks_disk_alone_goes_on_where_a_container_of_its_machine_ends() {
    let mut driver = Driver::new(Rules {
        max_machines: 1,
        ..disk(1100)
    });
    let (first, _) = driver.request(demand("a", "f", 1, (100, 50, 900)));
    driver.boot_all();
    let container = *driver.creating.first().unwrap();
    driver.step(Event::ContainerReady { container });
    let (second, decisions) = driver.request(demand("a", "g", 1, (100, 50, 900)));
    assert_eq!(source(&decisions), None, "76 MiB are free for the drive");
    driver.complete(container, Completion::Ended);
    assert!(driver.ended.contains_key(&first));
    let made = *driver.creating.first().unwrap();
    assert_eq!(driver.machine_of(made), driver.machine_of_first());
    driver.settle();
    assert_eq!(driver.ended.get(&second), Some(&End::Answered));
}

#[test]
fn who_lacks_disk_alone_goes_on_in_its_machine_where_another_machine_ends() {
    let mut driver = Driver::new(disk(2100));
    let (_, a) = {
        driver.request(demand("a", "f", 1, (100, 50, 900)));
        driver.boot_all();
        started(&mut driver)
    };
    driver.request(demand("b", "f", 1, (100, 50, 900)));
    driver.boot_all();
    let (_, b) = started(&mut driver);
    // It needs no machine, and the host has memory for more of them.
    let (waits, decisions) = driver.request(demand("a", "g", 1, (100, 50, 900)));
    assert_eq!((source(&decisions), booted(&decisions)), (None, vec![]));
    let of_b = driver.machine_of(b);
    driver.complete(b, Completion::Ended);
    driver.settle_machine(of_b);
    let made = *driver.creating.first().unwrap();
    assert_eq!(driver.machine_of(made), driver.machine_of(a));
    assert_eq!(driver.drive_of(a), 1024 + 840);
    assert!(!driver.ended.contains_key(&waits));
    driver.settle();
    assert_eq!(driver.ended.get(&waits), Some(&End::Answered));
}

#[test]
fn who_waits_for_disk_goes_on_once_others_have_ended() {
    let mut driver = Driver::new(Rules {
        host_scratch_mib: 3072,
        ..with_drives(rules())
    });
    for account in ["a", "b"] {
        driver.boot_all();
        driver.serve(demand(account, "f", 1, (100, 50, 900)));
    }
    driver.boot_all();
    let (waits, decisions) = driver.request(demand("c", "f", 1, (100, 50, 1500)));
    assert_eq!(source(&decisions), None, "540 MiB more are needed");
    // Of 1564 MiB that are needed in all.
    assert_eq!(driver.destroying.len(), 2);
    driver.settle();
    assert_eq!(driver.ended.get(&waits), Some(&End::Answered));
}

#[test]
fn idle_machines_are_given_up_for_their_disk() {
    let mut driver = Driver::new(disk(2100));
    for account in ["a", "b"] {
        driver.request(demand(account, "f", 1, (100, 50, 900)));
        driver.settle();
    }
    let (request, decisions) = driver.request(demand("c", "f", 1, (100, 50, 1500)));
    let destroyed = commands(&decisions)
        .iter()
        .filter(|command| matches!(command, Command::DestroyMachine { .. }))
        .count();
    assert_eq!(destroyed, 2, "one of them has 1024 MiB");
    driver.settle();
    assert_eq!(driver.ended.get(&request), Some(&End::Answered));
}

#[test]
fn drives_that_grow_do_not_take_what_others_wait_for() {
    // One account fills the host's disk with ever more in its machine; another has none and waits for the first to give way.
    let mut simulation = Simulation::new(Rules {
        account_limits: Default::default(),
        queue_limit: 1000,
        ..disk(4096)
    });
    for n in 0..8 {
        simulation.caller(demand("greedy", &format!("f{n}"), 1, (100, 30, 700)), 300);
    }
    simulation.run_until(5 * SECOND);
    simulation.caller(demand("modest", "f", 1, (100, 50, 2000)), 100);
    simulation.run_until(60 * SECOND);
    let waited = simulation.waited.iter().filter(|(id, _)| {
        let of = &simulation.driver.demands[*id];
        &*of.account == "modest"
    });
    let waited: Vec<_> = waited.map(|(_, waited)| *waited).collect();
    assert!(waited.len() > 10, "{waited:?}");
    assert!(waited.iter().all(|waited| *waited < 15 * SECOND), "{waited:?}");
}

#[test]
fn room_that_is_kept_for_a_request_has_its_disk_too() {
    // Small ones come and go all the time; a large one of the same account is to have its place.
    let mut simulation = Simulation::new(Rules {
        max_machines: 1,
        queue_limit: 1000,
        ..disk(2500)
    });
    for n in 0..6 {
        simulation.caller(demand("a", &format!("f{n}"), 1, (300, 50, 300)), 50 + 7 * n);
    }
    simulation.run_until(5 * SECOND);
    let request = simulation.request(demand("a", "large", 1, (1000, 300, 2000)), SECOND);
    simulation.run_until(20 * SECOND);
    assert_eq!(simulation.driver.ended.get(&request), Some(&End::Answered));
}

#[test]
fn a_machine_without_a_drive_holds_what_needs_none() {
    let mut driver = Driver::new(disk(8192));
    let old = Shape {
        drive_mib: 0,
        ..driver.world().rules().standard
    };
    let idle = FoundContainer {
        container: ContainerId(ulid::Ulid(9)),
        kind: kind("a", "f", 1, (100, 50)),
        created: Duration::ZERO,
        request: None,
    };
    driver.find(machine(1), old, Some("a"), vec![idle]);
    driver.adopt(machine(1));
    assert_eq!(driver.world().machine(machine(1)).unwrap().state, MachineState::Active);
    let (_, decisions) = driver.request(demand("a", "f", 1, (100, 50)));
    assert!(matches!(source(&decisions), Some(Reason::IdleContainer { .. })));
    let (_, decisions) = driver.request(demand("a", "g", 1, (100, 50, 500)));
    assert_eq!((source(&decisions), booted(&decisions)), (None, vec![1024]));
}

#[test]
fn more_than_the_host_has_is_found_and_none_is_added() {
    let mut driver = Driver::new(disk(4096));
    let large = |n: u128| {
        let shape = Shape {
            drive_mib: 4000,
            ..rules().standard
        };
        (machine(n), shape)
    };
    for n in [1, 2] {
        let (id, shape) = large(n);
        driver.find(id, shape, Some("a"), Vec::new());
    }
    driver.adopt_all();
    assert_eq!(driver.world().free().scratch_mib, 4096 - 8000);
    let (_, decisions) = driver.request(demand("a", "f", 1, (100, 50, 3936)));
    assert_eq!(drive(&decisions), Some(4000), "it has that already");
    let (waits, decisions) = driver.request(demand("a", "g", 1, (1000, 50, 3937)));
    assert_eq!(source(&decisions), None);
    driver.settle();
    assert_eq!(driver.ended.get(&waits), Some(&End::Answered), "once both are gone");
}

#[test]
fn no_drive_is_made_larger_than_it_may_be() {
    let mut driver = Driver::new(disk(4000));
    driver.request(demand("a", "f", 1, (100, 50, 900)));
    driver.boot_all();
    let (_, container) = started(&mut driver);
    let machine = driver.machine_of(container);
    let create = |drive_mib, scratch_mib| Command::CreateContainer {
        machine,
        container: ContainerId(ulid::Ulid(1)),
        kind: kind("a", "g", 1, (100, 50, scratch_mib)),
        drive_mib,
        purpose: Purpose::Ahead,
    };
    let apply = |command: &Command| driver.world().clone().apply(command);
    assert_eq!(apply(&create(4000, 3036)), Ok(()));
    for (command, lacks) in [
        (create(4001, 100), "room on the host's disk"),
        (create(4097, 100), "room for a larger drive"),
        (create(4000, 3037), "room in the machine"),
        (create(0, 100), "room in the machine"),
    ] {
        assert_eq!(apply(&command), Err(ApplyError::Room(lacks)));
    }
}

#[test]
fn rules_whose_drives_can_not_work_say_what_to_change() {
    let good = disk(2048);
    assert_eq!(good.check(), Ok(()));
    let refused = |change: fn(&mut Rules), says: &str| {
        let mut rules = good.clone();
        change(&mut rules);
        let error = rules.check().unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    };
    refused(|rules| rules.standard.drive_mib = 64, "raise [machines] scratch_mib");
    refused(|rules| rules.standard.drive_mib = 4097, "at most 4096 MiB");
    refused(|rules| rules.host_scratch_mib = 1023, "raise [pool] scratch_gib");
    refused(
        |rules| rules.warming = [(RUNTIME.into(), 3)].into(),
        "disk ([pool] scratch_gib, or half of what was free in [machines] scratch_dir) allows 2",
    );
}

#[test]
fn what_was_recorded_before_there_were_drives_is_decided_as_it_was() {
    // As an earlier agent wrote them.
    let rules = serde_json::to_value(rules()).unwrap();
    let without = |value: serde_json::Value| -> serde_json::Value {
        let text = value.to_string();
        let text = [
            "drive_mib",
            "scratch_mib",
            "drive_reserve_mib",
            "max_drive_mib",
            "host_scratch_mib",
        ]
        .iter()
        .fold(text, |text, field| {
            text.replace(&format!(",\"{field}\":0"), "")
                .replace(&format!("\"{field}\":0,"), "")
        });
        serde_json::from_str(&text).unwrap()
    };
    let earlier = without(rules);
    assert!(!earlier.to_string().contains("scratch_mib"), "{earlier}");
    let mut driver = Driver::warm(serde_json::from_value(earlier.clone()).unwrap());
    driver.serve(demand("a", "f", 1, super::SMALL));
    driver.request(demand("b", "f", 1, super::LARGE));
    driver.settle();
    let mut host = Host::new(serde_json::from_value(earlier).unwrap(), Ids::new(driver.seed));
    for line in &driver.record {
        let line = without(serde_json::to_value(line).unwrap());
        let (now, event, decisions): (Now, Event, Vec<Decision>) = serde_json::from_value(line).unwrap();
        assert_eq!(host.step(now, event), decisions);
    }
}

/// The request that starts, begun, and its container.
fn started(driver: &mut Driver) -> (RequestId, ContainerId) {
    let container = *driver.creating.first().unwrap();
    driver.step(Event::ContainerReady { container });
    (driver.running[&container], container)
}

impl Driver {
    fn machine_of_first(&self) -> MachineId {
        self.world().machines().map(|machine| machine.id).min().unwrap()
    }

    /// A machine that nobody uses ends.
    fn settle_machine(&mut self, machine: MachineId) {
        if !self.destroying.contains(&machine) {
            self.later(Duration::from_secs(120));
        }
        assert!(self.destroying.contains(&machine));
        self.step(Event::MachineEnded { machine });
    }
}
