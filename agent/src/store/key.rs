//! The host's key, with which the values of environment variables are encrypted at rest: XChaCha20-Poly1305, whose nonces are
//! long enough to be random. The database names the key by its id; the key itself is never in it.

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chacha20poly1305::aead::{Aead as _, Generate as _, KeyInit as _, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use sha2::{Digest as _, Sha256};

use crate::failpoints::{self, Failpoint};
use crate::files;
use crate::hex::hex;

/// The file in `store.path` that holds the key where `store.key` names no other.
pub const FILE: &str = "environment.key";

/// Bytes of a key.
const KEY: usize = 32;

/// Bytes of a nonce, which stands before what is sealed.
const NONCE: usize = 24;

/// Why the key can't be used. Nothing was changed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum KeyError {
    /// There is no file.
    #[error(
        "there is no key {} (store.key), and the values of environment variables are encrypted with it: put the key {id} back \
         there from where a copy is kept; without it nobody can read them", path.display()
    )]
    Missing {
        /// The key file.
        path: PathBuf,
        /// The id of the key that is needed.
        id: String,
    },
    /// It is another key.
    #[error(
        "{} (store.key) holds the key {found}, and the values of environment variables are encrypted with the key {id}: put \
         that one there", path.display()
    )]
    Wrong {
        /// The key file.
        path: PathBuf,
        /// The id of the key in it.
        found: String,
        /// The id of the key that is needed.
        id: String,
    },
    /// It is no key.
    #[error("{} (store.key) is not a key: that has {KEY} bytes", path.display())]
    Malformed {
        /// The key file.
        path: PathBuf,
    },
    /// Others may use it.
    #[error(
        "{} (store.key) may be read or written by others (mode {mode:04o}): `chmod 600` it, and since they may know it, \
         `stoker admin rotate-key` once stokerd runs", path.display()
    )]
    Open {
        /// The key file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// It can't be read, written or removed.
    #[error("can't {operation} the key {} (store.key): {source}", path.display())]
    File {
        /// What was being done.
        operation: &'static str,
        /// The key file.
        path: PathBuf,
        /// The underlying error.
        source: Arc<io::Error>,
    },
    /// The kernel gives no random bytes.
    #[error("can't make a key: the kernel gives no random bytes")]
    Random,
}

/// A key.
pub(crate) struct Key {
    bytes: [u8; KEY],
    cipher: XChaCha20Poly1305,
    id: String,
}

/// Which value it is: one that is sealed for another variable, version or function does not open.
#[derive(Debug, Clone, Copy)]
pub(super) struct About<'a> {
    /// The unique id of its function.
    pub(super) uid: &'a str,
    pub(super) version: i64,
    /// The variable's name.
    pub(super) name: &'a str,
}

// === impl Key ===

impl Key {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(super) fn generate() -> Result<Self, KeyError> {
        let bytes = chacha20poly1305::Key::try_generate().map_err(|_| KeyError::Random)?;
        Ok(Self::new(bytes.into()))
    }

    fn new(bytes: [u8; KEY]) -> Self {
        let digest = Sha256::new()
            .chain_update("stoker environment key")
            .chain_update(bytes)
            .finalize();
        let mut id = hex(&digest);
        id.truncate(16);
        Self {
            bytes,
            cipher: XChaCha20Poly1305::new(&bytes.into()),
            id,
        }
    }

