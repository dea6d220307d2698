//! Letting go of what nobody wants.

use super::{Action, ContainerState, DestroyReason, MachineId, MachineState, Placement, StopReason};
use crate::policy::Time;

impl Placement {
    pub(super) fn let_go(&mut self, actions: &mut Vec<Action>) {
        if self.draining {
            let done: Vec<_> = self
                .machines
                .iter()
                .filter(|(_, machine)| self.at_rest(machine))
                .map(|(id, _)| *id)
                .collect();
            for id in done {
                self.destroy(id, DestroyReason::Drain, actions);
            }
            return;
        }
        let now = self.now;
        let containers: Vec<_> = self
            .containers
            .iter()
            .filter(|(_, container)| match container.state {
                ContainerState::Idle { since } => since.saturating_add(self.rules.container_idle) <= now,
                _ => false,
            })
            .map(|(id, _)| *id)
            .collect();
        for id in containers {
            self.stop_container(id, StopReason::Idle, actions);
        }
        let machines: Vec<_> = self.idle_machines().filter(|(_, _, at)| *at <= now).collect();
        for (id, reason, _) in machines {
            self.destroy(id, reason, actions);
        }
    }

    /// When something is to be let go.
    pub(super) fn idle_wakes(&self) -> impl Iterator<Item = Time> {
        let containers = self.containers.values().filter_map(|container| match container.state {
            ContainerState::Idle { since } => Some(since.saturating_add(self.rules.container_idle)),
            _ => None,
        });
        containers.chain(self.idle_machines().map(|(_, _, at)| at))
    }

    /// Machines without a use, why, and when they are let go.
    fn idle_machines(&self) -> impl Iterator<Item = (MachineId, DestroyReason, Time)> {
        let idle = self.rules.machine_idle;
        let empty = self.machines.iter().filter_map(move |(id, machine)| {
            let unused = matches!(machine.state, MachineState::Active { .. }) && machine.containers.is_empty();
            unused.then(|| (*id, DestroyReason::Idle, machine.last_used.saturating_add(idle)))
        });
        let runtimes = self.machines.values().map(|machine| &machine.runtime);
        let runtimes: std::collections::BTreeSet<_> = runtimes.collect();
        let surplus = runtimes.into_iter().flat_map(move |runtime| {
            let target = self.rules.warming.get(runtime).copied().unwrap_or(0);
            let mut warming: Vec<_> = self
                .machines
                .iter()
                .filter(|(_, machine)| machine.state == MachineState::Warming && machine.runtime == *runtime)
                .collect();
            // The largest go first: the pool should hold standard ones.
            warming.sort_by_key(|(id, machine)| (machine.capacity, **id));
            warming
                .into_iter()
                .skip(target)
                .map(move |(id, machine)| (*id, DestroyReason::Surplus, machine.ready_at.saturating_add(idle)))
        });
        empty.chain(surplus)
    }
}
