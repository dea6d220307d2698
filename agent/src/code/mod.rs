//! Program code: zips are checked as they come in ([`stoker_archive`]) and kept by their SHA-256 in an object store, a local
//! folder by default.
//!
//! The folder belongs to the first agent that opened it: `owner.json` in it names that agent's host id and database.
//! An agent with another host id adds code and reads it, but removes nothing.

use std::collections::BTreeMap;
use std::error::Error;
use std::io;
use std::iter::successors;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use object_store::buffered::BufWriter;
use object_store::local::LocalFileSystem;
use object_store::{ObjectStore, ObjectStoreExt as _};
use stoker_proto::limits::CODE_CHUNK_BYTES;
use tempfile::NamedTempFile;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio_stream::StreamExt as _;
use tokio_util::io::StreamReader;

use crate::failpoints::{self, Failpoint};
use crate::files::{FileError, read_json, write_json};
use crate::owner::{self, Owner};

/// What went wrong with kept code.
#[derive(Debug, thiserror::Error)]
pub enum CodeError {
    /// The folder could not be prepared.
    #[error("can't prepare the code folder: {}: {source}", path.display())]
    Prepare {
        /// The folder, or what could not be used in it.
        path: PathBuf,
        /// The underlying error.
        source: io::Error,
    },
    /// The folder is not this user's alone.
    #[error(transparent)]
    Folder(#[from] FileError),
    /// The object store failed.
    #[error("the code store failed to {operation}: {source}")]
    Objects {
        /// What was being done.
        operation: &'static str,
        /// The underlying error.
        source: object_store::Error,
    },
    /// A file on its way in could not be read or written.
    #[error("can't {operation} code on its way in: {source}")]
    Staging {
        /// What was being done.
        operation: &'static str,
        /// The underlying error.
        source: io::Error,
    },
    /// It could not be read to its end.
    #[error("can't read code: {0}")]
    Read(#[source] io::Error),
    /// It is not there.
    #[error("there is no code with SHA-256 {0}")]
    Missing(String),
    /// Nothing is removed, for the folder is another agent's.
    #[error(
        "the code in {} belongs to {owner}, not to {this}: nothing in it is removed. Where store.path and code.path are \
         right and the other agent is gone for good, remove {} and restart stokerd",
        folder.display(), folder.join(owner::FILE).display()
    )]
    NotOwner {
        /// The code folder.
        folder: PathBuf,
        /// Whose it is.
        owner: Box<Owner>,
        /// Who this agent is.
        this: Box<Owner>,
    },
}

// === impl CodeError ===

