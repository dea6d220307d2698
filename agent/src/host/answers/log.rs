//! What became of an account's named requests, in files of the run folder: appended, never changed, and removed as a whole
//! once all in them is old. Not synced: a host that crashes has no machines left in which a request could have run.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use bytes::{Buf as _, Bytes};
use prost::Message as _;
use stoker_proto::limits::KEPT_ANSWER;

use crate::failpoints::{self, Failpoint};
use crate::uptime::uptime;

/// How large a file gets before the next is begun, in bytes.
const SEGMENT_BYTES: u64 = 1 << 20;

/// Before each record: its length and its CRC-32, each in four bytes, little-endian.
const HEADER_BYTES: usize = 8;

/// Something that became of a request.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Record {
    /// The request's name in its guest.
    #[prost(string, tag = "1")]
    pub(super) name: String,
    /// What was asked.
    #[prost(fixed64, tag = "2")]
    pub(super) asked: u64,
    /// When: ms since the host was booted, so that no change of the clock makes it old.
    #[prost(uint64, tag = "3")]
    pub(super) at_ms: u64,
    #[prost(oneof = "Event", tags = "4, 5, 6, 7, 8")]
    pub(super) event: Option<Event>,
}

/// What became of it.
#[derive(Clone, PartialEq, prost::Oneof)]
pub(super) enum Event {
    /// It is to run in this machine: its ULID.
    #[prost(string, tag = "4")]
    Placed(String),
    /// It has not begun there, and may be asked for anew.
    #[prost(bool, tag = "5")]
    NotBegun(bool),
    /// It has its answer: a `stoker.v1.InvokeResponse`, which is not looked at when its file is opened.
    #[prost(bytes = "bytes", tag = "6")]
    Answered(Bytes),
    /// It may have run and has no answer: why.
    #[prost(string, tag = "7")]
    Lost(String),
    /// It ran, and its answer went out as a stream.
    #[prost(bool, tag = "8")]
    Streamed(bool),
}

/// Where a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    segment: u64,
    offset: u32,
    /// Without its header.
    bytes: u32,
}

/// The files of one account.
#[derive(Debug)]
pub(super) struct Log {
    folder: PathBuf,
    /// The oldest first.
    segments: VecDeque<Segment>,
    /// The last of them; none where the next record begins one.
    writing: Option<File>,
    /// The number of the next.
    next: u64,
    bytes: u64,
}

#[derive(Debug)]
struct Segment {
    number: u64,
    bytes: u64,
    /// Of its last record.
    at_ms: u64,
}

/// The time since the host was booted, in ms.
pub(super) fn now_ms() -> u64 {
    u64::try_from(uptime().as_millis()).unwrap_or(u64::MAX)
}

// === impl Log ===

impl Log {
    /// Opens the files in a folder and hands over what is in them, the oldest first. What is behind a record that is not
    /// whole can't be read; where the agent died as it wrote that one, nothing is. What is not named as a file of the log is
    /// left alone. Blocks.
    pub(super) fn open(folder: &Path, mut visit: impl FnMut(Place, Record)) -> io::Result<Self> {
        let entries = match fs::read_dir(folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            entries => Some(entries?),
        };
        let mut numbers = Vec::new();
        for entry in entries.into_iter().flatten() {
            let entry = entry?;
            if entry.file_type()?.is_file()
                && let Some(number) = entry.file_name().to_str().and_then(number)
            {
                numbers.push(number);
            }
        }
        numbers.sort_unstable();
        let mut log = Self {
            folder: folder.to_owned(),
            segments: VecDeque::new(),
            writing: None,
            next: numbers.last().map_or(1, |last| last + 1),
            bytes: 0,
        };
        for number in numbers {
            let path = log.path(number);
            let text = fs::read(&path)?;
            let (bytes, mut at_ms) = (text.len() as u64, 0);
            let mut records = Records::of(number, text);
            for (place, record) in records.by_ref() {
                at_ms = record.at_ms;
                visit(place, record);
            }
            let unread = bytes - records.offset;
            if unread > 0 {
                let problem = "a record of kept answers is not whole; it and what is behind it are left out";
                tracing::warn!(file = %path.display(), unread, problem);
            }
            log.bytes += bytes;
            log.segments.push_back(Segment { number, bytes, at_ms });
        }
        Ok(log)
    }

