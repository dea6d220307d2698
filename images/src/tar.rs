//! Reads the headers of a tar: ustar, GNU and pax.
//!
//! Of the crate `tar` it takes the fields of a header. Its own reader puts extended headers of any length in memory, and
//! splits pax records at line feeds, which extended attributes may contain.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt as _,
};

pub(crate) use tar::EntryType;
use tar::Header;

use crate::{error::TarError, limits::Exceeded};

const BLOCK: u64 = 512;
/// The longest extended header that is read, in bytes, as of Go's reader; all that one entry has together are no longer, for
/// what they say is kept in memory until the entry comes.
const MAX_EXTENSION: u64 = 1 << 20;
/// Where the check sum lies in a header.
const CHECKSUM: std::ops::Range<usize> = 148..156;
/// What pax calls extended attributes.
const XATTR: &[u8] = b"SCHILY.xattr.";

/// What a tar has of one file, folder or link.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) path: Vec<u8>,
    /// The target of a link.
    pub(crate) link: Vec<u8>,
    pub(crate) kind: EntryType,
    /// Permissions, set-user-ID, set-group-ID and sticky.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// In s since the epoch, and ns after that.
    pub(crate) mtime: (i64, u32),
    /// Where its content begins in the tar.
    pub(crate) offset: u64,
    /// Its content in bytes; of what is no file none.
    pub(crate) size: u64,
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Walks over a tar in a file.
pub(crate) struct Reader<'a> {
    file: &'a File,
    at: u64,
    len: u64,
    ending: Ending,
}

/// How a tar ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// By a block of zeros: else it was cut short.
    Marked,
    /// Also where its file ends. Some builders (umoci's `insert`) leave out the end of a layer, whose digest tells whether it is
    /// whole.
    Any,
}

/// A part of a file, which leaves the file's own position alone.
pub(crate) struct Section<'a> {
    file: &'a File,
    at: u64,
    left: u64,
}

/// What extended headers say of the entry that follows.
#[derive(Default)]
struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    is_sparse: bool,
    is_there: bool,
}

// === impl Reader ===

impl<'a> Reader<'a> {
    /// Begins at the start of a file of this length.
    pub(crate) fn new(file: &'a File, len: u64, ending: Ending) -> Self {
        Self {
            file,
            at: 0,
            len,
            ending,
        }
    }

