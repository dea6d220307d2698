//! Accounts of credits in a map, and how user space changes them.

use stoker_credits::{Account, Crossing, Terms};

/// What was used is taken into an account once it is so much, in ns of CPU time: often enough for people and policies to see
/// it, and far too rarely to cost anything. Before that it is wherever the level might fall.
pub const SETTLE_AFTER_NS: u64 = 1_000_000;

/// How much CPU time in ns an account may have pending before it has to be settled, where so much is left until its level may fall.
#[inline(always)]
pub const fn settle_after(slack_ns: u64) -> u64 {
    if slack_ns < SETTLE_AFTER_NS {
        slack_ns.wrapping_add(1)
    } else {
        SETTLE_AFTER_NS
    }
}

/// Whether an account's level may fall before its threads are charged again, where so much CPU time in ns is left until then, and each
/// of them is charged only every `uncharged_ns`.
#[inline(always)]
pub fn is_near(slack_ns: u64, terms: &Terms, uncharged_ns: u32) -> bool {
    slack_ns < u64::from(uncharged_ns).wrapping_mul(u64::from(terms.full_millis())) / 1000
}

/// What `ACCOUNTS` holds for a slot.
///
/// What threads ran is added to `pending_ns` by any CPU. The rest is changed by who has the lock alone, which is had by a
/// compare-and-swap or not at all: nobody waits for it, and what is pending is taken by the next.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AccountEntry {
    /// Odd while somebody changes the rest, and another number after each change: who reads it before and after the rest has
    /// read a whole where it is the same, and even.
    pub lock: u64,
    /// The generation of the slot's owner whose account it is: see [`Subject::generation`](crate::Subject::generation); 0 where it
    /// has none.
    pub generation: u64,
    /// CPU time in ns that was used and is not in the account yet.
    pub pending_ns: u64,
    /// Where more than this is pending, or as much, it is settled; never 0.
    pub settle_after_ns: u64,
    /// Where its level [may fall](is_near) soon, how much CPU time in ns is left until then, without what is pending, and 1; else 0.
    pub near_ns: u64,
    /// Whether user space was told so: not again before it has looked at the account.
    pub is_told: u64,
    /// What it is settled by.
    pub terms: Terms,
    /// The account itself.
    pub account: Account,
}

/// What user space lets the program `account` do.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Gives a subject a new account by [`Change::terms`], in the place of one that it has.
    Open = 1,
    /// Begins to collect what a subject uses, for an account that [`Operation::Restore`] brings.
    Hold = 2,
    /// Goes on with [`Change::account`] by [`Change::terms`], with [`Change::amount`] ns of CPU time and what is pending used
    /// since; see [`Account::restore`].
    Restore = 3,
    /// Goes over to [`Change::terms`].
    SetTerms = 4,
    /// Gives it [`Change::amount`] ps.
    Grant = 5,
    /// Settles it.
    Settle = 6,
    /// Settles it for the last time, and ends it.
    Close = 7,
}

/// What came of an operation.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is done, and [`Change::account`] and [`Change::terms`] are as they are now.
    Done = 0,
    /// Another CPU changes the account at this moment: nothing was done.
    Busy = 1,
    /// There is no such account, or no such operation.
    Unknown = 2,
}

/// What `CHANGE` holds: an operation, and what came of it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// An [`Operation`].
    pub operation: u32,
    /// The slot of the subject.
    pub slot: u32,
    /// Its generation.
    pub generation: u32,
    /// An [`Outcome`], set by the program.
    pub outcome: u32,
    /// See the operation.
    pub amount: u64,
    /// By which the account is settled.
    pub terms: Terms,
    /// The account.
    pub account: Account,
}

/// A record of `NEAR`: a machine runs on, or comes to run, and its level may fall before the kernel charges it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Near {
    /// The slot of the subject.
    pub slot: u32,
    /// Its generation.
    pub generation: u32,
    /// How much CPU time in ns is left until then.
    pub left_ns: u64,
}

/// A record of `CROSSINGS`: an account went to another level.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Crossed {
    /// The slot of the subject.
    pub slot: u32,
    /// Its generation.
    pub generation: u32,
    /// Where it was, and where it is now.
    pub crossing: Crossing,
    /// The account as it is now; settled at the time of the crossing.
    pub account: Account,
}
