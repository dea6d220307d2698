//! How sizes follow what is measured.

use std::time::Duration;

use super::super::SECOND;
use super::run::Run;
use super::{checked, grow, host, launch, minutes, of_memory, shrink};
use crate::scale::{
    ChangeSpec, Comparison, Direction, Metric, Obstacle, Resource, Size, SizeChange, ThresholdSpec, Thresholds,
};
use crate::{Command, Event, Reason};

fn resized(command: &Command) -> bool {
    matches!(command, Command::ResizeMachine { .. })
}

/// The worked example of docs/scaling.md: the figures there are these.
#[test]
fn a_machine_follows_a_load_that_steps_up_and_down() {
    let mut run = Run::new(host(), launch(1, 512), &[grow(80.0), shrink(30.0)]);
    let mut lines = Vec::new();
    for (seconds, millis) in [(20, 300), (60, 2600), (160, 600), (120, 150)] {
        run.wants_millis = millis;
        for _ in 0..seconds {
            let before = run.asked().vcpus;
            run.second();
            if run.asked().vcpus != before {
                let (at, reason) = (run.driver.now.as_secs(), run.last(resized).unwrap());
                lines.push(format!(
                    "| {at} s | {millis} | {before} → {} | {reason} |",
                    run.asked().vcpus
                ));
            }
        }
    }
    let page = include_str!("../../../../docs/scaling.md");
    let lines = lines.join("\n");
    assert!(page.contains(&lines), "docs/scaling.md lacks:\n{lines}");
    let vcpus: Vec<_> = run.vcpus();
    assert_eq!(vcpus, [(25, 2), (35, 3), (45, 4), (105, 3), (165, 2), (260, 1)]);
}

#[test]
fn memory_grows_by_a_part_in_whole_blocks_and_never_shrinks_below_what_is_used() {
    let part = ThresholdSpec {
        change: ChangeSpec::ByPercent(33.3),
        ..of_memory(grow(80.0), 2)
    };
    let half = ThresholdSpec {
        change: ChangeSpec::ByPercent(50.0),
        ..of_memory(shrink(40.0), 2)
    };
    let mut run = Run::new(host(), launch(1, 512), &[part, half]);
    run.wants_mib = 450;
    run.seconds(30);
    assert_eq!(run.sizes(), [(5, Size::whole(1, 682))]);
    run.wants_mib = 1000;
    run.seconds(60);
    assert_eq!(run.asked().memory_mib, 1618, "{:?}", run.sizes());
    run.wants_mib = 500;
    run.seconds(300);
    // Half of 1618 is more than the 614 that what it uses needs, and less than the 625 at which it would grow again.
    assert_eq!(run.asked().memory_mib, 810);
    run.wants_mib = 300;
    run.seconds(300);
    let reason = run.last(resized).unwrap().to_string();
    assert_eq!(
        reason,
        "memory_use was below 40% for 20.0 s, at last 37.03%: memory from 810 MiB to 406 MiB"
    );
    run.wants_mib = 100;
    run.seconds(300);
    assert_eq!(run.asked().memory_mib, 256, "no less than it was booted with");
    assert_eq!(
        run.last(resized).unwrap().to_string(),
        "memory_use was below 40% for 20.0 s, at last 24.63%: memory from 406 MiB to 256 MiB instead of 204 MiB, for it was booted with \
         256 MiB and can't give them back"
    );
    run.seconds(100);
    assert_eq!(run.kept().len(), 1, "told once: {:?}", run.kept());
}

#[test]
fn a_share_is_what_vcpus_are_held_to_at_once() {
    let share = |spec: ThresholdSpec, to| ThresholdSpec {
        resource: Resource::CpuShare,
        change: ChangeSpec::To(to),
        ..spec
    };
    let mut small = launch(2, 512);
    small.size.cpu_millis = 600;
    let mut run = Run::new(host(), small, &[share(grow(70.0), 1500), share(shrink(20.0), 100)]);
    run.driver.run_until(run.driver.now);
    run.wants_millis = 5000;
    run.seconds(6);
    let asked = run.asked();
    assert_eq!((asked.vcpus, asked.cpu_millis), (2, 1500));
    let number = |command: &Command| matches!(command, Command::ResizeMachine { number: 0, .. });
    assert!(run.last(number).is_some(), "its devices have nothing to do");
    let took = run.launched().resizes.back().unwrap().took;
    assert_eq!(took, Some(Duration::ZERO));
    run.wants_millis = 50;
    run.seconds(100);
    // Its vCPUs are promised 100 each.
    assert_eq!(run.asked().cpu_millis, 200);
    assert!(matches!(
        run.last(resized),
        Some(Reason::Crossed(crossed)) if crossed.obstacle == Some(Obstacle::Always(200))
    ));
    assert_eq!(run.machine().cpu.unwrap().allowed_millis, 200);
}

