//! What goes out: events are kept in the store and sent to the controller until it has acknowledged them.
//!
//! [`Reporter::record`] answers once an event is on disk. One task connects to the controller, sends what waits in the
//! order of its sequence, and forgets what is acknowledged; it connects again, after ever longer pauses, when the
//! stream ends, and then starts at the oldest report that is not acknowledged.

mod backoff;
mod sender;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use stoker_proto::v1;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use ulid::Ulid;

pub use backoff::Backoff;

use crate::config;
use crate::host::Address;
use crate::store::{Report, ReportKind, Store, StoreError};

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
    pub fn start(store: Store, address: Option<Address>, config: &config::Controller, stop: CancellationToken) -> Self {
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
        tokio::spawn(async move {
            tokio::select! {
                () = sending => {}
                () = stop.cancelled() => {}
            }
        });
        Self { queue: Some(queue) }
    }

    /// Keeps an event for the controller; answers once it is on disk.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where the database fails; the event is lost then.
    pub async fn record(&self, event: v1::event::Event) -> Result<(), StoreError> {
        let Some(queue) = &self.queue else {
            return Ok(());
        };
        let kind = match event {
            v1::event::Event::Use(_) => ReportKind::Use,
            v1::event::Event::Machine(_) | v1::event::Event::Container(_) | v1::event::Event::Dropped(_) => {
                ReportKind::Lifecycle
            }
        };
        let report = Report {
            kind,
            event: new_event(event),
        };
        let sequence = queue.store.append_report(report, queue.max_bytes).await?;
        queue.newest.send_if_modified(|newest| {
            let newer = sequence > *newest;
            *newest = sequence.max(*newest);
            newer
        });
        Ok(())
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

/// An event of now with an id of its own; the store gives it its sequence.
pub(crate) fn new_event(event: v1::event::Event) -> v1::Event {
    v1::Event {
        id: Ulid::generate().to_string(),
        sequence: 0,
        time: Some(SystemTime::now().into()),
        event: Some(event),
    }
}
