//! Folders and files of the agent, and who may use them.

use std::fs::{DirBuilder, File, Metadata, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::failpoints::{self, Failpoint};

/// Why a folder or file of the agent's state is not used.
#[derive(Debug, Clone, thiserror::Error)]
pub enum FileError {
    /// It can't be made, looked at or changed.
    #[error("can't prepare {}: {source}", path.display())]
    Prepare {
        /// The folder or file.
        path: PathBuf,
        /// The underlying error.
        source: Arc<io::Error>,
    },
    /// It is another user's.
    #[error(
        "{} belongs to the user {owner}, who could change what stokerd keeps there, and stokerd runs as the user {user}: see \
         that what is in it is right, then `chown -R {user}` it", path.display()
    )]
    Owner {
        /// The folder or file.
        path: PathBuf,
        /// Its owner's id.
        owner: u32,
        /// The id of the user that this process runs as.
        user: u32,
    },
    /// Others may write it.
    #[error(
        "{} may be written by others (mode {mode:04o}): see that what is in it is right, then `chmod go-w` it", path.display()
    )]
    Writable {
        /// The folder or file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
}

/// Makes a folder, and those above it that are missing, that only its owner and group may enter (mode 0750). One that is
/// there already is left as it is.
///
/// # Errors
///
/// Where it can't be made.
pub fn make_private_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o750).create(path)
}

/// Makes a folder that this user alone may use (mode 0700), or checks one that is there: where others could have written in
/// it, it is refused; where they may read, that is taken from them, with a line in the log.
///
/// # Errors
///
/// [`FileError`].
pub fn make_own_dir(path: &Path) -> Result<(), FileError> {
    let prepare = prepare(path);
    if let Some(above) = path.parent() {
        make_private_dir(above).map_err(&prepare)?;
    }
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(prepare(error)),
        _ => {}
    }
    own(path, &std::fs::metadata(path).map_err(&prepare)?, 0o700)
}

/// The same for a file (mode 0600), which is made empty where it is missing.
///
/// # Errors
///
/// [`FileError`].
pub fn make_own_file(path: &Path) -> Result<(), FileError> {
    let made = File::options().write(true).create_new(true).mode(0o600).open(path);
    match made {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(prepare(path)(error)),
        _ => {}
    }
    own(path, &std::fs::metadata(path).map_err(prepare(path))?, 0o600)
}

/// Reads a value from a file of JSON; `None` where there is none.
///
/// # Errors
///
/// Where it can't be read, or is not what an agent wrote.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    match std::fs::read(path) {
        Ok(text) => Ok(Some(serde_json::from_slice(&text)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes a value to a file of JSON, whole or not at all; where it is to be `synced`, it is on disk then.
///
/// # Errors
///
/// Where it can't be written.
pub fn write_json(path: &Path, value: &impl Serialize, synced: bool) -> io::Result<()> {
    let mut text = serde_json::to_vec(value)?;
    text.push(b'\n');
    let unfinished = unfinished(path);
    let write = || {
        let mut options = File::options();
        options.write(true).create(true).truncate(true).mode(0o600);
        let mut file = options.open(&unfinished)?;
        file.write_all(&text)?;
        if synced {
            file.sync_all()?;
        }
        failpoints::reach(Failpoint::JsonWritten);
        std::fs::rename(&unfinished, path)?;
        failpoints::reach(Failpoint::JsonNamed);
        if synced { sync_folder(path) } else { Ok(()) }
    };
    write().inspect_err(|_| {
        let _ = std::fs::remove_file(&unfinished);
    })
}

/// Where a file is written before it has its name. One that a crash left is written over, or goes with
/// [`remove_unfinished`].
pub(crate) fn unfinished(path: &Path) -> PathBuf {
    with_suffix(path, ".unfinished")
}

/// Removes what a crash left of a file that was being written.
///
/// # Errors
///
/// Where it can't be removed.
pub(crate) fn remove_unfinished(path: &Path) -> io::Result<()> {
    remove(&unfinished(path))
}

/// A path with something behind its last name.
pub(crate) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Removes a file; one that is not there is as good.
///
/// # Errors
///
/// Where it can't be removed.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Lets the name of a file survive a loss of power.
pub(crate) fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

/// Refuses what others could have changed; keeps them from reading it.
fn own(path: &Path, found: &Metadata, mode: u32) -> Result<(), FileError> {
    let user = nix::unistd::geteuid().as_raw();
    if found.uid() != user {
        return Err(FileError::Owner {
            path: path.to_owned(),
            owner: found.uid(),
            user,
        });
    }
    let given = found.permissions().mode() & 0o7777;
    if given & 0o022 != 0 {
        return Err(FileError::Writable {
            path: path.to_owned(),
            mode: given,
        });
    }
    if given & 0o077 == 0 {
        return Ok(());
    }
    match std::fs::set_permissions(path, Permissions::from_mode(mode)) {
        Ok(()) => {
            tracing::info!(path = %path.display(), was = format!("{given:04o}"), is = format!("{mode:04o}"), "made private");
            Ok(())
        }
        // What can't be written is said of what is written there.
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => Ok(()),
        Err(error) => Err(prepare(path)(error)),
    }
}

fn prepare(path: &Path) -> impl Fn(io::Error) -> FileError {
    let path = path.to_owned();
    move |source| FileError::Prepare {
        path: path.clone(),
        source: Arc::new(source),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn what_others_may_read_is_made_private_and_what_they_may_write_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (folder, file) = (dir.path().join("a/state"), dir.path().join("a/state/file"));
        for _ in 0..2 {
            make_own_dir(&folder).unwrap();
            make_own_file(&file).unwrap();
            assert_eq!((mode(&folder), mode(&file)), (0o700, 0o600));
        }
        std::fs::write(&file, "kept").unwrap();
        let set = |path: &Path, mode| std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        set(&folder, 0o755);
        set(&file, 0o640);
        make_own_dir(&folder).unwrap();
        make_own_file(&file).unwrap();
        assert_eq!((mode(&folder), mode(&file)), (0o700, 0o600));
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "kept");
        set(&folder, 0o770);
        set(&file, 0o602);
        for refused in [make_own_dir(&folder).unwrap_err(), make_own_file(&file).unwrap_err()] {
            assert!(matches!(refused, FileError::Writable { .. }), "{refused}");
        }
        assert_eq!((mode(&folder), mode(&file)), (0o770, 0o602), "it is left as it was");
    }

    /// Takes root.
    #[test]
    fn another_users_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("state");
        make_own_dir(&folder).unwrap();
        std::os::unix::fs::chown(&folder, Some(12345), None).unwrap();
        let refused = make_own_dir(&folder).unwrap_err();
        assert!(matches!(refused, FileError::Owner { owner: 12345, .. }), "{refused}");
    }
}
