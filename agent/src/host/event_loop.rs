//! The loop: what is heard becomes an event, the event decisions, each decision goes to who carries it out.
//!
//! What machines, containers and requests there are is known to the world alone; here are only handles by their ids.

mod carry_out;
mod credits;
mod launched;
mod observe;
mod pressure;
mod resizing;
mod take_over;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use stoker_ebpf::CgroupId;
use stoker_policy::{AccountUse, Amount, Code, ContainerId, Event, IdMap, MachineId, NoticeKind, Now, RequestId};
use stoker_proto::v1;
use tokio::sync::{Notify, mpsc, oneshot};

use self::launched::{LaunchEnd, LaunchHandle, LaunchedBefore, Launching};
use super::answers::Ticket;
use super::call::Told;
use super::container::{self, Costs, Handle, Shared};
use super::counts::Counts;
use super::error::{CreditsError, InvokeError};
use super::guest_credits;
use super::journal::{Journal, Recording};
use super::listing;
use super::message::{Executed, Message, Pulse, Started};
use super::recorder::Recorder;
use super::rules::BOOT_FAILURES;
use super::survey::{Known, Sums, Survey, Used};
use crate::catalog::Function;
use crate::function_logs::{Source, Sources, Whose};
use crate::machines::{ContainerRecord, Guest, Record, Stop, Stopper};
use crate::names::FunctionName;

/// Why a machine is ended that the agent has lost track of.
const PANICKED: &str = "the agent's task for it panicked";

/// How long failed boots say that machines don't boot, where none is tried since; longer than the longest pause between two
/// and the longest that one takes.
const BOOTS_MATTER: Duration = Duration::from_secs(15 * 60);

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
    /// Machines of an earlier agent whose guests have not answered this one yet, as they were found.
    found: BTreeMap<MachineId, Record>,
    /// Requests whose callers gave their ids, which an earlier agent had placed in machines.
    left: BTreeMap<MachineId, Vec<Ticket>>,
    /// The last machines that have ended, as the API shows them.
    ended: VecDeque<v1::Machine>,
    /// What machines used that have ended since the agent's start.
    used: Used,
    /// Sums of the accounts of credits of machines that have ended likewise.
    closed: Sums,
    counts: Arc<Counts>,
    /// By runtime, until a boot succeeds.
    boot_failures: HashMap<Arc<str>, BootFailures>,
    drained: Vec<oneshot::Sender<()>>,
    /// Machines that were launched, by their accounts and the ids that these gave to their requests; as long as they are remembered.
    launches: HashMap<(Arc<str>, String), LaunchedBefore>,
    /// What is launched, until it is decided.
    launching: Option<Launching>,
    /// What is remembered of machines that were launched and have ended.
    launch_ends: IdMap<MachineId, LaunchEnd>,
    /// Who asked for a change of an account, until it is done.
    changed: Option<oneshot::Sender<Result<(), CreditsError>>>,
    /// What a version of a function is given from now on by what is being decided.
    resized: Option<(Code, Amount)>,
    /// What a user was told of an execution.
    notified: Option<v1::Notification>,
    /// What was told last of amounts that requests of a function named, and when.
    own_told: HashMap<Code, OwnTold>,
    /// Told of machines that were taken over: their balloons may have something.
    balloons: mpsc::Sender<()>,
    /// Those of which no balloon was looked at yet.
    unlooked: BTreeSet<MachineId>,
    /// When the balance fell to another level of which the loop is hearing, in ns of `CLOCK_MONOTONIC`.
    fell_ns: Option<u64>,
}

/// What was told of an amount that a request named.
#[derive(Debug)]
struct OwnTold {
    amount: Amount,
    kind: NoticeKind,
    at: Instant,
}

/// Boots of a runtime that failed one after the other.
#[derive(Debug)]
struct BootFailures {
    count: u32,
    /// The last one.
    at: Instant,
    why: String,
}

/// What reaches a machine.
#[derive(Debug)]
pub(super) struct MachineHandle {
    stopper: Stopper,
    /// What else there is of one that was launched.
    pub(super) launched: Option<Box<LaunchHandle>>,
    /// The `cpu.weight` that was decided before it was spawned.
    weight: Option<u32>,
    /// Once it was spawned.
    pub(super) started: Option<Started>,
    /// Once it was ready.
    guest: Option<Guest>,
    /// Whose its containers are.
    sources: Sources,
    /// What its account goes by is another, or it was given something.
    credits_changed: Arc<Notify>,
    pub(super) boot_duration: Option<Duration>,
}

/// What a container is called by, and why it ends.
#[derive(Debug)]
pub(super) struct ContainerHandle {
    machine: MachineId,
    pub(super) function: FunctionName,
    /// Why it ended, where its guest said so before whoever uses it did; or why it is stopped.
    end_detail: Option<String>,
}

