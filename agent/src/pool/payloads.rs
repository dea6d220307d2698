//! How much memory the payloads of all invocations may take: a queue bounds their number, not their size.

use std::sync::{Arc, Mutex, PoisonError};

/// What an invocation takes beside its payload, about.
const OVERHEAD: u64 = 1024;

/// The payloads that the pool holds, waiting or running; clones share them.
#[derive(Clone, Debug)]
pub(super) struct Payloads {
    max_bytes: u64,
    sums: Arc<Mutex<Sums>>,
}

#[derive(Debug, Default)]
struct Sums {
    count: u32,
    bytes: u64,
}

/// One invocation's share, given back when it is dropped.
#[derive(Debug)]
pub(super) struct Held {
    bytes: u64,
    sums: Arc<Mutex<Sums>>,
}

// === impl Payloads ===

impl Payloads {
    pub(super) fn new(max_bytes: u64) -> Self {
        Self {
            max_bytes,
            sums: Arc::default(),
        }
    }

    /// Makes room for a payload of that length.
    ///
    /// # Errors
    /// How many invocations are held, where they leave no room for it.
    pub(super) fn hold(&self, len: usize) -> Result<Held, u32> {
        let bytes = u64::try_from(len).unwrap_or(u64::MAX).saturating_add(OVERHEAD);
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        let all = sums.bytes.saturating_add(bytes);
        if all > self.max_bytes {
            return Err(sums.count);
        }
        sums.bytes = all;
        sums.count = sums.count.saturating_add(1);
        Ok(Held {
            bytes,
            sums: self.sums.clone(),
        })
    }
}

// === impl Held ===

impl Drop for Held {
    fn drop(&mut self) {
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        sums.bytes = sums.bytes.saturating_sub(self.bytes);
        sums.count = sums.count.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_are_bounded_by_their_sum_and_give_their_room_back() {
        let payloads = Payloads::new(10_000);
        let first = payloads.hold(4000).unwrap();
        let _second = payloads.clone().hold(3000).unwrap();
        assert_eq!(payloads.hold(2000).unwrap_err(), 2);
        drop(first);
        payloads.hold(2000).unwrap();
        assert_eq!(payloads.hold(usize::MAX).unwrap_err(), 1);
    }
}
