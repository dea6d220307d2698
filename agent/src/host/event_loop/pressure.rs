//! The host's memory, and what it takes back of that of machines that accounts launched.

use stoker_policy::pressure::{BalloonMeasures, Cause, HostMemory};
use stoker_policy::{Event, MachineId, Reason};

use super::EventLoop;
use crate::host::counts::BalloonBy;
use crate::machines::Resizer;

impl EventLoop {
    /// What reaches the balloons that are to be looked at, of machines whose guests have answered. Machines that were booted without one
    /// are among them. One that was taken over is looked at once, whatever the host has.
    pub(super) fn balloons(&mut self) -> Vec<(MachineId, Resizer)> {
        let unlooked = std::mem::take(&mut self.unlooked);
        let world = self.host.world();
        let reached = self.machines.iter().filter_map(|(id, handle)| {
            if !unlooked.contains(id) && !world.watches_balloon(*id) {
                return None;
            }
            let (Some(_), Some(_), Some(started)) = (&handle.launched, &handle.guest, &handle.started) else {
                return None;
            };
            Some((*id, started.resizer.clone()))
        });
        reached.collect()
    }

    /// The host's memory was looked at; says whether it is to be looked at again.
    pub(super) fn host_memory(&mut self, memory: HostMemory, balloons: Vec<(MachineId, BalloonMeasures)>) -> bool {
        let known = balloons.iter().map(|(machine, measures)| {
            let taken_mib = self.balloon_mib(*machine);
            (*machine, measures.asked_mib, taken_mib)
        });
        let known: Vec<_> = known.collect();
        self.step(Event::HostMemory { memory, balloons });
        for (machine, asked_mib, before_mib) in known {
            let taken_mib = self.balloon_mib(machine);
            // What it has on its way there is nobody's concern.
            let is_there = taken_mib == Some(0) || taken_mib == Some(asked_mib);
            if taken_mib != before_mib && is_there {
                self.report_machine(machine);
            }
        }
        self.host.world().watches_memory()
    }

    /// What a balloon has, as decisions know it.
    fn balloon_mib(&self, machine: MachineId) -> Option<u32> {
        let launched = self.host.world().machine(machine)?.launched.as_deref()?;
        Some(launched.balloon.taken_mib)
    }

    /// Its guest is asked, and not waited for: what it gives is seen at the next look, and what it was not asked for is decided again.
    pub(super) fn set_balloon(&self, machine: MachineId, mib: u32, reason: &Reason) {
        tracing::info!(%machine, mib, why = %reason, "setting a machine's balloon");
        if let Reason::Balloon(inflation) = reason {
            self.counts.balloons.count(match inflation.cause {
                Cause::Pressed { .. } => BalloonBy::Pressed,
                Cause::Eased { .. } => BalloonBy::Eased,
                Cause::Short { .. } | Cause::Silent { .. } => BalloonBy::Short,
            });
        }
        self.ask_balloon(machine, mib);
    }

    /// A machine that was launched and is to end has all of its memory for that: its program may have much to do, for minutes, and its
    /// balloon is looked at no more.
    pub(super) fn give_balloon_back(&self, machine: MachineId) {
        let handle = self.machines.get(&machine);
        if handle.is_some_and(|handle| handle.launched.is_some()) {
            self.ask_balloon(machine, 0);
        }
    }

    fn ask_balloon(&self, machine: MachineId, mib: u32) {
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
    }
}