/// Who waits for a request.
#[derive(Debug)]
struct CallHandle {
    function: Arc<Function>,
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
    /// The machines that an earlier agent left.
    pub(super) found: BTreeMap<MachineId, Record>,
    pub(super) left: BTreeMap<MachineId, Vec<Ticket>>,
    /// The machines that are gone.
    pub(super) ended: Vec<v1::Machine>,
    pub(super) counts: Arc<Counts>,
    /// Told where balloons may have something that the last agent had asked for.
    pub(super) balloons: mpsc::Sender<()>,
}

// === impl MachineHandle ===

impl MachineHandle {
    fn new(stopper: Stopper) -> Self {
        Self {
            stopper,
            launched: None,
            weight: None,
            started: None,
            guest: None,
            sources: Sources::default(),
            credits_changed: Arc::default(),
            boot_duration: None,
        }
    }
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
            found: parts.found,
            left: parts.left,
            ended: parts.ended.into(),
            used: Used::default(),
            closed: Sums::default(),
            counts: parts.counts,
            boot_failures: HashMap::new(),
            drained: Vec::new(),
            launches: HashMap::new(),
            launching: None,
            launch_ends: IdMap::default(),
            changed: None,
            resized: None,
            notified: None,
            own_told: HashMap::new(),
            balloons: parts.balloons,
            unlooked: BTreeSet::new(),
            fell_ns: None,
        }
    }

    pub(super) async fn run(mut self, mut inbox: mpsc::Receiver<Message>) {
        self.take_over();
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
                undecided,
                tell,
            } => {
                // Looked up before the function was deleted, which was heard of first. The caller may have left.
                if function.is_deleted() {
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
                drop(undecided);
            }
            // It is decided at once whether there is room for one: nothing is kept for later.
            Message::Prepare { function, kind } => {
                if function.is_deleted() {
                    return;
                }
                let (account, runtime) = (function.name.account().into(), function.runtime.as_str().into());
                self.step(Event::Prepare { account, runtime, kind });
            }
            Message::CallerLeft { request } => self.step(Event::CallerLeft { request }),
            Message::Completed {
                container,
                request,
                completion,
                detail,
                again,
                executed,
            } => {
                if let Some(Executed { sample, notified }) = executed {
                    // A caller that has left hears nothing.
                    let _ = notified.send(self.executed(container, sample));
                }
                self.completed(container, request, completion, detail, again);
            }
            Message::FunctionDeleted { uid } => self.step(Event::FunctionDeleted { uid }),
            Message::Machine { machine, report } => self.machine_reports(machine, report),
            Message::ContainerMade { container, made } => self.container_made(container, made),
            Message::ContainerStopped { container } => self.container_ended(container, "it was stopped".into()),
            Message::Said {
                machine,
                said,
                counted,
                taken,
            } => {
                if let Some(counted) = counted {
                    self.measured(machine, &counted, said.machine);
                }
                self.guest_said(machine, said);
                // One whose machine has ended listens no longer.
                let _ = taken.send(());
            }
            // A caller that has left has no use for an answer.
            Message::Machines { include_ended, reply } => drop(reply.send(self.list_machines(include_ended))),
            Message::Containers { reply } => drop(reply.send(self.list_containers())),
            Message::Settled { machine, account, held } => self.credits_settled(machine, account, held),
            Message::Credits { reply } => drop(reply.send(self.list_accounts())),
            Message::ChangeCredits {
                machine,
                change,
                by,
                reply,
            } => self.change_credits(machine, change, by, reply),
            Message::SetLimits {
                account,
                limits,
                by,
                reply,
            } => {
                let limits = Box::new(limits);
                self.step(Event::LimitsAsked { account, limits, by });
                let _ = reply.send(());
            }
            Message::AccountUse { account, reply } => drop(reply.send(self.account_use(account))),
            Message::Launched(order) => self.hear_order(order),
            Message::Balloons { reply } => drop(reply.send(self.balloons())),
            Message::HostMemory {
                memory,
                balloons,
                reply,
            } => drop(reply.send(self.host_memory(memory, balloons))),
            Message::Decisions(question) => self.journal.ask(question),
            Message::Pulse { reply } => drop(reply.send(self.pulse())),
            Message::Survey { reply } => drop(reply.send(self.survey())),
            Message::Leave { reply } => {
                self.journal.flush();
                self.journal.settle(self.recorder.clone(), reply);
            }
            Message::Drain { reply } => {
                self.drained.push(reply);
                self.step(Event::Drain);
            }
            Message::DrainExpired { reply } => {
                self.drained.push(reply);
                self.step(Event::DrainExpired);
                // Programs that were given longer have no more time either.
                for handle in self.machines.values().filter(|handle| handle.launched.is_some()) {
                    handle.stopper.stop(Stop::Now("the agent is ending".into()));
                }
            }
            #[cfg(test)]
            Message::Panic => panic!("as the test wants it"),
        }
    }

    fn pulse(&self) -> Pulse {
        let world = self.host.world();
        let fails = |boots: &BootFailures| boots.count >= BOOT_FAILURES && boots.at.elapsed() < BOOTS_MATTER;
        Pulse {
            machines: world.machines().count(),
            containers: world.containers().count(),
            boots_fail: self.boot_failures.values().any(fails),
        }
    }

    fn survey(&self) -> Known {
        let started = self.machines.values().filter_map(|handle| handle.started.as_ref());
        Known {
            survey: Survey::of(self.host.world()),
            counted: started.filter_map(|started| started.cgroup_id).collect(),
            ended: self.used,
            accounted: self.open_accounts().collect(),
            closed: self.closed,
        }
    }

    fn account_use(&self, account: Option<Arc<str>>) -> BTreeMap<Arc<str>, AccountUse> {
        let world = self.host.world();
        match account {
            Some(account) => {
                let used = world.account_use(&account);
                [(account, used)].into()
            }
            None => world.accounts().map(|(name, used)| (name.clone(), used)).collect(),
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
        self.resized = None;
        for decision in decisions {
            tracing::debug!(command = ?decision.command, reason = ?decision.reason, "decided");
            self.carry_out(&decision);
            self.journal.push(now.wall, decision);
        }
    }

    fn report_machine(&self, id: MachineId) {
        let Some(machine) = self.host.world().machine(id) else {
            return;
        };
        let handle = self.machines.get(&id);
        let mut machine = listing::machine(machine, handle);
        let launched = handle.and_then(|handle| handle.launched.as_deref());
        if let (Some(kept), Some(launched)) = (&mut machine.launched, launched) {
            kept.request_sha256 = launched.request_sha256();
        }
        self.recorder.machine(machine);
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
        if let Some(handle) = self.containers.remove(&id) {
            self.note(handle.machine, |record| drop(record.containers.remove(&id)));
            self.log_ends(handle.machine, id);
        }
        tracing::debug!(container = end.name, detail = end.end_detail, "container ended");
        self.recorder.container(end);
    }

    /// Changes what the next agent will know of a machine, as soon as that is saved.
    fn note(&self, machine: MachineId, change: impl FnOnce(&mut Record)) {
        if let Some(started) = self.machines.get(&machine).and_then(|handle| handle.started.as_ref()) {
            started.record.change(change);
        }
    }

    /// Keeps what a new container writes: with the first of a machine it begins to follow its guest, and tells that of its credits.
    fn keep_log(&self, machine: MachineId, container: ContainerId, record: &ContainerRecord) {
        let (Some(there), Some(handle)) = (self.machines.get(&machine), self.handle(machine)) else {
            return;
        };
        let source = Source {
            whose: Whose::Function(record.function.clone()),
            uid: record.kind.code.uid,
            created: record.created,
        };
        if there.sources.add(container, source) {
            let sources = there.sources.clone();
            self.spawn_on(handle, |handle, shared, _| {
                container::follow_logs(handle, sources, shared)
            });
            self.tell_credits(machine);
        }
    }

    /// Tells a guest of its machine's credits from now on.
    fn tell_credits(&self, machine: MachineId) {
        let Some(there) = self.machines.get(&machine) else {
            return;
        };
        if let (Some(started), Some(handle)) = (&there.started, self.handle(machine)) {
            let (cpu, changed) = (started.cpu.subscribe(), there.credits_changed.clone());
            self.spawn_on(handle, |handle, shared, _| {
                guest_credits::follow(handle, machine, cpu, changed, shared)
            });
        }
    }

    /// A container is no more; its last lines may still come.
    fn log_ends(&self, machine: MachineId, container: ContainerId) {
        if let Some(there) = self.machines.get(&machine) {
            there.sources.ended(container);
        }
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

    /// The same for what works on a machine. Where it panics, nobody knows what is in the machine any more, which is ended.
    fn spawn_on<F: Future<Output = ()> + Send + 'static>(
        &self,
        handle: Handle,
        executor: impl FnOnce(Handle, Arc<Shared>, mpsc::Sender<Message>) -> F,
    ) {
        let stopper = handle.stopper.clone();
        self.spawn(|shared, inbox| {
            let working = tokio::spawn(executor(handle, shared, inbox));
            async move {
                if working.await.is_err() {
                    stopper.stop(Stop::Broken(PANICKED.into()));
                }
            }
        });
    }
}
