//! Code that no function needs: since when that is known.

use std::collections::BTreeMap;
use std::time::SystemTime;

use super::{Store, StoreError, from_millis, layers, millis};

/// Code that is in the code store and that no function needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Orphan {
    /// SHA-256 of the zip in lower-case hex.
    pub code_sha256: String,
    /// Bytes of the zip.
    pub size: u64,
    /// Since when no function is known to need it, to the ms.
    pub since: SystemTime,
}

impl Store {
    /// Compares all code that there is (hashes and sizes in bytes) with what functions need: what no function needs is
    /// an orphan, since now where it was none before. Answers with all orphans in the order of their hashes.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where the database fails.
    pub async fn update_orphans(
        &self,
        present: BTreeMap<String, u64>,
        now: SystemTime,
    ) -> Result<Vec<Orphan>, StoreError> {
        self.call("update orphans", move |c| {
            let mut orphans = Vec::new();
            let mut needed = c.prepare_cached(layers::IN_USE)?;
            let mut since = c.prepare_cached("SELECT since_ms FROM orphans WHERE code_sha256 = ?1")?;
            for (code_sha256, size) in present {
                if !needed.exists([&code_sha256])? {
                    let known = since.query_map([&code_sha256], |row| row.get(0))?.next().transpose()?;
                    orphans.push(Orphan {
                        since: from_millis(known.unwrap_or_else(|| millis(now))),
                        code_sha256,
                        size,
                    });
                }
            }
            c.execute("DELETE FROM orphans", [])?;
            let mut insert = c.prepare_cached("INSERT INTO orphans (code_sha256, since_ms) VALUES (?1, ?2)")?;
            for orphan in &orphans {
                insert.execute((&orphan.code_sha256, millis(orphan.since)))?;
            }
            Ok(orphans)
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn an_orphan_is_one_since_it_was_first_seen() {
        let dir = tempfile::tempdir().unwrap();
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let present = |codes: &[&str]| codes.iter().map(|code| ((*code).to_owned(), 7)).collect();
        let since = |orphans: Vec<Orphan>| {
            let each = orphans.into_iter().map(|orphan| (orphan.code_sha256, orphan.since));
            each.collect::<Vec<_>>()
        };
        let store = Store::open(dir.path()).unwrap();
        store.update_orphans(present(&["a"]), at(100)).await.unwrap();
        drop(store);
        let store = Store::open(dir.path()).unwrap();
        let orphans = store.update_orphans(present(&["a", "b"]), at(200)).await.unwrap();
        assert_eq!(since(orphans), [("a".to_owned(), at(100)), ("b".to_owned(), at(200))]);
        // One that went and came again is a new one.
        store.update_orphans(present(&["b"]), at(300)).await.unwrap();
        let orphans = store.update_orphans(present(&["a", "b"]), at(400)).await.unwrap();
        assert_eq!(since(orphans), [("a".to_owned(), at(400)), ("b".to_owned(), at(200))]);
    }
}
