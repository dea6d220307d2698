//! Streams, decompressed and checked, into files that have no name: nothing of them is left once they are closed, however
//! the import ends.

use std::{
    fs::File,
    io::{self, BufReader, Read, Write as _},
    path::Path,
};

use flate2::read::MultiGzDecoder;
use sha2::{Digest as _, Sha256};

use crate::{
    digest::{Digest, Hashing},
    error::ImageError,
    limits::Exceeded,
};

const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// How a zstd frame begins that is to be skipped, but for its first byte, `0x50` to `0x5f`.
const ZSTD_SKIPPED: [u8; 3] = [0x2a, 0x4d, 0x18];
/// The largest window of a zstd frame that is taken, as a binary logarithm: 128 MiB, what `zstd` itself takes without being
/// told to.
const ZSTD_WINDOW: u32 = 27;
/// How much longer than its content a compressed stream may be, in bytes: what compression adds to 10 GiB that it can't make
/// smaller. Else a stream of frames with nothing in them would be read for hours and come to nothing.
const OVERHEAD: u64 = 1 << 20;
/// What is well known and not taken.
const OTHERS: [(&[u8], &str); 2] = [(b"BZh", "bzip2"), (&[0xfd, b'7', b'z', b'X', b'Z'], "xz")];

/// What was read, uncompressed.
pub(crate) struct Spool {
    pub(crate) file: File,
    /// In bytes.
    pub(crate) size: u64,
    /// Bytes of the stream that it was read from.
    pub(crate) read: u64,
    pub(crate) digest: Digest,
}

/// What a stream has to be, before it is decompressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Blob {
    pub(crate) digest: Digest,
    /// In bytes.
    pub(crate) size: u64,
}

/// What the first bytes of a stream say that it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    Plain,
    Gzip,
    Zstd,
    /// By this, which is not taken.
    Other(&'static str),
}

// === impl Compression ===

impl Compression {
    pub(crate) fn of(start: &[u8]) -> Self {
        if start.starts_with(&GZIP) {
            Self::Gzip
        } else if start.starts_with(&ZSTD)
            || matches!(start, [0x50..=0x5f, rest @ ..] if rest.starts_with(&ZSTD_SKIPPED))
        {
            Self::Zstd
        } else if let Some((_, name)) = OTHERS.iter().find(|(magic, _)| start.starts_with(magic)) {
            Self::Other(name)
        } else {
            Self::Plain
        }
    }
}

/// Decompresses a stream into a file in `folder`, of at most `limit` bytes; the stream itself may hardly be longer. Where it is
/// said what the stream is, that is checked. `what` is the stream, for who reads an error.
pub(crate) fn spool(
    from: impl Read,
    expected: Option<Blob>,
    folder: &Path,
    limit: u64,
    what: &str,
) -> Result<Spool, ImageError> {
    let longest = limit.saturating_add(OVERHEAD);
    if expected.is_some_and(|blob| blob.size > longest) {
        return Err(Exceeded::Unpacked(limit).into());
    }
    // One byte more than there should be tells that there are more.
    let most = expected.map_or(longest, |blob| blob.size).saturating_add(1);
    let mut from = Hashing::new(from.take(most));
    let unpacked = unpack(&mut from, folder, limit, what);
    let read = from.count();
    if read > longest {
        return Err(Exceeded::Unpacked(limit).into());
    }
    if let Some(Blob { digest, size }) = expected
        && !matches!(unpacked, Err(ImageError::Limit(_) | ImageError::Io { .. }))
    {
        // Compressed content may end before its stream does.
        let (count, found) = from.finish().map_err(|error| failed(error, what))?;
        if count != size {
            return Err(ImageError::Size {
                what: what.to_owned(),
                expected: size,
                found: count,
            });
        }
        // What is said first: damage shows in what it does to the compression, too.
        check(what, digest, found)?;
    }
    unpacked.map(|spool| Spool { read, ..spool })
}

/// Refuses what has another digest than it should.
pub(crate) fn check(what: &str, expected: Digest, found: Digest) -> Result<(), ImageError> {
    if expected == found {
        return Ok(());
    }
    Err(ImageError::Digest {
        what: what.to_owned(),
        expected,
        found,
    })
}

fn unpack(mut from: impl Read, folder: &Path, limit: u64, what: &str) -> Result<Spool, ImageError> {
    let mut start = Vec::new();
    from.by_ref()
        .take(8)
        .read_to_end(&mut start)
        .map_err(|error| failed(error, what))?;
    let compression = Compression::of(&start);
    let from = BufReader::with_capacity(1 << 16, start.chain(from));
    match compression {
        Compression::Plain => copy(from, folder, limit, what),
        Compression::Gzip => copy(MultiGzDecoder::new(from), folder, limit, what),
        Compression::Zstd => {
            let mut decoder = zstd::Decoder::with_buffer(from).map_err(|error| failed(error, what))?;
            decoder
                .window_log_max(ZSTD_WINDOW)
                .map_err(|error| failed(error, what))?;
            copy(decoder, folder, limit, what)
        }
        Compression::Other(name) => Err(ImageError::Compression {
            what: what.to_owned(),
            source: io::Error::other(format!("it is compressed by {name}; gzip and zstd are supported")),
        }),
    }
}

