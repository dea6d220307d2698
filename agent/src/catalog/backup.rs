//! Backups: what is copied, and that no code goes meanwhile.

use std::collections::BTreeSet;
use std::io::Write;
use std::sync::{Mutex, PoisonError};

use super::{Catalog, CatalogError};
use crate::backup::{self, BackupError};

/// Code that is not removed while a backup is made that may need it.
#[derive(Debug, Default)]
pub(super) struct Kept(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// How many backups are made.
    backups: usize,
    /// What is to be removed after them.
    later: BTreeSet<String>,
}

/// Keeps code until it is dropped.
struct Keeping {
    catalog: Catalog,
    runtime: tokio::runtime::Handle,
}

// === impl Kept ===

impl Kept {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What of these may be removed now; the rest is later.
    pub(super) fn removable(&self, codes: BTreeSet<String>) -> BTreeSet<String> {
        let mut state = self.state();
        if state.backups == 0 {
            return codes;
        }
        state.later.extend(codes);
        BTreeSet::new()
    }

    /// Whether a backup may need it.
    pub(super) fn keeps(&self, code: &str) -> bool {
        self.state().later.contains(code)
    }
}

// === impl Keeping ===

impl Drop for Keeping {
    fn drop(&mut self) {
        let removable = {
            let mut state = self.catalog.0.kept.state();
            state.backups -= 1;
            match state.backups {
                0 => std::mem::take(&mut state.later),
                _ => return,
            }
        };
        let catalog = self.catalog.clone();
        self.runtime.spawn(async move { catalog.0.collect(removable).await });
    }
}

// === impl Catalog ===

impl Catalog {
    /// Writes an archive of all functions, their code and the rest of the database, as they are now; everything goes on
    /// meanwhile. With the key of environment variables where that is asked for.
    ///
    /// # Errors
    ///
    /// [`BackupError`]; what was written is no archive then.
    pub async fn backup(&self, with_key: bool, to: impl Write + Send + 'static) -> Result<(), CatalogError> {
        let runtime = tokio::runtime::Handle::current();
        // Before the database is copied, so that all code that the copy needs stays.
        self.0.kept.state().backups += 1;
        let keeping = Keeping {
            catalog: self.clone(),
            runtime: runtime.clone(),
        };
        let snapshot = self.0.store.snapshot().await?;
        let key = with_key.then(|| self.0.store.key_of(&snapshot)).flatten();
        let codes = self.0.codes.clone();
        let writing = tokio::task::spawn_blocking(move || {
            let _keeping = keeping;
            backup::write(&snapshot, &codes, key.as_deref(), &runtime, to)
        });
        Ok(writing.await??)
    }
}

impl From<BackupError> for CatalogError {
    fn from(error: BackupError) -> Self {
        match error {
            BackupError::Store(error) => error.into(),
            BackupError::Code(error) => error.into(),
            error => Self::Backup(Box::new(error)),
        }
    }
}
