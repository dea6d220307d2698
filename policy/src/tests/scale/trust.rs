//! Guests that ignore what they are asked, are late, or lie, and machines that end.

use std::time::Duration;

use super::super::SECOND;
use super::run::{Run, Takes};
use super::{grow, host, launch, of_memory, shrink};
use crate::scale::{GuestMeasures, Measures, Size, SizeChange, Taken};
use crate::{Command, Event, MachineState};

fn reports(command: &Command) -> bool {
    matches!(command, Command::ReportResize { .. })
}

fn counted(run: &Run) -> (u32, u32) {
    let shape = run.machine().shape;
    (shape.vcpus, shape.memory_mib)
}

#[test]
fn how_long_a_guest_took_is_told() {
    let mut run = Run::new(host(), launch(1, 512), &[grow(80.0)]);
    run.takes = Takes::After(3 * SECOND);
    run.wants_millis = 2000;
    run.seconds(10);
    assert_eq!(run.reasons(reports), ["its guest has what was asked for, after 3.0 s"]);
    let last = run.launched().resizes.back().unwrap();
    assert_eq!(
        (last.before.vcpus, last.asked.vcpus, last.took),
        (1, 2, Some(3 * SECOND))
    );
}

#[test]
fn a_guest_that_ignores_more_is_told_and_gets_no_more() {
    let mut run = Run::new(host(), launch(1, 512), &[grow(80.0)]);
    run.takes = Takes::Never;
    run.wants_millis = 9000;
    run.seconds(600);
    assert_eq!(run.vcpus(), [(5, 2)], "not asked again and again");
    assert_eq!(
        run.reasons(reports),
        ["after 30.0 s its guest has 1 vCPUs and 512 MiB of the 2 vCPUs and 512 MiB that it was asked to have"]
    );
    assert_eq!(run.kept().len(), 1);
    assert!(run.kept()[0].ends_with("for its guest has 1 vCPU, and not what was asked of it before"));
    // Memory is another matter.
    run.takes = Takes::After(Duration::ZERO);
    let change = SizeChange {
        memory_mib: Some(1024),
        ..SizeChange::default()
    };
    run.resize(change);
    run.second();
    assert_eq!((run.asked(), run.has.memory_mib), (Size::whole(2, 1024), 1024));
    // It takes all at last, and goes on growing.
    assert_eq!(run.has.vcpus, 2);
    run.seconds(30);
    assert!(run.asked().vcpus >= 3);
}

#[test]
fn a_guest_that_unplugs_itself_still_counts_as_what_was_asked_for() {
    let mut run = Run::new(host(), launch(4, 1024), &[grow(80.0)]);
    run.has = Taken {
        vcpus: 1,
        memory_mib: 300,
    };
    run.report();
    assert_eq!(counted(&run), (4, 1024));
    run.wants_millis = 9000;
    run.seconds(60);
    assert_eq!(run.sizes(), [], "it has more, and does not use it");
    assert!(run.kept()[0].contains("its guest has 1 vCPU"));
    run.has.vcpus = 4;
    run.report();
    run.seconds(10);
    assert_eq!(run.asked().vcpus, 5);
}

#[test]
fn what_a_guest_does_not_give_back_counts_and_is_held_to_less_all_the_same() {
    let mut run = Run::new(host(), launch(4, 1024), &[shrink(50.0), of_memory(shrink(50.0), 256)]);
    run.driver.run_until(run.driver.now);
    run.takes = Takes::Never;
    run.wants_millis = 100;
    run.seconds(30);
    assert_eq!(run.asked(), Size::whole(3, 768));
    assert_eq!(counted(&run), (4, 1024), "the guest has it still");
    let machine = run.machine();
    assert_eq!(machine.shape.baseline_millis, 300, "what it is promised goes at once");
    assert!(machine.cpu.unwrap().allowed_millis <= 3000);
    run.seconds(600);
    assert_eq!(run.asked(), Size::whole(3, 768), "nothing more is asked of it");
    run.has = Taken {
        vcpus: 3,
        memory_mib: 900,
    };
    run.number_reached();
    run.report();
    assert_eq!(counted(&run), (3, 900), "as far as it came");
    run.has.memory_mib = 768;
    run.report();
    assert_eq!(counted(&run), (3, 768));
}

