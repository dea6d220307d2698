//! What is kept of a text that may have no end: its beginning and its end, with a line between that says how much is missing.

use std::collections::VecDeque;

use crate::limits::LOG_BYTES;

const HALF: usize = LOG_BYTES / 2;
/// Room for the line between, in bytes.
const GAP: usize = 64;

/// The beginning and the end of a text: all of it up to [`LOG_BYTES`], so many bytes with the line between at most.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Excerpt {
    beginning: Vec<u8>,
    end: VecDeque<u8>,
    missing: u64,
}

// === impl Excerpt ===

impl Excerpt {
    /// Adds what comes next.
    pub fn append(&mut self, data: &[u8]) {
        let room = match self.missing {
            0 => HALF.saturating_sub(self.beginning.len()),
            _ => 0,
        };
        let (beginning, rest) = data.split_at(data.len().min(room));
        self.beginning.extend_from_slice(beginning);
        if self.missing == 0 && self.end.len() + rest.len() <= HALF {
            self.end.extend(rest);
            return;
        }
        let (passed, rest) = rest.split_at(rest.len().saturating_sub(HALF - GAP));
        let over = (self.end.len() + rest.len()).saturating_sub(HALF - GAP);
        self.end.drain(..over.min(self.end.len()));
        self.end.extend(rest);
        self.missing += (passed.len() + over) as u64;
    }

    /// Adds what [`Excerpt::into_bytes`] made of another text of which so many bytes are missing.
    pub fn append_excerpt(&mut self, data: &[u8], missing: u64) {
        if missing == 0 {
            return self.append(data);
        }
        // The beginning of one that is not whole is full, as long as nobody else made it.
        let (beginning, rest) = data.split_at(data.len().min(HALF));
        let gap = gap(beginning, missing).len().min(rest.len());
        let (_, end) = rest.split_at(gap);
        self.append(beginning);
        self.missing += missing + self.end.len() as u64;
        self.end.clear();
        self.append(end);
    }

    /// How many bytes are missing between the beginning and the end.
    #[must_use]
    pub fn missing(&self) -> u64 {
        self.missing
    }

    /// As people read it.
    #[must_use]
    pub fn into_bytes(self) -> Vec<u8> {
        let Self {
            beginning: mut bytes,
            end,
            missing,
        } = self;
        if missing > 0 {
            let gap = gap(&bytes, missing);
            bytes.extend_from_slice(gap.as_bytes());
        }
        bytes.extend(end);
        bytes
    }
}

/// The line that stands for what is missing after `beginning`.
fn gap(beginning: &[u8], missing: u64) -> String {
    let end_of_line = match beginning.last() {
        None | Some(b'\n') => "",
        Some(_) => "\n",
    };
    format!("{end_of_line}[{missing} bytes are missing here]\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn excerpt(parts: &[&[u8]]) -> Excerpt {
        let mut excerpt = Excerpt::default();
        for part in parts {
            excerpt.append(part);
        }
        excerpt
    }

    /// Numbered lines, of which it can be seen where they were cut.
    fn lines(count: usize) -> Vec<u8> {
        (0..count).flat_map(|n| format!("line {n}\n").into_bytes()).collect()
    }

    #[test]
    fn what_fits_is_whole() {
        let text = vec![b'x'; LOG_BYTES];
        for size in [1, 1000, HALF, LOG_BYTES] {
            let parts: Vec<_> = text.chunks(size).collect();
            let excerpt = excerpt(&parts);
            assert_eq!(excerpt.missing(), 0);
            assert_eq!(excerpt.into_bytes(), text);
        }
    }

    #[test]
    fn of_more_the_beginning_and_the_end_are_kept_and_the_rest_is_counted() {
        let text = lines(100_000);
        for size in [7, 8192, text.len()] {
            let parts: Vec<_> = text.chunks(size).collect();
            let excerpt = excerpt(&parts);
            let missing = excerpt.missing();
            let kept = excerpt.into_bytes();
            assert!(
                kept.len() <= LOG_BYTES && kept.len() > LOG_BYTES - GAP,
                "{}",
                kept.len()
            );
            assert_eq!(kept[..HALF], text[..HALF]);
            assert!(kept.ends_with(b"line 99999\n"));
            let end = HALF - GAP;
            assert_eq!(missing, (text.len() - HALF - end) as u64);
            let between = String::from_utf8(kept[HALF..kept.len() - end].to_vec()).unwrap();
            assert_eq!(between.trim_start(), format!("[{missing} bytes are missing here]\n"));
        }
    }

    #[test]
    fn one_byte_too_many_is_counted_too() {
        let excerpt = excerpt(&[&vec![b'x'; LOG_BYTES], b"y"]);
        assert_eq!(excerpt.missing(), GAP as u64 + 1);
        assert!(excerpt.into_bytes().ends_with(b"xy"));
    }

    #[test]
    fn excerpts_of_two_texts_are_one_of_both() {
        let (first, second) = (lines(50_000), lines(60_000));
        let whole = excerpt(&[&first, &second]);
        for (first_size, second_size) in [(50_000, 60_000), (50_000, 10), (10, 60_000), (0, 60_000), (50_000, 0)] {
            let (first, second) = (lines(first_size), lines(second_size));
            let whole = excerpt(&[&first, &second]);
            let mut joined = Excerpt::default();
            for text in [&first, &second] {
                let part = excerpt(&[text]);
                let missing = part.missing();
                joined.append_excerpt(&part.into_bytes(), missing);
            }
            assert_eq!(joined.missing() as usize, first.len() + second.len() - kept(&joined));
            assert!(joined.clone().into_bytes().len() <= LOG_BYTES);
            if second_size > first_size {
                assert_eq!(joined, whole);
            }
        }
        assert!(whole.missing() > 0);
    }

    fn kept(excerpt: &Excerpt) -> usize {
        excerpt.beginning.len() + excerpt.end.len()
    }

    #[test]
    fn what_is_no_excerpt_does_no_harm() {
        for data in [&b""[..], b"x", &[b'x'; HALF], &[b'x'; HALF + 3]] {
            let mut joined = Excerpt::default();
            joined.append_excerpt(data, u64::MAX / 4);
            joined.append_excerpt(data, 5);
            assert!(joined.into_bytes().len() <= LOG_BYTES);
        }
    }
}
