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
        for machine in self.lasting() {
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
        for machine in self.lasting() {
            self.decide(Command::DestroyMachine { machine, gently: true }, Reason::Drain);
        }
    }

    /// Nothing runs any more in a machine that is to go.
    pub(crate) fn quiet(&mut self, machine: MachineId) {
        let Some(found) = self.world.machine(machine) else {
            return;
        };
        // What was found in a machine of an account is not known before its guest answers.
        let unknown = found.state == MachineState::Found && found.account.is_some() && found.launched.is_none();
        if found.running > 0 || unknown {
            return;
        }
        if self.world.draining && found.state != MachineState::Stopping {
            self.decide(Command::DestroyMachine { machine, gently: true }, Reason::Drain);
        } else if found.state == MachineState::Closing {
            self.decide(Command::DestroyMachine { machine, gently: false }, Reason::Closed);
        }
    }

    /// The machines that were not told to end.
    fn lasting(&self) -> Vec<MachineId> {
        let machines = self.world.machines();
        let lasting = machines.filter(|machine| machine.state != MachineState::Stopping);
        let mut ids: Vec<_> = lasting.map(|machine| machine.id).collect();
        ids.sort_unstable();
        ids
    }
}
