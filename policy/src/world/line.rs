//! Requests that wait, by account and runtime, and what they want of the supply.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::limits::per_share;
use super::{Group, HostRoom, LARGE_TRIED, RequestState, TRIED, Timer, World};
use crate::{Mono, RequestId};

impl World {
    /// Puts a request in line.
    pub(super) fn enqueue(&mut self, id: RequestId) {
        let capacity = self.capacity();
        let Some(request) = self.requests.get_mut(&id) else {
            return;
        };
        let (name, runtime) = (request.demand.account.clone(), request.demand.runtime.clone());
        let account = self.accounts.entry(name.clone()).or_default();
        account.line.insert(request.order, id);
        self.waiting += 1;
        if let Some(kind) = request.first() {
            self.functions.entry(kind.code.uid).or_default().waiting.insert(id);
        }
        let deadline = request.arrived.mono.saturating_add(self.rules.queue_timeout);
        self.timers.set(deadline, Timer::Deadline(id));
        request.state = RequestState::Waiting;
        let group = account.groups.entry(runtime.clone()).or_default();
        group.queue.insert(request.order, id, &request.demand.kinds);
        let (order, mut large) = (request.order, false);
        if let Some(kind) = request.first() {
            if kind.amount.fits(capacity) {
                group.queue.add_standard(order, id, kind.amount);
            } else {
                large = request.reserved.is_none();
            }
        }
        let watched = group.watched.is_some();
        if let Some(kind) = request.first() {
            self.found_no_place(&name, kind.amount);
        }
        if large {
            self.unsettled.insert(runtime.clone());
            self.change_large(&name, |requests| {
                requests.insert(order, id);
            });
        }
        self.refresh_line(&name);
        self.refresh_group(&name, &runtime);
        if !watched {
            self.watch(&name, &runtime);
        }
    }

    /// Takes a request out of line.
    pub(crate) fn dequeue(&mut self, id: RequestId) {
        let Some(request) = self.requests.get_mut(&id) else {
            return;
        };
        if request.state != RequestState::Waiting {
            return;
        }
        request.state = RequestState::New;
        let (name, runtime) = (request.demand.account.clone(), request.demand.runtime.clone());
        let deadline = request.arrived.mono.saturating_add(self.rules.queue_timeout);
        self.timers.clear(deadline, Timer::Deadline(id));
        if let Some(uid) = request.first().map(|kind| kind.code.uid)
            && let Some(function) = self.functions.get_mut(&uid)
        {
            function.waiting.remove(&id);
            if function.is_empty() {
                self.functions.remove(&uid);
            }
        }
        let Some(account) = self.accounts.get_mut(&name) else {
            return;
        };
        account.line.remove(&request.order);
        self.waiting = self.waiting.saturating_sub(1);
        if let Some(group) = account.groups.get_mut(&runtime) {
            group.queue.remove(request.order, &request.demand.kinds);
            if let Some(kind) = request.first() {
                group.queue.remove_standard(request.order, kind.amount);
            }
            let order = request.order;
            self.large_no_longer(&name, order);
        }
        self.no_longer_kept_for(id, &name, &runtime);
        self.refresh_line(&name);
        self.refresh_group(&name, &runtime);
    }

    /// Ends a request that is not in line; its account may run another.
    pub(super) fn finish(&mut self, id: RequestId) {
        let Some(request) = self.requests.remove(&id) else {
            return;
        };
        if let Some(machine) = request.reserved {
            self.release(machine, &request.demand.account);
        }
        let name = &request.demand.account;
        if request.is_running() {
            self.count_running(name, false);
        }
        self.forget_account(name);
    }

    /// The first of each account's requests that need a machine larger than the standard one.
    pub(crate) fn first_large(&self) -> impl Iterator<Item = RequestId> {
        let names = self.large.iter().take(LARGE_TRIED);
        let accounts = names.filter_map(|(_, name)| self.accounts.get(name));
        accounts.filter_map(|account| {
            let mut large = account.large.values().copied();
            large.find(|id| account.next.is_none_or(|next| next == *id))
        })
    }

    /// Those that are tried for what became free: the first of each kind, in order of arrival; with those after it where it is
    /// not to run on every machine.
    pub(crate) fn candidates(&self, group: &Group) -> Vec<RequestId> {
        let mut ids = Vec::new();
        for (kind, _) in group.queue.heads().take(TRIED) {
            for id in group.queue.of(kind) {
                ids.push(id);
                if ids.len() >= TRIED || self.request(id).is_none_or(|request| request.lost.is_empty()) {
                    break;
                }
            }
        }
        ids.dedup();
        ids
    }

