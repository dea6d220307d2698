//! The images that a host keeps: each once, under the digest of its configuration, by as many names as it was given.
//!
//! ```text
//! images/sha256-DIGEST/root.erofs, config.json    whole or not there: the folder is filled elsewhere and renamed
//! names/NAME -> ../images/sha256-DIGEST           a link; replaced by renaming another over it
//! partial/                                        what is being made or removed; each locked by who does it
//! lock                                            held while names and images change, for that long only
//! ```
//!
//! An image that no name leads to is removed. So is, once somebody opens the store, what a process left that ended in the
//! middle of something. Several processes may have a store open.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::SystemTime,
};

use tempfile::TempDir;

use crate::{
    config::Config,
    digest::Digest,
    error::ImageError,
    import::{self, Opened, ROOT, sync},
    limits::Limits,
    registry::{self, Credentials, Progress},
};

/// What an image's folder is called, before the digest.
const PREFIX: &str = "sha256-";
/// The longest name of an image in bytes.
const MAX_NAME: usize = 200;

/// A folder of images.
#[derive(Debug, Clone)]
pub struct Store {
    folder: PathBuf,
    limits: Limits,
}

/// An image that is kept.
#[derive(Debug)]
pub struct Image {
    /// The digest of its configuration, which names all of its content: what Docker calls the image's id. The same image has
    /// the same, whatever it was imported from.
    pub id: Digest,
    /// How it is run.
    pub config: Config,
    /// Its files, as erofs. Open, so that they can be read even if the image is removed.
    pub file: File,
    /// Where they lie, as long as the image has a name.
    pub path: PathBuf,
    /// Bytes on disk.
    pub size: u64,
    /// Since when the name leads to it.
    pub since: SystemTime,
}

/// A name that an image is kept by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// The name.
    pub name: String,
    /// Which image it leads to.
    pub id: Digest,
    /// Bytes on disk.
    pub size: u64,
    /// Since when the name leads to it.
    pub since: SystemTime,
}

/// An image that was pulled and is not kept yet: its files have no names, and are gone when this is dropped.
pub struct Fetched {
    opened: Opened,
    work: Work,
}

/// A folder in which something is made, for as long as this is there.
struct Work {
    folder: TempDir,
    /// Says that somebody is at it.
    _lock: File,
}

// === impl Store ===

impl Store {
    /// Opens the store in a folder, which is made if it is not there, and removes what is left of imports and removals that
    /// did not end. Blocks.
    ///
    /// # Errors
    ///
    /// [`ImageError::Io`]
    pub fn open(folder: &Path, limits: Limits) -> Result<Self, ImageError> {
        let store = Self {
            folder: folder.to_owned(),
            limits,
        };
        for part in [store.images(), store.names(), store.partial()] {
            fs::create_dir_all(&part).map_err(ImageError::io(format!("make {}", part.display())))?;
        }
        let work = store.begin()?;
        let _lock = store.lock()?;
        for path in paths(&store.partial())? {
            if path != work.folder.path() && is_abandoned(&path) {
                remove(&path)?;
            }
        }
        let named = store.named()?;
        for path in paths(&store.images())? {
            if !named.iter().any(|(_, id)| store.image(*id) == path) {
                move_into(&path, work.folder.path())?;
            }
        }
        sync(&store.images())?;
        Ok(store)
    }

    /// The same store, for images of other limits.
    pub fn with_limits(&self, limits: Limits) -> Self {
        Self { limits, ..self.clone() }
    }

    /// Imports what lies at a path, and gives it a name: an OCI image layout, as a folder or a tar, what `docker save` and
    /// `podman save` write, or the tar of a root file system; tars and layers may be compressed by gzip or zstd. Where there
    /// are several images, `wanted` says which: by its tag in a layout, or as `NAME:TAG`. The name may have been another
    /// image's. Blocks.
    ///
    /// # Errors
    ///
    /// [`ImageError`]; then the store is as it was.
    pub fn import(&self, name: &str, path: &Path, wanted: Option<&str>) -> Result<Image, ImageError> {
        let link = link_name(name)?;
        let work = self.begin()?;
        let opened = Opened::path(path, wanted, work.folder.path(), &self.limits)?;
        self.add(&link, opened, work)
    }

    /// Imports what comes as a stream, of the same kinds but for folders. Blocks.
    ///
    /// # Errors
    ///
    /// [`ImageError`]; then the store is as it was.
    pub fn import_stream(&self, name: &str, from: impl Read, wanted: Option<&str>) -> Result<Image, ImageError> {
        let link = link_name(name)?;
        let work = self.begin()?;
        let opened = Opened::stream(from, Path::new("the stream"), wanted, work.folder.path(), &self.limits)?;
        self.add(&link, opened, work)
    }

