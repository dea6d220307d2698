//! Limits of accounts that were set.

use std::collections::BTreeMap;

use super::functions::{integer, natural};
use super::{Fault, Store, StoreError};
use crate::accounts::{Limit, Values};

/// The table. What is configured is not in it.
pub(super) const TABLES: &str = "
    CREATE TABLE account_limits (
        account TEXT NOT NULL,
        -- As the configuration calls it, in that unit.
        name TEXT NOT NULL,
        value INTEGER NOT NULL,
        PRIMARY KEY (account, name)
    ) STRICT;
";

impl Store {
    /// The limits that were set, by the ids of their accounts.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where the database fails, or a limit is not one.
    pub async fn account_limits(&self) -> Result<BTreeMap<String, Values>, StoreError> {
        self.call("list limits of accounts", |c| {
            let mut statement = c.prepare("SELECT account, name, value FROM account_limits")?;
            let mut rows = statement.query([])?;
            let mut all: BTreeMap<String, Values> = BTreeMap::new();
            while let Some(row) = rows.next()? {
                let (account, name): (String, String) = (row.get(0)?, row.get(1)?);
                let value = natural(row.get(2)?);
                let limit = Limit::named(&name).filter(|limit| limit.problem(value).is_none());
                let limit = limit.ok_or_else(|| Fault::Corrupt(format!("accounts/{account}: {name} = {value}")))?;
                all.entry(account).or_default().insert(limit, value);
            }
            Ok(all)
        })
        .await
    }

    /// Sets all limits of an account that are not as the configuration says.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where the database fails; they are as they were then.
    pub async fn set_account_limits(&self, account: String, values: Values) -> Result<(), StoreError> {
        self.call("set limits of an account", move |c| {
            c.execute("DELETE FROM account_limits WHERE account = ?1", [&account])?;
            let mut insert =
                c.prepare_cached("INSERT INTO account_limits (account, name, value) VALUES (?1, ?2, ?3)")?;
            for (limit, value) in &values {
                insert.execute((&account, limit.name(), integer(*value)?))?;
            }
            Ok(())
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_set_is_there_after_a_restart_and_goes_when_it_is_unset() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let acme: Values = [(Limit::Machines, 3), (Limit::MemoryMib, 1 << 30)].into();
        let other: Values = [(Limit::Waiting, 0)].into();
        let set = async |store: &Store, account: &str, values: &Values| {
            let set = store.set_account_limits(account.to_owned(), values.clone());
            set.await.unwrap();
        };
        set(&store, "acme", &[(Limit::Share, 7)].into()).await;
        set(&store, "acme", &acme).await;
        set(&store, "other", &other).await;
        store.close().await;
        let store = Store::open(dir.path()).unwrap();
        let all = [("acme".to_owned(), acme), ("other".to_owned(), other.clone())];
        assert_eq!(store.account_limits().await.unwrap(), BTreeMap::from(all));
        set(&store, "acme", &Values::new()).await;
        let left = [("other".to_owned(), other)];
        assert_eq!(store.account_limits().await.unwrap(), BTreeMap::from(left));
    }

    #[tokio::test]
    async fn what_no_agent_has_written_is_told_of() {
        for (name, value) in [("machine", 1), ("machines", 0), ("share", 10_001), ("functions", -1)] {
            let dir = tempfile::tempdir().unwrap();
            let store = Store::open(dir.path()).unwrap();
            let insert = "INSERT INTO account_limits VALUES ('acme', ?1, ?2)";
            let written = store.call("write", move |c| Ok(c.execute(insert, (name, value))?));
            assert_eq!(written.await.unwrap(), 1);
            let error = store.account_limits().await.unwrap_err();
            assert!(error.to_string().contains("accounts/acme"), "{error}");
        }
    }
}
