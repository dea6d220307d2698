//! Machines that accounts launch: what is asked of them, what happens to them, and what was decided, handed to who carries it out.

mod asked;
mod carry_out;
mod observe;

use std::collections::VecDeque;
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use stoker_policy::scale::Taken;
use stoker_policy::{Launched, MachineId, MachineState};
use stoker_proto::limits::STOP_GRACE;
use stoker_proto::v1;
use tokio::sync::{oneshot, watch};

use super::EventLoop;
use crate::host::launched::{self, Asked, LaunchFailure, LaunchedError, Reply};
use crate::host::listing;
use crate::machines::{LaunchRecord, LaunchRequest, Program, RecordFile, ResizeRecord, Stop};
use crate::names::ImageName;

/// Who waits for a machine to be launched.
type Launcher = Reply<Result<v1::Machine, LaunchFailure>>;

/// What is launched, until that is decided.
#[derive(Debug)]
pub(super) struct Launching {
    image: ImageName,
    digest: String,
    file: Arc<File>,
    program: Program,
    request: Option<LaunchRequest>,
    reply: Launcher,
}

/// What came of a request to launch a machine.
#[derive(Debug)]
pub(super) struct LaunchedBefore {
    machine: MachineId,
    /// Of what was asked for.
    sha256: String,
}

/// What there is of a machine that was launched, beside what there is of any.
#[derive(Debug)]
pub(in crate::host) struct LaunchHandle {
    image: ImageName,
    digest: String,
    program: Program,
    request: Option<LaunchRequest>,
    /// Takes what its devices are to be asked for.
    asked: watch::Sender<Asked>,
    /// Its program has been started, by this agent or an earlier one, and its guest says so.
    runs: bool,
    /// The same, as far as is known before its guest has answered this agent.
    ran: bool,
    /// What its program exited with, once its guest has said so.
    exit_status: Option<i32>,
    /// How long its program has to end.
    grace: Duration,
    /// Its last resizes, the oldest first.
    resizes: VecDeque<ResizeRecord>,
    /// Hears once its guest has what it was launched with.
    sized: Option<oneshot::Sender<()>>,
    /// Who waits for its program to run.
    launching: Vec<Launcher>,
    /// Who waits for its guest to take what was asked for last.
    resizing: Vec<oneshot::Sender<ResizeRecord>>,
    /// Who waits for its end.
    ending: Vec<oneshot::Sender<v1::Machine>>,
}

/// What is remembered of one that has ended, beside what the API shows.
#[derive(Debug)]
pub(super) struct LaunchEnd {
    /// Its program had run.
    ran: bool,
    resizes: VecDeque<ResizeRecord>,
}

// === impl LaunchHandle ===

impl LaunchHandle {
    /// By what is written beside the machine.
    pub(super) fn new(record: &LaunchRecord) -> Self {
        let asked = Asked {
            number: 0,
            size: record.launch.size,
        };
        Self {
            image: record.image.clone(),
            digest: record.digest.clone(),
            program: record.program.clone(),
            request: record.request.clone(),
            asked: watch::Sender::new(asked),
            runs: false,
            ran: record.ran,
            exit_status: None,
            grace: STOP_GRACE,
            resizes: record.resizes.clone(),
            sized: None,
            launching: Vec::new(),
            resizing: Vec::new(),
            ending: Vec::new(),
        }
    }

    /// What the API shows of it.
    pub(in crate::host) fn shown(&self, known: &Launched, state: MachineState) -> v1::Launched {
        let request = self.request.as_ref();
        launched::launched(known, state, &self.image, &self.digest, request, self.ran)
    }

    /// The hash of what its launch asked for, which is kept for the next agent and shown to nobody.
    pub(super) fn request_sha256(&self) -> String {
        let request = self.request.as_ref();
        request.map(|request| request.sha256.clone()).unwrap_or_default()
    }

    /// What its program exited with.
    pub(super) fn exit_status(&self) -> Option<i32> {
        self.exit_status
    }