impl CodeError {
    /// Whether there is no room for more on its disk.
    pub fn is_disk_full(&self) -> bool {
        let is_full = |error: &(dyn Error + 'static)| {
            let io = error.downcast_ref::<io::Error>();
            io.is_some_and(|io| matches!(io.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded))
        };
        successors(Some(self as &(dyn Error + 'static)), |&error| error.source()).any(is_full)
    }
}

/// How the names of files begin that hold zips on their way in.
const UPLOAD: &str = "upload-";

/// Where the zips of functions are; clones share it.
#[derive(Debug, Clone)]
pub struct CodeStore {
    objects: Arc<dyn ObjectStore>,
    folder: PathBuf,
    /// Where zips are written as they come in.
    staging: PathBuf,
    /// Whose the folder is.
    owner: Arc<Owner>,
    /// Who this agent is.
    this: Arc<Owner>,
}

/// A zip on its way out.
pub struct CodeStream {
    size: u64,
    pieces: Pin<Box<dyn AsyncRead + Send>>,
}

// === impl CodeStore ===

impl CodeStore {
    /// Opens a folder for an agent, and makes it where it is missing, for this user alone: so nobody else reads the zips in it.
    /// One that belongs to nobody is that agent's from then on. What earlier calls left half-done is removed. Blocks.
    ///
    /// # Errors
    ///
    /// [`CodeError::Folder`], [`CodeError::Prepare`], [`CodeError::Objects`] where the folder can't be used.
    pub fn open(folder: &Path, this: &Owner) -> Result<Self, CodeError> {
        let staging = folder.join("staging");
        let objects = folder.join("objects");
        for folder in [folder, &staging, &objects] {
            crate::files::make_own_dir(folder)?;
        }
        let file = folder.join(owner::FILE);
        let owner = match read_json::<Owner>(&file).map_err(prepare(&file))? {
            Some(owner) => owner,
            None => {
                write_json(&file, this, true).map_err(prepare(&file))?;
                this.clone()
            }
        };
        remove_left(&staging, |name| name.starts_with(UPLOAD)).map_err(prepare(&staging))?;
        remove_left(&objects, is_unfinished).map_err(prepare(&objects))?;
        let local = LocalFileSystem::new_with_prefix(&objects).map_err(during("open its folder"))?;
        Ok(Self {
            objects: Arc::new(local.with_fsync(true)),
            folder: folder.to_owned(),
            staging,
            owner: Arc::new(owner),
            this: Arc::new(this.clone()),
        })
    }

    /// The code in a folder, to look at it and nothing more: the folder stays whose it is. Blocks.
    ///
    /// # Errors
    ///
    /// [`CodeError::Objects`] where it can't be read.
    pub(crate) fn look(folder: &Path) -> Result<Self, CodeError> {
        let nobody = Arc::new(Owner {
            host: ulid::Ulid::nil(),
            store: PathBuf::new(),
        });
        let local = LocalFileSystem::new_with_prefix(folder.join("objects")).map_err(during("open its folder"))?;
        Ok(Self {
            objects: Arc::new(local),
            folder: folder.to_owned(),
            staging: folder.join("staging"),
            owner: nobody.clone(),
            this: nobody,
        })
    }

    /// The file of the zip of that hash.
    pub(crate) fn file(&self, sha256: &str) -> PathBuf {
        self.folder.join("objects").join(format!("{sha256}.zip"))
    }

    /// Whether this agent may remove code. One whose database was moved is still the same.
    ///
    /// # Errors
    ///
    /// [`CodeError::NotOwner`].
    pub fn check_owner(&self) -> Result<(), CodeError> {
        if self.owner.host == self.this.host {
            return Ok(());
        }
        Err(CodeError::NotOwner {
            folder: self.folder.clone(),
            owner: Box::new(Owner::clone(&self.owner)),
            this: Box::new(Owner::clone(&self.this)),
        })
    }

    /// A file for a zip on its way in; it is gone when the handle is. Blocks.
    ///
    /// # Errors
    ///
    /// [`CodeError::Staging`].
    pub fn stage(&self) -> Result<NamedTempFile, CodeError> {
        let file = tempfile::Builder::new().prefix(UPLOAD).tempfile_in(&self.staging);
        file.map_err(|source| CodeError::Staging {
            operation: "make a file for",
            source,
        })
    }

    /// Keeps a zip under its hash; done again it changes nothing. It is on disk once this answers, which says whether it
    /// was not there before.
    ///
    /// # Errors
    ///
    /// [`CodeError::Staging`], [`CodeError::Objects`].
    pub async fn put(&self, sha256: &str, from: &Path) -> Result<bool, CodeError> {
        let new = match self.objects.head(&object(sha256)).await {
            Ok(_) => false,
            Err(object_store::Error::NotFound { .. }) => true,
            Err(source) => return Err(during("look up code")(source)),
        };
        let staging = |source| CodeError::Staging {
            operation: "read",
            source,
        };
        let mut from = tokio::fs::File::open(from).await.map_err(staging)?;
        let mut to = BufWriter::with_capacity(self.objects.clone(), object(sha256), 8 * CODE_CHUNK_BYTES);
        let copied = async {
            tokio::io::copy_buf(
                &mut tokio::io::BufReader::with_capacity(CODE_CHUNK_BYTES, &mut from),
                &mut to,
            )
            .await?;
            failpoints::reach(Failpoint::ZipCopied);
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
        failpoints::reach(Failpoint::ZipKept);
        Ok(new)
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
    /// [`CodeError::NotOwner`], [`CodeError::Objects`].
    pub async fn remove(&self, sha256: &str) -> Result<(), CodeError> {
        self.check_owner()?;
        let deleted = self.objects.delete(&object(sha256)).await;
        failpoints::reach(Failpoint::ZipRemoved);
        match deleted {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(source) => Err(during("remove code")(source)),
        }
    }

    /// The hashes of all zips that are kept, and their bytes. What is not named as a zip is passed over.
    ///
    /// # Errors
    ///
    /// [`CodeError::Objects`].
    pub async fn list(&self) -> Result<BTreeMap<String, u64>, CodeError> {
        let mut found = BTreeMap::new();
        let mut objects = self.objects.list(None);
        while let Some(meta) = objects.next().await {
            let meta = meta.map_err(during("list code"))?;
            if let Some(sha256) = meta.location.as_ref().strip_suffix(".zip")
                && is_sha256(sha256)
            {
                found.insert(sha256.to_owned(), meta.size);
            }
        }
        Ok(found)
    }
}

// === impl CodeStream ===

impl CodeStream {
    /// Bytes in all.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The next bytes: [`CODE_CHUNK_BYTES`] of them, fewer at the end, `None` after it.
    ///
    /// # Errors
    ///
    /// [`CodeError::Read`].
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, CodeError> {
        let mut chunk = BytesMut::with_capacity(CODE_CHUNK_BYTES);
        let mut limited = (&mut self.pieces).take(CODE_CHUNK_BYTES as u64);
        // An object comes in pieces far smaller than what is worth a message.
        while limited.read_buf(&mut chunk).await.map_err(CodeError::Read)? > 0 {}
        Ok((!chunk.is_empty()).then(|| chunk.freeze()))
    }
}

/// Removes what calls that did not end have left of zips.
fn remove_left(folder: &Path, is_left: fn(&str) -> bool) -> io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if is_left(&entry.file_name().to_string_lossy()) && entry.file_type()?.is_file() {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Whether it is what the object store writes a zip to before that has its name: `SHA256.zip#NUMBER`.
fn is_unfinished(name: &str) -> bool {
    name.split_once(".zip#")
        .is_some_and(|(sha256, number)| is_sha256(sha256) && number.bytes().all(|b| b.is_ascii_digit()))
}

fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

fn prepare(path: &Path) -> impl FnOnce(io::Error) -> CodeError {
    move |source| CodeError::Prepare {
        path: path.to_owned(),
        source,
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

    fn owner() -> Owner {
        Owner {
            host: ulid::Ulid::generate(),
            store: "/state".into(),
        }
    }

    fn staged(store: &CodeStore, bytes: &[u8]) -> NamedTempFile {
        let mut file = store.stage().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    async fn read(store: &CodeStore, sha256: &str) -> Vec<u8> {
        let mut stream = store.get(sha256).await.unwrap();
        let mut bytes = Vec::new();
        while let Some(chunk) = stream.chunk().await.unwrap() {
            assert!(chunk.len() == CODE_CHUNK_BYTES || bytes.len() + chunk.len() == stream.size() as usize);
            bytes.extend_from_slice(&chunk);
        }
        bytes
    }

    #[tokio::test]
    async fn code_comes_back_whole_in_large_pieces() {
        let dir = tempfile::tempdir().unwrap();
        let store = CodeStore::open(dir.path(), &owner()).unwrap();
        // Below and above the size from which an object is written in parts.
        for size in [0, 1, CODE_CHUNK_BYTES, CODE_CHUNK_BYTES + 1, 9 * CODE_CHUNK_BYTES + 7] {
            let bytes: Vec<u8> = (0..size).map(|i| (i * 31) as u8).collect();
            let name = format!("{size:064x}");
            let file = staged(&store, &bytes);
            assert!(store.put(&name, file.path()).await.unwrap());
            assert!(!store.put(&name, file.path()).await.unwrap());
            assert!(read(&store, &name).await == bytes, "{size}");
        }
    }

    #[tokio::test]
    async fn only_zips_are_listed_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let this = owner();
        let store = CodeStore::open(dir.path(), &this).unwrap();
        let file = staged(&store, b"zip");
        let [a, b] = ["a", "b"].map(|digit| digit.repeat(64));
        for name in [&a, &b] {
            store.put(name, file.path()).await.unwrap();
        }
        for other in ["notes.txt", "short.zip"] {
            std::fs::write(dir.path().join("objects").join(other), "").unwrap();
        }
        store.remove(&a).await.unwrap();
        store.remove(&a).await.unwrap();
        assert!(matches!(store.get(&a).await, Err(CodeError::Missing(_))));
        assert_eq!(store.list().await.unwrap(), [(b.clone(), 3)].into());
        // What was on its way in when the agent died is gone after the next start, and nothing else.
        let left = file.keep().unwrap().1;
        let unfinished = store.file(&b).with_extension("zip#1");
        std::fs::write(&unfinished, "zi").unwrap();
        let other = left.with_file_name("notes.txt");
        std::fs::write(&other, "").unwrap();
        CodeStore::open(dir.path(), &this).unwrap();
        assert!(!left.exists() && !unfinished.exists() && other.exists());
        assert_eq!(read(&store, &b).await, b"zip");
    }

    #[tokio::test]
    async fn code_of_another_agent_is_read_and_never_removed() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (owner(), owner());
        let store = CodeStore::open(dir.path(), &first).unwrap();
        store.put("a", staged(&store, b"zip").path()).await.unwrap();
        let other = CodeStore::open(dir.path(), &second).unwrap();
        let error = other.remove("a").await.unwrap_err();
        assert!(matches!(error, CodeError::NotOwner { .. }), "{error}");
        assert!(error.to_string().contains(&first.to_string()), "{error}");
        assert_eq!(read(&other, "a").await, b"zip");
        other.put("b", staged(&other, b"more").path()).await.unwrap();
        // The database of the first was moved.
        let moved = Owner {
            store: "/elsewhere".into(),
            ..first
        };
        let store = CodeStore::open(dir.path(), &moved).unwrap();
        store.remove("b").await.unwrap();
        // As the error advises.
        std::fs::remove_file(dir.path().join(owner::FILE)).unwrap();
        let store = CodeStore::open(dir.path(), &second).unwrap();
        store.remove("a").await.unwrap();
    }
}
