//! Zips as programs of all kinds make them, byte by byte (PKWARE's APPNOTE.TXT, 4.3).

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test says by a panic what is wrong, helpers too"
)]

use std::io::Cursor;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use stoker_archive::{Archive, ArchiveError, Limits, PathError};

/// The system in "version made by" (4.4.2).
const WINDOWS: u8 = 0;
const UNIX: u8 = 3;

/// Noon of 2024-06-15, as an entry's time and date (4.4.6), and in seconds since 1970 in UTC.
const NOON: (u16, u16) = (12 << 11, (2024 - 1980) << 9 | 6 << 5 | 15);
const NOON_SECONDS: i64 = 1_718_452_800;

/// An entry, stored as it is.
#[derive(Clone)]
struct Entry<'a> {
    name: &'a [u8],
    content: &'a [u8],
    system: u8,
    attributes: u32,
    utf8: bool,
    /// Sizes and digest come after the content, as from a program that does not know them before.
    streamed: bool,
    time: (u16, u16),
    extra: Vec<u8>,
}

impl Default for Entry<'_> {
    fn default() -> Self {
        Self {
            name: b"app.py",
            content: b"x = 1",
            system: UNIX,
            attributes: 0o100_644 << 16,
            utf8: false,
            streamed: false,
            time: NOON,
            extra: Vec::new(),
        }
    }
}

impl Entry<'_> {
    /// What the headers have in common, from the flags to the length of the extra field.
    fn common(&self, local: bool) -> Vec<u8> {
        let known = !(local && self.streamed);
        let size = if known { self.content.len() as u32 } else { 0 };
        let crc = if known { crc32fast::hash(self.content) } else { 0 };
        let flags = u16::from(self.utf8) << 11 | u16::from(self.streamed) << 3;
        let mut bytes = Vec::new();
        for short in [20, flags, 0, self.time.0, self.time.1] {
            bytes.extend(short.to_le_bytes());
        }
        for long in [crc, size, size] {
            bytes.extend(long.to_le_bytes());
        }
        for short in [self.name.len() as u16, self.extra.len() as u16] {
            bytes.extend(short.to_le_bytes());
        }
        bytes
    }
}

/// A zip of these, after `before`.
fn zip_after(before: &[u8], entries: &[Entry<'_>]) -> Vec<u8> {
    let mut zip = before.to_vec();
    let mut directory = Vec::new();
    for entry in entries {
        let offset = (zip.len() - before.len()) as u32;
        zip.extend(b"PK\x03\x04");
        zip.extend(entry.common(true));
        zip.extend(entry.name);
        zip.extend(&entry.extra);
        zip.extend(entry.content);
        if entry.streamed {
            zip.extend(b"PK\x07\x08");
            zip.extend(crc32fast::hash(entry.content).to_le_bytes());
            zip.extend((entry.content.len() as u32).to_le_bytes());
            zip.extend((entry.content.len() as u32).to_le_bytes());
        }
        directory.extend(b"PK\x01\x02");
        directory.extend([20, entry.system]);
        directory.extend(entry.common(false));
        // No comment, the first disk, no internal attributes.
        directory.extend([0; 6]);
        directory.extend(entry.attributes.to_le_bytes());
        directory.extend(offset.to_le_bytes());
        directory.extend(entry.name);
        directory.extend(&entry.extra);
    }
    let offset = (zip.len() - before.len()) as u32;
    let count = (entries.len() as u16).to_le_bytes();
    zip.extend(&directory);
    zip.extend(b"PK\x05\x06");
    zip.extend([0; 4]);
    zip.extend(count);
    zip.extend(count);
    zip.extend((directory.len() as u32).to_le_bytes());
    zip.extend(offset.to_le_bytes());
    zip.extend([0; 2]);
    zip
}

fn zip(entries: &[Entry<'_>]) -> Vec<u8> {
    zip_after(b"", entries)
}

/// Unpacks it as a guest does, and looks at what came of it.
fn unpacked<T>(zip: &[u8], look: impl FnOnce(&Path) -> T) -> Result<T, ArchiveError> {
    let folder = tempfile::tempdir().unwrap();
    let mut archive = Archive::open(Cursor::new(zip), Limits::MOST)?;
    archive.read_through()?;
    archive.unpack(folder.path()).unwrap();
    Ok(look(folder.path()))
}

fn named(name: &[u8]) -> Entry<'_> {
    Entry {
        name,
        ..Entry::default()
    }
}

fn windows(name: &[u8], attributes: u32) -> Entry<'_> {
    Entry {
        system: WINDOWS,
        attributes,
        ..named(name)
    }
}

fn is_there(zip: &[u8], path: &str) {
    let content = unpacked(zip, |folder| std::fs::read(folder.join(path))).unwrap();
    assert_eq!(content.unwrap(), b"x = 1", "{path}");
}

fn refusal(zip: &[u8]) -> PathError {
    match unpacked(zip, |_| ()) {
        Err(ArchiveError::Path { source, .. }) => source,
        other => panic!("not refused for a path: {other:?}"),
    }
}

