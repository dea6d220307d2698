//! How far something is, for who waits for it at a terminal.

use std::fmt;
use std::io::{self, IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

/// How often the line is written again.
const INTERVAL: Duration = Duration::from_millis(100);

/// A line of standard error that is written over, where that is a terminal; gone when this is dropped.
pub(super) struct Progress {
    is_shown: bool,
    /// When the line was last written.
    written: Option<Instant>,
}

// === impl Progress ===

impl Progress {
    pub(super) fn new() -> Self {
        Self {
            is_shown: io::stderr().is_terminal(),
            written: None,
        }
    }

    /// Says how far it is, unless that was said just now.
    pub(super) fn say(&mut self, how_far: fmt::Arguments<'_>) {
        if self.is_shown && self.written.is_none_or(|written| written.elapsed() >= INTERVAL) {
            self.written = Some(Instant::now());
            // From the start of the line, to whose end the terminal then erases (ECMA-48, EL). Nobody misses one.
            let _ = write!(io::stderr(), "\r{how_far}\x1b[K");
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.written.is_some() {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}
