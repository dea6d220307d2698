//! Accounts of credits: what user space does with them.
//!
//! They are the kernel's: programs settle them as threads are charged. What changes one otherwise is done by a program too, under
//! the same lock.

use std::os::fd::{AsFd, BorrowedFd};
use std::thread;

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use stoker_credits::{Account, Level, Terms};
use stoker_ebpf_types::{Change, Crossed, Near, Operation, Outcome};

use crate::cgroup::CgroupId;
use crate::error::{LedgerError, reading, writing};
use crate::ledger::Ledger;
use crate::running;
use crate::slots::Slot;
use crate::state::{Busy, State};

/// How often an account is tried that is busy: far longer than any program takes, even where a CPU is taken from it meanwhile.
const TRIES: u32 = 10_000;

/// An account went to another level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Crossing {
    /// Whose it is.
    pub owner: CgroupId,
    /// Where it was.
    pub from: Level,
    /// Where it went.
    pub to: Level,
    /// The account at that moment.
    pub account: Account,
}

impl Ledger {
    /// Gives a subject an account: from now on what it uses is spent, by these terms. One that it has ends.
    ///
    /// # Errors
    ///
    /// Where the subject is unknown, or the kernel refuses.
    pub fn open_account(&self, owner: CgroupId, terms: &Terms) -> Result<Account, LedgerError> {
        let change = |change: &mut Change| change.terms = *terms;
        self.change(&mut self.lock(), owner, Operation::Open, change)
    }

    /// Gives a subject an account that was saved. `unsaved_ns` is the most CPU time that may have been used since: see
    /// [`Account::restore`].
    ///
    /// # Errors
    ///
    /// As [`Ledger::open_account`].
    pub fn restore_account(
        &self,
        owner: CgroupId,
        terms: &Terms,
        account: &Account,
        unsaved_ns: u64,
    ) -> Result<Account, LedgerError> {
        let mut state = self.lock();
        self.change(&mut state, owner, Operation::Hold, |_| {})?;
        self.restore(&mut state, owner, terms, account, unsaved_ns)
    }

    /// Goes over to other terms, from now on: see [`Account::resize`].
    ///
    /// # Errors
    ///
    /// Where there is no such account, or the kernel refuses.
    pub fn set_terms(&self, owner: CgroupId, terms: &Terms) -> Result<Account, LedgerError> {
        let change = |change: &mut Change| change.terms = *terms;
        self.change(&mut self.lock(), owner, Operation::SetTerms, change)
    }

    /// Gives an account so many ps: see [`Account::grant`].
    ///
    /// # Errors
    ///
    /// As [`Ledger::set_terms`].
    pub fn grant(&self, owner: CgroupId, ps: u64) -> Result<Account, LedgerError> {
        self.change(&mut self.lock(), owner, Operation::Grant, |change| change.amount = ps)
    }

    /// Settles an account up to now; its level may change, of which is told as of any other change. So the account of a machine
    /// that sleeps, which has no events, comes to what it has earned.
    ///
    /// # Errors
    ///
    /// As [`Ledger::set_terms`].
    pub fn settle_account(&self, owner: CgroupId) -> Result<Account, LedgerError> {
        self.change(&mut self.lock(), owner, Operation::Settle, |_| {})
    }

    /// Settles an account for the last time and ends it: see [`Account::close`].
    ///
    /// # Errors
    ///
    /// As [`Ledger::set_terms`].
    pub fn close_account(&self, owner: CgroupId) -> Result<Account, LedgerError> {
        self.change(&mut self.lock(), owner, Operation::Close, |_| {})
    }

    /// A subject's account and its terms, as it would be were it settled now; `None` where it has none. Nothing is changed.
    ///
    /// # Errors
    ///
    /// Where the subject is unknown.
    pub fn account(&self, owner: CgroupId) -> Result<Option<(Terms, Account)>, LedgerError> {
        read(&self.lock(), owner)
    }

