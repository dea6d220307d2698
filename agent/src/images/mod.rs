//! The container images of accounts: taken in, kept, listed and removed. No transport.
//!
//! Each account has a store of its own ([`stoker_images::Store`]), in `images/ACCOUNT` in `store.path`: in a shared one, who knows
//! what another's image is named by could have it without having its content. The files are all that there is; in memory it is only
//! known how much of the disk accounts take, so that images stay within what they may have. All that touches files runs on
//! threads that may block.

mod accounts;
mod pace;
mod room;
mod take;

use std::fs::File;
use std::io;
use std::ops::Bound;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use stoker_images::{Config as ImageConfig, Digest, ImageError, Named, Store};
use tokio::sync::Semaphore;

use self::accounts::Accounts;
pub use self::pace::Pace;
use self::room::Rules;
pub use self::take::{Import, Pull, Pulling, Slot, Source};
use crate::config::Config;
use crate::files::{self, FileError};
use crate::names::{AccountName, ImageName};

/// The folder of images, in `store.path`.
const FOLDER: &str = "images";

/// How long an image may take to come in.
pub(crate) const TAKE_LIMIT: Duration = Duration::from_secs(3600);

/// How often images are looked for that were deleted and whose last machine has ended.
const SWEEP_INTERVAL: Duration = Duration::from_secs(10);

/// The images of this host; clones share them.
#[derive(Clone)]
pub struct Images(Arc<Inner>);

struct Inner {
    folder: PathBuf,
    rules: Rules,
    /// For each image that may be taken in at a time.
    slots: Arc<Semaphore>,
    /// Locked by threads that may block alone, since files are looked at and folders made meanwhile.
    accounts: Mutex<Accounts>,
}

/// An image as it is shown.
#[derive(Debug, Clone)]
pub struct Image {
    /// Its name.
    pub name: ImageName,
    /// What names its content.
    pub id: Digest,
    /// Bytes on disk.
    pub size: u64,
    /// Files of it are missing: it has to be taken in again.
    pub is_damaged: bool,
    /// Since when the name leads to that content.
    pub since: SystemTime,
    /// How it is run; none in lists.
    pub config: Option<ImageConfig>,
}

/// An image that is to be run.
#[derive(Debug)]
pub struct Opened {
    /// What names its content.
    pub id: Digest,
    /// How it is run.
    pub config: ImageConfig,
    /// Its root file system. As long as any process has it open the image stays, and counts as its account's, even if it is
    /// deleted: whatever becomes of the agent.
    pub file: Arc<File>,
}

