//! The terminal that this program was started at.

use std::io;

use stoker_proto::v1;

/// The terminal's keys are passed on as they are, none of them taken as an order, until this is dropped.
#[derive(Debug)]
pub(super) struct Raw(());

// === impl Raw ===

impl Raw {
    pub(super) fn set() -> io::Result<Self> {
        crossterm::terminal::enable_raw_mode().map(Self)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // Without a terminal there is nothing to restore.
        let _ = crossterm::terminal::disable_raw_mode();
    }
}

/// How large it is; nothing where there is none.
pub(super) fn size() -> Option<v1::TerminalSize> {
    let (columns, rows) = terminal_size::terminal_size()?;
    Some(v1::TerminalSize {
        columns: columns.0.into(),
        rows: rows.0.into(),
    })
}
