//! What was determined against a sweep of fixed amounts, as AWS Lambda Power Tuning does it: the cost is amount times time.

use std::time::Duration;

use proptest::prelude::*;

use super::function::{BOTH, COMPUTES, Needs, Runner, WAITS};
use crate::Amount;
use crate::resize::Thresholds;

/// Sizes that people choose.
const MEMORY: [u32; 12] = [64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3008];

/// The cheapest fixed amount, and its cost. Of its memory a peak takes no more than of any that is not tight.
pub(super) fn best_fixed(needs: Needs, least: Amount) -> (Amount, u128) {
    let cpus = (1..=48).map(|n| n * 125).filter(|cpu| *cpu >= least.cpu_millis);
    let amounts = cpus
        .chain([least.cpu_millis])
        .flat_map(|cpu| MEMORY.map(|mib| (cpu, mib).into()));
    let amounts = amounts.filter(|amount: &Amount| !Thresholds::default().is_tight(needs.peak_mib, amount.memory_mib));
    let costs = amounts.filter_map(|amount: Amount| Some((amount, needs.cost(amount)?)));
    costs.min_by_key(|(_, cost)| *cost).unwrap()
}

fn percent_more(needs: Needs, first: (u32, u32)) -> u128 {
    let mut runner = Runner::new(first);
    runner.settle(2000, |_| needs);
    let (_, best) = best_fixed(needs, runner.settings.least);
    (needs.cost(runner.amount()).unwrap() * 100)
        .div_ceil(best)
        .saturating_sub(100)
}

#[test]
fn settles_within_a_tenth_of_the_cheapest_fixed_amount() {
    for (name, needs) in [("computes", COMPUTES), ("waits", WAITS), ("both", BOTH)] {
        for first in [(250, 256), (1000, 256), (1000, 2048), (4000, 512)] {
            let more = percent_more(needs, first);
            assert!(more <= 10, "{name} from {first:?}: {more}% more");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn settles_near_it_whatever_the_function_needs(
        cpu_ms in 1..2000_u64,
        threads in 1..=4_u32,
        waits_ms in 0..2000_u64,
        peak_mib in 60..2600_u32,
        cpu in 100..=6000_u32,
        memory in 64..=3008_u32,
    ) {
        let (cpu_time, waits) = (Duration::from_millis(cpu_ms), Duration::from_millis(waits_ms));
        let needs = Needs { cpu: cpu_time, threads, waits, peak_mib };
        let more = percent_more(needs, (cpu, memory));
        // What is not worth a change, and 3.6% more head room than is tight.
        prop_assert!(more <= 10, "{more}% more");
    }
}