/// Why something could not be done with images.
#[derive(Debug, thiserror::Error)]
pub enum ImagesError {
    /// There is no image of that name.
    #[error("there is no image {0}")]
    NotFound(ImageName),
    /// Some of its files are missing.
    #[error(
        "{0} is damaged: files of it are missing where it is kept; delete it, or import or pull it again, which may need it to be \
         deleted first: what is left of it counts"
    )]
    Damaged(ImageName),
    /// As many images are taken in as may be.
    #[error("this agent takes in {limit} images at a time (limits.concurrent_imports); try again in a moment")]
    Busy {
        /// The most that may be taken in at a time.
        limit: u32,
    },
    /// An account takes in one at a time.
    #[error("accounts/{account} takes in an image already, and one at a time; try again in a moment")]
    AccountBusy {
        /// The account's id.
        account: String,
    },
    /// The account has as many names as it may.
    #[error("accounts/{account} has as many images as it may ({limit}, account.images); delete some")]
    Names {
        /// The account's id.
        account: String,
        /// The most that it may have.
        limit: u32,
    },
    /// It is larger than what the account has left of the disk.
    #[error(
        "the image takes more than the {} MiB of the disk that accounts/{account} has left for images (account.images_mib); \
         delete some; what was deleted counts until no machine runs it any more", left >> 20
    )]
    AccountFull {
        /// The account's id.
        account: String,
        /// Bytes that it has left.
        left: u64,
    },
    /// It is larger than what the host has left for images, or for one of those that may be taken in at a time.
    #[error(
        "the image is larger than the {} MiB that this host has for one now (limits.images_mib; while an image is taken in it needs \
         three times what it unpacks to); delete some", left >> 20
    )]
    HostFull {
        /// Bytes that it may have.
        left: u64,
    },
    /// Nothing is pulled from there.
    #[error("images are not pulled from {0} here (limits.registries)")]
    Registry(String),
    /// The image is refused, or could not be read or written.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// It has not come in time.
    #[error("the image took more than {} to come in", humantime::format_duration(TAKE_LIMIT))]
    TooLong,
    /// It comes more slowly than it may.
    #[error("the image comes in too slowly: {0} is the least, so that it keeps no others from coming in")]
    TooSlow(Pace),
    /// Nobody waits for it any more.
    #[error("the pull was given up")]
    Abandoned,
    /// The folder of images can't be used.
    #[error(transparent)]
    Folder(#[from] FileError),
    /// It is not known how much of the disk is free.
    #[error("can't find out how much is free in store.path ({}): {source}; or set limits.images_mib", path.display())]
    Disk {
        /// The folder.
        path: PathBuf,
        /// The underlying error.
        source: io::Error,
    },
    /// A task of this agent panicked; the log says where.
    #[error("a part of the agent panicked: {0}")]
    Panicked(#[from] tokio::task::JoinError),
}

// === impl ImagesError ===

impl ImagesError {
    /// For a name, whose account's folder may just have gone with its last image.
    fn of(name: &ImageName, error: ImageError) -> Self {
        match error {
            ImageError::NotFound(_) => Self::NotFound(name.clone()),
            ImageError::Damaged(_) => Self::Damaged(name.clone()),
            ImageError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => Self::NotFound(name.clone()),
            other => Self::Image(other),
        }
    }
}

// === impl Images ===

impl Images {
    /// Finds what accounts have, and removes what an agent left that ended while it took an image in or removed one. An account
    /// whose folder can't be used is named in the log, and tried again when it is asked for. Blocks.
    ///
    /// # Errors
    ///
    /// [`ImagesError::Folder`] where others could have changed the images, [`ImagesError::Disk`].
    pub fn open(config: &Config) -> Result<Self, ImagesError> {
        let folder = config.store.path.join(FOLDER);
        let mut accounts = Accounts::default();
        if folder.exists() {
            files::make_own_dir(&folder)?;
            accounts.find(&folder);
        }
        let rules = Rules::of(config, accounts.used())?;
        let slots = usize::try_from(rules.concurrent).unwrap_or(usize::MAX);
        Ok(Self(Arc::new(Inner {
            folder,
            rules,
            slots: Arc::new(Semaphore::new(slots.min(Semaphore::MAX_PERMITS))),
            accounts: Mutex::new(accounts),
        })))
    }

    /// A place to take an image in.
    ///
    /// # Errors
    ///
    /// [`ImagesError::Busy`] where `limits.concurrent_imports` images are.
    pub fn slot(&self) -> Result<Slot, ImagesError> {
        let permit = self.0.slots.clone().try_acquire_owned();
        let permit = permit.map_err(|_| ImagesError::Busy {
            limit: self.0.rules.concurrent,
        })?;
        Ok(Slot::new(self.clone(), permit))
    }

    /// The image of that name.
    ///
    /// # Errors
    ///
    /// [`ImagesError::NotFound`], [`ImagesError::Damaged`], [`ImagesError::Image`] where it can't be read.
    pub async fn get(&self, name: ImageName) -> Result<Image, ImagesError> {
        self.blocking(move |inner| {
            let image = inner.load(&name)?;
            Ok(Image::of(name, image))
        })
        .await
    }

    /// The image of that name, to be run.
    ///
    /// # Errors
    ///
    /// As of [`Self::get`].
    pub async fn open_root(&self, name: ImageName) -> Result<Opened, ImagesError> {
        self.blocking(move |inner| {
            let image = inner.load(&name)?;
            Ok(Opened {
                id: image.id,
                config: image.config,
                file: Arc::new(image.file),
            })
        })
        .await
    }

    /// At most `limit` images, by account and in the order of their names, of one account or of all, that come after a name.
    ///
    /// # Errors
    ///
    /// [`ImagesError::Image`] where they can't be read.
    pub async fn list(
        &self,
        account: Option<AccountName>,
        after: Option<ImageName>,
        limit: usize,
    ) -> Result<Vec<Image>, ImagesError> {
        self.blocking(move |inner| inner.list(account.as_ref(), after.as_ref(), limit))
            .await
    }

    /// Takes a name away, and the image with its last one, or once no machine runs it any more.
    ///
    /// # Errors
    ///
    /// [`ImagesError::NotFound`], [`ImagesError::Image`] where it can't be removed.
    pub async fn delete(&self, name: ImageName) -> Result<(), ImagesError> {
        let delete = move |inner: &Inner| {
            let store = inner.store(name.account())?;
            let store = store.ok_or_else(|| ImagesError::NotFound(name.clone()))?;
            let removed = store.remove(name.image());
            inner.settle(inner.accounts(), name.account());
            removed.map_err(|error| ImagesError::of(&name, error))?;
            tracing::info!(image = %name, "deleted an image");
            Ok(())
        };
        self.blocking(delete).await
    }

    /// Removes, now and then, the images that were deleted and that no machine runs any more. Never ends.
    pub async fn sweep(self) {
        loop {
            tokio::time::sleep(SWEEP_INTERVAL).await;
            let sweep = |inner: &Inner| {
                inner.sweep();
                Ok(())
            };
            if let Err(error) = self.blocking(sweep).await {
                tracing::error!(%error, "images that are deleted may be left");
            }
        }
    }

    /// Runs what blocks where that is allowed, to its end, whether or not anybody waits for it.
    async fn blocking<T: Send + 'static>(
        &self,
        run: impl FnOnce(&Inner) -> Result<T, ImagesError> + Send + 'static,
    ) -> Result<T, ImagesError> {
        let inner = self.0.clone();
        tokio::task::spawn_blocking(move || run(&inner)).await?
    }
}

