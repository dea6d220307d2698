//! How all that runs comes to its end.

use crate::host::Step;
use crate::{Command, ContainerState, MachineId, MachineState, Purpose, Reason, Refusal};

impl Step<'_> {
    /// Refuses all that wait, and lets go of all that runs nothing.
    pub(crate) fn drain(&mut self) {
        let lines = self.world.accounts.values().flat_map(|account| account.line.values());
        let waiting: Vec<_> = lines.copied().collect();
        for request in waiting {
            self.refuse(request, Refusal::Draining);
        }
        let mut machines: Vec<_> = self.world.machines().map(|machine| machine.id).collect();
        machines.sort_unstable();
        for machine in machines {
            self.quiet(machine);
        }
    }

    /// Ends every request and every machine, whatever they are doing.
    pub(crate) fn abandon(&mut self) {
        let mut requests: Vec<_> = self
            .world
            .containers()
            .filter_map(|container| match container.state {
                ContainerState::Starting(Purpose::Serve(request)) => Some((container.id, Some(request), false)),
                ContainerState::Starting(Purpose::Ahead) => Some((container.id, None, false)),
                ContainerState::Busy(request) => Some((container.id, Some(request), true)),
                ContainerState::Idle | ContainerState::Stopping => None,
            })
            .collect();
        requests.sort_unstable();
        for (container, request, runs) in requests {
            if let Some(request) = request {
                // One that runs may have run: not the refusal that says to try again.
                let refusal = if runs { Refusal::MachineLost } else { Refusal::Draining };
                self.refuse(request, refusal);
            }
            // Not a command of its own: it goes with its machine.
            self.world.stop(container);
        }
        let mut machines: Vec<_> = self.world.machines().map(|machine| machine.id).collect();
        machines.sort_unstable();
        for machine in machines {
            self.quiet(machine);
        }
    }

    /// Nothing runs any more in a machine that is to go.
    pub(crate) fn quiet(&mut self, machine: MachineId) {
        let Some(found) = self.world.machine(machine) else {
            return;
        };
        if found.running > 0 {
            return;
        }
        if self.world.draining && found.state != MachineState::Stopping {
            self.decide(Command::DestroyMachine { machine, gently: true }, Reason::Drain);
        } else if found.state == MachineState::Closing {
            self.decide(Command::DestroyMachine { machine, gently: false }, Reason::Closed);
        }
    }
}
