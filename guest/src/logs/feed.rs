//! The lines of one container that the agent has not taken yet.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use stoker_proto::guest::LogLines;
use stoker_proto::limits::LOG_LINE_BYTES;

use super::feeds::Feeds;

/// What may wait of the lines of one container, in bytes; a line that is larger may alone.
const FEED_BYTES: usize = 64 << 10;
/// What more may wait of Lambda's own lines, so that one who writes without end does not push out what became of his calls.
const PLATFORM_BYTES: usize = 8 << 10;
/// What a line takes beside its text, in bytes.
const LINE_COST: usize = 64;
/// Lines that are written at one time are sent as one text, until it is so long, in bytes.
const MOST: usize = 4 << 10;

/// Who writes lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Writer {
    /// The runtime, and what it starts.
    Function,
    /// External extensions.
    Extension,
}

/// The lines of a container. What waits when it is dropped can still be taken.
pub(crate) struct Feed(Arc<Shared>);

pub(super) struct Shared {
    container: String,
    feeds: Feeds,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The invocation that runs.
    request: Option<Arc<str>>,
    /// The beginning of a line of each writer.
    partial: [Vec<u8>; 2],
    waiting: VecDeque<Lines>,
    /// What those take.
    bytes: usize,
    /// What was lost after them.
    lost: u64,
    /// Among those that the agent is to take lines of.
    queued: bool,
}

/// What was written at one time, for one invocation.
struct Lines {
    request: Option<Arc<str>>,
    time_ns: u64,
    what: What,
}

enum What {
    /// So many lines, with a newline between them.
    Text { text: String, count: usize },
    /// So many bytes are lost.
    Lost(u64),
}

// === impl Feed ===

impl Feed {
    pub(super) fn new(container: String, feeds: Feeds) -> Self {
        Self(Arc::new(Shared {
            container,
            feeds,
            state: Mutex::default(),
        }))
    }

    /// Adds what a writer has written.
    pub(crate) fn write(&self, writer: Writer, data: &[u8]) {
        let time_ns = now_ns();
        {
            let mut state = self.0.state();
            let mut partial = std::mem::take(state.partial(writer));
            let mut begin = 0;
            for end in memchr::memchr_iter(b'\n', data) {
                state.extend(&mut partial, data.get(begin..end).unwrap_or_default(), time_ns);
                state.end_line(&mut partial, time_ns);
                begin = end + 1;
            }
            state.extend(&mut partial, data.get(begin..).unwrap_or_default(), time_ns);
            *state.partial(writer) = partial;
        }
        self.queue_up();
    }

    /// Adds a line of Lambda's own.
    pub(crate) fn platform(&self, text: &str) {
        let time_ns = now_ns();
        {
            let mut state = self.0.state();
            state.flush(time_ns);
            for line in text.lines() {
                state.push(line.len(), FEED_BYTES + PLATFORM_BYTES, time_ns, || line.to_owned());
            }
        }
        self.queue_up();
    }

    /// From now on lines are of this invocation; of none where absent.
    pub(crate) fn of_request(&self, request: Option<Arc<str>>) {
        {
            let mut state = self.0.state();
            // A line without an end was the invocation's before.
            state.flush(now_ns());
            state.request = request;
        }
        self.queue_up();
    }

    /// Lets the agent take lines, where there are any.
    fn queue_up(&self) {
        {
            let mut state = self.0.state();
            if state.queued || (state.waiting.is_empty() && state.lost == 0) {
                return;
            }
            state.queued = true;
        }
        self.0.feeds.queue(Arc::clone(&self.0));
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.0.state().flush(now_ns());
        self.queue_up();
        self.0.feeds.one_ended();
    }
}

// === impl Shared ===