// === impl Inner ===

impl Inner {
    fn accounts(&self) -> MutexGuard<'_, Accounts> {
        self.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts again what an account takes. What goes is removed while others can have the accounts: that takes its time.
    fn settle<'a>(&'a self, mut accounts: MutexGuard<'a, Accounts>, account: &str) {
        while let Some(swept) = accounts.settle(account) {
            drop(accounts);
            drop(swept);
            accounts = self.accounts();
        }
    }

    /// Counts again what those accounts take that have deleted images that machines ran.
    fn sweep(&self) {
        let some = self.accounts().with_unnamed();
        for account in some {
            self.settle(self.accounts(), &account);
        }
    }

    /// The images of an account; none where it has none.
    fn store(&self, account: &str) -> Result<Option<Store>, ImagesError> {
        let mut accounts = self.accounts();
        if !accounts.known.contains_key(account) && !self.folder.join(account).is_dir() {
            return Ok(None);
        }
        Ok(Some(accounts.open(&self.folder, account)?.store.clone()))
    }

    fn load(&self, name: &ImageName) -> Result<stoker_images::Image, ImagesError> {
        let store = self.store(name.account())?;
        let store = store.ok_or_else(|| ImagesError::NotFound(name.clone()))?;
        let image = store.get(name.image());
        image.map_err(|error| ImagesError::of(name, error))
    }

    fn list(
        &self,
        account: Option<&AccountName>,
        after: Option<&ImageName>,
        limit: usize,
    ) -> Result<Vec<Image>, ImagesError> {
        let stores: Vec<(String, Store)> = match account {
            Some(account) => {
                let store = self.store(account.account())?;
                store
                    .map(|store| (account.account().to_owned(), store))
                    .into_iter()
                    .collect()
            }
            None => {
                let from = after.map_or("", ImageName::account);
                let accounts = self.accounts();
                let found = accounts
                    .known
                    .range::<str, _>((Bound::Included(from), Bound::Unbounded));
                found.map(|(id, account)| (id.clone(), account.store.clone())).collect()
            }
        };
        let mut images = Vec::new();
        for (account, store) in stores {
            let named = match store.list() {
                Ok(named) => named,
                // The last one was deleted just now.
                Err(ImageError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error.into()),
            };
            // All names are ones that were checked as they came in.
            let found = named.into_iter().filter_map(|named| {
                let name = ImageName::new(&account, &named.name).ok()?;
                let is_next = after.is_none_or(|after| name > *after);
                is_next.then(|| Image::listed(name, named))
            });
            images.extend(found.take(limit.saturating_sub(images.len())));
            if images.len() >= limit {
                break;
            }
        }
        Ok(images)
    }
}

// === impl Image ===

impl Image {
    fn of(name: ImageName, image: stoker_images::Image) -> Self {
        Self {
            name,
            id: image.id,
            size: image.size,
            is_damaged: false,
            since: image.since,
            config: Some(image.config),
        }
    }

    fn listed(name: ImageName, named: Named) -> Self {
        Self {
            name,
            id: named.id,
            size: named.size,
            is_damaged: named.is_damaged,
            since: named.since,
            config: None,
        }
    }
}

#[cfg(test)]
mod tests;
