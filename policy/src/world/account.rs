//! What there is for each account: machines by room, idle containers, and requests that wait.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::HostRoom;
use super::gathering::Gathering;
use super::limits::per_share;
use super::rooms::Rooms;
use crate::{AccountLimits, Amount, ContainerId, Kind, MachineId, Mono, RequestId};

/// How many requests, the oldest of each kind, are tried for room that became free. Beyond it they wait for the next.
pub(crate) const TRIED: usize = 32;

/// How many of an account's or the host's idle containers or machines are looked at for one request.
pub(crate) const LOOKED_AT: usize = 64;

/// An account's machines, containers and requests on this host.
#[derive(Clone, Debug, Default)]
pub(crate) struct Account {
    /// What its machines take, until they have ended.
    pub(crate) has: HostRoom,
    /// Of that, those that end without more being decided.
    pub(crate) ending: HostRoom,
    /// What machines take that boot, or are ready, for its requests alone; not of what it `has` yet.
    pub(crate) reserved: HostRoom,
    /// Its machines that it launched and that do not end, and their memory in MiB.
    pub(crate) launched: BTreeSet<MachineId>,
    pub(crate) launched_mib: i64,
    /// CPU in millicores that its containers were given, and the machines that it launched.
    pub(crate) given_millis: u64,
    /// What its machines' weights are parts of: as much CPU, at most doubled, or as much as a quarter of it was given since.
    pub(crate) weighed_of: u64,
    /// When it last came to have none, or none that do not end.
    pub(crate) without_since: Mono,
    /// Its requests that wait for a machine larger than the standard one and have none booting, in order of arrival.
    pub(crate) large: BTreeMap<u64, RequestId>,
    /// Its requests that run or for which a container starts: no more than its concurrency.
    pub(crate) running: u32,
    /// All of its requests that wait, in order of arrival.
    pub(crate) line: BTreeMap<u64, RequestId>,
    /// Its place among accounts of which requests wait.
    pub(crate) line_weight: Option<u64>,
    /// Its machines that were found and whose guests have not answered.
    pub(crate) found: u32,
    /// Until when its requests wait for them.
    pub(crate) awaited: Option<Mono>,
    /// The request that its machines are given up for: it comes first.
    pub(crate) next: Option<RequestId>,
    /// Its place among accounts that are short of disk.
    pub(crate) short_of_disk: Option<u64>,
    /// By runtime.
    pub(crate) groups: BTreeMap<Arc<str>, Group>,
}

/// What an account has of one runtime.
#[derive(Clone, Debug, Default)]
pub(crate) struct Group {
    /// Its active machines by what they have free, without the one where that is kept for a request.
    pub(crate) rooms: Rooms,
    pub(crate) gathering: Option<Gathering>,
    /// When the first request that waits is looked at.
    pub(crate) watched: Option<Mono>,
    /// Its idle containers by kind, the most recently used last.
    pub(crate) idle: BTreeMap<Kind, BTreeSet<(Mono, ContainerId)>>,
    /// All of them, the longest idle first.
    pub(crate) idle_order: BTreeSet<(Mono, ContainerId)>,
    /// What its containers that stop will give back.
    pub(crate) stopping: Sum,
    /// Requests that wait for a place.
    pub(crate) queue: Queue,
    /// How many machines they need at least.
    pub(crate) need: u32,
    /// How many of these its limits allow; part of the runtime's sum.
    pub(crate) wanted: u32,
    /// The load and the time by which it is among the runtime's claimants, or among its limited accounts (`true`).
    pub(crate) claim: Option<(bool, u64, Mono)>,
}

/// A sum of amounts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sum {
    pub(crate) cpu_millis: u64,
    pub(crate) memory_mib: u64,
    pub(crate) scratch_mib: u64,
}

/// Requests that wait for a place, by the kinds of container that may serve them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Queue {
    by_kind: BTreeMap<Kind, BTreeMap<u64, RequestId>>,
    /// The first of each kind.
    heads: BTreeSet<(u64, Kind)>,
    len: u32,
    /// Those that fit in a standard machine, in order of arrival.
    standard: BTreeMap<u64, RequestId>,
    /// What they need.
    pub(crate) sum: Sum,
}

// === impl Account ===

impl Account {
    /// What its machines take without those that end.
    pub(crate) fn lasting(&self) -> HostRoom {
        self.has.minus(self.ending)
    }

    /// The memory in MiB of that, without machines that it launched: these are not given up for others, so that they make its share
    /// neither more nor less.
    pub(crate) fn lasting_mib(&self) -> i64 {
        self.lasting().memory_mib.saturating_sub(self.launched_mib)
    }

    /// It has machines that do not end, beside those that it launched.
    pub(crate) fn is_served(&self) -> bool {
        let launched = i64::try_from(self.launched.len()).unwrap_or(i64::MAX);
        self.lasting().machines > launched
    }

    /// Memory in MiB of its machines for each unit of its share, in thousandths, by which it has its place among those that have any.
    pub(crate) fn load(&self, limits: &AccountLimits) -> Option<u64> {
        let memory_mib = u64::try_from(self.lasting_mib()).unwrap_or(0);
        self.is_served().then(|| per_share(memory_mib, limits))
    }

    /// Its active machines.
    pub(crate) fn active(&self) -> impl Iterator<Item = MachineId> {
        self.groups.values().flat_map(Group::machines)
    }

    /// There is nothing of it and nobody waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.has.machines == 0 && self.running == 0 && self.line.is_empty()
    }
}

// === impl Group ===

