//! The Telemetry API and the older Logs API: extensions subscribe to what becomes of their container and to what is written
//! in it, and it is brought to them by requests to a port of theirs.
//!
//! ```text
//!   what happens ──► progress ──► event ──┐
//!   what is written ──► lines ──► event ──┴─► buffer ──► delivery ──► network      for each subscriber
//! ```
//!
//! Nobody waits for a subscriber: not an invocation, and a container that has nothing more to do only for a while before
//! it is frozen. What subscribers make wait is bounded, and what is lost is told them.

mod buffer;
mod delivery;
mod event;
mod lines;
mod network;
mod progress;
mod state;
mod subscription;

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use hyper::StatusCode;
use tokio::sync::Notify;
use tokio::task::JoinSet;

use super::Identity;
use super::extensions::Event as Heard;
use super::reply::{self, Reply};
use super::session::{Invocation, Outcome};
use buffer::{Batch, Buffer, Due};
use delivery::{Link, PAUSES};
use event::Event;
use network::Network;
use state::{History, State, Subscription};
use subscription::{Request, Wrong};

use crate::budget::Budget;
pub(crate) use event::Kind;
pub(super) use subscription::Api;

/// The most subscriptions of one container.
const SUBSCRIPTIONS: usize = 10;

/// The telemetry of one container. Clones are the same.
#[derive(Clone)]
pub(crate) struct TelemetryApi(Arc<Inner>);

struct Inner {
    state: Mutex<State>,
    identity: Identity,
    /// There is another subscription, or less on its way.
    news: Notify,
}

// === impl TelemetryApi ===

impl TelemetryApi {
    pub(crate) fn new(identity: Identity) -> Self {
        Self(Arc::new(Inner {
            state: Mutex::default(),
            identity,
            news: Notify::new(),
        }))
    }

    /// External extensions will run: what is before they subscribe is kept for them.
    pub(super) fn expect_subscribers(&self) {
        self.state().history = Some(History::default());
    }

