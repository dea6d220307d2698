//! Reads what is kept of a function: straight from its files, a block at a time, so that who reads slowly costs nobody else
//! anything. What goes before it is read is told as missing.

use std::collections::VecDeque;
use std::io;
use std::time::{Duration, SystemTime};

use stoker_proto::v1;
use tokio::sync::watch;

use super::line::{self, Entry, MAX_LINE};
use super::segment::Segment;
use super::views::View;

/// How much of a file is read at a time, in bytes; a longer line is read whole.
const BLOCK: usize = 64 << 10;

/// Which lines.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Those of this time or later.
    pub since: Option<SystemTime>,
    /// Those of this request.
    pub request_id: Option<String>,
    /// Of those that are there the last so many.
    pub last: Option<usize>,
}

/// Reads the lines of a function.
#[derive(Debug)]
pub struct Reader {
    view: watch::Receiver<View>,
    filter: Filter,
    /// Up to where it has read, as [`Segment::start`] counts. Nothing before it has begun.
    at: Option<u64>,
}

/// A file can't be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The disk fails.
    #[error("can't read what a function has written: {0}")]
    Io(#[from] io::Error),
    /// A part of the agent panicked; the log says where.
    #[error("a part of the agent panicked: {0}")]
    Panicked(#[from] tokio::task::JoinError),
}

/// What was read.
struct Block {
    lines: Vec<v1::LogLine>,
    /// Up to where.
    at: u64,
}

// === impl Reader ===

impl Reader {
    pub(super) fn new(view: watch::Receiver<View>, filter: Filter) -> Self {
        Self { view, filter, at: None }
    }

    /// The next lines, at most about 64 KiB of them or one; none where there are no more at the moment.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn next(&mut self) -> Result<Vec<v1::LogLine>, ReadError> {
        loop {
            let view = self.view.borrow_and_update().clone();
            let end = view.last().map_or(0, Segment::end);
            if view.is_empty() || self.at.is_some_and(|at| at >= end) {
                // All that comes is newer than what was to be the last.
                self.filter.last = None;
                return Ok(Vec::new());
            }
            let (at, filter) = (self.at, self.filter.clone());
            let reading = tokio::task::spawn_blocking(move || {
                let at = match (at, filter.last) {
                    (Some(at), _) => at,
                    (None, Some(count)) => last(&view, &filter, count)?,
                    (None, None) => view.first().map_or(0, |first| first.start),
                };
                block(&view, at, &filter)
            });
            let block = reading.await??;
            self.at = Some(block.at);
            if !block.lines.is_empty() {
                return Ok(block.lines);
            }
        }
    }

    /// Resolves when there may be more; with `false` where there never will be.
    pub async fn more(&mut self) -> bool {
        self.view.changed().await.is_ok()
    }
}

/// Reads lines from a place on.
fn block(view: &View, at: u64, filter: &Filter) -> io::Result<Block> {
    let mut lines = Vec::new();
    let Some(segment) = view.iter().find(|segment| segment.end() > at) else {
        return Ok(Block { lines, at });
    };
    // What was before it has gone.
    let missed = segment.start.saturating_sub(at);
    let from = at.max(segment.start);
    let data = match whole(segment, from) {
        Ok(data) => data,
        // It went since that was looked up, or somebody removed it.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof) => {
            return Ok(Block {
                lines: vec![lost(segment.end().saturating_sub(at))],
                at: segment.end(),
            });
        }
        Err(error) => return Err(error),
    };
    if missed > 0 {
        lines.push(lost(missed));
    }
    lines.extend(
        parsed(&data)
            .filter_map(|(_, line)| line)
            .filter(|line| filter.takes(line)),
    );
    Ok(Block {
        lines,
        at: from + data.len() as u64,
    })
}

/// Where the last so many lines begin that are looked for.
fn last(view: &View, filter: &Filter, count: usize) -> io::Result<u64> {
    let end = view.last().map_or(0, Segment::end);
    let mut places = VecDeque::new();
    for segment in view.iter().rev() {
        let wanted = count.saturating_sub(places.len());
        let mut of_segment = VecDeque::new();
        let mut at = segment.start;
        while at < segment.end() {
            let data = match whole(segment, at) {
                Ok(data) => data,
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                Err(error) => return Err(error),
            };
            for (offset, line) in parsed(&data) {
                if line.is_some_and(|line| filter.takes(&line)) {
                    of_segment.push_back(at + offset as u64);
                    if of_segment.len() > wanted {
                        of_segment.pop_front();
                    }
                }
            }
            at += data.len() as u64;
        }
        of_segment.append(&mut places);
        places = of_segment;
        if places.len() >= count {
            break;
        }
    }
    Ok(places.front().copied().filter(|_| count > 0).unwrap_or(end))
}

/// Whole lines of a file from a place on, at least one.
fn whole(segment: &Segment, from: u64) -> io::Result<Vec<u8>> {
    let offset = from.saturating_sub(segment.start);
    let mut data = segment.read(offset, BLOCK)?;
    if !data.contains(&b'\n') {
        data = segment.read(offset, MAX_LINE.max(BLOCK))?;
    }
    match data.iter().rposition(|byte| *byte == b'\n') {
        Some(end) => data.truncate(end + 1),
        // No agent wrote it: it is passed over.
        None if data.is_empty() => return Err(io::ErrorKind::UnexpectedEof.into()),
        None => {}
    }
    Ok(data)
}

/// Each line and where it begins; nothing in place of one that no agent wrote.
fn parsed(data: &[u8]) -> impl Iterator<Item = (usize, Option<v1::LogLine>)> {
    let mut offset = 0;
    data.split_inclusive(|byte| *byte == b'\n').map(move |line| {
        let begin = offset;
        offset += line.len();
        (begin, line::parse(line.strip_suffix(b"\n").unwrap_or(line)))
    })
}

fn lost(bytes: u64) -> v1::LogLine {
    let Entry { time, .. } = Entry::lost(bytes);
    v1::LogLine {
        time: Some(prost_types::Timestamp {
            seconds: i64::try_from(time.as_secs()).unwrap_or_default(),
            nanos: i32::try_from(Duration::subsec_nanos(&time)).unwrap_or_default(),
        }),
        lost_bytes: bytes,
        ..Default::default()
    }
}

// === impl Filter ===

impl Filter {
    fn takes(&self, line: &v1::LogLine) -> bool {
        // What is missing may have been looked for.
        let is_lost = line.lost_bytes > 0;
        let of_request = self
            .request_id
            .as_ref()
            .is_none_or(|id| is_lost || line.request_id == *id);
        let time = line.time.and_then(|time| SystemTime::try_from(time).ok());
        of_request && self.since.is_none_or(|since| time.is_some_and(|time| time >= since))
    }
}
