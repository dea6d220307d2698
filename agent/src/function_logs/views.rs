//! What there is to read of each function, and who is told when there is more.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use ulid::Ulid;

use super::segment::Segment;

/// The files of a function as they are at a moment, the oldest first.
pub(super) type View = Arc<[Segment]>;

/// The views of all functions; clones share them.
#[derive(Clone, Debug)]
pub(super) struct Views {
    all: Arc<Mutex<HashMap<Ulid, watch::Sender<View>>>>,
    /// Whether what an earlier agent left is among them.
    found: watch::Sender<bool>,
}

// === impl Views ===

impl Default for Views {
    fn default() -> Self {
        Self {
            all: Arc::default(),
            found: watch::Sender::new(false),
        }
    }
}

impl Views {
    /// Shows what there is of a function now.
    pub(super) fn show(&self, function: Ulid, segments: impl IntoIterator<Item = Segment>) {
        let view = segments.into_iter().collect();
        match self.lock().entry(function) {
            std::collections::hash_map::Entry::Occupied(there) => drop(there.get().send_replace(view)),
            std::collections::hash_map::Entry::Vacant(place) => drop(place.insert(watch::Sender::new(view))),
        }
    }

    /// There is nothing of a function any more; who follows it hears of its end.
    pub(super) fn forget(&self, function: Ulid) {
        self.lock().remove(&function);
    }

    /// The same where nobody follows it; says whether that is so.
    pub(super) fn forget_unread(&self, uid: Ulid) -> bool {
        let mut all = self.lock();
        let is_read = all.get(&uid).is_some_and(|view| view.receiver_count() > 0);
        if !is_read {
            all.remove(&uid);
        }
        !is_read
    }

    /// Lets those read who wait for what an earlier agent left.
    pub(super) fn all_found(&self) {
        self.found.send_replace(true);
    }

    /// What there is of a function, and what comes. None where it has been deleted.
    pub(super) async fn of(&self, function: Ulid, is_deleted: impl Fn() -> bool) -> Option<watch::Receiver<View>> {
        let mut found = self.found.subscribe();
        // The sender is in `self`.
        let _ = found.wait_for(|found| *found).await;
        let mut all = self.lock();
        // Under the lock: one that is deleted later is forgotten later.
        if is_deleted() {
            return None;
        }
        let view = all.entry(function).or_insert_with(|| watch::Sender::new(Arc::new([])));
        Some(view.subscribe())
    }

    /// Every change leaves it whole, so a panic elsewhere does no harm.
    fn lock(&self) -> MutexGuard<'_, HashMap<Ulid, watch::Sender<View>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
