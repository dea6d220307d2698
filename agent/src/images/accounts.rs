//! What accounts take of the disk.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::Path;

use stoker_images::{Limits, Store, Swept, Usage};

use super::ImagesError;
use crate::files;
use crate::names::AccountName;

/// What is known of accounts.
#[derive(Default)]
pub(super) struct Accounts {
    /// Those that have images or take one in, by their ids.
    pub(super) known: BTreeMap<String, Account>,
    /// How many images are taken in.
    pub(super) taking: u64,
    /// Bytes that these may write.
    pub(super) reserved: u64,
}

pub(super) struct Account {
    pub(super) store: Store,
    /// What its images take.
    pub(super) usage: Usage,
    /// Whether it takes an image in.
    pub(super) takes: bool,
}

// === impl Accounts ===

impl Accounts {
    /// Finds the accounts that have a folder, and removes it where nothing is in it.
    pub(super) fn find(&mut self, folder: &Path) {
        let entries = match std::fs::read_dir(folder) {
            Ok(entries) => entries,
            Err(error) => {
                tracing::error!(folder = %folder.display(), %error, "it is not known which images there are");
                return;
            }
        };
        for entry in entries.flatten() {
            let account = entry.file_name().into_string().ok();
            let Some(account) = account.filter(|account| AccountName::new(account).is_ok()) else {
                continue;
            };
            if let Err(error) = self.open(folder, &account) {
                tracing::error!(account, %error, "the images of an account can't be used");
            }
            while self.settle(&account).is_some() {}
        }
    }

    /// The account, with its folder.
    pub(super) fn open(&mut self, folder: &Path, account: &str) -> Result<&mut Account, ImagesError> {
        match self.known.entry(account.to_owned()) {
            Entry::Occupied(known) => Ok(known.into_mut()),
            Entry::Vacant(unknown) => {
                files::make_own_dir(folder)?;
                let store = Store::open(&folder.join(account), Limits::default())?;
                let usage = store.sweep()?.usage;
                Ok(unknown.insert(Account {
                    store,
                    usage,
                    takes: false,
                }))
            }
        }
    }

    /// Refuses an account that takes an image in.
    pub(super) fn check_free(&self, id: &str) -> Result<(), ImagesError> {
        match self.known.get(id) {
            Some(known) if known.takes => Err(ImagesError::AccountBusy { account: id.to_owned() }),
            _ => Ok(()),
        }
    }

    /// Counts again what an account takes of the disk, without what it has deleted and no machine runs any more. Forgets it with its
    /// folder where it has nothing. Gives what goes, where anything does: then the account is to be settled again once that is dropped.
    #[must_use]
    pub(super) fn settle(&mut self, account: &str) -> Option<Swept> {
        let known = self.known.get_mut(account)?;
        let swept = match known.store.sweep() {
            Ok(swept) => swept,
            Err(error) => {
                tracing::error!(account, %error, "it is not known how much of the disk an account's images take");
                return None;
            }
        };
        known.usage = swept.usage;
        if swept.has_removed() {
            return Some(swept);
        }
        if known.takes || known.usage.has_any {
            return None;
        }
        let known = self.known.remove(account)?;
        if let Err(error) = known.store.remove_empty() {
            tracing::warn!(account, %error, "the empty folder of an account's images is left");
        }
        None
    }

    /// Those that have deleted images that machines ran.
    pub(super) fn with_unnamed(&self) -> Vec<String> {
        let some = self.known.iter().filter(|(_, account)| account.usage.unnamed > 0);
        some.map(|(id, _)| id.clone()).collect()
    }

    /// Bytes that all images take.
    pub(super) fn used(&self) -> u64 {
        self.known
            .values()
            .map(|account| account.usage.all)
            .fold(0, u64::saturating_add)
    }
}
