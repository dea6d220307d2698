//! Machines that accounts launch: what is asked of them, what happens to them, and what was decided, handed to who carries it out.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use stoker_policy::scale::{GuestMeasures, Measures, ResizeError, Size, SizeChange, Taken, Thresholds};
use stoker_policy::{ContainerId, Event, Launch, Launched, MachineId, MachineState, Reason, Shape};
use stoker_proto::guest as proto;
use stoker_proto::limits::{LONGEST_STOP_GRACE, STOP_GRACE};
use stoker_proto::v1;
use tokio::sync::{oneshot, watch};
use ulid::Ulid;

use super::{EventLoop, MachineHandle};
use crate::function_logs::{Source, Whose};
use crate::host::counts::ResizedBy;
use crate::host::launched::{
    self, Asked, Counted, LaunchFailure, LaunchedError, Order, Reply, ResizeFailure, Resizing, metrics,
};
use crate::host::{container, listing, machine};
use crate::machines::{
    Ceiling, FromImage, Guest, LaunchRecord, LaunchRequest, Program, RESIZES, RecordFile, ResizeRecord, Spec, Stop,
    StopRecord, Stopper,
};
use crate::names::ImageName;
use crate::uptime::uptime;

/// What a program has of its grace at least when it is asked once more to end, however long no agent was there: it is to hear the signal
/// before it is killed.
const LEAST_LEFT: Duration = Duration::from_secs(2);

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

// === impl EventLoop: what is asked ===

impl EventLoop {
    /// Who asked may have left.
    pub(super) fn hear_order(&mut self, order: Order) {
        match order {
            Order::Launch { launching, reply } => self.launch(*launching, reply),
            Order::LaunchAgain {
                account,
                request,
                reply,
            } => drop(self.launch_again(&account, Some(&request), reply)),
            Order::Resize {
                machine,
                change,
                by,
                reply,
            } => drop(reply.send(self.resize(machine, change, by))),
            Order::SetThresholds {
                machine,
                thresholds,
                etag,
                by,
                reply,
            } => match self.may_set_thresholds(machine, etag.as_deref()) {
                Ok(record) => self.ask_for_thresholds(machine, thresholds, by, record, reply),
                Err(error) => drop(reply.send(Err(error))),
            },
            Order::Stop {
                machine,
                grace,
                by,
                reply,
            } => drop(reply.send(self.stop(machine, grace, by))),
            Order::End { machine, reply } => match self.launched_mut(machine) {
                Ok(launched) => wait(&mut launched.ending, reply),
                Err(LaunchedError::Ended(machine)) => drop(reply.send(*machine)),
                Err(_) => {}
            },
            Order::Resizes { machine, reply } => drop(reply.send(self.resizes(machine))),
            Order::Guest { machine, reply } => drop(reply.send(self.guest(machine))),
            Order::BoundsFor { account, reply } => {
                let world = self.host.world();
                let most = world.ceiling_for(&account);
                let _ = reply.send(world.bounds_for(&account, most, 0));
            }
            Order::BoundsOf { machine, reply } => drop(reply.send(self.host.world().bounds(machine))),
            Order::Resized { machine, number, taken } => self.resized(machine, number, taken),
            Order::Runs { machine } => self.program_runs(machine),
        }
    }

    fn launch(&mut self, wanted: crate::host::Launching, reply: Launcher) {
        let crate::host::Launching {
            account,
            request,
            image,
            digest,
            file,
            program,
            mut launch,
            by,
        } = wanted;
        let Some(reply) = self.launch_again(&account, request.as_ref(), reply) else {
            return;
        };
        launch.image = digest.as_str().into();
        if launch.drive_mib == 0 {
            launch.drive_mib = self.host.world().rules().standard.drive_mib;
        }
        let machine = MachineId(Ulid::generate());
        if let Err(error) = self.host.world().may_launch(machine, &account, &launch) {
            return drop(reply.send(Err(error.into())));
        }
        self.launching = Some(Launching {
            image,
            digest,
            file,
            program,
            request: request.clone(),
            reply,
        });
        let launch = Box::new(launch);
        self.step(Event::LaunchAsked {
            machine,
            account: account.clone(),
            launch,
            by,
        });
        match self.launching.take() {
            // Whatever was decided would have taken it.
            Some(Launching { reply, .. }) => drop(reply.send(Err(LaunchFailure::Gone))),
            None => {
                if let Some(request) = request {
                    self.note_request(account, request, machine);
                }
            }
        }
    }

