//! How a container is brought to its end: at once, or with time for those in it that are owed some (AWS Lambda Developer
//! Guide, "Understanding the Lambda execution environment lifecycle", Shutdown phase).
//!
//! ```text
//!   no extensions         SIGKILL
//!   internal ones         SIGTERM to the runtime ── 500 ms ──► SIGKILL         where it was stopped or ran out of time
//!   external ones         SIGTERM to the runtime ── 300 or 500 ms ──► SIGKILL to it, SHUTDOWN to those who hear of it
//!                                                ── 2,000 ms in all ──► SIGKILL
//! ```

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::watch;
use tokio::time::Instant;

use super::cgroup::Cgroup;
use super::end::{End, Failure, FailureKind, Kill};
use super::freezer::Freezer;
use super::launch::{Control, Member};
use crate::runtime_api::RuntimeApi;

/// What a runtime has between SIGTERM and SIGKILL.
const RUNTIME_TIME: Duration = Duration::from_millis(300);
/// The same with internal extensions.
const RUNTIME_TIME_WITH_INTERNAL: Duration = Duration::from_millis(500);
/// What a container with external extensions has in all.
const EXTENSIONS_TIME: Duration = Duration::from_secs(2);
/// After a kill an answer waits this long at most for the processes to be gone.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// The end of one container.
pub(super) struct Shutdown {
    pub(super) id: String,
    pub(super) cgroup: Arc<Cgroup>,
    pub(super) control: Control,
    pub(super) freezer: Arc<Freezer>,
    pub(super) api: RuntimeApi,
    /// Whether the runtime runs, where there are external extensions.
    pub(super) runtime_runs: watch::Sender<bool>,
    pub(super) ended: watch::Receiver<Option<Arc<End>>>,
    /// Why it has begun, if it has.
    pub(super) why: Mutex<Option<Kill>>,
}

// === impl Shutdown ===

impl Shutdown {
    /// Why it has begun, if it has.
    pub(super) fn why(&self) -> Option<Kill> {
        self.why.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Begins, unless it has begun.
    pub(super) fn begin(self: &Arc<Self>, why: Kill) {
        {
            let mut begun = self.why.lock().unwrap_or_else(PoisonError::into_inner);
            if begun.is_some() {
                return;
            }
            *begun = Some(why.clone());
        }
        // Whoever began it may be gone before it is over.
        tokio::spawn(Arc::clone(self).carry_out(why));
    }

    /// Begins, unless it has begun, and waits for the end.
    pub(super) async fn run(self: &Arc<Self>, why: Kill) -> Failure {
        self.begin(why.clone());
        match tokio::time::timeout(EXTENSIONS_TIME + KILL_TIMEOUT, self.end()).await {
            Ok(end) => end.failure.clone(),
            Err(_) => {
                tracing::error!(container = %self.id, "does not go away after SIGKILL");
                Failure::of_kill(self.why().unwrap_or(why))
            }
        }
    }

    /// Resolves when the container is no more.
    pub(super) async fn end(&self) -> Arc<End> {
        let mut ended = self.ended.clone();
        let end = ended.wait_for(Option::is_some).await;
        match end.ok().and_then(|end| end.clone()) {
            Some(end) => end,
            // Its task tells before it ends.
            None => std::future::pending().await,
        }
    }

    async fn carry_out(self: Arc<Self>, why: Kill) {
        self.freezer.release();
        let failure = Failure::of_kill(why.clone());
        self.api
            .ending(failure.kind == FailureKind::TimedOut, &failure.name)
            .await;
        if self.api.has_external_extensions() {
            tokio::select! {
                _ = self.end() => {}
                () = self.ask_all(why.shutdown_reason()) => {}
            }
        } else if matches!(why, Kill::Stop | Kill::Timeout(_)) && self.api.has_internal_extensions() {
            self.control.terminate();
            let _ = tokio::time::timeout(RUNTIME_TIME_WITH_INTERNAL, self.end()).await;
        }
        if self.ended.borrow().is_none()
            && let Err(error) = self.cgroup.kill()
        {
            tracing::debug!("{error}");
        }
    }

    /// Asks the runtime to end, and then external extensions. Their time is over then.
    async fn ask_all(&self, reason: &str) {
        let begin = Instant::now();
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let runtime_time = if self.api.has_internal_extensions() {
            RUNTIME_TIME_WITH_INTERNAL
        } else {
            RUNTIME_TIME
        };
        self.control.terminate();
        let mut runtime_runs = self.runtime_runs.subscribe();
        let _ = tokio::time::timeout(runtime_time, runtime_runs.wait_for(|runs| !runs)).await;
        self.control.kill(Member::Runtime);
        let deadline_ms = (since_1970 + EXTENSIONS_TIME).as_millis();
        for index in self
            .api
            .shut_down(reason, u64::try_from(deadline_ms).unwrap_or(u64::MAX))
        {
            self.control.kill(Member::Extension(index));
        }
        tokio::time::sleep_until(begin + EXTENSIONS_TIME).await;
    }
}