    /// What tells it from others, and nothing more.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// The key in a file; `None` where there is none.
    pub(crate) fn read(path: &Path) -> Result<Option<Self>, KeyError> {
        let failed = failed("read", path);
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let mode = file.metadata().map_err(&failed)?.permissions().mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(KeyError::Open {
                path: path.to_owned(),
                mode,
            });
        }
        let mut bytes = Vec::new();
        file.take(KEY as u64 + 1).read_to_end(&mut bytes).map_err(&failed)?;
        match bytes.try_into() {
            Ok(bytes) => Ok(Some(Self::new(bytes))),
            Err(_) => Err(KeyError::Malformed { path: path.to_owned() }),
        }
    }

    /// Writes it to a file that is not there yet, whole or not at all; it is on disk then.
    pub(crate) fn write(&self, path: &Path) -> Result<(), KeyError> {
        let unfinished = files::unfinished(path);
        let write = || {
            files::remove_unfinished(path)?;
            let mut options = File::options();
            let mut file = options.write(true).create_new(true).mode(0o600).open(&unfinished)?;
            file.write_all(&self.bytes)?;
            file.sync_all()?;
            failpoints::reach(Failpoint::KeyWritten);
            // Never over another.
            std::fs::hard_link(&unfinished, path)?;
            failpoints::reach(Failpoint::KeyNamed);
            files::remove_unfinished(path)?;
            files::sync_folder(path)
        };
        write().map_err(|error| {
            let _ = files::remove_unfinished(path);
            failed("write", path)(error)
        })
    }

    pub(super) fn seal(&self, about: About<'_>, value: &str) -> Result<Vec<u8>, KeyError> {
        let nonce = XNonce::try_generate().map_err(|_| KeyError::Random)?;
        let aad = about.bytes();
        let payload = Payload {
            msg: value.as_bytes(),
            aad: &aad,
        };
        // Fails for messages of 256 GiB alone.
        let sealed = self.cipher.encrypt(&nonce, payload).map_err(|_| KeyError::Random)?;
        Ok([nonce.as_slice(), &sealed].concat())
    }

    /// `None` where it was not sealed by this key for this.
    pub(super) fn open(&self, about: About<'_>, sealed: &[u8]) -> Option<String> {
        let (nonce, sealed) = sealed.split_first_chunk::<NONCE>()?;
        let aad = about.bytes();
        let payload = Payload { msg: sealed, aad: &aad };
        let value = self.cipher.decrypt(&XNonce::from(*nonce), payload).ok()?;
        String::from_utf8(value).ok()
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Key").field("id", &self.id).finish_non_exhaustive()
    }
}

impl About<'_> {
    /// No two are alike: ids are of one length, and the name is what is left.
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = format!("{:>26}", self.uid).into_bytes();
        bytes.extend(self.version.to_le_bytes());
        bytes.extend(self.name.as_bytes());
        bytes
    }
}

// === files ===

/// A key file, as a restore needs it, and a key for it.
pub(crate) struct KeyFile {
    path: PathBuf,
    key: Option<Key>,
}

impl KeyFile {
    pub(crate) fn of(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            key: None,
        }
    }

    /// Whether the key of that id is in it.
    pub(crate) fn has(&self, id: &str) -> Result<bool, KeyError> {
        Ok(Key::read(&self.path)?.is_some_and(|key| key.id == id))
    }

    /// With a key for it; `None` where that is none.
    pub(crate) fn with(&self, key: &[u8]) -> Option<Self> {
        Some(Self {
            path: self.path.clone(),
            key: Some(Key::new(key.try_into().ok()?)),
        })
    }

    /// Whether its new key is the one of that id.
    pub(crate) fn is(&self, id: &str) -> bool {
        self.key.as_ref().is_some_and(|key| key.id == id)
    }

    /// Puts the new key beside the one that is there, and keeps that under another name too, since a database that is replaced
    /// needs it.
    pub(crate) fn write_next(&self) -> Result<(), KeyError> {
        let Some(key) = &self.key else { return Ok(()) };
        if let Some(old) = Key::read(&self.path)? {
            let kept = files::with_suffix(&self.path, &format!(".{}", old.id));
            match std::fs::hard_link(&self.path, &kept) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(failed("keep", &self.path)(error));
                }
                _ => {}
            }
            failpoints::reach(Failpoint::KeyKept);
        }
        let next = next(&self.path);
        files::remove(&next).map_err(failed("remove", &next))?;
        key.write(&next)
    }
}

/// The key of an id, as [`find`] does it, but nothing is put right.
pub(super) fn look(path: &Path, id: &str) -> Result<Key, KeyError> {
    match Key::read(&next(path))? {
        Some(new) if new.id == id => Ok(new),
        _ => match Key::read(path)? {
            Some(key) if key.id == id => Ok(key),
            Some(other) => Err(KeyError::Wrong {
                path: path.to_owned(),
                found: other.id,
                id: id.to_owned(),
            }),
            None => Err(KeyError::Missing {
                path: path.to_owned(),
                id: id.to_owned(),
            }),
        },
    }
}

/// Where a new key lies until the database names it.
fn next(path: &Path) -> PathBuf {
    files::with_suffix(path, ".new")
}

/// The key of an id, in its file or, where a rotation was not finished, in the file of the new one. What a rotation left is
/// put right: the key of that id is in its place then, and no other beside it.
pub(super) fn find(path: &Path, id: &str) -> Result<Key, KeyError> {
    let (key, new) = (Key::read(path)?, Key::read(&next(path))?);
    match (key, new) {
        (Some(key), new) if key.id == id => {
            if new.is_some() {
                discard(path)?;
            }
            Ok(key)
        }
        (_, Some(new)) if new.id == id => {
            replace(path)?;
            Ok(new)
        }
        (Some(other), _) => Err(KeyError::Wrong {
            path: path.to_owned(),
            found: other.id,
            id: id.to_owned(),
        }),
        (None, _) => Err(KeyError::Missing {
            path: path.to_owned(),
            id: id.to_owned(),
        }),
    }
}

