//! What limits and shares let accounts have.

use super::{Account, HostRoom, SHARE_SCALE, World};
use crate::{AccountLimits, RequestId, Shape};

impl World {
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

pub(super) fn per_share(value: u64, limits: &AccountLimits) -> u64 {
    value.saturating_mul(SHARE_SCALE) / u64::from(limits.share.max(1))
}