    /// The next entry; none at the tar's end.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>, TarError> {
        let mut extended = Extended::default();
        let mut left = MAX_EXTENSION;
        loop {
            let Some(header) = self.header()? else {
                return if extended.is_there {
                    Err(TarError::Truncated)
                } else {
                    Ok(None)
                };
            };
            let said = number(&header.as_old().size, header.entry_size(), "size")?;
            match header.entry_type() {
                EntryType::XGlobalHeader => {
                    self.skip(said)?;
                    continue;
                }
                EntryType::XHeader => extended.read_pax(&self.extension(said, &mut left)?)?,
                EntryType::GNULongName => extended.path = Some(until_nul(self.extension(said, &mut left)?)),
                EntryType::GNULongLink => extended.link = Some(until_nul(self.extension(said, &mut left)?)),
                _ => return self.entry(&header, said, extended).map(Some),
            }
            extended.is_there = true;
        }
    }

    fn entry(&mut self, header: &Header, said: u64, extended: Extended) -> Result<Entry, TarError> {
        let path = extended.path.unwrap_or_else(|| header.path_bytes().into_owned());
        let mut kind = header.entry_type();
        if extended.is_sparse || kind == EntryType::GNUSparse {
            return Err(TarError::Sparse(path));
        }
        if matches!(kind, EntryType::Regular | EntryType::Continuous) {
            // As before POSIX a folder was written.
            let is_folder = path.ends_with(b"/");
            kind = if is_folder {
                EntryType::Directory
            } else {
                EntryType::Regular
            };
        }
        // Only files have content, whatever the header of another says: so Go's writer and reader have it.
        let size = if kind == EntryType::Regular {
            extended.size.unwrap_or(said)
        } else {
            0
        };
        let offset = self.at;
        self.skip(size)?;
        let id = |extended: Option<u64>, field: &[u8], parsed: io::Result<u64>| {
            let id = extended.map_or_else(|| number(field, parsed, "owner"), Ok)?;
            u32::try_from(id).map_err(|_| TarError::Header("owner"))
        };
        let old = header.as_old();
        let mode = number(&old.mode, header.mode().map(u64::from), "mode")?;
        let link = extended
            .link
            .or_else(|| header.link_name_bytes().map(|link| link.into_owned()));
        Ok(Entry {
            link: link.unwrap_or_default(),
            kind,
            mode: u16::try_from(mode & 0o7777).unwrap_or_default(),
            uid: id(extended.uid, &old.uid, header.uid())?,
            gid: id(extended.gid, &old.gid, header.gid())?,
            mtime: extended
                .mtime
                .unwrap_or_else(|| (header.mtime().map_or(0, u64::cast_signed), 0)),
            offset,
            size,
            xattrs: extended.xattrs,
            path,
        })
    }

    /// The header that comes; none where the tar ends.
    fn header(&mut self) -> Result<Option<Header>, TarError> {
        if self.at >= self.len {
            return match self.ending {
                Ending::Marked => Err(TarError::Truncated),
                Ending::Any => Ok(None),
            };
        }
        let mut header = Header::new_old();
        self.read(header.as_mut_bytes())?;
        self.at += BLOCK;
        if header.as_bytes().iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let said = header.cksum().map_err(|_| TarError::Header("check sum"))?;
        let sum = |value: fn(u8) -> i32| -> i32 {
            let bytes = header.as_bytes().iter().enumerate();
            bytes
                .map(|(at, byte)| if CHECKSUM.contains(&at) { 32 } else { value(*byte) })
                .sum()
        };
        // Some old programs added signed bytes.
        let is_right = [sum(i32::from), sum(|byte| i32::from(byte.cast_signed()))]
            .iter()
            .any(|sum| u32::try_from(*sum) == Ok(said));
        if is_right {
            Ok(Some(header))
        } else {
            Err(TarError::Header("check sum"))
        }
    }

    /// Reads an extended header, of which `left` bytes may still come for this entry.
    fn extension(&mut self, size: u64, left: &mut u64) -> Result<Vec<u8>, TarError> {
        *left = left.checked_sub(size).ok_or(Exceeded::Header(MAX_EXTENSION))?;
        let mut content = vec![0; usize::try_from(size).unwrap_or_default()];
        self.read(&mut content)?;
        self.skip(size)?;
        Ok(content)
    }

    fn read(&self, buffer: &mut [u8]) -> Result<(), TarError> {
        self.file
            .read_exact_at(buffer, self.at)
            .map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => TarError::Truncated,
                _ => TarError::Io(error),
            })
    }

    /// Goes past content, which must be there, and what fills its last block.
    fn skip(&mut self, size: u64) -> Result<(), TarError> {
        let end = self
            .at
            .checked_add(size)
            .filter(|end| *end <= self.len)
            .ok_or(TarError::Truncated)?;
        self.at = end.next_multiple_of(BLOCK);
        Ok(())
    }
}

// === impl Section ===

impl<'a> Section<'a> {
    /// So many bytes of the file from here on.
    pub(crate) fn new(file: &'a File, at: u64, left: u64) -> Self {
        Self { file, at, left }
    }
}

impl Read for Section<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).map_or(buffer.len(), |left| left.min(buffer.len()));
        let count = self.file.read_at(buffer.get_mut(..most).unwrap_or_default(), self.at)?;
        self.at += count as u64;
        self.left -= count as u64;
        Ok(count)
    }
}

// === impl Extended ===

impl Extended {
    fn read_pax(&mut self, mut records: &[u8]) -> Result<(), TarError> {
        let wrong = || TarError::Header("pax record");
        // Each is `LENGTH KEY=VALUE\n`, its length that of all of it.
        while !records.is_empty() {
            let space = records.iter().position(|byte| *byte == b' ').ok_or_else(wrong)?;
            let length: usize = records.get(..space).and_then(parse).ok_or_else(wrong)?;
            let (record, rest) = records.split_at_checked(length).ok_or_else(wrong)?;
            let record = record
                .get(space + 1..)
                .and_then(|record| record.strip_suffix(b"\n"))
                .ok_or_else(wrong)?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(wrong)?;
            let (key, value) = record.split_at(equals);
            self.take(key, value.get(1..).unwrap_or_default()).ok_or_else(wrong)?;
            records = rest;
        }
        Ok(())
    }

