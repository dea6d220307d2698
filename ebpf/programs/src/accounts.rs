//! Accounts of credits, by the rules of the crate `stoker_credits`.
//!
//! A lock that is waited for is not allowed here. So what threads ran is added to what is pending, and whoever gets the lock takes
//! all of it into the account; who does not get it goes on, and leaves its part to the next, at the next tick at the latest. It is
//! tried once something may come of it: where the level might fall, or a ms was used.
//!
//! The kernel charges a thread that runs on at its tick alone. Where the level may fall before that, user space is told, which can have
//! the thread charged in time.

use core::intrinsics::{
    AtomicOrdering::{AcqRel, Relaxed},
    atomic_cxchg, atomic_xadd, atomic_xchg,
};

use aya_ebpf::{macros::raw_tracepoint, programs::RawTracePointContext};
use stoker_credits::{Account, Crossing, Terms};
use stoker_ebpf_types::{AccountEntry, Change, Crossed, Near, Operation, Outcome, Subject, is_near, settle_after};

use crate::cpu::now;
use crate::maps::{ACCOUNTS, CHANGE, CROSSINGS, NEAR, NEAR_COUNT, lost, of_machines, uncharged_ns};
use crate::threads;

/// How often user space's operation looks whether the lock is free: longer than anybody has it.
const LOCK_TRIES: u32 = 64;

/// A subject used so much CPU time.
#[inline(always)]
pub fn spend(subject: &Subject, ran: u64) {
    if let Some(entry) = account_of(subject) {
        // SAFETY: elements of an array live as long as the map; this field is changed by atomic operations alone.
        unsafe { atomic_xadd::<u64, u64, { Relaxed }>(&raw mut (*entry).pending_ns, ran) };
    }
}

/// Takes what is pending into a subject's account, where that is due and nobody else does at this moment.
#[inline(always)]
pub fn settle_due(subject: &Subject, now: u64) {
    let Some(entry) = account_of(subject) else { return };
    // SAFETY: elements of an array live as long as the map. Who has the lock has all but what is pending, and others look at the
    // rest without it only to see whether they want it.
    unsafe {
        let pending = (&raw const (*entry).pending_ns).read_volatile();
        if pending < (&raw const (*entry).settle_after_ns).read_volatile() {
            return;
        }
        if let Some(lock) = lock(entry) {
            let used = take_pending(entry);
            let crossing = (*entry).account.settle(&(*entry).terms, now, used);
            finish(subject.slot(), entry, lock, crossing);
            tell_near(subject.slot(), entry);
        }
    }
}

/// A thread comes to a CPU; tells where it may fall to another level before the kernel charges it. Its run queue is locked.
#[inline(always)]
pub fn arrive(thread: u64) {
    if !of_machines() || uncharged_ns() == 0 {
        return;
    }
    // SAFETY: elements of an array live as long as the map.
    let near = NEAR_COUNT.get_ptr(0).map_or(0, |near| unsafe { near.read_volatile() });
    if near != 0 {
        arrive_near(thread);
    }
}

/// A function of its own: it is rarely needed.
#[inline(never)]
fn arrive_near(thread: u64) -> u64 {
    if let Some(kept) = threads::find(thread)
        && let Some(entry) = account_of(&kept.subject)
    {
        tell_near(kept.subject.slot(), entry);
    }
    0
}

/// The account of a subject, if it has one.
#[inline(always)]
fn account_of(subject: &Subject) -> Option<*mut AccountEntry> {
    // Nobody's generation is 0, as is that of an account that is none.
    if !of_machines() || subject.generation == 0 {
        return None;
    }
    let entry = ACCOUNTS.get_ptr_mut(subject.slot())?;
    // SAFETY: elements of an array live as long as the map; others change this at any time, so it is read once.
    let generation = unsafe { (&raw const (*entry).generation).read_volatile() };
    (generation == u64::from(subject.generation)).then_some(entry)
}

