//! The task that writes logs: the only one that changes their files.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::MissedTickBehavior;
use ulid::Ulid;

use super::folder::Folder;
use super::line::Entry;
use super::sources::{Source, Whose};
use crate::host::Exists;

/// How many orders are carried out at a time.
const BATCH: usize = 64;

/// How often is looked for what is older than it is to be.
const TIDY: Duration = Duration::from_secs(600);

/// What is to be done with the files.
#[derive(Debug)]
pub(super) enum Order {
    /// Append lines of a function.
    Append {
        source: Source,
        entries: Vec<Entry>,
        /// Dropped once they are written, or lost.
        taken: oneshot::Sender<()>,
    },
    /// Remove all of a function.
    Delete(Ulid),
}

/// Carries out what comes, until nobody is left who could send anything.
pub(super) async fn keep(mut folder: Folder, exists: Exists, mut orders: mpsc::Receiver<Order>) {
    let Some(found) = blocking(folder, Folder::find).await else {
        return;
    };
    folder = found;
    let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + TIDY, TIDY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut batch = Vec::with_capacity(BATCH);
    loop {
        let heard = tokio::select! {
            heard = orders.recv_many(&mut batch, BATCH) => Some(heard),
            _ = ticks.tick() => None,
        };
        let exists = exists.clone();
        let carried_out = match heard {
            Some(0) => return,
            Some(_) => {
                let orders = std::mem::take(&mut batch);
                blocking(folder, move |folder| {
                    for order in orders {
                        carry_out(folder, &exists, order);
                    }
                })
                .await
            }
            None => blocking(folder, Folder::tidy).await,
        };
        match carried_out {
            Some(after) => folder = after,
            None => return,
        }
    }
}

fn carry_out(folder: &mut Folder, exists: &Exists, order: Order) {
    match order {
        Order::Append { source, entries, taken } => {
            // What a function that is deleted still writes is nobody's: its files go, or are gone.
            let is_there = match &source.whose {
                Whose::Function(name) => exists(name, source.uid),
                Whose::Machine(_) => true,
            };
            if is_there {
                folder.append(&source, &entries);
            }
            drop(taken);
        }
        Order::Delete(uid) => folder.delete(uid),
    }
}

/// Works on the folder where that may block. Nothing where it panicked, as the log has told: this task ends then, and the
/// agent with it.
async fn blocking(mut folder: Folder, work: impl FnOnce(&mut Folder) + Send + 'static) -> Option<Folder> {
    let working = tokio::task::spawn_blocking(move || {
        work(&mut folder);
        folder
    });
    working.await.ok()
}
