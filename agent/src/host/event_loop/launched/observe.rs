//! What happens to machines that accounts launch.

use std::collections::VecDeque;
use std::time::{Duration, SystemTime};

use stoker_policy::scale::{GuestMeasures, Measures, Taken};
use stoker_policy::{ContainerId, Event, MachineId};
use stoker_proto::guest as proto;
use stoker_proto::limits::LONGEST_STOP_GRACE;
use stoker_proto::v1;
use tokio::sync::oneshot;

use super::{LaunchEnd, LaunchHandle, is_taken};
use crate::function_logs::{Source, Whose};
use crate::host::event_loop::EventLoop;
use crate::host::launched::{self, Counted, LaunchFailure};
use crate::host::{container, listing};
use crate::machines::{LaunchRequest, Stop, StopRecord};
use crate::uptime::uptime;

/// What a program has of its grace at least when it is asked once more to end, however long no agent was there: it is to hear the signal
/// before it is killed.
const LEAST_LEFT: Duration = Duration::from_secs(2);

// === impl EventLoop ===

impl EventLoop {
    /// The guest of one that boots, or was found, has answered; in it its image's program has run already, or not.
    pub(in crate::host::event_loop) fn launched_ready(&mut self, id: MachineId, has_run: bool) {
        let (event, stop) = match self.found.remove(&id) {
            Some(record) => {
                self.unlooked.insert(id);
                // Where it is told already, that is enough.
                let _ = self.balloons.try_send(());
                let event = Event::MachineAdopted {
                    machine: id,
                    containers: Vec::new(),
                };
                (event, record.launched.and_then(|launched| launched.stop))
            }
            None => (Event::MachineReady { machine: id }, None),
        };
        let (Some(handle), Some(there)) = (self.handle(id), self.machines.get_mut(&id)) else {
            return;
        };
        let (Some(started), Some(launched)) = (&there.started, &mut there.launched) else {
            return;
        };
        let (resizer, asked, counted_by) = (started.resizer.clone(), launched.asked.subscribe(), started.cgroup_id);
        let (tell, sized) = oneshot::channel();
        launched.sized = Some(tell);
        launched.runs = has_run;
        let program = launched.program.clone();
        self.spawn_on(handle.clone(), |_, _, inbox| {
            launched::follow(id, resizer, asked, inbox)
        });
        self.spawn_on(handle.clone(), |handle, shared, inbox| {
            launched::watch(handle, id, counted_by, shared, inbox)
        });
        self.keep_program_log(id);
        self.step(event);
        if let Some(stop) = stop {
            self.carry_stop_on(id, stop);
        }
        match has_run {
            true => self.program_runs(id),
            // It ends.
            false if self.lasting(id).is_err() => {}
            false => self.spawn_on(handle, |handle, _, inbox| {
                launched::run(handle, id, program, sized, inbox)
            }),
        }
    }

    /// An earlier agent was to end it. Its program is asked once more, for nobody knows whether it was, and has the time that is left.
    /// Somebody may have asked for its end anew, and left it more.
    fn carry_stop_on(&mut self, id: MachineId, stop: StopRecord) {
        let StopRecord { by, until, grace } = stop;
        let left = until.saturating_sub(uptime()).max(grace.min(LEAST_LEFT));
        self.end_within(id, left.min(LONGEST_STOP_GRACE), by);
    }

    /// Keeps what its program writes, and what comes after its end.
    fn keep_program_log(&self, id: MachineId) {
        let known = self.host.world().machine(id);
        let (Some(known), Some(there), Some(handle)) = (known, self.machines.get(&id), self.handle(id)) else {
            return;
        };
        let source = Source {
            whose: Whose::Machine(known.account.clone().unwrap_or_default()),
            uid: id.0,
            created: known.created.wall,
        };
        // The container of its program is called as the machine is.
        there.sources.add(ContainerId(id.0), source);
        let sources = there.sources.clone();
        self.spawn_on(handle, |handle, shared, _| {
            container::follow_logs(handle, sources, shared)
        });
    }

    pub(super) fn program_runs(&mut self, id: MachineId) {
        let Ok(launched) = self.launched_mut(id) else {
            return;
        };
        (launched.runs, launched.ran) = (true, true);
        let waiting = std::mem::take(&mut launched.launching);
        tracing::info!(machine = %id, "the program of a machine runs");
        self.note_launched(id, |record| record.ran = true);
        self.save(id);
        // By that the next agent knows so, though nothing else may be left of the machine.
        self.report_machine(id);
        if let Some(machine) = self.shown(id) {
            for reply in waiting {
                let _ = reply.send(Ok(machine.clone()));
            }
        }
    }

