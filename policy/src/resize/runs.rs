//! The latest executions, and the amount of CPU with which they would have cost the least.

use std::collections::VecDeque;

use super::sample::Run;
use crate::Amount;

/// How many executions are remembered.
pub(crate) const RING: usize = 32;

/// Of two amounts whose cost differs by less than this, in percent, the faster is taken.
const AS_CHEAP_PERCENT: u128 = 2;

/// The latest executions, the oldest first.
#[derive(Clone, Debug, Default)]
pub(crate) struct Runs(VecDeque<Run>);

/// What the remembered executions would have cost and taken with some amount. The longest and the shortest are left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Outlook {
    /// In millicores.
    pub(crate) cpu_millis: u32,
    /// In ns times the price of an amount.
    pub(crate) cost: u128,
    /// In ns, all together.
    pub(crate) wall_ns: u128,
}

// === impl Runs ===

impl Runs {
    pub(crate) fn add(&mut self, run: Run) {
        if self.0.len() >= RING {
            self.0.pop_front();
        }
        self.0.push_back(run);
    }

    pub(crate) fn len(&self) -> u32 {
        u32::try_from(self.0.len()).unwrap_or(u32::MAX)
    }

    /// The fastest of those amounts of CPU that cost hardly more than the cheapest, with this much memory; and the present one.
    pub(crate) fn best(&self, now: Amount, least: u32, most: u32) -> (Outlook, Outlook) {
        let runs = self.typical();
        let outlook = |cpu_millis| outlook(&runs, Amount { cpu_millis, ..now });
        let at_present = outlook(now.cpu_millis);
        let all: Vec<_> = candidates(least, most).map(outlook).collect();
        let cheapest = all.iter().map(|one| one.cost).min().unwrap_or(at_present.cost);
        let limit = cheapest.saturating_add(cheapest / 100 * AS_CHEAP_PERCENT);
        // Of those that are as fast, the smallest.
        let cheap = all.into_iter().filter(|one| one.cost <= limit);
        let best = cheap.min_by_key(|one| (one.wall_ns, one.cpu_millis));
        (at_present, best.unwrap_or(at_present))
    }

    /// How long the typical ones took with what they were given, the CPU that they used, and for how long they were kept from
    /// running, and waited for others, all in ns.
    pub(crate) fn sums(&self) -> (u32, [u128; 4]) {
        let runs = self.typical();
        let sum = |of: fn(&Run) -> u64| runs.iter().map(|run| u128::from(of(run))).sum();
        let sums = [
            sum(Run::wall_ns),
            sum(Run::cpu_ns),
            sum(Run::throttled_ns),
            sum(Run::wait_ns),
        ];
        (u32::try_from(runs.len()).unwrap_or(u32::MAX), sums)
    }

    /// All but an eighth of them on either side, by how long they took: one that is out of line does not count.
    fn typical(&self) -> Vec<Run> {
        let mut runs: Vec<_> = self.0.iter().copied().collect();
        runs.sort_unstable_by_key(Run::wall_ns);
        let out = (runs.len() / 8).max(usize::from(runs.len() > 2));
        runs.truncate(runs.len() - out);
        runs.drain(..out.min(runs.len()));
        runs
    }
}

fn outlook(runs: &[Run], amount: Amount) -> Outlook {
    let wall_ns: u128 = runs.iter().map(|run| u128::from(run.wall_at(amount.cpu_millis))).sum();
    Outlook {
        cpu_millis: amount.cpu_millis,
        cost: wall_ns.saturating_mul(amount.price().into()),
        wall_ns,
    }
}

/// Amounts of CPU from which one is chosen, in millicores: the bounds, and between them four for each doubling.
fn candidates(least: u32, most: u32) -> impl Iterator<Item = u32> {
    let doublings = (0..16).map(|doubling| 62_500_u64 << doubling);
    let steps = doublings.flat_map(|base| (0..4).map(move |part| (base + base * part / 4) / 1000));
    let steps = steps.filter_map(|millis| u32::try_from(millis).ok());
    let between = steps.filter(move |millis| (least..most).contains(millis) && *millis != least);
    std::iter::once(least)
        .chain(between)
        .chain((most > least).then_some(most))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Sample;

    const MS: u64 = 1_000_000;

    fn runs(all: impl IntoIterator<Item = (u64, u64, u64)>, given: u32) -> Runs {
        let mut runs = Runs::default();
        for (wall_ms, cpu_ms, throttled_ms) in all {
            runs.add(Run::of(&Sample {
                wall_ns: wall_ms * MS,
                cpu_ns: cpu_ms * MS,
                throttled_ns: throttled_ms * MS,
                wait_ns: 0,
                memory_peak_bytes: 0,
                oom_killed: false,
                amount: (given, 128).into(),
            }));
        }
        runs
    }

    fn best(runs: &Runs, now: u32) -> u32 {
        runs.best((now, 128).into(), 100, 6000).1.cpu_millis
    }

    #[test]
    fn candidates_are_whole_and_half_cpus_among_others() {
        let all: Vec<_> = candidates(100, 3000).collect();
        assert_eq!(all[..5], [100, 109, 125, 156, 187]);
        for millis in [250, 500, 750, 1000, 1500, 2000, 3000] {
            assert!(all.contains(&millis), "{millis}");
        }
        assert!(all.is_sorted() && all.len() < 30);
        assert_eq!(candidates(100, 100).collect::<Vec<_>>(), [100]);
    }

    #[test]
    fn as_many_cpus_as_threads_where_nothing_is_waited_for() {
        assert_eq!(best(&runs([(400, 100, 300); 8], 250), 250), 1000);
        assert_eq!(best(&runs([(100, 100, 0); 8], 1000), 1000), 1000);
        assert_eq!(best(&runs([(1000, 1000, 750); 8], 1000), 1000), 4000);
        assert_eq!(best(&runs([(1000, 1000, 0); 8], 4000), 4000), 1000);
    }

    #[test]
    fn little_where_much_is_waited_for() {
        let waits = best(&runs([(500, 20, 0); 8], 1000), 1000);
        assert_eq!(waits, 100);
    }

    #[test]
    fn one_that_is_out_of_line_does_not_count() {
        let mut all = vec![(100, 100, 0); 31];
        all.push((900_000, 1, 0));
        assert_eq!(best(&runs(all, 1000), 1000), 1000);
        // Only the latest are remembered.
        assert_eq!(runs([(1, 1, 0); 100], 1000).len(), RING as u32);
    }

    #[test]
    fn of_amounts_that_cost_as_much_the_faster_is_taken() {
        let (now, best) = runs([(400, 100, 300); 8], 250).best((250, 0).into(), 100, 6000);
        assert_eq!((now.cost, now.wall_ns), (best.cost, best.wall_ns * 4));
    }
}
