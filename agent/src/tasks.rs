//! Which tasks the agent is of no use without. Where one of them ends while the agent runs, by a panic or otherwise, the
//! whole agent ends with an error, is started again, and takes its machines over: it never runs on without a part of it.
//!
//! All other tasks belong to one connection, call or machine, and take nothing else with them when they panic: a connection
//! is closed, a call is answered with an error and its container ended, a machine is ended.

use std::fmt;

use tokio::sync::watch;

/// A task that the agent is of no use without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// The thread of the database.
    Store,
    /// The loop that owns machines, containers and requests.
    EventLoop,
    /// Passes changes of state on to the database and the controller.
    Recorder,
    /// Remembers decisions.
    Journal,
    /// Writes decisions to the database and reports them.
    Keeper,
    /// Hears of machines' credits, and writes them down.
    Credits,
    /// Looks at the host's memory while it is pressed.
    Pressure,
    /// Sends reports to the controller.
    Reports,
    /// Samples what machines use.
    Usage,
    /// Keeps what functions write.
    Logs,
    /// Ends the containers of functions that are deleted.
    Deletions,
    /// Removes images that were deleted once no machine runs them any more.
    Images,
    /// Hears signals.
    Signals,
    /// Takes changes of the configuration over.
    Reload,
    /// Looks whether the agent works, for its health and systemd's watchdog.
    Health,
    /// Answers Prometheus.
    Metrics,
}

/// An essential task has ended while the agent ran.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{task} {}, and the agent can't go on without; machines go on, and the next start takes them over", how(*.panicked))]
pub struct Died {
    /// Which.
    pub task: Task,
    /// By a panic, which the log has told of.
    pub panicked: bool,
}

/// Spawns essential tasks and hears of the first that ends; clones share it.
#[derive(Clone, Debug)]
pub struct Essential(watch::Sender<Option<Died>>);

// === impl Task ===

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Store => "the database's thread",
            Self::EventLoop => "the event loop",
            Self::Recorder => "the recorder of changes",
            Self::Journal => "the journal of decisions",
            Self::Keeper => "the keeper of decisions",
            Self::Credits => "the keeper of credits",
            Self::Pressure => "the watch of the host's memory",
            Self::Reports => "the sender of reports",
            Self::Usage => "the sampling of use",
            Self::Logs => "the keeper of functions' logs",
            Self::Deletions => "the ending of deleted functions",
            Self::Images => "the removal of deleted images",
            Self::Signals => "the handling of signals",
            Self::Reload => "the handling of reloads",
            Self::Health => "the check of the agent's health",
            Self::Metrics => "the answering of Prometheus",
        })
    }
}

// === impl Essential ===

impl Default for Essential {
    fn default() -> Self {
        Self(watch::Sender::new(None))
    }
}

impl Essential {
    /// Spawns a task that must not end while the agent runs.
    pub fn spawn(&self, task: Task, work: impl Future<Output = ()> + Send + 'static) {
        let running = tokio::spawn(work);
        let died = self.0.clone();
        tokio::spawn(async move {
            let panicked = running.await.is_err();
            // The first is the cause: others end because of it.
            died.send_if_modified(|first| {
                let is_first = first.is_none();
                first.get_or_insert(Died { task, panicked });
                is_first
            });
        });
    }

    /// Resolves once one has ended; never where none does.
    pub async fn died(&self) -> Died {
        let mut died = self.0.subscribe();
        match died.wait_for(Option::is_some).await.ok().and_then(|died| died.clone()) {
            Some(died) => died,
            None => std::future::pending().await,
        }
    }
}

fn how(panicked: bool) -> &'static str {
    if panicked { "panicked" } else { "has ended" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_first_that_ends_is_told_of_and_how() {
        for (panics, how) in [(true, "panicked"), (false, "has ended")] {
            let essential = Essential::default();
            let (end, ends) = tokio::sync::oneshot::channel::<()>();
            essential.spawn(Task::Journal, std::future::pending());
            essential.spawn(Task::Recorder, async move {
                let _ = ends.await;
                assert!(!panics, "as the test wants it");
            });
            let mut died = Box::pin(essential.died());
            let early = tokio::time::timeout(std::time::Duration::from_millis(20), &mut died).await;
            assert!(early.is_err(), "{early:?}");
            drop(end);
            let died = died.await;
            assert_eq!((died.task, died.panicked), (Task::Recorder, panics));
            let text = died.to_string();
            assert!(text.starts_with(&format!("the recorder of changes {how}")), "{text}");
            // One that ends because of it is not the cause.
            let (done, ended) = tokio::sync::oneshot::channel::<()>();
            essential.spawn(Task::Keeper, async move { drop(done) });
            assert!(ended.await.is_err());
            assert_eq!(essential.died().await, died);
        }
    }
}