#[test]
fn pressure_that_the_guests_kernel_does_not_count_is_not_taken_for_none() {
    for pressure_us in [Some(0), None] {
        let spec = ThresholdSpec {
            metric: "memory_pressure".into(),
            ..of_memory(shrink(20.0), 128)
        };
        let mut run = Run::new(host(), launch(1, 1024), &[spec]);
        run.pressure_us = pressure_us;
        run.seconds(60);
        let launched = run.machine().launched.as_deref().unwrap();
        let unsupported: Vec<_> = launched.unsupported_metrics().map(Metric::name).collect();
        match pressure_us {
            Some(_) => {
                assert!(run.asked().memory_mib < 1024);
                assert_eq!(unsupported, [] as [&str; 0]);
            }
            None => {
                assert_eq!(run.sizes(), []);
                assert_eq!(unsupported, ["cpu_pressure", "memory_pressure", "io_pressure"]);
            }
        }
    }
}

#[test]
fn pressure_and_waiting_and_credits_count_too() {
    for metric in ["cpu_pressure", "memory_pressure", "io_pressure"] {
        let spec = ThresholdSpec {
            metric: metric.into(),
            ..of_memory(grow(20.0), 128)
        };
        let spec = ThresholdSpec {
            metric: metric.into(),
            ..spec
        };
        let mut run = Run::new(host(), launch(1, 512), &[spec]);
        run.pressure_us = Some(150_000);
        run.seconds(60);
        assert_eq!(run.sizes(), [], "{metric}");
        run.pressure_us = Some(250_000);
        run.seconds(6);
        assert_eq!(run.asked().memory_mib, 640, "{metric}");
    }
    let credits = ThresholdSpec {
        metric: "credits".into(),
        ..grow(0.5)
    };
    let mut run = Run::new(host(), launch(1, 512), &[credits]);
    run.driver.run_until(run.driver.now);
    run.seconds(60);
    assert_eq!(run.sizes(), [], "it has none");
    run.step(Event::CreditsGranted {
        machine: run.machine,
        credits: stoker_credits::Credits::new(5),
        by: "someone".into(),
    });
    run.driver.run_until(run.driver.now);
    run.seconds(6);
    assert_eq!(run.asked().vcpus, 2);
}

#[test]
fn a_short_crossing_changes_nothing_and_a_cooldown_is_kept() {
    let mut run = Run::new(host(), launch(1, 512), &[grow(80.0)]);
    for _ in 0..20 {
        run.wants_millis = 5000;
        run.seconds(4);
        run.wants_millis = 0;
        run.seconds(1);
    }
    assert_eq!(run.sizes(), []);
    run.wants_millis = 9000;
    run.seconds(61);
    let at: Vec<_> = run.vcpus().iter().map(|(at, _)| *at).collect();
    assert_eq!(at, [105, 115, 125, 135, 145, 155], "5 s first, then every 10 s");
}

#[test]
fn the_size_that_the_same_load_would_grow_from_again_is_not_gone_to() {
    let mut run = Run::new(host(), launch(4, 512), &[grow(80.0), shrink(50.0)]);
    run.wants_millis = 900;
    run.seconds(3600);
    assert_eq!(run.vcpus(), [(20, 3), (80, 2)], "at one it would use 90%");
    let kept = run.kept();
    assert_eq!(
        kept,
        [
            "cpu_use was below 50% for 60.0 s, at last 45%: vCPUs should be 1 vCPU and stays 2 vCPUs, for with less than 2 vCPUs it \
             would cross a threshold by which it grows"
        ]
    );
}

#[test]
fn the_largest_step_that_is_due_is_taken_and_growing_comes_first() {
    let steep = ThresholdSpec {
        change: ChangeSpec::By(3),
        ..grow(95.0)
    };
    let pressure = ThresholdSpec {
        metric: "io_pressure".into(),
        ..shrink(60.0)
    };
    let mut run = Run::new(host(), launch(2, 512), &[grow(80.0), steep, pressure]);
    run.wants_millis = 9000;
    run.seconds(7);
    assert_eq!(run.vcpus(), [(5, 5)]);
    // It is busy, though not for long enough yet: it does not shrink meanwhile.
    run.seconds(40);
    assert_eq!(run.asked().vcpus, 8, "as many as it may ever have");
    run.seconds(300);
    assert_eq!(run.asked().vcpus, 8);
    assert!(
        run.kept()
            .iter()
            .any(|text| text.contains("8 vCPUs is the most") || text.contains("8 vCPUs is the threshold's most"))
    );
}

#[test]
fn measured_more_often_it_is_judged_alike_and_after_a_gap_anew() {
    let mut often = Run::new(host(), launch(1, 512), &[grow(80.0)]);
    often.wants_millis = 5000;
    for _ in 0..70 {
        often.driver.now += SECOND / 10;
        often.report();
        often.measure_now();
    }
    assert_eq!(often.asked().vcpus, 2);
    let mut gap = Run::new(host(), launch(1, 512), &[grow(80.0)]);
    gap.wants_millis = 5000;
    gap.seconds(4);
    gap.driver.now += 10 * SECOND;
    gap.measure_now();
    gap.seconds(4);
    assert_eq!(gap.sizes(), [], "nobody knows what was in between");
    gap.seconds(2);
    assert_eq!(gap.asked().vcpus, 2);
}

