//! The host's memory, and what it takes back of that of machines that accounts launched.

use stoker_policy::pressure::{BalloonMeasures, HostMemory};
use stoker_policy::{Event, MachineId, Reason};

use super::EventLoop;
use crate::machines::Resizer;

impl EventLoop {
    /// What reaches the balloons of machines whose guests have answered. Those that were booted without one are among them.
    pub(super) fn balloons(&self) -> Vec<(MachineId, Resizer)> {
        let reached = self.machines.iter().filter_map(|(id, handle)| {
            let (Some(_), Some(_), Some(started)) = (&handle.launched, &handle.guest, &handle.started) else {
                return None;
            };
            Some((*id, started.resizer.clone()))
        });
        reached.collect()
    }

    /// The host's memory was looked at; says whether it is to be looked at again.
    pub(super) fn host_memory(&mut self, memory: HostMemory, balloons: Vec<(MachineId, BalloonMeasures)>) -> bool {
        self.step(Event::HostMemory { memory, balloons });
        self.host.world().watches_memory()
    }

    /// Its guest is asked, and not waited for: what it gives is seen at the next look, and what it was not asked for is decided again.
    pub(super) fn set_balloon(&self, machine: MachineId, mib: u32, reason: &Reason) {
        tracing::info!(%machine, mib, why = %reason, "setting a machine's balloon");
        let started = self.machines.get(&machine).and_then(|handle| handle.started.as_ref());
        let Some(resizer) = started.map(|started| started.resizer.clone()) else {
            return;
        };
        self.spawn(|_, _| async move {
            if let Err(error) = resizer.set_balloon(mib).await {
                // It may have ended.
                tracing::debug!(%machine, %error, mib, "a machine was not asked for what its balloon is to have");
            }
        });
        self.report_machine(machine);
    }
}
