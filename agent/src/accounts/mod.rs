//! What accounts may have: as it is configured, or as somebody has set it since. What is set is kept in the database, and holds at once for
//! the catalogue, which asks here, and for the host's loop, which is told.

mod limit;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError, RwLock};

use stoker_policy::{AccountLimits, Rules};
use tokio::sync::Mutex;

pub use self::limit::{Limit, Values};
use crate::catalog::MayCreate;
use crate::config::{self, Config};
use crate::host::HostHandle;
use crate::names::AccountName;
use crate::store::{Store, StoreError};

/// What is to become of some limits: each has a value, or is what the configuration says from now on.
pub type Change = BTreeMap<Limit, Option<u64>>;

/// The limits of all accounts; clones share them.
#[derive(Clone, Debug)]
pub struct Accounts(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    store: Store,
    /// As it is configured.
    rules: Rules,
    /// What the configuration says of any account, and of those that it names.
    any: Values,
    named: BTreeMap<String, Values>,
    set: RwLock<BTreeMap<String, Values>>,
    /// Held from a change in the database until everybody goes by it.
    changing: Mutex<()>,
}

/// Where a limit comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Nothing is said of it.
    Default,
    /// The configuration.
    Configuration,
    /// Somebody set it.
    Set,
}

/// A limit as it is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InForce {
    /// Which.
    pub limit: Limit,
    /// In its unit; nothing where the account has no limit of its own.
    pub value: Option<u64>,
    /// Where it comes from.
    pub source: Source,
}

/// Why limits were not set.
#[derive(Debug, thiserror::Error)]
pub enum AccountsError {
    /// They could not be kept.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A task of this agent panicked; the log says where.
    #[error("a part of the agent panicked: {0}")]
    Panicked(#[from] tokio::task::JoinError),
}

// === impl Accounts ===

impl Accounts {
    /// Reads what was set. `rules` are of this configuration.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where the database fails or a row is damaged.
    pub async fn open(config: &Config, rules: Rules, store: Store) -> Result<Self, StoreError> {
        let values = |account: &config::Account| -> Values {
            let said = |limit: Limit| Some((limit, limit.configured(account)?));
            Limit::ALL.into_iter().filter_map(said).collect()
        };
        let named = config.accounts.iter();
        let set = store.account_limits().await?;
        Ok(Self(Arc::new(Inner {
            store,
            rules,
            any: values(&config.account),
            named: named.map(|(name, account)| (name.clone(), values(account))).collect(),
            set: RwLock::new(set),
            changing: Mutex::new(()),
        })))
    }

    /// What an account may have now.
    #[must_use]
    pub fn limits(&self, account: &str) -> AccountLimits {
        self.0.limits(account, self.0.set_of(account).as_ref())
    }

    /// Says whether an account that has so many functions may have another.
    #[must_use]
    pub fn may_create(&self) -> MayCreate {
        let accounts = self.clone();
        Arc::new(move |account, has| accounts.limits(account).may_create_function(has))
    }

    /// The limits of an account, each with where it comes from.
    #[must_use]
    pub fn in_force(&self, account: &str) -> [InForce; Limit::ALL.len()] {
        let set = self.0.set_of(account).unwrap_or_default();
        let limits = self.0.limits(account, Some(&set));
        let named = self.0.named.get(account);
        Limit::ALL.map(|limit| {
            let configured = named.is_some_and(|named| named.contains_key(&limit)) || self.0.any.contains_key(&limit);
            InForce {
                limit,
                value: limit.of(&limits),
                source: match set.contains_key(&limit) {
                    true => Source::Set,
                    false if configured => Source::Configuration,
                    false => Source::Default,
                },
            }
        })
    }

    /// What was set, in place of what is configured: all limits of each account of which any was.
    #[must_use]
    pub fn all_set(&self) -> BTreeMap<Arc<str>, AccountLimits> {
        let set = self.0.set.read().unwrap_or_else(PoisonError::into_inner);
        set.iter()
            .map(|(name, values)| (name.as_str().into(), self.0.limits(name, Some(values))))
            .collect()
    }

    /// The ids of the accounts of which something is configured or set.
    #[must_use]
    pub fn names(&self) -> BTreeSet<String> {
        let set = self.0.set.read().unwrap_or_else(PoisonError::into_inner);
        self.0.named.keys().chain(set.keys()).cloned().collect()
    }

    /// Changes limits of an account, and resolves once everybody goes by them. It is done whole, whether or not the caller waits for it.
    /// Values are in their ranges ([`Limit::problem`]). `by` says who wants that.
    ///
    /// # Errors
    ///
    /// [`AccountsError`]; nothing has changed then.
    pub async fn set(
        &self,
        host: HostHandle,
        account: AccountName,
        change: Change,
        by: Arc<str>,
    ) -> Result<(), AccountsError> {
        let accounts = self.clone();
        let setting = async move { accounts.0.set(&host, account.account(), change, by).await };
        tokio::spawn(setting).await??;
        Ok(())
    }
}

// === impl Inner ===

impl Inner {
    fn set_of(&self, account: &str) -> Option<Values> {
        let set = self.set.read().unwrap_or_else(PoisonError::into_inner);
        set.get(account).cloned()
    }

    fn limits(&self, account: &str, set: Option<&Values>) -> AccountLimits {
        let mut limits = self.rules.limits(account).clone();
        for (limit, value) in set.into_iter().flatten() {
            limit.set(&mut limits, *value);
        }
        limits
    }

    async fn set(&self, host: &HostHandle, account: &str, change: Change, by: Arc<str>) -> Result<(), StoreError> {
        let _alone = self.changing.lock().await;
        let mut values = self.set_of(account).unwrap_or_default();
        for (limit, value) in &change {
            match value {
                Some(value) => values.insert(*limit, *value),
                None => values.remove(limit),
            };
        }
        self.store
            .set_account_limits(account.to_owned(), values.clone())
            .await?;
        let limits = self.limits(account, Some(&values));
        {
            let mut set = self.set.write().unwrap_or_else(PoisonError::into_inner);
            match values.is_empty() {
                true => set.remove(account),
                false => set.insert(account.to_owned(), values),
            };
        }
        tracing::info!(account, ?change, %by, "limits of an account were set");
        host.set_limits(account.into(), limits, by).await;
        Ok(())
    }
}