    /// Where a subject's account is: its slot, and the generation of who has that.
    ///
    /// # Errors
    ///
    /// Where the subject is unknown.
    pub fn account_place(&self, owner: CgroupId) -> Result<(u32, u32), LedgerError> {
        let slot = self.lock().subject(owner)?.slot;
        Ok((slot.index, slot.generation))
    }

    /// All accounts, each as it would be were it settled now, in no order. Nothing is changed.
    ///
    /// # Errors
    ///
    /// Where the clock can't be read, or one account is busy at every moment.
    pub fn accounts(&self) -> Result<Vec<(CgroupId, Account)>, LedgerError> {
        let state = self.lock();
        let mut accounts = Vec::new();
        for &owner in state.subjects.keys() {
            if let Some((_, account)) = read(&state, owner)? {
                accounts.push((owner, account));
            }
        }
        Ok(accounts)
    }

    /// What is readable, to `poll` and its like, where accounts went to another level since they were [drained](Self::drain)
    /// last. Those of a time when nobody looked are there too, as far as there was room ([`Ledger::lost`]).
    pub fn crossings(&self) -> BorrowedFd<'_> {
        self.crossings.as_fd()
    }

    /// Tells of accounts that went to another level, in the order in which they did, and of each once. A record is of the past:
    /// what it says was so then. Who begins to look, or finds that some were lost, looks at [`Ledger::accounts`] too.
    pub fn drain(&self, mut tell: impl FnMut(Crossing)) {
        loop {
            // `tell` may ask the ledger.
            let crossing = match next(&mut self.lock()) {
                None => break,
                Some(None) => continue,
                Some(Some(crossing)) => crossing,
            };
            tell(crossing);
        }
    }

    /// What is readable where a machine runs whose level may fall before the kernel charges its threads, which it does with those that
    /// run on at its ticks alone. Never on kernels with a short tick.
    pub fn near(&self) -> BorrowedFd<'_> {
        self.near.as_fd()
    }

    /// Tells of machines of which that is so, with how much CPU time in ns is left to each until then. Each is told of once, until
    /// something is done to its account, as it is to [settle](Self::settle_account) it. Who has the machine's threads
    /// [charged](Self::charge) in time sees its level change as soon.
    pub fn drain_near(&self, mut tell: impl FnMut(CgroupId, u64)) {
        loop {
            let (owner, left_ns) = {
                let mut state = self.lock();
                let Some(item) = state.maps.near.next() else { break };
                let near = record::<Near>(&item);
                drop(item);
                let Some(near) = near else { continue };
                let slot = Slot {
                    index: near.slot,
                    generation: near.generation,
                };
                match state.owner(slot) {
                    Some(owner) => (owner, near.left_ns),
                    None => continue,
                }
            };
            tell(owner, left_ns);
        }
    }

    /// Has the kernel charge a subject's threads that run, with what they ran up to now: the calling thread goes to their CPUs, one after
    /// the other, and takes each for a moment. It stays on the last of them. On one that it may not use nothing is charged before the
    /// next tick. To read the clock of their process would not do: that charges threads of the reader alone (`thread_group_cputime` of the
    /// kernel's `kernel/sched/cputime.c`).
    ///
    /// # Errors
    ///
    /// Where the subject is unknown, or the kernel refuses.
    pub fn charge(&self, owner: CgroupId) -> Result<(), LedgerError> {
        let running = {
            let state = self.lock();
            let slot = state.subject(owner)?.slot;
            state.running()?.cpus_of(slot).collect::<Vec<_>>()
        };
        for cpu in running {
            let mut only = CpuSet::new();
            let _ = only.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &only));
        }
        Ok(())
    }

    /// Whether an account is one of which that may be told. Never on kernels with a short tick.
    pub fn is_near(&self, account: &Account, terms: &Terms) -> bool {
        stoker_ebpf_types::is_near(account.slack_ns(terms), terms, self.uncharged_ns)
    }

    /// Ends the account of a subject, where it has one.
    pub(crate) fn end_account(&self, state: &mut State, owner: CgroupId) -> Result<(), LedgerError> {
        let slot = state.subject(owner)?.slot;
        match state.account(slot) {
            Ok(None) => Ok(()),
            _ => self.change(state, owner, Operation::Close, |_| {}).map(|_| ()),
        }
    }

    /// Takes over an account from earlier programs, which count on.
    pub(crate) fn carry_account(&self, state: &mut State, owner: CgroupId, old: &Self) -> Result<(), LedgerError> {
        let mut before = old.lock();
        let Some((terms, _)) = read(&before, owner)? else {
            return Ok(());
        };
        // What is used between these two is spent twice. The other way round it would be had for nothing.
        self.change(state, owner, Operation::Hold, |_| {})?;
        let account = old.change(&mut before, owner, Operation::Settle, |_| {})?;
        self.restore(state, owner, &terms, &account, 0).map(|_| ())
    }

    fn restore(
        &self,
        state: &mut State,
        owner: CgroupId,
        terms: &Terms,
        account: &Account,
        unsaved_ns: u64,
    ) -> Result<Account, LedgerError> {
        let change = |change: &mut Change| {
            change.terms = *terms;
            change.account = *account;
            change.amount = unsaved_ns;
        };
        self.change(state, owner, Operation::Restore, change)
    }

    /// Lets the program do something to an account; returns what it is then. The lock keeps two from doing so at once.
    fn change(
        &self,
        state: &mut State,
        owner: CgroupId,
        operation: Operation,
        fill: impl FnOnce(&mut Change),
    ) -> Result<Account, LedgerError> {
        const MAP: &str = "CHANGE";
        let slot = state.subject(owner)?.slot;
        let mut change = Change {
            operation: operation as u32,
            slot: slot.index,
            generation: slot.generation,
            outcome: Outcome::Unknown as u32,
            ..Change::default()
        };
        fill(&mut change);
        state.maps.change.set(0, change, 0).map_err(writing(MAP))?;
        for _ in 0..TRIES {
            self.programs().change_account()?;
            let changed = state.maps.change.get(&0, 0).map_err(reading(MAP))?;
            if changed.outcome == Outcome::Done as u32 {
                return Ok(changed.account);
            }
            if changed.outcome != Outcome::Busy as u32 {
                return Err(LedgerError::NoAccount(owner));
            }
            thread::yield_now();
        }
        Err(LedgerError::Busy(owner))
    }
}

