//! What a message about logs has in it.

use crate::guest::LogLines;

// === impl LogLines ===

impl LogLines {
    /// The lines, without the newlines between them; an empty one where bytes were lost.
    pub fn lines(&self) -> impl Iterator<Item = &str> {
        self.text.split('\n')
    }
}