    /// Pulls an image from a registry, `docker.io` where the reference names none; [`Self::keep`] gives it a name. Of what is
    /// kept already no layer is pulled. Registries on this machine's own addresses are spoken to without TLS. `progress` hears
    /// of every part that comes. It may be dropped, and leaves nothing then; that blocks for a moment.
    ///
    /// # Errors
    ///
    /// [`ImageError`]; then the store is as it was.
    pub async fn fetch(
        &self,
        reference: &str,
        credentials: Option<&Credentials>,
        progress: impl Fn(Progress),
    ) -> Result<Fetched, ImageError> {
        let store = self.clone();
        let work = blocking(move || store.begin()).await?;
        let has = |id| self.has(id);
        let folder = work.folder.path();
        let (plan, files) = registry::pull(reference, credentials, &self.limits, folder, has, progress).await?;
        Ok(Fetched {
            opened: Opened::pulled(plan, files),
            work,
        })
    }

    /// Checks and keeps what was pulled, by a name, which may have been another image's. Blocks.
    ///
    /// # Errors
    ///
    /// [`ImageError`]; then the store is as it was.
    pub fn keep(&self, name: &str, fetched: Fetched) -> Result<Image, ImageError> {
        self.add(&link_name(name)?, fetched.opened, fetched.work)
    }

    /// The image of a name.
    ///
    /// # Errors
    ///
    /// [`ImageError::NotFound`], or [`ImageError::Io`].
    pub fn get(&self, name: &str) -> Result<Image, ImageError> {
        let link = link_name(name)?;
        let _lock = self.lock_shared()?;
        let id = self
            .id_of(&link)?
            .ok_or_else(|| ImageError::NotFound(name.to_owned()))?;
        self.load(&link, id)
    }

    /// All names, in order, and the images that they lead to.
    ///
    /// # Errors
    ///
    /// [`ImageError::Io`]
    pub fn list(&self) -> Result<Vec<Named>, ImageError> {
        let _lock = self.lock_shared()?;
        let mut named = Vec::new();
        for (link, id) in self.named()? {
            named.push(Named {
                size: self.size(id)?,
                since: self.since(&link)?,
                name: link.replace('+', "/"),
                id,
            });
        }
        named.sort_unstable_by(|one, other| one.name.cmp(&other.name));
        Ok(named)
    }

    /// Takes a name away, and the image with its last one. Who has it open can read on; its disk space is free after that.
    ///
    /// # Errors
    ///
    /// [`ImageError::NotFound`], or [`ImageError::Io`].
    pub fn remove(&self, name: &str) -> Result<(), ImageError> {
        let link = link_name(name)?;
        let work = self.begin()?;
        let _lock = self.lock()?;
        let id = self
            .id_of(&link)?
            .ok_or_else(|| ImageError::NotFound(name.to_owned()))?;
        let path = self.names().join(&link);
        fs::remove_file(&path).map_err(ImageError::io(format!("remove {}", path.display())))?;
        sync(&self.names())?;
        self.remove_unnamed(id, &work)
    }

    /// Whether an image is kept.
    fn has(&self, id: Digest) -> bool {
        self.image(id).is_dir()
    }

    /// Makes the image, if it is not kept yet, and gives it a name.
    fn add(&self, link: &str, opened: Opened, work: Work) -> Result<Image, ImageError> {
        let id = opened.plan.id();
        if self.has(id) {
            let _lock = self.lock()?;
            // Else it was removed just now.
            if self.has(id) {
                self.give_name(link, id, &work)?;
                return self.load(link, id);
            }
        }
        let made = work.folder.path().join("image");
        fs::create_dir(&made).map_err(ImageError::io(format!("make {}", made.display())))?;
        opened.build(&made, work.folder.path(), &self.limits)?;
        let _lock = self.lock()?;
        // Somebody else may have made it meanwhile.
        if !self.has(id) {
            let path = self.image(id);
            fs::rename(&made, &path).map_err(ImageError::io(format!("make {}", path.display())))?;
            sync(&self.images())?;
        }
        self.give_name(link, id, &work)?;
        self.load(link, id)
    }

    /// Has a name lead to an image, and removes the one that it led to if it was its last.
    fn give_name(&self, link: &str, id: Digest, work: &Work) -> Result<(), ImageError> {
        let before = self.id_of(link)?;
        if before == Some(id) {
            return Ok(());
        }
        let (new, path) = (work.folder.path().join("name"), self.names().join(link));
        symlink(format!("../images/{PREFIX}{}", id.hex()), &new)
            .and_then(|()| fs::rename(&new, &path))
            .map_err(ImageError::io(format!("make {}", path.display())))?;
        sync(&self.names())?;
        before.map_or(Ok(()), |before| self.remove_unnamed(before, work))
    }

