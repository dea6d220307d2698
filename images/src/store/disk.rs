//! What a store has on the disk: its folders, names and locks.

use std::{
    fs::{self, File, OpenOptions},
    io,
    path::{Path, PathBuf},
};

use super::{Store, Work};
use crate::{
    digest::Digest,
    error::ImageError,
    import::{CONFIG, ROOT},
};

/// What an image's folder is called, before the digest.
const PREFIX: &str = "sha256-";
/// The longest name of an image in bytes.
const MAX_NAME: usize = 200;

// === impl Store ===

impl Store {
    /// What a name leads to.
    pub(super) fn id_of(&self, link: &str) -> Result<Option<Digest>, ImageError> {
        let path = self.names().join(link);
        match fs::read_link(&path) {
            Ok(target) => id_of(&target).map(Some).ok_or_else(|| no_name(&path)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(ImageError::io(format!("read {}", path.display()))(error)),
        }
    }

    /// All names, as they are on disk, and what they lead to. Of all or of none: an image without a name is removed.
    pub(super) fn named(&self) -> Result<Vec<(String, Digest)>, ImageError> {
        let mut named = Vec::new();
        for path in paths(&self.names())? {
            let link = path.file_name().and_then(|link| link.to_str());
            let link = link.ok_or_else(|| no_name(&path))?;
            if let Some(id) = self.id_of(link)? {
                named.push((link.to_owned(), id));
            }
        }
        Ok(named)
    }

    /// A folder to make something in.
    pub(super) fn begin(&self) -> Result<Work, ImageError> {
        // Nobody looks for what was abandoned between its making and its lock.
        let _lock = self.lock_shared()?;
        let partial = self.partial();
        let making = || ImageError::io(format!("make a folder in {}", partial.display()));
        let folder = tempfile::Builder::new()
            .prefix("")
            .tempdir_in(&partial)
            .map_err(making())?;
        let lock = File::open(folder.path())
            .and_then(|lock| lock.lock().map(|()| lock))
            .map_err(making())?;
        Ok(Work { folder, _lock: lock })
    }

    pub(super) fn lock(&self) -> Result<File, ImageError> {
        self.locked(File::lock)
    }

    pub(super) fn lock_shared(&self) -> Result<File, ImageError> {
        self.locked(File::lock_shared)
    }

    fn locked(&self, how: fn(&File) -> io::Result<()>) -> Result<File, ImageError> {
        let path = self.lock_path();
        let opened = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        opened
            .and_then(|file| how(&file).map(|()| file))
            .map_err(ImageError::io(format!("lock {}", path.display())))
    }

    pub(super) fn lock_path(&self) -> PathBuf {
        self.folder.join("lock")
    }

    pub(super) fn image(&self, id: Digest) -> PathBuf {
        self.images().join(format!("{PREFIX}{}", id.hex()))
    }

    pub(super) fn images(&self) -> PathBuf {
        self.folder.join("images")
    }

    pub(super) fn names(&self) -> PathBuf {
        self.folder.join("names")
    }

    pub(super) fn partial(&self) -> PathBuf {
        self.folder.join("partial")
    }
}

/// What a name is called on disk, where no slash may be.
pub(super) fn link_name(name: &str) -> Result<String, ImageError> {
    let is_good = name.len() <= MAX_NAME
        && name.starts_with(|first: char| first.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "._-:/".contains(c));
    if is_good {
        Ok(name.replace('/', "+"))
    } else {
        Err(ImageError::Name(name.to_owned()))
    }
}

/// The name that is called so on disk.
pub(super) fn name_of(link: &str) -> String {
    link.replace('+', "/")
}

/// Which image is kept there; none where it is no place of one.
pub(super) fn id_of(image: &Path) -> Option<Digest> {
    Digest::from_hex(image.file_name()?.to_str()?.strip_prefix(PREFIX)?).ok()
}

/// What lies among the names and is none.
fn no_name(path: &Path) -> ImageError {
    let leads_nowhere = io::Error::new(io::ErrorKind::InvalidData, "it leads to no image; remove it");
    ImageError::io(format!("read {}", path.display()))(leads_nowhere)
}

/// Where a name leads that is an image's.
pub(super) fn target(id: Digest) -> String {
    format!("../images/{PREFIX}{}", id.hex())
}

pub(super) fn exists(path: &Path) -> Result<bool, ImageError> {
    let found = path.try_exists();
    found.map_err(ImageError::io(format!("look at {}", path.display())))
}

pub(super) fn paths(folder: &Path) -> Result<Vec<PathBuf>, ImageError> {
    let entries = fs::read_dir(folder).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    let entries = entries.map_err(ImageError::io(format!("list {}", folder.display())))?;
    Ok(entries.into_iter().map(|entry| entry.path()).collect())
}

/// Whether nobody is at work in a folder any more.
pub(super) fn is_abandoned(path: &Path) -> bool {
    File::open(path).is_ok_and(|folder| folder.try_lock().is_ok())
}

pub(super) fn remove(path: &Path) -> Result<(), ImageError> {
    let removed = match fs::remove_dir_all(path) {
        // Somebody ended its work just now.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    };
    removed.map_err(ImageError::io(format!("remove {}", path.display())))
}

/// Moves an image to where things are removed, if it is there.
pub(super) fn move_into(path: &Path, folder: &Path) -> Result<(), ImageError> {
    let Some(name) = path.file_name() else { return Ok(()) };
    match fs::rename(path, folder.join(name)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        moved => moved.map_err(ImageError::io(format!("remove {}", path.display()))),
    }
}

/// Bytes of an image's files, and whether all of them are there. What can't be looked at is as good as missing.
pub(super) fn measure(image: &Path) -> (u64, bool) {
    let sizes = [ROOT, CONFIG].map(|part| fs::metadata(image.join(part)).map_or(0, |found| found.len()));
    let all = sizes.iter().copied().fold(0, u64::saturating_add);
    (all, sizes.iter().all(|size| *size > 0))
}

/// Opens the files of an image, and locks them for as long as any process has what was opened. Who calls this has the store's lock,
/// so that nobody is about to remove them.
pub(super) fn open_root(image: &Path) -> Result<File, ImageError> {
    let path = image.join(ROOT);
    let opened = File::open(&path).and_then(|root| root.lock_shared().map(|()| root));
    opened.map_err(ImageError::io(format!("open {}", path.display())))
}

/// Whether somebody has an image's files open, or it can't be told.
pub(super) fn is_open(image: &Path) -> bool {
    match File::open(image.join(ROOT)) {
        Ok(root) => root.try_lock().is_err(),
        Err(error) => !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory),
    }
}
