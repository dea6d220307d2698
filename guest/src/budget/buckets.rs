//! Token buckets, one a container, whose tokens are ns of the serving thread's CPU time. A plain state machine: times come
//! from outside, in ns.
//!
//! A bucket holds [`BURST_NS`]. One that is not full is refilled at a quarter of a CPU at most, and all that are not full
//! together at half a CPU at most, each at the same rate. So however many take what they can, they take half of the thread; and
//! one that needs less than its equal part of that never waits.
//!
//! Kept is when a bucket will be full (the generic cell rate algorithm), so that one that nobody draws from costs nothing. Since
//! all are refilled at one rate, that is kept in a time that runs at this rate: the next one to be full is the first.

use std::collections::{BTreeSet, HashMap};

use super::Id;

/// What a bucket holds.
pub(super) const BURST_NS: u64 = 10_000_000;
/// A bucket is refilled by one token in so many ns at least.
const PACE: u64 = 4;
/// All of them are, together.
const PACE_TOGETHER: u64 = 2;
/// Who had no tokens goes on with so many.
const RESUME_NS: u64 = super::TURN_NS;
/// Parts of a ns in which tokens are counted: what many share in a short time is less than one.
const FINE: u128 = 1 << 32;

/// The buckets of all containers.
#[derive(Debug, Default)]
pub(super) struct Buckets {
    /// Of each that is not full, how much was given when it will be, in parts of a ns.
    all: HashMap<Id, Option<u128>>,
    /// The same in order.
    filling: BTreeSet<(u128, Id)>,
    /// What a bucket that was never full would have been given so far, in parts of a ns.
    given: u128,
    /// Up to when that was given.
    at_ns: u64,
}

// === impl Buckets ===

impl Buckets {
    /// One more container, with a full bucket.
    pub(super) fn add(&mut self, id: Id) {
        self.all.insert(id, None);
    }

    pub(super) fn remove(&mut self, id: Id, now_ns: u64) {
        self.advance(now_ns);
        if let Some(full) = self.all.remove(&id).flatten() {
            self.filling.remove(&(full, id));
        }
    }

    /// So much was spent for a container, whether there was so much or not.
    pub(super) fn draw(&mut self, id: Id, now_ns: u64, spent_ns: u64) {
        self.advance(now_ns);
        if spent_ns == 0 {
            return;
        }
        let Some(place) = self.all.get_mut(&id) else {
            return;
        };
        let before = place.unwrap_or(self.given);
        let full = before + u128::from(spent_ns) * FINE;
        *place = Some(full);
        self.filling.remove(&(before, id));
        self.filling.insert((full, id));
    }

    /// A container is given some more, up to what its bucket holds.
    pub(super) fn grant(&mut self, id: Id, now_ns: u64, ns: u64) {
        self.advance(now_ns);
        let Some(Some(full)) = self.all.get_mut(&id) else {
            return;
        };
        let before = *full;
        *full = before.saturating_sub(u128::from(ns) * FINE).max(self.given);
        self.filling.remove(&(before, id));
        self.filling.insert((*full, id));
    }

    /// How long a container has to wait in ns, as things are now. None where it has tokens.
    pub(super) fn wait(&mut self, id: Id, now_ns: u64) -> Option<u64> {
        self.advance(now_ns);
        let full = self.all.get(&id).copied().flatten()?;
        let missing = (full - self.given).div_ceil(FINE);
        let below = u64::try_from(missing).unwrap_or(u64::MAX).checked_sub(BURST_NS)?;
        Some((below + RESUME_NS).saturating_mul(self.pace()))
    }

    /// Each bucket is given one token in so many ns.
    fn pace(&self) -> u64 {
        PACE.max(PACE_TOGETHER * self.filling.len() as u64)
    }

