//! The cache folder: `${XDG_CACHE_HOME:-$HOME/.cache}/stoker`, where all that `setup` makes is kept.

use std::{
    env,
    fs::{self, File},
    io::ErrorKind,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

/// The cache folder and the checkout it serves.
#[derive(Debug)]
pub(crate) struct Cache {
    root: PathBuf,
    checkout: PathBuf,
}

impl Cache {
    /// The cache folder of this user, made if it is not there.
    pub(crate) fn open() -> Result<Self> {
        let root = match env::var_os("XDG_CACHE_HOME") {
            Some(path) if Path::new(&path).is_absolute() => PathBuf::from(path),
            _ => match env::var_os("HOME") {
                Some(home) => PathBuf::from(home).join(".cache"),
                None => {
                    bail!("neither XDG_CACHE_HOME nor HOME is set: set one, so that there is a place for the cache")
                }
            },
        }
        .join("stoker");
        fs::create_dir_all(&root).with_context(|| format!("make the cache folder {}", root.display()))?;
        let checkout = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .context("xtask's own folder has no parent")?
            .to_owned();
        Ok(Self { root, checkout })
    }

    #[cfg(test)]
    pub(crate) fn at(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            checkout: root.to_owned(),
        }
    }

    /// The folder itself.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// A path in the cache folder.
    pub(crate) fn path(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.root.join(relative)
    }

    /// A path in the checkout.
    pub(crate) fn source(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.checkout.join(relative)
    }

    /// Waits until no other `xtask` makes anything in the cache folder; the lock ends with the returned file.
    pub(crate) fn lock(&self) -> Result<File> {
        let path = self.path("lock");
        let file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                eprintln!("waiting for another cargo xtask to finish its setup");
                file.lock().with_context(|| format!("lock {}", path.display()))?;
            }
            Err(fs::TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("lock {}", path.display()));
            }
        }
        Ok(file)
    }
}

/// Removes a file or folder, if it is there.
pub(crate) fn remove(path: &Path) -> Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
