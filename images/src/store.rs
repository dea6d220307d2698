//! The images that a host keeps: each once, under the digest of its configuration, by as many names as it was given.
//!
//! ```text
//! images/sha256-DIGEST/root.erofs, config.json    whole or not there: the folder is filled elsewhere and renamed
//! names/NAME -> ../images/sha256-DIGEST           a link; replaced by renaming another over it
//! partial/                                        what is being made or removed; each locked by who does it
//! lock                                            held while names and images change, for that long only
//! ```
//!
//! An image that no name leads to is removed once nobody has it open either: who has holds a lock on its `root.erofs` (`flock`),
//! which the kernel keeps for as long as any process has the file that was opened, and lets go of whatever becomes of that process. So
//! what is still read is still in its place, and is counted ([`Store::sweep`]). What a process left that ended in the middle of
//! something is removed once somebody opens the store. Several processes may have a store open.

mod disk;

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::SystemTime,
};

use tempfile::TempDir;

use self::disk::{
    exists, id_of, is_abandoned, is_open, link_name, measure, move_into, name_of, open_root, paths, remove, target,
};
use crate::{
    config::Config,
    digest::Digest,
    error::ImageError,
    import::{self, Opened, ROOT, sync},
    limits::Limits,
    registry::{self, Credentials, Progress},
};

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
    /// Its files, as erofs. As long as this is open, here or in a process that it was handed on to, the image stays where it is,
    /// even if its names are taken away.
    pub file: File,
    /// Where they lie.
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
    /// Some of its files are missing, so that it can't be run. To import or pull it again makes it whole.
    pub is_damaged: bool,
    /// Since when the name leads to it.
    pub since: SystemTime,
}

/// What images take of the disk, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// All of them, each once for all of its names.
    pub all: u64,
    /// Of these, the ones that have no name any more and stay because somebody has them open.
    pub unnamed: u64,
    /// Whether there is any image or name, whatever can be measured of it.
    pub has_any: bool,
}

/// What came of a sweep. The images that go are removed as this is dropped, which takes its time where they are large.
#[must_use = "what was swept is removed as this is dropped: not while others wait"]
pub struct Swept {
    /// What the other images take.
    pub usage: Usage,
    removed: Option<Work>,
}