    fn remove_unnamed(&self, id: Digest, work: &Work) -> Result<(), ImageError> {
        if self.named()?.iter().any(|(_, named)| *named == id) {
            return Ok(());
        }
        // It goes with the folder of the work.
        move_into(&self.image(id), work.folder.path())?;
        sync(&self.images())
    }

    fn load(&self, link: &str, id: Digest) -> Result<Image, ImageError> {
        let folder = self.image(id);
        let path = folder.join(ROOT);
        let file = File::open(&path).map_err(ImageError::io(format!("open {}", path.display())))?;
        Ok(Image {
            id,
            config: import::read_config(&folder)?,
            file,
            path,
            size: self.size(id)?,
            since: self.since(link)?,
        })
    }

    /// Bytes of an image on disk.
    fn size(&self, id: Digest) -> Result<u64, ImageError> {
        let path = self.image(id).join(ROOT);
        let found = fs::metadata(&path).map_err(ImageError::io(format!("look at {}", path.display())))?;
        Ok(found.len())
    }

    /// Since when a name leads to what it leads to: its link is made anew for another.
    fn since(&self, link: &str) -> Result<SystemTime, ImageError> {
        let path = self.names().join(link);
        let found = fs::symlink_metadata(&path).and_then(|link| link.modified());
        found.map_err(ImageError::io(format!("look at {}", path.display())))
    }

    /// What a name leads to.
    fn id_of(&self, link: &str) -> Result<Option<Digest>, ImageError> {
        let path = self.names().join(link);
        match fs::read_link(&path) {
            Ok(target) => Ok(id_of(&target)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(ImageError::io(format!("read {}", path.display()))(error)),
        }
    }

    /// All names, as they are on disk, and what they lead to.
    fn named(&self) -> Result<Vec<(String, Digest)>, ImageError> {
        let mut named = Vec::new();
        for path in paths(&self.names())? {
            let Some(link) = path.file_name().and_then(|link| link.to_str()) else {
                continue;
            };
            if let Some(id) = self.id_of(link)? {
                named.push((link.to_owned(), id));
            }
        }
        Ok(named)
    }

    /// A folder to make something in.
    fn begin(&self) -> Result<Work, ImageError> {
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

    fn lock(&self) -> Result<File, ImageError> {
        self.locked(File::lock)
    }

    fn lock_shared(&self) -> Result<File, ImageError> {
        self.locked(File::lock_shared)
    }

    fn locked(&self, how: fn(&File) -> io::Result<()>) -> Result<File, ImageError> {
        let path = self.folder.join("lock");
        let opened = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        opened
            .and_then(|file| how(&file).map(|()| file))
            .map_err(ImageError::io(format!("lock {}", path.display())))
    }

    fn image(&self, id: Digest) -> PathBuf {
        self.images().join(format!("{PREFIX}{}", id.hex()))
    }

    fn images(&self) -> PathBuf {
        self.folder.join("images")
    }

    fn names(&self) -> PathBuf {
        self.folder.join("names")
    }

    fn partial(&self) -> PathBuf {
        self.folder.join("partial")
    }
}

/// What a name is called on disk, where no slash may be.
fn link_name(name: &str) -> Result<String, ImageError> {
    let is_good = name.len() <= MAX_NAME
        && name.starts_with(|first: char| first.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "._-:/".contains(c));
    if is_good {
        Ok(name.replace('/', "+"))
    } else {
        Err(ImageError::Name(name.to_owned()))
    }
}

fn id_of(target: &Path) -> Option<Digest> {
    Digest::from_hex(target.file_name()?.to_str()?.strip_prefix(PREFIX)?).ok()
}

fn paths(folder: &Path) -> Result<Vec<PathBuf>, ImageError> {
    let entries = fs::read_dir(folder).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    let entries = entries.map_err(ImageError::io(format!("list {}", folder.display())))?;
    Ok(entries.into_iter().map(|entry| entry.path()).collect())
}

/// Whether nobody is at work in a folder any more.
fn is_abandoned(path: &Path) -> bool {
    File::open(path).is_ok_and(|folder| folder.try_lock().is_ok())
}

fn remove(path: &Path) -> Result<(), ImageError> {
    let removed = match fs::remove_dir_all(path) {
        // Somebody ended its work just now.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    };
    removed.map_err(ImageError::io(format!("remove {}", path.display())))
}

/// Moves an image to where things are removed.
fn move_into(path: &Path, folder: &Path) -> Result<(), ImageError> {
    let Some(name) = path.file_name() else { return Ok(()) };
    fs::rename(path, folder.join(name)).map_err(ImageError::io(format!("remove {}", path.display())))
}

/// Runs what blocks where that is allowed.
async fn blocking<T: Send + 'static>(
    run: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
) -> Result<T, ImageError> {
    let done = tokio::task::spawn_blocking(run).await;
    done.unwrap_or_else(|error| Err(ImageError::io("import the image")(io::Error::other(error))))
}
