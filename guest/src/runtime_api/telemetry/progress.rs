//! How far a container is with its init and with an invocation, and when it was so far: what platform events tell.

use std::time::{Duration, Instant, SystemTime};

use super::super::session::Outcome;
use super::event::{Ending, Event, Span};

/// How far it is.
#[derive(Debug)]
pub(super) struct Progress {
    created: (Instant, SystemTime),
    /// How the runtime's init ended.
    init: Option<Ending>,
    /// How long init took, until it has been told.
    init_duration: Option<Duration>,
    init_over: bool,
    invoked: Option<Invoked>,
}

/// An invocation.
#[derive(Debug)]
struct Invoked {
    request: String,
    trace: String,
    begun: (Instant, SystemTime),
    answering: Option<(Instant, SystemTime)>,
    answered: Option<(Instant, SystemTime)>,
    ending: Ending,
    produced_bytes: Option<usize>,
    done: bool,
}

/// The runtime is done with an invocation.
pub(super) struct Done {
    request: String,
    trace: String,
    ending: Ending,
    duration: Duration,
    produced_bytes: Option<usize>,
    spans: Vec<Span>,
}

/// An invocation is over.
pub(super) struct Report {
    pub(super) request: String,
    trace: String,
    ending: Ending,
    duration: Duration,
    init: Option<Duration>,
}

pub(super) fn success() -> Ending {
    Ending::success()
}

pub(super) fn error(status: &'static str, error_type: &str) -> Ending {
    Ending::of_error(status, error_type)
}

fn now() -> (Instant, SystemTime) {
    (Instant::now(), SystemTime::now())
}

// === impl Progress ===

impl Default for Progress {
    fn default() -> Self {
        Self {
            created: now(),
            init: None,
            init_duration: None,
            init_over: false,
            invoked: None,
        }
    }
}

impl Progress {
    /// When it was made.
    pub(super) fn created(&self) -> SystemTime {
        self.created.1
    }

    /// The runtime has initialised, or failed to. Whether that is new.
    pub(super) fn init_runtime_done(&mut self, ending: &Ending) -> bool {
        let new = self.init.is_none();
        self.init.get_or_insert_with(|| ending.clone());
        new
    }

    /// All have initialised, or failed to. How, and how long it took, where it is new.
    pub(super) fn init_over(&mut self) -> Option<(Ending, Duration)> {
        if std::mem::replace(&mut self.init_over, true) {
            return None;
        }
        let duration = self.created.0.elapsed();
        self.init_duration = Some(duration);
        Some((self.init.clone()?, duration))
    }

    pub(super) fn begin(&mut self, request: String, trace: String) {
        self.invoked = Some(Invoked {
            request,
            trace,
            begun: now(),
            answering: None,
            answered: None,
            ending: Ending::success(),
            produced_bytes: None,
            done: false,
        });
    }

    pub(super) fn is_invoked(&self) -> bool {
        self.invoked.is_some()
    }

    /// Whether the runtime is done with an invocation.
    pub(super) fn is_reportable(&self) -> bool {
        self.invoked.as_ref().is_some_and(|invoked| invoked.done)
    }

    pub(super) fn answering(&mut self) {
        if let Some(invoked) = &mut self.invoked {
            invoked.answering.get_or_insert_with(now);
        }
    }

    pub(super) fn answered(&mut self, outcome: &Outcome) {
        let Some(invoked) = &mut self.invoked else {
            return;
        };
        invoked.answered.get_or_insert_with(now);
        match outcome {
            Outcome::Answer(answer) => invoked.produced_bytes = Some(answer.len()),
            Outcome::Error { kind, .. } => invoked.ending = error("error", kind),
            Outcome::TooLarge { .. } => invoked.ending = error("error", "Function.ResponseSizeTooLarge"),
            Outcome::BrokenOff => invoked.ending = error("failure", "Runtime.TruncatedResponse"),
        }
    }

    /// What the runtime has not done yet ends so, whatever comes: which request.
    pub(super) fn failed(&mut self, ending: Ending) -> Option<&str> {
        let invoked = self.invoked.as_mut().filter(|invoked| !invoked.done)?;
        invoked.answered.get_or_insert_with(now);
        invoked.ending = ending;
        Some(&invoked.request)
    }

    /// What is to be told where the runtime had an invocation, and has answered it.
    pub(super) fn runtime_done(&mut self) -> Option<Done> {
        let invoked = self.invoked.as_mut()?;
        let answered = invoked.answered.filter(|_| !invoked.done)?;
        invoked.done = true;
        let begun = invoked.begun;
        let span = |name, from: (Instant, SystemTime), to: Instant| Span {
            name,
            start: from.1,
            duration: to.saturating_duration_since(from.0),
        };
        let mut spans = Vec::new();
        if let Some(answering) = invoked.answering {
            spans.push(span("responseLatency", begun, answering.0));
            spans.push(span("responseDuration", answering, answered.0));
        }
        spans.push(span("runtimeOverhead", answered, Instant::now()));
        Some(Done {
            request: invoked.request.clone(),
            trace: invoked.trace.clone(),
            ending: invoked.ending.clone(),
            duration: begun.0.elapsed(),
            produced_bytes: invoked.produced_bytes,
            spans,
        })
    }

    /// What is to be told of an invocation that is over.
    pub(super) fn report(&mut self) -> Option<Report> {
        let invoked = self.invoked.take()?;
        Some(Report {
            duration: invoked.begun.0.elapsed(),
            request: invoked.request,
            trace: invoked.trace,
            ending: invoked.ending,
            init: self.init_duration.take(),
        })
    }
}

// === impl Done ===

impl Done {
    pub(super) fn event(&self) -> Event<'_> {
        Event::RuntimeDone {
            request: &self.request,
            trace: &self.trace,
            ending: &self.ending,
            duration: self.duration,
            produced_bytes: self.produced_bytes,
            spans: &self.spans,
        }
    }
}

// === impl Report ===

impl Report {
    pub(super) fn event(&self, memory_mib: u32, memory_peak_bytes: u64) -> Event<'_> {
        Event::Report {
            request: &self.request,
            trace: &self.trace,
            ending: &self.ending,
            duration: self.duration,
            init: self.init,
            memory_mib,
            memory_peak_bytes,
        }
    }
}
