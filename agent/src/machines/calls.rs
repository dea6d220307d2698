//! Invocations in one guest: all go over one stream, and come back by another as they are answered.
//!
//! ```text
//!  Calls::run ──channel──► outgoing ──► h2 stream ──► guest
//!      ▲                      │ (sent)
//!      ├── oneshot ◄── waiting, by number ◄── answers ◄── h2 stream
//!      └── parts ◄──────────────┘ (what is streamed before)
//! ```

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{SystemTime, UNIX_EPOCH};

use stoker_proto::guest as proto;
use stoker_proto::guest::guest_client::GuestClient;
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio_stream::Stream;
use tonic::Status;
use tonic::transport::Channel;

use super::guest::cut_status;
use super::parts::{Incoming, Parts};

/// How many requests may wait for the connection before those that come later wait themselves.
const QUEUE: usize = 16;

/// Runs invocations; clones share the streams, which end with the last.
#[derive(Clone, Debug)]
pub(super) struct Calls(Arc<Streams>);

#[derive(Debug)]
struct Streams {
    to: mpsc::Sender<proto::InvokeRequest>,
    waiting: Arc<Mutex<Waiting>>,
    listener: AbortHandle,
}

/// What became of an invocation that has no answer.
#[derive(Clone, Debug)]
pub(super) enum Unanswered {
    /// It was never sent, or the guest said that it has not begun it.
    NotBegun(Status),
    /// The guest may have begun it.
    Lost(Status),
}

#[derive(Debug, Default)]
struct Waiting {
    last: u64,
    calls: HashMap<u64, Call>,
    /// Why nothing is sent any more.
    over: Option<Status>,
}

#[derive(Debug)]
struct Call {
    sent: bool,
    tell: oneshot::Sender<Result<proto::InvokeResponse, Unanswered>>,
    /// Where what is streamed goes before.
    parts: Option<Incoming>,
}

/// The requests, each noted as sent when the connection takes it.
struct Outgoing {
    requests: mpsc::Receiver<proto::InvokeRequest>,
    waiting: Arc<Mutex<Waiting>>,
}

/// Forgets a call when dropped.
struct Place<'a> {
    waiting: &'a Mutex<Waiting>,
    call: u64,
}

// === impl Calls ===

impl Calls {
    /// Opens the streams. The receiver completes when they are over, which the end of the connection is too, and says how.
    pub(super) fn open(client: GuestClient<Channel>) -> (Self, oneshot::Receiver<Status>) {
        let (to, requests) = mpsc::channel(QUEUE);
        let (open, over) = oneshot::channel();
        let waiting = Arc::default();
        let outgoing = Outgoing {
            requests,
            waiting: Arc::clone(&waiting),
        };
        let heard = Arc::clone(&waiting);
        let listener = tokio::spawn(async move {
            let status = cut_status(&listen(client, outgoing, &heard).await);
            lock(&heard).end(&status);
            // Nobody may wait for it any more.
            let _ = open.send(status);
        });
        let listener = listener.abort_handle();
        (Self(Arc::new(Streams { to, waiting, listener })), over)
    }

    /// Where what one streams can be read, for [`run`](Self::run).
    pub(super) fn parts(&self) -> Parts {
        Parts::new(self.0.to.clone())
    }

    /// Runs one. What it streams goes to `parts`, if there is such; what is answered is the rest.
    ///
    /// # Errors
    /// [`Unanswered`] says whether it may have begun.
    pub(super) async fn run(
        &self,
        mut request: proto::InvokeRequest,
        parts: Option<Incoming>,
    ) -> Result<proto::InvokeResponse, Unanswered> {
        let (tell, told) = oneshot::channel();
        let waiting = &*self.0.waiting;
        let place = Place {
            waiting,
            call: lock(waiting).add(tell, parts)?,
        };
        request.call = place.call;
        request.host_time_ns = now_ns();
        // Where there is no receiver any more the call was told so.
        let _ = self.0.to.send(request).await;
        told.await
            .unwrap_or_else(|_| Err(Unanswered::Lost(Status::aborted("it is not listened to any more"))))
    }
}

/// The host's clock, in ns since 1970.
fn now_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// Passes on each answer; says why no more come.
async fn listen(mut client: GuestClient<Channel>, outgoing: Outgoing, waiting: &Mutex<Waiting>) -> Status {
    let mut answers = match client.invoke(outgoing).await {
        Ok(answers) => answers.into_inner(),
        Err(status) => return status,
    };
    loop {
        match answers.message().await {
            Ok(Some(part)) if part.more => {
                if !lock(waiting).part(&part) {
                    return Status::aborted("it streamed what it was not to");
                }
            }
            Ok(Some(answer)) => {
                let Some(call) = lock(waiting).calls.remove(&answer.call) else {
                    return Status::aborted("it answered what it was not asked");
                };
                // Nobody hears it where the call is given up.
                let _ = call.tell.send(begun(answer));
            }
            Ok(None) => return Status::aborted("it ended the stream"),
            Err(status) => return status,
        }
    }
}

fn begun(mut answer: proto::InvokeResponse) -> Result<proto::InvokeResponse, Unanswered> {
    match std::mem::take(&mut answer.not_begun) {
        why if why.is_empty() => Ok(answer),
        why => Err(Unanswered::NotBegun(Status::failed_precondition(why))),
    }
}

// === impl Waiting ===

impl Waiting {
    fn add(
        &mut self,
        tell: oneshot::Sender<Result<proto::InvokeResponse, Unanswered>>,
        parts: Option<Incoming>,
    ) -> Result<u64, Unanswered> {
        if let Some(status) = &self.over {
            return Err(Unanswered::NotBegun(status.clone()));
        }
        self.last += 1;
        if let Some(parts) = &parts {
            parts.begin(self.last);
        }
        let sent = false;
        self.calls.insert(self.last, Call { sent, tell, parts });
        Ok(self.last)
    }

    /// A part of an answer has come. Whether it was to.
    fn part(&self, part: &proto::InvokeResponse) -> bool {
        let call = self.calls.get(&part.call);
        let parts = call.and_then(|call| call.parts.as_ref());
        parts.is_some_and(|parts| parts.push(&part.payload))
    }

    /// Whether a request may be sent; it counts as sent then.
    fn send(&mut self, call: u64) -> bool {
        if self.over.is_some() {
            return false;
        }
        let call = self.calls.get_mut(&call);
        call.map(|call| call.sent = true).is_some()
    }

    fn end(&mut self, status: &Status) {
        self.over = Some(status.clone());
        for (_, call) in self.calls.drain() {
            let why = if call.sent {
                Unanswered::Lost(status.clone())
            } else {
                Unanswered::NotBegun(status.clone())
            };
            let _ = call.tell.send(Err(why));
        }
    }
}

// === impl Outgoing ===

impl Stream for Outgoing {
    type Item = proto::InvokeRequest;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            let request = std::task::ready!(self.requests.poll_recv(cx));
            match request {
                // One that was given up meanwhile is left out.
                Some(request) if !lock(&self.waiting).send(request.call) => {}
                request => return Poll::Ready(request),
            }
        }
    }
}

// === impl Place ===

impl Drop for Place<'_> {
    fn drop(&mut self) {
        lock(self.waiting).calls.remove(&self.call);
    }
}

// === impl Streams ===

impl Drop for Streams {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

/// Every change leaves it whole, so a panic elsewhere does no harm.
fn lock(waiting: &Mutex<Waiting>) -> MutexGuard<'_, Waiting> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}
