//! Each kind of function that the resizer has to get right.

use std::time::Duration;

use super::function::{COMPUTES, Needs, Runner, WAITS};
use super::sweep::best_fixed;
use crate::resize::settings::MIB_A_CPU;
use crate::resize::sizer::compare;
use crate::{Amount, NoticeKind, Resize};

fn peak(peak_mib: u32) -> Needs {
    Needs { peak_mib, ..COMPUTES }
}

fn is_right(amount: Amount, peak_mib: u32) {
    let (has, needs) = (amount.memory_mib, peak_mib);
    assert!(has >= needs && has * 2 <= needs * 3, "{has} MiB for {needs}");
}

#[test]
fn where_the_need_for_memory_doubles_one_execution_is_killed() {
    let mut runner = Runner::new((1000, 128));
    runner.run_times(200, peak(100));
    assert_eq!((runner.amount(), runner.killed), ((1000, 128).into(), 0));
    let change = runner.run(peak(200)).unwrap();
    assert_eq!((change.from.memory_mib, change.to.memory_mib), (128, 256));
    assert!(change.figures.killed);
    runner.run_times(2000, peak(200));
    assert_eq!(runner.killed, 1);
    is_right(runner.amount(), 200);
}

#[test]
fn from_far_too_little_memory_two_are_killed() {
    let mut runner = Runner::new((1000, 128));
    for (needs, has, killed) in [(1000, 256, 1), (1000, 1024, 2), (1000, 1024, 2)] {
        runner.run(peak(needs));
        assert_eq!((runner.amount().memory_mib, runner.killed), (has, killed));
    }
    // Nearly all is taken: it rises once more, and nobody is killed for that.
    runner.run_times(2000, peak(1000));
    assert_eq!((runner.amount().memory_mib, runner.killed), (1150, 2));
}

#[test]
fn what_computes_has_the_cpus_that_its_threads_run_on_after_five_executions() {
    for threads in [1, 4] {
        let mut runner = Runner::new((250, 128));
        runner.run_times(5, Needs { threads, ..COMPUTES });
        let (at, change) = runner.changes[0];
        assert_eq!((at, change.to.cpu_millis), (5, threads * 1000));
        assert_eq!(change.figures.throttled_permille, 1000 - 250_u32.div_ceil(threads));
        assert_eq!(change.figures.would_take, COMPUTES.cpu / threads);
        runner.run_times(1000, Needs { threads, ..COMPUTES });
        assert_eq!(runner.amount().cpu_millis, threads * 1000, "stays there");
    }
}

#[test]
fn what_waits_keeps_little_cpu() {
    let mut runner = Runner::new((2000, 128));
    runner.settle(1000, |_| WAITS);
    assert_eq!(runner.amount().cpu_millis, 100);
    // By halves, a hundred executions each.
    assert_eq!(
        runner.changes.iter().map(|(at, _)| *at).collect::<Vec<_>>(),
        [100, 200, 300, 400, 500]
    );
    let longer = WAITS.run(runner.amount()).wall_ns as f64 / WAITS.run((2000, 128).into()).wall_ns as f64;
    assert!(longer < 1.2, "{longer}");
}

#[test]
fn rare_spikes_are_kept_room_for() {
    let spikes = |n: u32| if n % 40 == 39 { peak(500) } else { peak(100) };
    let mut runner = Runner::new((1000, 256));
    runner.settle(5000, spikes);
    assert_eq!(runner.killed, 1, "the first");
    is_right(runner.amount(), 500);
    // Rarer ones than it waits for are seen as what they are after a few.
    let rare = |n: u32| if n % 700 == 699 { peak(500) } else { peak(100) };
    let mut runner = Runner::new((1000, 1024));
    runner.settle(20_000, rare);
    assert!(runner.killed <= 3, "{} killed", runner.killed);
    is_right(runner.amount(), 500);
}

#[test]
fn what_shrinks_is_followed_down_after_a_hundred_executions() {
    let mut runner = Runner::new((1000, 512));
    runner.run_times(150, peak(400));
    assert_eq!(runner.changes, []);
    runner.run_times(200, peak(100));
    is_right(runner.amount(), 100);
    assert_eq!(runner.amount().memory_mib, 115);
    assert_eq!(runner.changes.len(), 1);
    runner.run_times(2000, peak(100));
    assert_eq!(runner.changes.len(), 1, "and stays");
}

#[test]
fn one_outlier_is_not_followed_down() {
    let mut runner = Runner::new((1000, 128));
    runner.run_times(200, peak(100));
    for odd in [
        peak(1),
        Needs {
            waits: Duration::from_secs(3600),
            ..COMPUTES
        },
        Needs {
            cpu: Duration::ZERO,
            ..COMPUTES
        },
    ] {
        runner.run(odd);
        runner.run_times(200, peak(100));
    }
    assert_eq!(runner.changes, []);
}

