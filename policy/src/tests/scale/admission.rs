//! What host and accounts have for machines that are launched, beside what functions have.

use stoker_credits::{Credits, Mode};

use super::super::driver::Driver;
use super::super::{RUNTIME, SECOND, SMALL, demand};
use super::run::Run;
use super::{checked, grow, host, launch, of_memory, with_limits};
use crate::scale::{Launch, LaunchError, Part, Size, SizeChange, SizeError};
use crate::{AccountLimits, Command, Event, MachineState, Refusal, Rules};

fn refused(driver: &mut Driver, account: &str, launch: Launch) -> String {
    driver.launch(account, launch).unwrap_err().to_string()
}

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
fn a_launch_has_what_it_needs_or_says_what_lacks() {
    let mut driver = Driver::new(with_limits(|limits| {
        (limits.machines, limits.cpu_millis, limits.memory_mib) = (2, 6000, 4096);
    }));
    assert_eq!(driver.world().ceiling_for("a"), Size::whole(6, 4096));
    driver.launch("a", launch(4, 1024)).unwrap();
    let cases = [
        (
            launch(3, 512),
            "it needs 3000 mCPU of vCPUs, and the limits of its account leave 2000",
        ),
        (
            launch(1, 4096),
            "it needs 4096 MiB of memory, and the limits of its account leave 3072",
        ),
        (launch(0, 512), "a machine needs some vCPUs"),
        (launch(1, 0), "a machine needs some memory"),
        (
            launch(9, 512),
            "9 vCPUs are more than the most that it may ever have, 8 vCPUs",
        ),
        (launch(1, 255), "memory goes in blocks of 2 MiB"),
        (
            launch(1, 254),
            "254 MiB are less than the 256 MiB that it is booted with",
        ),
    ];
    for (launch, words) in cases {
        let text = refused(&mut driver, "a", launch);
        assert!(text.starts_with(words), "{text}");
    }
    let high = Launch {
        ceiling: Size::whole(9, 8192),
        ..launch(1, 512)
    };
    assert!(refused(&mut driver, "a", high).contains("is more than the host allows, 8 vCPUs"));
    let base = Launch {
        base_mib: 64,
        ..launch(1, 512)
    };
    assert_eq!(
        refused(&mut driver, "a", base),
        "it can't be booted with 64 MiB: its kernel keeps 64 MiB for itself"
    );
    let machine = driver.launch("a", launch(2, 512)).unwrap();
    assert!(matches!(
        driver
            .world()
            .may_launch(crate::MachineId(ulid::Ulid(1)), "a", &launch(1, 256)),
        Err(LaunchError::Account {
            part: Part::Machines,
            needs: 1,
            left: 0
        })
    ));
    assert_eq!(
        driver.world().may_launch(machine, "a", &launch(1, 256)),
        Err(LaunchError::Exists)
    );
    // Others have what is left of the host.
    let all = Launch {
        ceiling: Size::whole(8, 16_384),
        ..launch(1, 14_850)
    };
    let rich = Rules {
        default_limits: AccountLimits {
            memory_mib: 100_000,
            ..host().default_limits
        },
        ..host()
    };
    let mut driver = Driver::new(rich);
    driver.launch("a", launch(4, 1600)).unwrap();
    assert_eq!(
        refused(&mut driver, "b", all),
        "it needs 14850 MiB of memory, and the host has 14784 left: end a machine, or ask for less"
    );
    driver.step(Event::Drain);
    assert_eq!(refused(&mut driver, "b", launch(1, 512)), "the agent is shutting down");
}

#[test]
fn limits_hold_over_functions_and_machines_together() {
    let mut driver = Driver::new(with_limits(|limits| {
        (limits.machines, limits.cpu_millis, limits.functions) = (3, 5000, 2);
    }));
    driver.launch("a", launch(2, 512)).unwrap();
    // Each machine of functions has two vCPUs.
    for _ in 0..12 {
        driver.request(demand("a", "f", 1, SMALL));
    }
    driver.boot_all();
    let of_a = |driver: &Driver| driver.world().machines().filter(|m| m.account.is_some()).count();
    assert_eq!(of_a(&driver), 2, "4 of 5 vCPUs");
    assert!(driver.world().waiting() > 0);
    assert!(refused(&mut driver, "a", launch(2, 512)).contains("leave 1000"));
    driver.launch("a", launch(1, 512)).unwrap();
    // A request that no machine within the limit could hold does not wait.
    let (request, _) = driver.request(demand("b", "f", 1, (6000, 128)));
    assert!(matches!(
        driver.refusal(request),
        Some(Refusal::TooLarge { largest }) if largest.cpu_millis == 4000 || largest.cpu_millis == 5000
    ));
    let limits = driver.world().rules().limits("a");
    assert!(limits.may_create_function(1).is_ok());
    assert_eq!(
        limits.may_create_function(2).unwrap_err().to_string(),
        "the account has 2 functions, and may have 2: delete one"
    );
}

