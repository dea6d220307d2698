//! The exit report of a machine: one line of JSON on standard output, and an exit code, that say why it ended.
//!
//! | code | reason | what happened |
//! |---|---|---|
//! | 0 | `guest_off` | the guest powered itself off |
//! | 1 | `error` | the VMM could not start or go on, or panicked; `detail` says what was wrong and what to do |
//! | 2 | | the command line was wrong; nothing was started and there is no exit report |
//! | 3 | `guest_reset` | the guest reset itself, or its CPU gave up (triple fault) |
//! | 4 | `guest_panic` | the guest's kernel panicked |
//! | 5 | `stopped` | somebody said so on the control socket |
//! | 6 | `killed` | SIGTERM or SIGINT |
//!
//! Anything else, a death by signal above all, is a VMM that did not end by its own will.

use serde::{Deserialize, Serialize};

/// Why a machine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The guest powered itself off.
    GuestOff,
    /// The guest reset itself or its CPU shut down.
    GuestReset,
    /// The guest's kernel panicked.
    GuestPanic,
    /// Stopped through the control socket.
    Stopped,
    /// SIGTERM or SIGINT.
    Killed,
    /// The VMM itself could not go on.
    Error,
}

/// What a machine leaves behind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitReport {
    /// Why it ended.
    pub reason: Reason,
    /// The same in words for a person: what was wrong and, for an error, what to do.
    pub detail: String,
    /// From the process's start, in us.
    pub uptime_us: u64,
    /// The last lines of the serial console, at most [`crate::console::TAIL_BYTES`] bytes.
    pub console_tail: String,
}

// === impl Reason ===

impl Reason {
    const ALL: [Self; 6] = [
        Self::GuestOff,
        Self::GuestReset,
        Self::GuestPanic,
        Self::Stopped,
        Self::Killed,
        Self::Error,
    ];

    /// The reason of a VMM that ended with this exit code, where that is one of its own.
    #[must_use]
    pub fn of_exit_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.exit_code() == code)
    }

    /// The exit code of a VMM that ended for this reason.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::GuestOff => 0,
            Self::Error => 1,
            Self::GuestReset => 3,
            Self::GuestPanic => 4,
            Self::Stopped => 5,
            Self::Killed => 6,
        }
    }
}

// === impl ExitReport ===

impl ExitReport {
    /// The one line that is written, without its newline.
    pub fn to_line(&self) -> String {
        // A struct of strings and numbers always serialises.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Finds the exit report in what a VMM wrote to its standard output: its last line that is one.
    pub fn find(output: &str) -> Option<Self> {
        output.lines().rev().find_map(|line| serde_json::from_str(line).ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_as_the_contract_says() {
        let report = ExitReport {
            reason: Reason::GuestPanic,
            detail: "the guest's kernel panicked".into(),
            uptime_us: 12,
            console_tail: "Kernel panic\n\"quoted\"".into(),
        };
        let line = report.to_line();
        assert!(line.starts_with(r#"{"reason":"guest_panic","detail":""#), "{line}");
        assert!(!line.contains('\n'));
        assert_eq!(ExitReport::find(&format!("noise\n{line}\n")), Some(report));
        assert_eq!(ExitReport::find("nothing\n{}\n"), None);
    }

    #[test]
    fn exit_codes_tell_reasons_apart() {
        for reason in Reason::ALL {
            assert_eq!(Reason::of_exit_code(reason.exit_code()), Some(reason));
        }
        assert_eq!(Reason::of_exit_code(2), None, "a wrong command line has no reason");
    }
}
