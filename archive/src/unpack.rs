//! Unpacking: into an empty folder, nothing beside it.

use std::fs::{DirBuilder, OpenOptions, Permissions};
use std::io::{self, Read, Seek};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use crate::archive::{Archive, CopyError};
use crate::error::UnpackError;
use crate::tree::{MAX_PATH, Node};

/// The longest path in bytes of a folder that can be unpacked into: what [`MAX_PATH`] leaves of the kernel's `PATH_MAX`,
/// with a slash and the NUL.
pub const MAX_FOLDER: usize = libc::PATH_MAX as usize - MAX_PATH - 2;

// === impl Archive ===

impl<R: Read + Seek> Archive<R> {
    /// Unpacks into `folder`, which is empty and nobody else's. Everybody may read what comes of it, and run what somebody
    /// could; nobody may write. Files have the times that the zip says. Blocks.
    ///
    /// # Errors
    ///
    /// [`UnpackError`]; what was written by then stays.
    pub fn unpack(&mut self, folder: &Path) -> Result<(), UnpackError> {
        if folder.as_os_str().len() > MAX_FOLDER {
            return Err(UnpackError::Folder(folder.to_owned()));
        }
        // Folders come before what lies in them.
        for (path, node) in self.tree().iter() {
            if *node == Node::Folder {
                DirBuilder::new()
                    .mode(0o755)
                    .create(folder.join(&path))
                    .map_err(failed(&path))?;
            }
        }
        for index in 0..self.places().len() {
            self.write_file(index, folder)?;
        }
        // Last, so that nothing above was written through one.
        for (path, node) in self.tree().iter() {
            if let Node::Link(target) = node {
                symlink(target, folder.join(&path)).map_err(failed(&path))?;
            }
        }
        Ok(())
    }

    fn write_file(&mut self, index: usize, folder: &Path) -> Result<(), UnpackError> {
        let place = self.places().get(index).copied();
        let file = place.and_then(|place| match self.tree().node(place) {
            Some(Node::File { executable }) => Some((self.tree().path(place), *executable)),
            _ => None,
        });
        let Some((path, executable)) = file else {
            return Ok(());
        };
        let mut to = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(folder.join(&path))
            .map_err(failed(&path))?;
        let copied = self.copy(index, &mut to).map_err(|error| match error {
            CopyError::Archive(error) => UnpackError::Archive(error),
            CopyError::Write(source) => failed(&path)(source),
        })?;
        let mode = if executable { 0o555 } else { 0o444 };
        to.set_permissions(Permissions::from_mode(mode))
            .map_err(failed(&path))?;
        // Python takes a compiled module only where its source still has the time that it had when it was compiled.
        copied
            .modified
            .map_or(Ok(()), |time| to.set_modified(time))
            .map_err(failed(&path))
    }
}

fn failed(path: &str) -> impl FnOnce(io::Error) -> UnpackError {
    move |source| UnpackError::Write {
        path: PathBuf::from(path),
        source,
    }
}