#[test]
fn a_machine_grows_as_far_as_account_and_host_allow_and_says_so() {
    let by_3 = |spec| crate::scale::ThresholdSpec {
        change: crate::scale::ChangeSpec::By(3),
        ..spec
    };
    let limited = with_limits(|limits| limits.cpu_millis = 5000);
    let mut run = Run::new(limited, launch(1, 512), &[by_3(grow(80.0))]);
    run.driver.launch("a", launch(2, 512)).unwrap();
    run.wants_millis = 9000;
    run.seconds(30);
    assert_eq!(run.vcpus(), [(5, 3)], "a part of what it should have");
    let reasons = run.reasons(|command| matches!(command, Command::ResizeMachine { .. }));
    assert!(
        reasons[0].ends_with(
            "vCPUs from 1 vCPU to 3 vCPUs instead of 4 vCPUs, for the limits of its account leave it 3 vCPUs"
        )
    );
    assert!(
        run.kept()[0]
            .ends_with("vCPUs should be 6 vCPUs and stays 3 vCPUs, for the limits of its account leave it 3 vCPUs")
    );
    let refused = run.driver.world().resize_for(run.machine, vcpus(4)).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "vCPUs can't be 4 vCPUs: the limits of its account leave it 3 vCPUs"
    );

    let narrow = Rules {
        host_memory_mib: 2048,
        ..host()
    };
    let grows = of_memory(grow(80.0), 512);
    let mut run = Run::new(
        narrow,
        Launch {
            ceiling: Size::whole(8, 2048),
            ..launch(1, 1024)
        },
        &[grows],
    );
    run.driver
        .launch(
            "b",
            Launch {
                ceiling: Size::whole(1, 512),
                ..launch(1, 512)
            },
        )
        .unwrap();
    run.wants_mib = 2000;
    run.seconds(60);
    assert_eq!(run.asked().memory_mib, 1536);
    assert!(
        run.kept()[0].ends_with("for the host has room for 1536 MiB"),
        "{:?}",
        run.kept()
    );

    // The host's CPUs are promised to others.
    let promised = Rules {
        host_baseline_millis: 500,
        ..host()
    };
    let mut run = Run::new(promised, launch(1, 512), &[by_3(grow(80.0))]);
    run.driver.launch("b", launch(2, 512)).unwrap();
    run.wants_millis = 9000;
    run.seconds(30);
    assert_eq!(run.asked().vcpus, 3);
    assert!(run.kept()[0].ends_with("for the host's CPUs are promised to others, and leave it 3 vCPUs"));
}

#[test]
fn credits_go_with_the_vcpus_and_come_back_to_the_same() {
    let mut run = Run::new(host(), launch(3, 512), &[]);
    run.driver.run_until(run.driver.now);
    run.step(Event::PlanAsked {
        machine: run.machine,
        baseline_millis: Some(500),
        mode: Some(Mode::Unlimited),
        by: "someone".into(),
    });
    run.step(Event::CreditsGranted {
        machine: run.machine,
        credits: Credits::new(9),
        by: "someone".into(),
    });
    run.seconds(2);
    let plan = |run: &Run| run.machine().credits.as_ref().unwrap().plan;
    for (n, baseline_millis) in [(4, 666), (1, 166), (8, 1333), (7, 1166), (3, 500)] {
        let decisions = run.resize(vcpus(n));
        let rescaled = decisions
            .iter()
            .find(|d| matches!(d.command, Command::ChangePlan { .. }));
        assert!(
            rescaled
                .unwrap()
                .reason
                .to_string()
                .starts_with("its credits go with its vCPUs")
        );
        let plan = plan(&run);
        assert_eq!((plan.vcpus, plan.baseline_millis), (n, baseline_millis));
        assert_eq!(plan.mode, Mode::Unlimited, "it stays what it is");
        run.seconds(2);
        let account = run.driver.kernel.get(run.machine).unwrap().account;
        assert_eq!(
            account.launch_ps(),
            Credits::new(9).ps(),
            "a credit is the same on a machine of any size"
        );
    }
    assert_eq!(run.driver.world().used.baseline_millis, 500);
}

