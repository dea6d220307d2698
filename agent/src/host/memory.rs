//! How much memory the messages of invocations may take, of all and of each account: a queue bounds their number, not
//! their size.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::counts::Refusal;
use crate::metrics::Counters;

/// What an invocation takes beside its message, about, in bytes.
const OVERHEAD: u64 = 1024;

/// What the messages of all invocations may take; clones share it.
#[derive(Clone, Debug)]
pub struct Memory(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    bounds: Bounds,
    sums: Mutex<Sums>,
    refusals: Counters<Refusal>,
}

/// The most bytes of messages at a time.
#[derive(Clone, Debug)]
pub struct Bounds {
    /// Of all accounts together.
    pub all: u64,
    /// Of an account that is not named.
    pub account: u64,
    /// Of the accounts named.
    pub accounts: BTreeMap<Arc<str>, u64>,
}

#[derive(Debug, Default)]
struct Sums {
    bytes: u64,
    accounts: HashMap<Arc<str>, u64>,
}

/// What one invocation takes, from the first byte of its request to the last of its answer; given back when the last clone
/// is dropped.
#[derive(Clone, Debug)]
pub struct Share(Arc<Taken>);

#[derive(Debug)]
struct Taken {
    memory: Arc<Inner>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    bytes: u64,
    account: Option<Arc<str>>,
}

/// There is no room for a message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemoryFull {
    /// All accounts together have as much as there is.
    #[error("the messages of invocations take all {} MiB that there are for them on this host; try again later", .limit >> 20)]
    Host {
        /// The bound in bytes.
        limit: u64,
    },
    /// The account has as much as it may.
    #[error("the messages of the account's invocations take all {} MiB that it may have; try again later", .limit >> 20)]
    Account {
        /// The bound in bytes.
        limit: u64,
    },
}

// === impl Memory ===

impl Memory {
    /// Memory of which nothing is taken. What finds no room is counted.
    #[must_use]
    pub fn new(bounds: Bounds, refusals: Counters<Refusal>) -> Self {
        Self(Arc::new(Inner {
            bounds,
            sums: Mutex::default(),
            refusals,
        }))
    }

    /// A share that takes nothing yet.
    #[must_use]
    pub fn share(&self) -> Share {
        Share(Arc::new(Taken {
            memory: self.0.clone(),
            state: Mutex::default(),
        }))
    }
}

// === impl Share ===

impl Share {
    /// Takes that many bytes more.
    ///
    /// # Errors
    /// Where there is no room for them; nothing is taken then.
    pub fn add(&self, bytes: usize) -> Result<(), MemoryFull> {
        let mut state = lock(&self.0.state);
        let sum = state.bytes.saturating_add(size(bytes));
        self.0.memory.replace(&mut state, sum, true)
    }

    /// Counts it towards an account from now on.
    ///
    /// # Errors
    /// Where the account has no room for it.
    pub fn assign(&self, account: &Arc<str>) -> Result<(), MemoryFull> {
        let mut state = lock(&self.0.state);
        let bytes = state.bytes;
        self.0.memory.replace(&mut state, 0, true)?;
        state.account = Some(account.clone());
        self.0.memory.replace(&mut state, bytes.saturating_add(OVERHEAD), true)
    }

    /// The message gave way to one of that many bytes. It is there already, so it is not refused, whatever the bounds.
    pub fn replace(&self, bytes: usize) {
        let mut state = lock(&self.0.state);
        // Without a check it can't fail.
        let _ = self
            .0
            .memory
            .replace(&mut state, size(bytes).saturating_add(OVERHEAD), false);
    }
}

impl Inner {
    fn full(&self, full: MemoryFull) -> MemoryFull {
        self.refusals.count((&full).into());
        full
    }

    /// A share of `state.bytes` becomes one of `bytes`.
    fn replace(&self, state: &mut State, bytes: u64, check: bool) -> Result<(), MemoryFull> {
        let mut sums = lock(&self.sums);
        let all = sums.bytes.saturating_sub(state.bytes).saturating_add(bytes);
        let more = check && bytes > state.bytes;
        if more && all > self.bounds.all {
            return Err(self.full(MemoryFull::Host { limit: self.bounds.all }));
        }
        if let Some(account) = &state.account {
            let has = sums.accounts.get(account).copied().unwrap_or(0);
            let has = has.saturating_sub(state.bytes).saturating_add(bytes);
            let limit = self
                .bounds
                .accounts
                .get(account)
                .copied()
                .unwrap_or(self.bounds.account);
            if more && has > limit {
                return Err(self.full(MemoryFull::Account { limit }));
            }
            if has == 0 {
                sums.accounts.remove(account);
            } else {
                sums.accounts.insert(account.clone(), has);
            }
        }
        sums.bytes = all;
        state.bytes = bytes;
        Ok(())
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        // Giving back can't fail.
        let _ = self.memory.replace(state, 0, false);
    }
}

/// Every change leaves the sums whole, so a panic elsewhere does no harm.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn size(bytes: usize) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> Memory {
        counting(Counters::default())
    }

    fn counting(refusals: Counters<Refusal>) -> Memory {
        let bounds = Bounds {
            all: 10_000,
            account: 8000,
            accounts: [("small".into(), 2000)].into(),
        };
        Memory::new(bounds, refusals)
    }

    #[test]
    fn what_finds_no_room_is_counted_by_whose_bound_that_is() {
        let refusals = Counters::default();
        let memory = counting(refusals.clone());
        let (first, second) = (memory.share(), memory.share());
        first.add(5000).unwrap();
        first.add(6000).unwrap_err();
        second.add(3000).unwrap();
        second.assign(&"small".into()).unwrap_err();
        second.replace(20_000);
        let counts = [Refusal::MemoryFull, Refusal::AccountMemoryFull].map(|full| refusals.get(full));
        assert_eq!(counts, [1, 1]);
    }

    #[test]
    fn messages_are_bounded_by_their_sum_and_give_their_room_back() {
        let memory = memory();
        let (first, second) = (memory.share(), memory.clone().share());
        first.add(4000).unwrap();
        first.add(2000).unwrap();
        second.add(3000).unwrap();
        assert_eq!(second.add(2000), Err(MemoryFull::Host { limit: 10_000 }));
        drop(first);
        second.add(2000).unwrap();
        assert!(second.add(usize::MAX).is_err());
        drop(second);
        assert_eq!(lock(&memory.0.sums).bytes, 0);
    }

    #[test]
    fn an_account_has_a_bound_of_its_own() {
        let memory = memory();
        let (small, large) = ("small".into(), "large".into());
        let share = memory.share();
        share.add(1000).unwrap();
        assert_eq!(share.assign(&small), Err(MemoryFull::Account { limit: 2000 }));
        let share = memory.share();
        share.add(900).unwrap();
        share.assign(&small).unwrap();
        let other = memory.share();
        other.add(4000).unwrap();
        other.assign(&large).unwrap();
        assert!(lock(&memory.0.sums).accounts.len() == 2);
        drop((share, other));
        assert_eq!(lock(&memory.0.sums).accounts.len(), 0);
    }

    #[test]
    fn an_answer_takes_the_place_of_its_request() {
        let memory = memory();
        let share = memory.share();
        share.add(3000).unwrap();
        share.assign(&"a".into()).unwrap();
        share.replace(20_000);
        assert_eq!(memory.share().add(1), Err(MemoryFull::Host { limit: 10_000 }));
        share.replace(0);
        memory.share().add(1).unwrap();
    }
}
