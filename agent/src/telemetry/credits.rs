//! Machines' accounts of credits: the ledger keeps them, this opens and changes them, tells what crossed, and writes them down.

mod counts;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::time::{ClockId, clock_gettime};
use stoker_credits::{Account, Terms};
use stoker_ebpf::{CgroupId, Ledger, LedgerError};
use stoker_linux::Cgroup;
use ulid::Ulid;

pub use self::counts::Failure;
use super::balances::{Balance, Balances};
use super::levels::Levels;
pub use super::levels::{Crossing, Hold};
use crate::metrics::Counters;

/// How long a machine's use is measured at least, until it says how much that is, in ns.
const RATE_NS: u64 = 500_000_000;

/// What a CPU may use at most from the moment at which a cgroup's use is read until the kernel counts it for an account, in ns.
const RESTORING_NS: u64 = 1_000_000;

/// The accounts of all machines that are counted; clones share them.
#[derive(Clone)]
pub struct Accounts(Arc<Shared>);

struct Shared {
    ledger: Arc<Ledger>,
    /// Hears of levels that change; none where that can't be.
    levels: Option<Levels>,
    /// How many changes could not be told of, as far as was heard.
    lost: Mutex<u64>,
    kept: Mutex<HashMap<Ulid, Kept>>,
    balances: Mutex<Balances>,
    /// The last that was written down of machines that ended with their host.
    gone: BTreeMap<Ulid, Balance>,
    /// What could not be done.
    failures: Counters<Failure>,
}

/// What is known beside the account itself.
#[derive(Clone, Copy, Debug)]
struct Kept {
    counted: CgroupId,
    terms: Terms,
    before_ns: u64,
    /// When it was looked at, by the monotonic clock, and what it had spent then, in ps.
    looked: (u64, u128),
    used_millis: u32,
}

/// A change of an account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It is settled up to now.
    Settle,
    /// It goes by other terms.
    Terms(Terms),
    /// It is given so many ps.
    Grant(u64),
}

/// An account as it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// What it goes by.
    pub terms: Terms,
    /// The account, settled up to now.
    pub account: Account,
    /// What the machine used lately, in millicores of one CPU.
    pub used_millis: u32,
}

// === impl Accounts ===

impl Accounts {
    /// Accounts of what this ledger counts; what an earlier agent wrote down lies in the folder of the database. Blocks.
    pub(super) fn new(ledger: Arc<Ledger>, folder: &Path) -> Self {
        let failures = Counters::default();
        let (balances, gone) = Balances::open(folder).unwrap_or_else(|unreadable| {
            failures.count(Failure::Restore);
            (unreadable, BTreeMap::new())
        });
        let levels = Levels::start(ledger.clone());
        if let Err(error) = &levels {
            tracing::error!(%error, "it is not heard how machines' credits change");
        }
        Self(Arc::new(Shared {
            ledger,
            levels: levels.ok(),
            lost: Mutex::new(0),
            kept: Mutex::default(),
            balances: Mutex::new(balances),
            gone,
            failures,
        }))
    }

    /// How often something could not be done with accounts.
    pub fn failures(&self) -> &Counters<Failure> {
        &self.0.failures
    }

    /// Gives a machine that is counted an account by these terms. One that it has goes on, and so does what was written down of
    /// it, less what its cgroup has used since: so nothing is lost, and nothing is there that was not earned. Blocks.
    pub fn open(&self, machine: Ulid, cgroup: &Cgroup, counted: CgroupId, terms: &Terms) -> Option<Account> {
        let Shared { ledger, balances, .. } = &*self.0;
        let written = lock(balances).get(machine);
        let opened = || -> Result<(Account, u64), LedgerError> {
            // Before the account is settled: what is used meanwhile is of the account.
            let used_ns = used_ns(cgroup);
            if ledger.account(counted)?.is_some() {
                let account = ledger.set_terms(counted, terms)?;
                let before_ns = written.map_or_else(|| used_ns.saturating_sub(spent_ns(&account)), |had| had.before_ns);
                return Ok((account, before_ns));
            }
            match written {
                Some(Balance {
                    terms: had,
                    mut account,
                    before_ns,
                }) => {
                    // Rounded up, so that no credit comes of it.
                    let unspent_ns = used_ns
                        .saturating_add(1000)
                        .saturating_sub(before_ns)
                        .saturating_sub(spent_ns(&account));
                    account.resize(&had, terms, now_ns(), unspent_ns);
                    let meanwhile_ns = u64::from(terms.full_millis()) * RESTORING_NS / 1000;
                    tracing::info!(%machine, "a machine's credits are as they were written down");
                    Ok((
                        ledger.restore_account(counted, terms, &account, meanwhile_ns)?,
                        before_ns,
                    ))
                }
                None => Ok((ledger.open_account(counted, terms)?, used_ns)),
            }
        };
        match opened() {
            Ok((account, before_ns)) => {
                let kept = Kept {
                    counted,
                    terms: *terms,
                    before_ns,
                    looked: (account.settled_ns(), account.totals().spent.get()),
                    used_millis: 0,
                };
                lock(&self.0.kept).insert(machine, kept);
                if let Some(levels) = &self.0.levels {
                    levels.add(counted, machine);
                }
                Some(account)
            }
            Err(error) => {
                self.0.failures.count(match written {
                    Some(_) => Failure::Restore,
                    None => Failure::Open,
                });
                tracing::error!(%machine, %error, "a machine has no credits: it runs as if it had some");
                None
            }
        }
    }

