//! Token buckets, one a container, whose tokens are ns of the serving thread's CPU time. A plain state machine: times come
//! from outside, in ns.
//!
//! A bucket holds [`BURST_NS`] and is refilled at a quarter of a CPU. One that was emptied is *over* until it is full again.
//! All that are over are refilled together at half a CPU at most, each at the same rate. So a container that never empties its
//! bucket does not notice the others, and those that do take half of the thread, however many they are.
//!
//! Kept is when a bucket will be full (the generic cell rate algorithm): one that nobody draws from costs nothing. Since all
//! that are over fill at one rate, theirs is kept in a time that runs at that rate, and the next one to be full is the first.

use std::collections::{BTreeSet, HashMap};

use super::Id;

/// What a bucket holds.
pub(super) const BURST_NS: u64 = 10_000_000;
/// A bucket is refilled by one token in so many ns.
const REFILL: u64 = 4;
/// All buckets that are over are, together.
const REFILL_TOGETHER: u64 = 2;
/// Who had no tokens goes on with so many.
const RESUME_NS: u64 = super::TURN_NS;
/// Parts of a ns in which tokens for those that are over are counted: what many share in a short time is less than one.
const FINE: u128 = 1 << 32;

/// The buckets of all containers.
#[derive(Debug, Default)]
pub(super) struct Buckets {
    all: HashMap<Id, Full>,
    /// Those that are over, and when each will be full.
    over: BTreeSet<(u128, Id)>,
    /// Tokens that each bucket that is over would have been given so far, in parts of a ns.
    given: u128,
    /// Up to when they were given.
    at_ns: u64,
}

/// When a bucket is full.
#[derive(Clone, Copy, Debug)]
enum Full {
    /// At this time.
    At(u64),
    /// It is over: when so much has been given.
    Given(u128),
}

// === impl Buckets ===

impl Buckets {
    /// One more container, with a full bucket.
    pub(super) fn add(&mut self, id: Id) {
        self.all.insert(id, Full::At(0));
    }

    pub(super) fn remove(&mut self, id: Id, now_ns: u64) {
        self.advance(now_ns);
        if let Some(Full::Given(full)) = self.all.remove(&id) {
            self.over.remove(&(full, id));
        }
    }

    /// So much was spent for a container, whether there was so much or not.
    pub(super) fn draw(&mut self, id: Id, now_ns: u64, spent_ns: u64) {
        self.advance(now_ns);
        let Some(full) = self.all.get_mut(&id) else {
            return;
        };
        let given = match *full {
            Full::At(at) => {
                let at = at.max(now_ns).saturating_add(spent_ns.saturating_mul(REFILL));
                let missing = (at - now_ns) / REFILL;
                if missing < BURST_NS {
                    *full = Full::At(at);
                    return;
                }
                self.given + u128::from(missing) * FINE
            }
            Full::Given(before) => {
                self.over.remove(&(before, id));
                before + u128::from(spent_ns) * FINE
            }
        };
        *full = Full::Given(given);
        self.over.insert((given, id));
    }

    /// How long a container has to wait in ns, as things are now. None where it has tokens.
    pub(super) fn wait(&mut self, id: Id, now_ns: u64) -> Option<u64> {
        self.advance(now_ns);
        let Some(Full::Given(full)) = self.all.get(&id) else {
            return None;
        };
        let missing = (full - self.given).div_ceil(FINE);
        let missing = u64::try_from(missing).unwrap_or(u64::MAX);
        let below = missing.checked_sub(BURST_NS)?;
        Some((below + RESUME_NS).saturating_mul(self.pace()))
    }

    /// A bucket that is over is given one token in so many ns.
    fn pace(&self) -> u64 {
        REFILL.max(REFILL_TOGETHER * self.over.len() as u64)
    }