/// Changes an account as `CHANGE` says: an [`Operation`], of which an [`Outcome`] comes. Nothing calls this but user space, with
/// `BPF_PROG_TEST_RUN`, one after the other.
#[raw_tracepoint(tracepoint = "account")]
pub fn account(_: RawTracePointContext) -> i32 {
    if let Some(change) = CHANGE.get_ptr_mut(0) {
        // SAFETY: user space writes it before it runs this, and reads it after.
        let change = unsafe { &mut *change };
        change.outcome = carry_out(change) as u32;
    }
    0
}

#[inline(always)]
fn carry_out(change: &mut Change) -> Outcome {
    let Some(entry) = ACCOUNTS.get_ptr_mut(change.slot) else {
        return Outcome::Unknown;
    };
    for _ in 0..LOCK_TRIES {
        // SAFETY: elements of an array live as long as the map; who has the lock has the rest.
        unsafe {
            if let Some(lock) = lock(entry) {
                return apply(change, entry, lock);
            }
        }
    }
    Outcome::Busy
}

/// # Safety
///
/// The lock is had; it is not after.
#[inline(always)]
unsafe fn apply(change: &mut Change, entry: *mut AccountEntry, lock: u64) -> Outcome {
    let now = now();
    let operation = change.operation;
    let is = |wanted: Operation| operation == wanted as u32;
    // SAFETY: as the caller says.
    unsafe {
        if is(Operation::Open) || is(Operation::Hold) {
            (*entry).account = Account::default();
            (*entry).terms = Terms::default();
            (*entry).settle_after_ns = u64::MAX;
            if is(Operation::Open) {
                (*entry).terms = change.terms;
                (*entry).account = Account::open(&change.terms, now);
            }
            take_pending(entry);
            (&raw mut (*entry).generation).write_volatile(change.generation.into());
            return done(change, entry, lock, None);
        }
        if (*entry).generation != u64::from(change.generation) {
            unlock(entry, lock);
            return Outcome::Unknown;
        }
        let (account, terms) = (&raw mut (*entry).account, &raw mut (*entry).terms);
        let used = if is(Operation::Grant) { 0 } else { take_pending(entry) };
        let crossing = if is(Operation::Restore) {
            *account = change.account;
            *terms = change.terms;
            (*account).restore(&*terms, now, change.amount.saturating_add(used))
        } else if is(Operation::SetTerms) {
            let crossing = (*account).resize(&*terms, &change.terms, now, used);
            *terms = change.terms;
            crossing
        } else if is(Operation::Grant) {
            (*account).grant(&*terms, change.amount)
        } else if is(Operation::Close) {
            (&raw mut (*entry).generation).write_volatile(0);
            (*account).close(&*terms, now, used);
            None
        } else {
            (*account).settle(&*terms, now, used)
        };
        done(change, entry, lock, crossing)
    }
}

/// # Safety
///
/// As of [`apply`].
#[inline(always)]
unsafe fn done(change: &mut Change, entry: *mut AccountEntry, lock: u64, crossing: Option<Crossing>) -> Outcome {
    // SAFETY: as the caller says.
    unsafe {
        change.account = (*entry).account;
        change.terms = (*entry).terms;
        // User space looks at it now.
        (*entry).is_told = 0;
        if change.operation == Operation::Hold as u32 {
            set_near(entry, 0);
            unlock(entry, lock);
        } else {
            finish(change.slot, entry, lock, crossing);
        }
    }
    Outcome::Done
}

/// Gives the lock back after a change, and tells of a crossing.
///
/// # Safety
///
/// As of [`apply`].
#[inline(always)]
unsafe fn finish(slot: u32, entry: *mut AccountEntry, lock: u64, crossing: Option<Crossing>) {
    // SAFETY: as the caller says.
    unsafe {
        let slack = (*entry).account.slack_ns(&(*entry).terms);
        (&raw mut (*entry).settle_after_ns).write_volatile(settle_after(slack));
        // Not one that was closed.
        let is_near = is_near(slack, &(*entry).terms, uncharged_ns()) && (*entry).generation != 0;
        set_near(entry, if is_near { slack.wrapping_add(1) } else { 0 });
        if let Some(crossing) = crossing {
            tell(slot, entry, crossing);
        }
        unlock(entry, lock);
    }
}

