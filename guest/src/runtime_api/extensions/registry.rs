//! The extensions of one container: a plain state machine for each, so that every order of calls can be tested.
//!
//! ```text
//!  Registered ──ask──► Ready ──event──► Running ──ask──► Ready …
//!       └─────────────────┴── init/error │ exit/error ──► Failed
//! ```

use bytes::Bytes;
use serde::Deserialize;

use crate::runtime_api::line::Line;

/// Lambda's most of them.
const EXTENSIONS: usize = 10;
/// The longest name that is taken, in bytes: Lambda's limit for external ones.
const NAME_BYTES: usize = 128;

/// What an extension may be told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub(super) enum Event {
    Invoke,
    /// Not for extensions that a runtime starts, as all of ours are: they have its SIGTERM.
    Shutdown,
}

/// Which call reports that an extension cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Report {
    Init,
    Exit,
}

/// Why a call is refused. In the words of Lambda's Extensions API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) kind: &'static str,
    pub(super) message: String,
}

/// All of them.
#[derive(Default)]
pub(in crate::runtime_api) struct Registry {
    extensions: Vec<Extension>,
    /// Init is over.
    closed: bool,
}

struct Extension {
    id: String,
    name: String,
    invokes: bool,
    state: State,
    /// What it has not yet had.
    event: Option<Bytes>,
    /// Its requests that wait.
    line: Line,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Registered,
    Ready,
    Running,
    Failed(Report),
}

// === impl Report ===

impl Report {
    /// Lambda's error type.
    pub(super) fn kind(self) -> &'static str {
        match self {
            Self::Init => "Extension.InitError",
            Self::Exit => "Extension.ExitError",
        }
    }
}

// === impl Refused ===

impl Refused {
    pub(super) fn new(kind: &'static str, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { kind, message }
    }

    /// Not now.
    fn state(extension: &Extension, call: &str) -> Self {
        let message = format!("the extension {} is {:?}: no {call}", extension.name, extension.state);
        Self::new("Extension.InvalidExtensionState", message)
    }
}

// === impl Registry ===

impl Registry {
    /// Takes one in, under an id that nobody else has.
    pub(super) fn register(&mut self, id: String, name: &str, events: &[Event]) -> Result<(), Refused> {
        if name.is_empty() || name.len() > NAME_BYTES {
            let message = format!("the name of an extension has 1 to {NAME_BYTES} bytes");
            return Err(Refused::new("Extension.InvalidExtensionName", message));
        }
        if events.contains(&Event::Shutdown) {
            let message = "SHUTDOWN is an event for external extensions; this one ends by SIGTERM";
            return Err(Refused::new("Extension.InvalidEventType", message));
        }
        if self.closed {
            let message = "extensions register before the runtime asks for its first invocation";
            return Err(Refused::new("Extension.RegistrationClosed", message));
        }
        if self.extensions.iter().any(|extension| extension.name == name) {
            let message = format!("there is an extension {name} already");
            return Err(Refused::new("Extension.InvalidExtensionState", message));
        }
        if self.extensions.len() >= EXTENSIONS {
            let message = format!("there are {EXTENSIONS} extensions, which is the most");
            return Err(Refused::new("Extension.TooManyExtensions", message));
        }
        self.extensions.push(Extension {
            id,
            name: name.to_owned(),
            invokes: events.contains(&Event::Invoke),
            state: State::Registered,
            event: None,
            line: Line::default(),
        });
        Ok(())
    }

    /// None registers any more.
    pub(in crate::runtime_api) fn close(&mut self) {
        self.closed = true;
    }

    /// Whether there is one.
    pub(in crate::runtime_api) fn any(&self) -> bool {
        !self.extensions.is_empty()
    }

    /// Whether each has done what it had to, and waits for an event.
    pub(in crate::runtime_api) fn are_ready(&self) -> bool {
        let ready = |extension: &Extension| extension.state == State::Ready && extension.event.is_none();
        self.extensions.iter().all(ready)
    }

    /// One asks for its next event. None: it has to wait, and [`take`](Self::take) what comes.
    pub(super) fn ask(&mut self, id: &str) -> Result<Option<Bytes>, Refused> {
        let extension = self.find(id)?;
        if matches!(extension.state, State::Failed(_)) {
            return Err(Refused::state(extension, "event"));
        }
        extension.state = State::Ready;
        Ok(self.take(id))
    }

    /// The event for one who has asked for it, if there is one.
    pub(super) fn take(&mut self, id: &str) -> Option<Bytes> {
        let extension = self.find(id).ok()?;
        let event = extension.event.take_if(|_| extension.state == State::Ready)?;
        extension.state = State::Running;
        Some(event)
    }