    /// Gives what is due by now.
    fn advance(&mut self, now_ns: u64) {
        while let Some(&(full, id)) = self.filling.first() {
            let pace = u128::from(self.pace());
            let due = u128::from(now_ns.saturating_sub(self.at_ns)) * FINE / pace;
            if self.given + due < full {
                self.given += due;
                break;
            }
            // From then on there is one less.
            self.at_ns += u64::try_from(((full - self.given) * pace).div_ceil(FINE)).unwrap_or(u64::MAX);
            self.given = full;
            self.filling.pop_first();
            self.all.insert(id, None);
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

    /// What each gets in a time if it takes turns whenever it may.
    fn greedy(count: u64, turn_ns: u64, time_ns: u64) -> Vec<u64> {
        let mut buckets = buckets(count);
        let mut got = vec![0; count as usize];
        let mut now = 0;
        while now < time_ns {
            let mut least = u64::MAX;
            for id in 0..count {
                match buckets.wait(id, now) {
                    None => {
                        // They have one thread.
                        now += turn_ns;
                        buckets.draw(id, now, turn_ns);
                        got[id as usize] += turn_ns;
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
        let got = greedy(1, 50_000, 10 * SECOND)[0];
        assert!((2_500 * MS..=2_511 * MS).contains(&got), "{got}");
    }

    #[test]
    fn many_that_take_what_they_can_have_half_in_equal_parts() {
        for count in [2, 3, 10, 100] {
            let got = greedy(count, 50_000, 10 * SECOND);
            let all: u64 = got.iter().sum();
            let most = 5 * SECOND + count * (BURST_NS + MS);
            assert!(all <= most && all > 49 * SECOND / 10, "{count}: {all}");
            let (least, most) = (got.iter().min().unwrap(), got.iter().max().unwrap());
            assert!(most - least < 2 * MS, "{count}: {least} to {most}");
        }
    }

    #[test]
    fn one_that_needs_less_than_its_part_never_waits() {
        let mut buckets = buckets(11);
        let mut now = 0;
        for _ in 0..100_000 {
            for id in 1..=10 {
                if buckets.wait(id, now).is_none() {
                    buckets.draw(id, now, 200_000);
                }
            }
            assert_eq!(buckets.wait(0, now), None);
            // A 25th of a CPU, and a 22nd is its part.
            buckets.draw(0, now, 100_000);
            now += 2_500_000;
        }
    }

    #[test]
    fn many_that_need_little_never_wait() {
        let mut buckets = buckets(400);
        let mut now = 0;
        // A tenth of a percent each, 40 together.
        for _ in 0..100 {
            for id in 0..400 {
                assert_eq!(buckets.wait(id, now), None);
                buckets.draw(id, now, 50_000);
                now += 125_000;
            }
        }
    }

    #[test]
    fn one_that_has_rested_is_as_if_new() {
        let mut buckets = buckets(3);
        for id in 0..3 {
            buckets.draw(id, 0, BURST_NS);
        }
        // At half a CPU for three.
        assert_eq!(buckets.wait(0, 0), Some(6 * RESUME_NS));
        buckets.remove(1, 10 * MS);
        // The rest at a quarter.
        let full = 10 * MS + (BURST_NS - 10 * MS / 6) * 4;
        buckets.advance(full - 10);
        assert_eq!(buckets.filling.len(), 2);
        buckets.advance(full + 10);
        assert_eq!(buckets.filling.len(), 0);
        buckets.draw(0, 60 * MS, BURST_NS - 1);
        assert_eq!(buckets.wait(0, 60 * MS), None);
        buckets.draw(0, 60 * MS, 1);
        assert_eq!(buckets.wait(0, 60 * MS), Some(4 * RESUME_NS));
    }

    #[test]
    fn what_is_granted_is_not_saved_up_beyond_a_full_bucket() {
        let mut buckets = buckets(1);
        buckets.grant(0, 0, MS);
        buckets.draw(0, 0, BURST_NS);
        assert!(buckets.wait(0, 0).is_some());
        buckets.grant(0, 0, MS);
        assert_eq!(buckets.wait(0, 0), None);
        buckets.draw(0, 0, MS);
        assert!(buckets.wait(0, 0).is_some());
        buckets.grant(0, 0, 2 * BURST_NS);
        buckets.draw(0, 0, BURST_NS);
        assert!(buckets.wait(0, 0).is_some());
    }

    #[test]
    fn one_that_is_gone_is_of_no_account() {
        let mut buckets = buckets(1);
        buckets.draw(0, 0, 20 * MS);
        buckets.remove(0, 1);
        buckets.draw(0, 2, 20 * MS);
        assert_eq!(buckets.wait(0, 3), None);
        assert!(buckets.filling.is_empty() && buckets.all.is_empty());
    }

    /// The same by steps, each bucket looked at in each.
    struct Plain {
        levels: Vec<f64>,
        now: u64,
    }

    impl Plain {
        const STEP: u64 = 10_000;

        fn advance(&mut self, now: u64) {
            while self.now < now {
                let filling = self.levels.iter().filter(|level| **level < BURST_NS as f64).count();
                for level in &mut self.levels {
                    let part = (0.5 / filling as f64).min(0.25);
                    *level = (*level + part * Self::STEP as f64).min(BURST_NS as f64);
                }
                self.now += Self::STEP;
            }
        }

        fn draw(&mut self, id: usize, spent: u64) {
            self.levels[id] -= spent as f64;
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn they_are_what_they_would_be_step_by_step(
            draws in prop::collection::vec((0..5_usize, 0..400_u64, 0..200_u64), 1..200),
        ) {
            let mut buckets = buckets(5);
            let mut plain = Plain { levels: vec![BURST_NS as f64; 5], now: 0 };
            let mut now = 0;
            for (id, pause, spent) in draws {
                now += pause * Plain::STEP;
                let spent = spent * 10_000;
                plain.advance(now);
                buckets.draw(id as Id, now, spent);
                plain.draw(id, spent);
                for (id, level) in plain.levels.iter().enumerate() {
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
                prop_assert!(got[id as usize] <= BURST_NS + now / PACE + 500_000);
            }
        }

        #[test]
        fn who_waits_as_told_has_tokens(others in 0..20_u64, spent in 0..30 * MS) {
            let mut buckets = buckets(others + 1);
            for id in 0..=others {
                buckets.draw(id, 0, BURST_NS + spent);
            }
            let wait = buckets.wait(0, 0).unwrap();
            prop_assert!(buckets.wait(0, wait - RESUME_NS * buckets.pace()).is_some());
            prop_assert_eq!(buckets.wait(0, wait), None);
        }
    }
}
