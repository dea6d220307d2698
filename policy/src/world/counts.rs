//! How many requests and machines accounts have.

use std::sync::Arc;

use super::{Account, HostRoom, Touch, World};
use crate::Shape;

impl World {
    /// An account runs one request more (`true`) or less.
    pub(super) fn count_running(&mut self, name: &Arc<str>, more: bool) {
        let limit = self.rules.limits(name).concurrency;
        let account = self.accounts.entry(name.clone()).or_default();
        let before = account.running;
        account.running = if more { before + 1 } else { before.saturating_sub(1) };
        // One is kept for the request that comes first.
        let kept = u32::from(account.next.is_some());
        let least = limit.saturating_sub(before.max(account.running).saturating_add(kept));
        if account.line.len() <= usize::try_from(least).unwrap_or(usize::MAX) {
            return;
        }
        // How many of those that wait may run has changed, and with it how many machines they want.
        for runtime in account.groups.keys().cloned().collect::<Vec<_>>() {
            self.refresh_group(name, &runtime);
        }
        if !more && before.saturating_add(kept) >= limit {
            // The one that waits longest comes before what else became free.
            self.touched.push_front(Touch::Slot(name.clone()));
        }
    }

    /// A machine more (`true`) or less is for a request of an account alone.
    pub(super) fn count_reserved(&mut self, account: &Arc<str>, shape: Shape, more: bool) {
        let Some(account) = self.accounts.get_mut(account) else {
            return;
        };
        let room = HostRoom::of(shape);
        account.reserved = if more {
            account.reserved.plus(room)
        } else {
            account.reserved.minus(room)
        };
    }

    /// An account has a machine more (`true`) or less.
    pub(super) fn count_machine(&mut self, name: &Arc<str>, shape: Shape, more: bool) {
        let room = HostRoom::of(shape);
        let runtimes = self.count(name, |account| {
            if more {
                account.has = account.has.plus(room);
            } else {
                // It has been retired, so that it counts among those that end.
                account.has = account.has.minus(room);
                account.ending = account.ending.minus(room);
            }
        });
        for runtime in runtimes {
            let waits = self.group(name, &runtime).is_some_and(|group| !group.queue.is_empty());
            if !more && waits {
                // Its limits may let it have another.
                self.touched.push_back(Touch::Warming(runtime));
            }
        }
        if !more {
            self.forget_account(name);
        }
    }

    /// Changes how many machines an account has, and its place by that; says which runtimes it uses.
    pub(super) fn count(&mut self, name: &Arc<str>, change: impl FnOnce(&mut Account)) -> Vec<Arc<str>> {
        let limits = self.rules.limits(name);
        let account = self.accounts.entry(name.clone()).or_default();
        let before = account.load(limits);
        change(account);
        // What an account launched makes its load neither more nor less.
        let after = account.load(limits);
        if after.is_none() {
            account.without_since = self.now.mono;
        }
        let runtimes: Vec<_> = account.groups.keys().cloned().collect();
        self.change_load(name, before, after);
        for runtime in &runtimes {
            self.refresh_group(name, runtime);
        }
        runtimes
    }

    pub(super) fn forget_account(&mut self, name: &str) {
        if self.accounts.get(name).is_none_or(|account| !account.is_empty()) {
            return;
        }
        if let Some(order) = self.accounts.remove(name).and_then(|account| account.short_of_disk) {
            self.short_of_disk.remove(&(order, name.into()));
        }
    }
}