    /// Takes what a record says; none where it can't be meant.
    fn take(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        match key {
            // An empty value says that there is none.
            b"path" => self.path = (!value.is_empty()).then(|| value.to_vec()),
            b"linkpath" => self.link = (!value.is_empty()).then(|| value.to_vec()),
            b"size" => self.size = Some(parse(value)?),
            b"uid" => self.uid = Some(parse(value)?),
            b"gid" => self.gid = Some(parse(value)?),
            b"mtime" => self.mtime = Some(time(value)?),
            _ if key.starts_with(b"GNU.sparse.") => self.is_sparse = true,
            _ => {
                if let Some(name) = key.strip_prefix(XATTR) {
                    self.xattrs.push((name.to_vec(), value.to_vec()));
                }
            }
        }
        Some(())
    }
}

/// A field of a header, where none is 0.
fn number(field: &[u8], parsed: io::Result<u64>, name: &'static str) -> Result<u64, TarError> {
    match parsed {
        Err(_) if field.iter().all(|byte| matches!(byte, 0 | b' ')) => Ok(0),
        other => other.map_err(|_| TarError::Header(name)),
    }
}

fn parse<T: std::str::FromStr>(digits: &[u8]) -> Option<T> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// Seconds with a fraction, both in decimal digits: in whole s, and ns from there on.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let ns: u32 = digits.parse().ok()?;
    if whole.starts_with('-') && ns > 0 {
        return Some((seconds.checked_sub(1)?, 1_000_000_000_u32.checked_sub(ns)?));
    }
    Some((seconds, ns))
}

