//! The AWS Lambda Runtime API (AWS Lambda Developer Guide, "Using the Lambda runtime API"; version 2018-06-01) and the
//! Extensions API, as one container sees them at `AWS_LAMBDA_RUNTIME_API`.
//!
//! Who speaks to it is hostile. So: a bounded number of connections, bounded heads of which few are large at a time, one
//! body at a time, bounded in size and time and not read at all unless it is its turn. What a container does to its server
//! it does to itself.
//!
//! ```text
//!   server ──┬─► runtime ──► session         what each call of a runtime does, and when it may come
//!     │      ├─► extensions ──► registry     the same for extensions
//!     │      │        └─► telemetry          what they subscribe to, and its delivery
//!     │      └─► body, stream, error_object  what is read of it
//!     └─► peer, line                         the connection of each request, and requests that wait
//! ```

mod body;
mod error_object;
mod extensions;
mod headers;
mod line;
mod peer;
mod reply;
mod runtime;
mod server;
mod session;
mod stream;
mod telemetry;
#[cfg(test)]
mod testing;
mod written_trailers;

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::net::TcpListener;
use tokio::sync::{Notify, oneshot, watch};

use extensions::Registry;
use line::{Line, Turn};
use peer::Peer;
use session::Session;
pub(crate) use session::{Invocation, NotBegun, Outcome};
pub(crate) use telemetry::{Kind, TelemetryApi};

use crate::budget::Budget;
use crate::container::Failure;
use crate::parts::Parts;

/// How a container's init went.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Init {
    #[default]
    Running,
    Done,
    /// The runtime's own report.
    Failed(Outcome),
}

/// What a function is to know itself by.
#[derive(Clone, Debug, Default)]
pub(crate) struct Identity {
    pub(crate) arn: String,
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) handler: String,
    pub(crate) account: String,
    /// What it may use of memory, in MiB.
    pub(crate) memory_mib: u32,
}

/// What the API needs of the container that it serves.
pub(crate) trait Sandbox: Send + Sync {
    /// The most memory that it has used so far, in bytes.
    fn memory_peak_bytes(&self) -> u64;
    /// Passes on all that its runtime has written by now.
    fn read_log(&self);
    /// What its owner reads of credits, and whether anything is known.
    fn credits(&self) -> CreditsReport<'_>;
}

/// A question that may take a moment.
pub(crate) type CreditsReport<'a> = Pin<Box<dyn Future<Output = (bool, serde_json::Value)> + Send + 'a>>;

/// An extension has said that it cannot go on: its container is to end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ExtensionFailure {
    /// Lambda's error type.
    pub(crate) kind: &'static str,
    pub(crate) message: String,
}

/// The Runtime API of one container. Clones are the same.
#[derive(Clone)]
pub(crate) struct RuntimeApi(Arc<Inner>);

struct Inner {
    state: Mutex<Shared>,
    /// There is something new for the requests that wait.
    news: Notify,
    init: watch::Sender<Init>,
    extension_failure: watch::Sender<Option<ExtensionFailure>>,
    identity: Identity,
    telemetry: TelemetryApi,
    sandbox: Box<dyn Sandbox>,
}

#[derive(Default)]
struct Shared {
    session: Session,
    extensions: Registry,
    /// The runtime has asked for an invocation.
    asked: bool,
    /// The requests that wait for an invocation.
    line: Line,
    /// Where the outcome of the current invocation goes.
    outcome: Option<oneshot::Sender<Outcome>>,
    /// Where what is streamed of it goes before, if its caller wants that.
    parts: Option<Parts>,
    /// The connection by which the last invocation went to the runtime.
    taken_by: Option<Arc<Peer>>,
    not_begun: bool,
}

// === impl RuntimeApi ===

impl RuntimeApi {
    pub(crate) fn new(identity: Identity, telemetry: TelemetryApi, sandbox: impl Sandbox + 'static) -> Self {
        Self(Arc::new(Inner {
            state: Mutex::default(),
            news: Notify::new(),
            init: watch::Sender::default(),
            extension_failure: watch::Sender::default(),
            identity,
            telemetry,
            sandbox: Box::new(sandbox),
        }))
    }

