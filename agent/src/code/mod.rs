//! Program code: zips are checked as they come in ([`stoker_archive`]) and kept by their SHA-256 in an object store, a local
//! folder by default.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use object_store::buffered::BufWriter;
use object_store::local::LocalFileSystem;
use object_store::{ObjectStore, ObjectStoreExt as _};
use tempfile::NamedTempFile;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio_stream::StreamExt as _;
use tokio_util::io::StreamReader;

/// The bytes that a [`CodeStream`] gives at a time.
pub const CHUNK: usize = 1 << 20;

/// What went wrong with kept code.
#[derive(Debug, thiserror::Error)]
pub enum CodeError {
    /// The folder could not be prepared.
    #[error("can't prepare the code folder {}: {source}", path.display())]
    Prepare {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The object store failed.
    #[error("the code store failed to {operation}: {source}")]
    Objects {
        /// What was being done.
        operation: &'static str,
        /// Why.
        source: object_store::Error,
    },
    /// A file on its way in could not be read or written.
    #[error("can't {operation} code on its way in: {source}")]
    Staging {
        /// What was being done.
        operation: &'static str,
        /// Why.
        source: io::Error,
    },
    /// It could not be read to its end.
    #[error("can't read code: {0}")]
    Read(#[source] io::Error),
    /// It is not there.
    #[error("there is no code with SHA-256 {0}")]
    Missing(String),
}

/// Where the zips of functions are; clones share it.
#[derive(Debug, Clone)]
pub struct CodeStore {
    objects: Arc<dyn ObjectStore>,
    /// Where zips are written as they come in; emptied at each start.
    staging: PathBuf,
}

/// A zip on its way out.
pub struct CodeStream {
    size: u64,
    pieces: Pin<Box<dyn AsyncRead + Send>>,
}

// === impl CodeStore ===

impl CodeStore {
    /// Opens a folder, and makes it where it is missing. What earlier calls left half-done is removed. Blocks.
    ///
    /// # Errors
    ///
    /// [`CodeError::Prepare`], [`CodeError::Objects`] where the folder can't be used.
    pub fn open(folder: &Path) -> Result<Self, CodeError> {
        let staging = folder.join("staging");
        let objects = folder.join("objects");
        let prepare = |source| CodeError::Prepare {
            path: folder.to_owned(),
            source,
        };
        match std::fs::remove_dir_all(&staging) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(prepare(error));
            }
            _ => {}
        }
        for folder in [&staging, &objects] {
            crate::files::make_private_dir(folder).map_err(prepare)?;
        }
        let local = LocalFileSystem::new_with_prefix(&objects).map_err(during("open its folder"))?;
        Ok(Self {
            objects: Arc::new(local.with_fsync(true)),
            staging,
        })
    }

    /// A file for a zip on its way in; it is gone when the handle is. Blocks.
    ///
    /// # Errors
    ///
    /// [`CodeError::Staging`].
    pub fn stage(&self) -> Result<NamedTempFile, CodeError> {
        NamedTempFile::new_in(&self.staging).map_err(|source| CodeError::Staging {
            operation: "make a file for",
            source,
        })
    }

    /// Keeps a zip under its hash; done again it changes nothing. It is on disk once this answers.
    ///
    /// # Errors
    ///
    /// [`CodeError::Staging`], [`CodeError::Objects`].
    pub async fn put(&self, sha256: &str, from: &Path) -> Result<(), CodeError> {
        let staging = |source| CodeError::Staging {
            operation: "read",
            source,
        };
        let mut from = tokio::fs::File::open(from).await.map_err(staging)?;
        let mut to = BufWriter::with_capacity(self.objects.clone(), object(sha256), 8 * CHUNK);
        let copied = async {
            tokio::io::copy_buf(&mut tokio::io::BufReader::with_capacity(CHUNK, &mut from), &mut to).await?;
            to.shutdown().await
        }
        .await;
        if let Err(source) = copied {
            // Nothing is kept of it; that this fails too changes nothing for the caller.
            let _ = to.abort().await;
            return Err(CodeError::Staging {
                operation: "keep",
                source,
            });
        }
        Ok(())
    }

    /// The zip of that hash.
    ///
    /// # Errors
    ///
    /// [`CodeError::Missing`], [`CodeError::Objects`]; also in the middle of the stream.
    pub async fn get(&self, sha256: &str) -> Result<CodeStream, CodeError> {
        let found = self.objects.get(&object(sha256)).await.map_err(|source| match source {
            object_store::Error::NotFound { .. } => CodeError::Missing(sha256.to_owned()),
            source => during("read code")(source),
        })?;
        let size = found.meta.size;
        let pieces = found.into_stream().map(|piece| piece.map_err(io::Error::from));
        Ok(CodeStream {
            size,
            pieces: Box::pin(StreamReader::new(pieces)),
        })
    }

