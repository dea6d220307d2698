//! Cuts what a program writes into lines.

/// The longest line, in bytes: a longer one is cut.
pub(super) const LINE_BYTES: usize = 64 << 10;

/// The beginning of a line whose end has not been written yet.
#[derive(Debug, Default)]
pub(super) struct Lines(Vec<u8>);

// === impl Lines ===

impl Lines {
    /// Takes what was written next, and passes on each line that is whole, without its end.
    pub(super) fn write(&mut self, mut data: &[u8], mut line: impl FnMut(&[u8])) {
        while !data.is_empty() {
            let room = LINE_BYTES - self.0.len();
            let end = data.iter().take(room).position(|byte| *byte == b'\n');
            let (part, rest) = data.split_at(end.unwrap_or(data.len().min(room)));
            let whole = end.is_some() || part.len() == room;
            if !whole {
                self.0.extend_from_slice(part);
            } else if self.0.is_empty() {
                line(part);
            } else {
                self.0.extend_from_slice(part);
                line(&self.0);
                self.0 = Vec::new();
            }
            data = if end.is_some() {
                rest.get(1..).unwrap_or_default()
            } else {
                rest
            };
        }
    }

    /// What was begun of a line.
    pub(super) fn rest(&mut self) -> Option<Vec<u8>> {
        Some(std::mem::take(&mut self.0)).filter(|rest| !rest.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn however_it_is_written_lines_come_whole() {
        let long = "x".repeat(LINE_BYTES + 10);
        let text = format!("one\n\n{long}\nlast");
        let expected = ["one", "", &long[..LINE_BYTES], &long[LINE_BYTES..]];
        for step in [1, 3, 1000, text.len()] {
            let (mut lines, mut told) = (Lines::default(), Vec::new());
            for part in text.as_bytes().chunks(step) {
                lines.write(part, |line| told.push(String::from_utf8(line.to_vec()).unwrap()));
            }
            assert!(told == expected, "{step}");
            assert_eq!(
                (lines.rest().as_deref(), lines.rest()),
                (Some(b"last".as_slice()), None)
            );
        }
    }
}
