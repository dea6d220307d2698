//! The loop: what is heard becomes an event, the event decisions, each decision goes to who carries it out.
//!
//! What machines, containers and requests there are is known to the world alone; here are only handles by their ids.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use stoker_ebpf::CgroupId;
use stoker_policy::{
    Amount, Command, Completion, ContainerFailure, ContainerId, ContainerState, Decision, Event, IdMap, Kind,
    MachineId, MachineState, Now, Purpose, Reason, Refusal, RequestId, Shape,
};
use stoker_proto::guest as proto;
use stoker_proto::v1;
use tokio::sync::{mpsc, oneshot};
use ulid::Ulid;

use super::call::{Place, Placed, Told};
use super::container::{self, Costs, Handle, Made, NotMade, Shared};
use super::error::InvokeError;
use super::journal::{Journal, Recording};
use super::listing;
use super::machine::{self, cpu_weight};
use super::message::{Ended, MachineReport, Message, Started};
use super::recorder::Recorder;
use crate::code::CodeError;
use crate::machines::{Guest, Spec, Stop, Stopper};
use crate::store::FunctionRecord;

/// How many machines that have ended are remembered.
const REMEMBERED: usize = 256;

/// How many messages are taken at a time.
const BATCH: usize = 64;

/// The loop's state.
pub(super) struct EventLoop {
    host: stoker_policy::Host,
    /// Where the monotonic clock of events begins.
    start: Instant,
    shared: Arc<Shared>,
    recorder: Recorder,
    journal: Journal,
    recording: Option<Recording>,
    /// Weak, so that the loop ends once nobody else is left to speak to it.
    inbox: mpsc::WeakSender<Message>,
    machines: IdMap<MachineId, MachineHandle>,
    containers: IdMap<ContainerId, ContainerHandle>,
    calls: IdMap<RequestId, CallHandle>,
    /// The last machines that have ended, as the API shows them.
    ended: VecDeque<v1::Machine>,
    /// Why the last boot of a runtime failed, until one succeeds.
    boot_failures: HashMap<Arc<str>, String>,
    drained: Vec<oneshot::Sender<()>>,
}

/// What reaches a machine.
#[derive(Debug)]
pub(super) struct MachineHandle {
    stopper: Stopper,
    /// Once it was spawned.
    pub(super) started: Option<Started>,
    /// Once it was ready.
    guest: Option<Guest>,
    pub(super) boot_duration: Option<Duration>,
}

/// What a container is called by, and why it ends.
#[derive(Debug)]
pub(super) struct ContainerHandle {
    pub(super) function: Arc<FunctionRecord>,
    /// Why it ended, where its guest said so before whoever uses it did; or why it is stopped.
    end_detail: Option<String>,
}

/// Who waits for a request.
#[derive(Debug)]
struct CallHandle {
    function: Arc<FunctionRecord>,
    amount: Amount,
    /// Until it is placed.
    tell: Option<oneshot::Sender<Told>>,
    /// While it runs.
    lost: Option<oneshot::Sender<InvokeError>>,
    /// Of the container that is made for it: where from, since when, and what it took.
    made: Option<(v1::placement::Source, Instant)>,
    costs: Costs,
    /// What went wrong the last time that it was placed.
    trouble: Option<InvokeError>,
}

/// What the loop works with.
pub(super) struct Parts {
    pub(super) host: stoker_policy::Host,
    pub(super) shared: Shared,
    pub(super) recorder: Recorder,
    pub(super) journal: Journal,
    pub(super) recording: Option<Recording>,
    pub(super) inbox: mpsc::WeakSender<Message>,
}

// === impl EventLoop ===

impl EventLoop {
    pub(super) fn new(parts: Parts) -> Self {
        Self {
            host: parts.host,
            start: Instant::now(),
            shared: Arc::new(parts.shared),
            recorder: parts.recorder,
            journal: parts.journal,
            recording: parts.recording,
            inbox: parts.inbox,
            machines: IdMap::default(),
            containers: IdMap::default(),
            calls: IdMap::default(),
            ended: VecDeque::new(),
            boot_failures: HashMap::new(),
            drained: Vec::new(),
        }
    }

