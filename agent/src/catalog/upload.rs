//! Zips on their way in.

use std::io::Write as _;
use std::sync::Arc;

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use stoker_proto::limits::LAYERS;
use tempfile::NamedTempFile;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::task::JoinHandle;

use super::CatalogError;
use crate::code::{CodeError, CodeStore};
use crate::failpoints::{self, Failpoint};
use crate::hex::hex;
use crate::store::Layer;

/// How many pieces of a zip wait to be written while another is.
const QUEUE: usize = 1;

/// The zips of a function, of which one is written to a file and hashed as it comes in, on a thread of its own. Dropped,
/// nothing is left of them.
#[derive(Debug)]
pub struct Upload {
    codes: CodeStore,
    limit_mib: u32,
    /// The function's own, once it is whole.
    code: Option<Zip>,
    /// Those that are whole.
    layers: Vec<Zip>,
    coming: Coming,
    /// Counts it among the calls that may bring zips at a time, until nothing of them is left.
    permit: Arc<OwnedSemaphorePermit>,
}

/// The zip that comes in.
#[derive(Debug)]
struct Coming {
    chunks: mpsc::Sender<Bytes>,
    writing: JoinHandle<Result<Zip, CodeError>>,
    size: u64,
}

/// All zips of a function, which have come in. Dropped, nothing is left of them.
#[derive(Debug)]
pub struct Staged {
    /// Its own.
    pub(super) code: Zip,
    /// In their order.
    pub(super) layers: Vec<Zip>,
    _permit: Arc<OwnedSemaphorePermit>,
}

/// A zip in a file that is gone with this.
#[derive(Debug)]
pub(super) struct Zip {
    pub(super) file: NamedTempFile,
    /// In lower-case hex.
    pub(super) sha256: String,
    /// Bytes.
    pub(super) size: u64,
}

// === impl Zip ===

impl Zip {
    pub(super) fn to_layer(&self) -> Layer {
        Layer {
            code_sha256: self.sha256.clone(),
            code_size: self.size,
        }
    }
}

// === impl Upload ===

impl Upload {
    pub(super) fn new(codes: CodeStore, limit_mib: u32, permit: OwnedSemaphorePermit) -> Self {
        let permit = Arc::new(permit);
        Self {
            coming: Coming::begin(&codes, &permit),
            codes,
            limit_mib,
            code: None,
            layers: Vec::new(),
            permit,
        }
    }

    /// Takes the next bytes; says whether more are wanted. Where not, [`Self::finish`] tells why.
    ///
    /// # Errors
    ///
    /// [`CatalogError::ZipTooLarge`].
    pub async fn write(&mut self, chunk: Bytes) -> Result<bool, CatalogError> {
        self.coming.size += chunk.len() as u64;
        if self.coming.size > u64::from(self.limit_mib) << 20 {
            return Err(CatalogError::ZipTooLarge {
                layer: self.code.is_some().then_some(self.layers.len() + 1),
                limit_mib: self.limit_mib,
            });
        }
        Ok(self.coming.chunks.send(chunk).await.is_ok())
    }

    /// What came is a whole zip; what comes from now on is a layer, or the next one.
    ///
    /// # Errors
    ///
    /// [`CatalogError::TooManyLayers`], [`CatalogError::Code`] where the zip could not be written.
    pub async fn begin_layer(&mut self) -> Result<(), CatalogError> {
        if self.code.is_some() && self.layers.len() + 1 >= LAYERS {
            return Err(CatalogError::TooManyLayers);
        }
        let next = Coming::begin(&self.codes, &self.permit);
        let whole = std::mem::replace(&mut self.coming, next).finish().await?;
        match self.code {
            None => self.code = Some(whole),
            Some(_) => self.layers.push(whole),
        }
        Ok(())
    }

    /// All of them, once all is written.
    ///
    /// # Errors
    ///
    /// [`CatalogError::Code`] where the last could not be written.
    pub async fn finish(mut self) -> Result<Staged, CatalogError> {
        let last = self.coming.finish().await?;
        let code = match self.code {
            None => last,
            Some(code) => {
                self.layers.push(last);
                code
            }
        };
        Ok(Staged {
            code,
            layers: self.layers,
            _permit: self.permit,
        })
    }
}

// === impl Coming ===

impl Coming {
    fn begin(codes: &CodeStore, permit: &Arc<OwnedSemaphorePermit>) -> Self {
        let (chunks, received) = mpsc::channel(QUEUE);
        let (codes, permit) = (codes.clone(), permit.clone());
        let write = move || {
            let _permit = permit;
            write(&codes, received)
        };
        Self {
            chunks,
            writing: tokio::task::spawn_blocking(write),
            size: 0,
        }
    }

    async fn finish(self) -> Result<Zip, CatalogError> {
        drop(self.chunks);
        Ok(self.writing.await??)
    }
}

/// Writes what comes in until the sender is dropped.
fn write(codes: &CodeStore, mut chunks: mpsc::Receiver<Bytes>) -> Result<Zip, CodeError> {
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
    Ok(Zip {
        file,
        sha256: hex(&hash.finalize()),
        size,
    })
}
