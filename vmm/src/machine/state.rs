//! What becomes of a machine when something happens to it: a pure function of its state and the event.

use crate::devices::GuestEvent;
use crate::exit_report::Reason;

/// How a machine is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Its vCPUs run.
    Running,
    /// Its vCPUs stand still.
    Paused,
    /// It has ended.
    Ended(End),
}

/// Why a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// In one word.
    pub reason: Reason,
    /// In words for a person.
    pub detail: String,
}

/// What happens to a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Asked for on the control socket.
    Pause,
    /// Asked for on the control socket.
    Resume,
    /// Asked for on the control socket.
    Stop,
    /// SIGTERM or SIGINT, by its number.
    Signal(i32),
    /// The guest ended itself. `console_panicked`: its console tells of a kernel panic.
    Guest {
        /// How it did: by powering off, a reset, a panic, or a vCPU that cannot go on.
        event: GuestEvent,
        /// Whether the console's last lines tell of a panic.
        console_panicked: bool,
    },
}

/// What the machine's owner has to do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing.
    None,
    /// Stop the vCPUs.
    PauseVcpus,
    /// Let them run.
    ResumeVcpus,
}

/// What Linux writes to its console when it panics.
pub const PANIC_LINE: &str = "Kernel panic - not syncing";

// === impl State ===

impl State {
    /// The state after `event`, and what is to be done to get there.
    pub fn next(self, event: Event) -> (Self, Action) {
        let end = |reason, detail: String| (Self::Ended(End { reason, detail }), Action::None);
        match (self, event) {
            (Self::Ended(end), _) => (Self::Ended(end), Action::None),
            (Self::Running, Event::Pause) => (Self::Paused, Action::PauseVcpus),
            (Self::Paused, Event::Resume) => (Self::Running, Action::ResumeVcpus),
            (state, Event::Pause | Event::Resume) => (state, Action::None),
            (_, Event::Stop) => end(Reason::Stopped, "stopped through the control socket".into()),
            (_, Event::Signal(number)) => end(Reason::Killed, format!("ended by signal {number}")),
            (
                _,
                Event::Guest {
                    event,
                    console_panicked,
                },
            ) => match event {
                GuestEvent::Off => end(Reason::GuestOff, "the guest powered itself off".into()),
                GuestEvent::Panic => end(Reason::GuestPanic, "the guest's kernel panicked (panic device)".into()),
                // A kernel without a driver for the panic device resets after a panic.
                GuestEvent::Reset(by) if console_panicked => end(
                    Reason::GuestPanic,
                    format!("the guest's kernel panicked and reset by {by}"),
                ),
                GuestEvent::Reset(by) => end(Reason::GuestReset, format!("the guest was reset by {by}")),
                GuestEvent::Broken(why) => end(Reason::Error, why),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest(event: GuestEvent, console_panicked: bool) -> Event {
        Event::Guest {
            event,
            console_panicked,
        }
    }

    fn reason(event: Event) -> Reason {
        for state in [State::Running, State::Paused] {
            let (State::Ended(end), Action::None) = state.next(event.clone()) else {
                unreachable!("{event:?} ends a machine")
            };
            if event != Event::Stop || end.reason == Reason::Stopped {
                assert!(!end.detail.is_empty());
            }
        }
        match State::Running.next(event) {
            (State::Ended(end), _) => end.reason,
            _ => unreachable!(),
        }
    }

    #[test]
    fn pause_and_resume_are_idempotent() {
        assert_eq!(State::Running.next(Event::Pause), (State::Paused, Action::PauseVcpus));
        assert_eq!(State::Paused.next(Event::Pause), (State::Paused, Action::None));
        assert_eq!(State::Paused.next(Event::Resume), (State::Running, Action::ResumeVcpus));
        assert_eq!(State::Running.next(Event::Resume), (State::Running, Action::None));
    }

    #[test]
    fn every_end_has_its_reason() {
        assert_eq!(reason(Event::Stop), Reason::Stopped);
        assert_eq!(reason(Event::Signal(15)), Reason::Killed);
        assert_eq!(reason(guest(GuestEvent::Off, false)), Reason::GuestOff);
        assert_eq!(reason(guest(GuestEvent::Off, true)), Reason::GuestOff);
        assert_eq!(reason(guest(GuestEvent::Panic, false)), Reason::GuestPanic);
        assert_eq!(reason(guest(GuestEvent::Reset("x"), false)), Reason::GuestReset);
        assert_eq!(reason(guest(GuestEvent::Reset("x"), true)), Reason::GuestPanic);
        assert_eq!(reason(guest(GuestEvent::Broken("x".into()), false)), Reason::Error);
    }

    #[test]
    fn the_first_end_is_the_end() {
        let (ended, _) = State::Running.next(Event::Stop);
        for event in [
            Event::Pause,
            Event::Resume,
            Event::Signal(2),
            guest(GuestEvent::Off, false),
        ] {
            assert_eq!(ended.clone().next(event), (ended.clone(), Action::None));
        }
    }
}