/// # Safety
///
/// The lock is had.
#[inline(always)]
unsafe fn set_near(entry: *mut AccountEntry, near_ns: u64) {
    // SAFETY: as the caller says; the count is changed by atomic operations alone.
    unsafe {
        let was_near = (*entry).near_ns != 0;
        (&raw mut (*entry).near_ns).write_volatile(near_ns);
        let is_near = near_ns != 0;
        if was_near != is_near
            && let Some(count) = NEAR_COUNT.get_ptr_mut(0)
        {
            let change = if is_near { 1 } else { u64::MAX };
            atomic_xadd::<u64, u64, { Relaxed }>(count, change);
        }
    }
}

/// Tells that an account's level may fall soon, where that is so and was not told. It is not told where there is no room: the level is
/// right at the next tick all the same.
#[inline(always)]
fn tell_near(slot: u32, entry: *mut AccountEntry) {
    // SAFETY: elements of an array live as long as the map. Nothing depends on this being told once.
    unsafe {
        let near = (&raw const (*entry).near_ns).read_volatile();
        if near == 0 || (&raw const (*entry).is_told).read_volatile() != 0 {
            return;
        }
        let Some(mut record) = NEAR.reserve::<Near>(0) else {
            return;
        };
        let pending = (&raw const (*entry).pending_ns).read_volatile();
        let told = record.as_mut_ptr();
        (*told).slot = slot;
        (*told).generation = (&raw const (*entry).generation).read_volatile() as u32;
        (*told).left_ns = near.saturating_sub(pending);
        (&raw mut (*entry).is_told).write_volatile(1);
        record.submit(0);
    }
}

/// # Safety
///
/// The lock is had.
#[inline(always)]
unsafe fn tell(slot: u32, entry: *const AccountEntry, crossing: Crossing) {
    let Some(mut record) = CROSSINGS.reserve::<Crossed>(0) else {
        lost(|lost| lost.crossings += 1);
        return;
    };
    let crossed = record.as_mut_ptr();
    // SAFETY: the record has room for it, and the entry does not change under the lock.
    unsafe {
        (*crossed).slot = slot;
        (*crossed).generation = (*entry).generation as u32;
        (*crossed).crossing = crossing;
        (*crossed).account = (*entry).account;
    }
    record.submit(0);
}

/// The lock, if it is free.
///
/// # Safety
///
/// The pointer is to an element of `ACCOUNTS`.
#[inline(always)]
unsafe fn lock(entry: *mut AccountEntry) -> Option<u64> {
    // SAFETY: as the caller says; others change it by atomic operations alone.
    unsafe {
        let lock = &raw mut (*entry).lock;
        let free = lock.read_volatile();
        (free % 2 == 0 && atomic_cxchg::<u64, { AcqRel }, { Relaxed }>(lock, free, free.wrapping_add(1)).1)
            .then_some(free)
    }
}

/// Gives back what was free as `lock`.
///
/// # Safety
///
/// The lock is had; it is not after.
#[inline(always)]
unsafe fn unlock(entry: *mut AccountEntry, lock: u64) {
    // SAFETY: as the caller says.
    unsafe {
        atomic_xchg::<u64, { AcqRel }>(&raw mut (*entry).lock, lock.wrapping_add(2));
    }
}

/// # Safety
///
/// As of [`lock`].
#[inline(always)]
unsafe fn take_pending(entry: *mut AccountEntry) -> u64 {
    // SAFETY: as the caller says; others change it by atomic operations alone.
    unsafe { atomic_xchg::<u64, { AcqRel }>(&raw mut (*entry).pending_ns, 0) }
}
