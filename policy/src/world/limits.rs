//! What limits and shares let accounts have, and what they have.

use std::sync::Arc;

use super::apply::ApplyError;
use super::{Account, HostRoom, SHARE_SCALE, Touch, World};
use crate::{AccountLimits, RequestId, Shape};

/// What an account has of what is limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AccountUse {
    /// Its machines, those that it launched among them, until they have ended.
    pub machines: u32,
    /// Those of them that it launched and that do not end.
    pub launched: u32,
    /// What its machines have of vCPUs, in millicores, or may still have of what was asked for before.
    pub cpu_millis: u64,
    /// Likewise of memory, in MiB.
    pub memory_mib: u64,
    /// The CPU that its containers and the machines that it launched were given, in millicores.
    pub given_millis: u64,
    /// Its requests that run, or for which a container is made.
    pub running: u32,
    /// Its requests that wait.
    pub waiting: u32,
}

impl World {
    /// What an account has.
    #[must_use]
    pub fn account_use(&self, account: &str) -> AccountUse {
        self.account(account).map(AccountUse::of).unwrap_or_default()
    }

    /// All accounts that have anything, in the order of their ids.
    pub fn accounts(&self) -> impl Iterator<Item = (&Arc<str>, AccountUse)> {
        self.accounts
            .iter()
            .map(|(name, account)| (name, AccountUse::of(account)))
    }

    /// An account may have so much from now on. What it has is left to it, and counts.
    pub(super) fn set_limits(&mut self, name: &Arc<str>, limits: &AccountLimits) -> Result<(), ApplyError> {
        if let Some(field) = limits.zero() {
            return Err(ApplyError::Zero(field));
        }
        let load = |world: &Self| world.account(name)?.load(world.rules.limits(name));
        let before = load(self);
        self.rules.set_limits(name, limits.clone());
        let after = load(self);
        self.change_load(name, before, after);
        let Some(account) = self.account(name) else {
            return Ok(());
        };
        let runtimes: Vec<_> = account.groups.keys().cloned().collect();
        self.refresh_line(name);
        // What its requests wait for it may have now, or may not.
        for runtime in runtimes {
            self.refresh_group(name, &runtime);
            self.unsettled.insert(runtime.clone());
            self.touched.push_back(Touch::Warming(runtime));
        }
        self.touched.push_back(Touch::Slot(name.clone()));
        Ok(())
    }

    /// Sets an account's place among those that have machines.
    pub(super) fn change_load(&mut self, name: &Arc<str>, before: Option<u64>, after: Option<u64>) {
        if before != after {
            if let Some(load) = before {
                self.loads.remove(&(load, name.clone()));
            }
            if let Some(load) = after {
                self.loads.insert((load, name.clone()));
            }
        }
    }

    /// Memory in MiB of an account's machines for each unit of its share, in thousandths. Those that end count no longer.
    pub(crate) fn load(&self, account: &str) -> u64 {
        self.load_with(account, 0, 0)
    }

    /// The same if it had so much memory in MiB less, and so much more.
    pub(crate) fn load_with(&self, account: &str, less: i64, more: i64) -> u64 {
        let memory = self.accounts.get(account).map_or(0, Account::lasting_mib);
        let memory = memory.saturating_sub(less).saturating_add(more);
        per_share(u64::try_from(memory).unwrap_or(0), self.rules.limits(account))
    }

    /// How many requests of an account wait for each unit of its share, `more` ones included.
    pub(crate) fn line_with(&self, account: &str, more: u64) -> u64 {
        let waiting = self.accounts.get(account).map_or(0, |account| account.line.len());
        per_share(
            u64::try_from(waiting).unwrap_or(u64::MAX) + more,
            self.rules.limits(account),
        )
    }

    /// Its limits let an account have a machine of this shape more.
    pub(crate) fn may_have(&self, account: &str, shape: Shape) -> bool {
        let limits = self.rules.limits(account);
        let has = self
            .accounts
            .get(account)
            .map_or_else(HostRoom::default, |account| account.has);
        has.plus(HostRoom::of(shape)).within(limits)
    }

    /// The same once its machines that end have ended.
    pub(crate) fn will_have(&self, account: &str, shape: Shape) -> bool {
        let limits = self.rules.limits(account);
        self.accounts
            .get(account)
            .is_none_or(|account| account.lasting().plus(HostRoom::of(shape)).within(limits))
    }

    /// How many requests an account may run at a time: none while guests are awaited that may have warm containers.
    fn concurrency(&self, account: &str) -> u32 {
        match self.awaits(account) {
            true => 0,
            false => self.rules.limits(account).concurrency,
        }
    }

    /// An account may run a request more.
    pub(crate) fn may_run(&self, account: &str) -> bool {
        let limit = self.concurrency(account);
        self.accounts.get(account).map_or(0, |account| account.running) < limit
    }

    /// How many more an account may run beside the request that comes first, or of `of` it, if there is one.
    pub(crate) fn slots(&self, account: &str, of: Option<RequestId>) -> u32 {
        let limit = self.concurrency(account);
        let found = self.account(account);
        let kept = found.is_some_and(|found| found.next.is_some() && found.next != of);
        limit.saturating_sub(found.map_or(0, |found| found.running) + u32::from(kept))
    }

    /// Its limits let an account have a machine of this shape for one request alone, beside those that boot likewise.
    pub(crate) fn may_reserve(&self, account: &str, shape: Shape) -> bool {
        let (limits, concurrency) = (self.rules.limits(account), self.concurrency(account));
        self.accounts.get(account).is_none_or(|account| {
            let all = account.has.plus(account.reserved).plus(HostRoom::of(shape));
            i64::from(account.running) + account.reserved.machines < concurrency.into() && all.within(limits)
        })
    }
}

// === impl AccountUse ===

impl AccountUse {
    fn of(account: &Account) -> Self {
        // Sums of what is never less than nothing.
        let natural = |sum: i64| u64::try_from(sum).unwrap_or(0);
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let HostRoom {
            machines,
            memory_mib,
            cpu_millis,
            ..
        } = account.has;
        Self {
            machines: u32::try_from(machines).unwrap_or(0),
            launched: count(account.launched.len()),
            cpu_millis: natural(cpu_millis),
            memory_mib: natural(memory_mib),
            given_millis: account.given_millis,
            running: account.running,
            waiting: count(account.line.len()),
        }
    }
}

pub(super) fn per_share(value: u64, limits: &AccountLimits) -> u64 {
    value.saturating_mul(SHARE_SCALE) / u64::from(limits.share.max(1))
}