    /// Answers on `listener`, and brings telemetry to those who subscribe to it, until dropped.
    /// All of it within `budget`.
    pub(crate) async fn serve(self, listener: TcpListener, budget: Budget) {
        let telemetry = self.0.telemetry.clone();
        // One of them waits for its turns for both.
        let both = async { tokio::join!(server::serve(self, listener, &budget), telemetry.deliver(&budget)) };
        budget.paced(both).await;
    }

    pub(crate) fn telemetry(&self) -> &TelemetryApi {
        &self.0.telemetry
    }

    /// What its owner reads of credits, and whether anything is known.
    async fn credits(&self) -> (bool, serde_json::Value) {
        self.0.sandbox.credits().await
    }

    /// Resolves when the function has initialised, or reported that it cannot.
    pub(crate) async fn initialised(&self) -> Init {
        let mut init = self.0.init.subscribe();
        match init.wait_for(|init| *init != Init::Running).await {
            Ok(init) => init.clone(),
            // The sender is in `self`.
            Err(_) => Init::Running,
        }
    }

    /// Whether the function has initialised.
    pub(crate) fn is_initialised(&self) -> bool {
        *self.0.init.borrow() == Init::Done
    }

    /// External extensions of these names are about to be started.
    pub(crate) fn expect_extensions(&self, names: Vec<String>) {
        self.0.telemetry.expect_subscribers();
        self.state().extensions.expect(names);
    }

    /// Resolves when all external extensions have registered.
    pub(crate) async fn extensions_registered(&self) {
        self.until(|state| state.extensions.are_registered()).await;
    }

    /// Whether there are external extensions, which are told before the container ends.
    pub(crate) fn has_external_extensions(&self) -> bool {
        self.state().extensions.any_external()
    }

    /// Whether there are internal extensions, for whose sake a runtime is given time before it ends.
    pub(crate) fn has_internal_extensions(&self) -> bool {
        self.state().extensions.any_internal()
    }

    /// The name of the external extension at a place of those that were expected.
    pub(crate) fn extension_name(&self, index: usize) -> String {
        let name = self.state().extensions.external_name(index).map(str::to_owned);
        name.unwrap_or_default()
    }

    /// Tells external extensions that the container ends. Those that do not hear of it have no more to do: their places.
    pub(crate) fn shut_down(&self, reason: &str, deadline_ms: u64) -> Vec<usize> {
        let event = extensions::shutdown_event(reason, deadline_ms);
        let others = self.state().extensions.shut_down(&event);
        self.0.news.notify_waiters();
        others
    }

    /// The container is to end, and why. For those who listen.
    pub(crate) fn ending(&self, failure: &Failure) {
        if self.0.telemetry.is_on() {
            self.0.sandbox.read_log();
            let states = self.state().extensions.states();
            let memory = self.0.sandbox.memory_peak_bytes();
            self.0.telemetry.ending(failure, &states, memory);
        }
    }

    /// Resolves when no extension is at work any more for the invocation before: as long as one is, Lambda begins none.
    pub(crate) async fn extensions_ready(&self) {
        self.until(|state| state.extensions.are_ready()).await;
    }

    /// Whether the runtime waits for an invocation, there is none, and no extension is at work.
    pub(crate) fn is_idle(&self) -> bool {
        self.state().is_idle()
    }

    /// Resolves when it is idle, or when it is not.
    pub(crate) async fn idle(&self, idle: bool) {
        self.until(|state| state.is_idle() == idle).await;
    }

    /// Resolves when an extension has said that it cannot go on.
    pub(crate) async fn extension_failed(&self) -> ExtensionFailure {
        let mut failure = self.0.extension_failure.subscribe();
        let failed = failure.wait_for(Option::is_some).await;
        match failed.ok().and_then(|failure| failure.clone()) {
            Some(failure) => failure,
            // The sender is in `self`.
            None => std::future::pending().await,
        }
    }

    /// Hands over an invocation; its outcome comes by what is returned, and what it streams before by `parts`, if there are any.
    pub(crate) fn invoke(
        &self,
        invocation: Invocation,
        parts: Option<Parts>,
    ) -> Result<oneshot::Receiver<Outcome>, NotBegun> {
        let (sender, outcome) = oneshot::channel();
        let event = extensions::invoke_event(&invocation, &self.0.identity.arn);
        let begun = self.0.telemetry.is_on().then(|| invocation.clone());
        {
            let mut state = self.state();
            state.session.invoke(invocation)?;
            state.extensions.invoke(&event);
            state.outcome = Some(sender);
            state.parts = parts;
        }
        if let Some(invocation) = begun {
            let memory = || self.0.sandbox.memory_peak_bytes();
            self.0.telemetry.began(&invocation, memory);
        }
        self.0.news.notify_waiters();
        Ok(outcome)
    }

