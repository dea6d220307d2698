//! The extensions of one container: a plain state machine for each, so that every order of calls can be tested.
//!
//! ```text
//!  Started ──register──► Registered ──ask──► Ready ──event──► Running ──ask──► Ready …
//!     └──────────────────────┴──────────────────┴── init/error │ exit/error ──► Failed
//! ```
//!
//! Started are external ones: programs of their own, known by their file names before they run. Internal ones, threads and
//! processes of the runtime, are heard of when they register.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::runtime_api::line::Line;

/// Lambda's most of them.
const EXTENSIONS: usize = 10;
/// The longest name that is taken, in bytes: Lambda's limit for external ones.
const NAME_BYTES: usize = 128;

/// What an extension may be told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub(in crate::runtime_api) enum Event {
    Invoke,
    /// Not for internal ones, which have the runtime's SIGTERM.
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
pub(in crate::runtime_api) struct Refused {
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
    /// Empty before it has registered.
    id: String,
    name: String,
    external: bool,
    events: Vec<Event>,
    state: State,
    /// What it has not yet had.
    event: Option<Bytes>,
    /// Its requests that wait.
    line: Line,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Started,
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

    fn unknown(id: &str) -> Self {
        Self::new(
            "Extension.UnknownExtensionIdentifier",
            format!("Unknown extension {id}"),
        )
    }

    /// Not now.
    fn state(extension: &Extension, call: &str) -> Self {
        let message = format!("the extension {} is {:?}: no {call}", extension.name, extension.state);
        Self::new("Extension.InvalidExtensionState", message)
    }
}

// === impl Registry ===

impl Registry {
    /// External ones that are to register: their names.
    pub(in crate::runtime_api) fn expect(&mut self, names: Vec<String>) {
        self.extensions.extend(names.into_iter().map(|name| Extension {
            id: String::new(),
            name,
            external: true,
            events: Vec::new(),
            state: State::Started,
            event: None,
            line: Line::default(),
        }));
    }

