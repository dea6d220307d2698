//! Where a function stands with its runtime: a plain state machine, so that every order of calls can be tested.
//!
//! ```text
//!  Starting ──ask──► Idle ──invoke──► Invoking ──response│error──► Answered
//!     │                ▲                                              │
//!     └─init/error─► Failing ──body──► Failed                    ask ─┘ (Idle again, or the invocation that waits)
//! ```
//!
//! `end` leads from each of them to Ended. Who asks again while an invocation runs is given the same, as on Lambda: a
//! connection may break before it has brought it.

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
    /// It answered more bytes than may be answered so.
    TooLarge {
        limit: usize,
    },
    /// Its answer broke off.
    BrokenOff,
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
        invocation: Invocation,
        /// A body with its outcome is being read.
        claimed: bool,
        /// The runtime may have read the invocation.
        read: bool,
    },
    Answered {
        id: String,
    },
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

// === impl Invocation ===

impl Invocation {
    /// An X-Ray trace header that says that nothing is traced. The root is `1-` time in s `-` 96 bits, here of the request id.
    pub(super) fn trace_id(&self) -> String {
        let digits: String = self
            .id
            .chars()
            .filter(char::is_ascii_hexdigit)
            .map(|digit| digit.to_ascii_lowercase())
            .take(24)
            .collect();
        format!(
            "Root=1-{:08x}-{digits:0>24};Parent={:0>16};Sampled=0",
            self.deadline_ms / 1_000,
            digits.get(..16).unwrap_or(&digits)
        )
    }
}

// === impl Session ===

impl Session {
    /// The runtime asks for work. None: it has to wait, and [`take`](Self::take) what comes.
    pub(super) fn ask(&mut self) -> Result<Option<Invocation>, Refusal> {
        match &mut self.state {
            State::Starting | State::Idle | State::Answered { .. } => {
                self.state = State::Idle;
                Ok(self.take())
            }
            State::Invoking {
                invocation,
                claimed: false,
                read,
            } => {
                // Whether the one who asked before has read it is not known.
                *read = true;
                Ok(Some(invocation.clone()))
            }
            State::Invoking { .. } | State::Failing | State::Failed | State::Ended => Err(Refusal::InvalidState),
        }
    }

    /// Work for one who has asked for it, if there is some.
    pub(super) fn take(&mut self) -> Option<Invocation> {
        if !matches!(self.state, State::Idle) {
            return None;
        }
        let invocation = self.waiting.take()?;
        self.state = State::Invoking {
            invocation: invocation.clone(),
            claimed: false,
            read: false,
        };
        Some(invocation)
    }

    /// Gives it work. One that has answered and not yet asked again gets it when it asks.
    pub(super) fn invoke(&mut self, invocation: Invocation) -> Result<(), NotBegun> {
        match self.state {
            State::Idle | State::Answered { .. } if self.waiting.is_none() => {
                self.waiting = Some(invocation);
                Ok(())
            }
            State::Ended => Err(NotBegun::Ended),
            _ => Err(NotBegun::NotIdle),
        }
    }

