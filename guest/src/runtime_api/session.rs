//! Where a function stands with its runtime: a plain state machine, so that every order of calls can be tested.
//!
//! ```text
//!  Starting ──next──► Idle ──invoke──► Invoking ──response│error──► Answered
//!     │                 ▲                                              │
//!     └─init/error─► Failing ──body──► Failed                    next ─┘ (Idle again, or the invocation that waits)
//! ```
//!
//! `end` leads from each of them to Ended.

use bytes::Bytes;

/// One invocation on its way to the function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Invocation {
    /// Lambda's request id.
    pub(crate) id: String,
    pub(crate) payload: Bytes,
    /// When it must have ended, in ms since 1970.
    pub(crate) deadline_ms: u64,
}

/// What a function made of an invocation, or of its init.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Answer(Bytes),
    /// It reported an error: Lambda's error object and `Lambda-Runtime-Function-Error-Type`.
    Error {
        kind: String,
        object: Bytes,
    },
    /// It answered more than may be answered.
    TooLarge,
}

/// Why a call of the runtime is refused. In the words of Lambda's Runtime API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// Not the request id of the invocation at hand.
    InvalidRequestId,
    /// Not now.
    InvalidState,
}

/// An invocation was not begun: the function has seen nothing of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotBegun {
    /// The container has another invocation, or has not initialised.
    #[error("the container is not idle")]
    NotIdle,
    /// The container is being stopped, or its runtime exited before it took the invocation.
    #[error("the container has ended")]
    Ended,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Starting,
    Idle,
    Invoking {
        id: String,
        /// A body with its outcome is being read.
        claimed: bool,
        /// The runtime is known to have read the invocation.
        read: bool,
    },
    Answered,
    /// The report of an init that failed is being read.
    Failing,
    Failed,
    /// The runtime has exited.
    Ended,
}

/// The state machine of one container.
#[derive(Debug, Default)]
pub(super) struct Session {
    state: State,
    /// Not yet asked for.
    waiting: Option<Invocation>,
}

// === impl Session ===

impl Session {
    /// The runtime asks for work. None: it has to wait.
    pub(super) fn next(&mut self) -> Result<Option<Invocation>, Refusal> {
        match self.state {
            State::Starting | State::Idle | State::Answered => {}
            State::Invoking { .. } | State::Failing | State::Failed | State::Ended => {
                return Err(Refusal::InvalidState);
            }
        }
        let invocation = self.waiting.take();
        self.state = match &invocation {
            Some(invocation) => State::Invoking {
                id: invocation.id.clone(),
                claimed: false,
                read: false,
            },
            None => State::Idle,
        };
        Ok(invocation)
    }

    /// Gives it work. One that has answered and not yet asked again gets it when it asks.
    pub(super) fn invoke(&mut self, invocation: Invocation) -> Result<(), NotBegun> {
        match self.state {
            State::Idle | State::Answered if self.waiting.is_none() => {
                self.waiting = Some(invocation);
                Ok(())
            }
            State::Ended => Err(NotBegun::Ended),
            _ => Err(NotBegun::NotIdle),
        }
    }

    /// The runtime has read the invocation that it was given.
    pub(super) fn read(&mut self) {
        if let State::Invoking { read, .. } = &mut self.state {
            *read = true;
        }
    }

    /// The runtime has exited; `unread`: the invocation that it was given last did not reach it. Whether there is an
    /// invocation that it has not begun.
    pub(super) fn end(&mut self, unread: bool) -> bool {
        let waited = self.waiting.take().is_some();
        let given = matches!(self.state, State::Invoking { read: false, .. });
        self.state = State::Ended;
        waited || (given && unread)
    }

    /// Someone is about to send the outcome of the invocation `id`: one at a time.
    pub(super) fn claim(&mut self, id: &str) -> Result<(), Refusal> {
        match &mut self.state {
            State::Invoking {
                id: current,
                claimed,
                read,
            } if current == id => {
                *read = true;
                if std::mem::replace(claimed, true) {
                    return Err(Refusal::InvalidState);
                }
                Ok(())
            }
            State::Starting | State::Failing | State::Failed | State::Ended => Err(Refusal::InvalidState),
            _ => Err(Refusal::InvalidRequestId),
        }
    }