#[test]
fn names_may_be_in_any_encoding() {
    let utf8 = named("grün/café.py".as_bytes());
    is_there(&zip(std::slice::from_ref(&utf8)), "grün/café.py");
    is_there(&zip(&[Entry { utf8: true, ..utf8 }]), "grün/café.py");
    // Code page 437, what APPNOTE says where no flag says UTF-8; and Latin-1, which nothing tells from it.
    is_there(&zip(&[windows(b"gr\x81n.py", 0x20)]), "grün.py");
    is_there(&zip(&[named(b"gr\xfcn.py")]), "grⁿn.py");
    // Whatever they are taken for, names stay apart.
    let names: Vec<[u8; 2]> = (0x80..=0xff).map(|byte| [byte, b'x']).collect();
    let entries: Vec<Entry<'_>> = names.iter().map(|name| named(name)).collect();
    let count = unpacked(&zip(&entries), |folder| std::fs::read_dir(folder).unwrap().count());
    assert_eq!(count.unwrap(), 128);
}

#[test]
fn windows_separates_by_backslashes() {
    let entries = [windows(b"lib\\", 0x10), windows(b"lib\\deep\\app.py", 0x20)];
    is_there(&zip(&entries), "lib/deep/app.py");
    // Some give a folder no attribute, or a file's.
    for attributes in [0, 0x10, 0x20, 0x80] {
        let entries = [windows(b"lib/", attributes), windows(b"lib/app.py", 0)];
        is_there(&zip(&entries), "lib/app.py");
    }
    for (name, error) in [
        (&b"..\\app.py"[..], PathError::Parent),
        (b"lib\\..\\..\\app.py", PathError::Parent),
        (b"C:\\app.py", PathError::Absolute),
        (b"\\app.py", PathError::Absolute),
        (b"\\\\host\\app.py", PathError::Absolute),
    ] {
        assert_eq!(refusal(&zip(&[windows(name, 0x20)])), error, "{name:?}");
    }
    let twice = [windows(b"lib\\app.py", 0x20), windows(b"lib/app.py", 0x20)];
    assert_eq!(refusal(&zip(&twice)), PathError::Twice);
    // To Unix it is a character like others, and rarely meant.
    assert_eq!(refusal(&zip(&[named(b"lib\\app.py")])), PathError::Backslash);
}

#[test]
fn times_are_taken_from_where_they_are_most_exact() {
    let field = |id: u16, data: &[u8]| {
        let mut bytes = id.to_le_bytes().to_vec();
        bytes.extend((data.len() as u16).to_le_bytes());
        bytes.extend(data);
        bytes
    };
    let exact = NOON_SECONDS + 1;
    // Flags, then the time of the last change.
    let unix = field(0x5455, &[&[1][..], &(exact as u32).to_le_bytes()].concat());
    // Reserved; attribute 1 of 24 bytes: last change, last access, creation.
    let ticks = ((exact + 11_644_473_600) as u64 * 10_000_000).to_le_bytes();
    let ntfs = field(0x000a, &[&[0, 0, 0, 0, 1, 0, 24, 0][..], &ticks, &[0; 16]].concat());
    let before_1970 = field(0x000a, &[&[0, 0, 0, 0, 1, 0, 24, 0][..], &[0; 24]].concat());
    let other = field(0xcafe, &[]);
    for (extra, time, seconds) in [
        (vec![], NOON, Some(NOON_SECONDS)),
        (other, NOON, Some(NOON_SECONDS)),
        (unix.clone(), NOON, Some(exact)),
        (unix, (0, 0), Some(exact)),
        (ntfs, NOON, Some(exact)),
        (before_1970, NOON, Some(NOON_SECONDS)),
        (vec![], (0, 0x0021), Some(315_532_800)),
        // Month 0.
        (vec![], (0, 0), None),
    ] {
        let entry = Entry {
            time,
            extra: extra.clone(),
            ..Entry::default()
        };
        let now = std::time::SystemTime::now();
        let met = unpacked(&zip(&[entry]), |folder| folder.join("app.py").metadata().unwrap()).unwrap();
        match seconds {
            Some(seconds) => assert_eq!(met.mtime(), seconds, "{extra:?} {time:?}"),
            None => assert!(met.modified().unwrap() + std::time::Duration::from_secs(1) > now),
        }
    }
}

#[test]
fn streamed_and_prefixed_zips_are_taken() {
    let streamed = Entry {
        streamed: true,
        ..Entry::default()
    };
    is_there(&zip(&[streamed, named(b"b.py")]), "app.py");
    // What runs itself has a program before the zip.
    is_there(&zip_after(b"#!/usr/bin/env python3\n", &[Entry::default()]), "app.py");
}

#[test]
fn as_many_as_the_old_format_counts_are_taken() {
    let names: Vec<String> = (0..=u16::MAX).map(|number| format!("{number}.py")).collect();
    let entries: Vec<Entry<'_>> = names
        .iter()
        .map(|name| Entry {
            content: b"",
            ..named(name.as_bytes())
        })
        .collect();
    // As Python and Java write it: 65,535 without the zip64 records that 65,536 have.
    let zip = zip(&entries[..65_535]);
    let archive = Archive::open(Cursor::new(&zip), Limits::MOST).unwrap();
    assert_eq!(archive.size().files, 65_535);
    let few = Limits {
        entries: 65_534,
        ..Limits::MOST
    };
    assert!(matches!(
        Archive::open(Cursor::new(&zip), few),
        Err(ArchiveError::TooManyEntries { limit: 65_534 })
    ));
}
