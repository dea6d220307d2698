//! The task that owns machines, containers and requests.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use stoker_ebpf::CgroupId;
use stoker_proto::guest as proto;
use stoker_proto::v1;
use tokio::sync::{mpsc, oneshot};
use ulid::Ulid;

use super::InvokeError;
use super::executors::{self, Handle, NotMade, Shared};
use super::recorder::Recorder;
use super::records::{ContainerRecord, MachineRecord};
use super::request::{Call, Request};
use crate::code::CodeError;
use crate::machines::{Guest, Stop, Stopper};
use crate::policy::placement::{
    Action, ContainerFailure, ContainerId, DestroyReason, Event, Finish, Machine, MachineId, MachineState, Placement,
    Refusal, RequestId, Source,
};
use crate::policy::{Shape, Time};

/// How many machines that have ended are remembered.
const REMEMBERED: usize = 256;

/// What the task hears.
#[derive(Debug)]
pub(super) enum Message {
    Invoke {
        id: RequestId,
        call: Call,
        reply: oneshot::Sender<Result<v1::InvokeResponse, InvokeError>>,
    },
    Cancelled {
        id: RequestId,
    },
    FunctionDeleted {
        uid: Arc<str>,
    },
    Machines {
        include_ended: bool,
        reply: oneshot::Sender<Vec<(v1::Machine, Option<CgroupId>)>>,
    },
    Containers {
        reply: oneshot::Sender<Vec<v1::Container>>,
    },
    Drain {
        reply: oneshot::Sender<()>,
    },
    DrainExpired {
        reply: oneshot::Sender<()>,
    },
    Machine {
        machine: MachineId,
        news: MachineNews,
    },
    Container {
        container: ContainerId,
        news: ContainerNews,
    },
    /// A guest about its containers.
    Said {
        machine: MachineId,
        said: proto::WatchResponse,
        /// Answered once it was taken.
        taken: oneshot::Sender<()>,
    },
}

/// What became of a machine.
#[derive(Debug)]
pub(super) enum MachineNews {
    Started {
        pid: u32,
        cgroup: String,
        cgroup_id: Option<CgroupId>,
    },
    Ready {
        guest: Box<Guest>,
        boot_duration: Duration,
    },
    Ended {
        end: v1::MachineEnd,
        usage: Option<v1::Usage>,
    },
}

/// What became of a container.
#[derive(Debug)]
pub(super) enum ContainerNews {
    Made {
        made: Result<(), NotMade>,
        log: Option<proto::Log>,
        code: Duration,
        init: Duration,
    },
    Answered {
        answer: Result<proto::InvokeResponse, String>,
        at: Instant,
    },
    /// With what the guest said of it, if it ended of itself.
    Ended(Option<proto::FunctionError>),
}

/// The task's state.
pub(super) struct Actor {
    policy: Placement,
    /// Where the policy's time begins.
    start: Instant,
    shared: Arc<Shared>,
    recorder: Recorder,
    /// Weak, so that the task ends once nobody else is left to speak to it.
    inbox: mpsc::WeakSender<Message>,
    machines: HashMap<MachineId, MachineRecord>,
    containers: HashMap<ContainerId, ContainerRecord>,
    container_ids: HashMap<String, ContainerId>,
    /// Which request a container was made for or runs.
    serving: HashMap<ContainerId, RequestId>,
    requests: HashMap<RequestId, Request>,
    ended: VecDeque<v1::Machine>,
    /// Why the last boot of a runtime failed, until one succeeds.
    boot_failures: HashMap<Arc<str>, String>,
    drained: Vec<oneshot::Sender<()>>,
}

// === impl Actor ===

impl Actor {
    pub(super) fn new(
        policy: Placement,
        shared: Arc<Shared>,
        recorder: Recorder,
        inbox: mpsc::WeakSender<Message>,
    ) -> Self {
        Self {
            policy,
            start: Instant::now(),
            shared,
            recorder,
            inbox,
            machines: HashMap::new(),
            containers: HashMap::new(),
            container_ids: HashMap::new(),
            serving: HashMap::new(),
            requests: HashMap::new(),
            ended: VecDeque::new(),
            boot_failures: HashMap::new(),
            drained: Vec::new(),
        }
    }