#[test]
fn what_devices_told_before_the_last_request_is_old() {
    let mut run = Run::new(host(), launch(4, 1024), &[]);
    run.seconds(2);
    let ask = |run: &mut Run, vcpus| {
        let change = SizeChange {
            vcpus: Some(vcpus),
            ..SizeChange::default()
        };
        run.resize(change);
    };
    let told = |run: &mut Run, number, vcpus| {
        run.step(Event::MachineResized {
            machine: run.machine,
            number,
            taken: Taken {
                vcpus,
                memory_mib: 1024,
            },
        });
    };
    run.takes = Takes::Never;
    ask(&mut run, 1);
    ask(&mut run, 8);
    ask(&mut run, 2);
    assert_eq!(counted(&run).0, 8);
    // That it came to one was before it was asked to have eight.
    told(&mut run, 1, 1);
    told(&mut run, 2, 2);
    assert_eq!(counted(&run).0, 8);
    told(&mut run, 3, 7);
    assert_eq!(counted(&run).0, 7);
    told(&mut run, 3, 2);
    assert_eq!(counted(&run).0, 2);
    // Not asked for, so it can't be.
    for (number, vcpus) in [(3, 64), (4, 1), (u64::MAX, 1), (3, 0)] {
        told(&mut run, number, vcpus);
        assert_eq!(counted(&run).0, 2, "{number} {vcpus}");
    }
}

#[test]
fn who_lies_about_its_use_stays_within_its_own_bounds() {
    let specs = [of_memory(grow(80.0), 512), of_memory(shrink(20.0), 512)];
    let mut run = Run::new(host(), launch(1, 1024), &specs);
    let mut measures = Measures::default();
    let mut tell = |run: &mut Run, memory_bytes| {
        run.driver.now += SECOND;
        measures.at = run.driver.now;
        measures.guest = Some(GuestMeasures {
            memory_bytes,
            cpu_pressure_us: Some(u64::MAX),
            memory_pressure_us: Some(u64::MAX),
            io_pressure_us: Some(u64::MAX),
        });
        run.step(Event::Measured {
            machine: run.machine,
            measures,
        });
        let (_, taken) = counted(run);
        run.has.memory_mib = run.asked().memory_mib;
        assert!((256..=8192).contains(&taken));
        run.number_reached();
        run.report();
    };
    for _ in 0..400 {
        tell(&mut run, u64::MAX);
    }
    assert_eq!(run.asked().memory_mib, 8192, "as much as it may ever have");
    for _ in 0..2000 {
        tell(&mut run, 0);
    }
    assert_eq!(run.asked().memory_mib, 256, "no less than it was booted with");
}

#[test]
fn a_guest_that_says_nothing_is_not_made_smaller() {
    let mut run = Run::new(host(), launch(4, 1024), &[of_memory(shrink(90.0), 256), shrink(50.0)]);
    run.guest_answers = false;
    run.seconds(600);
    assert_eq!(run.asked(), Size::whole(1, 1024), "its CPU time is counted on the host");
    run.guest_answers = true;
    run.seconds(30);
    assert_eq!(run.asked().memory_mib, 768);
}

#[test]
fn a_machine_that_ends_in_the_middle_of_a_resize_leaves_nothing() {
    let mut run = Run::new(host(), launch(1, 512), &[grow(80.0)]);
    run.takes = Takes::Never;
    run.wants_millis = 9000;
    run.seconds(7);
    assert_eq!(run.asked().vcpus, 2);
    let machine = run.machine;
    run.step(Event::MachineEnded { machine });
    let late = [
        Event::MachineResized {
            machine,
            number: 1,
            taken: run.has,
        },
        Event::Measured {
            machine,
            measures: Measures::default(),
        },
        Event::MachineReady { machine },
        Event::ResizeAsked {
            machine,
            change: SizeChange::default(),
            by: "someone".into(),
        },
        Event::EndAsked {
            machine,
            by: "someone".into(),
        },
    ];
    for event in late {
        assert_eq!(run.step(event), []);
    }
    assert_eq!(run.driver.later(super::minutes(2)), [], "no timer of it is left");
    assert!(run.driver.world().is_empty() && run.driver.world().accounts.is_empty());
    assert_eq!(run.driver.host.next_wake(), None);
}

#[test]
fn who_launched_it_ends_it_and_what_comes_late_changes_nothing() {
    let mut run = Run::new(host(), launch(1, 512), &[grow(80.0)]);
    run.wants_millis = 9000;
    run.seconds(7);
    let machine = run.machine;
    let by = "someone".into();
    let decisions = run.step(Event::EndAsked { machine, by });
    assert!(matches!(
        decisions[0].command,
        Command::DestroyMachine { gently: true, .. }
    ));
    assert_eq!(run.machine().state, MachineState::Stopping);
    run.seconds(100);
    let by = "someone".into();
    assert_eq!(run.step(Event::EndAsked { machine, by }), [], "once");
    assert_eq!(run.asked().vcpus, 2, "and it grows no more");
    run.step(Event::MachineEnded { machine });
    assert!(run.driver.world().accounts.is_empty());
}
