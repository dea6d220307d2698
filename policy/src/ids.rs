//! Ids, unique everywhere, from a source that a seed fixes: the same events give the same ids.

use std::fmt;
use std::hash::{BuildHasherDefault, Hasher};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use ulid::Ulid;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Ulid);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id!(
    /// A machine. Made by [`Ids`].
    MachineId
);
id!(
    /// A container. Made by [`Ids`].
    ContainerId
);
id!(
    /// A request. Made by whoever takes it in.
    RequestId
);

/// A source of ULIDs: the time in ms and 80 bits of a generator (SplitMix64; Steele, Lea and Flood, OOPSLA 2014).
#[derive(Clone, Debug)]
pub struct Ids {
    state: u64,
}

/// A map whose keys are ids. Their low bits are random already, so they are not hashed again.
pub type IdMap<K, V> = std::collections::HashMap<K, V, BuildHasherDefault<IdHasher>>;

/// Takes an id's low bits for its hash.
#[derive(Clone, Copy, Debug, Default)]
pub struct IdHasher(u64);

// === impl Ids ===

impl Ids {
    /// A source that gives the same ids for the same seed and times.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// The next id; `wall` is the time since 1970.
    pub fn next(&mut self, wall: Duration) -> Ulid {
        let random = u128::from(self.draw()) << 64 | u128::from(self.draw());
        let millis = u64::try_from(wall.as_millis()).unwrap_or(u64::MAX);
        Ulid::from_parts(millis, random)
    }

    fn draw(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

// === impl IdHasher ===

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        // Not on the path of ids, which hash as one u128.
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u128(&mut self, id: u128) {
        // The lowest 64 bits: the truncation is the point.
        #[allow(clippy::cast_possible_truncation)]
        let low = id as u64;
        self.0 = self.0.rotate_left(32) ^ low;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_fixes_the_ids_and_the_time_orders_them() {
        let (mut a, mut b) = (Ids::new(7), Ids::new(7));
        let first = a.next(Duration::from_millis(5));
        assert_eq!(first, b.next(Duration::from_millis(5)));
        assert_ne!(first, a.next(Duration::from_millis(5)));
        assert_ne!(first, Ids::new(8).next(Duration::from_millis(5)));
        assert!(first < a.next(Duration::from_millis(6)));
        assert_eq!(first.timestamp_ms(), 5);
    }
}
