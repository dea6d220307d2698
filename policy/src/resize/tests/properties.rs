//! No sequence of executions makes an amount flap, or leave its bounds.

use std::time::Duration;

use proptest::prelude::*;

use super::function::Runner;
use crate::{Amount, Resize, Sample};

/// One that says anything.
#[derive(Clone, Debug)]
struct Said {
    wall_ms: u64,
    cpu_ms: u64,
    throttled_ms: u64,
    peak_mib: u64,
    killed: bool,
    /// Ran with what was asked for, and not with what was determined.
    first: bool,
    after_ms: u64,
}

fn said() -> impl Strategy<Value = Said> {
    let any_ms = || prop_oneof![0..10_u64, 0..10_000_u64, Just(u64::MAX / 2_000_000)];
    let peak = prop_oneof![0..200_u64, 0..20_000_u64, Just(u64::MAX >> 21)];
    let after = prop_oneof![3 => 0..1000_u64, 1 => 0..1_000_000_u64];
    (
        any_ms(),
        any_ms(),
        any_ms(),
        peak,
        prop::bool::weighted(0.02),
        prop::bool::weighted(0.1),
        after,
    )
        .prop_map(
            |(wall_ms, cpu_ms, throttled_ms, peak_mib, killed, first, after_ms)| Said {
                wall_ms,
                cpu_ms,
                throttled_ms,
                peak_mib,
                killed,
                first,
                after_ms,
            },
        )
}

/// A few kinds of execution, each many times: what could lead a resizer up and down.
fn sequence() -> impl Strategy<Value = Vec<(Said, u32)>> {
    prop::collection::vec((said(), prop_oneof![1..4_u32, 1..600_u32]), 1..40)
}

impl Said {
    fn sample(&self, amount: Amount) -> Sample {
        Sample {
            wall_ns: self.wall_ms.saturating_mul(1_000_000),
            cpu_ns: self.cpu_ms.saturating_mul(1_000_000),
            throttled_ns: self.throttled_ms.saturating_mul(1_000_000),
            wait_ns: 0,
            memory_peak_bytes: self.peak_mib.saturating_mul(1 << 20),
            oom_killed: self.killed,
            amount,
        }
    }
}

/// How often one part of an amount fell and rose again later.
fn undone(amounts: &[u32]) -> u32 {
    let mut fell = false;
    amounts.windows(2).fold(0, |undone, pair| {
        let rises = pair[1] > pair[0];
        let again = u32::from(fell && rises);
        fell = pair[1] < pair[0] || (fell && !rises);
        undone + again
    })
}

fn check(runner: &Runner, first: Amount) {
    let (by, settings) = (&runner.settings.thresholds, &runner.settings);
    let amounts: Vec<_> = [first]
        .into_iter()
        .chain(runner.changes.iter().map(|(_, change)| change.to))
        .collect();
    for amount in &amounts {
        assert!(amount.fits(settings.most) && settings.least.fits(*amount), "{amount}");
        assert!(amount.fits(runner.limit), "{amount}");
    }
    // Of n executions a number by logarithm.
    let most = (runner.executions / by.executions_down).max(1).ilog(4) + 1;
    let part = |of: fn(&Amount) -> u32| undone(&amounts.iter().map(of).collect::<Vec<_>>());
    assert!(part(|amount| amount.memory_mib) <= most, "flaps: {amounts:?}");
    assert!(part(|amount| amount.cpu_millis) <= most, "flaps: {amounts:?}");
    // One direction at a time, and neither part falls before its time.
    let (mut of_cpu, mut of_memory) = (0, 0);
    for (at, change) in &runner.changes {
        let (from, to) = (change.from, change.to);
        assert!(from.fits(to) || to.fits(from), "{change:?}");
        for (from, to, before) in [
            (from.cpu_millis, to.cpu_millis, &mut of_cpu),
            (from.memory_mib, to.memory_mib, &mut of_memory),
        ] {
            assert!(to >= from || at - *before >= by.executions_down, "{change:?}");
            if to != from {
                *before = *at;
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn nothing_makes_it_flap_or_leave_its_bounds(sequence in sequence()) {
        let first = Amount { cpu_millis: 1000, memory_mib: 512, scratch_mib: 7 };
        let mut runner = Runner::with((1000, 512), Resize {
            least: (200, 100).into(),
            most: (4000, 3000).into(),
            ..Resize::default()
        });
        runner.limit = (3000, 2000).into();
        runner.sizer = crate::resize::Sizer::new(first, Duration::ZERO);
        let mut amounts = vec![first];
        for (said, times) in sequence {
            runner.every = Duration::from_millis(said.after_ms);
            for _ in 0..times {
                let amount = if said.first { first } else { runner.amount() };
                runner.take(said.sample(amount));
                amounts.push(runner.amount());
            }
        }
        prop_assert!(amounts.iter().all(|amount| amount.scratch_mib == 7));
        for (_, change) in &mut runner.changes {
            (change.from.scratch_mib, change.to.scratch_mib) = (0, 0);
        }
        check(&runner, Amount { scratch_mib: 0, ..first });
    }
}
