//! Machines that an earlier run of this agent left: with what is in them, and what runs.

use std::collections::{BTreeMap, BTreeSet};

use stoker_policy::{ContainerId, Event, FoundContainer, MachineId, RequestId};

use super::launched::LaunchHandle;
use super::{ContainerHandle, EventLoop, MachineHandle};
use crate::host::attach;
use crate::host::call;
use crate::host::container;
use crate::host::listing;
use crate::host::machine;
use crate::machines::{Record, Stopper};

impl EventLoop {
    /// Remembers the machines that are gone, and waits for the guests of those that there are.
    pub(super) fn take_over(&mut self) {
        for machine in self.left.keys().copied().collect::<Vec<_>>() {
            if !self.found.contains_key(&machine) {
                self.lose(machine, "its machine was gone when the agent started");
            }
        }
        for gone in self.ended.clone() {
            self.launch_gone(&gone);
        }
        self.ended.iter_mut().for_each(listing::withhold);
        if self.found.is_empty() {
            return;
        }
        tracing::info!(
            machines = self.found.len(),
            "taking over what an earlier run of this agent left"
        );
        for (id, record) in self.found.clone() {
            let (stopper, stopped) = Stopper::new();
            let mut handle = MachineHandle::new(stopper);
            let mut shape = record.shape;
            if let Some(launched) = &record.launched {
                (shape.vcpus, shape.memory_mib) = (launched.counts.vcpus, launched.counts.memory_mib);
                handle.launched = Some(Box::new(LaunchHandle::new(launched)));
                if let (Some(account), Some(request)) = (&record.account, &launched.request) {
                    self.note_request(account.clone(), request.clone(), id);
                }
            }
            self.machines.insert(id, handle);
            self.step(Event::MachineFound {
                machine: id,
                runtime: record.runtime,
                shape,
                account: record.account,
                created: record.created,
                mode: record.mode,
                launched: record.launched.map(|launched| Box::new(launched.launch)),
            });
            let found = self.host.world().machine(id);
            let terms = found.and_then(|found| Some(found.credits.as_ref()?.terms));
            self.spawn(|shared, inbox| {
                machine::live(id, inbox, shared.launcher.clone(), move |launcher, reports| {
                    launcher.take_over(id, terms, stopped, reports)
                })
            });
        }
    }

    /// The guest of one of them has answered: with these containers, some of which run an invocation. What of them the
    /// machine's record does not know is ended.
    pub(super) fn adopt(
        &mut self,
        id: MachineId,
        there: &BTreeSet<ContainerId>,
        running: &BTreeMap<ContainerId, String>,
    ) {
        let (Some(record), Some(handle)) = (self.found.remove(&id), self.handle(id)) else {
            return;
        };
        let Record {
            mut containers,
            account,
            ..
        } = record;
        for (container, record) in &containers {
            self.keep_log(id, *container, record);
            // The last lines of those that ended meanwhile wait in the guest.
            if !there.contains(container) {
                self.log_ends(id, *container);
            }
        }
        // An id that is another's is no more this machine's than one that is nobody's.
        let own = |id: &ContainerId| account.is_some() && there.contains(id) && !self.containers.contains_key(id);
        containers.retain(|id, _| own(id));
        for unknown in there.iter().copied().filter(|id| !containers.contains_key(id)) {
            self.spawn_on(handle.clone(), |handle, _, _| container::stop_unknown(handle, unknown));
        }
        self.note(id, |record| record.containers.clone_from(&containers));
        let mut calls = BTreeMap::new();
        for container in containers.keys() {
            if let Some(name) = running.get(container) {
                let request = self.request_of(name, &calls);
                calls.insert(request, (*container, name.clone()));
            }
        }
        let requests: BTreeMap<_, _> = calls.iter().map(|(request, (id, _))| (*id, *request)).collect();
        let found = containers.iter().map(|(container, record)| FoundContainer {
            container: *container,
            kind: record.kind,
            created: record.created,
            request: requests.get(container).copied(),
        });
        let adopted = found.collect();
        self.containers.extend(containers.iter().map(|(container, record)| {
            let handle = ContainerHandle {
                machine: id,
                function: record.function.clone(),
                end_detail: None,
            };
            (*container, handle)
        }));
        tracing::info!(machine = %id, containers = containers.len(), running = calls.len(), "machine taken over");
        self.step(Event::MachineAdopted {
            machine: id,
            containers: adopted,
        });
        let left = self.left.remove(&id).unwrap_or_default().into_iter();
        let mut left: BTreeMap<_, _> = left.map(|ticket| (ticket.name().to_owned(), ticket)).collect();
        for (request, (container, name)) in calls {
            let ticket = left.remove(&name);
            self.spawn_on(handle.clone(), |handle, _, inbox| {
                attach::running(handle, id, container, request, name, ticket, inbox)
            });
        }
        for ticket in left.into_values() {
            self.spawn_on(handle.clone(), |handle, _, _| attach::kept(handle, id, ticket));
        }
        // Functions may have been deleted while it was away, by an earlier run that died before its machines heard.
        let gone = containers
            .values()
            .filter(|record| (self.shared.find)(record.kind.code.uid).is_none());
        let gone: BTreeSet<_> = gone.map(|record| record.kind.code.uid).collect();
        for uid in gone {
            self.step(Event::FunctionDeleted { uid });
        }
    }

    /// The request that runs under this name in a guest: the same as before where its id says which it was, and no other has
    /// that.
    fn request_of<T>(&self, name: &str, others: &BTreeMap<RequestId, T>) -> RequestId {
        let id = name.rsplit_once('/').and_then(|(_, id)| call::parse_uuid(id));
        let free = |id: &RequestId| self.host.world().request(*id).is_none() && !others.contains_key(id);
        id.map(RequestId).filter(free).unwrap_or_else(call::new_id)
    }

    /// A machine of an earlier agent is gone: what was to run in it may have.
    pub(super) fn lose(&mut self, machine: MachineId, why: &str) {
        for ticket in self.left.remove(&machine).unwrap_or_default() {
            let why = why.to_owned();
            self.spawn(|_, _| ticket.over(Err(why.into())));
        }
    }
}
