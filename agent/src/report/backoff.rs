//! Pauses between attempts to reach the controller.

use std::time::Duration;

/// The first pause.
const FIRST: Duration = Duration::from_millis(200);

/// The longest pause.
const LONGEST: Duration = Duration::from_secs(30);

/// Doubles the pause with each failure, and spreads it so that the agents of many hosts don't return all at once.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    /// The pause after one more failure: between half of the full pause and all of it, as `random` (any value) says.
    pub fn failed(&mut self, random: u64) -> Duration {
        let full = FIRST.saturating_mul(1 << self.failures.min(16)).min(LONGEST);
        self.failures = self.failures.saturating_add(1);
        let half = full / 2;
        let spread_ns = u64::try_from(half.as_nanos()).unwrap_or(u64::MAX);
        half + Duration::from_nanos(random % spread_ns.max(1))
    }

    /// The controller answered: the next pause is the first again.
    pub fn succeeded(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_start_again() {
        let mut backoff = Backoff::default();
        let pauses: Vec<_> = (0..10).map(|_| backoff.failed(0)).collect();
        assert_eq!(pauses.first().zip(pauses.last()), Some((&(FIRST / 2), &(LONGEST / 2))));
        assert!(pauses.is_sorted());
        backoff.succeeded();
        assert_eq!(backoff.failed(0), FIRST / 2);
    }

    proptest! {
        #[test]
        fn every_pause_is_within_bounds(failures in 0u32.., random: u64) {
            let pause = Backoff { failures }.failed(random);
            prop_assert!(pause >= FIRST / 2 && pause <= LONGEST);
        }
    }
}
