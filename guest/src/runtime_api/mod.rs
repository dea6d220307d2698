//! The AWS Lambda Runtime API (AWS Lambda Developer Guide, "Using the Lambda runtime API"; version 2018-06-01), as one
//! container sees it at `AWS_LAMBDA_RUNTIME_API`.
//!
//! Who speaks to it is hostile. So: a bounded number of connections, bounded heads of which few are large at a time, one
//! body at a time, bounded in size and time and not read at all unless it is its turn. What a container does to its server
//! it does to itself.
//!
//! ```text
//!   server ──► runtime ──► session       what each call of a runtime does, and when it may come
//!     │          └─► body, error_object  what is read of it
//!     └─► peer, line                     the connection of each request, and requests that wait
//! ```

mod body;
mod error_object;
mod headers;
mod line;
mod peer;
mod reply;
mod runtime;
mod server;
mod session;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::net::TcpListener;
use tokio::sync::{Notify, oneshot, watch};

use line::{Line, Turn};
use peer::Peer;
use session::Session;
pub(crate) use session::{Invocation, NotBegun, Outcome};

/// How a container's init went.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Init {
    #[default]
    Running,
    Done,
    /// The runtime's own report.
    Failed(Outcome),
}

/// The Runtime API of one container. Clones are the same.
#[derive(Clone)]
pub(crate) struct RuntimeApi(Arc<Inner>);

struct Inner {
    state: Mutex<Shared>,
    /// There is something new for the requests that wait.
    news: Notify,
    init: watch::Sender<Init>,
    arn: String,
}

#[derive(Default)]
struct Shared {
    session: Session,
    /// The requests that wait for an invocation.
    line: Line,
    /// Where the outcome of the current invocation goes.
    outcome: Option<oneshot::Sender<Outcome>>,
    /// The connection by which the last invocation went to the runtime.
    taken_by: Option<Arc<Peer>>,
    not_begun: bool,
}

// === impl RuntimeApi ===

impl RuntimeApi {
    /// For a function that is to know itself by `arn`.
    pub(crate) fn new(arn: String) -> Self {
        Self(Arc::new(Inner {
            state: Mutex::default(),
            news: Notify::new(),
            init: watch::Sender::default(),
            arn,
        }))
    }

    /// Answers on `listener`, until dropped.
    pub(crate) async fn serve(self, listener: TcpListener) {
        server::serve(self, listener).await;
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

    /// Hands over an invocation; its outcome comes by what is returned.
    pub(crate) fn invoke(&self, invocation: Invocation) -> Result<oneshot::Receiver<Outcome>, NotBegun> {
        let (sender, outcome) = oneshot::channel();
        {
            let mut state = self.state();
            state.session.invoke(invocation)?;
            state.outcome = Some(sender);
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
            // Listens before it looks, so that nothing falls between.
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