    /// A request waits for a machine larger than the standard one no longer, or has one that boots.
    pub(super) fn large_no_longer(&mut self, account: &Arc<str>, order: u64) {
        self.change_large(account, |requests| {
            requests.remove(&order);
        });
    }

    /// Changes which requests of an account need a machine larger than the standard one, and its place by the first.
    pub(super) fn change_large(&mut self, name: &Arc<str>, change: impl FnOnce(&mut BTreeMap<u64, RequestId>)) {
        let Some(account) = self.accounts.get_mut(name) else {
            return;
        };
        let place = |requests: &BTreeMap<u64, RequestId>| Some((*requests.first_key_value()?.0, name.clone()));
        let before = place(&account.large);
        change(&mut account.large);
        let after = place(&account.large);
        if before != after {
            if let Some(before) = before {
                self.large.remove(&before);
            }
            self.large.extend(after);
        }
    }

    /// Sets an account's place among those of which requests wait.
    pub(super) fn refresh_line(&mut self, name: &Arc<str>) {
        let Some(account) = self.accounts.get_mut(name) else {
            return;
        };
        let limits = self.rules.limits(name);
        let waiting = u64::try_from(account.line.len()).unwrap_or(u64::MAX);
        let weight = (waiting > 0).then(|| per_share(waiting, limits));
        if weight != account.line_weight {
            if let Some(old) = account.line_weight {
                self.lines.remove(&(old, name.clone()));
            }
            if let Some(new) = weight {
                self.lines.insert((new, name.clone()));
            }
            account.line_weight = weight;
        }
    }

    /// Sets what an account's requests for a runtime want of its supply.
    pub(super) fn refresh_group(&mut self, name: &Arc<str>, runtime: &Arc<str>) {
        let standard = self.rules.standard;
        let capacity = self.rules.most_in_standard();
        let load = self.load(name);
        let first = self.may_go_first(name, runtime);
        let next = self.next_of(name, runtime);
        let slots = self.slots(name, next);
        let limits = self.rules.limits(name);
        let Some(account) = self.accounts.get_mut(name) else {
            return;
        };
        let left = HostRoom::allowed(limits).minus(account.has);
        let by_memory = left.memory_mib / i64::from(standard.memory_mib).max(1);
        let by_cpu = left.cpu_millis / (i64::from(standard.vcpus) * 1000).max(1);
        let allowed = left.machines.min(by_memory).min(by_cpu).max(0);
        let allowed = u32::try_from(allowed).unwrap_or(u32::MAX);
        // One that comes first may have a larger one that is ready; others wait for it.
        let limited = allowed == 0 || (!first && next.is_none());
        let allowed = if first { allowed } else { 0 };
        let waiting = u32::try_from(account.line.len()).unwrap_or(u32::MAX);
        let Some(group) = account.groups.get_mut(runtime) else {
            return;
        };
        // Of those that wait, only so many may run.
        let need = group.machines_wanted(capacity, slots.min(waiting), waiting);
        let wanted = need.min(allowed);
        let oldest = group.queue.oldest().and_then(|id| self.requests.get(&id));
        // One that has just lost its last machine has not waited longer than others that have none.
        let since = oldest.map(|request| request.arrived.mono.max(account.without_since));
        let claim = since.filter(|_| slots > 0).map(|since| (limited, load, since));
        if wanted == group.wanted && claim == group.claim && need == group.need {
            return;
        }
        group.need = need;
        let entry = self.runtimes.entry(runtime.clone()).or_default();
        let place = |claim: (bool, u64, Mono)| (claim.0, claim.1);
        let only_since = wanted == group.wanted && claim.map(place) == group.claim.map(place);
        if claim != group.claim {
            if let Some((limited, load, since)) = group.claim {
                entry.waiting_mut(limited).remove(&(load, since, name.clone()));
            }
            if let Some((limited, load, since)) = claim {
                entry.waiting_mut(limited).insert((load, since, name.clone()));
            }
            group.claim = claim;
        }
        if only_since {
            return;
        }
        entry.wanted = (entry.wanted + wanted).saturating_sub(group.wanted);
        group.wanted = wanted;
        self.unsettled.insert(runtime.clone());
    }
}
