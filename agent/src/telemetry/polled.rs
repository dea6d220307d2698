//! Accounts that are settled from what the ledger has counted, several times a second.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use stoker_credits::{Account, Terms};
use stoker_ebpf::{CgroupId, Ledger, LedgerError};

use super::credits::now_ns;

/// How often they are settled.
const PERIOD: Duration = Duration::from_millis(100);

/// The accounts of subjects of a ledger.
pub(super) struct Polled {
    ledger: Arc<Ledger>,
    accounts: Mutex<HashMap<CgroupId, Entry>>,
}

#[derive(Clone, Copy)]
struct Entry {
    terms: Terms,
    account: Account,
    /// The subject's CPU time up to where it is settled, in ns.
    cpu_ns: u64,
}

// === impl Polled ===

impl Polled {
    pub(super) fn new(ledger: Arc<Ledger>) -> Self {
        Self {
            ledger,
            accounts: Mutex::default(),
        }
    }

    pub(super) fn open_account(&self, owner: CgroupId, terms: &Terms) -> Result<Account, LedgerError> {
        self.insert(owner, terms, Account::open(terms, now_ns()))
    }

    pub(super) fn restore_account(
        &self,
        owner: CgroupId,
        terms: &Terms,
        mut account: Account,
        unsaved_ns: u64,
    ) -> Result<Account, LedgerError> {
        account.restore(terms, now_ns(), unsaved_ns);
        self.insert(owner, terms, account)
    }

    pub(super) fn set_terms(&self, owner: CgroupId, terms: &Terms) -> Result<Account, LedgerError> {
        self.settled(owner, |entry| {
            entry.account.resize(&entry.terms, terms, now_ns(), 0);
            entry.terms = *terms;
        })
    }

    pub(super) fn grant(&self, owner: CgroupId, ps: u64) -> Result<Account, LedgerError> {
        self.settled(owner, |entry| drop(entry.account.grant(&entry.terms, ps)))
    }

    pub(super) fn settle_account(&self, owner: CgroupId) -> Result<Account, LedgerError> {
        self.settled(owner, |_| ())
    }

    pub(super) fn close_account(&self, owner: CgroupId) -> Result<Account, LedgerError> {
        let account = self.settled(owner, |entry| drop(entry.account.close(&entry.terms, now_ns(), 0)))?;
        self.lock().remove(&owner);
        Ok(account)
    }

    pub(super) fn accounts(&self) -> Result<Vec<(CgroupId, Account)>, LedgerError> {
        Ok(self.lock().iter().map(|(owner, entry)| (*owner, entry.account)).collect())
    }

    /// Settles all, until levels have changed.
    pub(super) async fn crossed(&self) -> Vec<(CgroupId, Account)> {
        loop {
            tokio::time::sleep(PERIOD).await;
            let Ok(used) = self.ledger.read() else { continue };
            let mut crossed = Vec::new();
            for (owner, entry) in self.lock().iter_mut() {
                if let Some(used) = used.get(owner)
                    && entry.settle(used.cpu_ns)
                {
                    crossed.push((*owner, entry.account));
                }
            }
            if !crossed.is_empty() {
                return crossed;
            }
        }
    }

    fn insert(&self, owner: CgroupId, terms: &Terms, account: Account) -> Result<Account, LedgerError> {
        let cpu_ns = self.ledger.read()?.get(&owner).map_or(0, |used| used.cpu_ns);
        let entry = Entry {
            terms: *terms,
            account,
            cpu_ns,
        };
        self.lock().insert(owner, entry);
        Ok(account)
    }

    fn settled(&self, owner: CgroupId, change: impl FnOnce(&mut Entry)) -> Result<Account, LedgerError> {
        let used = self.ledger.read()?;
        let mut accounts = self.lock();
        let (Some(entry), Some(used)) = (accounts.get_mut(&owner), used.get(&owner)) else {
            return Err(LedgerError::Unknown(owner));
        };
        entry.settle(used.cpu_ns);
        change(entry);
        Ok(entry.account)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<CgroupId, Entry>> {
        self.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Entry ===

impl Entry {
    fn settle(&mut self, cpu_ns: u64) -> bool {
        let used_ns = cpu_ns.saturating_sub(self.cpu_ns);
        self.cpu_ns = self.cpu_ns.max(cpu_ns);
        self.account.settle(&self.terms, now_ns(), used_ns).is_some()
    }
}
