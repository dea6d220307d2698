//! Chance, the same in every run.

use std::time::Duration;

/// Numbers that look random (splitmix64).
#[derive(Clone, Debug)]
pub struct Dice(u64);

// === impl Dice ===

impl Dice {
    /// Of one seed come always the same numbers.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// One whose numbers are others.
    #[must_use]
    pub fn another(&mut self) -> Self {
        Self(self.below(u64::MAX))
    }

    /// A number below `limit`, or 0 where that is 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit.max(1)
    }

    /// One of `all`, which must not be empty.
    #[allow(
        clippy::indexing_slicing,
        reason = "a number below the length of what is never empty"
    )]
    pub fn one_of<T: Copy, const N: usize>(&mut self, all: [T; N]) -> T {
        all[self.below(N as u64) as usize]
    }

    /// Waits for less than so many ms.
    pub async fn pause(&mut self, most_ms: u64) {
        tokio::time::sleep(Duration::from_millis(self.below(most_ms))).await;
    }
}