    pub(super) fn note_request(&mut self, account: Arc<str>, request: LaunchRequest, machine: MachineId) {
        let LaunchRequest { id, sha256 } = request;
        self.launches.insert((account, id), LaunchedBefore { machine, sha256 });
    }

    /// Who asks again is told the same. Where nobody asked before, who waits is handed back.
    fn launch_again(
        &mut self,
        account: &Arc<str>,
        request: Option<&LaunchRequest>,
        reply: Launcher,
    ) -> Option<Launcher> {
        let before = request.and_then(|request| {
            let before = self.launches.get(&(account.clone(), request.id.clone()))?;
            Some((before.machine, before.sha256 == request.sha256))
        });
        match before {
            None => return Some(reply),
            Some((machine, true)) => self.launched_before(machine, reply),
            Some((_, false)) => drop(reply.send(Err(LaunchFailure::Reused))),
        }
        None
    }

    fn launched_before(&mut self, machine: MachineId, reply: Launcher) {
        let ran = self.launch_ends.get(&machine).is_none_or(|end| end.ran);
        let answer = match self.launched_mut(machine) {
            Ok(launched) if !launched.runs => return wait(&mut launched.launching, reply),
            Ok(_) => self.shown(machine).ok_or(LaunchFailure::Gone),
            Err(LaunchedError::Ended(machine)) if ran => Ok(*machine),
            Err(LaunchedError::Ended(machine)) => Err(LaunchFailure::Ended(machine)),
            Err(_) => Err(LaunchFailure::Gone),
        };
        let _ = reply.send(answer);
    }

    fn resize(&mut self, machine: MachineId, change: SizeChange, by: Arc<str>) -> Result<Resizing, ResizeFailure> {
        if let Err(LaunchedError::Ended(machine)) = self.launched_mut(machine) {
            return Err(ResizeFailure::Ended(machine));
        }
        let asked = self.host.world().resize_for(machine, change)?;
        let before = self.known(machine).ok_or(ResizeError::Unknown)?.asked;
        if asked != before {
            self.step(Event::ResizeAsked { machine, change, by });
        }
        let known = self.known(machine).ok_or(ResizeError::Unknown)?;
        let now = ResizeRecord {
            at: listing::since_1970(SystemTime::now()),
            before,
            asked: known.asked,
            taken: known.taken,
            took: is_taken(known).then_some(Duration::ZERO),
            reason: "it is to have that already".to_owned(),
            metrics: BTreeMap::new(),
        };
        let launched = self.launched_mut(machine).map_err(|_| ResizeError::Unknown)?;
        let (tell, taken) = oneshot::channel();
        let resize = match launched.resizes.back() {
            Some(last) if asked != before => last.clone(),
            _ => now,
        };
        match resize.took {
            Some(_) => drop(tell.send(resize.clone())),
            None => wait(&mut launched.resizing, tell),
        }
        Ok(Resizing { resize, taken })
    }

    /// Whether its thresholds may be replaced by who knows them by this; where that is written down.
    fn may_set_thresholds(&mut self, machine: MachineId, etag: Option<&str>) -> Result<RecordFile, LaunchedError> {
        self.lasting(machine)?;
        let known = self.known(machine).ok_or(LaunchedError::Unknown)?;
        if etag.is_some_and(|etag| etag != launched::etag(known)) {
            return Err(LaunchedError::Changed);
        }
        // Before it is spawned there is none.
        self.record_of(machine).ok_or(LaunchedError::Starting)
    }

    /// It is written down before it is answered.
    fn ask_for_thresholds(
        &mut self,
        machine: MachineId,
        thresholds: Thresholds,
        by: Arc<str>,
        record: RecordFile,
        reply: Reply<Result<v1::Machine, LaunchedError>>,
    ) {
        self.step(Event::ThresholdsAsked {
            machine,
            thresholds,
            by,
        });
        let shown = self.shown(machine);
        self.spawn(|_, _| async move {
            let saved = record.save().await;
            if let Err(error) = &saved {
                tracing::error!(%machine, %error, "the next agent will not know a machine's thresholds");
            }
            let done = shown.filter(|_| saved.is_ok());
            let _ = reply.send(done.ok_or(LaunchedError::Failed));
        });
    }