    /// Where its requests wait.
    pub(super) fn line(&mut self, id: &str) -> Option<&mut Line> {
        self.find(id).ok().map(|extension| &mut extension.line)
    }

    /// Tells those who want to know of an invocation.
    pub(in crate::runtime_api) fn invoke(&mut self, event: &Bytes) {
        for extension in self.extensions.iter_mut().filter(|extension| extension.invokes) {
            extension.event = Some(event.clone());
        }
    }

    /// One reports that it cannot go on. Its name, where it is the first time.
    pub(super) fn fail(&mut self, id: &str, report: Report) -> Result<Option<String>, Refused> {
        let extension = self.find(id)?;
        match (extension.state, report) {
            (State::Failed(before), _) if before == report => return Ok(None),
            (State::Registered, _) | (State::Ready | State::Running, Report::Exit) => {}
            (State::Failed(_) | State::Ready | State::Running, _) => {
                return Err(Refused::state(extension, "such report"));
            }
        }
        extension.state = State::Failed(report);
        Ok(Some(extension.name.clone()))
    }

    fn find(&mut self, id: &str) -> Result<&mut Extension, Refused> {
        self.extensions
            .iter_mut()
            .find(|extension| extension.id == id)
            .ok_or_else(|| {
                Refused::new(
                    "Extension.UnknownExtensionIdentifier",
                    format!("Unknown extension {id}"),
                )
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVENT: Bytes = Bytes::from_static(b"{}");

    /// One with an extension `a` that hears of invocations and an extension `b` that does not.
    fn registered() -> Registry {
        let mut registry = Registry::default();
        registry.register("a".into(), "first", &[Event::Invoke]).unwrap();
        registry.register("b".into(), "second", &[]).unwrap();
        registry
    }

    fn kind<T: std::fmt::Debug>(result: Result<T, Refused>) -> &'static str {
        result.unwrap_err().kind
    }

    #[test]
    fn an_event_goes_to_those_who_want_it() {
        let mut registry = registered();
        assert!(registry.any() && !registry.are_ready());
        for id in ["a", "b"] {
            assert_eq!(registry.ask(id), Ok(None));
        }
        assert!(registry.are_ready());
        registry.invoke(&EVENT);
        assert!(!registry.are_ready());
        assert_eq!((registry.take("a"), registry.take("b")), (Some(EVENT), None));
        assert_eq!(registry.take("a"), None, "once");
        assert!(!registry.are_ready(), "it is at work");
        assert_eq!(registry.ask("a"), Ok(None));
        assert!(registry.are_ready());
        // One whose connection broke asks anew.
        assert_eq!(registry.ask("a"), Ok(None));
        assert_eq!(kind(registry.ask("c")), "Extension.UnknownExtensionIdentifier");
    }

    #[test]
    fn some_cannot_register() {
        let mut registry = registered();
        let mut register = |name: &str, events: &[Event]| {
            let id = format!("id-{name}");
            registry.register(id, name, events)
        };
        assert_eq!(kind(register("", &[])), "Extension.InvalidExtensionName");
        assert_eq!(kind(register(&"x".repeat(129), &[])), "Extension.InvalidExtensionName");
        assert_eq!(
            kind(register("c", &[Event::Invoke, Event::Shutdown])),
            "Extension.InvalidEventType"
        );
        assert_eq!(kind(register("first", &[])), "Extension.InvalidExtensionState");
        for number in 2..EXTENSIONS {
            register(&number.to_string(), &[]).unwrap();
        }
        assert_eq!(kind(register("c", &[])), "Extension.TooManyExtensions");
        registry.close();
        assert_eq!(
            kind(registry.register("c".into(), "c", &[])),
            "Extension.RegistrationClosed"
        );
    }

    #[test]
    fn one_that_has_failed_stays_so() {
        let mut registry = registered();
        assert_eq!(registry.fail("a", Report::Init), Ok(Some("first".into())));
        assert_eq!(registry.fail("a", Report::Init), Ok(None), "the first report counts");
        assert_eq!(
            kind(registry.fail("a", Report::Exit)),
            "Extension.InvalidExtensionState"
        );
        assert_eq!(kind(registry.ask("a")), "Extension.InvalidExtensionState");
        registry.ask("b").unwrap();
        assert_eq!(
            kind(registry.fail("b", Report::Init)),
            "Extension.InvalidExtensionState"
        );
        assert_eq!(registry.fail("b", Report::Exit), Ok(Some("second".into())));
        assert_eq!(
            kind(registry.fail("c", Report::Exit)),
            "Extension.UnknownExtensionIdentifier"
        );
    }
}
