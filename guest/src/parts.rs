//! Answers that functions stream, on their way to the agent: each as far as the agent has granted it room, for all invocations
//! of a machine share one connection.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use bytes::Bytes;
use stoker_proto::guest::InvokeResponse;
use stoker_proto::limits::{STREAM_PART_BYTES, STREAM_WINDOW_BYTES};
use tokio::sync::{Mutex, Semaphore, mpsc};
use tonic::Status;

use crate::budget::Budget;

/// Where the answers of a connection go.
pub(crate) type Answers = mpsc::Sender<Result<InvokeResponse, Status>>;

/// The streamed answers of one connection, by call. Dropped with the connection: what they still have is thrown away then, so
/// that their functions go on.
#[derive(Debug, Default)]
pub(crate) struct Windows(HashMap<u64, Weak<Inner>>);

/// Where the parts of one answer go. Clones are the same.
#[derive(Clone, Debug)]
pub(crate) struct Parts {
    inner: Arc<Inner>,
    /// Of the container that streams it.
    budget: Option<Budget>,
}

#[derive(Debug)]
struct Inner {
    call: u64,
    /// The bytes that may be passed on; closed once nobody takes them.
    window: Semaphore,
    to: Mutex<To>,
}

#[derive(Debug)]
struct To {
    /// None once the call is over: no part comes after its end.
    answers: Option<Answers>,
    /// A part went out.
    begun: bool,
}

// === impl Windows ===

impl Windows {
    /// A call has come whose answer is to be streamed.
    pub(crate) fn open(&mut self, call: u64, to: Answers) -> Parts {
        self.0.retain(|_, parts| parts.strong_count() > 0);
        let parts = Arc::new(Inner {
            call,
            window: Semaphore::new(STREAM_WINDOW_BYTES),
            to: Mutex::new(To {
                answers: Some(to),
                begun: false,
            }),
        });
        self.0.insert(call, Arc::downgrade(&parts));
        Parts {
            inner: parts,
            budget: None,
        }
    }

    /// One of them may pass on more, up to the window. One that is over has no use for it.
    pub(crate) fn grant(&self, call: u64, bytes: u32) {
        if let Some(parts) = self.0.get(&call).and_then(Weak::upgrade) {
            let room = STREAM_WINDOW_BYTES.saturating_sub(parts.window.available_permits());
            let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
            parts.window.add_permits(bytes.min(room));
        }
    }
}

impl Drop for Windows {
    fn drop(&mut self) {
        for parts in self.0.values().filter_map(Weak::upgrade) {
            parts.window.close();
        }
    }
}

// === impl Parts ===

impl Parts {
    /// The same, of a container.
    pub(crate) fn of(self, budget: &Budget) -> Self {
        let budget = Some(budget.clone());
        Self { budget, ..self }
    }

    /// Passes bytes on, in parts, as there is room for them; or throws them away where nobody takes them any more.
    pub(crate) async fn send(&self, mut bytes: Bytes) {
        while !bytes.is_empty() {
            let part = bytes.split_to(bytes.len().min(STREAM_PART_BYTES));
            let passed_on = part.len();
            let room = u32::try_from(passed_on).unwrap_or(u32::MAX);
            let Ok(room) = self.inner.window.acquire_many(room).await else {
                return;
            };
            room.forget();
            let mut to = self.inner.to.lock().await;
            let To {
                answers: Some(answers),
                begun,
            } = &mut *to
            else {
                return;
            };
            *begun = true;
            let part = InvokeResponse {
                payload: part,
                call: self.inner.call,
                more: true,
                ..Default::default()
            };
            // Nobody hears it where the agent has left.
            let _ = answers.send(Ok(part)).await;
            if let Some(budget) = &self.budget {
                budget.grant_bytes(passed_on);
            }
        }
    }

    /// Nothing is passed on from now on. Whether anything was.
    pub(crate) async fn end(&self) -> bool {
        self.inner.window.close();
        let mut to = self.inner.to.lock().await;
        to.answers = None;
        to.begun
    }
}
