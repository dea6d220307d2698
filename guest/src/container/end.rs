//! How things end badly, in Lambda's words.

use std::time::Duration;

use bytes::Bytes;
use serde::Deserialize;

use crate::reaper::Exit;
use crate::runtime_api::{ExtensionFailure, Outcome};
use crate::telemetry::Use;

/// What kind of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FailureKind {
    Reported,
    Exited,
    OutOfMemory,
    TimedOut,
    ResponseTooLarge,
    Setup,
}

/// What went wrong with an init or an invocation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) kind: FailureKind,
    /// Lambda's `errorType`.
    pub(crate) name: String,
    pub(crate) message: String,
    /// The function's own error object, where it reported one.
    pub(crate) object: Option<Bytes>,
}

/// The end of a container.
#[derive(Clone, Debug)]
pub(crate) struct End {
    pub(crate) failure: Failure,
    /// What it had used.
    pub(crate) used: Use,
    /// It was told to stop.
    pub(crate) stopped: bool,
}

/// What was asked of a container that is being killed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kill {
    Stop,
    InitTimeout(Duration),
    Timeout(Duration),
    /// It has told that it cannot initialise.
    InitFailed,
    /// An extension of its own has told that it cannot go on, has ended or could not be started.
    Extension(ExtensionFailure),
    /// Its runtime has ended, and it has external extensions, which have not.
    RuntimeEnded(Exit),
    /// Its runtime could not be started: why.
    Entrypoint(String),
}

/// The longest type and message that are passed on, in bytes; what is beyond is in the error object.
const TEXT_LIMIT: usize = 8 << 10;

// === impl Kill ===

impl Kill {
    /// Whether somebody has been told of it, or will be, without being asked.
    pub(super) fn is_told(&self) -> bool {
        matches!(self, Self::Stop | Self::InitFailed | Self::Entrypoint(_))
    }

    /// Lambda's `shutdownReason`.
    pub(super) fn shutdown_reason(&self) -> &'static str {
        match self {
            Self::Stop => "SPINDOWN",
            Self::Timeout(_) | Self::InitTimeout(_) => "TIMEOUT",
            Self::InitFailed | Self::Extension(_) | Self::RuntimeEnded(_) | Self::Entrypoint(_) => "FAILURE",
        }
    }
}

// === impl Failure ===

impl Failure {
    fn new(kind: FailureKind, name: &str, message: String) -> Self {
        Self {
            kind,
            name: name.to_owned(),
            message,
            object: None,
        }
    }

    /// The container could not be made.
    pub(crate) fn setup(message: String) -> Self {
        Self::new(FailureKind::Setup, "Sandbox.Failure", message)
    }

    /// The function's program cannot be run.
    pub(crate) fn entrypoint(message: String) -> Self {
        Self::new(FailureKind::Exited, "Runtime.InvalidEntrypoint", message)
    }

    /// Of an image's program that has ended; whether it was killed for want of `memory`.
    pub(super) fn of_program(exit: Option<Exit>, memory: bool) -> Self {
        let (kind, name, message) = match exit {
            _ if memory => (
                FailureKind::OutOfMemory,
                "Program.OutOfMemory",
                "it ran out of memory and was killed".to_owned(),
            ),
            Some(exit) => (FailureKind::Exited, "Program.Ended", exit.to_string()),
            None => (FailureKind::Exited, "Program.Ended", "it is not known how".to_owned()),
        };
        Self::new(kind, name, message)
    }

    /// Of a container that is gone.
    pub(super) fn of_end(kill: Option<Kill>, out_of_memory: bool, exit: Option<Exit>) -> Self {
        let exit = match kill {
            Some(Kill::RuntimeEnded(exit)) => Some(exit),
            _ => exit,
        };
        let seconds = |time: Duration| format!("{:.2} seconds", time.as_secs_f64());
        match kill {
            Some(Kill::Timeout(after)) => Self::new(
                FailureKind::TimedOut,
                "Sandbox.Timedout",
                format!("Task timed out after {}", seconds(after)),
            ),
            Some(Kill::InitTimeout(after)) => Self::new(
                FailureKind::TimedOut,
                "Sandbox.Timedout",
                format!("Init timed out after {}", seconds(after)),
            ),
            Some(Kill::Stop) => Self::new(
                FailureKind::Exited,
                "Sandbox.Stopped",
                "The container was stopped".to_owned(),
            ),
            Some(Kill::Extension(ExtensionFailure { kind, message })) => {
                Self::new(FailureKind::Reported, kind, message)
            }
            Some(Kill::Entrypoint(why)) => Self::entrypoint(why),
            _ if out_of_memory => Self::new(
                FailureKind::OutOfMemory,
                "Runtime.OutOfMemory",
                "Runtime ran out of memory and was killed".to_owned(),
            ),
            _ => Self::new(
                FailureKind::Exited,
                "Runtime.ExitError",
                match exit {
                    Some(exit @ (Exit::Signal(_) | Exit::Code(1..))) => {
                        format!("Runtime exited with error: {exit}")
                    }
                    _ => "Runtime exited without providing a reason".to_owned(),
                },
            ),
        }
    }

    /// Of a container that is being ended for this reason.
    pub(super) fn of_kill(kill: Kill) -> Self {
        Self::of_end(Some(kill), false, None)
    }