    fn stop(
        &mut self,
        machine: MachineId,
        grace: Duration,
        by: Arc<str>,
    ) -> Result<oneshot::Receiver<v1::Machine>, LaunchedError> {
        let (tell, ended) = oneshot::channel();
        match self.launched_mut(machine) {
            Ok(launched) => {
                wait(&mut launched.ending, tell);
                self.note_stop(machine, &by, grace);
                self.end_within(machine, grace, by);
            }
            Err(LaunchedError::Ended(machine)) => drop(tell.send(*machine)),
            Err(error) => return Err(error),
        }
        Ok(ended)
    }

    /// Lets one end once its program has had so long. One that ends already may be left less time by that.
    fn end_within(&mut self, machine: MachineId, grace: Duration, by: Arc<str>) {
        let Ok(launched) = self.launched_mut(machine) else {
            return;
        };
        launched.grace = grace;
        let sooner = launched.stop(Reason::Asked { by: by.clone() }.to_string());
        let ends = self.lasting(machine).is_err();
        match self.machines.get(&machine).filter(|_| ends) {
            Some(handle) => handle.stopper.stop(sooner),
            None => self.step(Event::EndAsked { machine, by }),
        }
    }

    /// The next agent is to carry it on, with no more time than any that was given.
    fn note_stop(&self, machine: MachineId, by: &Arc<str>, grace: Duration) {
        let until = uptime() + grace;
        self.note_launched(machine, |record| {
            if record.stop.as_ref().is_none_or(|stop| until < stop.until) {
                let by = by.clone();
                record.stop = Some(StopRecord { by, until, grace });
            }
        });
        self.save(machine);
    }

    fn resizes(&self, machine: MachineId) -> Option<VecDeque<ResizeRecord>> {
        let launched = self.machines.get(&machine).and_then(|handle| handle.launched.as_ref());
        let resizes = launched.map(|launched| &launched.resizes);
        let ended = || self.launch_ends.get(&machine).map(|end| &end.resizes);
        resizes.or_else(ended).cloned()
    }

    fn guest(&mut self, machine: MachineId) -> Result<Guest, LaunchedError> {
        self.lasting(machine)?;
        let launched = self.launched_mut(machine)?;
        let runs = launched.runs;
        let guest = self.machines.get(&machine).and_then(|handle| handle.guest.clone());
        guest.filter(|_| runs).ok_or(LaunchedError::Starting)
    }

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
}

// === impl EventLoop: what happens ===