/// The key in the file, or a new one that is in it then.
pub(super) fn find_or_make(path: &Path) -> Result<Key, KeyError> {
    if let Some(key) = Key::read(path)? {
        return Ok(key);
    }
    let key = Key::generate()?;
    key.write(path)?;
    tracing::info!(key = %path.display(), id = key.id, "made a key for environment variables; keep a copy of it elsewhere");
    Ok(key)
}

/// A new key, beside the one in the file.
pub(super) fn make_next(path: &Path) -> Result<Key, KeyError> {
    let key = Key::generate()?;
    key.write(&next(path))?;
    Ok(key)
}

fn replace(path: &Path) -> Result<(), KeyError> {
    std::fs::rename(next(path), path).map_err(failed("replace", path))?;
    failpoints::reach(Failpoint::KeyReplaced);
    files::sync_folder(path).map_err(failed("write", path))
}

fn discard(path: &Path) -> Result<(), KeyError> {
    std::fs::remove_file(next(path)).map_err(failed("remove", &next(path)))?;
    failpoints::reach(Failpoint::KeyDiscarded);
    Ok(())
}

/// Removes what a crash left of a key that was being written.
pub(super) fn remove_unfinished(path: &Path) -> Result<(), KeyError> {
    for path in [path, &next(path)] {
        match files::remove_unfinished(path) {
            // It is said of what is to be written there.
            Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {}
            removed => removed.map_err(failed("remove what is left of", path))?,
        }
    }
    Ok(())
}

fn failed(operation: &'static str, path: &Path) -> impl Fn(io::Error) -> KeyError {
    let path = path.to_owned();
    move |source| KeyError::File {
        operation,
        path: path.clone(),
        source: Arc::new(source),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ABOUT: About<'_> = About {
        uid: "01ARZ3NDEKTSV4RRFFQ69G5FAV",
        version: 1,
        name: "TOKEN",
    };

    #[test]
    fn a_value_opens_with_its_key_in_its_place_alone() {
        let (key, other) = (Key::generate().unwrap(), Key::generate().unwrap());
        let sealed = key.seal(ABOUT, "välue").unwrap();
        assert_eq!(key.open(ABOUT, &sealed).as_deref(), Some("välue"));
        assert_ne!(key.seal(ABOUT, "välue").unwrap(), sealed, "each has a nonce of its own");
        assert_eq!(other.open(ABOUT, &sealed), None);
        for elsewhere in [
            About { name: "TOKEM", ..ABOUT },
            About { version: 2, ..ABOUT },
            About {
                uid: "01ARZ3NDEKTSV4RRFFQ69G5FAW",
                ..ABOUT
            },
        ] {
            assert_eq!(key.open(elsewhere, &sealed), None, "{elsewhere:?}");
        }
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert_eq!(key.open(ABOUT, &changed), None, "{at}");
            assert_eq!(key.open(ABOUT, &sealed[..at]), None, "{at}");
        }
    }

    #[test]
    fn files_are_keys_or_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        assert!(Key::read(&path).unwrap().is_none());
        let key = find_or_make(&path).unwrap();
        let metadata = std::fs::metadata(&path).unwrap();
        assert_eq!((metadata.len(), metadata.permissions().mode() & 0o7777), (32, 0o600));
        assert_eq!(find_or_make(&path).unwrap().id, key.id);
        assert_eq!(find(&path, &key.id).unwrap().bytes, key.bytes);
        assert!(Key::generate().unwrap().write(&path).is_err(), "none is overwritten");
        let other = find(&path, "0011223344556677").unwrap_err();
        assert!(
            matches!(other, KeyError::Wrong { .. }) && other.to_string().contains(&key.id),
            "{other}"
        );
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        let open = Key::read(&path).unwrap_err();
        assert!(open.to_string().contains("mode 0640"), "{open}");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        for bytes in [0, 31, 33] {
            std::fs::write(&path, vec![1; bytes]).unwrap();
            let error = Key::read(&path).unwrap_err();
            assert!(matches!(error, KeyError::Malformed { .. }), "{error}");
        }
        std::fs::remove_file(&path).unwrap();
        let missing = find(&path, &key.id).unwrap_err();
        assert!(
            matches!(missing, KeyError::Missing { .. }) && missing.to_string().contains(&key.id),
            "{missing}"
        );
    }
}