    /// To be called when every process of the container is gone, before its connections are dropped: nothing is taken any
    /// more.
    pub(crate) fn end(&self) {
        let mut state = self.state();
        let unread = state.taken_by.take().is_some_and(|peer| peer.was_reset());
        state.not_begun = state.session.end(unread);
    }

    /// Whether at the end there was an invocation that no process of the container can have begun: it still waited to be
    /// asked for, or lay unread in the connection that they left.
    pub(crate) fn has_not_begun(&self) -> bool {
        self.state().not_begun
    }

    /// The runtime asks for work: it is done with what it had.
    fn note_asked(&self) {
        if self.0.telemetry.is_on() {
            // What it wrote comes before that it is done.
            self.0.sandbox.read_log();
        }
        self.0.telemetry.asked();
    }

    /// A runtime or an extension has asked for what comes next: init is over when all have.
    fn note_ready(&self) {
        let ready = {
            let state = self.state();
            state.asked && state.extensions.are_ready()
        };
        if ready && (self.0.telemetry.is_on() || !self.is_initialised()) {
            let states = self.state().extensions.states();
            let memory = || self.0.sandbox.memory_peak_bytes();
            self.0.telemetry.ready(&states, memory);
        }
        self.0.init.send_if_modified(|init| {
            let over = ready && *init == Init::Running;
            if over {
                *init = Init::Done;
            }
            over
        });
    }

    /// An extension can't go on, or is no more. The first failure counts.
    pub(crate) fn extension_has_failed(&self, failure: ExtensionFailure) {
        self.0.extension_failure.send_if_modified(|first| {
            let told = first.is_none();
            first.get_or_insert(failure);
            told
        });
    }

    /// Resolves when something is so.
    async fn until(&self, so: impl Fn(&Shared) -> bool) {
        loop {
            // Listens before it looks, so that nothing falls between.
            let news = self.0.news.notified();
            tokio::pin!(news);
            news.as_mut().enable();
            if so(&self.state()) {
                return;
            }
            news.await;
        }
    }

    /// Lets a request wait in a line until it is its turn and there is something to take. None where another request of its
    /// client has come in its place, or there is no such line any more.
    async fn wait<T>(
        &self,
        peer: &Arc<Peer>,
        line: impl Fn(&mut Shared) -> Option<&mut Line>,
        take: impl Fn(&mut Shared) -> Option<T>,
    ) -> Option<T> {
        let waiter = line(&mut self.state())?.join(peer);
        // One that waits in vain sees it.
        self.0.news.notify_waiters();
        loop {
            let news = self.0.news.notified();
            tokio::pin!(news);
            news.as_mut().enable();
            {
                let mut state = self.state();
                match line(&mut state)?.turn(&waiter) {
                    Turn::Mine => {
                        if let Some(taken) = take(&mut state) {
                            return Some(taken);
                        }
                    }
                    Turn::Another => {}
                    Turn::Given => return None,
                }
            }
            news.await;
        }
    }

    /// The outcome that was claimed.
    fn settle(&self, outcome: Outcome) {
        self.0.telemetry.answered(&outcome);
        let mut state = self.state();
        if state.session.answered()
            && let Some(sender) = state.outcome.take()
        {
            // None waits any more once the deadline has passed.
            let _ = sender.send(outcome);
        }
    }

    /// One that asks anew by the connection that brought the invocation has read it.
    fn note_request_of(&self, peer: &Arc<Peer>) {
        let mut state = self.state();
        if state.taken_by.take_if(|by| Arc::ptr_eq(by, peer)).is_some() {
            state.session.read();
        }
    }

    fn state(&self) -> MutexGuard<'_, Shared> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Shared ===

impl Shared {
    fn is_idle(&self) -> bool {
        self.session.is_idle() && self.extensions.are_ready()
    }
}