    /// Takes one in, under an id that nobody else has.
    pub(super) fn register(&mut self, id: String, name: &str, events: &[Event]) -> Result<(), Refused> {
        if name.is_empty() || name.len() > NAME_BYTES {
            let message = format!("the name of an extension has 1 to {NAME_BYTES} bytes");
            return Err(Refused::new("Extension.InvalidExtensionName", message));
        }
        let known = self.extensions.iter_mut().find(|extension| extension.name == name);
        if let Some(extension) = known {
            if extension.state != State::Started {
                let message = format!("there is an extension {name} already");
                return Err(Refused::new("Extension.InvalidExtensionState", message));
            }
            extension.id = id;
            extension.events = events.to_vec();
            extension.state = State::Registered;
            return Ok(());
        }
        if events.contains(&Event::Shutdown) {
            let message = "SHUTDOWN is an event for external extensions; this one ends by SIGTERM";
            return Err(Refused::new("Extension.InvalidEventType", message));
        }
        if self.closed {
            let message = "extensions register before the runtime asks for its first invocation";
            return Err(Refused::new("Extension.RegistrationClosed", message));
        }
        if self.extensions.len() >= EXTENSIONS {
            let message = format!("there are {EXTENSIONS} extensions, which is the most");
            return Err(Refused::new("Extension.TooManyExtensions", message));
        }
        self.extensions.push(Extension {
            id,
            name: name.to_owned(),
            external: false,
            events: events.to_vec(),
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

    /// Whether there are external ones.
    pub(in crate::runtime_api) fn any_external(&self) -> bool {
        self.extensions.iter().any(|extension| extension.external)
    }

    /// Whether there are internal ones.
    pub(in crate::runtime_api) fn any_internal(&self) -> bool {
        self.extensions.iter().any(|extension| !extension.external)
    }

    /// Whether all of which it is known that they are there have registered.
    pub(in crate::runtime_api) fn are_registered(&self) -> bool {
        self.extensions
            .iter()
            .all(|extension| extension.state != State::Started)
    }

    /// The name of the external one at a place of those that were expected.
    pub(in crate::runtime_api) fn external_name(&self, index: usize) -> Option<&str> {
        let mut external = self.extensions.iter().filter(|extension| extension.external);
        external.nth(index).map(|extension| extension.name.as_str())
    }

    /// The name of the one that has this id.
    pub(in crate::runtime_api) fn name(&self, id: &str) -> Result<&str, Refused> {
        let extension = self.extensions.iter().find(|extension| extension.id == id);
        extension
            .map(|extension| extension.name.as_str())
            .ok_or_else(|| Refused::unknown(id))
    }

    /// Of each that has registered: its name, its state in Lambda's words, and what it hears of.
    pub(in crate::runtime_api) fn states(&self) -> Vec<(String, String, Vec<Event>)> {
        let state = |extension: &Extension| {
            let state = match extension.state {
                State::Failed(Report::Init) => "InitError".to_owned(),
                State::Failed(Report::Exit) => "ExitError".to_owned(),
                state => format!("{state:?}"),
            };
            (extension.name.clone(), state, extension.events.clone())
        };
        self.extensions.iter().map(state).collect()
    }

    /// Tells external ones that the container ends. Which are not to be told, and have no more to do: their places.
    pub(in crate::runtime_api) fn shut_down(&mut self, event: &Bytes) -> Vec<usize> {
        let external = self.extensions.iter_mut().filter(|extension| extension.external);
        let mut others = Vec::new();
        for (index, extension) in external.enumerate() {
            let hears = !matches!(extension.state, State::Started | State::Failed(_));
            if hears && extension.events.contains(&Event::Shutdown) {
                extension.event = Some(event.clone());
            } else {
                others.push(index);
            }
        }
        others
    }

    /// Whether each has done what it had to, and waits for an event.
    pub(in crate::runtime_api) fn are_ready(&self) -> bool {
        let ready = |extension: &Extension| extension.state == State::Ready && extension.event.is_none();
        self.extensions.iter().all(ready)
    }

    /// One asks for its next event. None: it has to wait, and [`take`](Self::take) what comes.
    pub(super) fn ask(&mut self, id: &str) -> Result<Option<Bytes>, Refused> {
        let extension = self.find(id)?;
        if matches!(extension.state, State::Started | State::Failed(_)) {
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
        for extension in &mut self.extensions {
            if extension.events.contains(&Event::Invoke) {
                extension.event = Some(event.clone());
            }
        }
    }

    /// One reports that it cannot go on. Its name, where it is the first time.
    pub(super) fn fail(&mut self, id: &str, report: Report) -> Result<Option<String>, Refused> {
        let extension = self.find(id)?;
        match (extension.state, report) {
            (State::Failed(before), _) if before == report => return Ok(None),
            (State::Registered, _) | (State::Ready | State::Running, Report::Exit) => {}
            (State::Started | State::Failed(_) | State::Ready | State::Running, _) => {
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
            .ok_or_else(|| Refused::unknown(id))
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
        assert!(registry.any_internal() && !registry.any_external() && !registry.are_ready());
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
    fn external_ones_are_waited_for_and_told_of_the_end() {
        let mut registry = Registry::default();
        assert!(registry.are_registered() && registry.are_ready());
        registry.expect(vec!["all".into(), "events".into(), "nothing".into()]);
        assert!(registry.any_external() && !registry.any_internal());
        assert_eq!(registry.external_name(1), Some("events"));
        for (id, name, events) in [
            ("a", "all", [Event::Invoke, Event::Shutdown].as_slice()),
            ("b", "events", &[Event::Invoke]),
        ] {
            assert!(!registry.are_registered());
            registry.register(id.into(), name, events).unwrap();
            assert_eq!(
                kind(registry.register("x".into(), name, events)),
                "Extension.InvalidExtensionState"
            );
        }
        assert!(!registry.are_registered() && !registry.are_ready());
        registry.register("c".into(), "nothing", &[]).unwrap();
        assert!(registry.are_registered() && !registry.are_ready());
        assert_eq!(registry.name("b"), Ok("events"));
        assert_eq!(kind(registry.name("d")), "Extension.UnknownExtensionIdentifier");
        for id in ["a", "b", "c"] {
            assert_eq!(registry.ask(id), Ok(None));
        }
        assert!(registry.are_ready());
        // Another may register beside them, but not for the end.
        registry.register("i".into(), "internal", &[]).unwrap();
        assert_eq!(registry.shut_down(&EVENT), [1, 2]);
        assert_eq!(
            (registry.take("a"), registry.take("b"), registry.take("i")),
            (Some(EVENT), None, None)
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
