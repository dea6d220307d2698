//! Trailers that are written into a body as its end, where those of HTTP would come behind it: so the crate `lambda_runtime`
//! (1.5) sends them, as the last piece of a stream that failed.

use bytes::{Bytes, BytesMut};
use hyper::header::{HeaderMap, HeaderName, HeaderValue, TRAILER};

use super::headers::{ERROR_BODY, ERROR_TYPE};

/// How they begin.
const BEGIN: &[u8] = b"Lambda-Runtime-Function-Error-Type: ";
/// The most of them, in bytes.
const MOST_BYTES: usize = 64 << 10;

/// The end of a body that still comes: what may be trailers is held back until it is clear that it is not.
#[derive(Debug)]
pub(super) struct Held {
    bytes: BytesMut,
    /// There may be trailers in it.
    announced: bool,
    /// Where they may begin.
    begin: Option<usize>,
    /// Up to where that was looked for.
    searched: usize,
}

/// Whether there may be some: only who has announced trailers writes them.
pub(super) fn are_announced(headers: &HeaderMap) -> bool {
    headers.contains_key(TRAILER)
}

/// The trailers that are the end of a body, and how many bytes come before them.
pub(super) fn at_end(body: &[u8]) -> Option<(HeaderMap, usize)> {
    let start = body.len().saturating_sub(MOST_BYTES);
    let begin = start + last_begin(body.get(start..)?)?;
    let lines = std::str::from_utf8(body.get(begin..)?).ok()?.strip_suffix("\r\n")?;
    let (kind, object) = lines.split_once("\r\n")?;
    let value = |line: &str, name: HeaderName| {
        let (told, value) = line.split_once(": ")?;
        let value = HeaderValue::from_str(value).ok()?;
        told.eq_ignore_ascii_case(name.as_str()).then_some((name, value))
    };
    let trailers = [value(kind, ERROR_TYPE)?, value(object, ERROR_BODY)?];
    Some((trailers.into_iter().collect(), begin))
}

/// Whole answers are searched, at our cost: so by the colon, which few bytes are.
fn last_begin(body: &[u8]) -> Option<usize> {
    let before_colon = BEGIN.iter().position(|byte| *byte == b':')?;
    let mut left = body;
    while let Some(colon) = left.iter().rposition(|byte| *byte == b':') {
        if let Some(begin) = colon.checked_sub(before_colon)
            && let Some(words) = body.get(begin..begin + BEGIN.len())
            && words.eq_ignore_ascii_case(BEGIN)
        {
            return Some(begin);
        }
        left = left.get(..colon)?;
    }
    None
}

/// How many bytes at the end of a body may be the first of `BEGIN`.
fn begun(body: &[u8]) -> usize {
    let ends = |length: &usize| {
        let (Some(end), Some(begin)) = (body.len().checked_sub(*length), BEGIN.get(..*length)) else {
            return false;
        };
        body.get(end..).is_some_and(|end| end.eq_ignore_ascii_case(begin))
    };
    (1..BEGIN.len()).rev().find(ends).unwrap_or(0)
}

// === impl Held ===

impl Held {
    /// Of a body with these headers.
    pub(super) fn new(headers: &HeaderMap) -> Self {
        Self {
            bytes: BytesMut::new(),
            announced: are_announced(headers),
            begin: None,
            searched: 0,
        }
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Hands over what is surely of the answer.
    pub(super) fn take_sure(&mut self) -> Bytes {
        let sure = if self.announced {
            self.trailers_begin()
        } else {
            self.bytes.len()
        };
        self.begin = self.begin.map(|begin| begin - sure);
        self.searched = self.searched.saturating_sub(sure);
        self.bytes.split_to(sure).freeze()
    }

    /// Hands over all.
    pub(super) fn take(&mut self) -> Bytes {
        (self.begin, self.searched) = (None, 0);
        self.bytes.split().freeze()
    }

    /// Where trailers may begin, at the end at the latest.
    fn trailers_begin(&mut self) -> usize {
        let from = self.searched.saturating_sub(BEGIN.len() - 1);
        let new = self.bytes.get(from..).and_then(last_begin);
        self.begin = new.map(|begin| from + begin).or(self.begin);
        self.searched = self.bytes.len();
        // What is longer is none.
        self.begin = self.begin.filter(|begin| self.bytes.len() - begin <= MOST_BYTES);
        self.begin.unwrap_or_else(|| self.bytes.len() - begun(&self.bytes))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn announced() -> Held {
        Held::new(&[(TRAILER, HeaderValue::from_static("x"))].into_iter().collect())
    }

    /// What is handed over as these pieces come, one after the other.
    fn sure(held: &mut Held, pieces: &[&str]) -> Vec<String> {
        let sure = |piece: &&str| {
            held.push(piece.as_bytes());
            String::from_utf8(held.take_sure().into()).unwrap()
        };
        pieces.iter().map(sure).collect()
    }

    #[test]
    fn only_what_may_be_trailers_is_held_back() {
        let pieces = [
            "one",
            "two lambda-RUNTIME",
            "-Function",
            "s three",
            "Lambda-Runtime-Function-Error-Type: T",
            "\r\n",
        ];
        let mut held = announced();
        assert_eq!(
            sure(&mut held, &pieces),
            ["one", "two ", "", "lambda-RUNTIME-Functions three", "", ""]
        );
        assert_eq!(held.take(), "Lambda-Runtime-Function-Error-Type: T\r\n");
        // Who has announced none writes none.
        assert_eq!(sure(&mut Held::new(&HeaderMap::new()), &pieces), pieces);
    }

    #[test]
    fn what_is_too_long_for_trailers_goes_on() {
        let mut held = announced();
        let long = "x".repeat(MOST_BYTES);
        let told = sure(&mut held, &["Lambda-Runtime-Function-Error-Type: ", &long, "y"]);
        assert_eq!(told.concat().len(), BEGIN.len() + MOST_BYTES + 1);
    }

    proptest! {
        #[test]
        fn however_a_body_is_cut_its_trailers_are_found(
            words in prop::collection::vec("[L ]|Lambda-|Lambda-Runtime-Function-Error-Type: |x\r\n", 0..8),
            failed: bool,
            step in 1_usize..40,
        ) {
            let mut body = words.concat();
            if failed {
                body += "Lambda-Runtime-Function-Error-Type: T\r\nLambda-Runtime-Function-Error-Body: eA==\r\n";
            }
            let mut held = announced();
            let mut passed_on = Vec::new();
            for piece in body.as_bytes().chunks(step) {
                held.push(piece);
                passed_on.extend_from_slice(&held.take_sure());
            }
            let rest = held.take();
            let found = at_end(body.as_bytes()).map(|(_, before)| before);
            prop_assert_eq!(at_end(&rest).map(|(_, before)| passed_on.len() + before), found);
            prop_assert!(found.is_some() || !failed);
            passed_on.extend_from_slice(&rest);
            prop_assert_eq!(passed_on, body.as_bytes());
        }
    }
}