    /// Whether the runtime has asked for work, and there is none.
    pub(super) fn is_idle(&self) -> bool {
        matches!(self.state, State::Idle) && self.waiting.is_none()
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

    /// Someone is about to send the outcome of the invocation `id`: one, once.
    pub(super) fn claim(&mut self, id: &str) -> Result<(), Refusal> {
        match &mut self.state {
            State::Invoking {
                invocation,
                claimed,
                read,
            } if invocation.id == id => {
                *read = true;
                if std::mem::replace(claimed, true) {
                    return Err(Refusal::InvalidState);
                }
                // Nobody is given it any more.
                invocation.payload = Bytes::new();
                Ok(())
            }
            State::Answered { id: answered } if answered == id => Err(Refusal::InvalidState),
            State::Starting | State::Failing | State::Failed | State::Ended => Err(Refusal::InvalidState),
            _ => Err(Refusal::InvalidRequestId),
        }
    }

    /// The outcome that was claimed is here. Whether somebody waits for it.
    pub(super) fn answered(&mut self) -> bool {
        match &mut self.state {
            State::Invoking {
                invocation,
                claimed: true,
                ..
            } => {
                let id = std::mem::take(&mut invocation.id);
                self.state = State::Answered { id };
                true
            }
            _ => false,
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

    /// The one who reported that broke off.
    pub(super) fn unclaim_init(&mut self) {
        if matches!(self.state, State::Failing) {
            self.state = State::Starting;
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
    use proptest::prelude::*;

    use super::*;

    fn invocation(id: &str) -> Invocation {
        Invocation {
            id: id.to_owned(),
            payload: Bytes::from_static(b"{}"),
            deadline_ms: 1,
        }
    }

    /// One that has asked for work.
    fn idle() -> Session {
        let mut session = Session::default();
        session.ask().unwrap();
        session
    }

    /// One that was given some.
    fn given() -> Session {
        let mut session = idle();
        session.invoke(invocation("a")).unwrap();
        assert_eq!(session.take(), Some(invocation("a")));
        session
    }

    #[test]
    fn one_invocation_after_another() {
        let mut session = Session::default();
        assert_eq!(session.invoke(invocation("a")), Err(NotBegun::NotIdle));
        assert!(!session.is_idle());
        assert_eq!(session.ask(), Ok(None));
        assert_eq!(session.take(), None);
        assert!(session.is_idle());
        session.invoke(invocation("a")).unwrap();
        assert!(!session.is_idle());
        assert_eq!(session.invoke(invocation("b")), Err(NotBegun::NotIdle));
        assert_eq!(session.take(), Some(invocation("a")));
        assert_eq!(session.take(), None, "one who waits gets no work that another has");
        assert_eq!(session.claim("b"), Err(Refusal::InvalidRequestId));
        session.claim("a").unwrap();
        assert_eq!(session.claim("a"), Err(Refusal::InvalidState));
        assert_eq!(session.ask(), Err(Refusal::InvalidState));
        assert!(session.answered());
        assert_eq!(session.claim("a"), Err(Refusal::InvalidState), "there is one answer");
        assert_eq!(session.claim("b"), Err(Refusal::InvalidRequestId));
        // Before it has asked again.
        session.invoke(invocation("b")).unwrap();
        assert_eq!(session.ask(), Ok(Some(invocation("b"))));
        assert_eq!(session.claim("a"), Err(Refusal::InvalidRequestId));
    }

    #[test]
    fn who_asks_again_is_given_the_same() {
        let mut session = given();
        assert_eq!(session.ask(), Ok(Some(invocation("a"))));
        assert!(!session.end(true), "the first may have read it");
    }

    #[test]
    fn what_a_runtime_that_exits_has_not_begun() {
        assert!(!Session::default().end(true));
        assert!(!idle().end(true));
        let mut waiting = idle();
        waiting.invoke(invocation("a")).unwrap();
        assert!(waiting.end(false));
        assert_eq!(waiting.invoke(invocation("b")), Err(NotBegun::Ended));
        assert_eq!(waiting.ask(), Err(Refusal::InvalidState));
        assert!(!waiting.end(true), "told once");
        assert!(given().end(true));
        assert!(!given().end(false));
        let mut read = given();
        read.read();
        assert!(!read.end(true));
        let mut claimed = given();
        claimed.claim("a").unwrap();
        assert!(!claimed.end(true));
        assert!(!claimed.answered(), "nobody waits for what comes after the end");
        let mut answered = given();
        answered.claim("a").unwrap();
        assert!(answered.answered());
        answered.invoke(invocation("b")).unwrap();
        assert!(answered.end(false));
    }

    #[test]
    fn an_init_that_failed_stays_failed() {
        let mut session = Session::default();
        session.claim_init().unwrap();
        session.init_failed();
        session.unclaim_init();
        assert_eq!(session.claim_init(), Err(Refusal::InvalidState));
        assert_eq!(session.ask(), Err(Refusal::InvalidState));
        assert_eq!(session.claim("a"), Err(Refusal::InvalidState));
        assert_eq!(idle().claim_init(), Err(Refusal::InvalidState));
    }

    #[test]
    fn a_report_of_an_init_that_breaks_off_changes_nothing() {
        let mut session = Session::default();
        session.claim_init().unwrap();
        assert_eq!(session.claim_init(), Err(Refusal::InvalidState));
        assert_eq!(session.ask(), Err(Refusal::InvalidState));
        session.unclaim_init();
        assert_eq!(session.ask(), Ok(None));
    }

    /// What a runtime, its container and its caller may do, in any order.
    #[derive(Clone, Debug)]
    enum Step {
        Ask,
        Take,
        Invoke,
        Read,
        /// The outcome of the invocation of so many before.
        Claim(usize),
        Answered,
        ClaimInit,
        UnclaimInit,
        InitFailed,
        End(bool),
    }

    /// What became of an invocation.
    #[derive(Debug, Default)]
    struct Fate {
        given: bool,
        /// It may have been read.
        read: bool,
        claimed: bool,
        answered: bool,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => Just(Step::Ask),
            4 => Just(Step::Take),
            4 => Just(Step::Invoke),
            1 => Just(Step::Read),
            4 => (0_usize..3).prop_map(Step::Claim),
            4 => Just(Step::Answered),
            1 => Just(Step::ClaimInit),
            1 => Just(Step::UnclaimInit),
            1 => Just(Step::InitFailed),
            1 => any::<bool>().prop_map(Step::End),
        ]
    }

    proptest! {
        #[test]
        fn each_invocation_is_answered_once_by_who_was_given_it(steps in prop::collection::vec(step(), 1..60)) {
            let mut session = Session::default();
            let mut fates: Vec<Fate> = Vec::new();
            let mut over = false;
            let given = |fates: &mut Vec<Fate>, work: Option<Invocation>| {
                let Some(work) = work else { return Ok(()) };
                prop_assert_eq!(&work, &invocation(&work.id));
                // No other than the last one.
                prop_assert_eq!(&work.id, &(fates.len() - 1).to_string());
                let fate = fates.last_mut().unwrap();
                prop_assert!(!fate.claimed);
                fate.read |= fate.given;
                fate.given = true;
                Ok(())
            };
            for step in steps {
                let before = format!("{session:?}");
                match step {
                    Step::Ask => {
                        let asked = session.ask();
                        prop_assert!(!over || asked.is_err());
                        given(&mut fates, asked.ok().flatten())?;
                    }
                    Step::Take => given(&mut fates, session.take())?,
                    Step::Invoke => {
                        let id = fates.len().to_string();
                        if session.invoke(invocation(&id)).is_ok() {
                            prop_assert!(!over && fates.last().is_none_or(|last| last.answered), "{before}");
                            fates.push(Fate::default());
                        }
                    }
                    Step::Read => {
                        session.read();
                        if let Some(last) = fates.last_mut() {
                            last.read |= last.given;
                        }
                    }
                    Step::Claim(back) => {
                        let Some(index) = fates.len().checked_sub(back + 1) else { continue };
                        let claimed = session.claim(&index.to_string());
                        let fate = fates.get_mut(index).unwrap();
                        prop_assert_eq!(
                            claimed.is_ok(),
                            fate.given && !fate.claimed && !over,
                            "{} of {:?}", before, fate
                        );
                        fate.claimed |= claimed.is_ok();
                        fate.read |= claimed.is_ok();
                    }
                    Step::Answered => {
                        if session.answered() {
                            let last = fates.last_mut().unwrap();
                            prop_assert!(last.claimed && !last.answered && !over);
                            last.answered = true;
                        }
                    }
                    Step::ClaimInit => {
                        prop_assert!(session.claim_init().is_err() || fates.is_empty());
                    }
                    Step::UnclaimInit => session.unclaim_init(),
                    Step::InitFailed => session.init_failed(),
                    Step::End(unread) => {
                        let not_begun = session.end(unread);
                        let last = fates.last();
                        let waits = last.is_some_and(|last| !last.given);
                        let lies_unread = unread && last.is_some_and(|last| last.given && !last.read);
                        prop_assert_eq!(not_begun, !over && (waits || lies_unread), "{}", before);
                        over = true;
                    }
                }
            }
        }
    }
}