    /// Appends a record; where that fails, nothing of it is read later. Blocks.
    pub(super) fn append(&mut self, record: &Record) -> io::Result<Place> {
        let (Some(file), Some(last)) = (&self.writing, self.segments.back_mut()) else {
            self.begin_segment()?;
            return self.append(record);
        };
        let mut framed = vec![0; HEADER_BYTES];
        record.encode(&mut framed).map_err(io::Error::other)?;
        let (header, body) = framed.split_at_mut(HEADER_BYTES);
        let place = Place {
            segment: last.number,
            offset: last.bytes.try_into().map_err(io::Error::other)?,
            bytes: body.len().try_into().map_err(io::Error::other)?,
        };
        header.copy_from_slice(&[place.bytes.to_le_bytes(), crc32fast::hash(body).to_le_bytes()].concat());
        let written = file.write_all_at(&framed, last.bytes);
        failpoints::reach(Failpoint::AnswerWritten);
        if let Err(error) = written {
            // Where its beginning can't be removed, it ends its file.
            if file.set_len(last.bytes).is_err() {
                self.writing = None;
            }
            return Err(error);
        }
        last.bytes += framed.len() as u64;
        last.at_ms = record.at_ms;
        self.bytes += framed.len() as u64;
        if last.bytes >= SEGMENT_BYTES {
            self.writing = None;
        }
        Ok(place)
    }

    /// Reads a record. Blocks.
    pub(super) fn read(&self, place: Place) -> io::Result<Record> {
        let mut framed = vec![0; HEADER_BYTES + place.bytes as usize];
        File::open(self.path(place.segment))?.read_exact_at(&mut framed, place.offset.into())?;
        let record = Records::of(place.segment, framed).next();
        Ok(record.ok_or(io::ErrorKind::InvalidData)?.1)
    }

    /// Removes the oldest files: those in which all is too old, and more while there are more than so many bytes. Says
    /// whether there were any. Blocks.
    pub(super) fn forget(&mut self, now_ms: u64, most_bytes: u64) -> io::Result<bool> {
        let before = self.segments.len();
        while let Some(oldest) = self.segments.front()
            && (self.bytes > most_bytes || is_old(oldest.at_ms, now_ms))
        {
            // One that somebody else removed is as good.
            crate::files::remove(&self.path(oldest.number))?;
            failpoints::reach(Failpoint::AnswersRemoved);
            self.bytes -= oldest.bytes;
            self.segments.pop_front();
        }
        if self.segments.is_empty() {
            self.writing = None;
        }
        Ok(self.segments.len() < before)
    }

    /// Whether a record is still there.
    pub(super) fn has(&self, place: Place) -> bool {
        self.segments
            .front()
            .is_some_and(|oldest| oldest.number <= place.segment)
    }

    /// How large the files are together.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    fn begin_segment(&mut self) -> io::Result<()> {
        crate::files::make_private_dir(&self.folder)?;
        let number = self.next;
        let mut options = File::options();
        options.create_new(true).write(true).mode(0o600);
        self.writing = Some(options.open(self.path(number))?);
        failpoints::reach(Failpoint::AnswersBegun);
        self.next = number + 1;
        self.segments.push_back(Segment {
            number,
            bytes: 0,
            at_ms: now_ms(),
        });
        Ok(())
    }

    fn path(&self, number: u64) -> PathBuf {
        self.folder.join(number.to_string())
    }
}

/// The number of the file of that name. Those of [`Log::begin_segment`] never come near the bound.
fn number(name: &str) -> Option<u64> {
    let number = name.parse::<u64>().ok().filter(|number| *number < u64::MAX / 2)?;
    (name == number.to_string()).then_some(number)
}

/// Whether what was written then need not be kept; what is yet to come was written before the host was booted again.
fn is_old(at_ms: u64, now_ms: u64) -> bool {
    let kept_ms = u64::try_from(KEPT_ANSWER.as_millis()).unwrap_or(u64::MAX);
    at_ms > now_ms || at_ms.saturating_add(kept_ms) <= now_ms
}

/// The records of a file, up to the first that is not whole.
struct Records {
    segment: u64,
    /// Where the next begins.
    offset: u64,
    text: Bytes,
}

impl Records {
    fn of(segment: u64, text: Vec<u8>) -> Self {
        Self {
            segment,
            offset: 0,
            text: text.into(),
        }
    }
}

impl Iterator for Records {
    type Item = (Place, Record);

    fn next(&mut self) -> Option<Self::Item> {
        let [l0, l1, l2, l3, c0, c1, c2, c3] = *self.text.first_chunk::<HEADER_BYTES>()?;
        let bytes = u32::from_le_bytes([l0, l1, l2, l3]);
        let end = HEADER_BYTES.checked_add(bytes as usize)?;
        if end > self.text.len() {
            return None;
        }
        let body = self.text.slice(HEADER_BYTES..end);
        if crc32fast::hash(&body) != u32::from_le_bytes([c0, c1, c2, c3]) {
            return None;
        }
        // An answer in it is not copied.
        let record = Record::decode(body).ok()?;
        let place = Place {
            segment: self.segment,
            offset: self.offset.try_into().ok()?,
            bytes,
        };
        self.offset += end as u64;
        self.text.advance(end);
        Some((place, record))
    }
}