    /// Someone is about to report that the runtime could not initialise: one at a time.
    pub(super) fn claim_init(&mut self) -> Result<(), Refusal> {
        match self.state {
            State::Starting => {
                self.state = State::Failing;
                Ok(())
            }
            _ => Err(Refusal::InvalidState),
        }
    }

    /// The one who claimed it broke off.
    pub(super) fn unclaim(&mut self) {
        match &mut self.state {
            State::Invoking { claimed, .. } => *claimed = false,
            State::Failing => self.state = State::Starting,
            _ => {}
        }
    }

    /// The outcome is here.
    pub(super) fn answered(&mut self) {
        if matches!(self.state, State::Invoking { .. }) {
            self.state = State::Answered;
        }
    }

    /// The report of an init that failed is here.
    pub(super) fn init_failed(&mut self) {
        if matches!(self.state, State::Failing) {
            self.state = State::Failed;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn invocation(id: &str) -> Invocation {
        Invocation {
            id: id.to_owned(),
            payload: Bytes::from_static(b"{}"),
            deadline_ms: 1,
        }
    }

    #[test]
    fn one_invocation_after_another() {
        let mut session = Session::default();
        assert_eq!(session.invoke(invocation("a")), Err(NotBegun::NotIdle));
        assert_eq!(session.next(), Ok(None));
        session.invoke(invocation("a")).unwrap();
        assert_eq!(session.invoke(invocation("b")), Err(NotBegun::NotIdle));
        assert_eq!(session.next(), Ok(Some(invocation("a"))));
        assert_eq!(session.next(), Err(Refusal::InvalidState));
        assert_eq!(session.claim("b"), Err(Refusal::InvalidRequestId));
        session.claim("a").unwrap();
        assert_eq!(session.claim("a"), Err(Refusal::InvalidState));
        session.unclaim();
        session.claim("a").unwrap();
        session.answered();
        assert_eq!(session.claim("a"), Err(Refusal::InvalidRequestId));
        // Before it has asked again.
        session.invoke(invocation("b")).unwrap();
        assert_eq!(session.next(), Ok(Some(invocation("b"))));
    }

    #[test]
    fn what_a_runtime_that_exits_has_not_begun() {
        let idle = || {
            let mut session = Session::default();
            session.next().unwrap();
            session
        };
        assert!(!Session::default().end(true));
        assert!(!idle().end(true));
        let mut waiting = idle();
        waiting.invoke(invocation("a")).unwrap();
        assert!(waiting.end(false));
        assert_eq!(waiting.invoke(invocation("b")), Err(NotBegun::Ended));
        assert_eq!(waiting.next(), Err(Refusal::InvalidState));
        assert!(!waiting.end(true), "told once");
        let given = || {
            let mut session = idle();
            session.invoke(invocation("a")).unwrap();
            session.next().unwrap();
            session
        };
        assert!(given().end(true));
        assert!(!given().end(false));
        let mut read = given();
        read.read();
        assert!(!read.end(true));
        let mut claimed = given();
        claimed.claim("a").unwrap();
        claimed.unclaim();
        assert!(!claimed.end(true));
        let mut answered = given();
        answered.claim("a").unwrap();
        answered.answered();
        answered.invoke(invocation("b")).unwrap();
        assert!(answered.end(false));
    }

    #[test]
    fn an_init_that_failed_stays_failed() {
        let mut session = Session::default();
        session.claim_init().unwrap();
        session.init_failed();
        session.unclaim();
        assert_eq!(session.claim_init(), Err(Refusal::InvalidState));
        assert_eq!(session.next(), Err(Refusal::InvalidState));
        assert_eq!(session.claim("a"), Err(Refusal::InvalidState));
        let mut session = Session::default();
        session.next().unwrap();
        assert_eq!(session.claim_init(), Err(Refusal::InvalidState));
    }

    #[test]
    fn a_report_of_an_init_that_breaks_off_changes_nothing() {
        let mut session = Session::default();
        session.claim_init().unwrap();
        assert_eq!(session.claim_init(), Err(Refusal::InvalidState));
        assert_eq!(session.next(), Err(Refusal::InvalidState));
        session.unclaim();
        assert_eq!(session.next(), Ok(None));
    }
}
