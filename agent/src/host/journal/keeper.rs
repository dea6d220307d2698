//! Writes decisions to the store and reports them, off the way of everyone.

use stoker_policy::{Command, Decision, Reason, Refusal};
use stoker_proto::v1;
use stoker_proto::v1::event::Event;
use tokio::sync::{mpsc, oneshot};

use super::{Entry, words};
use crate::host::recorder::Recorder;
use crate::report::Reporter;
use crate::store::{Store, StoreError, StoredDecision};

/// How many batches may wait for the disk.
const QUEUE: usize = 64;

/// What is to be kept.
#[derive(Debug)]
pub(super) enum Keep {
    Entries(Vec<Entry>),
    /// Answered once all before it is kept, and all that was recorded.
    Settle(Recorder, oneshot::Sender<()>),
}

pub(super) fn start(store: Store, reporter: Reporter) -> mpsc::Sender<Keep> {
    let (to, mut queue) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        while let Some(keep) = queue.recv().await {
            match keep {
                Keep::Entries(entries) => {
                    if let Err(error) = self::keep(&store, &reporter, &entries).await {
                        tracing::error!(%error, decisions = entries.len(), "decisions are not kept");
                    }
                }
                Keep::Settle(recorder, reply) => recorder.answer_when_recorded(reply),
            }
        }
    });
    to
}

async fn keep(store: &Store, reporter: &Reporter, entries: &[Entry]) -> Result<(), StoreError> {
    if reporter.reports() {
        let decisions = entries.iter().map(words::decision).collect();
        let batch = v1::DecisionBatch { decisions };
        reporter.record(Event::Decisions(batch)).await?;
    }
    let lasting: Vec<_> = entries
        .iter()
        .filter(|entry| !is_routine(&entry.decision))
        .map(|entry| {
            let command = &entry.decision.command;
            StoredDecision {
                machine: command.machine().map(|id| id.0),
                container: command.container().map(|id| id.0),
                request: command.request().map(|id| id.0),
                decision: words::decision(entry),
            }
        })
        .collect();
    if lasting.is_empty() {
        return Ok(());
    }
    store.append_decisions(lasting).await
}

/// What there is most of, in a flood too, and says least: not kept on disk.
fn is_routine(decision: &Decision) -> bool {
    match &decision.command {
        Command::Wait { .. } => true,
        Command::Dispatch { .. } => matches!(decision.reason, Reason::IdleContainer { .. }),
        Command::Refuse { refusal, .. } => {
            matches!(refusal, Refusal::QueueFull { .. } | Refusal::AccountQueueFull { .. })
        }
        _ => false,
    }
}