    /// That its program is to end, and it then.
    pub(super) fn stop(&self, why: String) -> Stop {
        Stop::AfterProgram {
            why,
            signal: self.program.stop_signal,
            grace: self.grace,
        }
    }
}

// === impl EventLoop ===

/// What is known of one, and written down of it.
impl EventLoop {
    /// What there is of one that has not ended.
    fn launched_mut(&mut self, machine: MachineId) -> Result<&mut LaunchHandle, LaunchedError> {
        let name = listing::machine_name(machine);
        let Self { machines, ended, .. } = self;
        let launched = machines
            .get_mut(&machine)
            .and_then(|handle| handle.launched.as_deref_mut());
        launched.ok_or_else(|| {
            let ended = ended
                .iter()
                .find(|ended| ended.name == name && ended.launched.is_some());
            ended.map_or(LaunchedError::Unknown, |ended| {
                LaunchedError::Ended(Box::new(ended.clone()))
            })
        })
    }

    /// That there is one which was not told to end.
    fn lasting(&mut self, machine: MachineId) -> Result<(), LaunchedError> {
        self.launched_mut(machine)?;
        let known = self.host.world().machine(machine);
        match known.is_some_and(|known| known.state != MachineState::Stopping) {
            true => Ok(()),
            false => Err(LaunchedError::Ending),
        }
    }

    /// What decisions know of one.
    fn known(&self, machine: MachineId) -> Option<&Launched> {
        self.host.world().machine(machine)?.launched.as_deref()
    }

    fn shown(&self, machine: MachineId) -> Option<v1::Machine> {
        let known = self.host.world().machine(machine)?;
        Some(listing::machine(known, self.machines.get(&machine)))
    }

    /// Changes what is known of its resizes, and what the next agent is to know of them and of what counts, once that is saved.
    fn change_resizes(&mut self, id: MachineId, change: impl Fn(&mut VecDeque<ResizeRecord>)) {
        if let Ok(launched) = self.launched_mut(id) {
            change(&mut launched.resizes);
        }
        let Some(shape) = self.host.world().machine(id).map(|known| known.shape) else {
            return;
        };
        self.note_launched(id, |record| {
            change(&mut record.resizes);
            record.counts = Taken {
                vcpus: shape.vcpus,
                memory_mib: shape.memory_mib,
            };
        });
    }

    fn note_launched(&self, id: MachineId, change: impl FnOnce(&mut LaunchRecord)) {
        self.note(id, |record| {
            if let Some(launched) = record.launched.as_deref_mut() {
                change(launched);
            }
        });
    }

    fn record_of(&self, id: MachineId) -> Option<RecordFile> {
        let started = self.machines.get(&id).and_then(|handle| handle.started.as_ref());
        started.map(|started| started.record.clone())
    }

    /// Writes down what was noted.
    fn save(&self, id: MachineId) {
        let Some(record) = self.record_of(id) else { return };
        self.spawn(|_, _| async move {
            if let Err(error) = record.save().await {
                // Its folder may be gone with it.
                tracing::debug!(machine = %id, %error, "the next agent will not know all of a machine");
            }
        });
    }
}

/// Its guest has what it is to have.
fn is_taken(known: &Launched) -> bool {
    (known.taken.vcpus, known.taken.memory_mib) == (known.asked.vcpus, known.asked.memory_mib)
}

/// Adds who waits. Those that have left are forgotten: who comes again and again fills nothing.
fn wait<T>(waiting: &mut Vec<oneshot::Sender<T>>, tell: oneshot::Sender<T>) {
    waiting.retain(|other| !other.is_closed());
    waiting.push(tell);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_left_does_not_wait() {
        let mut waiting = Vec::new();
        let (stays, mut told) = oneshot::channel();
        wait(&mut waiting, stays);
        for _ in 0..1000 {
            wait(&mut waiting, oneshot::channel().0);
        }
        assert_eq!(waiting.len(), 2, "who stays, and the last");
        for tell in waiting {
            let _ = tell.send(7);
        }
        assert_eq!(told.try_recv(), Ok(7));
    }
}
