//! Program code in this machine, of functions and of layers: each zip is unpacked once, into a read-only file system of its
//! own that all its containers share. Code that no container uses goes when memory is needed for other code.

mod spool;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use stoker_archive::{Archive, ArchiveError, Limits, Size, UnpackError};
use tokio::sync::{OwnedMutexGuard, mpsc, oneshot};

/// The largest zip in bytes: none need be larger than what it may unpack to.
const ZIP_LIMIT: u64 = Limits::MOST.unzipped_bytes;
/// Chunks on their way to the file.
const CHUNKS: usize = 4;
/// Kept free for the kernel and for containers when code comes in.
const RESERVE: u64 = 16 << 20;

/// Why code could not be brought in.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CodeError {
    #[error("the SHA-256 is to be 64 hexadecimal digits in lower case")]
    Name,
    #[error("the zip is said to have {0} bytes; at most {ZIP_LIMIT} are taken")]
    Size(u64),
    #[error("the zip was announced with {announced} bytes and has {actual}")]
    Length { announced: u64, actual: u64 },
    #[error("the zip's SHA-256 is {actual}, not as announced")]
    Digest { actual: String },
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    #[error("cannot unpack the zip: {0}")]
    Unpack(#[source] UnpackError),
    #[error("{needed} bytes of memory are needed for the code and {available} are available")]
    NoRoom { needed: u64, available: u64 },
    #[error("cannot {what}: {source}")]
    Io { what: &'static str, source: std::io::Error },
}

/// Unpacked code. Its file system goes with the last one who holds it.
#[derive(Debug)]
pub(crate) struct Code {
    path: PathBuf,
}

/// All code of a function, kept while it is held.
#[derive(Clone, Debug)]
pub(crate) struct FunctionCode {
    /// Its own.
    pub(crate) own: Arc<Code>,
    /// Its layers, the last on top.
    pub(crate) layers: Vec<Arc<Code>>,
}

/// The code of this machine. Clones are the same.
#[derive(Clone)]
pub(crate) struct CodeStore(Arc<Inner>);

struct Inner {
    root: PathBuf,
    /// Mounts so far.
    mounts: AtomicU64,
    entries: Mutex<HashMap<String, Entry>>,
}

/// Held while code is brought in, so that two who bring the same do it once.
type Entry = Arc<tokio::sync::Mutex<Option<Arc<Code>>>>;

/// Code on its way in: bytes go in by the sender.
pub(crate) struct Incoming {
    pub(crate) sha256: String,
    pub(crate) size_bytes: u64,
    pub(crate) chunks: mpsc::Receiver<Bytes>,
}

// === impl Code ===

impl Code {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// A file system of this size, mounted for writing.
    fn mount(path: PathBuf, Size { bytes, files }: Size) -> Result<Self, CodeError> {
        std::fs::create_dir_all(&path).map_err(io("make a folder for the code"))?;
        let options = format!("mode=0755,size={bytes},nr_inodes={}", files + 1);
        mount(
            Some("tmpfs"),
            &path,
            Some("tmpfs"),
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
            Some(options.as_str()),
        )
        .map_err(|errno| io("mount a file system for the code")(errno.into()))?;
        Ok(Self { path })
    }

    fn seal(&self) -> Result<(), CodeError> {
        mount(
            None::<&str>,
            &self.path,
            None::<&str>,
            MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
            None::<&str>,
        )
        .map_err(|errno| io("make the code read-only")(errno.into()))
    }
}

impl Drop for Code {
    fn drop(&mut self) {
        if let Err(error) = umount2(&self.path, MntFlags::MNT_DETACH) {
            tracing::error!("cannot unmount {}: {error}", self.path.display());
        }
        let _ = std::fs::remove_dir(&self.path);
    }
}

// === impl CodeStore ===

impl CodeStore {
    /// In the folder `root`, which is to be on a tmpfs.
    pub(crate) fn new(root: PathBuf) -> std::io::Result<Self> {
        std::fs::create_dir_all(&root)?;
        Ok(Self(Arc::new(Inner {
            root,
            mounts: AtomicU64::new(0),
            entries: Mutex::default(),
        })))
    }

    /// Code without any file.
    pub(crate) fn nothing(&self) -> Result<FunctionCode, CodeError> {
        // The least that is not "as much as you like" to a tmpfs.
        let code = Code::mount(self.0.root.join("nothing"), Size { bytes: 1, files: 0 })?;
        code.seal()?;
        Ok(FunctionCode {
            own: Arc::new(code),
            layers: Vec::new(),
        })
    }

    /// The code of that SHA-256, if it is here.
    pub(crate) async fn get(&self, sha256: &str) -> Option<Arc<Code>> {
        let entry = self.entries().get(sha256).cloned()?;
        entry.lock_owned().await.clone()
    }

    /// The SHA-256 of each that is here, and not only on its way.
    pub(crate) fn list(&self) -> Vec<String> {
        let here = |entry: &Entry| entry.try_lock().is_ok_and(|code| code.is_some());
        let entries = self.entries();
        let names = entries.iter().filter(|(_, entry)| here(entry));
        names.map(|(name, _)| name.clone()).collect()
    }

    /// A sender for the bytes, and the other end.
    pub(crate) fn channel(sha256: String, size_bytes: u64) -> Result<(mpsc::Sender<Bytes>, Incoming), CodeError> {
        let digit = |c: u8| c.is_ascii_digit() || (b'a'..=b'f').contains(&c);
        if sha256.len() != 64 || !sha256.bytes().all(digit) {
            return Err(CodeError::Name);
        }
        if size_bytes > ZIP_LIMIT {
            return Err(CodeError::Size(size_bytes));
        }
        let (sender, chunks) = mpsc::channel(CHUNKS);
        Ok((
            sender,
            Incoming {
                sha256,
                size_bytes,
                chunks,
            },
        ))
    }

    /// Takes code in. True where it was here before; then the chunks are not looked at.
    pub(crate) async fn put(&self, incoming: Incoming) -> Result<bool, CodeError> {
        let name = incoming.sha256.clone();
        let mut place = self.place(&name).await;
        if place.is_some() {
            return Ok(true);
        }
        let store = self.clone();
        // The thread holds the place, and not this future, which ends at once where the call is broken off: whoever brings
        // the same code next waits until nothing is done for this call any more.
        on_a_thread(move || match store.take_in(incoming) {
            Ok(code) => {
                *place = Some(Arc::new(code));
                Ok(false)
            }
            Err(error) => {
                drop(place);
                store.forget(&name);
                Err(error)
            }
        })
        .await
    }

    /// The place of that code, for one at a time.
    async fn place(&self, name: &str) -> OwnedMutexGuard<Option<Arc<Code>>> {
        loop {
            let entry = Arc::clone(self.entries().entry(name.to_owned()).or_default());
            let place = Arc::clone(&entry).lock_owned().await;
            // It may have been let go while this one waited for it.
            if self.entries().get(name).is_some_and(|now| Arc::ptr_eq(now, &entry)) {
                return place;
            }
        }
    }

    fn take_in(&self, incoming: Incoming) -> Result<Code, CodeError> {
        self.make_room(incoming.size_bytes)?;
        // No mount lies on another: the same code may have been let go of here while a container still uses it.
        let number = self.0.mounts.fetch_add(1, Ordering::Relaxed);
        let target = self.0.root.join(format!("{}-{number}", incoming.sha256));
        let zip = spool::receive(&self.0.root, incoming)?;
        let mut archive = Archive::open(zip, Limits::MOST)?;
        self.make_room(archive.size().memory_bytes())?;
        let code = Code::mount(target, archive.size())?;
        archive.unpack(code.path()).map_err(|error| match error {
            UnpackError::Archive(error) => CodeError::Archive(error),
            error => CodeError::Unpack(error),
        })?;
        code.seal()?;
        Ok(code)
    }

    /// Lets code go that no container uses, until there is memory for `bytes`.
    fn make_room(&self, bytes: u64) -> Result<(), CodeError> {
        let needed = bytes + RESERVE;
        loop {
            let available = crate::machine::memory_available_bytes();
            if available >= needed {
                return Ok(());
            }
            let unused = self.entries().iter().find_map(|(name, entry)| {
                let code = entry.try_lock().ok()?;
                code.as_ref()
                    .is_some_and(|code| Arc::strong_count(code) == 1)
                    .then(|| name.clone())
            });
            match unused {
                Some(name) => drop(self.entries().remove(&name)),
                None => return Err(CodeError::NoRoom { needed, available }),
            }
        }
    }

    /// Takes the place of code that did not come.
    fn forget(&self, name: &str) {
        let mut entries = self.entries();
        let vacant = entries
            .get(name)
            .is_some_and(|entry| entry.try_lock().is_ok_and(|code| code.is_none()));
        if vacant {
            entries.remove(name);
        }
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        self.0.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs what blocks on a thread of its own. Tokio's own way panics where there can be no more threads, which would end
/// the machine.
async fn on_a_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, CodeError> + Send + 'static,
) -> Result<T, CodeError> {
    let (sender, done) = oneshot::channel();
    std::thread::Builder::new()
        .name("code".to_owned())
        .spawn(move || {
            // None waits for it any more where the call was broken off.
            let _ = sender.send(work());
        })
        .map_err(io("start a thread for the code"))?;
    done.await
        .unwrap_or_else(|error| Err(io("unpack the zip")(std::io::Error::other(error))))
}

fn io(what: &'static str) -> impl Fn(std::io::Error) -> CodeError {
    move |source| CodeError::Io { what, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of `hello`.
    const HELLO: &str = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";

    #[tokio::test]
    async fn a_call_that_is_broken_off_keeps_its_place_until_nothing_is_done_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let store = CodeStore::new(folder.path().to_owned()).unwrap();
        let (sender, first) = CodeStore::channel(HELLO.to_owned(), 100).unwrap();
        let entry = {
            let mut put = std::pin::pin!(store.put(first));
            tokio::select! {
                biased;
                result = &mut put => panic!("it is not whole yet: {result:?}"),
                // One more than fit: the first has been taken then.
                () = async {
                    for _ in 0..=CHUNKS {
                        sender.send(Bytes::from_static(b"x")).await.unwrap();
                    }
                } => {}
            }
            Arc::clone(store.entries().get(HELLO).unwrap())
        };
        assert!(
            entry.try_lock().is_err(),
            "another may begin while the thread still writes"
        );
        drop(sender);
        // The next one has its turn, and is told what is wrong with its own.
        let (sender, second) = CodeStore::channel(HELLO.to_owned(), 1).unwrap();
        sender.send(Bytes::from_static(b"y")).await.unwrap();
        drop(sender);
        let error = store.put(second).await.unwrap_err();
        assert!(matches!(error, CodeError::Digest { .. }), "{error}");
        assert_eq!(store.list(), Vec::<String>::new());
        assert!(store.entries().is_empty());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_place_that_was_let_go_is_not_taken() {
        let folder = tempfile::tempdir().unwrap();
        let store = CodeStore::new(folder.path().to_owned()).unwrap();
        let first = store.place(HELLO).await;
        let mut second = std::pin::pin!(store.place(HELLO));
        tokio::select! {
            biased;
            _ = &mut second => panic!("two have it"),
            () = std::future::ready(()) => {}
        }
        // As `forget` does once the first is done, and before the second has been woken.
        store.entries().remove(HELLO);
        drop(first);
        let second = second.await;
        let entry = Arc::clone(store.entries().get(HELLO).unwrap());
        assert!(entry.try_lock().is_err(), "it waits in a place that nobody finds");
        drop(second);
    }
}
