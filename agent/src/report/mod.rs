//! What goes out: events are kept in the store and sent to the controller until it has acknowledged them.
//!
//! [`Reporter::record`] answers once an event is on disk. One task connects to the controller, sends what waits in the
//! order of its sequence, and forgets what is acknowledged; it connects again, after ever longer pauses, when the
//! stream ends, and then starts at the oldest report that is not acknowledged.

mod backoff;
mod sender;

use std::sync::Arc;
use std::time::Duration;

use stoker_proto::v1;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub use backoff::Backoff;

use crate::address::Address;
use crate::config;
use crate::store::{Report, ReportKind, Store, StoreError};
use crate::tasks::{Essential, Task};

/// Takes events to report; clones share one queue. Without a controller it takes them and keeps none.
#[derive(Debug, Clone)]
pub struct Reporter {
    queue: Option<Arc<Queue>>,
}

#[derive(Debug)]
struct Queue {
    store: Store,
    max_bytes: u64,
    /// The sequence of the newest report on disk.
    newest: watch::Sender<u64>,
    /// The sequence up to which the controller has acknowledged.
    acknowledged: watch::Sender<u64>,
}

// === impl Reporter ===

impl Reporter {
    /// Starts the task that sends reports; it ends when `stop` is cancelled.
    pub fn start(
        store: Store,
        address: Option<Address>,
        config: &config::Controller,
        essential: &Essential,
        stop: CancellationToken,
    ) -> Self {
        let Some(address) = address else {
            return Self { queue: None };
        };
        let queue = Arc::new(Queue {
            store,
            max_bytes: u64::from(config.max_unacknowledged_mib) << 20,
            newest: watch::Sender::new(0),
            acknowledged: watch::Sender::new(0),
        });
        let sending = sender::run(queue.clone(), address);
        essential.spawn(Task::Reports, async move {
            tokio::select! {
                () = sending => {}
                () = stop.cancelled() => {}
            }
        });
        Self { queue: Some(queue) }
    }

    /// Whether there is a controller to report to.
    #[must_use]
    pub fn reports(&self) -> bool {
        self.queue.is_some()
    }

    /// Keeps an event for the controller; answers once it is on disk.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where the database fails; the event is lost then, and counted as [`Self::lost`] does.
    pub async fn record(&self, event: v1::event::Event) -> Result<(), StoreError> {
        let Some(queue) = &self.queue else {
            return Ok(());
        };
        let sequence = queue.store.append_report(Report::new(event), queue.max_bytes).await?;
        queue.newest.send_if_modified(|newest| {
            let newer = sequence > *newest;
            *newest = sequence.max(*newest);
            newer
        });
        Ok(())
    }

    /// Counts an event that can't even be recorded: the controller is told how many were dropped.
    pub fn lost(&self, event: &v1::event::Event) {
        if let Some(queue) = &self.queue {
            queue.store.lost_report(ReportKind::of(event));
        }
    }

    /// Waits until the controller has acknowledged everything recorded so far, at most `limit`; says whether it has.
    pub async fn flush(&self, limit: Duration) -> bool {
        let Some(queue) = &self.queue else {
            return true;
        };
        let newest = *queue.newest.borrow();
        let mut acknowledged = queue.acknowledged.subscribe();
        tokio::time::timeout(limit, acknowledged.wait_for(|sequence| *sequence >= newest))
            .await
            .is_ok()
    }
}