    /// Has a machine that has an account held to what that says, at once where its level falls. It is called on a thread that keeps all
    /// others from running: it may not block for long.
    pub fn hold_by(&self, machine: Ulid, hold: Arc<Hold>) {
        let counted = lock(&self.0.kept).get(&machine).map(|kept| kept.counted);
        if let (Some(levels), Some(counted)) = (&self.0.levels, counted) {
            levels.hold_by(counted, hold);
        }
    }

    /// Changes the account of a machine, and says what it is then; nothing where it has none. Blocks for some microseconds.
    pub fn change(&self, machine: Ulid, change: Change) -> Option<Account> {
        let ledger = &self.0.ledger;
        let counted = lock(&self.0.kept).get(&machine)?.counted;
        let changed = match change {
            Change::Settle => ledger.settle_account(counted),
            Change::Terms(terms) => ledger.set_terms(counted, &terms),
            Change::Grant(ps) => ledger.grant(counted, ps),
        };
        match changed {
            Ok(account) => {
                if let (Change::Terms(terms), Some(kept)) = (change, lock(&self.0.kept).get_mut(&machine)) {
                    kept.terms = terms;
                }
                Some(account)
            }
            Err(error) => {
                self.0.failures.count(Failure::Change);
                tracing::error!(%machine, %error, "a machine's credits can't be changed");
                None
            }
        }
    }

    /// The last settlement of a machine that has ended, with all that it used.
    pub fn close(&self, machine: Ulid) -> Option<Standing> {
        let kept = lock(&self.0.kept).remove(&machine)?;
        if let Some(levels) = &self.0.levels {
            levels.remove(kept.counted);
        }
        match self.0.ledger.close_account(kept.counted) {
            Ok(account) => Some(Standing {
                terms: kept.terms,
                account,
                used_millis: 0,
            }),
            Err(error) => {
                self.0.failures.count(Failure::Close);
                tracing::error!(%machine, %error, "a machine's credits can't be settled for the last time");
                None
            }
        }
    }

    /// All accounts, settled up to now. Blocks for about a microsecond a machine.
    pub fn all(&self) -> HashMap<Ulid, Standing> {
        let accounts = self.read();
        let mut all = HashMap::new();
        for (machine, kept) in lock(&self.0.kept).iter_mut() {
            let Some(account) = accounts.get(&kept.counted) else {
                continue;
            };
            kept.look(account);
            let standing = Standing {
                terms: kept.terms,
                account: *account,
                used_millis: kept.used_millis,
            };
            all.insert(*machine, standing);
        }
        all
    }

    /// The account of a machine, settled up to now; nothing where it has none.
    pub fn one(&self, machine: Ulid) -> Option<Standing> {
        let mut all = lock(&self.0.kept);
        let kept = all.get_mut(&machine)?;
        match self.0.ledger.account(kept.counted) {
            Ok(account) => {
                let (_, account) = account?;
                kept.look(&account);
                Some(Standing {
                    terms: kept.terms,
                    account,
                    used_millis: kept.used_millis,
                })
            }
            Err(error) => {
                tracing::error!(%machine, %error, "a machine's credits can't be read");
                None
            }
        }
    }