/// An image that was pulled and is not kept yet: its files have no names, and are gone when this is dropped.
pub struct Fetched {
    opened: Opened,
    work: Work,
    /// Where the image was kept already, and so was not pulled: has it stay, whatever becomes of its names meanwhile.
    _held: Option<File>,
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
    /// [`ImageError::NamesLost`], or [`ImageError::Io`].
    pub fn open(folder: &Path, limits: Limits) -> Result<Self, ImageError> {
        let store = Self {
            folder: folder.to_owned(),
            limits,
        };
        let (names, images) = (store.names(), store.images());
        // Else all images would be ones that no name leads to.
        if !exists(&names)? && exists(&images)? && !paths(&images)?.is_empty() {
            return Err(ImageError::NamesLost { names, images });
        }
        for part in [names, images, store.partial()] {
            fs::create_dir_all(&part).map_err(ImageError::io(format!("make {}", part.display())))?;
        }
        let work = store.begin()?;
        let _lock = store.lock()?;
        for path in paths(&store.partial())? {
            if path != work.folder.path() && is_abandoned(&path) {
                remove(&path)?;
            }
        }
        store.sweep_into(&work)?;
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
        let mut held = None;
        // What can't be opened is pulled.
        let has = |id| {
            held = self.hold(id).ok().flatten();
            held.is_some()
        };
        let folder = work.folder.path();
        let (plan, files) = registry::pull(reference, credentials, &self.limits, folder, has, progress).await?;
        Ok(Fetched {
            opened: Opened::pulled(plan, files),
            work,
            _held: held,
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
    /// [`ImageError::NotFound`], [`ImageError::Damaged`], or [`ImageError::Io`].
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
            let (size, is_whole) = measure(&self.image(id));
            named.push(Named {
                name: name_of(&link),
                id,
                size,
                is_damaged: !is_whole,
                since: self.since(&link)?,
            });
        }
        named.sort_unstable_by(|one, other| one.name.cmp(&other.name));
        Ok(named)
    }

    /// Takes a name away, and the image with its last one, or once nobody has it open any more ([`Self::sweep`]).
    ///
    /// # Errors
    ///
    /// [`ImageError::NotFound`], or [`ImageError::Io`].
    pub fn remove(&self, name: &str) -> Result<(), ImageError> {
        let link = link_name(name)?;
        let work = self.begin()?;
        let _lock = self.lock()?;
        let path = self.names().join(&link);
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(ImageError::NotFound(name.to_owned()));
            }
            removed => removed.map_err(ImageError::io(format!("remove {}", path.display())))?,
        }
        sync(&self.names())?;
        // The name is gone all the same: the next sweep removes the image, or tells why it can't.
        let _ = self.sweep_into(&work);
        Ok(())
    }

    /// Removes the images that no name leads to and nobody has open any more, and says what the others take. Blocks.
    ///
    /// # Errors
    ///
    /// [`ImageError::Io`]
    pub fn sweep(&self) -> Result<Swept, ImageError> {
        let work = self.begin()?;
        let _lock = self.lock()?;
        let (usage, has_removed) = self.sweep_into(&work)?;
        let removed = has_removed.then_some(work);
        Ok(Swept { usage, removed })
    }

    /// Removes the folder of a store in which nothing is; whatever is in it stays. Blocks.
    ///
    /// # Errors
    ///
    /// [`ImageError::Io`], also where something is in it: then the store is to be opened again before it is used.
    pub fn remove_empty(&self) -> Result<(), ImageError> {
        let _lock = self.lock()?;
        let failed = |path: &Path| ImageError::io(format!("remove {}", path.display()));
        // Images that have lost their names could not be told from those that were deleted, so the names go after them.
        for part in [self.partial(), self.images(), self.names()] {
            fs::remove_dir(&part).map_err(failed(&part))?;
        }
        let lock = self.lock_path();
        fs::remove_file(&lock).map_err(failed(&lock))?;
        fs::remove_dir(&self.folder).map_err(failed(&self.folder))
    }

    /// Makes the image, if it is not kept yet, and gives it a name.
    fn add(&self, link: &str, opened: Opened, work: Work) -> Result<Image, ImageError> {
        let id = opened.plan.id();
        if self.is_whole(id) {
            let _lock = self.lock()?;
            // Else it was removed just now.
            if self.is_whole(id) {
                self.give_name(link, id, &work)?;
                return self.load(link, id);
            }
        }
        let made = work.folder.path().join("image");
        fs::create_dir(&made).map_err(ImageError::io(format!("make {}", made.display())))?;
        opened.build(&made, work.folder.path(), &self.limits)?;
        let _lock = self.lock()?;
        // Somebody else may have made it meanwhile.
        if !self.is_whole(id) {
            let path = self.image(id);
            // What is left of one that is damaged.
            move_into(&path, work.folder.path())?;
            fs::rename(&made, &path).map_err(ImageError::io(format!("make {}", path.display())))?;
            sync(&self.images())?;
        }
        self.give_name(link, id, &work)?;
        self.load(link, id)
    }

    /// Has a name lead to an image, and removes the one that it led to if it was its last.
    fn give_name(&self, link: &str, id: Digest, work: &Work) -> Result<(), ImageError> {
        // A link that leads to no image is made anew.
        if self.id_of(link).is_ok_and(|before| before == Some(id)) {
            return Ok(());
        }
        let (new, path) = (work.folder.path().join("name"), self.names().join(link));
        symlink(target(id), &new)
            .and_then(|()| fs::rename(&new, &path))
            .map_err(ImageError::io(format!("make {}", path.display())))?;
        sync(&self.names())?;
        // As where a name is taken away.
        let _ = self.sweep_into(work);
        Ok(())
    }

    /// The same as [`Self::sweep`], by who has the lock. What is removed goes with the folder of the work; says whether anything does.
    fn sweep_into(&self, work: &Work) -> Result<(Usage, bool), ImageError> {
        let named: BTreeSet<Digest> = self.named()?.into_iter().map(|(_, id)| id).collect();
        let mut usage = Usage {
            has_any: !named.is_empty(),
            ..Usage::default()
        };
        let mut has_removed = false;
        for path in paths(&self.images())? {
            // Whatever else lies there is not ours.
            let Some(id) = id_of(&path) else { continue };
            let is_named = named.contains(&id);
            if !is_named && !is_open(&path) {
                move_into(&path, work.folder.path())?;
                has_removed = true;
                continue;
            }
            let (size, _) = measure(&path);
            usage.has_any = true;
            usage.all = usage.all.saturating_add(size);
            if !is_named {
                usage.unnamed = usage.unnamed.saturating_add(size);
            }
        }
        if has_removed {
            sync(&self.images())?;
        }
        Ok((usage, has_removed))
    }

    /// Has an image stay that is kept and whole, for as long as the file is open.
    fn hold(&self, id: Digest) -> Result<Option<File>, ImageError> {
        let _lock = self.lock_shared()?;
        if !self.is_whole(id) {
            return Ok(None);
        }
        open_root(&self.image(id)).map(Some)
    }

    fn load(&self, link: &str, id: Digest) -> Result<Image, ImageError> {
        let folder = self.image(id);
        let (size, is_whole) = measure(&folder);
        if !is_whole {
            return Err(ImageError::Damaged(name_of(link)));
        }
        Ok(Image {
            id,
            config: import::read_config(&folder)?,
            file: open_root(&folder)?,
            path: folder.join(ROOT),
            size,
            since: self.since(link)?,
        })
    }

    /// Whether an image is kept, with all of its files.
    fn is_whole(&self, id: Digest) -> bool {
        measure(&self.image(id)).1
    }

    /// Since when a name leads to what it leads to: its link is made anew for another.
    fn since(&self, link: &str) -> Result<SystemTime, ImageError> {
        let path = self.names().join(link);
        let found = fs::symlink_metadata(&path).and_then(|link| link.modified());
        found.map_err(ImageError::io(format!("look at {}", path.display())))
    }
}

// === impl Swept ===

impl Swept {
    /// Whether images go.
    pub fn has_removed(&self) -> bool {
        self.removed.is_some()
    }
}

/// Runs what blocks where that is allowed.
async fn blocking<T: Send + 'static>(
    run: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
) -> Result<T, ImageError> {
    let done = tokio::task::spawn_blocking(run).await;
    done.unwrap_or_else(|error| Err(ImageError::io("import the image")(io::Error::other(error))))
}