    /// Removes a zip; one that isn't there is removed already.
    ///
    /// # Errors
    ///
    /// [`CodeError::Objects`].
    pub async fn remove(&self, sha256: &str) -> Result<(), CodeError> {
        match self.objects.delete(&object(sha256)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(source) => Err(during("remove code")(source)),
        }
    }

    /// Removes every zip whose hash is not among these: what a crash left between keeping code and its function. Answers
    /// how many went.
    ///
    /// # Errors
    ///
    /// [`CodeError::Objects`].
    pub async fn keep_only(&self, needed: &BTreeSet<String>) -> Result<usize, CodeError> {
        let mut removed = 0;
        let mut objects = self.objects.list(None);
        while let Some(found) = objects.next().await {
            let location = found.map_err(during("list code"))?.location;
            let keep = location
                .filename()
                .and_then(|name| name.strip_suffix(".zip"))
                .is_some_and(|hash| needed.contains(hash));
            if !keep {
                self.objects.delete(&location).await.map_err(during("remove code"))?;
                removed += 1;
            }
        }
        Ok(removed)
    }
}

// === impl CodeStream ===

impl CodeStream {
    /// Bytes in all.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The next bytes: [`CHUNK`] of them, fewer at the end, `None` after it.
    ///
    /// # Errors
    ///
    /// [`CodeError::Read`].
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, CodeError> {
        let mut chunk = BytesMut::with_capacity(CHUNK);
        let mut limited = (&mut self.pieces).take(CHUNK as u64);
        // An object comes in pieces far smaller than what is worth a message.
        while limited.read_buf(&mut chunk).await.map_err(CodeError::Read)? > 0 {}
        Ok((!chunk.is_empty()).then(|| chunk.freeze()))
    }
}

fn object(sha256: &str) -> object_store::path::Path {
    object_store::path::Path::from(format!("{sha256}.zip"))
}

fn during(operation: &'static str) -> impl FnOnce(object_store::Error) -> CodeError {
    move |source| CodeError::Objects { operation, source }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn staged(store: &CodeStore, bytes: &[u8]) -> NamedTempFile {
        let mut file = store.stage().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    async fn read(store: &CodeStore, sha256: &str) -> Vec<u8> {
        let mut stream = store.get(sha256).await.unwrap();
        let mut bytes = Vec::new();
        while let Some(chunk) = stream.chunk().await.unwrap() {
            assert!(chunk.len() == CHUNK || bytes.len() + chunk.len() == stream.size() as usize);
            bytes.extend_from_slice(&chunk);
        }
        bytes
    }

    #[tokio::test]
    async fn code_comes_back_whole_in_large_pieces() {
        let dir = tempfile::tempdir().unwrap();
        let store = CodeStore::open(dir.path()).unwrap();
        // Below and above the size from which an object is written in parts.
        for size in [0, 1, CHUNK, CHUNK + 1, 9 * CHUNK + 7] {
            let bytes: Vec<u8> = (0..size).map(|i| (i * 31) as u8).collect();
            let name = format!("{size:064x}");
            let file = staged(&store, &bytes);
            store.put(&name, file.path()).await.unwrap();
            store.put(&name, file.path()).await.unwrap();
            assert!(read(&store, &name).await == bytes, "{size}");
        }
    }

    #[tokio::test]
    async fn what_is_not_needed_goes() {
        let dir = tempfile::tempdir().unwrap();
        let store = CodeStore::open(dir.path()).unwrap();
        let file = staged(&store, b"zip");
        for name in ["a", "b", "c"] {
            store.put(name, file.path()).await.unwrap();
        }
        store.remove("a").await.unwrap();
        store.remove("a").await.unwrap();
        assert!(matches!(store.get("a").await, Err(CodeError::Missing(_))));
        assert_eq!(store.keep_only(&["c".to_owned()].into()).await.unwrap(), 1);
        assert!(store.get("b").await.is_err());
        assert_eq!(read(&store, "c").await, b"zip");
        // What was on its way in when the agent died is gone after the next start.
        let left = file.keep().unwrap().1;
        CodeStore::open(dir.path()).unwrap();
        assert!(!left.exists());
    }
}
