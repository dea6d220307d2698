//! Locks that keep a second agent out of what this one uses.

use std::fs::{File, TryLockError};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a process may take from its fork to its exec.
const EXEC_LIMIT: Duration = Duration::from_secs(1);

/// A lock on a folder or a cgroup, held until it is dropped or the process ends.
#[derive(Debug)]
pub struct Lock {
    file: File,
}

/// Why something can't be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another agent holds it.
    #[error(
        "stokerd is already running{} and uses {} ({setting}); stop it first, or set {setting} of this one to something \
         else. Two agents on a host share none of api.socket, store.path, code.path, machines.run_dir and machines.cgroup",
        pid.map_or_else(String::new, |pid| format!(" (pid {pid})")), path.display()
    )]
    Running {
        /// The other agent's process, where that is known.
        pid: Option<u32>,
        /// The folder or cgroup.
        path: PathBuf,
        /// The key of the configuration that names it.
        setting: &'static str,
    },
    /// It could not be opened, or its lock file could not be written.
    #[error("can't lock {} ({setting}): {source}", path.display())]
    File {
        /// The lock file, or the cgroup.
        path: PathBuf,
        /// The key of the configuration that names it.
        setting: &'static str,
        /// The underlying error.
        source: io::Error,
    },
}

// === impl Lock ===

impl Lock {
    /// Locks a folder by the file `stokerd.lock` in it, and makes the folder where it is missing. `setting` is the key of
    /// the configuration that names it. Blocks, but never for long.
    ///
    /// # Errors
    ///
    /// [`LockError`].
    pub fn folder(folder: &Path, setting: &'static str) -> Result<Self, LockError> {
        let path = folder.join("stokerd.lock");
        let failed = |source| LockError::File {
            path: path.clone(),
            setting,
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
        if !lock(&file, || holder(&file).is_some_and(lives)).map_err(failed)? {
            return Err(LockError::Running {
                pid: holder(&file),
                path: folder.to_owned(),
                setting,
            });
        }
        file.set_len(0)
            .and_then(|()| file.seek(SeekFrom::Start(0)))
            .and_then(|_| writeln!(file, "{}", std::process::id()))
            .map_err(failed)?;
        Ok(Self { file })
    }

    /// Locks a cgroup by its folder itself, for no file can be made in it.
    ///
    /// # Errors
    ///
    /// [`LockError`].
    pub fn cgroup(path: &Path, setting: &'static str) -> Result<Self, LockError> {
        let failed = |source| LockError::File {
            path: path.to_owned(),
            setting,
            source,
        };
        let file = File::open(path).map_err(failed)?;
        if lock(&file, || false).map_err(failed)? {
            Ok(Self { file })
        } else {
            Err(LockError::Running {
                pid: None,
                path: path.to_owned(),
                setting,
            })
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing it would do, but for a child between its fork and its exec, which holds the file open too.
        let _ = self.file.unlock();
    }
}

/// Locks a file. Where another process holds it that is not known to be an agent which `lives`, that may be what an agent which
/// was killed had begun to start: between its fork and its exec it holds all that the agent held.
fn lock(file: &File, lives: impl Fn() -> bool) -> io::Result<bool> {
    let begun = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(true),
            Err(TryLockError::Error(source)) => return Err(source),
            Err(TryLockError::WouldBlock) if lives() || begun.elapsed() > EXEC_LIMIT => return Ok(false),
            Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// The process that wrote itself into a lock file.
fn holder(mut file: &File) -> Option<u32> {
    let mut text = String::new();
    file.seek(SeekFrom::Start(0)).ok()?;
    file.read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

fn lives(pid: u32) -> bool {
    Path::new("/proc").join(pid.to_string()).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("state");
        let lock = Lock::folder(&folder, "store.path").unwrap();
        let error = Lock::folder(&folder, "store.path").unwrap_err().to_string();
        let pid = format!("already running (pid {})", std::process::id());
        assert!(error.contains(&pid) && error.contains("set store.path"), "{error}");
        drop(lock);
        Lock::folder(&folder, "store.path").unwrap();
    }

    #[test]
    fn what_a_dead_agent_had_begun_to_start_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let lock = Lock::folder(dir.path(), "store.path").unwrap();
        // As a child holds it.
        let child = lock.file.try_clone().unwrap();
        // No process has so high a number (PID_MAX_LIMIT).
        std::fs::write(dir.path().join("stokerd.lock"), "4194305").unwrap();
        std::mem::forget(lock);
        let exec = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            child.unlock().unwrap();
        });
        Lock::folder(dir.path(), "store.path").unwrap();
        exec.join().unwrap();
    }
}