fn until_nul(mut text: Vec<u8>) -> Vec<u8> {
    if let Some(end) = text.iter().position(|byte| *byte == 0) {
        text.truncate(end);
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn walk(bytes: &[u8]) -> Result<Vec<Entry>, TarError> {
        walk_to(bytes, Ending::Marked)
    }

    fn walk_to(bytes: &[u8], ending: Ending) -> Result<Vec<Entry>, TarError> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        let mut reader = Reader::new(&file, bytes.len() as u64, ending);
        let mut entries = Vec::new();
        while let Some(entry) = reader.next()? {
            entries.push(entry);
        }
        Ok(entries)
    }

    fn header(name: &str, kind: EntryType, size: u64) -> Vec<u8> {
        let mut header = Header::new_ustar();
        header.set_path(name).unwrap();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(0o100_644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(7);
        header.set_cksum();
        header.as_bytes().to_vec()
    }

    fn padded(content: &[u8]) -> Vec<u8> {
        let mut content = content.to_vec();
        content.resize(content.len().next_multiple_of(512), 0);
        content
    }

    fn record(key: &str, value: &[u8]) -> Vec<u8> {
        let mut length = key.len() + value.len() + 3;
        while length != key.len() + value.len() + 3 + length.to_string().len() {
            length = key.len() + value.len() + 3 + length.to_string().len();
        }
        [format!("{length} {key}=").as_bytes(), value, b"\n"].concat()
    }

    fn with_pax(records: &[u8], file: &[u8]) -> Vec<u8> {
        let pax = header("pax", EntryType::XHeader, records.len() as u64);
        [pax, padded(records), file.to_vec(), vec![0; 1024]].concat()
    }

    #[test]
    fn pax_says_more_than_the_header() {
        let value = b"\x01\n=\x00\xff";
        let records = [
            record("path", "ä/\u{1F980}".as_bytes()),
            record("uid", b"4000000000"),
            record("mtime", b"-1.25"),
            record("SCHILY.xattr.security.capability", value),
            record("comment", b"none"),
        ];
        let entries = walk(&with_pax(
            &records.concat(),
            &[header("short", EntryType::Regular, 3), padded(b"abc")].concat(),
        ))
        .unwrap();
        let [entry] = &entries[..] else { panic!("{entries:?}") };
        assert_eq!(entry.path, "ä/\u{1F980}".as_bytes());
        assert_eq!(
            (entry.uid, entry.gid, entry.mode, entry.size),
            (4_000_000_000, 0, 0o644, 3)
        );
        assert_eq!(entry.mtime, (-2, 750_000_000));
        assert_eq!(entry.xattrs, [(b"security.capability".to_vec(), value.to_vec())]);
    }

    #[test]
    fn what_is_damaged_or_cut_short_is_an_error() {
        let good = [header("a", EntryType::Regular, 3), padded(b"abc"), vec![0; 512]].concat();
        assert_eq!(walk(&good).unwrap().len(), 1);
        for length in [0, 1, 511, 512, 514, 600, 1024, 1100] {
            assert!(matches!(walk(&good[..length]), Err(TarError::Truncated)), "{length}");
        }
        // After a whole entry, its padding left out or not.
        for length in [515, 1024] {
            assert_eq!(walk_to(&good[..length], Ending::Any).unwrap().len(), 1, "{length}");
        }
        for length in [1, 511, 514, 1100] {
            assert!(
                matches!(walk_to(&good[..length], Ending::Any), Err(TarError::Truncated)),
                "{length}"
            );
        }
        let mut damaged = good.clone();
        damaged[0] ^= 1;
        assert!(matches!(walk(&damaged), Err(TarError::Header("check sum"))));
        // An extended header that nothing follows.
        let records = record("path", b"x");
        let alone = [
            header("pax", EntryType::XHeader, records.len() as u64),
            padded(&records),
            vec![0; 512],
        ];
        assert!(matches!(walk(&alone.concat()), Err(TarError::Truncated)));
        let huge = header("a", EntryType::Regular, 8 << 30);
        assert!(matches!(
            walk(&[huge, vec![0; 1024]].concat()),
            Err(TarError::Truncated)
        ));
    }

    #[test]
    fn extended_headers_are_short_and_well_formed() {
        for kind in [EntryType::XHeader, EntryType::GNULongName, EntryType::GNULongLink] {
            let long = [header("x", kind, MAX_EXTENSION + 1), vec![0; 2 << 20]].concat();
            assert!(
                matches!(walk(&long), Err(TarError::Limit(Exceeded::Header(_)))),
                "{kind:?}"
            );
        }
        for records in [
            &b"x"[..],
            b"99 path=x\n",
            b"0 path=x\n",
            b"9 path=x_",
            b"8 path x\n",
            b"-1 path=x\n",
            b"18446744073709551615 a=b\n",
        ] {
            let error = walk(&with_pax(records, &header("a", EntryType::Regular, 0)));
            assert!(matches!(error, Err(TarError::Header("pax record"))), "{records:?}");
        }
        for (key, value) in [
            ("size", "-1"),
            ("size", "18446744073709551616"),
            ("uid", "x"),
            ("mtime", "1.x"),
        ] {
            let error = walk(&with_pax(
                &record(key, value.as_bytes()),
                &header("a", EntryType::Regular, 0),
            ));
            assert!(matches!(error, Err(TarError::Header(_))), "{key} {value}");
        }
        let owner = walk(&with_pax(
            &record("gid", b"4294967296"),
            &header("a", EntryType::Regular, 0),
        ));
        assert!(matches!(owner, Err(TarError::Header("owner"))));
        let size = walk(&with_pax(
            &record("size", b"18446744073709551615"),
            &header("a", EntryType::Regular, 0),
        ));
        assert!(matches!(size, Err(TarError::Truncated)));
    }

    #[test]
    fn extended_headers_of_an_entry_are_short_together() {
        let text = vec![b'x'; 700 << 10];
        let records = record("SCHILY.xattr.user.a", &text);
        let pax = [header("x", EntryType::XHeader, records.len() as u64), padded(&records)].concat();
        let name = [header("x", EntryType::GNULongName, text.len() as u64), padded(&text)].concat();
        let file = header("a", EntryType::Regular, 0);
        let end = vec![0; 1024];
        for two in [[&pax, &pax], [&name, &pax], [&name, &name]] {
            let error = walk(&[two[0], two[1], &file, &end].map(Vec::as_slice).concat());
            assert!(matches!(error, Err(TarError::Limit(Exceeded::Header(_)))), "{error:?}");
        }
        // Each entry has its own.
        let entries = walk(&[&pax, &file, &pax, &file, &end].map(Vec::as_slice).concat()).unwrap();
        assert_eq!(entries.len(), 2);
    }

    #[test]
    fn sparse_files_of_both_kinds_are_refused() {
        let error = walk(&with_pax(
            &record("GNU.sparse.realsize", b"99999999999"),
            &header("a", EntryType::Regular, 0),
        ));
        assert!(matches!(error, Err(TarError::Sparse(_))));
        let error = walk(&[header("a", EntryType::GNUSparse, 0), vec![0; 1024]].concat());
        assert!(matches!(error, Err(TarError::Sparse(_))));
    }
}