#[test]
fn nobody_takes_it_for_others_and_it_keeps_nobody_from_their_share() {
    // A host for four machines of functions.
    let narrow = Rules {
        host_memory_mib: 3072,
        ..host()
    };
    let mut driver = Driver::new(narrow);
    let ceiling = Size::whole(8, 2048);
    let machine = driver
        .launch(
            "a",
            Launch {
                ceiling,
                ..launch(2, 2048)
            },
        )
        .unwrap();
    driver.boot_all();
    // Account b has all that is left, and c wants some.
    for _ in 0..4 {
        driver.request(demand("b", "f", 1, (2000, 448)));
    }
    driver.boot_all();
    assert_eq!(driver.world().machines().count(), 3);
    driver.request(demand("c", "f", 1, (2000, 448)));
    driver.later(10 * SECOND);
    let state = |driver: &Driver, id| driver.world().machine(id).unwrap().state;
    assert_eq!(state(&driver, machine), MachineState::Active);
    let closing = driver.world().machines().filter(|m| m.state == MachineState::Closing);
    assert_eq!(closing.count(), 1, "b has most for its share, whatever was launched");
    driver.settle();
    assert_eq!(state(&driver, machine), MachineState::Active);
    assert_eq!(driver.ended.len(), 5);
    driver.later(3600 * SECOND);
    driver.settle();
    assert_eq!(
        state(&driver, machine),
        MachineState::Active,
        "and it is never idle for too long"
    );
}

#[test]
fn what_it_gives_back_goes_to_who_waits() {
    let narrow = Rules {
        host_memory_mib: 2048,
        ..host()
    };
    let mut run = Run::new(
        narrow,
        Launch {
            ceiling: Size::whole(8, 2048),
            ..launch(2, 1792)
        },
        &[],
    );
    run.seconds(2);
    let (request, _) = run.driver.request(demand("b", "f", 1, (2000, 448)));
    assert!(run.driver.booting.is_empty());
    run.takes = super::run::Takes::After(3 * SECOND);
    run.resize(memory(1024));
    run.seconds(2);
    assert!(run.driver.booting.is_empty(), "the guest has it still");
    run.seconds(2);
    assert_eq!(run.driver.booting.len(), 1);
    run.driver.settle();
    assert!(run.driver.ended.contains_key(&request));
    // And by its account's limits.
    let limited = with_limits(|limits| limits.memory_mib = 2048);
    let mut run = Run::new(limited, launch(2, 1792), &[]);
    run.seconds(2);
    run.driver.request(demand("a", "f", 1, (2000, 448)));
    assert!(run.driver.booting.is_empty());
    run.resize(memory(1024));
    run.second();
    assert_eq!(run.driver.booting.len(), 1);
}

#[test]
fn the_next_agent_goes_on_with_it() {
    let mut run = Run::new(host(), launch(1, 512), &[grow(80.0)]);
    run.wants_millis = 9000;
    run.takes = super::run::Takes::Never;
    run.seconds(7);
    assert_eq!((run.asked().vcpus, run.has.vcpus), (2, 1));
    run.driver.restart(host());
    assert_eq!(run.machine().state, MachineState::Found);
    assert_eq!(run.machine().shape.vcpus, 2, "it counts as written down");
    let (request, _) = run.driver.request(demand("a", "f", 1, SMALL));
    run.driver.boot_all();
    assert!(
        run.driver.running.values().any(|of| *of == request) || !run.driver.creating.is_empty(),
        "nobody waits for it"
    );
    run.seconds(5);
    assert_eq!(run.asked().vcpus, 2, "not before its guest has answered");
    run.driver.adopt_all();
    assert_eq!(run.machine().state, MachineState::Active);
    assert_eq!(run.launched().thresholds, checked(run.driver.world(), &[grow(80.0)]));
    assert!(run.machine().weight > 0 && run.machine().cpu.is_some() || run.driver.kernel.untold.contains(&run.machine));
    run.number_reached();
    run.report();
    run.takes = super::run::Takes::After(SECOND);
    run.has.vcpus = 2;
    run.report();
    run.seconds(20);
    assert!(run.asked().vcpus > 2);
    run.step(Event::Drain);
    assert_eq!(run.machine().state, MachineState::Stopping);
}

