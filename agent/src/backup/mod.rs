//! Backups: an archive of what a host keeps, made while the agent runs, restored while it does not.
//!
//! An archive is a tar: `manifest.json` first, which names every other file with its bytes and SHA-256; then `state.db`, the
//! database; `code/SHA256.zip` for each zip that a function needs; and, where that was asked for, `environment.key`.

mod check;
mod error;
mod restore;
mod write;

use std::io::{self, Read};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use ulid::Ulid;

pub use check::{Checked, check};
pub use error::BackupError;
pub use restore::{Restored, read_through, restore};
pub(crate) use write::write;

use crate::hex::hex;

/// The form of archives that this agent writes and reads.
const FORMAT: u32 = 1;

/// The files of an archive.
const MANIFEST: &str = "manifest.json";
const DATABASE: &str = "state.db";
const KEY: &str = "environment.key";

/// The most bytes of a manifest: a hundred and a few for each of ten million functions.
const MANIFEST_BYTES: u64 = 2 << 30;

/// What an archive is of, and what is in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT`]
    pub format: u32,
    /// The version of the agent that made it.
    pub stokerd: String,
    /// The host's id.
    pub host: Ulid,
    /// The schema of the database.
    pub schema: u32,
    /// All files but this one, in their order.
    pub files: Vec<Entry>,
}

/// A file of an archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its path in the archive.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// In lower-case hex.
    pub sha256: String,
}

/// Passes bytes on and fails at the end where they are not those of an entry.
struct Checking<'a, R> {
    entry: &'a Entry,
    from: R,
    left: u64,
    hash: Sha256,
}

// === impl Entry ===

impl Entry {
    /// An entry of that name with all that can be read.
    fn of(name: &str, mut from: impl Read) -> io::Result<Self> {
        let (mut hash, mut bytes) = (Sha256::new(), 0);
        let mut buffer = vec![0; 64 << 10];
        loop {
            let read = from.read(&mut buffer)?;
            if read == 0 {
                break;
            }
            hash.update(buffer.get(..read).unwrap_or_default());
            bytes += read as u64;
        }
        Ok(Self {
            name: name.to_owned(),
            bytes,
            sha256: hex(&hash.finalize()),
        })
    }

    fn code(sha256: &str, bytes: u64) -> Self {
        Self {
            name: format!("code/{sha256}.zip"),
            bytes,
            sha256: sha256.to_owned(),
        }
    }

    /// The hash of the zip that it is, where it is one.
    fn as_code(&self) -> Option<&str> {
        let sha256 = self.name.strip_prefix("code/")?.strip_suffix(".zip")?;
        (sha256 == self.sha256).then_some(sha256)
    }

    fn checking<R: Read>(&self, from: R) -> Checking<'_, R> {
        Checking {
            entry: self,
            from,
            left: self.bytes,
            hash: Sha256::new(),
        }
    }
}

// === impl Checking ===

impl<R: Read> Read for Checking<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wrong = |problem: &str| {
            let text = format!("{} {problem}", self.entry.name);
            Err(io::Error::new(io::ErrorKind::InvalidData, text))
        };
        let read = self.from.read(buffer)?;
        self.left = match self.left.checked_sub(read as u64) {
            Some(left) => left,
            None => return wrong("is larger than it was"),
        };
        self.hash.update(buffer.get(..read).unwrap_or_default());
        if read > 0 || buffer.is_empty() {
            return Ok(read);
        }
        if self.left > 0 {
            return wrong("is cut short");
        }
        if hex(&self.hash.clone().finalize()) != self.entry.sha256 {
            return wrong("is damaged: its SHA-256 is another one");
        }
        Ok(0)
    }
}

#[cfg(test)]
mod tests;