    /// A guest that runs an image has one container. What else it says is nobody's.
    pub(in crate::host::event_loop) fn program_said(&mut self, id: MachineId, said: proto::WatchResponse) {
        let own = id.to_string();
        let Some(ended) = said.ended.into_iter().find(|ended| ended.id == own) else {
            return;
        };
        let Some(there) = self.machines.get_mut(&id) else {
            return;
        };
        let Some(launched) = there.launched.as_mut() else {
            return;
        };
        // It had been started, though that may not be heard yet.
        (launched.runs, launched.ran) = (true, true);
        launched.exit_status = launched.exit_status.or(ended.exit_status);
        let exit_status = launched.exit_status;
        let detail = match &ended.error {
            Some(error) => launched::words(error),
            None => "its program ended".to_owned(),
        };
        there.stopper.stop(Stop::ProgramEnded { detail, exit_status });
    }

    /// What it used was measured: as the host counts it, and as its guest says.
    pub(in crate::host::event_loop) fn measured(
        &mut self,
        machine: MachineId,
        counted: &Counted,
        said: Option<proto::MachineUse>,
    ) {
        let measures = Measures {
            at: counted.at.saturating_duration_since(self.start),
            cpu_ns: counted.cpu_ns,
            wait_ns: counted.wait_ns,
            credits: counted.credits,
            guest: said.map(|said| guest_measures(&said)),
        };
        self.step(Event::Measured { machine, measures });
    }

    /// What its devices tell of what its guest has.
    pub(super) fn resized(&mut self, machine: MachineId, number: u64, taken: Taken) {
        let is_old = self
            .launched_mut(machine)
            .is_ok_and(|launched| launched.asked.borrow().number != number);
        self.step(Event::MachineResized { machine, number, taken });
        if is_old {
            return;
        }
        // As much of it as can be.
        let Some((taken, has_all)) = self.known(machine).map(|known| (known.taken, is_taken(known))) else {
            return;
        };
        let now = listing::since_1970(SystemTime::now());
        self.change_resizes(machine, |resizes| {
            if let Some(last) = resizes.back_mut() {
                last.taken = taken;
                if has_all {
                    // Where that is not told yet an earlier agent had asked for it.
                    last.took.get_or_insert(now.saturating_sub(last.at));
                }
            }
        });
        let Ok(launched) = self.launched_mut(machine) else {
            return;
        };
        if has_all {
            if let Some(sized) = launched.sized.take() {
                let _ = sized.send(());
            }
            let last = launched.resizes.back().cloned();
            for tell in launched.resizing.drain(..) {
                if let Some(last) = &last {
                    let _ = tell.send(last.clone());
                }
            }
            self.save(machine);
        }
    }

    /// What comes of it is told to who waits, and remembered.
    pub(in crate::host::event_loop) fn launch_ended(
        &mut self,
        id: MachineId,
        launched: LaunchHandle,
        ended: &v1::Machine,
    ) {
        let LaunchHandle {
            ran,
            resizes,
            launching,
            ending,
            ..
        } = launched;
        for reply in launching {
            let machine = ended.clone();
            let _ = reply.send(match ran {
                true => Ok(machine),
                false => Err(LaunchFailure::Ended(Box::new(machine))),
            });
        }
        for reply in ending {
            let _ = reply.send(ended.clone());
        }
        self.launch_ends.insert(id, LaunchEnd { ran, resizes });
    }

    /// One was gone when the agent started, and is remembered as any other that has ended.
    pub(in crate::host::event_loop) fn launch_gone(&mut self, gone: &v1::Machine) {
        let (Some(id), Some(launched)) = (listing::machine_id(&gone.name), &gone.launched) else {
            return;
        };
        let ran = launched.program_ran;
        // Of its resizes nothing is known.
        let resizes = VecDeque::new();
        self.launch_ends.insert(id, LaunchEnd { ran, resizes });
        // Who asks again for one whose program never ran is to have another.
        if let Some(account) = gone.account.strip_prefix("accounts/")
            && ran
            && !launched.request_id.is_empty()
        {
            let request = LaunchRequest {
                id: launched.request_id.clone(),
                sha256: launched.request_sha256.clone(),
            };
            self.note_request(account.into(), request, id);
        }
    }

    /// One that has ended is remembered no longer.
    pub(in crate::host::event_loop) fn forget_launch(&mut self, id: MachineId) {
        if self.launch_ends.remove(&id).is_some() {
            self.launches.retain(|_, before| before.machine != id);
        }
    }
}

/// What a guest says that it uses. An older init leaves out a pressure of 0; a kernel that counts one of them counts all, so that one
/// which is missing beside another is 0.
fn guest_measures(said: &proto::MachineUse) -> GuestMeasures {
    let told = [said.cpu_pressure_us, said.memory_pressure_us, said.io_pressure_us];
    let are_counted = told.iter().any(Option::is_some);
    let [cpu_pressure_us, memory_pressure_us, io_pressure_us] = told.map(|us| us.or(are_counted.then_some(0)));
    GuestMeasures {
        memory_bytes: said.memory_bytes,
        cpu_pressure_us,
        memory_pressure_us,
        io_pressure_us,
    }
}