/// An account and its terms, settled to now.
fn read(state: &State, owner: CgroupId) -> Result<Option<(Terms, Account)>, LedgerError> {
    let slot = state.subject(owner)?.slot;
    for _ in 0..TRIES {
        match state.account(slot) {
            Ok(None) => return Ok(None),
            Err(Busy) => thread::yield_now(),
            Ok(Some(entry)) => {
                let now_ns = running::now_ns().map_err(LedgerError::Clock)?;
                let mut account = entry.account;
                account.settle(&entry.terms, now_ns, entry.pending_ns);
                return Ok(Some((entry.terms, account)));
            }
        }
    }
    Err(LedgerError::Busy(owner))
}

/// The next record; `Some(None)` for one of a subject that is gone.
fn next(state: &mut State) -> Option<Option<Crossing>> {
    let item = state.maps.crossings.next()?;
    let crossed = record::<Crossed>(&item);
    drop(item);
    Some(crossed.and_then(|crossed| {
        let slot = Slot {
            index: crossed.slot,
            generation: crossed.generation,
        };
        Some(Crossing {
            owner: state.owner(slot)?,
            from: crossed.crossing.from,
            to: crossed.crossing.to,
            account: crossed.account,
        })
    }))
}

/// What a record says; nothing where it is too short.
fn record<T: Record>(bytes: &[u8]) -> Option<T> {
    if bytes.len() < size_of::<T>() {
        return None;
    }
    // SAFETY: there are as many bytes, and any are a value of it.
    Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

/// What is in a ring buffer.
///
/// # Safety
///
/// Any bytes are a value of it.
unsafe trait Record: Copy {}

// SAFETY: `repr(C)` and made of integers.
unsafe impl Record for Crossed {}
// SAFETY: as above.
unsafe impl Record for Near {}
