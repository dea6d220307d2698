//! Writes decisions to the store and reports them, off the way of everyone.

use stoker_policy::{Command, Decision, Reason, Refusal};
use stoker_proto::v1;
use stoker_proto::v1::event::Event;
use tokio::sync::{broadcast, mpsc, oneshot};

use super::{Entries, words};
use crate::host::recorder::Recorder;
use crate::report::Reporter;
use crate::store::{Store, StoreError, StoredDecision, StoredNotification};
use crate::tasks::{Essential, Task};

/// How many batches may wait for the disk.
const QUEUE: usize = 64;

/// What is to be kept.
#[derive(Debug)]
pub(super) enum Keep {
    Entries(Entries),
    /// Answered once all before it is kept, and all that was recorded.
    Settle(Recorder, oneshot::Sender<()>),
}

/// `told` hears of notifications once they are kept, or can't be.
pub(super) fn start(
    store: Store,
    reporter: Reporter,
    told: broadcast::Sender<StoredNotification>,
    essential: &Essential,
) -> mpsc::Sender<Keep> {
    let (to, mut queue) = mpsc::channel(QUEUE);
    essential.spawn(Task::Keeper, async move {
        while let Some(keep) = queue.recv().await {
            match keep {
                Keep::Entries(mut entries) => {
                    if let Err(error) = keep_amounts(&store, &reporter, &mut entries, &told).await {
                        tracing::error!(%error, "amounts of functions are not kept");
                    }
                    if let Err(error) = self::keep(&store, &reporter, &entries).await {
                        let (decisions, lost) = (entries.decisions.len(), store.decisions_lost());
                        tracing::error!(%error, decisions, lost, "decisions are not kept");
                    }
                }
                Keep::Settle(recorder, reply) => recorder.answer_when_recorded(reply),
            }
        }
    });
    to
}

/// What was determined of functions' amounts, and what their users are told.
async fn keep_amounts(
    store: &Store,
    reporter: &Reporter,
    entries: &mut Entries,
    told: &broadcast::Sender<StoredNotification>,
) -> Result<(), StoreError> {
    let resizes = std::mem::take(&mut entries.resizes);
    let notifications = std::mem::take(&mut entries.notifications);
    if resizes.is_empty() && notifications.is_empty() {
        return Ok(());
    }
    let kept = store.keep_resizes(resizes, notifications.clone()).await;
    let mut reported = Ok(());
    for notification in notifications {
        if reporter.reports() {
            let event = Event::Notification(notification.notification.clone());
            reported = reported.and(reporter.record(event).await);
        }
        // There may be nobody who watches.
        let _ = told.send(notification);
    }
    kept.and(reported)
}

/// What is reported does not depend on what is kept.
async fn keep(store: &Store, reporter: &Reporter, entries: &Entries) -> Result<(), StoreError> {
    let entries = entries.decisions.as_slice();
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
pub(super) fn lose(store: &Store, reporter: &Reporter, entries: &Entries) -> u64 {
    reporter.lost(&Event::Decisions(v1::DecisionBatch::default()));
    for notification in &entries.notifications {
        reporter.lost(&Event::Notification(notification.notification.clone()));
    }
    store.lost_decisions(
        entries
            .decisions
            .iter()
            .filter(|entry| !is_routine(&entry.decision))
            .count(),
    )
}

/// What there is most of, in a flood too, and says least: not kept on disk.
fn is_routine(decision: &Decision) -> bool {
    match &decision.command {
        Command::Wait { .. } | Command::SettleCredits { .. } => true,
        // As often as such requests come, and kept as notifications where they are news.
        Command::Notify { notice } => notice.own_amount,
        Command::Dispatch { .. } => matches!(decision.reason, Reason::IdleContainer { .. }),
        Command::Refuse { refusal, .. } => {
            matches!(refusal, Refusal::QueueFull { .. } | Refusal::AccountQueueFull { .. })
        }
        _ => false,
    }
}
