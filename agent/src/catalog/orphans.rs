//! Code that no function needs: listed, and removed once it has been so for long enough.

use std::time::{Duration, SystemTime};

use super::{Catalog, CatalogError, Inner, Orphan};

impl Catalog {
    /// All code that no function needs, in the order of its hashes.
    ///
    /// # Errors
    ///
    /// [`CatalogError::Code`], [`CatalogError::Store`].
    pub async fn orphans(&self) -> Result<Vec<Orphan>, CatalogError> {
        let _alone = self.0.collecting.write().await;
        self.0.update_orphans(SystemTime::now()).await
    }

    /// Removes the code that no function has needed for this long, at least and where not given for
    /// `code.orphan_grace`. Answers with what is gone.
    ///
    /// # Errors
    ///
    /// [`CatalogError::GraceTooShort`], [`CatalogError::Code`] also where the code is another agent's,
    /// [`CatalogError::Store`]. What was removed before an error is gone.
    pub async fn remove_orphans(&self, older_than: Option<Duration>) -> Result<Vec<Orphan>, CatalogError> {
        let catalog = self.clone();
        tokio::spawn(async move { catalog.0.remove_orphans(older_than, SystemTime::now()).await }).await?
    }
}

impl Inner {
    /// Called while nothing is deployed.
    async fn update_orphans(&self, now: SystemTime) -> Result<Vec<Orphan>, CatalogError> {
        let present = self.codes.list().await?;
        Ok(self.store.update_orphans(present, now).await?)
    }

    pub(super) async fn remove_orphans(
        &self,
        older_than: Option<Duration>,
        now: SystemTime,
    ) -> Result<Vec<Orphan>, CatalogError> {
        let grace = self.orphan_grace;
        let older_than = older_than.unwrap_or(grace);
        if older_than < grace {
            return Err(CatalogError::GraceTooShort {
                asked: older_than,
                grace,
            });
        }
        self.codes.check_owner()?;
        let _alone = self.collecting.write().await;
        // One since a time that is yet to come, as a clock that was wrong tells it, is not old.
        let is_old = |orphan: &Orphan| now.duration_since(orphan.since).is_ok_and(|age| age >= older_than);
        let mut orphans = self.update_orphans(now).await?;
        orphans.retain(|orphan| is_old(orphan) && !self.kept.keeps(&orphan.code_sha256));
        let mut removed = Vec::new();
        let mut failed = None;
        for orphan in orphans {
            if let Err(error) = self.codes.remove(&orphan.code_sha256).await {
                failed = Some(error);
                break;
            }
            tracing::info!(
                code = orphan.code_sha256,
                bytes = orphan.size,
                "removed code that no function needs"
            );
            removed.push(orphan);
        }
        // Where the same code comes again, its time begins again.
        self.update_orphans(now).await?;
        match failed {
            Some(error) => Err(error.into()),
            None => Ok(removed),
        }
    }
}