    /// Subscribes an extension, which asked by a connection of this container.
    pub(super) fn subscribe(&self, api: Api, name: &str, body: &[u8], connection: impl AsFd) -> Reply {
        let refuse =
            |status, kind: &str, message: &str| reply::error(status, &format!("{}.{kind}", api.name()), message);
        let mut state = self.state();
        if state.closed {
            let message = format!("{} API subscription is closed already", api.name());
            return refuse(StatusCode::FORBIDDEN, "SubscriptionClosed", &message);
        }
        let request = match Request::parse(api, body) {
            Ok(request) => request,
            Err(Wrong::Form(why)) => return refuse(StatusCode::BAD_REQUEST, "DeserializationError", &why),
            Err(Wrong::Values(why)) => return refuse(StatusCode::BAD_REQUEST, "ValidationError", &why),
            Err(Wrong::Place(why)) => return refuse(StatusCode::FORBIDDEN, "AccessDenied", why),
        };
        let others = || state.subscriptions.iter().filter(|other| other.name == name);
        if others().any(|other| other.api != api) {
            let message = format!("the extension {name} has subscribed by the other of the Logs and the Telemetry API");
            return refuse(StatusCode::BAD_REQUEST, "AccessDenied", &message);
        }
        if others().any(|other| other.request == request) {
            return reply::json(StatusCode::OK, Bytes::from_static(br#""AlreadySubscribed""#));
        }
        if state.subscriptions.len() >= SUBSCRIPTIONS {
            let message = format!("there are {SUBSCRIPTIONS} subscriptions, which is the most");
            return refuse(StatusCode::BAD_REQUEST, "ValidationError", &message);
        }
        let network = match Network::of(connection) {
            Ok(network) => network,
            Err(error) => {
                tracing::error!("cannot find the network of a container: {error}");
                return refuse(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    "ServerError",
                    "Internal server error",
                );
            }
        };
        let kinds = request.kinds.clone();
        state.subscriptions.push(Subscription {
            api,
            name: name.to_owned(),
            buffer: Buffer::new(request.buffering),
            request,
            network,
            sending: 0,
            wake: Arc::new(Notify::new()),
        });
        state.replay(&self.0.identity);
        state.push(&Event::Subscription {
            api,
            name,
            kinds: &kinds,
        });
        drop(state);
        self.0.news.notify_waiters();
        reply::json(StatusCode::OK, Bytes::from_static(br#""OK""#))
    }

    /// Whether somebody listens, or may come to listen to what is now.
    pub(super) fn is_on(&self) -> bool {
        let state = self.state();
        !state.subscriptions.is_empty() || state.history.is_some()
    }

    /// A program of the container has written something.
    pub(crate) fn write(&self, kind: Kind, data: &[u8]) {
        let mut state = self.state();
        if !state.wants(kind) {
            return;
        }
        let mut lines = std::mem::take(state.lines(kind));
        lines.write(data, |line| state.push_line(kind, line));
        *state.lines(kind) = lines;
    }

    /// The runtime asks for work.
    pub(super) fn asked(&self) {
        self.state().runtime_done();
    }

    /// The runtime and all extensions have done what there was to do.
    pub(super) fn ready(&self, extensions: &[(String, String, Vec<Heard>)], memory_peak_bytes: impl FnOnce() -> u64) {
        let mut state = self.state();
        state.init_over(progress::success(), extensions);
        if state.progress.is_reportable() {
            state.end_line(Kind::Function);
            state.report(&self.0.identity, memory_peak_bytes());
        }
        state.flush();
    }

    /// An invocation begins.
    pub(super) fn began(&self, invocation: &Invocation, memory_peak_bytes: impl FnOnce() -> u64) {
        let mut state = self.state();
        if state.subscriptions.is_empty() {
            return;
        }
        if state.progress.is_invoked() {
            // Its runtime had answered and not yet asked again.
            state.runtime_done();
            state.report(&self.0.identity, memory_peak_bytes());
        }
        state.begin(&self.0.identity, invocation);
    }

    /// The runtime has begun to answer.
    pub(super) fn answering(&self) {
        self.state().progress.answering();
    }

    /// The runtime has answered.
    pub(super) fn answered(&self, outcome: &Outcome) {
        self.state().progress.answered(outcome);
    }

    /// The runtime has told that it cannot initialise.
    pub(super) fn init_failed(&self, kind: &str) {
        let mut state = self.state();
        state.init_runtime_done(progress::error("error", kind));
    }

    /// The container is to end: whether for lack of time, and with which of Lambda's error types.
    pub(super) fn ending(
        &self,
        timed_out: bool,
        error_type: &str,
        extensions: &[(String, String, Vec<Heard>)],
        memory_peak_bytes: u64,
    ) {
        let ending = progress::error(if timed_out { "timeout" } else { "failure" }, error_type);
        let mut state = self.state();
        for kind in [Kind::Function, Kind::Extension] {
            state.end_line(kind);
        }
        state.init_over(ending.clone(), extensions);
        if state.progress.is_invoked() {
            state.progress.failed(ending);
            state.runtime_done();
            state.report(&self.0.identity, memory_peak_bytes);
        }
        state.paused = false;
        state.flush();
        state.wake();
    }

    /// The container is frozen, or no more.
    pub(crate) fn pause(&self, paused: bool) {
        let mut state = self.state();
        state.paused = paused;
        state.wake();
    }

    /// Resolves when what was to be sent at once has been, or was given up.
    pub(crate) async fn sent(&self) {
        loop {
            let news = self.0.news.notified();
            tokio::pin!(news);
            news.as_mut().enable();
            if self.state().is_sent() {
                return;
            }
            news.await;
        }
    }

    /// Brings what is to be sent to those who subscribed, until dropped, at the container's cost.
    pub(super) async fn deliver(self, budget: &Budget) {
        let mut subscribers = JoinSet::new();
        loop {
            let news = self.0.news.notified();
            tokio::pin!(news);
            news.as_mut().enable();
            let links: Vec<Link> = {
                let state = self.state();
                let new = state.subscriptions.iter().skip(subscribers.len());
                new.map(|new| Link::new(new.network.clone(), new.request.destination.clone(), budget.clone()))
                    .collect()
            };
            for link in links {
                let delivered = self.clone().deliver_to(subscribers.len(), link);
                subscribers.spawn(budget.throttle(delivered, ()));
            }
            news.await;
        }
    }

    /// Brings batches to one subscriber.
    async fn deliver_to(self, index: usize, mut link: Link) {
        loop {
            let Some(batch) = self.next_batch(index).await else {
                return;
            };
            let body = link.body(&batch);
            let mut pauses = PAUSES.iter();
            let sent = loop {
                self.running(index).await;
                let error = match link.send(body.clone()).await {
                    Ok(()) => break true,
                    Err(error) => error,
                };
                tracing::debug!("telemetry: {error}");
                if self.state().paused {
                    // It was frozen in the middle.
                    continue;
                }
                match pauses.next() {
                    Some(pause) => tokio::time::sleep(*pause).await,
                    None => break false,
                }
            };
            self.settle(index, &batch, sent);
        }
    }

    /// Waits for what is to be sent to a subscriber. None: there is no such subscriber.
    async fn next_batch(&self, index: usize) -> Option<Batch> {
        let wake = Arc::clone(&self.state().subscriptions.get(index)?.wake);
        loop {
            let woken = wake.notified();
            tokio::pin!(woken);
            woken.as_mut().enable();
            let now = Instant::now();
            let due = {
                let mut state = self.state();
                if state.paused {
                    Due::Never
                } else {
                    match state.subscriptions.get(index)?.buffer.due(now) {
                        Due::Now => return state.take(index),
                        due => due,
                    }
                }
            };
            match due {
                Due::At(at) => {
                    let _ = tokio::time::timeout_at(at.into(), woken).await;
                }
                Due::Now | Due::Never => woken.await,
            }
        }
    }

    /// Waits until the container runs.
    async fn running(&self, index: usize) {
        let Some(wake) = self.state().subscriptions.get(index).map(|to| Arc::clone(&to.wake)) else {
            return;
        };
        loop {
            let woken = wake.notified();
            tokio::pin!(woken);
            woken.as_mut().enable();
            if !self.state().paused {
                return;
            }
            woken.await;
        }
    }

    /// A batch was sent, or given up.
    fn settle(&self, index: usize, batch: &Batch, sent: bool) {
        let mut state = self.state();
        state.bytes = state.bytes.saturating_sub(batch.bytes);
        if let Some(subscription) = state.subscriptions.get_mut(index) {
            subscription.sending = 0;
            if !sent {
                subscription.buffer.lose(batch.events.len(), batch.text_bytes());
            }
        }
        drop(state);
        self.0.news.notify_waiters();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