fn copy(mut from: impl Read, folder: &Path, limit: u64, what: &str) -> Result<Spool, ImageError> {
    let written = || format!("write in {}", folder.display());
    let mut file = tempfile::tempfile_in(folder).map_err(ImageError::io(written()))?;
    let mut hasher = Sha256::new();
    let mut size = 0;
    let mut buffer = vec![0; 1 << 17];
    loop {
        let count = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(failed(error, what)),
        };
        let part = buffer.get(..count).unwrap_or_default();
        size += count as u64;
        if size > limit {
            return Err(Exceeded::Unpacked(limit).into());
        }
        hasher.update(part);
        file.write_all(part).map_err(ImageError::io(written()))?;
    }
    Ok(Spool {
        file,
        size,
        read: size,
        digest: Digest::finish(hasher),
    })
}

/// A read failed: either the kernel could not, or what was read can't be decompressed.
fn failed(source: io::Error, what: &str) -> ImageError {
    let what = what.to_owned();
    if source.raw_os_error().is_some() {
        return ImageError::Io {
            what: format!("read {what}"),
            source,
        };
    }
    ImageError::Compression { what, source }
}

#[cfg(test)]
mod tests {
    use std::io::Seek as _;

    use super::*;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn read(bytes: &[u8], expected: Option<Blob>, limit: u64) -> Result<Vec<u8>, ImageError> {
        let folder = tempfile::tempdir().unwrap();
        let result = spool(bytes, expected, folder.path(), limit, "x");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        let mut spool = result?;
        let mut content = Vec::new();
        spool.file.rewind().unwrap();
        spool.file.read_to_end(&mut content).unwrap();
        assert_eq!((spool.size, spool.digest), (content.len() as u64, Digest::of(&content)));
        Ok(content)
    }

    fn blob(bytes: &[u8]) -> Option<Blob> {
        Some(Blob {
            digest: Digest::of(bytes),
            size: bytes.len() as u64,
        })
    }

    #[test]
    fn plain_gzip_and_zstd_are_read_with_all_their_parts() {
        let zstd = |bytes: &[u8]| zstd::encode_all(bytes, 1).unwrap();
        let skipped = [&[0x5a, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"abc"].concat();
        for (stream, content) in [
            (b"".to_vec(), &b""[..]),
            (b"content".to_vec(), b"content"),
            (gzip(b"content"), b"content"),
            ([gzip(b"con"), gzip(b"tent")].concat(), b"content"),
            (zstd(b"content"), b"content"),
            ([skipped, zstd(b"con"), zstd(b"tent")].concat(), b"content"),
        ] {
            assert_eq!(read(&stream, blob(&stream), 7).unwrap(), content);
            assert_eq!(read(&stream, None, 7).unwrap(), content);
        }
    }

    #[test]
    fn damage_is_found() {
        let stream = gzip(&[7; 100_000]);
        for length in [5, stream.len() / 2, stream.len() - 1] {
            let error = read(&stream[..length], None, 1 << 20).unwrap_err();
            assert!(matches!(error, ImageError::Compression { .. }), "{length}: {error}");
        }
        let mut damaged = stream.clone();
        damaged[30] ^= 0x55;
        assert!(matches!(
            read(&damaged, blob(&stream), 1 << 20),
            Err(ImageError::Digest { .. })
        ));
        assert!(matches!(
            read(&stream[..50], blob(&stream), 1 << 20),
            Err(ImageError::Size { .. })
        ));
        let longer = [&stream[..], &[0; 1 << 20]].concat();
        let error = read(&longer, blob(&stream), 1 << 20).unwrap_err();
        assert!(
            matches!(error, ImageError::Size { found, .. } if found == stream.len() as u64 + 1),
            "{error}"
        );
        for start in [&b"BZh91AY"[..], b"\xfd7zXZ\0\0\0"] {
            assert!(matches!(
                read(start, None, 1 << 20),
                Err(ImageError::Compression { .. })
            ));
        }
    }

    #[test]
    fn a_stream_of_nothing_stops_at_the_limit_too() {
        let skipped = [0x50, 0x2a, 0x4d, 0x18, 0, 0, 0, 0].to_vec();
        for frame in [gzip(b""), zstd::encode_all(&b""[..], 1).unwrap(), skipped] {
            let stream = frame.repeat((2 << 20) / frame.len() + 1);
            for expected in [None, blob(&stream)] {
                let error = read(&stream, expected, 1000).unwrap_err();
                assert!(matches!(error, ImageError::Limit(Exceeded::Unpacked(1000))), "{error}");
            }
            assert_eq!(read(&stream, blob(&stream), 2 << 20).unwrap(), b"");
        }
        // What can't be made smaller is longer than its content, and taken.
        let noise: Vec<u8> = (0_u32..1000)
            .flat_map(|at| Digest::of(&at.to_le_bytes()).hex().into_bytes())
            .collect();
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::none());
        encoder.write_all(&noise).unwrap();
        let stored = encoder.finish().unwrap();
        assert!(stored.len() > noise.len());
        assert_eq!(read(&stored, None, noise.len() as u64).unwrap(), noise);
    }

    #[test]
    fn a_bomb_stops_at_the_limit() {
        let zeros = vec![0; 4 << 20];
        for stream in [gzip(&zeros), zstd::encode_all(&zeros[..], 1).unwrap(), zeros] {
            let error = read(&stream, None, 1 << 20).unwrap_err();
            assert!(matches!(error, ImageError::Limit(Exceeded::Unpacked(_))), "{error}");
        }
        // A frame that wants 1 GiB for its window, and holds nothing.
        let window = [&ZSTD[..], &[0, 20 << 3, 1, 0, 0]].concat();
        assert!(matches!(
            read(&window, None, 1 << 20),
            Err(ImageError::Compression { .. })
        ));
    }
}