    pub(super) async fn run(mut self, mut inbox: mpsc::Receiver<Message>) {
        self.step(Event::Tick);
        let mut batch = Vec::with_capacity(BATCH);
        loop {
            let wake = self.host.next_wake().map(|at| self.start + at);
            let wake = wake.into_iter().chain(self.journal.due()).min();
            let time = async {
                match wake {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                heard = inbox.recv_many(&mut batch, BATCH) => if heard == 0 {
                    self.journal.flush();
                    return;
                },
                () = time => {}
            }
            for message in batch.drain(..) {
                self.hear(message);
            }
            // Also where messages come without end.
            self.passed();
        }
    }

    /// What is due by now.
    fn passed(&mut self) {
        if self.host.next_wake().is_some_and(|at| at <= self.start.elapsed()) {
            self.step(Event::Tick);
        }
        if self.journal.due().is_some_and(|at| at <= Instant::now()) {
            self.journal.flush();
        }
        if self.host.is_drained() && !self.drained.is_empty() {
            self.journal.flush();
            for reply in self.drained.drain(..) {
                self.journal.settle(self.recorder.clone(), reply);
            }
        }
    }

    fn hear(&mut self, message: Message) {
        match message {
            Message::Requested {
                request,
                demand,
                function,
                given,
                tell,
            } => {
                // It may have been looked up before its deletion. The caller may have left.
                if is_deleted(&function) {
                    return drop(tell.send(Told::Refused(InvokeError::FunctionDeleted)));
                }
                let amount = demand.kinds.first().map(|kind| kind.amount).unwrap_or_default();
                let call = CallHandle {
                    function,
                    amount,
                    tell: Some(tell),
                    lost: None,
                    made: None,
                    costs: Costs::default(),
                    trouble: None,
                };
                self.calls.insert(request, call);
                if let Some(given) = given {
                    self.journal.named(given, request);
                }
                self.step(Event::Requested { request, demand });
            }
            Message::CallerLeft { request } => self.step(Event::CallerLeft { request }),
            Message::Completed {
                container,
                request,
                completion,
                detail,
                again,
            } => self.completed(container, request, completion, detail, again),
            Message::FunctionDeleted { uid } => self.step(Event::FunctionDeleted { uid }),
            Message::Machine { machine, report } => self.machine_reports(machine, report),
            Message::ContainerMade { container, made } => self.container_made(container, made),
            Message::ContainerStopped { container } => self.container_ended(container, "it was stopped".into()),
            Message::Said { machine, said, taken } => {
                self.guest_said(machine, said);
                // One whose machine has ended listens no longer.
                let _ = taken.send(());
            }
            // A caller that has left has no use for an answer.
            Message::Machines { include_ended, reply } => drop(reply.send(self.list_machines(include_ended))),
            Message::Containers { reply } => drop(reply.send(self.list_containers())),
            Message::Decisions(question) => self.journal.ask(question),
            Message::Drain { reply } => {
                self.drained.push(reply);
                self.step(Event::Drain);
            }
            Message::DrainExpired { reply } => {
                self.drained.push(reply);
                self.step(Event::DrainExpired);
            }
        }
    }

    fn list_machines(&self, include_ended: bool) -> Vec<(v1::Machine, Option<CgroupId>)> {
        let there = self.host.world().machines().map(|machine| {
            let handle = self.machines.get(&machine.id);
            let cgroup = handle.and_then(|handle| handle.started.as_ref()?.cgroup_id);
            (listing::machine(machine, handle), cgroup)
        });
        let ended = self.ended.iter().filter(|_| include_ended).cloned();
        let mut all: Vec<_> = there.chain(ended.map(|machine| (machine, None))).collect();
        all.sort_by(|(a, _), (b, _)| a.name.cmp(&b.name));
        all
    }

    fn list_containers(&self) -> Vec<v1::Container> {
        let there = self.host.world().containers();
        let mut all: Vec<_> = there
            .map(|container| listing::container(container, self.containers.get(&container.id)))
            .collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    // --- what happened ---

    fn completed(
        &mut self,
        container: ContainerId,
        request: RequestId,
        completion: Completion,
        detail: Option<String>,
        again: Option<oneshot::Sender<Told>>,
    ) {
        let said = self
            .containers
            .get_mut(&container)
            .and_then(|handle| handle.end_detail.take());
        let gone = detail.or(said);
        if completion == Completion::NotBegun {
            if let Some(call) = self.calls.get_mut(&request) {
                call.tell = again;
                call.lost = None;
                let detail = gone.clone().unwrap_or_default();
                call.trouble = Some(InvokeError::Container { detail });
            }
        } else {
            self.calls.remove(&request);
        }
        let end = gone.and_then(|detail| {
            let mut end = self.container_end(container, &detail)?;
            end.invocations += u64::from(completion != Completion::NotBegun);
            Some(end)
        });
        self.step(Event::Completed {
            container,
            request,
            completion,
        });
        if let Some(end) = end
            && self.host.world().container(container).is_none()
        {
            self.report_container_end(container, end);
        }
    }

    fn machine_reports(&mut self, id: MachineId, report: MachineReport) {
        let Some(handle) = self.machines.get_mut(&id) else {
            return;
        };
        match report {
            MachineReport::Started(started) => {
                handle.started = Some(started);
                self.report_machine(id);
            }
            MachineReport::Ready { guest, boot_duration } => {
                handle.boot_duration = Some(boot_duration);
                handle.guest = Some(*guest);
                let Some(machine) = self.host.world().machine(id) else {
                    return;
                };
                tracing::info!(machine = %id, runtime = %machine.runtime, ?boot_duration, "machine ready");
                self.boot_failures.remove(&machine.runtime);
                if let Some(handle) = self.handle(id) {
                    let interval = self.shared.watch_interval;
                    self.spawn(|_, inbox| container::watch(handle, id, interval, inbox));
                }
                self.step(Event::MachineReady { machine: id });
                // One that went to an account at once was reported as that.
                let state = self.host.world().machine(id).map(|machine| machine.state);
                if state == Some(MachineState::Warming) {
                    self.report_machine(id);
                }
            }
            MachineReport::Ended(ended) => self.machine_ended(id, *ended),
        }
    }

    fn machine_ended(&mut self, id: MachineId, ended: Ended) {
        let Ended { end, usage } = ended;
        let reason = end.reason();
        let asked = reason == v1::machine_end::Reason::Stopped;
        if asked {
            tracing::info!(machine = %id, detail = end.detail, "machine ended");
        } else {
            let console = end.console_tail.as_str();
            tracing::warn!(machine = %id, ?reason, detail = end.detail, console, "machine ended");
        }
        // As it was before the world lets it go: whose, and with what in it.
        let known = self.host.world().machine(id).map(|machine| {
            let containers: Vec<_> = machine.containers.iter().copied().collect();
            let proto = listing::machine(machine, self.machines.get(&id));
            (proto, machine.runtime.clone(), containers)
        });
        let Some((mut proto, runtime, containers)) = known else {
            self.machines.remove(&id);
            return;
        };
        let booted = self.machines.get(&id).is_some_and(|handle| handle.guest.is_some());
        if !booted && !asked {
            self.boot_failures.insert(runtime, end.detail.clone());
        }
        for container in &containers {
            let state = self.host.world().container(*container).map(|there| there.state);
            if let Some(ContainerState::Busy(request) | ContainerState::Starting(Purpose::Serve(request))) = state
                && let Some(call) = self.calls.get_mut(&request)
            {
                let detail = end.detail.clone();
                call.trouble = Some(InvokeError::MachineLost { detail });
            }
        }
        for container in containers {
            if let Some(end) = self.container_end(container, "its machine ended") {
                self.report_container_end(container, end);
            }
        }
        self.step(Event::MachineEnded { machine: id });
        self.machines.remove(&id);
        proto.state = v1::machine::State::Ended.into();
        (proto.pid, proto.allocated) = (0, None);
        (proto.usage, proto.end) = (usage, Some(end));
        self.recorder.machine(proto.clone());
        self.ended.push_back(proto);
        if self.ended.len() > REMEMBERED {
            self.ended.pop_front();
        }
    }

    fn container_made(&mut self, id: ContainerId, made: Made) {
        let Made { result, costs } = made;
        let Some(container) = self.host.world().container(id) else {
            return;
        };
        let serves = match container.state {
            ContainerState::Starting(Purpose::Serve(request)) => Some(request),
            _ => None,
        };
        let machine = container.machine;
        let mut proto = listing::container(container, self.containers.get(&id));
        let said = self.containers.get_mut(&id).and_then(|handle| handle.end_detail.take());
        // One that ended as soon as it was made is as good as not made.
        let result = result.and_then(|()| said.map_or(Ok(()), |detail| Err(NotMade::Setup(detail))));
        let call = serves.and_then(|request| self.calls.get_mut(&request));
        let Err(why) = result else {
            if let Some(call) = call {
                call.costs = costs;
            }
            proto.state = v1::container::State::Idle.into();
            self.recorder.container(proto);
            return self.step(Event::ContainerReady { container: id });
        };
        let (failure, detail) = match &why {
            NotMade::Function(error) => (
                ContainerFailure::Settled,
                format!("{}: {}", error.r#type, error.message),
            ),
            NotMade::Code(error) => (ContainerFailure::Settled, error.to_string()),
            NotMade::Setup(detail) => {
                tracing::warn!(detail, "a guest could not make a container");
                if let Some(call) = call {
                    let detail = detail.clone();
                    call.trouble = Some(InvokeError::Container { detail });
                }
                (ContainerFailure::Lost, detail.clone())
            }
        };
        if failure == ContainerFailure::Settled
            && let Some(call) = serves.and_then(|request| self.calls.remove(&request))
        {
            call.settle(machine, id, costs, why, &detail);
        }
        if let Some(end) = self.container_end(id, &detail) {
            self.report_container_end(id, end);
        }
        self.step(Event::ContainerFailed { container: id, failure });
    }

    /// A guest may name any container: only its own are listened to.
    fn guest_said(&mut self, machine: MachineId, said: proto::WatchResponse) {
        let used = said.containers.iter().filter_map(|used| {
            let id = Ulid::from_string(&used.id).ok()?;
            Some((ContainerId(id), listing::usage(used.usage.as_ref()?)))
        });
        let containers: Vec<_> = used.collect();
        if !containers.is_empty() {
            self.step(Event::Used { machine, containers });
        }
        for ended in said.ended {
            let Ok(id) = Ulid::from_string(&ended.id).map(ContainerId) else {
                continue;
            };
            let container = self.host.world().container(id);
            let Some(container) = container.filter(|container| container.machine == machine) else {
                continue;
            };
            let detail = match ended.error {
                Some(error) => format!("{}: {}", error.r#type, error.message),
                None => "it ended".to_owned(),
            };
            match container.state {
                // It is over once who makes it or runs in it has told of that.
                ContainerState::Starting(_) | ContainerState::Busy(_) => {
                    if let Some(handle) = self.containers.get_mut(&id) {
                        handle.end_detail.get_or_insert(detail);
                    }
                    self.step(Event::ContainerEnded { container: id });
                }
                ContainerState::Idle | ContainerState::Stopping => self.container_ended(id, detail),
            }
        }
    }

    fn container_ended(&mut self, id: ContainerId, detail: String) {
        let known = self.containers.get_mut(&id).and_then(|handle| handle.end_detail.take());
        if let Some(end) = self.container_end(id, &known.unwrap_or(detail)) {
            self.report_container_end(id, end);
            self.step(Event::ContainerEnded { container: id });
        }
    }

    // --- what was decided ---

    fn step(&mut self, event: Event) {
        let now = Now {
            mono: self.start.elapsed(),
            wall: listing::since_1970(SystemTime::now()),
        };
        let recorded = self.recording.is_some().then(|| event.clone());
        let decisions = self.host.step(now, event);
        if let (Some(event), Some(recording)) = (recorded, &mut self.recording)
            && !recording.push(now, event, &decisions)
        {
            self.recording = None;
        }
        for (command, error) in self.host.take_faults() {
            tracing::error!(?command, %error, "a policy decided what must not be; it was not done");
        }
        for decision in decisions {
            tracing::debug!(command = ?decision.command, reason = ?decision.reason, "decided");
            self.carry_out(&decision);
            self.journal.push(now.wall, decision);
        }
    }

    fn carry_out(&mut self, decision: &Decision) {
        match &decision.command {
            Command::BootMachine {
                machine,
                runtime,
                shape,
                ..
            } => self.boot(*machine, runtime.clone(), *shape),
            Command::AssignMachine { machine, .. } => self.report_machine(*machine),
            Command::CreateContainer {
                machine,
                container,
                kind,
                purpose,
            } => self.create(*machine, *container, *kind, *purpose, &decision.reason),
            Command::Dispatch {
                machine,
                container,
                request,
            } => self.dispatch(*machine, *container, *request, &decision.reason),
            Command::StopContainer { machine, container } => {
                if let Some(handle) = self.containers.get_mut(container) {
                    handle.end_detail.get_or_insert_with(|| decision.reason.to_string());
                }
                if let Some(handle) = self.handle(*machine) {
                    let container = *container;
                    self.spawn(|_, inbox| container::stop(handle, container, inbox));
                }
            }
            Command::DestroyMachine { machine, gently } => {
                if let Some(handle) = self.machines.get(machine) {
                    let why = decision.reason.to_string();
                    handle
                        .stopper
                        .stop(if *gently { Stop::Gently(why) } else { Stop::Now(why) });
                }
                self.report_machine(*machine);
            }
            Command::WeighMachine { machine, cpu_millis } => {
                let handle = self.machines.get(machine);
                if let Some(started) = handle.and_then(|handle| handle.started.as_ref()) {
                    started.cpu_weight.send_replace(Some(cpu_weight(*cpu_millis)));
                }
            }
            Command::Refuse { request, refusal } => self.refuse(*request, refusal),
            // The world knows: nobody else need do a thing.
            Command::CloseMachine { .. } | Command::Wait { .. } => {}
        }
    }

    fn boot(&mut self, id: MachineId, runtime: Arc<str>, shape: Shape) {
        tracing::info!(machine = %id, %runtime, ?shape, "booting a machine");
        let (stopper, stopped) = Stopper::new();
        let handle = MachineHandle {
            stopper,
            started: None,
            guest: None,
            boot_duration: None,
        };
        self.machines.insert(id, handle);
        let spec = Spec {
            id: id.0,
            shape,
            runtime,
        };
        self.spawn(|shared, inbox| machine::live(shared.launcher.clone(), spec, id, stopped, inbox));
    }

    fn create(&mut self, machine: MachineId, id: ContainerId, kind: Kind, purpose: Purpose, reason: &Reason) {
        let Purpose::Serve(request) = purpose else {
            tracing::error!(container = %id, "no container is made ahead of requests by this agent");
            return;
        };
        let (Some(handle), Some(call)) = (self.handle(machine), self.calls.get_mut(&request)) else {
            tracing::error!(container = %id, %request, "a container is to be made where or for what there is not");
            return;
        };
        let source = match reason {
            Reason::WarmingMachine { .. } => v1::placement::Source::WarmingMachine,
            Reason::NewMachine { .. } => v1::placement::Source::NewMachine,
            _ => v1::placement::Source::ActiveMachine,
        };
        call.made = Some((source, Instant::now()));
        call.costs = Costs::default();
        let function = call.function.clone();
        let asked = proto::CreateContainerRequest {
            id: id.to_string(),
            function_name: function.name.to_string(),
            function_version: function.version,
            runtime: function.runtime.clone(),
            handler: function.handler.clone(),
            environment: function.environment.clone().into_iter().collect(),
            amount: Some(listing::proto_amount(kind.amount)),
            code_sha256: function.code_sha256.clone(),
            account: function.name.account().to_owned(),
            init_timeout: self.shared.init_timeout.try_into().ok(),
            timeout: function.timeout.try_into().ok(),
        };
        let made = ContainerHandle {
            function,
            end_detail: None,
        };
        self.containers.insert(id, made);
        self.spawn(|shared, inbox| {
            container::create(shared.code.clone(), shared.init_timeout, handle, id, asked, inbox)
        });
    }

    fn dispatch(&mut self, machine: MachineId, container: ContainerId, request: RequestId, reason: &Reason) {
        let (Some(handle), Some(call)) = (self.handle(machine), self.calls.get_mut(&request)) else {
            tracing::error!(%request, "a request is to run where or for whom there is not");
            return;
        };
        let made = call.made.take().filter(|_| matches!(reason, Reason::MadeForIt));
        let costs = match made {
            Some(_) => std::mem::take(&mut call.costs),
            None => Costs::default(),
        };
        let (source, since) = made.unwrap_or_else(|| (v1::placement::Source::IdleContainer, Instant::now()));
        let (lose, lost) = oneshot::channel();
        call.lost = Some(lose);
        let placed = Placed {
            handle,
            place: Place {
                machine,
                container,
                source,
                since,
                costs,
            },
            lost,
        };
        let told = call.tell.take().map(|tell| tell.send(Told::Placed(Box::new(placed))));
        if !matches!(told, Some(Ok(()))) {
            // Its task panicked: nothing runs, and the container takes the next.
            self.spawn(|_, inbox| async move {
                let completed = Message::Completed {
                    container,
                    request,
                    completion: Completion::Answered,
                    detail: None,
                    again: None,
                };
                let _ = inbox.send(completed).await;
            });
        }
    }

    fn refuse(&mut self, request: RequestId, refusal: &Refusal) {
        let Some(call) = self.calls.remove(&request) else {
            return;
        };
        let runtime = call.function.runtime.as_str();
        let boot = self.boot_failures.get(runtime).cloned();
        let error = match refusal {
            Refusal::QueueFull { waiting } => InvokeError::QueueFull {
                waiting: *waiting,
                boot,
            },
            Refusal::AccountQueueFull { limit } => InvokeError::AccountQueueFull { limit: *limit, boot },
            Refusal::QueueTimeout { waited } => InvokeError::QueueTimeout { waited: *waited, boot },
            Refusal::TooLarge { largest } => InvokeError::TooLarge {
                asked: call.amount,
                largest: *largest,
            },
            Refusal::BootFailing => InvokeError::BootFailing {
                runtime: runtime.to_owned(),
                detail: boot.unwrap_or_else(|| "its guest ended at once".into()),
            },
            Refusal::MachineLost => call.trouble.unwrap_or_else(|| InvokeError::MachineLost {
                detail: "it had to be ended".into(),
            }),
            Refusal::FunctionDeleted => InvokeError::FunctionDeleted,
            Refusal::Draining => InvokeError::Draining,
            Refusal::CallerLeft => InvokeError::CallerLeft,
        };
        // It has its answer, or it panicked.
        match (call.tell, call.lost) {
            (Some(tell), _) => drop(tell.send(Told::Refused(error))),
            (None, Some(lost)) => drop(lost.send(error)),
            (None, None) => {}
        }
    }

    // --- helpers ---

    fn report_machine(&self, id: MachineId) {
        if let Some(machine) = self.host.world().machine(id) {
            self.recorder.machine(listing::machine(machine, self.machines.get(&id)));
        }
    }

    /// A container as its end is reported. To be asked before the world lets it go.
    fn container_end(&self, id: ContainerId, detail: &str) -> Option<v1::Container> {
        let container = self.host.world().container(id)?;
        Some(v1::Container {
            state: v1::container::State::Ended.into(),
            end_detail: detail.to_owned(),
            ..listing::container(container, self.containers.get(&id))
        })
    }

    fn report_container_end(&mut self, id: ContainerId, end: v1::Container) {
        self.containers.remove(&id);
        tracing::debug!(container = end.name, detail = end.end_detail, "container ended");
        self.recorder.container(end);
    }

    fn handle(&self, machine: MachineId) -> Option<Handle> {
        let handle = self.machines.get(&machine)?;
        Some(Handle {
            guest: handle.guest.clone()?,
            stopper: handle.stopper.clone(),
        })
    }

    fn spawn<F: Future<Output = ()> + Send + 'static>(
        &self,
        executor: impl FnOnce(Arc<Shared>, mpsc::Sender<Message>) -> F,
    ) {
        // Without a sender nobody is left to serve.
        if let Some(inbox) = self.inbox.upgrade() {
            tokio::spawn(executor(self.shared.clone(), inbox));
        }
    }
}

/// Whether the function was deleted after the call looked it up.
fn is_deleted(_function: &FunctionRecord) -> bool {
    // The catalogue says so once it holds functions (`Function::is_deleted`).
    false
}

// === impl CallHandle ===

impl CallHandle {
    /// Its container could not be made, and that is its answer.
    fn settle(self, machine: MachineId, container: ContainerId, costs: Costs, why: NotMade, detail: &str) {
        let Some(tell) = self.tell else { return };
        let (source, since) = self
            .made
            .unwrap_or_else(|| (v1::placement::Source::ActiveMachine, Instant::now()));
        let told = match why {
            NotMade::Function(error) => {
                let place = Place {
                    machine,
                    container,
                    source,
                    since,
                    costs,
                };
                Told::InitFailed(Box::new(place), error)
            }
            // Code goes with the last function that needs it.
            NotMade::Code(CodeError::Missing(_)) => Told::Refused(InvokeError::FunctionDeleted),
            NotMade::Code(_) | NotMade::Setup(_) => Told::Refused(InvokeError::Container {
                detail: detail.to_owned(),
            }),
        };
        // A call that panicked hears nothing.
        let _ = tell.send(told);
    }
}
