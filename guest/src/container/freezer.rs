//! Freezing between calls, as on Lambda: what a function left running neither runs nor is counted, and goes on with its next
//! call (cgroup v2, `cgroup.freeze`).
//!
//! A container is frozen when it has waited for work a while. At once it would be of no use where calls follow each other
//! closely, and a process that ends just after its answer could not: it would be found out by the next call.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::cgroup::Cgroup;
use crate::budget::Budget;
use crate::runtime_api::RuntimeApi;

/// How long a container has waited for work before it is frozen.
const FREEZE_AFTER: Duration = Duration::from_millis(200);
/// How long those who subscribed to telemetry may take for what there is to be told before that.
const TELEMETRY_TIME: Duration = Duration::from_secs(2);

/// Freezes and thaws one container.
pub(super) struct Freezer {
    cgroup: Arc<Cgroup>,
    api: RuntimeApi,
    budget: Budget,
    state: Mutex<State>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Thawed,
    Frozen,
    /// For good: it is to end.
    Released,
}

// === impl Freezer ===

impl Freezer {
    pub(super) fn new(cgroup: Arc<Cgroup>, api: RuntimeApi, budget: Budget) -> Arc<Self> {
        Arc::new(Self {
            cgroup,
            api,
            budget,
            state: Mutex::new(State::Thawed),
        })
    }

    /// Freezes the container whenever it has nothing to do, until dropped.
    pub(super) async fn run(self: Arc<Self>) {
        let api = &self.api;
        loop {
            api.idle(true).await;
            let wait = async {
                let _ = tokio::time::timeout(TELEMETRY_TIME, api.telemetry().sent()).await;
                tokio::time::sleep(FREEZE_AFTER).await;
            };
            tokio::select! {
                () = api.idle(false) => continue,
                () = wait => self.freeze(),
            }
            api.idle(false).await;
        }
    }

    /// To be called when there is something to do, which [`RuntimeApi`] knows of.
    pub(super) fn thaw(&self) {
        self.leave(State::Thawed);
    }

    /// Lets the container run to its end.
    pub(super) fn release(&self) {
        self.leave(State::Released);
    }

    /// Looks again under the lock: who gives it something to do does that first, and thaws then.
    fn freeze(&self) {
        let _at_work = self.budget.charge_now();
        let mut state = self.state();
        if *state == State::Thawed && self.api.is_idle() {
            match self.cgroup.freeze(true) {
                Ok(()) => {
                    *state = State::Frozen;
                    self.api.telemetry().pause(true);
                }
                Err(error) => tracing::error!("{error}"),
            }
        }
    }

    fn leave(&self, to: State) {
        let mut state = self.state();
        if *state == State::Frozen {
            if let Err(error) = self.cgroup.freeze(false) {
                // It has ended.
                tracing::debug!("{error}");
            }
            self.api.telemetry().pause(false);
        }
        if *state != State::Released {
            *state = to;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