#[test]
fn what_a_guest_was_asked_for_by_an_earlier_agent_is_awaited_by_the_next() {
    let reports = |run: &Run| run.reasons(|command| matches!(command, Command::ReportResize { .. }));
    let mut run = Run::new(host(), launch(1, 512), &[]);
    run.takes = super::run::Takes::Never;
    run.resize(vcpus(2));
    run.driver.restart(host());
    run.driver.adopt_all();
    run.number_reached();
    run.report();
    run.told.clear();
    run.seconds(40);
    assert_eq!(
        reports(&run),
        ["after 30.0 s its guest has 1 vCPUs and 512 MiB of the 2 vCPUs and 512 MiB that it was asked to have"]
    );
    run.has.vcpus = 2;
    run.report();
    assert_eq!(reports(&run).len(), 2, "and that it has it");
    // What it gives back of itself is missed as well.
    run.has.vcpus = 1;
    run.report();
    run.seconds(40);
    assert_eq!(reports(&run).len(), 3);
}

#[test]
fn a_cpu_share_never_exceeds_the_most_that_it_was_launched_with() {
    let ceiling = Size {
        cpu_millis: 2500,
        ..Size::whole(8, 8192)
    };
    let held = Launch {
        ceiling,
        ..launch(1, 512)
    };
    let mut driver = Driver::new(host());
    let more = Launch {
        size: Size::whole(3, 512),
        ..held.clone()
    };
    let error = refused(&mut driver, "a", more);
    assert_eq!(
        error,
        "3000 mCPU are more than the most that it may ever have, 2500 mCPU"
    );
    let mut run = Run::new(host(), held, &[grow(80.0)]);
    run.wants_millis = 9000;
    run.seconds(60);
    // Its vCPUs may come to more, for its load to be spread.
    assert!(run.asked().vcpus > 3, "{}", run.asked());
    assert_eq!(run.asked().cpu_millis, 2500);
    let share = |cpu_millis| SizeChange {
        cpu_millis: Some(cpu_millis),
        ..SizeChange::default()
    };
    let world = run.driver.world();
    let error = world.resize_for(run.machine, share(2501)).unwrap_err();
    assert!(matches!(error, crate::scale::ResizeError::Size(_)), "{error}");
    let most = run.launched().most(crate::scale::Resource::CpuShare);
    assert_eq!(most.amount, 2500);
}

#[test]
fn one_that_was_found_goes_with_the_agent() {
    let mut run = Run::new(host(), launch(1, 512), &[]);
    run.driver.restart(host());
    run.step(Event::Drain);
    assert_eq!(
        run.machine().state,
        MachineState::Stopping,
        "nobody has to be waited for"
    );
}

#[test]
fn its_weight_is_a_part_of_its_accounts() {
    let mut driver = Driver::new(host());
    let first = driver.launch("a", launch(2, 512)).unwrap();
    let weight = |driver: &Driver, id| driver.world().machine(id).unwrap().weight;
    assert_eq!(weight(&driver, first), 976, "2000 of 2048: also while it boots");
    let second = driver.launch("a", launch(6, 512)).unwrap();
    driver.request(demand("a", "f", 1, SMALL));
    driver.boot_all();
    let of = |id| weight(&driver, id);
    assert_eq!(
        (of(first), of(second)),
        (122, 366),
        "of 16384, as much as was given rounded up"
    );
    let other = driver.launch("b", launch(1, 512)).unwrap();
    assert_eq!(weight(&driver, other), 976);
    driver.step(Event::MachineEnded { machine: second });
    assert!(driver.world().accounts["a"].given_millis < 3000);
}

#[test]
fn a_launch_that_fails_is_nobody_elses_trouble() {
    let mut driver = Driver::new(host());
    let machine = driver.launch("a", launch(1, 512)).unwrap();
    driver.step(Event::MachineEnded { machine });
    assert!(driver.world().accounts.is_empty());
    assert!(
        driver.world().runtime("sha256:feed").is_none(),
        "an image is no runtime"
    );
    driver.request(demand("a", "f", 1, SMALL));
    assert_eq!(driver.booting.len(), 1, "no boot of the runtime has failed");
    assert!(driver.world().runtime(RUNTIME).is_some());
    assert_eq!(
        driver.world().may_launch(
            machine,
            "a",
            &Launch {
                ceiling: Size::whole(8, 8191),
                ..launch(1, 512)
            }
        ),
        Err(LaunchError::Size(SizeError::Blocks(8191)))
    );
}
