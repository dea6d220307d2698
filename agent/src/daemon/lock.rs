//! Keeps a second agent out of this one's folders.

use std::fs::{File, TryLockError};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

/// A folder's lock, held until it is dropped or the process ends.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// Why a folder can't be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another agent holds it.
    #[error("stokerd is already running{} and uses {}; stop it first, or give this one folders and a socket of its own",
        pid.map_or_else(String::new, |pid| format!(" (pid {pid})")), folder.display())]
    Running {
        /// The other agent, where its lock names it.
        pid: Option<u32>,
        /// The folder.
        folder: PathBuf,
    },
    /// The lock file could not be made or written.
    #[error("can't lock {}: {source}", path.display())]
    File {
        /// The lock file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

// === impl Lock ===

impl Lock {
    /// Locks a folder, and makes it where it is missing. Blocks, but never for long.
    ///
    /// # Errors
    ///
    /// [`LockError`].
    pub fn take(folder: &Path) -> Result<Self, LockError> {
        let path = folder.join("stokerd.lock");
        let failed = |source| LockError::File {
            path: path.clone(),
            source,
        };
        crate::files::make_private_dir(folder).map_err(failed)?;
        let mut file = File::options()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path)
            .map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                let _ = file.read_to_string(&mut holder);
                return Err(LockError::Running {
                    pid: holder.trim().parse().ok(),
                    folder: folder.to_owned(),
                });
            }
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        file.set_len(0)
            .and_then(|()| file.seek(SeekFrom::Start(0)))
            .and_then(|_| writeln!(file, "{}", std::process::id()))
            .map_err(failed)?;
        Ok(Self { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("state");
        let lock = Lock::take(&folder).unwrap();
        let error = Lock::take(&folder).unwrap_err().to_string();
        let pid = format!("already running (pid {})", std::process::id());
        assert!(error.contains(&pid), "{error}");
        drop(lock);
        Lock::take(&folder).unwrap();
    }
}