#[test]
fn thresholds_are_read_changed_and_removed_while_it_runs() {
    let mut run = Run::new(host(), launch(1, 512), &[grow(80.0)]);
    assert_eq!(run.launched().thresholds.len(), 1);
    run.wants_millis = 5000;
    run.seconds(4);
    let set = |run: &mut Run, thresholds: Thresholds| {
        run.step(Event::ThresholdsAsked {
            machine: run.machine,
            thresholds,
            by: "someone".into(),
        })
    };
    let bounds = run.driver.world().bounds(run.machine).unwrap();
    assert_eq!((bounds.machine, bounds.base_mib), (Size::whole(8, 8192), 256));
    let other = checked(run.driver.world(), &[grow(70.0), shrink(10.0)]);
    set(&mut run, other.clone());
    assert_eq!(run.launched().thresholds, other);
    run.seconds(4);
    assert_eq!(run.sizes(), [], "others begin anew");
    run.seconds(2);
    assert_eq!(run.asked().vcpus, 2);
    set(&mut run, Thresholds::default());
    run.wants_millis = 0;
    run.seconds(600);
    assert_eq!(run.asked().vcpus, 2, "without any it keeps its size");
}

#[test]
fn what_is_asked_for_is_done_whole_or_refused_with_what_stands_in_the_way() {
    let mut run = Run::new(host(), launch(2, 1024), &[]);
    run.wants_millis = 1400;
    run.wants_mib = 600;
    run.seconds(2);
    let change = |vcpus, cpu_millis, memory_mib| SizeChange {
        vcpus,
        cpu_millis,
        memory_mib,
    };
    let refused = |run: &Run, change| {
        let error = run.driver.world().resize_for(run.machine, change).unwrap_err();
        error.to_string()
    };
    let cases = [
        (change(Some(0), None, None), "a machine needs some vCPUs"),
        (
            change(Some(9), None, None),
            "9 vCPUs are more than the most that it may ever have, 8 vCPUs",
        ),
        (
            change(Some(1), None, None),
            "vCPUs can't be 1 vCPU: what it uses needs 2 vCPUs",
        ),
        (
            change(None, Some(1000), None),
            "CPU share can't be 1000 mCPU: what it uses needs 1400 mCPU",
        ),
        (
            change(None, Some(2001), None),
            "a CPU share of 2001 mCPU is more than 2 vCPUs can use",
        ),
        (
            change(None, Some(150), None),
            "CPU share can't be 150 mCPU: it always has 200 mCPU",
        ),
        (
            change(None, None, Some(701)),
            "memory goes in blocks of 2 MiB, and 701 MiB are not whole ones",
        ),
        (
            change(None, None, Some(702)),
            "memory can't be 702 MiB: what it uses needs 724 MiB",
        ),
        (
            change(None, None, Some(128)),
            "128 MiB are less than the 256 MiB that it is booted with and can't give back",
        ),
        (
            change(None, None, Some(8194)),
            "8194 MiB are more than the most that it may ever have, 8192 MiB",
        ),
    ];
    for (change, words) in cases {
        assert_eq!(refused(&run, change), words);
        assert_eq!(run.resize(change), [], "{words}");
    }
    let decisions = run.resize(change(Some(4), Some(2500), Some(724)));
    let size = Size {
        vcpus: 4,
        cpu_millis: 2500,
        memory_mib: 724,
    };
    assert_eq!(run.asked(), size);
    assert!(matches!(decisions[0].reason, Reason::Asked { .. }));
    run.driver.later(minutes(1));
    let unmeasured = refused(&run, change(Some(3), None, None));
    assert_eq!(unmeasured, "vCPUs can't be 3 vCPUs: what it uses is not known");
    run.resize(change(Some(5), None, None));
    assert_eq!(
        (run.asked().vcpus, run.asked().cpu_millis),
        (5, 2500),
        "a share of its own stays"
    );
}

#[test]
fn held_back_by_its_credits_it_does_not_shrink() {
    let mut run = Run::new(host(), launch(4, 512), &[shrink(30.0)]);
    // Without credits it may use its baseline, a tenth of each vCPU, and wants all.
    run.driver.run_until(run.driver.now);
    assert_eq!(run.machine().cpu.unwrap().allowed_millis, 400);
    run.wants_millis = 400;
    run.seconds(120);
    assert_eq!(run.sizes(), []);
    assert!(run.kept()[0].ends_with("for its credits hold it back, and nobody knows what it would use"));
    run.wants_millis = 200;
    run.seconds(60);
    assert_eq!(run.asked().vcpus, 3, "now it is quiet");
}

#[test]
fn a_metric_that_falls_on_both_sides_is_told_in_words() {
    let both = ThresholdSpec {
        comparison: Comparison::Above,
        direction: Direction::Shrink,
        metric: "credits".into(),
        ..grow(3.5)
    };
    let thresholds = checked(Run::new(host(), launch(1, 512), &[]).driver.world(), &[both]);
    assert_eq!(
        thresholds[0].to_string(),
        "credits above 3.500 credits for 5.0 s: shrink vCPUs by 1 vCPU"
    );
}
