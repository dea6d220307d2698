//! The order of preference.

use super::{Action, Container, ContainerId, ContainerState, MachineId, MachineState, Placement, Source, Waiting};

impl Placement {
    /// Puts a request where it can run now; says whether there was such a place.
    pub(super) fn place(&mut self, waiting: &Waiting, actions: &mut Vec<Action>) -> bool {
        self.place_in_idle_container(waiting, actions)
            || self.place_in_active_machine(waiting, actions)
            || self.place_in_warming_machine(waiting, actions)
    }

    /// The most recently used one: its caches are warm, and the others get old enough to be let go.
    fn place_in_idle_container(&mut self, waiting: &Waiting, actions: &mut Vec<Action>) -> bool {
        let key = (waiting.demand.code.clone(), waiting.demand.amount);
        let Some(ids) = self.idle.get_mut(&key) else {
            return false;
        };
        let taken = ids.pop();
        if ids.is_empty() {
            self.idle.remove(&key);
        }
        let Some(id) = taken else { return false };
        let Some(container) = self.containers.get_mut(&id) else {
            return false;
        };
        container.state = ContainerState::Busy(waiting.request);
        let machine = container.machine;
        actions.push(Action::Dispatch {
            machine,
            container: id,
            request: waiting.request,
        });
        true
    }

    /// The fullest machine that has the room: the others stay free for larger amounts, or get empty and are let go.
    fn place_in_active_machine(&mut self, waiting: &Waiting, actions: &mut Vec<Action>) -> bool {
        let demand = &waiting.demand;
        let machines = self.active.get(&demand.account).into_iter().flatten();
        let best = machines
            .filter_map(|id| Some((*id, self.machines.get(id)?)))
            .filter(|(id, machine)| {
                machine.runtime == demand.runtime && demand.amount.fits(machine.free()) && !waiting.lost.contains(id)
            })
            .min_by_key(|(id, machine)| (machine.free().memory_mib, machine.free().cpu_millis, *id))
            .map(|(id, _)| id);
        let Some(id) = best else { return false };
        self.create_container(id, waiting, Source::ActiveMachine, actions);
        true
    }

    /// The smallest machine that has the room, the longest ready of those.
    fn place_in_warming_machine(&mut self, waiting: &Waiting, actions: &mut Vec<Action>) -> bool {
        let demand = &waiting.demand;
        let best = self
            .machines
            .iter()
            .filter(|(_, machine)| {
                machine.state == MachineState::Warming
                    && machine.runtime == demand.runtime
                    && demand.amount.fits(machine.capacity)
            })
            .min_by_key(|(id, machine)| (machine.capacity, machine.ready_at, **id))
            .map(|(id, machine)| (*id, machine.ready_at));
        let Some((id, ready_at)) = best else { return false };
        let account = demand.account.clone();
        if let Some(machine) = self.machines.get_mut(&id) {
            machine.state = MachineState::Active {
                account: account.clone(),
            };
        }
        self.active.entry(account.clone()).or_default().insert(id);
        actions.push(Action::AssignMachine { machine: id, account });
        let source = if waiting.queued && ready_at >= waiting.arrived {
            Source::NewMachine
        } else {
            Source::WarmingMachine
        };
        self.create_container(id, waiting, source, actions);
        true
    }

    fn create_container(&mut self, machine: MachineId, waiting: &Waiting, source: Source, actions: &mut Vec<Action>) {
        let id = ContainerId(self.new_id());
        let Some(found) = self.machines.get_mut(&machine) else {
            return;
        };
        found.allocated = found.allocated.plus(waiting.demand.amount);
        found.containers.insert(id);
        let container = Container {
            machine,
            code: waiting.demand.code.clone(),
            amount: waiting.demand.amount,
            state: ContainerState::Starting(waiting.clone()),
            doomed: false,
            gone: false,
        };
        self.containers.insert(id, container);
        let request = waiting.request;
        actions.push(Action::CreateContainer {
            machine,
            container: id,
            request,
            source,
        });
    }
}
