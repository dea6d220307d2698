//! What became of an account's named requests, in files of the run folder: appended, never changed, and removed as a whole
//! once all in them is old. Not synced: a host that crashes has no machines left in which a request could have run.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use prost::Message as _;
use stoker_proto::limits::KEPT_ANSWER;
use stoker_proto::v1;

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
    /// When: ms since 1970.
    #[prost(uint64, tag = "3")]
    pub(super) at_ms: u64,
    #[prost(oneof = "Event", tags = "4, 5, 6, 7")]
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
    /// It has its answer.
    #[prost(message, boxed, tag = "6")]
    Answered(Box<v1::InvokeResponse>),
    /// It may have run and has no answer: why.
    #[prost(string, tag = "7")]
    Lost(String),
}

/// Where a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    segment: u64,
    offset: u64,
    /// Without its header.
    bytes: usize,
}

/// The files of one account.
#[derive(Debug)]
pub(super) struct Log {
    folder: PathBuf,
    /// The oldest first; the last is written to.
    segments: VecDeque<Segment>,
    /// The number of the next.
    next: u64,
    bytes: u64,
}

#[derive(Debug)]
struct Segment {
    number: u64,
    file: File,
    bytes: u64,
    /// Of its last record.
    at_ms: u64,
}

// === impl Log ===

impl Log {
    /// Opens the files in a folder, which is made where it is missing, and tells what is in them, the oldest first. What is
    /// behind a record that is not whole was never acknowledged. Blocks.
    pub(super) fn open(folder: &Path) -> io::Result<(Self, Vec<(Place, Record)>)> {
        crate::files::make_private_dir(folder)?;
        let mut numbers = Vec::new();
        for entry in fs::read_dir(folder)? {
            let name = entry?.file_name();
            numbers.extend(name.to_str().and_then(|name| name.parse::<u64>().ok()));
        }
        numbers.sort_unstable();
        let mut log = Self {
            folder: folder.to_owned(),
            segments: VecDeque::new(),
            next: 1,
            bytes: 0,
        };
        let mut all = Vec::new();
        for number in numbers {
            let file = File::options().read(true).append(true).open(log.path(number))?;
            let records = records(number, &fs::read(log.path(number))?);
            let at_ms = records.last().map_or(0, |(_, record)| record.at_ms);
            let bytes = file.metadata()?.len();
            log.bytes += bytes;
            log.next = number.saturating_add(1);
            log.segments.push_back(Segment {
                number,
                file,
                bytes,
                at_ms,
            });
            all.extend(records);
        }
        // What is not whole is never appended to.
        log.begin_segment()?;
        Ok((log, all))
    }

    /// Appends a record; nothing is left of one that can't be written. Blocks.
    pub(super) fn append(&mut self, record: &Record) -> io::Result<Place> {
        if self.segments.back().is_none_or(|last| last.bytes >= SEGMENT_BYTES) {
            self.begin_segment()?;
        }
        let Some(last) = self.segments.back_mut() else {
            return Err(io::ErrorKind::NotFound.into());
        };
        let body = record.encode_to_vec();
        let length = u32::try_from(body.len()).map_err(io::Error::other)?;
        let crc = crc32fast::hash(&body);
        let framed = [&length.to_le_bytes()[..], &crc.to_le_bytes(), &body].concat();
        if let Err(error) = last.file.write_all(&framed) {
            last.file.set_len(last.bytes)?;
            return Err(error);
        }
        let place = Place {
            segment: last.number,
            offset: last.bytes,
            bytes: body.len(),
        };
        last.bytes += framed.len() as u64;
        last.at_ms = record.at_ms;
        self.bytes += framed.len() as u64;
        Ok(place)
    }

    /// Reads a record. Blocks.
    pub(super) fn read(&self, place: Place) -> io::Result<Record> {
        let segment = self.segments.iter().find(|segment| segment.number == place.segment);
        let segment = segment.ok_or(io::ErrorKind::NotFound)?;
        let mut framed = vec![0; HEADER_BYTES + place.bytes];
        segment.file.read_exact_at(&mut framed, place.offset)?;
        let record = records(place.segment, &framed).pop();
        Ok(record.ok_or(io::ErrorKind::InvalidData)?.1)
    }

    /// Removes the oldest files: those in which all is too old, and more while there are more than so many bytes. The first
    /// that is left says what may still be read. Blocks.
    pub(super) fn forget(&mut self, now_ms: u64, most_bytes: u64) -> io::Result<()> {
        let kept_ms = u64::try_from(KEPT_ANSWER.as_millis()).unwrap_or(u64::MAX);
        while let Some(oldest) = self.segments.front()
            && (self.bytes > most_bytes || oldest.at_ms.saturating_add(kept_ms) <= now_ms)
        {
            fs::remove_file(self.path(oldest.number))?;
            self.bytes -= oldest.bytes;
            self.segments.pop_front();
        }
        Ok(())
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
        let number = self.next;
        let file = File::options()
            .create_new(true)
            .read(true)
            .append(true)
            .open(self.path(number))?;
        self.next = number.saturating_add(1);
        self.segments.push_back(Segment {
            number,
            file,
            bytes: 0,
            at_ms: 0,
        });
        Ok(())
    }

    fn path(&self, number: u64) -> PathBuf {
        self.folder.join(number.to_string())
    }
}

/// The records of a file, up to the first that is not whole.
fn records(segment: u64, mut text: &[u8]) -> Vec<(Place, Record)> {
    let (mut records, mut offset) = (Vec::new(), 0);
    while let Some((header, rest)) = text.split_first_chunk::<HEADER_BYTES>()
        && let [l0, l1, l2, l3, c0, c1, c2, c3] = *header
        && let Ok(bytes) = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3]))
        && let Some((body, rest)) = rest.split_at_checked(bytes)
        && crc32fast::hash(body) == u32::from_le_bytes([c0, c1, c2, c3])
        && let Ok(record) = Record::decode(body)
    {
        let place = Place { segment, offset, bytes };
        records.push((place, record));
        offset += (HEADER_BYTES + bytes) as u64;
        text = rest;
    }
    records
}