impl Group {
    /// Its active machines.
    pub(crate) fn machines(&self) -> impl Iterator<Item = MachineId> {
        self.rooms
            .iter()
            .chain(self.gathering.map(|gathering| gathering.machine))
    }

    pub(crate) fn add_idle(&mut self, kind: Kind, since: Mono, id: ContainerId) {
        self.idle.entry(kind).or_default().insert((since, id));
        self.idle_order.insert((since, id));
    }

    pub(crate) fn remove_idle(&mut self, kind: Kind, since: Mono, id: ContainerId) {
        if let Some(set) = self.idle.get_mut(&kind) {
            set.remove(&(since, id));
            if set.is_empty() {
                self.idle.remove(&kind);
            }
        }
        self.idle_order.remove(&(since, id));
    }

    /// How many machines that can hold `capacity` those that wait need at least, beside what stops, where `may_run` of the
    /// account's `waiting` requests may run.
    pub(crate) fn machines_wanted(&self, capacity: Amount, may_run: u32, waiting: u32) -> u32 {
        let need = |sum: u64, stopping: u64, each: u32| {
            let sum = (sum.saturating_mul(may_run.into())).div_ceil(u64::from(waiting).max(1));
            sum.saturating_sub(stopping).div_ceil(u64::from(each).max(1))
        };
        let (sum, stopping) = (self.queue.sum, self.stopping);
        let by_cpu = need(sum.cpu_millis, stopping.cpu_millis, capacity.cpu_millis);
        let by_memory = need(sum.memory_mib, stopping.memory_mib, capacity.memory_mib);
        let by_scratch = need(sum.scratch_mib, stopping.scratch_mib, capacity.scratch_mib);
        u32::try_from(by_cpu.max(by_memory).max(by_scratch)).unwrap_or(u32::MAX)
    }
}

// === impl Sum ===

impl Sum {
    pub(crate) fn add(&mut self, amount: Amount) {
        self.cpu_millis += u64::from(amount.cpu_millis);
        self.memory_mib += u64::from(amount.memory_mib);
        self.scratch_mib += u64::from(amount.scratch_mib);
    }

    /// It is at least this.
    pub(crate) fn covers(self, amount: Amount) -> bool {
        self.cpu_millis >= amount.cpu_millis.into()
            && self.memory_mib >= amount.memory_mib.into()
            && self.scratch_mib >= amount.scratch_mib.into()
    }

    pub(crate) fn subtract(&mut self, amount: Amount) {
        self.cpu_millis = self.cpu_millis.saturating_sub(amount.cpu_millis.into());
        self.memory_mib = self.memory_mib.saturating_sub(amount.memory_mib.into());
        self.scratch_mib = self.scratch_mib.saturating_sub(amount.scratch_mib.into());
    }
}

// === impl Queue ===

impl Queue {
    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn insert(&mut self, order: u64, id: RequestId, kinds: &[Kind]) {
        self.len += 1;
        for kind in kinds {
            let requests = self.by_kind.entry(*kind).or_default();
            let first = requests.keys().next().copied();
            requests.insert(order, id);
            if first.is_none_or(|first| order < first) {
                if let Some(first) = first {
                    self.heads.remove(&(first, *kind));
                }
                self.heads.insert((order, *kind));
            }
        }
    }

    pub(crate) fn remove(&mut self, order: u64, kinds: &[Kind]) {
        self.len = self.len.saturating_sub(1);
        for kind in kinds {
            let Some(requests) = self.by_kind.get_mut(kind) else {
                continue;
            };
            requests.remove(&order);
            let next = requests.keys().next().copied();
            if next.is_none() {
                self.by_kind.remove(kind);
            }
            if self.heads.remove(&(order, *kind))
                && let Some(next) = next
            {
                self.heads.insert((next, *kind));
            }
        }
    }

    /// One of them needs this, which fits in a standard machine.
    pub(crate) fn add_standard(&mut self, order: u64, id: RequestId, amount: Amount) {
        if self.standard.insert(order, id).is_none() {
            self.sum.add(amount);
        }
    }

    pub(crate) fn remove_standard(&mut self, order: u64, amount: Amount) {
        if self.standard.remove(&order).is_some() {
            self.sum.subtract(amount);
        }
    }

    /// The first that fits in a standard machine.
    pub(crate) fn oldest_standard(&self) -> Option<RequestId> {
        self.standard.first_key_value().map(|(_, id)| *id)
    }

    /// The first that a container of this kind may serve.
    pub(crate) fn first(&self, kind: Kind) -> Option<RequestId> {
        self.of(kind).next()
    }

    /// All that a container of this kind may serve, in order of arrival.
    pub(crate) fn of(&self, kind: Kind) -> impl Iterator<Item = RequestId> {
        self.by_kind
            .get(&kind)
            .into_iter()
            .flat_map(|requests| requests.values().copied())
    }

    /// The first of each kind, in order of arrival.
    pub(crate) fn heads(&self) -> impl Iterator<Item = (Kind, RequestId)> {
        let heads = self.heads.iter();
        heads.filter_map(|(order, kind)| Some((*kind, *self.by_kind.get(kind)?.get(order)?)))
    }

    /// The first of all.
    pub(crate) fn oldest(&self) -> Option<RequestId> {
        self.heads().next().map(|(_, id)| id)
    }

    /// All of them.
    pub(crate) fn all(&self) -> Vec<RequestId> {
        let ids: BTreeMap<u64, RequestId> = self.by_kind.values().flatten().map(|(o, id)| (*o, *id)).collect();
        ids.into_values().collect()
    }
}
