//! How much of the disk images may take, and an account's turn to take one in.

use std::collections::BTreeMap;
use std::sync::Arc;

use stoker_images::{Exceeded, ImageError, Limits, Store, registry_of};

use super::accounts::Accounts;
use super::{ImagesError, Inner, Pace};
use crate::capacity::free_disk;
use crate::config::{self, Config};
use crate::names::ImageName;

/// The most names that an account's images have where nothing is configured.
const NAMES: u32 = 100;

/// How many times what an image unpacks to is written while it is taken in: as it comes, as its layers are, and as it is kept.
const COPIES: u64 = 3;

/// What images may be.
#[derive(Debug)]
pub(super) struct Rules {
    /// How many may be taken in at a time.
    pub(super) concurrent: u32,
    /// Bytes that all may take, with what is written while they are taken in.
    total: u64,
    /// Where images may be pulled from; anywhere where not given.
    registries: Option<Vec<String>>,
    /// How fast they have to come in.
    pub(super) pace: Pace,
    account: Allowed,
    /// Of the accounts that are named, by their ids.
    accounts: BTreeMap<String, Allowed>,
}

/// What an account may have.
#[derive(Debug, Clone, Copy)]
struct Allowed {
    names: u32,
    bytes: u64,
}

/// An account's turn to take an image in. One at a time has it, so that what the account has left stays what it is. Dropping
/// it blocks.
pub(super) struct Turn {
    inner: Arc<Inner>,
    name: ImageName,
    /// Takes no image that is too large.
    store: Store,
    /// Bytes that the account has left.
    account_left: u64,
    /// Bytes that the image may have of what is left for all: a part of what is reserved.
    host_left: u64,
    reserved: u64,
}

// === impl Rules ===

impl Rules {
    /// As configured; images take `used` bytes already.
    pub(super) fn of(config: &Config, used: u64) -> Result<Self, ImagesError> {
        let total = match config.limits.images_mib {
            Some(mib) => mib.saturating_mul(1 << 20),
            None => {
                let path = &config.store.path;
                let free = free_disk(path).map_err(|source| ImagesError::Disk {
                    path: path.clone(),
                    source,
                })?;
                free.saturating_add(used) / 4
            }
        };
        let allowed = |account: &config::Account| Allowed {
            names: account.images.unwrap_or(NAMES),
            bytes: account.images_mib.map_or(total / 4, |mib| mib.saturating_mul(1 << 20)),
        };
        let named = config.accounts.iter();
        Ok(Self {
            concurrent: config.limits.concurrent_imports,
            total,
            registries: config.limits.registries.clone(),
            pace: Pace::LEAST,
            account: allowed(&config.account),
            accounts: named
                .map(|(name, account)| (name.clone(), allowed(&account.or(&config.account))))
                .collect(),
        })
    }

    /// Whether an image may be pulled from where a reference names it.
    ///
    /// # Errors
    ///
    /// [`ImagesError::Registry`], or [`ImagesError::Image`] where it names no image.
    pub(super) fn check_registry(&self, reference: &str) -> Result<(), ImagesError> {
        let registry = registry_of(reference).map_err(ImageError::from)?;
        match &self.registries {
            Some(allowed) if !allowed.contains(&registry) => Err(ImagesError::Registry(registry)),
            _ => Ok(()),
        }
    }

    fn allowed(&self, account: &str) -> Allowed {
        self.accounts.get(account).copied().unwrap_or(self.account)
    }
}

// === impl Turn ===

impl Turn {
    /// Begins the turn of the account whose image is to have this name. Blocks.
    ///
    /// # Errors
    ///
    /// [`ImagesError::AccountBusy`], [`ImagesError::Names`], or where the account's folder can't be used.
    pub(super) fn begin(inner: &Arc<Inner>, name: &ImageName) -> Result<Self, ImagesError> {
        let id = name.account();
        // Nothing is done for who comes in vain.
        inner.accounts().check_free(id)?;
        inner.sweep();
        inner.settle(inner.accounts(), id);
        let mut accounts = inner.accounts();
        let begun = Self::begin_locked(inner, name, &mut accounts);
        // It may have got a folder for nothing, unless another image of it has come first.
        if begun.is_err() && accounts.check_free(id).is_ok() {
            inner.settle(accounts, id);
        }
        begun
    }

    fn begin_locked(inner: &Arc<Inner>, name: &ImageName, accounts: &mut Accounts) -> Result<Self, ImagesError> {
        let id = name.account();
        let allowed = inner.rules.allowed(id);
        accounts.check_free(id)?;
        let account = accounts.open(&inner.folder, id)?;
        let named = account.store.list()?;
        let is_new = named.iter().all(|named| named.name != name.image());
        if is_new && named.len() >= usize::try_from(allowed.names).unwrap_or(usize::MAX) {
            return Err(ImagesError::Names {
                account: id.to_owned(),
                limit: allowed.names,
            });
        }
        account.takes = true;
        let account_left = allowed.bytes.saturating_sub(account.usage.all);
        let store = account.store.clone();
        let left = inner.rules.total.saturating_sub(accounts.used());
        let left = left.saturating_sub(accounts.reserved);
        // An equal part for each that may still come, and this one.
        let coming = u64::from(inner.rules.concurrent).saturating_sub(accounts.taking);
        let reserved = left / coming.max(1);
        accounts.reserved += reserved;
        accounts.taking += 1;
        let host_left = reserved / COPIES;
        let most = Limits::default();
        Ok(Self {
            inner: inner.clone(),
            name: name.clone(),
            store: store.with_limits(Limits {
                unpacked: most.unpacked.min(host_left),
                size: most.size.min(host_left).min(account_left),
                ..most
            }),
            account_left,
            host_left,
            reserved,
        })
    }

    /// The account's store.
    pub(super) fn store(&self) -> &Store {
        &self.store
    }

    /// Why the image was not taken.
    pub(super) fn refused(&self, error: ImageError) -> ImagesError {
        let most = Limits::default();
        match error {
            ImageError::Limit(Exceeded::Size(limit)) if limit == self.account_left => ImagesError::AccountFull {
                account: self.name.account().to_owned(),
                left: limit,
            },
            ImageError::Limit(Exceeded::Size(limit)) if limit < most.size => ImagesError::HostFull { left: limit },
            ImageError::Limit(Exceeded::Unpacked(limit)) if limit < most.unpacked => {
                ImagesError::HostFull { left: self.host_left }
            }
            other => ImagesError::Image(other),
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut accounts = self.inner.accounts();
        accounts.reserved -= self.reserved;
        accounts.taking -= 1;
        let id = self.name.account();
        if let Some(account) = accounts.known.get_mut(id) {
            account.takes = false;
        }
        self.inner.settle(accounts, id);
    }
}