    /// Of an outcome that is no answer.
    pub(super) fn of_outcome(outcome: Outcome) -> Result<Bytes, Self> {
        /// Lambda's error object, as far as we look into it.
        #[derive(Default, Deserialize)]
        #[serde(rename_all = "camelCase", default)]
        struct Object {
            error_type: String,
            error_message: String,
        }
        match outcome {
            Outcome::Answer(answer) => Ok(answer),
            Outcome::TooLarge { limit } => Err(Self::new(
                FailureKind::ResponseTooLarge,
                "Function.ResponseSizeTooLarge",
                format!("Response payload size exceeded maximum allowed payload size ({limit} bytes)."),
            )),
            Outcome::BrokenOff => Err(Self::new(
                FailureKind::Reported,
                "Runtime.TruncatedResponse",
                "The runtime broke its response off before the end".to_owned(),
            )),
            Outcome::Error { kind, object } => {
                let said: Object = serde_json::from_slice(&object).unwrap_or_default();
                let name = if said.error_type.is_empty() {
                    kind
                } else {
                    said.error_type
                };
                Err(Self {
                    kind: FailureKind::Reported,
                    name: shortened(name),
                    message: shortened(said.error_message),
                    object: Some(object),
                })
            }
        }
    }

    /// The error object that the caller gets: the function's own, or one of ours.
    pub(crate) fn payload(&self) -> Bytes {
        match &self.object {
            Some(object) if !object.is_empty() => object.clone(),
            _ => serde_json::json!({ "errorType": self.name, "errorMessage": self.message })
                .to_string()
                .into(),
        }
    }
}

fn shortened(mut text: String) -> String {
    let end = (0..=TEXT_LIMIT.min(text.len()))
        .rev()
        .find(|end| text.is_char_boundary(*end));
    text.truncate(end.unwrap_or(0));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_told_in_lambdas_words() {
        let told = |kill, memory, exit| {
            let failure = Failure::of_end(kill, memory, exit);
            (failure.kind, format!("{}: {}", failure.name, failure.message))
        };
        assert_eq!(
            told(
                Some(Kill::Timeout(Duration::from_millis(3000))),
                false,
                Some(Exit::Signal(9))
            ),
            (
                FailureKind::TimedOut,
                "Sandbox.Timedout: Task timed out after 3.00 seconds".to_owned()
            )
        );
        assert_eq!(
            told(None, false, Some(Exit::Code(1))),
            (
                FailureKind::Exited,
                "Runtime.ExitError: Runtime exited with error: exit status 1".to_owned()
            )
        );
        assert_eq!(
            told(None, false, Some(Exit::Code(0))).1,
            "Runtime.ExitError: Runtime exited without providing a reason"
        );
        let failure = ExtensionFailure {
            kind: "Extension.ExitError",
            message: "no key".to_owned(),
        };
        assert_eq!(
            told(Some(Kill::Extension(failure)), false, Some(Exit::Signal(9))).1,
            "Extension.ExitError: no key"
        );
        assert_eq!(
            told(Some(Kill::RuntimeEnded(Exit::Code(3))), false, Some(Exit::Signal(9))).1,
            "Runtime.ExitError: Runtime exited with error: exit status 3"
        );
        assert_eq!(told(None, true, Some(Exit::Signal(9))).0, FailureKind::OutOfMemory);
        assert_eq!(told(None, false, Some(Exit::Signal(9))).0, FailureKind::Exited);
    }

    #[test]
    fn programs_end_in_words() {
        let told = |exit, memory| {
            let failure = Failure::of_program(exit, memory);
            (failure.kind, failure.message)
        };
        assert_eq!(
            told(Some(Exit::Code(3)), false),
            (FailureKind::Exited, "exit status 3".to_owned())
        );
        assert_eq!(told(Some(Exit::Signal(15)), false).1, "signal: SIGTERM");
        assert_eq!(told(Some(Exit::Signal(9)), true).0, FailureKind::OutOfMemory);
        assert_eq!(told(None, false).0, FailureKind::Exited);
    }

    #[test]
    fn extensions_are_told_why_it_ends() {
        for (kill, reason, told) in [
            (Kill::Stop, "SPINDOWN", true),
            (Kill::Timeout(Duration::ZERO), "TIMEOUT", false),
            (Kill::RuntimeEnded(Exit::Code(1)), "FAILURE", false),
            (Kill::InitFailed, "FAILURE", true),
            (Kill::Entrypoint(String::new()), "FAILURE", true),
        ] {
            assert_eq!((kill.shutdown_reason(), kill.is_told()), (reason, told), "{kill:?}");
        }
    }

    #[test]
    fn reported_errors_keep_their_object() {
        let object = Bytes::from_static(br#"{"errorType":"KeyError","errorMessage":"'a'","stackTrace":["x"]}"#);
        let failure = Failure::of_outcome(Outcome::Error {
            kind: "Unhandled".to_owned(),
            object: object.clone(),
        })
        .unwrap_err();
        assert_eq!((failure.name.as_str(), failure.message.as_str()), ("KeyError", "'a'"));
        assert_eq!(failure.payload(), object);
    }

    #[test]
    fn what_is_no_error_object_is_passed_on_all_the_same() {
        let failure = Failure::of_outcome(Outcome::Error {
            kind: "Function.Odd".to_owned(),
            object: Bytes::from_static(b"\xff[["),
        })
        .unwrap_err();
        assert_eq!((failure.name.as_str(), failure.message.as_str()), ("Function.Odd", ""));
        assert_eq!(failure.payload(), Bytes::from_static(b"\xff[["));
        let long = "\u{20ac}".repeat(TEXT_LIMIT);
        assert!(shortened(long).len() <= TEXT_LIMIT);
    }
}
