//! A file of a function's log: `NUMBER-BEGUN.log`, appended to and never changed, and removed as a whole.

use std::fs::{File, Metadata};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use super::line::MAX_LINE;

/// A file; clones are the same.
#[derive(Clone, Debug)]
pub(super) struct Segment {
    pub(super) number: u64,
    /// When it was begun, since 1970 by this host's clock.
    pub(super) begun: Duration,
    /// When it was last written to.
    pub(super) written: Duration,
    /// Where it begins in the function's log, as that is known to this agent.
    pub(super) start: u64,
    /// The lines in it, in bytes.
    pub(super) bytes: u64,
    /// There is a part of a line behind them, which a crash left: nothing is appended to it any more.
    pub(super) torn: bool,
    path: Arc<Path>,
}

// === impl Segment ===

impl Segment {
    /// A new file; it is made when it is first written to.
    pub(super) fn begin(folder: &Path, number: u64, start: u64, now: Duration) -> Self {
        Self {
            number,
            begun: now,
            written: now,
            start,
            bytes: 0,
            torn: false,
            path: folder.join(format!("{number:08}-{}.log", now.as_secs())).into(),
        }
    }

    /// A file that is there; none where its name is not of one.
    pub(super) fn find(path: PathBuf, found: &Metadata) -> io::Result<Option<Self>> {
        let Some((number, begun)) = path.file_name().and_then(|name| parse(name.to_str()?)) else {
            return Ok(None);
        };
        let bytes = match found.len() {
            0 => 0,
            length => whole_lines(&File::open(&path)?, length)?,
        };
        let written = found.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(Some(Self {
            number,
            begun,
            written,
            start: 0,
            bytes,
            torn: bytes != found.len(),
            path: path.into(),
        }))
    }

    /// Where the next one begins.
    pub(super) fn end(&self) -> u64 {
        self.start + self.bytes
    }

    /// Appends whole lines. Where that fails the file is as before, or torn.
    pub(super) fn append(&mut self, lines: &[u8], now: Duration) -> io::Result<()> {
        let mut options = File::options();
        let mut file = options.append(true).create(true).mode(0o600).open(&self.path)?;
        if let Err(error) = file.write_all(lines) {
            self.torn = file.set_len(self.bytes).is_err();
            return Err(error);
        }
        self.bytes += lines.len() as u64;
        self.written = now;
        Ok(())
    }

    /// Removes the file; one that is not there is as good.
    pub(super) fn remove(&self) -> io::Result<()> {
        crate::files::remove(&self.path)
    }

    /// Reads from so many bytes behind its beginning on, at most `limit`.
    pub(super) fn read(&self, offset: u64, limit: usize) -> io::Result<Vec<u8>> {
        let there = usize::try_from(self.bytes.saturating_sub(offset)).unwrap_or(usize::MAX);
        let mut data = vec![0; there.min(limit)];
        File::open(&self.path)?.read_exact_at(&mut data, offset)?;
        Ok(data)
    }
}

fn parse(name: &str) -> Option<(u64, Duration)> {
    let (number, begun) = name.strip_suffix(".log")?.split_once('-')?;
    Some((number.parse().ok()?, Duration::from_secs(begun.parse().ok()?)))
}

/// How long the part of a file is that ends with the end of its last whole line.
fn whole_lines(file: &File, length: u64) -> io::Result<u64> {
    let from = length.saturating_sub(MAX_LINE as u64);
    let mut tail = vec![0; usize::try_from(length - from).unwrap_or(MAX_LINE)];
    // Most end with a line: that is looked at first.
    let mut last = [0];
    file.read_exact_at(&mut last, length - 1)?;
    if last == *b"\n" {
        return Ok(length);
    }
    file.read_exact_at(&mut tail, from)?;
    let end = tail.iter().rposition(|byte| *byte == b'\n');
    Ok(end.map_or(0, |end| from + end as u64 + 1))
}