impl Shared {
    /// Hands out lines in their order, until they take `limit` bytes or there are no more; the last may be larger. Whether
    /// there are more.
    pub(super) fn take(&self, to: &mut Vec<LogLines>, limit: &mut usize) -> bool {
        let mut state = self.state();
        while *limit > 0
            && let Some(line) = state.waiting.pop_front()
        {
            let cost = line.cost();
            state.bytes = state.bytes.saturating_sub(cost);
            *limit = limit.saturating_sub(cost + self.container.len());
            to.push(line.into_proto(&self.container));
        }
        let more = !state.waiting.is_empty();
        if !more && state.lost > 0 {
            to.push(state.tell_loss(now_ns()).into_proto(&self.container));
        }
        state.queued = more;
        more
    }

    /// It is not among those any more that lines are taken of.
    pub(super) fn forgotten(&self) {
        self.state().queued = false;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl State ===

impl State {
    fn partial(&mut self, writer: Writer) -> &mut Vec<u8> {
        let [function, extension] = &mut self.partial;
        match writer {
            Writer::Function => function,
            Writer::Extension => extension,
        }
    }

    /// Adds to the line that has begun, which is split where it is too long.
    fn extend(&mut self, partial: &mut Vec<u8>, mut data: &[u8], time_ns: u64) {
        while partial.len() + data.len() > LOG_LINE_BYTES {
            let (fits, rest) = data.split_at(LOG_LINE_BYTES.saturating_sub(partial.len()));
            partial.extend_from_slice(fits);
            data = rest;
            // What is the beginning of a character goes with its end.
            let whole = whole_characters(partial);
            let begun = partial.split_off(whole);
            self.end_line(partial, time_ns);
            *partial = begun;
        }
        partial.extend_from_slice(data);
    }

    /// The line that has begun is whole.
    fn end_line(&mut self, partial: &mut Vec<u8>, time_ns: u64) {
        let raw = partial.strip_suffix(b"\r").unwrap_or(partial);
        self.push(raw.len(), FEED_BYTES, time_ns, || {
            let mut text = String::from_utf8_lossy(raw).into_owned();
            // What takes the place of what is not UTF-8 is larger.
            text.truncate(text.floor_char_boundary(LOG_LINE_BYTES));
            text
        });
        // Its memory is of use for the next one, unless it is much.
        if partial.capacity() <= 4096 {
            partial.clear();
        } else {
            *partial = Vec::new();
        }
    }

    /// A line without an end is one where something else follows it.
    fn flush(&mut self, time_ns: u64) {
        for writer in [Writer::Function, Writer::Extension] {
            let mut partial = std::mem::take(self.partial(writer));
            if !partial.is_empty() {
                self.end_line(&mut partial, time_ns);
            }
            *self.partial(writer) = partial;
        }
    }

    fn push(&mut self, bytes: usize, limit: usize, time_ns: u64, text: impl FnOnce() -> String) {
        if !self.waiting.is_empty() && self.bytes + bytes + LINE_COST > limit {
            self.lost += bytes as u64 + 1;
            return;
        }
        if self.lost > 0 {
            let loss = self.tell_loss(time_ns);
            self.add(loss);
        }
        let line = text();
        if let Some(last) = self
            .waiting
            .back_mut()
            .filter(|last| last.goes_on(&self.request, time_ns))
        {
            self.bytes += last.append(&line);
            return;
        }
        self.add(Lines {
            request: self.request.clone(),
            time_ns,
            what: What::Text { text: line, count: 1 },
        });
    }

    fn add(&mut self, lines: Lines) {
        self.bytes += lines.cost();
        self.waiting.push_back(lines);
    }

    fn tell_loss(&mut self, time_ns: u64) -> Lines {
        Lines {
            request: None,
            time_ns,
            what: What::Lost(std::mem::take(&mut self.lost)),
        }
    }
}

// === impl Lines ===

impl Lines {
    fn cost(&self) -> usize {
        match &self.what {
            What::Text { text, count } => text.len() + count * LINE_COST,
            What::Lost(_) => LINE_COST,
        }
    }

    /// Whether a line of this invocation and time can be one more of these.
    fn goes_on(&self, request: &Option<Arc<str>>, time_ns: u64) -> bool {
        let same = match (&self.request, request) {
            (Some(own), Some(other)) => Arc::ptr_eq(own, other),
            (None, None) => true,
            _ => false,
        };
        let fits = matches!(&self.what, What::Text { text, .. } if text.len() < MOST);
        same && fits && self.time_ns == time_ns
    }

    /// Adds a line; returns what it costs.
    fn append(&mut self, line: &str) -> usize {
        let before = self.cost();
        if let What::Text { text, count } = &mut self.what {
            text.push('\n');
            text.push_str(line);
            *count += 1;
        }
        self.cost() - before
    }

    fn into_proto(self, container: &str) -> LogLines {
        let (text, lost_bytes) = match self.what {
            What::Text { text, .. } => (text, 0),
            What::Lost(bytes) => (String::new(), bytes),
        };
        LogLines {
            container: container.to_owned(),
            request_id: self
                .request
                .map(|request| request.as_ref().to_owned())
                .unwrap_or_default(),
            time_ns: self.time_ns,
            text,
            lost_bytes,
        }
    }
}

/// Up to where `data` is not the mere beginning of a character.
fn whole_characters(data: &[u8]) -> usize {
    let last = data.len().saturating_sub(4);
    let tail = data.get(last..).unwrap_or_default();
    let begun = tail.utf8_chunks().last().map_or(0, |chunk| {
        // One that could go on: anything else that is wrong is as wrong whole.
        let invalid = chunk.invalid();
        match invalid.first() {
            Some(0xc2..=0xdf) if invalid.len() < 2 => invalid.len(),
            Some(0xe0..=0xef) if invalid.len() < 3 => invalid.len(),
            Some(0xf0..=0xf4) if invalid.len() < 4 => invalid.len(),
            _ => 0,
        }
    });
    data.len() - begun
}

fn now_ns() -> u64 {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_1970.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed() -> (Feeds, Feed) {
        let feeds = Feeds::default();
        let feed = feeds.feed("c".to_owned());
        (feeds, feed)
    }

    /// Request and text of each line, `None` and a number for what is lost.
    fn take(feeds: &Feeds) -> Vec<(String, String, u64)> {
        let all = std::iter::from_fn(|| Some(feeds.take()).filter(|lines| !lines.is_empty()));
        all.flatten()
            .flat_map(|lines| {
                assert_eq!(lines.container, "c");
                assert!(lines.time_ns > 0);
                let of = |text: &str| (lines.request_id.clone(), text.to_owned(), lines.lost_bytes);
                lines.lines().map(of).collect::<Vec<_>>()
            })
            .collect()
    }

    fn texts(feeds: &Feeds) -> Vec<String> {
        take(feeds).into_iter().map(|(_, text, _)| text).collect()
    }

    #[test]
    fn lines_are_of_the_invocation_that_ran() {
        let (feeds, feed) = feed();
        feed.platform("INIT_START");
        feed.write(Writer::Function, b"impor");
        feed.write(Writer::Function, b"ting\nat once");
        feed.of_request(Some("r1".into()));
        feed.write(Writer::Function, b"one\r\n\ntwo");
        feed.platform("END");
        feed.of_request(None);
        feed.write(Writer::Function, b"between\nlast");
        drop(feed);
        let of = |request: &str, text: &str| (request.to_owned(), text.to_owned(), 0);
        assert_eq!(
            take(&feeds),
            [
                of("", "INIT_START"),
                of("", "importing"),
                of("", "at once"),
                of("r1", "one"),
                of("r1", ""),
                of("r1", "two"),
                of("r1", "END"),
                of("", "between"),
                of("", "last"),
            ]
        );
        assert!(take(&feeds).is_empty());
    }

    #[test]
    fn what_is_written_at_once_is_one_text_and_long_ones_are_several() {
        let (feeds, feed) = feed();
        let long = [[b'y'; MOST].as_slice(), b"\n"].concat();
        for (n, data) in [&b"one\ntwo\n"[..], b"three\n", &b"x\n".repeat(512), &long.repeat(3)]
            .iter()
            .enumerate()
        {
            feed.of_request(Some(n.to_string().into()));
            feed.write(Writer::Function, data);
        }
        let all = feeds.take();
        let counts: Vec<_> = all.iter().map(|lines| lines.lines().count()).collect();
        assert_eq!(counts, [2, 1, 512, 1, 1, 1]);
    }

    #[test]
    fn lines_of_function_and_extensions_stay_whole() {
        let (feeds, feed) = feed();
        feed.write(Writer::Function, b"abc");
        feed.write(Writer::Extension, b"of an extension\nand");
        feed.write(Writer::Function, b"def\n");
        feed.of_request(None);
        assert_eq!(texts(&feeds), ["of an extension", "abcdef", "and"]);
    }

    #[test]
    fn what_is_not_utf_8_is_replaced() {
        let (feeds, feed) = feed();
        feed.write(Writer::Function, b"a\xffb\xc3\n");
        feed.write(Writer::Function, "\u{20ac}\n".as_bytes());
        assert_eq!(texts(&feeds), ["a\u{fffd}b\u{fffd}", "\u{20ac}"]);
    }

    #[test]
    fn a_long_line_is_split_between_characters() {
        let (feeds, feed) = feed();
        let long = "\u{20ac}".repeat(LOG_LINE_BYTES / 3 + 1000);
        for part in long.as_bytes().chunks(1001) {
            feed.write(Writer::Function, part);
        }
        let first = texts(&feeds);
        feed.write(Writer::Function, b"\n");
        let all = [first, texts(&feeds)].concat();
        assert_eq!(all.len(), 2);
        assert!(all.iter().all(|text| text.len() <= LOG_LINE_BYTES));
        assert_eq!(all.concat(), long);
    }

    #[test]
    fn a_writer_without_end_loses_lines_and_is_told_how_much() {
        let (feeds, feed) = feed();
        let line = [&[b'x'; 99][..], b"\n"].concat();
        let count = 10_000;
        for _ in 0..count {
            feed.write(Writer::Function, &line);
        }
        feed.platform("END");
        let taken = take(&feeds);
        let lost: u64 = taken.iter().map(|(_, _, lost)| lost).sum();
        let kept = taken.iter().filter(|(_, text, _)| text.len() == 99).count();
        assert!(kept * 99 <= FEED_BYTES && kept > 300, "{kept}");
        assert_eq!(lost, 100 * (count - kept) as u64);
        // In its place: before what came after it.
        let place = taken.iter().position(|(_, _, lost)| *lost > 0).unwrap();
        assert_eq!((place, taken[place + 1].1.as_str()), (kept, "END"));
        // Where nothing follows it is told all the same.
        for _ in 0..count {
            feed.write(Writer::Function, &line);
        }
        assert!(take(&feeds).last().unwrap().2 > 0);
        feed.write(Writer::Function, b"again\n");
        assert_eq!(texts(&feeds), ["again"]);
    }

    #[test]
    fn empty_lines_take_room_too() {
        let (feeds, feed) = feed();
        feed.write(Writer::Function, &[b'\n'; 100_000]);
        assert!(texts(&feeds).len() <= FEED_BYTES / LINE_COST + 1);
        let (feeds, feed) = self::feed();
        for _ in 0..1000 {
            feed.platform(&"p".repeat(100));
        }
        let bytes: usize = texts(&feeds).iter().map(String::len).sum();
        assert!(bytes <= FEED_BYTES + PLATFORM_BYTES);
    }

    #[test]
    fn characters_that_have_begun_are_known() {
        for (data, whole) in [
            (&b""[..], 0),
            (b"abc", 3),
            ("a\u{20ac}".as_bytes(), 4),
            (b"ab\xe2\x82", 2),
            (b"ab\xe2", 2),
            (b"ab\xf0\x9f\x98", 2),
            (b"ab\xc3", 2),
            // No character begins so.
            (b"ab\xff", 3),
            (b"ab\x82", 3),
        ] {
            assert_eq!(whole_characters(data), whole, "{data:?}");
        }
    }
}