    /// Writes all accounts down that have changed since. Blocks until they are on disk.
    pub fn save(&self) {
        let accounts = self.read();
        let mut machines = BTreeMap::new();
        for (machine, kept) in lock(&self.0.kept).iter_mut() {
            let Some(account) = accounts.get(&kept.counted) else {
                continue;
            };
            kept.look(account);
            let balance = Balance {
                terms: kept.terms,
                account: *account,
                before_ns: kept.before_ns,
            };
            machines.insert(*machine, balance);
        }
        if let Err(error) = lock(&self.0.balances).save(machines) {
            self.0.failures.count(Failure::Write);
            tracing::error!(%error, "machines' credits are not written down");
        }
    }

    /// Resolves with machines whose levels have changed since the last call, once there are some; the last change of each counts.
    /// Never where the kernel does not tell.
    pub async fn crossed(&self) -> Vec<Crossing> {
        let Some(levels) = &self.0.levels else {
            return std::future::pending().await;
        };
        loop {
            levels.news().await;
            let this = self.clone();
            let taken = tokio::task::spawn_blocking(move || this.take_crossings());
            let crossed = taken.await.unwrap_or_default();
            if !crossed.is_empty() {
                return crossed;
            }
        }
    }

    fn take_crossings(&self) -> Vec<Crossing> {
        let mut crossed = self.0.levels.as_ref().map(Levels::take).unwrap_or_default();
        let lost = self.0.ledger.lost().map_or(0, |lost| lost.crossings);
        if std::mem::replace(&mut *lock(&self.0.lost), lost) != lost {
            tracing::warn!(
                lost,
                "changes of machines' credits were too many to be told of; all are looked at"
            );
            let accounts = self.read();
            for (machine, kept) in lock(&self.0.kept).iter() {
                if let Some(account) = accounts.get(&kept.counted) {
                    let crossing = crossed.entry(*machine).and_modify(|known| known.account = *account);
                    crossing.or_insert(Crossing {
                        machine: *machine,
                        account: *account,
                        held: None,
                    });
                }
            }
        }
        crossed.into_values().collect()
    }

    /// What was last written down of a machine that was gone when the agent started. To be asked before anything is written.
    pub fn of_gone(&self, machine: Ulid) -> Option<Standing> {
        let known = || lock(&self.0.balances).get(machine);
        let Balance { terms, account, .. } = self.0.gone.get(&machine).copied().or_else(known)?;
        Some(Standing {
            terms,
            account,
            used_millis: 0,
        })
    }

    fn read(&self) -> HashMap<CgroupId, Account> {
        match self.0.ledger.accounts() {
            Ok(accounts) => accounts.into_iter().collect(),
            Err(error) => {
                self.0.failures.count(Failure::Read);
                tracing::error!(%error, "machines' credits can't be read");
                HashMap::new()
            }
        }
    }
}

impl std::fmt::Debug for Accounts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Accounts").finish_non_exhaustive()
    }
}

// === impl Kept ===

impl Kept {
    /// Sees how much is used.
    fn look(&mut self, account: &Account) {
        let (since_ns, spent_ps) = self.looked;
        let (now_ns, now_ps) = (now_ns(), account.totals().spent.get());
        let passed_ns = now_ns.saturating_sub(since_ns);
        if passed_ns >= RATE_NS {
            // A millicore is 1 ps in each ns.
            let millis = now_ps.saturating_sub(spent_ps) / u128::from(passed_ns);
            self.used_millis = u32::try_from(millis).unwrap_or(u32::MAX);
            self.looked = (now_ns, now_ps);
        }
    }
}

/// What a cgroup has used in all, in ns, rounded down to us (`usage_usec`, cgroup-v2.rst).
fn used_ns(cgroup: &Cgroup) -> u64 {
    let micros = cgroup.keyed_number("cpu.stat", "usage_usec").unwrap_or(0);
    micros.saturating_mul(1000)
}

/// What an account was charged with in all.
fn spent_ns(account: &Account) -> u64 {
    u64::try_from(account.totals().spent.get() / 1000).unwrap_or(u64::MAX)
}

/// The clock that accounts are settled by (`bpf_ktime_get_ns`): CLOCK_MONOTONIC, in ns.
pub(crate) fn now_ns() -> u64 {
    // This clock is there on every Linux.
    let Ok(now) = clock_gettime(ClockId::CLOCK_MONOTONIC) else {
        return 0;
    };
    let part = |n: i64| u64::try_from(n).unwrap_or(0);
    part(now.tv_sec())
        .saturating_mul(1_000_000_000)
        .saturating_add(part(now.tv_nsec()))
}

/// Every change leaves it whole, so a panic elsewhere does no harm.
pub(super) fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}