#[test]
fn a_leak_ends_at_the_most_and_is_not_told_of_each_time() {
    let mut runner = Runner::new((1000, 128));
    runner.run_times(300, peak(1_000_000));
    assert_eq!(runner.amount().memory_mib, 10_240);
    let told = runner.changes.iter().filter(|(_, change)| change.from == change.to);
    // 300 executions in 50 minutes, ten minutes apart.
    assert_eq!(told.count(), 5);
}

#[test]
fn the_example_in_the_documentation() {
    let needs = Needs {
        cpu: Duration::from_millis(400),
        threads: 1,
        waits: Duration::from_millis(50),
        peak_mib: 150,
    };
    let mut runner = Runner::new((250, 1024));
    runner.run_times(1000, needs);
    let [(up_at, up), (down_at, down)] = runner.changes[..] else {
        panic!("{:?}", runner.changes);
    };
    assert_eq!((up_at, up.to), (5, (1000, 1024).into()));
    assert_eq!((down_at, down.to), (100, (1000, 173).into()));
    let told = |change: &crate::resize::Change| NoticeKind::of(change.from, change.to, true, true).unwrap().to_string();
    assert_eq!(told(&up), "increase by 750 mCPU");
    assert_eq!(
        up.figures.to_string(),
        "executions: 5, memory at peaks 150 MiB, at most 150 MiB; the last 3 took 1650.0 ms and 242 mCPU, 72.7% of it kept from \
         running by their amount; they would take 450.0 ms"
    );
    assert_eq!(told(&down), "decrease by 851 MiB");
    assert_eq!((down.figures.executions, down.figures.largest_mib), (100, 150));
    // In CPU-seconds.
    let cost = |amount: Amount| needs.cost(amount).unwrap() as f64 / 1e9 / 1000.0 / MIB_A_CPU as f64;
    for (amount, expected) in [
        ((250, 1024), 0.825),
        ((1000, 1024), 0.563),
        ((1000, 173), 0.469),
        ((625, 192), 0.464),
    ] {
        assert!(
            (cost(amount.into()) - expected).abs() < 0.0006,
            "{}",
            cost(amount.into())
        );
    }
    assert_eq!(best_fixed(needs, runner.settings.least).0, (625, 192).into());
    // Its need doubles.
    let doubled = Needs { peak_mib: 300, ..needs };
    runner.run_times(1000, doubled);
    assert_eq!((runner.amount(), runner.killed), ((1000, 346).into(), 1));
}

#[test]
fn an_increase_comes_before_a_decrease() {
    let mut runner = Runner::new((250, 2048));
    runner.settle(1000, |_| COMPUTES);
    let [(_, up), (_, down)] = runner.changes[..] else {
        panic!("{:?}", runner.changes);
    };
    assert_eq!((up.to.cpu_millis, up.to.memory_mib), (1000, 2048));
    assert_eq!((down.to.cpu_millis, down.to.memory_mib), (1000, 92));
    let kind = NoticeKind::of(up.from, down.to, true, true).unwrap();
    assert_eq!(kind, NoticeKind::IncreaseBy((750, 0).into()));
    assert_eq!(kind.to_string(), "increase by 750 mCPU");
}

#[test]
fn it_falls_no_lower_than_a_container_takes_to_start() {
    let mut runner = Runner::new((1000, 1024));
    runner.sizer.started(&peak(300).run((1000, 1024).into()));
    runner.settle(1000, |_| peak(50));
    assert_eq!(runner.amount().memory_mib, 334);
    // What can't start with less has what was asked for again.
    let (settings, now) = (runner.settings.clone(), runner.now);
    let change = runner.sizer.start_failed(&settings, runner.amount(), now).unwrap();
    assert_eq!(change.to.memory_mib, 1024);
    assert!(change.figures.start_failed);
    assert_eq!(runner.sizer.start_failed(&settings, change.to, now), None);
}

#[test]
fn an_amount_that_a_request_names_is_compared_with_what_it_used() {
    let limit = (8000, 16_384).into();
    let told = |needs: Needs, amount: (u32, u32)| {
        compare(&Resize::default(), limit, &needs.run(amount.into())).map(|(kind, _)| kind)
    };
    assert_eq!(told(peak(200), (1000, 128)), Some(NoticeKind::Increase));
    assert_eq!(
        told(peak(125), (1000, 128)),
        Some(NoticeKind::IncreaseBy((0, 16).into()))
    );
    assert_eq!(
        told(peak(100), (250, 128)),
        Some(NoticeKind::IncreaseBy((750, 0).into()))
    );
    assert_eq!(
        told(peak(125), (250, 128)),
        Some(NoticeKind::IncreaseBy((750, 16).into()))
    );
    assert_eq!(told(peak(100), (1000, 512)), Some(NoticeKind::Decrease));
    assert_eq!(told(WAITS, (1000, 96)), Some(NoticeKind::Decrease));
    assert_eq!(told(peak(100), (1000, 128)), None);
}
