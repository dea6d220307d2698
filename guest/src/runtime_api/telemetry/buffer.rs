//! What waits to be sent to one subscriber: bounded in events and bytes. A plain state machine, without a clock of its own.

use std::time::Instant;

use bytes::Bytes;

use super::subscription::Buffering;

/// What an event takes besides its text, in bytes.
const EVENT_BYTES: usize = 64;
/// What every event is as JSON, beside its text, in bytes.
pub(super) const FORM_BYTES: usize = 66;
/// How often as much may wait as makes a batch: what comes while a batch is on its way.
const BATCHES: usize = 2;

/// The events that wait.
#[derive(Debug)]
pub(super) struct Buffer {
    limits: Buffering,
    events: Vec<Bytes>,
    bytes: usize,
    /// When the first of them came.
    since: Option<Instant>,
    /// They are to be sent now.
    flush: bool,
    dropped: Dropped,
}

/// What was lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Dropped {
    pub(super) records: u64,
    pub(super) bytes: u64,
}

/// When there is something to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    Now,
    At(Instant),
    Never,
}

/// What is sent at a time.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) events: Vec<Bytes>,
    /// As it counts.
    pub(super) bytes: usize,
    /// What was lost before.
    pub(super) dropped: Dropped,
}

// === impl Dropped ===

impl Dropped {
    pub(super) fn add(&mut self, records: usize, bytes: usize) {
        self.records = self.records.saturating_add(records as u64);
        self.bytes = self.bytes.saturating_add(bytes as u64);
    }
}

// === impl Batch ===

impl Batch {
    /// The text of its events, in bytes.
    pub(super) fn text_bytes(&self) -> usize {
        self.events.iter().map(Bytes::len).sum()
    }
}

// === impl Buffer ===

impl Buffer {
    pub(super) fn new(limits: Buffering) -> Self {
        Self {
            limits,
            events: Vec::new(),
            bytes: 0,
            since: None,
            flush: false,
            dropped: Dropped::default(),
        }
    }

    /// Takes an event in, where there is room for it; `room` is what is left for all subscribers of the container, in
    /// bytes. What it takes of that.
    pub(super) fn push(&mut self, now: Instant, event: Bytes, room: usize) -> usize {
        let bytes = EVENT_BYTES + event.len();
        if !self.holds(bytes, room) {
            self.lose(1, event.len());
            return 0;
        }
        self.bytes += bytes;
        self.events.push(event);
        self.since.get_or_insert(now);
        bytes
    }

    /// Whether there may be room for one more with so much text, in bytes; `room` as in [`Self::push`].
    pub(super) fn may_hold(&self, text: usize, room: usize) -> bool {
        self.holds(EVENT_BYTES + FORM_BYTES + text, room)
    }

    fn holds(&self, bytes: usize, room: usize) -> bool {
        bytes <= room
            && self.events.len() < BATCHES * self.limits.items
            && self.bytes + bytes <= BATCHES * self.limits.bytes
    }

    /// Something was lost.
    pub(super) fn lose(&mut self, records: usize, bytes: usize) {
        self.dropped.add(records, bytes);
    }

    /// What waits is to be sent now.
    pub(super) fn flush(&mut self) {
        self.flush = !self.events.is_empty();
    }

    /// Whether what waits is to be sent now, and has not been taken yet.
    pub(super) fn is_flushed(&self) -> bool {
        self.flush
    }

    /// When the next batch is to be taken.
    pub(super) fn due(&self, now: Instant) -> Due {
        let Some(since) = self.since else {
            return Due::Never;
        };
        let at = since + self.limits.timeout;
        let enough = self.events.len() >= self.limits.items || self.bytes >= self.limits.bytes;
        if self.flush || enough || at <= now {
            Due::Now
        } else {
            Due::At(at)
        }
    }

    /// All that waits.
    pub(super) fn take(&mut self) -> Batch {
        self.since = None;
        self.flush = false;
        Batch {
            events: std::mem::take(&mut self.events),
            bytes: std::mem::take(&mut self.bytes),
            dropped: std::mem::take(&mut self.dropped),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const ROOM: usize = usize::MAX;

    fn buffer() -> Buffer {
        Buffer::new(Buffering {
            items: 3,
            bytes: 1000,
            timeout: Duration::from_millis(100),
        })
    }

    #[test]
    fn sends_after_a_time_or_when_there_is_enough_or_when_told() {
        let start = Instant::now();
        let mut buffer = buffer();
        assert_eq!(buffer.due(start), Due::Never);
        buffer.flush();
        assert!(!buffer.is_flushed(), "there is nothing to be sent");
        buffer.push(start, Bytes::from_static(b"a"), ROOM);
        let at = start + Duration::from_millis(100);
        assert_eq!((buffer.due(start), buffer.due(at)), (Due::At(at), Due::Now));
        buffer.flush();
        assert_eq!((buffer.is_flushed(), buffer.due(start)), (true, Due::Now));
        assert_eq!(buffer.take().events, ["a"]);
        assert_eq!((buffer.is_flushed(), buffer.due(at)), (false, Due::Never));
        for _ in 0..3 {
            buffer.push(start, Bytes::from_static(b"b"), ROOM);
        }
        assert_eq!(buffer.due(start), Due::Now);
        buffer.take();
        buffer.push(start, vec![0; 1000].into(), ROOM);
        assert_eq!(buffer.due(start), Due::Now);
    }

    #[test]
    fn loses_what_there_is_no_room_for_and_counts_it() {
        let now = Instant::now();
        let mut buffer = buffer();
        for _ in 0..7 {
            buffer.push(now, Bytes::from_static(b"ab"), ROOM);
        }
        assert!(!buffer.may_hold(0, ROOM));
        let batch = buffer.take();
        assert_eq!((batch.events.len(), batch.text_bytes()), (6, 12));
        assert_eq!(batch.dropped, Dropped { records: 1, bytes: 2 });
        // By bytes, its own and those of all.
        assert_eq!(buffer.push(now, vec![0; 2000].into(), ROOM), 0);
        assert_eq!(buffer.push(now, Bytes::from_static(b"a"), EVENT_BYTES), 0);
        assert_eq!(
            buffer.push(now, Bytes::from_static(b"a"), EVENT_BYTES + 1),
            EVENT_BYTES + 1
        );
        let batch = buffer.take();
        assert_eq!((batch.events.len(), batch.bytes), (1, EVENT_BYTES + 1));
        assert_eq!(
            batch.dropped,
            Dropped {
                records: 2,
                bytes: 2001
            }
        );
        assert_eq!(buffer.take().dropped, Dropped::default(), "told once");
    }
}