    pub(super) async fn run(mut self, mut messages: mpsc::Receiver<Message>) {
        self.step(Event::Tick);
        loop {
            let wake = self.policy.next_wake().map(|at| self.start + at);
            let tick = async {
                match wake {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                message = messages.recv() => match message {
                    Some(message) => self.hear(message),
                    None => return,
                },
                () = tick => self.step(Event::Tick),
            }
        }
    }

    fn hear(&mut self, message: Message) {
        match message {
            // Looked up before the function was deleted, which was heard of first.
            Message::Invoke { call, reply, .. } if call.function.is_deleted() => {
                drop(reply.send(Err(InvokeError::FunctionDeleted)));
            }
            Message::Invoke { id, call, reply } => {
                let demand = call.demand();
                self.requests.insert(id, Request::new(call, reply));
                self.step(Event::Request { request: id, demand });
            }
            Message::Cancelled { id } => self.step(Event::Cancelled { request: id }),
            Message::FunctionDeleted { uid } => self.step(Event::FunctionDeleted { uid }),
            // A caller that has left has no use for an answer.
            Message::Machines { include_ended, reply } => drop(reply.send(self.list_machines(include_ended))),
            Message::Containers { reply } => drop(reply.send(self.list_containers())),
            Message::Drain { reply } => {
                self.drained.push(reply);
                self.step(Event::Drain);
            }
            Message::DrainExpired { reply } => {
                self.drained.push(reply);
                self.step(Event::DrainExpired);
            }
            Message::Machine { machine, news } => self.machine_news(machine, news),
            Message::Container { container, news } => self.container_news(container, news),
            Message::Said { machine, said, taken } => {
                self.guest_said(machine, said);
                // One whose machine has ended listens no longer.
                let _ = taken.send(());
            }
        }
        if self.policy.is_drained() {
            for waiting in self.drained.drain(..) {
                self.recorder.answer_when_recorded(waiting);
            }
        }
    }

    fn list_machines(&self, include_ended: bool) -> Vec<(v1::Machine, Option<CgroupId>)> {
        let there = self
            .machines
            .iter()
            .map(|(id, record)| (record.proto(self.policy.machine(*id)), record.cgroup_id));
        let ended = self
            .ended
            .iter()
            .filter(|_| include_ended)
            .map(|machine| (machine.clone(), None));
        let mut all: Vec<_> = there.chain(ended).collect();
        all.sort_by(|(a, _), (b, _)| a.name.cmp(&b.name));
        all
    }

    fn list_containers(&self) -> Vec<v1::Container> {
        let mut all: Vec<_> = self.containers.values().map(ContainerRecord::proto).collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    // --- news ---

    fn machine_news(&mut self, id: MachineId, news: MachineNews) {
        let Some(record) = self.machines.get_mut(&id) else {
            return;
        };
        match news {
            MachineNews::Started { pid, cgroup, cgroup_id } => {
                (record.pid, record.cgroup, record.cgroup_id) = (pid, cgroup, cgroup_id);
                self.report_machine(id);
            }
            MachineNews::Ready { guest, boot_duration } => {
                tracing::info!(machine = %record.id, runtime = %record.runtime, ?boot_duration, "machine ready");
                record.boot_duration = Some(boot_duration);
                let guest = *guest;
                record.guest = Some(guest.clone());
                self.boot_failures.remove(&record.runtime);
                let handle = Handle {
                    guest,
                    stopper: record.stopper.clone(),
                };
                self.spawn(|shared, inbox| executors::watch(shared, id, handle, inbox));
                self.step(Event::MachineReady { machine: id });
                // One that went to an account at once was reported as that.
                let state = self.policy.machine(id).map(Machine::state);
                if state == Some(&MachineState::Warming) {
                    self.report_machine(id);
                }
            }
            MachineNews::Ended { end, usage } => self.machine_ended(id, end, usage),
        }
    }

    fn machine_ended(&mut self, id: MachineId, end: v1::MachineEnd, usage: Option<v1::Usage>) {
        let Some(record) = self.machines.get(&id) else { return };
        let name = record.name();
        let reason = end.reason();
        let asked = reason == v1::machine_end::Reason::Stopped;
        if asked {
            tracing::info!(machine = %record.id, detail = end.detail, "machine ended");
        } else {
            let console = end.console_tail.as_str();
            tracing::warn!(machine = %record.id, ?reason, detail = end.detail, console, "machine ended");
        }
        if record.boot_duration.is_none() && !asked {
            self.boot_failures.insert(record.runtime.clone(), end.detail.clone());
        }
        for request in self
            .requests
            .values_mut()
            .filter(|request| request.placement.machine == name)
        {
            request.trouble = Some(InvokeError::MachineLost {
                detail: end.detail.clone(),
            });
        }
        // Its state before the policy lets it go: whose it was.
        let mut machine = record.proto(self.policy.machine(id));
        machine.state = v1::machine::State::Ended.into();
        (machine.pid, machine.allocated) = (0, None);
        (machine.usage, machine.end) = (usage, Some(end));
        self.step(Event::MachineEnded { machine: id });
        let gone: Vec<_> = self
            .containers
            .iter()
            .filter(|(_, record)| record.machine == id)
            .map(|(id, _)| *id)
            .collect();
        for container in gone {
            self.container_gone(container, "its machine ended");
        }
        self.machines.remove(&id);
        self.recorder.machine(machine.clone());
        self.ended.push_back(machine);
        if self.ended.len() > REMEMBERED {
            self.ended.pop_front();
        }
    }

    fn container_news(&mut self, id: ContainerId, news: ContainerNews) {
        let serves = self.serving.get(&id).copied();
        match news {
            ContainerNews::Made { made, log, code, init } => {
                if let Some(request) = serves.and_then(|request| self.requests.get_mut(&request)) {
                    request.made(code, init, log);
                }
                let ended = self.containers.get_mut(&id).and_then(|record| record.gone(None));
                // One that ended as soon as it was made is as good as not made.
                match made.and_then(|()| ended.map_or(Ok(()), |detail| Err(NotMade::Setup(detail)))) {
                    Ok(()) => {
                        if let Some(record) = self.containers.get_mut(&id) {
                            record.state = v1::container::State::Idle;
                            self.recorder.container(record.proto());
                        }
                        self.step(Event::ContainerReady { container: id });
                    }
                    Err(why) => self.not_made(id, serves, why),
                }
            }
            ContainerNews::Answered { answer, at } => {
                let mut ended = true;
                let mut detail = "its function ended it".to_owned();
                if let Some(request) = serves.and_then(|request| self.requests.get_mut(&request)) {
                    match answer {
                        Ok(answer) => {
                            ended = answer.container_ended;
                            if let Some(error) = &answer.error {
                                detail = format!("{}: {}", error.r#type, error.message);
                            }
                            request.answered(answer, at);
                        }
                        Err(why) => {
                            request.settled = Some(Err(InvokeError::MachineLost { detail: why.clone() }));
                            detail = why;
                        }
                    }
                }
                self.serving.remove(&id);
                if let Some(record) = self.containers.get_mut(&id) {
                    record.invocations += 1;
                    record.state = v1::container::State::Idle;
                    if let Some(detail) = record.gone(ended.then_some(detail)) {
                        ended = true;
                        self.container_gone(id, &detail);
                    }
                }
                self.step(Event::InvocationDone { container: id, ended });
            }
            ContainerNews::Ended(error) => {
                // It was let go before.
                let Some(record) = self.containers.get_mut(&id) else {
                    return;
                };
                let detail = match (&error, record.stopped) {
                    (Some(error), None) => format!("{}: {}", error.r#type, error.message),
                    (_, Some(reason)) => reason.words().to_owned(),
                    (None, None) => "it ended".to_owned(),
                };
                // One that serves a request is let go with its answer.
                if serves.is_none() {
                    self.container_gone(id, &detail);
                } else if !record.says_ended(detail) {
                    return;
                }
                self.step(Event::ContainerEnded { container: id });
            }
        }
    }

    fn not_made(&mut self, id: ContainerId, serves: Option<RequestId>, why: NotMade) {
        let request = serves.and_then(|request| self.requests.get_mut(&request));
        let (failure, detail) = match why {
            NotMade::Function(error) => {
                let detail = format!("{}: {}", error.r#type, error.message);
                if let Some(request) = request {
                    request.failed(error);
                }
                (ContainerFailure::Settled, detail)
            }
            NotMade::Code(error) => {
                let detail = error.to_string();
                if let Some(request) = request {
                    request.settled = Some(Err(match error {
                        // Code goes with the last function that needs it.
                        CodeError::Missing(_) => InvokeError::FunctionDeleted,
                        _ => InvokeError::Container { detail: detail.clone() },
                    }));
                }
                (ContainerFailure::Settled, detail)
            }
            NotMade::Setup(detail) => {
                tracing::warn!(detail, "a guest could not make a container");
                if let Some(request) = request {
                    request.trouble = Some(InvokeError::Container { detail: detail.clone() });
                }
                (ContainerFailure::Lost, detail)
            }
        };
        self.container_gone(id, &detail);
        self.step(Event::ContainerFailed { container: id, failure });
    }

    /// A guest may name any container: only its own are listened to.
    fn guest_said(&mut self, machine: MachineId, said: proto::WatchResponse) {
        let find = |ids: &HashMap<String, ContainerId>, records: &HashMap<ContainerId, ContainerRecord>, id: &str| {
            ids.get(id)
                .copied()
                .filter(|id| records.get(id).is_some_and(|record| record.machine == machine))
        };
        for used in said.containers {
            if let Some(id) = find(&self.container_ids, &self.containers, &used.id)
                && let Some(record) = self.containers.get_mut(&id)
            {
                record.usage = used.usage;
            }
        }
        for ended in said.ended {
            if let Some(id) = find(&self.container_ids, &self.containers, &ended.id) {
                let error = ended.error.unwrap_or_default();
                self.container_news(id, ContainerNews::Ended(Some(error)));
            }
        }
    }

    fn container_gone(&mut self, id: ContainerId, why: &str) {
        self.serving.remove(&id);
        let Some(mut record) = self.containers.remove(&id) else {
            return;
        };
        self.container_ids.remove(&record.id.to_string());
        record.state = v1::container::State::Ended;
        let container = v1::Container {
            end_detail: why.to_owned(),
            ..record.proto()
        };
        tracing::debug!(container = container.name, why, "container ended");
        self.recorder.container(container);
    }

    // --- what the policy decided ---

    fn step(&mut self, event: Event) {
        let now: Time = self.start.elapsed();
        for action in self.policy.step(event, now) {
            tracing::debug!(?action, "decided");
            match action {
                Action::BootMachine {
                    machine,
                    runtime,
                    shape,
                } => self.boot(machine, runtime, shape),
                Action::AssignMachine { machine, .. } => self.report_machine(machine),
                Action::CreateContainer {
                    machine,
                    container,
                    request,
                    source,
                } => {
                    self.create(machine, container, request, source);
                }
                Action::Dispatch {
                    machine,
                    container,
                    request,
                } => self.dispatch(machine, container, request),
                Action::StopContainer {
                    machine,
                    container,
                    reason,
                } => {
                    let Some(record) = self.containers.get_mut(&container) else {
                        continue;
                    };
                    record.state = v1::container::State::Stopping;
                    record.stopped = Some(reason);
                    let id = record.id;
                    if let Some(handle) = self.handle(machine) {
                        self.spawn(|_, inbox| executors::stop(handle, container, id, inbox));
                    }
                }
                Action::DestroyMachine { machine, reason } => {
                    if let Some(record) = self.machines.get(&machine) {
                        record.stopper.stop(match reason {
                            DestroyReason::Room => Stop::Now(reason.words()),
                            _ => Stop::Gently(reason.words()),
                        });
                    }
                    self.report_machine(machine);
                }
                Action::Finish { request, finish } => self.finish(request, finish),
            }
        }
    }

    fn boot(&mut self, machine: MachineId, runtime: Arc<str>, shape: Shape) {
        let (stopper, stopped) = Stopper::new();
        let record = MachineRecord::new(runtime.clone(), shape, stopper);
        let id = record.id;
        tracing::info!(machine = %id, runtime = %record.runtime, ?shape, "booting a machine");
        self.machines.insert(machine, record);
        self.spawn(|shared, inbox| executors::live(shared, machine, id, shape, runtime, stopped, inbox));
    }

    fn create(&mut self, machine: MachineId, container: ContainerId, id: RequestId, source: Source) {
        let (Some(handle), Some(record)) = (self.handle(machine), self.machines.get(&machine)) else {
            return;
        };
        let Some(request) = self.requests.get_mut(&id) else {
            return;
        };
        let function = &request.call.function;
        let made = ContainerRecord {
            id: Ulid::generate(),
            machine,
            machine_name: record.name(),
            function: function.name.to_string(),
            version: function.version,
            amount: request.call.amount,
            state: v1::container::State::Starting,
            create_time: SystemTime::now(),
            invocations: 0,
            usage: None,
            stopped: None,
            ended: None,
        };
        let asked = proto::CreateContainerRequest {
            id: made.id.to_string(),
            function_name: made.function.clone(),
            function_version: made.version,
            runtime: function.runtime.clone(),
            handler: function.handler.clone(),
            environment: function.environment.clone().into_iter().collect(),
            amount: Some(made.amount.into()),
            code_sha256: function.code_sha256.clone(),
            account: function.name.account().to_owned(),
            init_timeout: self.shared.init_timeout.try_into().ok(),
            timeout: function.timeout.try_into().ok(),
        };
        request.place(made.machine_name.clone(), made.name(), source);
        self.container_ids.insert(asked.id.clone(), container);
        self.containers.insert(container, made);
        self.serving.insert(container, id);
        self.spawn(|shared, inbox| executors::create(shared, handle, container, asked, inbox));
    }

    fn dispatch(&mut self, machine: MachineId, container: ContainerId, id: RequestId) {
        let Some(handle) = self.handle(machine) else { return };
        let Some(request) = self.requests.get_mut(&id) else {
            return;
        };
        let Some(record) = self.containers.get_mut(&container) else {
            return;
        };
        // One for which the container was made was placed then.
        if self.serving.insert(container, id) != Some(id) {
            request.place(record.machine_name.clone(), record.name(), Source::IdleContainer);
        }
        record.state = v1::container::State::Busy;
        let timeout = request.call.function.timeout;
        let asked = proto::InvokeRequest {
            container: record.id.to_string(),
            request_id: request.call.request_id.clone(),
            payload: request.call.payload.clone(),
            timeout: timeout.try_into().ok(),
        };
        self.spawn(|_, inbox| executors::invoke(handle, container, asked, timeout, inbox));
    }

    fn finish(&mut self, id: RequestId, finish: Finish) {
        let Some(request) = self.requests.remove(&id) else {
            return;
        };
        let answer = match finish {
            Finish::Settled => request.settled.unwrap_or_else(|| {
                // The policy settles a request only after its executor reported.
                Err(InvokeError::MachineLost {
                    detail: "its answer was lost".into(),
                })
            }),
            Finish::Refused(refusal) => {
                let runtime = request.call.function.runtime.as_str();
                let boot = self.boot_failures.get(runtime).cloned();

                Err(match refusal {
                    Refusal::QueueFull => InvokeError::QueueFull {
                        queue: u32::try_from(self.policy.queue_len()).unwrap_or(u32::MAX),
                        boot,
                    },
                    Refusal::QueueTimeout => InvokeError::QueueTimeout {
                        waited: request.arrived.elapsed(),
                        boot,
                    },
                    Refusal::TooLarge { largest } => InvokeError::TooLarge {
                        asked: request.call.amount,
                        largest,
                    },
                    Refusal::BootFailing => InvokeError::BootFailing {
                        runtime: runtime.to_owned(),
                        detail: boot.unwrap_or_else(|| "its guest ended at once".into()),
                    },
                    Refusal::MachineLost => request.trouble.unwrap_or_else(|| InvokeError::MachineLost {
                        detail: "it had to be ended".into(),
                    }),
                    Refusal::FunctionDeleted => InvokeError::FunctionDeleted,
                    Refusal::Draining => InvokeError::Draining,
                    Refusal::Cancelled => InvokeError::Cancelled,
                })
            }
        };
        // The caller may have left.
        let _ = request.reply.send(answer);
    }

    fn report_machine(&self, id: MachineId) {
        if let Some(record) = self.machines.get(&id) {
            self.recorder.machine(record.proto(self.policy.machine(id)));
        }
    }

    fn handle(&self, machine: MachineId) -> Option<Handle> {
        let record = self.machines.get(&machine)?;
        Some(Handle {
            guest: record.guest.clone()?,
            stopper: record.stopper.clone(),
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
