//! Zips on their way in.

use std::io::Write as _;

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use tempfile::NamedTempFile;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::task::JoinHandle;

use super::CatalogError;
use crate::code::{CodeError, CodeStore};
use crate::failpoints::{self, Failpoint};
use crate::hex::hex;

/// How many pieces of a zip wait to be written while another is.
const QUEUE: usize = 1;

/// A zip that is written to a file and hashed as it comes in, on a thread of its own. Dropped, nothing is left of it.
#[derive(Debug)]
pub struct Upload {
    chunks: mpsc::Sender<Bytes>,
    writing: JoinHandle<Result<Staged, CodeError>>,
    size: u64,
    limit_mib: u32,
}

/// A zip that has come in. Dropped, nothing is left of it.
#[derive(Debug)]
pub struct Staged {
    pub(super) file: NamedTempFile,
    /// In lower-case hex.
    pub(super) sha256: String,
    /// Bytes.
    pub(super) size: u64,
    /// Counts it among those that may come in at a time.
    _permit: OwnedSemaphorePermit,
}

// === impl Upload ===

impl Upload {
    pub(super) fn new(codes: CodeStore, limit_mib: u32, permit: OwnedSemaphorePermit) -> Self {
        let (chunks, received) = mpsc::channel(QUEUE);
        Self {
            chunks,
            writing: tokio::task::spawn_blocking(move || write(&codes, received, permit)),
            size: 0,
            limit_mib,
        }
    }

    /// Takes the next bytes; says whether more are wanted. Where not, [`Self::finish`] tells why.
    ///
    /// # Errors
    ///
    /// [`CatalogError::ZipTooLarge`].
    pub async fn write(&mut self, chunk: Bytes) -> Result<bool, CatalogError> {
        self.size += chunk.len() as u64;
        if self.size > u64::from(self.limit_mib) << 20 {
            return Err(CatalogError::ZipTooLarge {
                limit_mib: self.limit_mib,
            });
        }
        Ok(self.chunks.send(chunk).await.is_ok())
    }

    /// The whole zip, once all of it is written.
    ///
    /// # Errors
    ///
    /// [`CatalogError::Code`] where it could not be written.
    pub async fn finish(self) -> Result<Staged, CatalogError> {
        drop(self.chunks);
        Ok(self.writing.await??)
    }
}

/// Writes what comes in until the sender is dropped.
fn write(
    codes: &CodeStore,
    mut chunks: mpsc::Receiver<Bytes>,
    permit: OwnedSemaphorePermit,
) -> Result<Staged, CodeError> {
    let mut file = codes.stage()?;
    let mut hash = Sha256::new();
    let mut size = 0;
    while let Some(chunk) = chunks.blocking_recv() {
        hash.update(&chunk);
        size += chunk.len() as u64;
        file.write_all(&chunk).map_err(|source| CodeError::Staging {
            operation: "write",
            source,
        })?;
    }
    failpoints::reach(Failpoint::ZipStaged);
    Ok(Staged {
        file,
        sha256: hex(&hash.finalize()),
        size,
        _permit: permit,
    })
}
