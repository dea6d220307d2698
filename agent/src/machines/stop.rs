//! How a machine is told to end, and why.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

/// Ends a machine; the first call counts, unless a later one leaves it less time.
#[derive(Clone, Debug)]
pub struct Stopper(Arc<watch::Sender<Option<Stop>>>);

/// Hears a [`Stopper`].
#[derive(Debug)]
pub struct Stopped(watch::Receiver<Option<Stop>>);

/// Why a machine is ended by the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Nobody needs it; its guest is asked to power off first.
    Gently(String),
    /// It has to go now.
    Now(String),
    /// Its guest can't be relied on any more.
    Broken(String),
    /// Nobody needs it; the program of its image is asked to end first, and its guest to power off then.
    AfterProgram {
        /// Why.
        why: String,
        /// The number of the signal that asks it to.
        signal: i32,
        /// How long it has for that.
        grace: Duration,
    },
    /// The program of its image has ended.
    ProgramEnded {
        /// How, in words.
        detail: String,
        /// What it exited with, or 128 and the number of the signal that ended it, as far as its guest says so.
        exit_status: Option<i32>,
    },
    /// The program of its image could not be started.
    ProgramFailed(String),
}

// === impl Stopper ===

impl Stopper {
    /// A stopper and what hears it.
    #[must_use]
    pub fn new() -> (Self, Stopped) {
        let (sender, receiver) = watch::channel(None);
        (Self(Arc::new(sender)), Stopped(receiver))
    }

    /// Ends the machine, unless that was said before and left it no more time.
    pub fn stop(&self, why: Stop) {
        self.0.send_if_modified(|stop| {
            let counts = stop.as_ref().is_none_or(|before| why.is_sooner_than(before));
            if counts {
                *stop = Some(why);
            }
            counts
        });
    }
}

// === impl Stop ===

impl Stop {
    /// A program has less time by this than by what was said before. Whatever else was said is done at once.
    fn is_sooner_than(&self, before: &Self) -> bool {
        match (before, self) {
            (Self::AfterProgram { .. }, Self::Now(_)) => true,
            (Self::AfterProgram { grace: before, .. }, Self::AfterProgram { grace, .. }) => grace < before,
            _ => false,
        }
    }
}

// === impl Stopped ===

impl Stopped {
    /// Waits until the machine is to end. A stopper that is gone never stops it.
    pub(crate) async fn stop(&mut self) -> Stop {
        self.told(|_| true).await
    }

    /// The same, where that fits.
    pub(super) async fn told(&mut self, fits: impl Fn(&Stop) -> bool) -> Stop {
        let said = self
            .0
            .wait_for(|stop| stop.as_ref().is_some_and(&fits))
            .await
            .ok()
            .and_then(|stop| stop.clone());
        match said {
            Some(stop) => stop,
            None => std::future::pending().await,
        }
    }

    /// Waits until it is told something else than before.
    pub(crate) async fn next(&mut self) -> Stop {
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
        self.stop().await
    }
}
