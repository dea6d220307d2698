//! Tasks whose polls are measured.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::time::{Sleep, sleep};

use super::charges::Owner;
use super::{Budget, Budgets, Wakes};

/// A task that is polled only while its container has tokens.
pub(crate) struct Throttled<F, W> {
    budget: Budget,
    inner: Pin<Box<F>>,
    /// What wakes it.
    wakes: W,
    /// Until there are tokens again.
    pause: Option<Pin<Box<Sleep>>>,
}

/// A task whose polls are somebody's.
pub(crate) struct Owned<F> {
    budgets: Budgets,
    owner: Owner,
    inner: Pin<Box<F>>,
}

// === impl Throttled ===

impl<F, W> Throttled<F, W> {
    pub(super) fn new(budget: Budget, future: F, wakes: W) -> Self {
        Self {
            budget,
            inner: Box::pin(future),
            wakes,
            pause: None,
        }
    }
}

impl<F: Future, W: Wakes + Unpin> Future for Throttled<F, W> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.get_mut();
        loop {
            if let Some(pause) = &mut this.pause {
                ready!(pause.as_mut().poll(cx));
                this.pause = None;
            }
            match this.budget.turn() {
                Ok(_turn) => return this.inner.as_mut().poll(cx),
                Err(wait) => {
                    this.wakes.silence();
                    this.pause = Some(Box::pin(sleep(wait)));
                }
            }
        }
    }
}

// === impl Owned ===

impl<F> Owned<F> {
    pub(super) fn new(budgets: Budgets, owner: Owner, future: F) -> Self {
        Self {
            budgets,
            owner,
            inner: Box::pin(future),
        }
    }
}

impl<F: Future> Future for Owned<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.get_mut();
        let _at_work = this.budgets.work_for(this.owner);
        this.inner.as_mut().poll(cx)
    }
}