    /// Gives what is due by now.
    fn advance(&mut self, now_ns: u64) {
        while let Some(&(full, id)) = self.over.first() {
            let pace = u128::from(self.pace());
            let due = u128::from(now_ns.saturating_sub(self.at_ns)) * FINE / pace;
            if self.given + due < full {
                self.given += due;
                break;
            }
            // From then on there is one less.
            self.at_ns += u64::try_from(((full - self.given) * pace).div_ceil(FINE)).unwrap_or(u64::MAX);
            self.given = full;
            self.over.pop_first();
            self.all.insert(id, Full::At(self.at_ns));
        }
        self.at_ns = self.at_ns.max(now_ns);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: u64 = 1_000_000;
    const SECOND: u64 = 1_000 * MS;

    fn buckets(count: u64) -> Buckets {
        let mut buckets = Buckets::default();
        for id in 0..count {
            buckets.add(id);
        }
        buckets
    }

    /// What a container gets in a time if it takes turns of `turn_ns` whenever it may.
    fn greedy(buckets: &mut Buckets, ids: &[Id], turn_ns: u64, time_ns: u64) -> Vec<u64> {
        let mut got = vec![0; ids.len()];
        let mut now = 0;
        while now < time_ns {
            let mut least = u64::MAX;
            for (place, &id) in ids.iter().enumerate() {
                match buckets.wait(id, now) {
                    None => {
                        buckets.draw(id, now, turn_ns);
                        got[place] += turn_ns;
                        // They have one thread.
                        now += turn_ns;
                        least = 0;
                    }
                    Some(wait) => least = least.min(wait),
                }
            }
            now += least;
        }
        got
    }

    #[test]
    fn one_that_takes_what_it_can_has_a_quarter() {
        let mut buckets = buckets(1);
        let got = greedy(&mut buckets, &[0], 50_000, 10 * SECOND)[0];
        assert!((2_500 * MS..=2_511 * MS).contains(&got), "{got}");
    }

    #[test]
    fn many_that_take_what_they_can_have_half_in_equal_shares() {
        for count in [2, 3, 10, 100] {
            let mut buckets = buckets(count);
            let ids: Vec<Id> = (0..count).collect();
            let got = greedy(&mut buckets, &ids, 50_000, 10 * SECOND);
            let all: u64 = got.iter().sum();
            let most = 5 * SECOND + count * (BURST_NS + MS);
            assert!(all <= most && all > 4 * SECOND, "{count}: {all}");
            let (least, most) = (got.iter().min().unwrap(), got.iter().max().unwrap());
            assert!(most - least < 2 * MS, "{count}: {least} to {most}");
        }
    }

    #[test]
    fn one_below_a_quarter_never_waits_whatever_the_others_do() {
        let mut buckets = buckets(101);
        let mut now = 0;
        // A fifth of a CPU.
        for _ in 0..100_000 {
            for id in 1..=100 {
                if buckets.wait(id, now).is_none() {
                    buckets.draw(id, now, 200_000);
                }
            }
            assert_eq!(buckets.wait(0, now), None);
            buckets.draw(0, now, 100_000);
            now += 500_000;
        }
        assert_eq!(buckets.over.len(), 100);
    }

    #[test]
    fn one_that_has_rested_is_as_if_new() {
        let mut buckets = buckets(3);
        for id in 0..3 {
            buckets.draw(id, 0, BURST_NS);
        }
        // At half a CPU for three, 60 ms for each to have its 10 ms.
        assert_eq!(buckets.wait(0, 0), Some(6 * RESUME_NS));
        buckets.remove(1, 10 * MS);
        // 10/6 ms then, and the rest at a quarter.
        assert_eq!(buckets.over.len(), 2);
        buckets.advance(10 * MS + (BURST_NS - 10 * MS / 6) * 4 + 4);
        assert_eq!(buckets.over.len(), 0);
        assert_eq!(buckets.wait(0, 60 * MS), None);
        buckets.draw(0, 60 * MS, BURST_NS - 1);
        assert_eq!(buckets.wait(0, 60 * MS), None);
        buckets.draw(0, 60 * MS, 1);
        assert_eq!(buckets.wait(0, 60 * MS), Some(4 * RESUME_NS));
    }

    #[test]
    fn one_that_is_gone_is_of_no_account() {
        let mut buckets = buckets(1);
        buckets.draw(0, 0, 20 * MS);
        buckets.remove(0, 1);
        buckets.draw(0, 2, 20 * MS);
        assert_eq!(buckets.wait(0, 3), None);
        assert!(buckets.over.is_empty() && buckets.all.is_empty());
    }

    /// The same by steps, each bucket looked at in each.
    struct Plain {
        levels: Vec<(f64, bool)>,
        now: u64,
    }

    impl Plain {
        const STEP: u64 = 10_000;

        fn advance(&mut self, now: u64) {
            while self.now < now {
                let over = self.levels.iter().filter(|(_, over)| *over).count();
                for (level, is_over) in &mut self.levels {
                    let share = if *is_over { (0.5 / over as f64).min(0.25) } else { 0.25 };
                    *level = (*level + share * Self::STEP as f64).min(BURST_NS as f64);
                    *is_over &= *level < BURST_NS as f64;
                }
                self.now += Self::STEP;
            }
        }

        fn draw(&mut self, id: usize, spent: u64) {
            let (level, over) = &mut self.levels[id];
            *level -= spent as f64;
            *over |= *level <= 0.0;
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn they_are_what_they_would_be_step_by_step(
            draws in prop::collection::vec((0..5_usize, 0..400_u64, 0..200_u64), 1..200),
        ) {
            let mut buckets = buckets(5);
            let mut plain = Plain { levels: vec![(BURST_NS as f64, false); 5], now: 0 };
            let mut now = 0;
            for (id, pause, spent) in draws {
                now += pause * Plain::STEP;
                let spent = spent * 10_000;
                plain.advance(now);
                buckets.draw(id as Id, now, spent);
                plain.draw(id, spent);
                for (id, (level, _)) in plain.levels.iter().enumerate() {
                    let waits = buckets.wait(id as Id, now).is_some();
                    // Where a step more or less decides, either is right.
                    if level.abs() > 20.0 * Plain::STEP as f64 {
                        prop_assert_eq!(waits, *level <= 0.0, "{} has {} at {}", id, level, now);
                    }
                }
            }
        }

        #[test]
        fn nobody_has_more_than_its_burst_and_a_quarter(
            turns in prop::collection::vec((0..3_u64, 0..2_000_000_u64, 1..500_000_u64), 1..500),
        ) {
            let mut buckets = buckets(3);
            let (mut now, mut got) = (0, [0_u64; 3]);
            for (id, pause, spent) in turns {
                now += pause;
                if buckets.wait(id, now).is_none() {
                    buckets.draw(id, now, spent);
                    got[id as usize] += spent;
                }
                prop_assert!(got[id as usize] <= BURST_NS + now / REFILL + 500_000);
            }
        }

        #[test]
        fn who_waits_as_told_has_tokens(others in 0..20_u64, spent in 0..30 * MS) {
            let mut buckets = buckets(others + 1);
            for id in 0..=others {
                buckets.draw(id, 0, BURST_NS + spent);
            }
            let wait = buckets.wait(0, 0).unwrap();
            prop_assert_eq!(buckets.wait(0, wait), None);
            prop_assert!(buckets.wait(0, wait - RESUME_NS * buckets.pace()).is_some());
        }
    }
}
