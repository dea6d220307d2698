//! A line as it is in a file: `TIME REQUEST-ID TEXT`, `-` where it is of no request. `!` in place of an id says that bytes are
//! missing there: `TIME ! N bytes are missing here`.

use std::io::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use stoker_proto::limits::LOG_LINE_BYTES;
use stoker_proto::v1;

/// Of no request.
const NONE: &str = "-";
/// What is missing.
const LOST: &str = "!";
const LOST_TEXT: &str = " bytes are missing here";

/// The longest request id, in bytes.
const MAX_REQUEST_ID: usize = 64;

/// The most that a line takes in a file, in bytes: with its time, its request and its end.
pub(super) const MAX_LINE: usize = LOG_LINE_BYTES + 27 + MAX_REQUEST_ID + 3;

/// Lines to be kept, of one time and request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Since 1970.
    pub(super) time: Duration,
    /// Empty where it is of none.
    pub(super) request_id: String,
    pub(super) what: What,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// With a newline between them.
    Text(String),
    /// So many bytes are missing.
    Lost(u64),
}

/// Whether it is a request's id, or could be one.
pub(super) fn is_request_id(id: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    (1..=MAX_REQUEST_ID).contains(&id.len()) && id != NONE && id.bytes().all(allowed)
}

/// Since 1970.
pub(super) fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

// === impl Entry ===

impl Entry {
    /// Bytes that are missing as of now.
    pub(super) fn lost(bytes: u64) -> Self {
        Self {
            time: now(),
            request_id: String::new(),
            what: What::Lost(bytes),
        }
    }

    /// Adds it to what is written to a file. A line that is too long is cut.
    pub(super) fn write(&self, to: &mut Vec<u8>) {
        let time = humantime::format_rfc3339_micros(UNIX_EPOCH + self.time);
        match &self.what {
            What::Text(text) => {
                let id = match self.request_id.as_str() {
                    "" => NONE,
                    id => id,
                };
                let before = format!("{time} {id} ");
                for line in text.split('\n') {
                    let (line, _) = line.split_at(line.floor_char_boundary(LOG_LINE_BYTES));
                    to.extend_from_slice(before.as_bytes());
                    to.extend_from_slice(line.as_bytes());
                    to.push(b'\n');
                }
            }
            What::Lost(bytes) => {
                // Writing to memory can't fail.
                let _ = writeln!(to, "{time} {LOST} {bytes}{LOST_TEXT}");
            }
        }
    }
}

// === impl What ===

impl What {
    /// How much is missing where it is.
    pub(super) fn bytes(&self) -> u64 {
        match self {
            Self::Text(text) => text.len() as u64 + 1,
            Self::Lost(bytes) => *bytes,
        }
    }
}

/// A line of a file, without its end. Nothing where it is not one that an agent wrote.
pub(super) fn parse(line: &[u8]) -> Option<v1::LogLine> {
    let line = String::from_utf8_lossy(line);
    let mut parts = line.splitn(3, ' ');
    let (time, id, text) = (parts.next()?, parts.next()?, parts.next()?);
    let time = Some(humantime::parse_rfc3339(time).ok()?.into());
    let (request_id, text, lost_bytes) = match id {
        LOST => (
            String::new(),
            String::new(),
            text.strip_suffix(LOST_TEXT)?.parse().ok()?,
        ),
        NONE => (String::new(), text.to_owned(), 0),
        id => (id.to_owned(), text.to_owned(), 0),
    };
    Some(v1::LogLine {
        time,
        request_id,
        text,
        lost_bytes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(entry: &Entry) -> String {
        let mut bytes = Vec::new();
        entry.write(&mut bytes);
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn lines_are_plain_and_come_back() {
        let time = Duration::new(1_764_184_211, 123_456_789);
        let entry = |id: &str, what| Entry {
            time,
            request_id: id.to_owned(),
            what,
        };
        for (entry, text) in [
            (
                entry("", What::Text("a  b".into())),
                "2025-11-26T19:10:11.123456Z - a  b\n",
            ),
            (
                entry("r-1", What::Text(String::new())),
                "2025-11-26T19:10:11.123456Z r-1 \n",
            ),
            (
                entry("", What::Text("! - 5".into())),
                "2025-11-26T19:10:11.123456Z - ! - 5\n",
            ),
            (
                entry("", What::Lost(1234)),
                "2025-11-26T19:10:11.123456Z ! 1234 bytes are missing here\n",
            ),
        ] {
            assert_eq!(written(&entry), text);
            let parsed = parse(text.trim_end_matches('\n').as_bytes()).unwrap();
            let (text, lost) = match entry.what {
                What::Text(text) => (text, 0),
                What::Lost(bytes) => (String::new(), bytes),
            };
            assert_eq!(
                (parsed.request_id, parsed.text, parsed.lost_bytes),
                (entry.request_id, text, lost)
            );
            assert_eq!(parsed.time.unwrap().nanos, 123_456_000);
        }
        for torn in [
            "",
            "2025-11-26T19",
            "2025-11-26T19:10:11.123456Z r-1",
            "2025-11-26T19:10:11.123456Z ! 12",
            "x - y",
        ] {
            assert_eq!(parse(torn.as_bytes()), None, "{torn}");
        }
    }

    #[test]
    fn each_line_has_its_beginning_and_is_cut_between_characters() {
        let entry = Entry {
            time: Duration::from_secs(1),
            request_id: "r".to_owned(),
            what: What::Text(format!("1970 - a\n\n{}", "\u{20ac}".repeat(LOG_LINE_BYTES))),
        };
        let text = written(&entry);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "1970-01-01T00:00:01.000000Z r 1970 - a");
        assert_eq!(lines[1], "1970-01-01T00:00:01.000000Z r ");
        assert_eq!(lines[2].len(), lines[1].len() + LOG_LINE_BYTES - LOG_LINE_BYTES % 3);
        assert_eq!(lines.len(), 3);
    }

    #[test]
    fn the_longest_line_is_known() {
        let longest = Entry {
            time: now(),
            request_id: "r".repeat(MAX_REQUEST_ID),
            what: What::Text("x".repeat(LOG_LINE_BYTES)),
        };
        assert_eq!(written(&longest).len(), MAX_LINE);
    }
}