impl EventLoop {
    /// The guest of one that boots, or was found, has answered; in it its image's program has run already, or not.
    pub(super) fn launched_ready(&mut self, id: MachineId, has_run: bool) {
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

    fn program_runs(&mut self, id: MachineId) {
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
    pub(super) fn program_said(&mut self, id: MachineId, said: proto::WatchResponse) {
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
    pub(super) fn measured(&mut self, machine: MachineId, counted: &Counted, said: Option<proto::MachineUse>) {
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
    fn resized(&mut self, machine: MachineId, number: u64, taken: Taken) {
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
    pub(super) fn launch_ended(&mut self, id: MachineId, launched: LaunchHandle, ended: &v1::Machine) {
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
    pub(super) fn launch_gone(&mut self, gone: &v1::Machine) {
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
    pub(super) fn forget_launch(&mut self, id: MachineId) {
        if self.launch_ends.remove(&id).is_some() {
            self.launches.retain(|_, before| before.machine != id);
        }
    }
}

// === impl EventLoop: what was decided ===

impl EventLoop {
    pub(super) fn launch_machine(&mut self, id: MachineId, account: &Arc<str>, launch: &Launch) {
        let Some(Launching {
            image,
            digest,
            file,
            program,
            request,
            reply,
        }) = self.launching.take()
        else {
            tracing::error!(machine = %id, "a machine is to be launched that nobody asked for");
            return;
        };
        tracing::info!(machine = %id, %account, %image, size = %launch.size, "launching a machine");
        let known = self.host.world().machine(id);
        let created = known.map(|known| known.created.wall).unwrap_or_default();
        let terms = known.and_then(|known| Some(known.credits.as_ref()?.terms));
        let baseline_millis = known.map_or(0, |known| known.shape.baseline_millis);
        let record = LaunchRecord {
            launch: launch.clone(),
            counts: Taken {
                vcpus: launch.size.vcpus,
                memory_mib: launch.size.memory_mib,
            },
            image,
            digest,
            program,
            request,
            resizes: VecDeque::new(),
            ran: false,
            stop: None,
        };
        let (stopper, stopped) = Stopper::new();
        let mut launched = LaunchHandle::new(&record);
        launched.launching.push(reply);
        let handle = MachineHandle {
            launched: Some(Box::new(launched)),
            ..MachineHandle::new(stopper)
        };
        self.machines.insert(id, handle);
        let spec = Spec {
            id: id.0,
            // The rest of its memory is plugged once its guest has answered.
            shape: Shape {
                vcpus: launch.size.vcpus,
                memory_mib: launch.base_mib,
                drive_mib: launch.drive_mib,
                baseline_millis,
            },
            ceiling: Some(Ceiling {
                vcpus: launch.ceiling.vcpus,
                memory_mib: launch.ceiling.memory_mib,
            }),
            runtime: "".into(),
            cpu_weight: self.host.world().rules().unowned_weight(),
            terms,
            created,
            launched: Some(FromImage {
                account: account.clone(),
                record,
                file,
            }),
        };
        self.spawn(|shared, inbox| {
            machine::live(id, inbox, shared.launcher.clone(), |launcher, reports| {
                launcher.live(spec, stopped, reports)
            })
        });
    }

    /// Its devices are asked, and nobody waits for its guest.
    pub(super) fn resize_machine(&mut self, id: MachineId, number: u64, asked: Size, reason: &Reason) {
        let known = self.known(id);
        let Some((last, taken, metrics)) =
            known.and_then(|known| Some((*known.resizes.back()?, known.taken, metrics(known))))
        else {
            return;
        };
        tracing::info!(machine = %id, before = %last.before, %asked, why = %reason, "resizing a machine");
        self.counts.resizes.count(match reason {
            Reason::Crossed(_) => ResizedBy::Threshold,
            _ => ResizedBy::Request,
        });
        let resize = ResizeRecord {
            at: last.at.wall,
            before: last.before,
            asked,
            taken,
            took: last.took,
            reason: reason.to_string(),
            metrics,
        };
        self.change_resizes(id, |resizes| {
            if resizes.len() >= RESIZES {
                resizes.pop_front();
            }
            resizes.push_back(resize.clone());
        });
        // It is written down before its devices are asked.
        self.note_launched(id, |record| record.launch.size = asked);
        if let Ok(launched) = self.launched_mut(id) {
            // Who waits for the one before waits for what can't be any more.
            launched.resizing.clear();
            launched.asked.send_replace(Asked { number, size: asked });
        }
        self.report_machine(id);
    }

    /// Its guest has what was asked for, or has had long enough for that.
    pub(super) fn report_resize(&mut self, id: MachineId, reason: &Reason) {
        match reason {
            Reason::Taken { took } => {
                let took = *took;
                tracing::info!(machine = %id, ?took, "a machine has the size that was decided");
                let is_earlier = self
                    .launched_mut(id)
                    .is_ok_and(|launched| launched.asked.borrow().number == 0 && !launched.resizes.is_empty());
                // How long what an earlier agent asked for took is seen by when that was.
                if !is_earlier {
                    self.counts.resize_durations.observe((), took);
                    self.change_resizes(id, |resizes| {
                        if let Some(last) = resizes.back_mut() {
                            last.took.get_or_insert(took);
                        }
                    });
                }
            }
            reason => tracing::warn!(machine = %id, why = %reason, "a guest does not take what it was asked to have"),
        }
        self.report_machine(id);
    }

    pub(super) fn set_thresholds(&mut self, id: MachineId, thresholds: &Thresholds) {
        self.note_launched(id, |record| record.launch.thresholds = thresholds.clone());
        self.report_machine(id);
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
