//! What functions and the programs of launched machines write, kept in files of this host: for a time and a size, for who reads it
//! later or as it comes. What is said of a function here holds for such a machine too, but that nobody deletes it.
//!
//! ```text
//!  guest ──FollowLogs──► follow ──batch──► keeper ──► folder ──► files of each function
//!                          │ whose: sources            │ views
//!                          └◄──── taken ───────────────┴──► reader ──► who reads
//! ```
//!
//! Never on the path of a call, and never synced. One batch of a machine is under way at a time: a disk that is slow slows down
//! the guests that write, whose lines are then lost and counted where they are made.

mod folder;
mod follow;
mod keeper;
mod line;
mod read;
mod segment;
mod sources;
#[cfg(test)]
mod tests;
mod views;

use std::path::Path;
use std::time::Duration;

use tokio::sync::mpsc;
use ulid::Ulid;

pub(crate) use follow::follow;
pub use read::{Filter, ReadError, Reader};
pub(crate) use sources::{Source, Sources, Whose};

use crate::catalog::Function;
use crate::config;
use crate::host::Exists;
use crate::tasks::{Essential, Task};
use folder::Folder;
use keeper::{Order, keep};
use line::Entry;
use views::Views;

/// Orders that may wait: each is of a machine, which waits itself.
const ORDERS: usize = 64;

/// Where the logs are in the folder of the agent's state.
const FOLDER: &str = "logs";

/// The logs of all functions; clones share them.
#[derive(Clone, Debug)]
pub struct Logs {
    orders: mpsc::Sender<Order>,
    views: Views,
}

/// How much is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Of a function, in bytes.
    pub function_bytes: u64,
    /// Of all functions, in bytes.
    pub total_bytes: u64,
    /// How long.
    pub retention: Duration,
}

// === impl Logs ===

impl Logs {
    /// Keeps logs in the folder of the agent's state, of functions that exist. What is there already is known a little later.
    pub fn start(state: &Path, config: &config::Logs, exists: Exists, essential: &Essential) -> Self {
        let bounds = Bounds {
            function_bytes: u64::from(config.function_mib) << 20,
            total_bytes: u64::from(config.total_mib) << 20,
            retention: config.retention,
        };
        let (orders, received) = mpsc::channel(ORDERS);
        let views = Views::default();
        let folder = Folder::new(state.join(FOLDER), bounds, views.clone());
        essential.spawn(Task::Logs, keep(folder, exists, received));
        Self { orders, views }
    }

    /// Appends lines of a function; resolves when they are in its file, or can't be.
    async fn append(&self, source: Source, entries: Vec<Entry>) {
        let (taken, heard) = tokio::sync::oneshot::channel();
        let order = Order::Append { source, entries, taken };
        // Where the task has ended the agent ends.
        if self.orders.send(order).await.is_ok() {
            let _ = heard.await;
        }
    }

    /// Removes what a function has written that is no more.
    pub async fn function_deleted(&self, uid: Ulid) {
        let _ = self.orders.send(Order::Delete(uid)).await;
    }

    /// What is kept of a function. None where it has been deleted.
    pub async fn reader(&self, function: &Function, filter: Filter) -> Option<Reader> {
        let view = self.views.of(function.uid, || function.is_deleted()).await?;
        Some(Reader::new(view, filter))
    }

    /// What is kept of the program of a machine that was launched.
    pub async fn machine_reader(&self, machine: Ulid, filter: Filter) -> Option<Reader> {
        let view = self.views.of(machine, || false).await?;
        Some(Reader::new(view, filter))
    }
}
