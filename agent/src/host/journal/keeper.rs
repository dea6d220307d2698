//! Writes decisions to the store and reports them, off the way of everyone.

use stoker_policy::{Command, Decision, Reason, Refusal};
use stoker_proto::v1;
use stoker_proto::v1::event::Event;
use tokio::sync::{mpsc, oneshot};

use super::{Entry, words};
use crate::host::recorder::Recorder;
use crate::report::Reporter;
use crate::store::{Store, StoreError, StoredDecision};
use crate::tasks::{Essential, Task};

/// How many batches may wait for the disk.
const QUEUE: usize = 64;

/// What is to be kept.
#[derive(Debug)]
pub(super) enum Keep {
    Entries(Vec<Entry>),
    /// Answered once all before it is kept, and all that was recorded.
    Settle(Recorder, oneshot::Sender<()>),
}

pub(super) fn start(store: Store, reporter: Reporter, essential: &Essential) -> mpsc::Sender<Keep> {
    let (to, mut queue) = mpsc::channel(QUEUE);
    essential.spawn(Task::Keeper, async move {
        while let Some(keep) = queue.recv().await {
            match keep {
                Keep::Entries(entries) => {
                    if let Err(error) = self::keep(&store, &reporter, &entries).await {
                        let lost = store.decisions_lost();
                        tracing::error!(%error, decisions = entries.len(), lost, "decisions are not kept");
                    }
                }
                Keep::Settle(recorder, reply) => recorder.answer_when_recorded(reply),
            }
        }
    });
    to
}

/// What is reported does not depend on what is kept.
async fn keep(store: &Store, reporter: &Reporter, entries: &[Entry]) -> Result<(), StoreError> {
    let mut reported = Ok(());
    if reporter.reports() {
        let decisions = entries.iter().map(words::decision).collect();
        let batch = v1::DecisionBatch { decisions };
        reported = reporter.record(Event::Decisions(batch)).await;
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
        return reported;
    }
    store.append_decisions(lasting).await.and(reported)
}

/// Counts decisions that never came so far as to be kept; answers with how many there are in all.
pub(super) fn lose(store: &Store, reporter: &Reporter, entries: &[Entry]) -> u64 {
    reporter.lost(&Event::Decisions(v1::DecisionBatch::default()));
    store.lost_decisions(entries.iter().filter(|entry| !is_routine(&entry.decision)).count())
}

/// What there is most of, in a flood too, and says least: not kept on disk.
fn is_routine(decision: &Decision) -> bool {
    match &decision.command {
        Command::Wait { .. } | Command::SettleCredits { .. } => true,
        Command::Dispatch { .. } => matches!(decision.reason, Reason::IdleContainer { .. }),
        Command::Refuse { refusal, .. } => {
            matches!(refusal, Refusal::QueueFull { .. } | Refusal::AccountQueueFull { .. })
        }
        _ => false,
    }
}
