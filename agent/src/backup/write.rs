//! Makes an archive.

use std::fs::File;
use std::io::{self, Read, Write};

use bytes::{Buf as _, Bytes};
use tokio::runtime::Handle;

use super::{BackupError, DATABASE, Entry, FORMAT, KEY, MANIFEST, Manifest};
use crate::code::{CodeStore, CodeStream};
use crate::failpoints::{self, Failpoint};
use crate::store::Snapshot;

/// Writes an archive of a database and the code that it needs. Blocks; the code is read on that runtime.
///
/// # Errors
///
/// [`BackupError`]; what was written is no archive then.
pub(crate) fn write(
    snapshot: &Snapshot,
    codes: &CodeStore,
    key: Option<&[u8]>,
    runtime: &Handle,
    to: impl Write,
) -> Result<(), BackupError> {
    let database = Entry::of(DATABASE, snapshot.file()?).map_err(BackupError::archive("make"))?;
    let code = snapshot.codes.iter().map(|(sha256, bytes)| Entry::code(sha256, *bytes));
    let key_entry = key.map(|key| Entry::of(KEY, key)).transpose();
    let key_entry = key_entry.map_err(BackupError::archive("make"))?;
    let manifest = Manifest {
        format: FORMAT,
        stokerd: env!("CARGO_PKG_VERSION").to_owned(),
        host: snapshot.host,
        schema: snapshot.schema,
        files: std::iter::once(database).chain(code).chain(key_entry).collect(),
    };
    let failed = BackupError::archive("write");
    let text = serde_json::to_vec(&manifest).map_err(|error| failed(error.into()))?;
    let mut archive = tar::Builder::new(to);
    append(&mut archive, MANIFEST, text.len() as u64, text.as_slice()).map_err(&failed)?;
    for entry in &manifest.files {
        let from: Box<dyn Read> = match (entry.as_code(), key) {
            (Some(sha256), _) => Box::new(CodeReader {
                stream: runtime.block_on(codes.get(sha256))?,
                chunk: Bytes::new(),
                runtime,
            }),
            (None, Some(key)) if entry.name == KEY => Box::new(key),
            (None, _) => Box::new(snapshot.file()?),
        };
        append(&mut archive, &entry.name, entry.bytes, entry.checking(from)).map_err(&failed)?;
        failpoints::reach(Failpoint::EntryArchived);
    }
    archive.into_inner().and_then(|mut to| to.flush()).map_err(&failed)
}

fn append(archive: &mut tar::Builder<impl Write>, name: &str, bytes: u64, from: impl Read) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes);
    header.set_mode(0o600);
    archive.append_data(&mut header, name, from)
}

/// A zip as it is read from the code store.
struct CodeReader<'a> {
    stream: CodeStream,
    chunk: Bytes,
    runtime: &'a Handle,
}

impl Read for CodeReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if !self.chunk.has_remaining() {
            let chunk = self.runtime.block_on(self.stream.chunk()).map_err(io::Error::other)?;
            self.chunk = chunk.unwrap_or_default();
        }
        let read = self.chunk.len().min(buffer.len());
        self.chunk.copy_to_slice(buffer.get_mut(..read).unwrap_or_default());
        Ok(read)
    }
}

// Read twice: for its hash, and into the archive.
impl Snapshot {
    fn file(&self) -> Result<File, BackupError> {
        File::open(self.path()).map_err(BackupError::archive("make"))
    }
}
