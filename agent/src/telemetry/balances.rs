//! What is written down of machines' accounts, for an agent that finds them no more where they are kept: after the host was
//! restarted, or where the kernel's maps are gone with the agent before.
//!
//! One file for all, written at most twice a second, and only where an account is not what follows from what is written: that one
//! earns is known. It is on disk when it is written, and nobody waits for that.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use stoker_credits::{Account, LAYOUT, Terms};
use ulid::Ulid;

use crate::files;

/// The file's name, in the folder of the database.
const FILE: &str = "credits.json";

/// Tells one start of the host from another (proc_sys_kernel(5)).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// A machine's account as it was written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Balance {
    /// What it went by.
    pub(crate) terms: Terms,
    /// The account.
    pub(crate) account: Account,
    /// What the machine's cgroup had used before the account was opened, in ns.
    pub(crate) before_ns: u64,
}

/// All of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct All {
    layout: u32,
    boot: String,
    machines: BTreeMap<Ulid, Balance>,
}

/// The file.
#[derive(Debug)]
pub(super) struct Balances {
    path: PathBuf,
    all: All,
}

// === impl Balance ===

impl Balance {
    /// Whether the other is what becomes of it where its machine does nothing.
    fn leads_to(&self, other: &Self) -> bool {
        let mut then = *self;
        then.account.settle(&self.terms, other.account.settled_ns(), 0);
        then == *other
    }
}

// === impl Balances ===

impl Balances {
    /// Reads what was written down, of accounts whose machines may still run: nothing of another start of the host, whose
    /// machines are gone; they are answered apart. Blocks.
    ///
    /// # Errors
    /// Where the file is damaged, or of another version: one with nothing in it takes its place.
    pub(super) fn open(folder: &Path) -> Result<(Self, BTreeMap<Ulid, Balance>), Self> {
        let path = folder.join(FILE);
        // Without it nothing is taken for what is of this start.
        let boot = std::fs::read_to_string(BOOT_ID).unwrap_or_default().trim().to_owned();
        let found = files::read_json::<All>(&path);
        let mut balances = Self {
            path,
            all: All {
                layout: LAYOUT,
                boot,
                machines: BTreeMap::new(),
            },
        };
        let why = match found {
            Ok(None) => return Ok((balances, BTreeMap::new())),
            Ok(Some(found)) if found.layout == LAYOUT => {
                let All { boot, machines, .. } = found;
                if boot != balances.all.boot || boot.is_empty() {
                    return Ok((balances, machines));
                }
                balances.all.machines = machines;
                return Ok((balances, BTreeMap::new()));
            }
            Ok(Some(found)) => format!("it has the layout {}, not {LAYOUT}", found.layout),
            Err(error) => error.to_string(),
        };
        tracing::warn!("the balances in {} are not restored: {why}", balances.path.display());
        Err(balances)
    }

    /// What is written down of a machine.
    pub(super) fn get(&self, machine: Ulid) -> Option<Balance> {
        self.all.machines.get(&machine).copied()
    }

    /// Writes these in place of all that was, where they are others. Blocks until they are on disk.
    ///
    /// # Errors
    /// Where it can't be written; it is tried again with the next.
    pub(super) fn save(&mut self, machines: BTreeMap<Ulid, Balance>) -> io::Result<()> {
        let known = self.all.machines.len() == machines.len()
            && machines
                .iter()
                .all(|(machine, now)| self.get(*machine).is_some_and(|before| before.leads_to(now)));
        if known {
            return Ok(());
        }
        let all = All {
            machines,
            ..self.all.clone()
        };
        files::write_json(&self.path, &all, true)?;
        self.all = all;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use stoker_credits::{Mode, Plan};

    use super::*;

    fn balance(now_ns: u64) -> Balance {
        let terms = Plan::new(2, 200, Mode::Standard).terms().unwrap();
        Balance {
            terms,
            account: Account::open(&terms, now_ns),
            before_ns: 7,
        }
    }

    #[test]
    fn what_is_written_is_found_and_only_where_it_changed() {
        let dir = tempfile::tempdir().unwrap();
        let (mut balances, gone) = Balances::open(dir.path()).unwrap();
        assert!(gone.is_empty());
        let one = BTreeMap::from([(Ulid(1), balance(5))]);
        balances.save(one.clone()).unwrap();
        let (mut balances, gone) = Balances::open(dir.path()).unwrap();
        assert_eq!((balances.get(Ulid(1)), gone.len()), (Some(balance(5)), 0));
        assert_eq!(balances.get(Ulid(2)), None);
        std::fs::remove_file(dir.path().join(FILE)).unwrap();
        balances.save(one.clone()).unwrap();
        assert!(!dir.path().join(FILE).exists(), "it is the same");
        let mut later = balance(5);
        later.account.settle(&later.terms, 1_000_000_005, 0);
        balances.save([(Ulid(1), later)].into()).unwrap();
        assert!(!dir.path().join(FILE).exists(), "it follows from what is written");
        later.account.settle(&later.terms, 1_000_000_005, 1);
        balances.save([(Ulid(1), later)].into()).unwrap();
        assert!(dir.path().join(FILE).exists(), "1 ns was used");
        std::fs::remove_file(dir.path().join(FILE)).unwrap();
        balances.save(BTreeMap::new()).unwrap();
        assert!(dir.path().join(FILE).exists(), "the machine is gone");
    }

    #[test]
    fn what_is_of_another_start_of_the_host_is_of_machines_that_are_gone() {
        let dir = tempfile::tempdir().unwrap();
        let (mut balances, _) = Balances::open(dir.path()).unwrap();
        balances.save([(Ulid(1), balance(5))].into()).unwrap();
        let path = dir.path().join(FILE);
        let text = std::fs::read_to_string(&path).unwrap();
        let with = |from: &str, to: &str| {
            let other = text.replace(from, to);
            assert_ne!(other, text);
            std::fs::write(&path, other).unwrap();
            Balances::open(dir.path())
        };
        let (of_other, gone) = with(&balances.all.boot, "another").unwrap();
        assert_eq!((of_other.get(Ulid(1)), gone.get(&Ulid(1))), (None, Some(&balance(5))));
        let other = with("\"layout\":1", "\"layout\":2").unwrap_err();
        assert_eq!(other.get(Ulid(1)), None, "it means something else");
        let damaged = with("{\"layout\"", "\"layout\"").unwrap_err();
        assert_eq!(damaged.get(Ulid(1)), None);
    }
}
