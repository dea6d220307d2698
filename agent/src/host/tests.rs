//! The loop and all that it works with, with machines whose guest is this process: no VM is needed.

mod accounts;
mod counts;
mod credits;
mod launched;
mod resizing;
mod service;
mod stream;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use stoker_credits::{Account, Terms};
use stoker_ebpf::CgroupId;
use stoker_policy::{ContainerId, Kind, MachineId, Shape};
use stoker_proto::guest as proto;
use stoker_proto::guest::guest_server::Guest as GuestService;
use stoker_proto::limits::{STDIN_WINDOW_BYTES, STDIN_WINDOW_KEY};
use stoker_proto::v1;
use stoker_proto::v1::invoke_with_response_stream_response::Event;
use stoker_proto::v1::placement::Source;
use stoker_vmm::control::ClientError;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use ulid::Ulid;

use super::*;
use crate::catalog::{Catalog, FunctionSpec, ResizingDefaults};
use crate::config::Limits;
use crate::fake_guest;
use crate::function_logs::Filter;
use crate::machines::{ContainerRecord, Guest, GuestError, Record, RecordFile, ScratchDrive, Spec, Stop, Stopped};
use crate::owner::Owner;
use crate::store::{FunctionRecord, Layer, StoredDecision};
use crate::telemetry::credits::{Change, Standing};

/// Generous: others use the machine too.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// Of a function that was deleted while no agent ran.
const DELETED: Ulid = Ulid(7);

/// Machines whose guest is this process.
#[derive(Clone, Debug, Default)]
pub(super) struct InProcess {
    /// What guests do and did, of all machines.
    script: Arc<Mutex<Script>>,
    /// Containers are made, and requests run, while it is not held.
    held: Arc<watch::Sender<bool>>,
    /// Accounts of credits, and what machines may use by them.
    ledger: Arc<credits::Accounts>,
    /// Ends every machine there is.
    kill: Arc<watch::Sender<u32>>,
    /// What an earlier agent left.
    left: Arc<BTreeMap<MachineId, Record>>,
    /// Machines that run an image.
    images: launched::Images,
    /// It is one of those, and in it is what its script says.
    was_left: bool,
    /// The functions that were looked for, or that there are.
    functions: Arc<Mutex<HashMap<Ulid, Arc<Function>>>>,
}

#[derive(Debug, Default)]
struct Script {
    /// How many requests are to be refused; their containers end.
    refuse: u32,
    /// How often code is to be gone when a container is made.
    evict: u32,
    /// Each container writes a line.
    talks: bool,
    /// What else guests say that containers have written.
    written: Vec<proto::LogLines>,
    /// Init fails.
    init_fails: bool,
    /// How many machines are to end before their guests have answered.
    fail_to_boot: u32,
    /// How many machines' tasks are to panic once their guests have answered.
    panics: u32,
    /// The machines that were cleared away because of that.
    cleared: Vec<MachineId>,
    /// Machines' records can't be written any more.
    unrecorded: bool,
    /// How large drives were to be made, in MiB, in the order in which that was asked for.
    drives: Vec<u32>,
    /// How often that is to fail.
    refuse_drives: u32,
    codes_brought: u32,
    /// The last container that was asked for.
    asked: Option<proto::CreateContainerRequest>,
    containers: HashSet<String>,
    /// Containers that run an invocation of a name as an agent comes.
    running: Vec<proto::InvocationState>,
    stopped: Vec<String>,
    begun: u32,
    streaming: stream::Script,
    /// What invocations use, in turn; the last goes on. Nothing is told where there is none.
    executions: Vec<resizing::Execution>,
    /// What guests were told of their machines' credits.
    credits: Vec<proto::Credits>,
}

/// What a guest says that a container has written.
fn line(container: &str, text: &str) -> proto::LogLines {
    proto::LogLines {
        container: container.to_owned(),
        request_id: "r-1".to_owned(),
        text: text.to_owned(),
        ..Default::default()
    }
}

impl InProcess {
    fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap()
    }

    /// A function of this id: one that a test made, or any.
    fn find(&self, uid: Ulid) -> Option<Arc<Function>> {
        let any = || Arc::new(Function::from(FunctionRecord { uid, ..function() }));
        let mut functions = self.functions.lock().unwrap();
        (uid != DELETED).then(|| functions.entry(uid).or_insert_with(any).clone())
    }

    async fn free(&self) {
        self.held.subscribe().wait_for(|held| !held).await.unwrap();
    }

    async fn run(&self, request: proto::InvokeRequest) -> proto::InvokeResponse {
        let answer = proto::InvokeResponse {
            call: request.call,
            ..Default::default()
        };
        if request.attach {
            assert!(self.script().running.iter().any(|state| state.name == request.name));
            self.free().await;
            return answer;
        }
        {
            let mut script = self.script();
            if script.refuse > 0 {
                script.refuse -= 1;
                script.containers.remove(&request.container);
                return proto::InvokeResponse {
                    not_begun: "it has ended".into(),
                    ..answer
                };
            }
            assert!(script.containers.contains(&request.container));
            script.begun += 1;
        }
        self.free().await;
        let answer = proto::InvokeResponse {
            payload: request.payload,
            partial: self.script().streaming.partial,
            ..answer
        };
        self.used(&request.container, answer)
    }

    /// A drive that holds so much, and is made larger as long as that is not to fail.
    fn drive(&self, mib: u32) -> ScratchDrive {
        let script = self.script.clone();
        ScratchDrive::new(mib, move |mib| {
            let mut script = script.lock().unwrap();
            script.drives.push(mib);
            match script.refuse_drives.checked_sub(1) {
                Some(left) => {
                    script.refuse_drives = left;
                    Err(ClientError::Refused("as the test wants it".into()))
                }
                None => Ok(()),
            }
        })
    }

    async fn walk(
        self,
        id: Ulid,
        record: Record,
        terms: Option<Terms>,
        mut stopped: Stopped,
        reports: Reports,
    ) -> Ended {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let hang_up = CancellationToken::new();
        tokio::spawn(fake_guest::serve(
            self.clone(),
            theirs,
            hang_up.clone().cancelled_owned(),
        ));
        let folder = tempfile::tempdir().unwrap();
        let file = RecordFile::create(folder.path(), record.clone()).unwrap();
        self.images.found(id, &file);
        let started = Started {
            pid: 1,
            cgroup: String::new(),
            cgroup_id: record.launched.is_some().then(|| CgroupId::from(1)),
            account: terms.map(|terms| self.ledger.open(MachineId(id), terms)),
            cpu: self.ledger.cpu(MachineId(id)),
            cpu_weight: watch::channel(None).0,
            drive: self.drive(record.shape.drive_mib),
            resizer: self.images.resizer(id, folder.path(), &file),
            record: file,
        };
        if self.script().unrecorded {
            folder.close().unwrap();
        }
        let mut kill = self.kill.subscribe();
        reports.started(started).await;
        let left = self.script().fail_to_boot.checked_sub(1);
        if left.is_some() || self.images.has_gone() {
            self.script().fail_to_boot = left.unwrap_or(0);
            let end = v1::MachineEnd {
                reason: v1::machine_end::Reason::VmmError.into(),
                detail: "as the test wants it".into(),
                ..Default::default()
            };
            return Ended {
                end,
                usage: None,
                credits: None,
                leftovers: None,
            };
        }
        let (guest, hello, _hung_up) = Guest::over(ours, &record.runtime).await.unwrap();
        reports
            .ready(Answered::new(guest.clone(), Duration::from_millis(1), &hello))
            .await;
        let left = self.script().panics.checked_sub(1);
        if let Some(left) = left {
            self.script().panics = left;
            panic!("as the test wants it");
        }
        let mut exit_status = None;
        let (reason, detail) = tokio::select! {
            stop = stopped.stop() => match end_program(&guest, stop, &mut stopped).await {
                Stop::Gently(why) | Stop::Now(why) | Stop::AfterProgram { why, .. } => {
                    (v1::machine_end::Reason::Stopped, why)
                }
                Stop::Broken(why) => (v1::machine_end::Reason::GuestHung, why),
                Stop::ProgramEnded { detail, exit_status: status } => {
                    exit_status = status;
                    (v1::machine_end::Reason::ProgramEnded, detail)
                }
                Stop::ProgramFailed(why) => (v1::machine_end::Reason::ProgramFailed, why),
            },
            _ = kill.changed() => (v1::machine_end::Reason::Killed, "killed by the test".to_owned()),
        };
        hang_up.cancel();
        let end = v1::MachineEnd {
            reason: reason.into(),
            detail,
            exit_status,
            ..Default::default()
        };
        Ended {
            end,
            usage: None,
            credits: None,
            leftovers: None,
        }
    }
}

/// Ends the program of an image where it is to end first. What the machine is told then: it may have been left less time meanwhile.
async fn end_program(guest: &Guest, mut stop: Stop, stopped: &mut Stopped) -> Stop {
    while let Stop::AfterProgram { signal, grace, .. } = stop {
        tokio::select! {
            biased;
            sooner = stopped.next() => stop = sooner,
            ended = guest.stop_image(signal, grace) => {
                ended.unwrap();
                break;
            }
        }
    }
    stop
}

impl Launcher for InProcess {
    fn found(&self) -> BTreeMap<MachineId, Record> {
        (*self.left).clone()
    }

    fn take_over(&self, machine: MachineId, terms: Option<Terms>, stopped: Stopped, reports: Reports) -> Life {
        let record = self.left[&machine].clone();
        if record.boot_duration.is_none() {
            return Box::pin(std::future::pending());
        }
        let was_left = Self {
            was_left: record.account.is_some(),
            ..self.clone()
        };
        Box::pin(was_left.walk(machine.0, record, terms, stopped, reports))
    }

    fn live(&self, spec: Spec, stopped: Stopped, reports: Reports) -> Life {
        let mut record = record(spec.runtime, spec.shape);
        if let Some(launched) = spec.launched {
            record.ceiling = spec.ceiling;
            record.size = Some(launched.record.launch.size);
            record.account = Some(launched.account);
            record.launched = Some(Box::new(launched.record));
        }
        Box::pin(self.clone().walk(spec.id, record, spec.terms, stopped, reports))
    }

    fn clear_away(&self, machine: MachineId, why: String) -> Life {
        self.script().cleared.push(machine);
        let end = v1::MachineEnd {
            reason: v1::machine_end::Reason::Killed.into(),
            detail: why,
            ..Default::default()
        };
        let ended = Ended {
            end,
            usage: None,
            credits: None,
            leftovers: None,
        };
        Box::pin(std::future::ready(ended))
    }

    fn usage(&self) -> HashMap<CgroupId, v1::Usage> {
        HashMap::new()
    }

    fn vcpu_time(&self, _: CgroupId) -> Option<stoker_ebpf::Time> {
        Some(self.images.vcpu_time())
    }

    fn change_account(&self, machine: MachineId, change: Change) -> Option<Account> {
        self.ledger.change(machine, change)
    }

    fn accounts(&self) -> HashMap<MachineId, Standing> {
        self.ledger.all()
    }

    fn account(&self, machine: MachineId) -> Option<Standing> {
        self.ledger.all().remove(&machine)
    }

    fn save_accounts(&self) {
        self.ledger.save();
    }

    fn account_of_gone(&self, _: MachineId) -> Option<Standing> {
        None
    }

    fn crossed(&self) -> Crossed {
        let ledger = self.ledger.clone();
        Box::pin(async move { ledger.crossed().await })
    }
}

fn record(runtime: Arc<str>, shape: Shape) -> Record {
    Record {
        owner: Owner {
            host: Ulid(1),
            store: "/store".into(),
        },
        cgroup: "machines/m".into(),
        runtime,
        shape,
        ceiling: None,
        size: None,
        created: Duration::from_secs(1),
        boot_duration: Some(Duration::from_millis(500)),
        mode: None,
        account: None,
        containers: BTreeMap::new(),
        launched: None,
    }
}

/// A function as the catalogue knows it.
pub(super) fn function() -> FunctionRecord {
    FunctionRecord {
        name: "accounts/a/functions/f".parse().unwrap(),
        uid: Ulid::generate(),
        runtime: "provided".into(),
        handler: String::new(),
        environment: Default::default(),
        timeout: Duration::from_secs(30),
        amount: v1::Amount {
            cpu_millis: 250,
            memory_mib: 128,
        },
        version: 1,
        code_sha256: "00".into(),
        code_size: 1,
        layers: Vec::new(),
        unpacked_bytes: Some(0),
        freeze: true,
        ephemeral_storage_mib: 512,
        create_time: SystemTime::now(),
        resizing: None,
        kept: None,
    }
}

#[tonic::async_trait]
impl GuestService for InProcess {
    type InvokeStream = ReceiverStream<Result<proto::InvokeResponse, Status>>;
    type WatchStream = Pin<Box<dyn Stream<Item = Result<proto::WatchResponse, Status>> + Send>>;

    async fn hello(&self, _: Request<proto::HelloRequest>) -> Result<Response<proto::HelloResponse>, Status> {
        let script = self.script();
        let mut hello = proto::HelloResponse::default();
        if self.was_left {
            hello.containers.extend(script.containers.iter().cloned());
            hello.invocations.clone_from(&script.running);
            hello.image_container = self.images.container();
        }
        Ok(Response::new(hello))
    }

    async fn put_code(
        &self,
        request: Request<Streaming<proto::PutCodeRequest>>,
    ) -> Result<Response<proto::PutCodeResponse>, Status> {
        let response = fake_guest::put_code(request).await?;
        self.script().codes_brought += 1;
        Ok(response)
    }

    async fn create_container(
        &self,
        request: Request<proto::CreateContainerRequest>,
    ) -> Result<Response<proto::CreateContainerResponse>, Status> {
        let request = request.into_inner();
        let id = request.id.clone();
        {
            let mut script = self.script();
            script.asked = Some(request);
            if script.evict > 0 {
                script.evict -= 1;
                return Err(Status::failed_precondition("the code is not there"));
            }
            script.containers.insert(id);
        }
        self.free().await;
        let error = self.script().init_fails.then(|| proto::FunctionError {
            kind: proto::function_error::Kind::Exited.into(),
            r#type: "Runtime.ExitError".into(),
            message: "it exited".into(),
        });
        Ok(Response::new(proto::CreateContainerResponse {
            error,
            ..Default::default()
        }))
    }

    async fn invoke(
        &self,
        requests: Request<Streaming<proto::InvokeRequest>>,
    ) -> Result<Response<Self::InvokeStream>, Status> {
        let (to, answers) = mpsc::channel(1);
        let guest = self.clone();
        let mut requests = requests.into_inner();
        tokio::spawn(async move {
            while let Ok(Some(request)) = requests.message().await {
                if request.grant_bytes > 0 {
                    guest.grant(&request);
                    continue;
                }
                let (guest, to) = (guest.clone(), to.clone());
                tokio::spawn(async move {
                    if request.stream {
                        guest.stream(&request, &to).await;
                    }
                    to.send(Ok(guest.run(request).await)).await
                });
            }
        });
        Ok(Response::new(ReceiverStream::new(answers)))
    }

    async fn stop_container(
        &self,
        request: Request<proto::StopContainerRequest>,
    ) -> Result<Response<proto::StopContainerResponse>, Status> {
        let id = request.into_inner().id;
        let mut script = self.script();
        script.containers.remove(&id);
        script.stopped.push(id);
        drop(script);
        Ok(Response::new(proto::StopContainerResponse {}))
    }

    async fn run_image(
        &self,
        request: Request<proto::RunImageRequest>,
    ) -> Result<Response<proto::RunImageResponse>, Status> {
        self.images.begin(request.into_inner())?;
        self.free().await;
        self.images.begun().map(Response::new)
    }

    async fn stop_image(
        &self,
        request: Request<proto::StopImageRequest>,
    ) -> Result<Response<proto::StopImageResponse>, Status> {
        self.images.stop(request.into_inner());
        self.free().await;
        Ok(Response::new(proto::StopImageResponse {}))
    }

    type ExecStream = Pin<Box<dyn Stream<Item = Result<v1::ExecResponse, Status>> + Send>>;

    /// What it is given comes back, as of `cat`.
    async fn exec(&self, requests: Request<Streaming<v1::ExecRequest>>) -> Result<Response<Self::ExecStream>, Status> {
        let answers: Self::ExecStream = Box::pin(requests.into_inner().map(launched::echo));
        let mut response = Response::new(answers);
        if self.images.grants() {
            let headers = response.metadata_mut();
            headers.insert(STDIN_WINDOW_KEY, STDIN_WINDOW_BYTES.into());
        }
        Ok(response)
    }

    type ForwardPortStream = Pin<Box<dyn Stream<Item = Result<v1::ForwardPortResponse, Status>> + Send>>;

    /// What is sent comes back; nobody listens on port 1.
    async fn forward_port(
        &self,
        requests: Request<Streaming<v1::ForwardPortRequest>>,
    ) -> Result<Response<Self::ForwardPortStream>, Status> {
        use v1::forward_port_request::Part;
        let mut requests = requests.into_inner();
        let first = requests.message().await?.and_then(|first| first.part);
        if matches!(first, Some(Part::Start(start)) if start.port == 1) {
            return Err(Status::unavailable("nobody listens on port 1"));
        }
        let answers = requests.filter_map(|request| match request.map(|request| request.part) {
            Ok(Some(Part::Data(data))) => Some(Ok(v1::ForwardPortResponse { data })),
            Ok(_) => None,
            Err(status) => Some(Err(status)),
        });
        Ok(Response::new(Box::pin(answers)))
    }

    type FollowLogsStream = Pin<Box<dyn Stream<Item = Result<proto::FollowLogsResponse, Status>> + Send>>;

    async fn follow_logs(
        &self,
        _: Request<proto::FollowLogsRequest>,
    ) -> Result<Response<Self::FollowLogsStream>, Status> {
        let (to, batches) = mpsc::channel(1);
        let script = self.script.clone();
        tokio::spawn(async move {
            loop {
                let lines: Vec<_> = {
                    let mut script = script.lock().unwrap();
                    let written = std::mem::take(&mut script.written);
                    let containers = script.containers.iter().filter(|_| script.talks);
                    let hello = containers.map(|id| line(id, "hello"));
                    written.into_iter().chain(hello).collect()
                };
                if !lines.is_empty() {
                    let foreign = line(&Ulid::generate().to_string(), "another's");
                    let lines = [vec![foreign], lines].concat();
                    let _ = to.send(Ok(proto::FollowLogsResponse { lines })).await;
                    return to.closed().await;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(batches))))
    }

    type FollowCreditsStream = ReceiverStream<Result<proto::AskCredits, Status>>;

    async fn follow_credits(
        &self,
        told: Request<Streaming<proto::Credits>>,
    ) -> Result<Response<Self::FollowCreditsStream>, Status> {
        let (to, questions) = mpsc::channel(1);
        let (script, mut told) = (self.script.clone(), told.into_inner());
        tokio::spawn(async move {
            while let Ok(Some(credits)) = told.message().await {
                let first = {
                    let mut script = script.lock().unwrap();
                    script.credits.push(credits);
                    script.credits.len() == 1
                };
                if first {
                    let _ = to.send(Ok(proto::AskCredits { question: 7 })).await;
                }
            }
            drop(to);
        });
        Ok(Response::new(ReceiverStream::new(questions)))
    }

    async fn watch(&self, _: Request<proto::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let containers = self.script().containers.clone();
        let used = containers.into_iter().map(|id| proto::ContainerUse {
            id,
            usage: Some(v1::Usage {
                cpu_ns: 7,
                ..Default::default()
            }),
        });
        let said = proto::WatchResponse {
            containers: used.collect(),
            ended: Vec::new(),
            machine: None,
        };
        let stream = tokio_stream::once(Ok(said)).chain(self.images.say());
        Ok(Response::new(Box::pin(stream)))
    }

    async fn power_off(&self, _: Request<proto::PowerOffRequest>) -> Result<Response<proto::PowerOffResponse>, Status> {
        Ok(Response::new(proto::PowerOffResponse {}))
    }
}

/// A host with one function.
pub(super) struct Fixture {
    guests: InProcess,
    pub(super) host: HostHandle,
    pub(super) function: Arc<Function>,
}

impl Fixture {
    async fn start(dir: &Path) -> Self {
        Self::with(dir, |_| {}).await
    }

    async fn with(dir: &Path, change: impl FnOnce(&mut Config)) -> Self {
        let guests = InProcess::default();
        let deps = Self::deps(dir, guests.clone(), change).await;
        let host = HostHandle::start(deps).await.unwrap();
        Self::of(guests, host)
    }

    /// With a loop that does not run: it hears what the test lets it hear.
    pub(super) async fn assemble(dir: &Path) -> (Self, EventLoop, mpsc::Receiver<Message>) {
        let guests = InProcess::default();
        let deps = Self::deps(dir, guests.clone(), |_| {}).await;
        let (host, event_loop, received) = HostHandle::assemble(deps, mpsc::channel(1).0).await.unwrap();
        (Self::of(guests, host), event_loop, received)
    }

    fn of(guests: InProcess, host: HostHandle) -> Self {
        Self::of_function(guests, host, function())
    }

    /// With a function of the test's own.
    fn of_function(guests: InProcess, host: HostHandle, record: FunctionRecord) -> Self {
        let function = Arc::new(Function::from(record));
        guests.functions.lock().unwrap().insert(function.uid, function.clone());
        Self { guests, host, function }
    }

    async fn deps(dir: &Path, guests: InProcess, change: impl FnOnce(&mut Config)) -> Deps {
        let mut config = Config::default();
        config.pool.warming = [("provided".to_owned(), 1)].into();
        config.machines.vcpus = 1;
        config.machines.run_dir = dir.join("run");
        config.machines.scratch_dir = dir.join("scratch");
        config.pool.scratch_gib = Some(16);
        change(&mut config);
        let store = Store::open(&dir.join("state")).unwrap();
        let code = CodeStore::open(&dir.join("code"), store.owner()).unwrap();
        let staged = code.stage().unwrap();
        for sha256 in ["00", "01", "02"] {
            code.put(sha256, staged.path()).await.unwrap();
        }
        let essential = Essential::default();
        let exists: Exists = Arc::new(|_, uid| uid != DELETED);
        let logs = Logs::start(&dir.join("state"), &config.logs, exists, &essential);
        let functions = guests.clone();
        let find: Find = Arc::new(move |uid| functions.find(uid));
        let reporter = Reporter::start(
            store.clone(),
            None,
            &config.controller,
            &essential,
            CancellationToken::new(),
        );
        Deps {
            config,
            limits: BTreeMap::new(),
            launcher: Arc::new(guests),
            store,
            code,
            logs,
            find,
            reporter,
            essential,
        }
    }

    async fn invoke(&self, request_id: &str) -> Result<v1::InvokeResponse, InvokeError> {
        self.invoke_with(request_id, None).await
    }

    async fn invoke_with(
        &self,
        request_id: &str,
        parts: Option<mpsc::Sender<Event>>,
    ) -> Result<v1::InvokeResponse, InvokeError> {
        let params = InvokeParams {
            payload: Bytes::from_static(b"1"),
            amount: None,
            request_id: request_id.into(),
            share: self.host.memory().share(),
            undecided: None,
            parts,
        };
        self.host.invoke(self.function.clone(), params).await
    }

    /// Whether what runs in guests is held.
    pub(super) fn hold(&self, held: bool) {
        self.guests.held.send_replace(held);
    }

    /// How many requests guests have begun.
    pub(super) fn begun(&self) -> u32 {
        self.guests.script().begun
    }

    /// The containers that guests were told to stop.
    pub(super) fn stopped(&self) -> Vec<String> {
        self.guests.script().stopped.clone()
    }

    /// A call by a caller who can leave.
    pub(super) fn calling(&self) -> tokio::task::JoinHandle<Result<v1::InvokeResponse, InvokeError>> {
        let fixture = Self {
            guests: self.guests.clone(),
            host: self.host.clone(),
            function: self.function.clone(),
        };
        tokio::spawn(async move { fixture.invoke("").await })
    }

    /// The commands that were decided about something.
    async fn why(&self, about: &str) -> Vec<String> {
        let decisions = self.host.decisions(Some(about.to_owned()), 0, 1000).await.unwrap();
        decisions.into_iter().map(|decision| decision.command).collect()
    }

    async fn warm(&self) {
        eventually("a warming machine", async || {
            let machines = self.host.machines(false).await;
            machines.iter().any(|m| m.state() == v1::machine::State::Warming)
        })
        .await;
    }

    async fn container_is(&self, state: v1::container::State) {
        eventually("a container to be so", async || {
            let containers = self.host.containers().await;
            containers.iter().any(|container| container.state() == state)
        })
        .await;
    }
}

/// Waits for a condition; the pause only spares the processor.
async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !condition().await {
        assert!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn id(name: &str) -> &str {
    name.rsplit('/').next().unwrap()
}

#[tokio::test]
async fn a_call_is_cold_then_warm_and_the_journal_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = Fixture::start(dir.path()).await;
    fixture.warm().await;
    let cold = fixture.invoke("mine").await.unwrap();
    let warm = fixture.invoke("").await.unwrap();
    assert_eq!((&cold.payload[..], cold.request_id.as_str()), (&b"1"[..], "mine"));
    let (cold, place) = (cold.placement.unwrap(), warm.placement.unwrap());
    assert_eq!(
        (cold.source(), place.source()),
        (Source::WarmingMachine, Source::IdleContainer)
    );
    assert_eq!(cold.container, place.container);
    assert_eq!(fixture.why(&warm.request_id).await, ["dispatch"]);
    assert_eq!(fixture.why("mine").await, ["create container", "dispatch"]);
    assert_eq!(
        fixture.why(id(&cold.container)).await,
        ["create container", "dispatch", "dispatch"]
    );
    let of_machine = fixture.why(id(&cold.machine)).await;
    assert_eq!(of_machine[..2], ["boot machine", "assign machine"], "{of_machine:?}");
    assert_eq!(fixture.why("nobody").await, [""; 0]);
    let all = fixture.host.decisions(None, 0, 1000).await.unwrap();
    assert!(all.is_sorted_by_key(|decision| decision.sequence));
    let after = fixture.host.decisions(None, all[0].sequence, 1).await.unwrap();
    assert_eq!(after, all[1..2]);
    let container = &fixture.host.containers().await[0];
    assert_eq!(
        (container.invocations, container.state()),
        (2, v1::container::State::Idle)
    );
    assert_eq!(container.function, "accounts/a/functions/f");
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn what_can_not_be_recorded_is_not_run() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = Fixture::start(dir.path()).await;
    fixture.guests.script().unrecorded = true;
    // It did not run, so the second is not told that it may have.
    for _ in 0..2 {
        let error = fixture.invoke("mine").await.unwrap_err();
        assert!(
            matches!(&error, InvokeError::Container { detail } if detail.contains("record can't be written")),
            "{error}"
        );
    }
    {
        let script = fixture.guests.script();
        assert_eq!((script.containers.len(), script.codes_brought, script.begun), (0, 0, 0));
    }
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn a_container_made_ahead_of_requests_serves_the_first() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = Fixture::start(dir.path()).await;
    fixture.warm().await;
    fixture.host.prepare(fixture.function.clone()).await;
    fixture.container_is(v1::container::State::Idle).await;
    assert_eq!(fixture.guests.script().codes_brought, 1);
    let place = fixture.invoke("").await.unwrap().placement.unwrap();
    assert_eq!(place.source(), Source::IdleContainer);
    assert_eq!(
        fixture.why(id(&place.container)).await,
        ["create container", "dispatch"]
    );
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn a_container_made_ahead_of_requests_that_fails_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = Fixture::start(dir.path()).await;
    fixture.warm().await;
    fixture.guests.script().init_fails = true;
    fixture.host.prepare(fixture.function.clone()).await;
    eventually("it to be made", async || fixture.guests.script().containers.len() == 1).await;
    eventually("it to go", async || fixture.host.containers().await.is_empty()).await;
    fixture.guests.script().init_fails = false;
    fixture.invoke("").await.unwrap();
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn a_request_that_its_guest_did_not_begin_is_placed_again() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = Fixture::start(dir.path()).await;
    let first = fixture.invoke("").await.unwrap().placement.unwrap();
    fixture.guests.script().refuse = 1;
    let second = fixture.invoke("again").await.unwrap().placement.unwrap();
    assert_ne!(first.container, second.container);
    assert_eq!(fixture.guests.script().begun, 2);
    let why = fixture.why("again").await;
    assert_eq!(why, ["dispatch", "create container", "dispatch"]);
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn a_guest_that_begins_nothing_is_not_asked_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = Fixture::start(dir.path()).await;
    fixture.guests.script().refuse = 1000;
    let error = fixture.invoke("").await.unwrap_err();
    assert!(matches!(error, InvokeError::Container { .. }), "{error}");
    assert_eq!(fixture.guests.script().begun, 0);
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn code_that_a_guest_has_dropped_is_brought_again() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = Fixture::start(dir.path()).await;
    fixture.guests.script().evict = 1;
    fixture.invoke("").await.unwrap();
    assert_eq!(fixture.guests.script().codes_brought, 2);
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn a_guest_hears_what_a_function_is_and_is_brought_every_layer() {
    let dir = tempfile::tempdir().unwrap();
    let mut fixture = Fixture::start(dir.path()).await;
    let layer = |sha256: &str| Layer {
        code_sha256: sha256.into(),
        code_size: 0,
    };
    let record = FunctionRecord {
        layers: ["01", "02"].map(layer).into(),
        freeze: false,
        ephemeral_storage_mib: 1024,
        ..FunctionRecord::clone(&fixture.function)
    };
    fixture.function = Arc::new(record.into());
    // Each time it has let one of the three go for another.
    fixture.guests.script().evict = 3;
    fixture.invoke("").await.unwrap();
    let asked = fixture.guests.script().asked.take().unwrap();
    assert_eq!(asked.code_sha256, "00");
    assert_eq!(asked.layers_sha256, ["01", "02"]);
    assert_eq!((asked.freeze, asked.scratch_mib), (Some(false), 1024));
    assert_eq!(fixture.guests.script().codes_brought, 4 * 3);
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn a_drive_is_made_as_large_as_its_containers_need_before_they_are_made() {
    let dir = tempfile::tempdir().unwrap();
    let mut fixture = Fixture::start(dir.path()).await;
    fixture.invoke("").await.unwrap();
    let asked = fixture.guests.script().asked.take().unwrap();
    assert_eq!(asked.drive_mib, 1024);
    assert!(fixture.guests.script().drives.is_empty(), "it is as large already");
    let record = FunctionRecord {
        uid: Ulid::generate(),
        ephemeral_storage_mib: 2048,
        unpacked_bytes: Some(100 << 20),
        ..FunctionRecord::clone(&fixture.function)
    };
    // The first takes 523 MiB.
    let needs = record.scratch_mib();
    fixture.function = Arc::new(record.into());
    fixture.invoke("").await.unwrap();
    let asked = fixture.guests.script().asked.take().unwrap();
    assert_eq!((needs, asked.drive_mib), (2184, 64 + 523 + 2184));
    assert_eq!(fixture.guests.script().drives, [asked.drive_mib]);
    let machines = fixture.host.machines(false).await;
    let machine = machines.iter().find(|machine| machine.account == "accounts/a").unwrap();
    assert_eq!(
        (machine.scratch_mib, machine.scratch_allocated_mib),
        (asked.drive_mib, 523 + 2184)
    );
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn a_drive_that_can_not_be_made_larger_costs_a_container_and_not_the_machine() {
    let dir = tempfile::tempdir().unwrap();
    let mut fixture = Fixture::start(dir.path()).await;
    fixture.invoke("").await.unwrap();
    let record = FunctionRecord {
        uid: Ulid::generate(),
        ephemeral_storage_mib: 2048,
        ..FunctionRecord::clone(&fixture.function)
    };
    fixture.function = Arc::new(record.into());
    // No machine can; each is tried once.
    fixture.guests.script().refuse_drives = 100;
    let error = fixture.invoke("").await.unwrap_err().to_string();
    assert!(
        error.contains("scratch disk can't be made") && error.contains("as the test wants it"),
        "{error}"
    );
    let ended = fixture.host.machines(true).await;
    assert!(ended.iter().all(|machine| machine.end.is_none()), "{ended:?}");
    fixture.guests.script().refuse_drives = 0;
    fixture.invoke("").await.unwrap();
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn who_needs_more_disk_than_a_machine_may_have_is_told_what_to_change() {
    let dir = tempfile::tempdir().unwrap();
    let mut fixture = Fixture::with(dir.path(), |config| config.pool.scratch_gib = Some(2)).await;
    let record = FunctionRecord {
        ephemeral_storage_mib: 2048,
        ..FunctionRecord::clone(&fixture.function)
    };
    fixture.function = Arc::new(record.into());
    let error = fixture.invoke("").await.unwrap_err();
    assert!(matches!(error, InvokeError::TooLarge { .. }), "{error}");
    let says = error.to_string();
    assert!(
        says.contains("1984 MiB of scratch disk") && says.contains("raise pool.scratch_gib"),
        "{says}"
    );
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn an_init_that_fails_is_an_answer() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = Fixture::start(dir.path()).await;
    fixture.guests.script().init_fails = true;
    let answer = fixture.invoke("").await.unwrap();
    assert_eq!(answer.function_error, "Unhandled");
    assert!(
        answer.payload.starts_with(b"{\"errorMessage\":"),
        "{:?}",
        answer.payload
    );
    assert_ne!(answer.placement.unwrap().source(), Source::IdleContainer);
    eventually("its container to go", async || {
        fixture.host.containers().await.is_empty()
    })
    .await;
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn a_call_whose_machine_dies_may_have_run() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = Fixture::start(dir.path()).await;
    fixture.invoke("").await.unwrap();
    fixture.guests.held.send_replace(true);
    let calling = fixture.calling();
    eventually("it to be begun", async || fixture.guests.script().begun == 2).await;
    fixture.guests.kill.send_modify(|kills| *kills += 1);
    let error = calling.await.unwrap().unwrap_err();
    let InvokeError::MachineLost { detail } = &error else {
        panic!("{error}");
    };
    assert_eq!(detail, "killed by the test");
    let ended = fixture.host.machines(true).await;
    assert!(
        ended.iter().any(|m| m.end.is_some() && m.account == "accounts/a"),
        "{ended:?}"
    );
    fixture.guests.held.send_replace(false);
    fixture.invoke("").await.unwrap();
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn a_caller_that_leaves_while_its_container_starts_is_not_run() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = Fixture::start(dir.path()).await;
    fixture.guests.held.send_replace(true);
    let calling = fixture.calling();
    fixture.container_is(v1::container::State::Starting).await;
    eventually("it to be made", async || !fixture.guests.script().containers.is_empty()).await;
    calling.abort();
    assert!(calling.await.is_err());
    fixture.guests.held.send_replace(false);
    fixture.container_is(v1::container::State::Idle).await;
    assert_eq!(fixture.guests.script().begun, 0);
    let next = fixture.invoke("").await.unwrap();
    assert_eq!(
        next.placement.unwrap().source(),
        Source::IdleContainer,
        "what was made serves"
    );
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn a_call_that_is_placed_runs_on_where_its_caller_leaves() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = Fixture::start(dir.path()).await;
    fixture.invoke("").await.unwrap();
    fixture.guests.held.send_replace(true);
    let calling = fixture.calling();
    eventually("it to be begun", async || fixture.guests.script().begun == 2).await;
    calling.abort();
    assert!(calling.await.is_err());
    fixture.container_is(v1::container::State::Busy).await;
    fixture.guests.held.send_replace(false);
    fixture.container_is(v1::container::State::Idle).await;
    assert_eq!(fixture.host.containers().await[0].invocations, 2);
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn a_call_that_looked_its_function_up_before_the_deletion_is_not_run() {
    let dir = tempfile::tempdir().unwrap();
    let mut fixture = Fixture::start(dir.path()).await;
    let other = tempfile::tempdir().unwrap();
    let store = Store::open(&other.path().join("state")).unwrap();
    let codes = CodeStore::open(&other.path().join("code"), store.owner()).unwrap();
    let catalog = Catalog::open(
        store,
        codes,
        Limits::default(),
        PATIENCE,
        ResizingDefaults::default(),
        Arc::new(|_, _| Ok(())),
        Arc::new(|_| {}),
    );
    let catalog = catalog.await.unwrap();
    let mut upload = catalog.upload().unwrap();
    let zip = stoker_testkit::zip::zip(&[("app.py", 0o644, b"")]).unwrap();
    upload.write(zip.into()).await.unwrap();
    let spec = FunctionSpec {
        name: "accounts/a/functions/gone".parse().unwrap(),
        runtime: "python3.11".into(),
        handler: "app.handler".into(),
        environment: Default::default(),
        timeout: Duration::from_secs(3),
        amount: fixture.function.amount,
        freeze: true,
        ephemeral_storage_mib: 512,
        resizing: None,
    };
    let staged = upload.finish().await.unwrap();
    let made = catalog.create(spec, String::new(), staged, 4096).await.unwrap();
    fixture.function = catalog.get(&made.name).unwrap();
    catalog.delete(made.name).await.unwrap();
    assert_eq!(fixture.invoke("").await.unwrap_err(), InvokeError::FunctionDeleted);
    assert_eq!(fixture.guests.script().begun, 0);
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn a_guest_says_what_its_containers_use() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = Fixture::start(dir.path()).await;
    fixture.guests.script().containers.insert(Ulid::generate().to_string());
    fixture.invoke("").await.unwrap();
    // Of a container that it does not have, nothing is taken in.
    let containers = fixture.host.containers().await;
    assert_eq!((containers.len(), containers[0].usage), (1, None));
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn what_was_decided_is_known_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = Fixture::start(dir.path()).await;
    let machine = fixture.invoke("").await.unwrap().placement.unwrap().machine;
    fixture.host.drain(PATIENCE).await;
    let before = fixture.why(id(&machine)).await;
    drop(fixture);
    let fixture = Fixture::start(dir.path()).await;
    assert_eq!(fixture.why(id(&machine)).await, before);
    assert!(before.contains(&"destroy machine".to_owned()), "{before:?}");
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn recorded_events_are_decided_the_same_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("events.jsonl");
    let fixture = Fixture::with(dir.path(), |config| config.journal.record = Some(path.clone())).await;
    for _ in 0..20 {
        fixture.invoke("").await.unwrap();
    }
    fixture.guests.script().refuse = 1;
    fixture.invoke("").await.unwrap();
    fixture.host.drain(PATIENCE).await;
    let count = fixture.host.decisions(None, 0, 100_000).await.unwrap().len();
    drop(fixture);
    let count = u64::try_from(count).unwrap();
    eventually("the recording to be written", async || {
        let replayed = journal::recording::replay(&path).unwrap();
        assert!(replayed.decisions <= count);
        replayed.decisions == count && replayed.events > 40
    })
    .await;
    // Another time, another decision: it is said where.
    let text = std::fs::read_to_string(&path).unwrap();
    let lines: Vec<&str> = text.lines().filter(|line| !line.contains("\"MachineReady\"")).collect();
    std::fs::write(&path, lines.join("\n")).unwrap();
    let error = journal::recording::replay(&path).unwrap_err();
    assert!(
        matches!(error, journal::recording::ReplayError::Differs { line, .. } if line > 2),
        "{error}"
    );
    // A line that is cut off is the end.
    std::fs::write(&path, &text[..text.len() - 10]).unwrap();
    let replayed = journal::recording::replay(&path).unwrap();
    assert!(replayed.decisions <= count);
}

#[tokio::test]
async fn a_call_that_never_reached_its_guest_was_not_begun() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let hang_up = CancellationToken::new();
    tokio::spawn(fake_guest::serve(
        InProcess::default(),
        theirs,
        hang_up.clone().cancelled_owned(),
    ));
    let (guest, _, hung_up) = Guest::over(ours, "provided").await.unwrap();
    hang_up.cancel();
    let why = hung_up.await.unwrap();
    assert!(
        !why.message().is_empty(),
        "it is not said how the connection ended: {why:?}"
    );
    let error = guest.invoke(Default::default(), PATIENCE).await.unwrap_err();
    assert!(matches!(error, GuestError::NotBegun { .. }), "{error}");
}

#[tokio::test]
async fn a_machine_whose_task_panics_is_ended_alone() {
    let dir = tempfile::tempdir().unwrap();
    let guests = InProcess::default();
    guests.script().panics = 1;
    let deps = Fixture::deps(dir.path(), guests.clone(), |_| {}).await;
    let (essential, host) = (deps.essential.clone(), HostHandle::start(deps).await.unwrap());
    let fixture = Fixture::of(guests.clone(), host);
    let ended = async || {
        let machines = fixture.host.machines(true).await.into_iter();
        let ended: Vec<_> = machines
            .filter_map(|machine| Some((machine.name, machine.end?)))
            .collect();
        ended
    };
    eventually("it to be ended", async || !ended().await.is_empty()).await;
    let cleared = guests.script().cleared.clone();
    let [(name, end)] = &ended().await[..] else {
        panic!("one machine has ended");
    };
    assert_eq!(
        cleared.iter().map(|id| listing::machine_name(*id)).collect::<Vec<_>>(),
        [&**name]
    );
    assert!(end.detail.contains("panicked"), "{end:?}");
    // Another takes its place.
    let placement = fixture.invoke("").await.unwrap().placement.unwrap();
    assert_ne!(placement.machine, *name);
    assert!(tokio::time::timeout(Duration::ZERO, essential.died()).await.is_err());
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn boots_that_fail_one_after_the_other_are_told_until_one_succeeds() {
    let dir = tempfile::tempdir().unwrap();
    let guests = InProcess::default();
    let failing = rules::BOOT_FAILURES;
    guests.script().fail_to_boot = failing;
    let deps = Fixture::deps(dir.path(), guests.clone(), |config| {
        config.pool.warming = [("provided".to_owned(), failing)].into();
        config.pool.concurrent_boots = Some(failing);
    });
    let host = HostHandle::start(deps.await).await.unwrap();
    let pulse = async || host.pulse().await.unwrap();
    eventually("boots to be failing", async || pulse().await.boots_fail).await;
    assert_eq!(guests.script().fail_to_boot, 0);
    eventually("a boot to succeed", async || !pulse().await.boots_fail).await;
    eventually("all to be there", async || pulse().await.machines == failing as usize).await;
    host.drain(PATIENCE).await;
}

/// The clock was a year ahead when an earlier run decided: what is decided now comes after that all the same.
#[tokio::test]
async fn decisions_go_on_where_the_clock_was_set_back() {
    let dir = tempfile::tempdir().unwrap();
    let year = Duration::from_secs(365 * 86_400);
    let ahead = listing::since_1970(SystemTime::now()) + year;
    let earlier = u64::try_from(ahead.as_micros()).unwrap();
    let machine = Ulid(7);
    let deps = Fixture::deps(dir.path(), InProcess::default(), |_| {}).await;
    let kept = StoredDecision {
        machine: Some(machine),
        container: None,
        request: None,
        decision: v1::Decision {
            sequence: earlier,
            ..Default::default()
        },
    };
    deps.store.append_decisions(vec![kept]).await.unwrap();
    let host = HostHandle::start(deps).await.unwrap();
    let later = async || host.decisions(None, earlier, 1000).await.unwrap();
    eventually("something to be decided", async || !later().await.is_empty()).await;
    let of_machine = host.decisions(Some(machine.to_string()), 0, 1000).await.unwrap();
    assert_eq!(of_machine.len(), 1, "it is found still");
    host.drain(PATIENCE).await;
}

/// Nothing that the loop is asked for is answered any more: the agent has to end.
#[tokio::test]
async fn the_end_of_the_loop_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let deps = Fixture::deps(dir.path(), InProcess::default(), |_| {}).await;
    let (essential, host) = (deps.essential.clone(), HostHandle::start(deps).await.unwrap());
    let inbox = host.inbox.clone();
    inbox.send(Message::Panic).await.unwrap();
    let died = tokio::time::timeout(PATIENCE, essential.died()).await.unwrap();
    assert_eq!((died.task, died.panicked), (Task::EventLoop, true));
    assert_eq!(host.machines(true).await, [], "it answers nothing, but at once");
}

#[tokio::test]
async fn what_an_earlier_agent_left_is_taken_over() {
    let dir = tempfile::tempdir().unwrap();
    let function = Arc::new(Function::from(function()));
    let id = |n: u128| ContainerId(Ulid(n));
    let of = |uid| ContainerRecord {
        kind: Kind {
            code: stoker_policy::Code { uid, version: 1 },
            amount: listing::amount(function.amount, function.scratch_mib()),
        },
        function: function.name.clone(),
        created: Duration::from_secs(2),
    };
    let shape = Shape {
        vcpus: 1,
        memory_mib: 2048,
        drive_mib: 4096,
        baseline_millis: 200,
    };
    let (active, warming) = (MachineId(Ulid(1)), MachineId(Ulid(2)));
    let [idle, busy, deleted, ended, unknown] = [11, 12, 13, 14, 15].map(id);
    let of_account = Record {
        account: Some("a".into()),
        containers: [
            (idle, of(function.uid)),
            (busy, of(function.uid)),
            (deleted, of(DELETED)),
            (ended, of(function.uid)),
        ]
        .into(),
        ..record("provided".into(), shape)
    };
    let guests = InProcess {
        left: Arc::new([(active, of_account), (warming, record("provided".into(), shape))].into()),
        ..InProcess::default()
    };
    let running = Ulid::generate();
    {
        let mut script = guests.script();
        script.containers = [idle, busy, deleted, unknown].map(|id| id.to_string()).into();
        script.running = vec![proto::InvocationState {
            name: format!("{}/{}", function.uid, call::uuid(stoker_policy::RequestId(running))),
            container: busy.to_string(),
        }];
        script.written = [idle, ended, unknown]
            .map(|id| line(&id.to_string(), &id.to_string()))
            .into();
    }
    guests.held.send_replace(true);
    let deps = Fixture::deps(dir.path(), guests.clone(), |_| {}).await;
    let mut logs = deps.logs.reader(&function, Filter::default()).await.unwrap();
    let host = HostHandle::start(deps).await.unwrap();
    let expected = [
        (listing::machine_name(active), v1::machine::State::Active),
        (listing::machine_name(warming), v1::machine::State::Warming),
    ];
    eventually("both to be taken over", async || {
        let machines = host.machines(false).await.into_iter();
        let state = |machine: v1::Machine| (machine.name.clone(), machine.state());
        machines.map(state).collect::<Vec<_>>() == expected
    })
    .await;
    let states = async || {
        let containers = host.containers().await.into_iter();
        let state = |container: v1::Container| (container.name.clone(), container.state());
        containers.map(state).collect::<Vec<_>>()
    };
    let container = |id, state| (listing::container_name(active, id), state);
    use v1::container::State;
    eventually("only what it knows to be there", async || {
        states().await == [container(idle, State::Idle), container(busy, State::Busy)]
    })
    .await;
    let stopped: HashSet<_> = guests.script().stopped.iter().cloned().collect();
    assert_eq!(stopped, [deleted, unknown].map(|id| id.to_string()).into());
    // What they wrote that have ended meanwhile is kept too.
    assert!(tokio::time::timeout(PATIENCE, logs.more()).await.unwrap());
    let written: Vec<_> = logs.next().await.unwrap().into_iter().map(|line| line.text).collect();
    assert_eq!(written, [idle, ended].map(|id| id.to_string()));
    // What is warm serves, and what runs goes on to its end.
    let fixture = Fixture {
        guests: guests.clone(),
        host: host.clone(),
        function,
    };
    let calling = fixture.calling();
    eventually("the call to run", async || guests.script().begun == 1).await;
    let both = [container(idle, State::Busy), container(busy, State::Busy)];
    assert_eq!(states().await, both);
    guests.held.send_replace(false);
    let placement = calling.await.unwrap().unwrap().placement.unwrap();
    assert_eq!(
        (placement.source(), placement.container),
        (Source::IdleContainer, listing::container_name(active, idle))
    );
    eventually("what ran to be over", async || {
        states().await == [container(idle, State::Idle), container(busy, State::Idle)]
    })
    .await;
    assert_eq!(guests.script().begun, 1, "it was not begun again");
    host.drain(PATIENCE).await;
}

#[tokio::test]
async fn a_guest_that_names_anothers_container_ends_none_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let function = Arc::new(Function::from(function()));
    let idle = ContainerId(Ulid(11));
    let shape = Shape {
        vcpus: 1,
        memory_mib: 2048,
        drive_mib: 4096,
        baseline_millis: 200,
    };
    let of = |account: &str, containers| Record {
        account: Some(account.into()),
        containers,
        ..record("provided".into(), shape)
    };
    let container = ContainerRecord {
        kind: call::kind(&function, listing::amount(function.amount, function.scratch_mib())),
        function: function.name.clone(),
        created: Duration::from_secs(2),
    };
    let (owner, other) = (MachineId(Ulid(1)), MachineId(Ulid(2)));
    let left = [
        (owner, of("a", [(idle, container)].into())),
        (other, of("b", BTreeMap::new())),
    ];
    let guests = InProcess {
        left: Arc::new(left.into()),
        ..InProcess::default()
    };
    // Both guests say that they have it.
    guests.script().containers.insert(idle.to_string());
    let deps = Fixture::deps(dir.path(), guests.clone(), |_| {}).await;
    let host = HostHandle::start(deps).await.unwrap();
    eventually("the other's to be ended", async || !guests.script().stopped.is_empty()).await;
    let fixture = Fixture {
        guests,
        host: host.clone(),
        function: Arc::new(self::function().into()),
    };
    fixture.invoke("").await.unwrap();
    let containers = host.containers().await;
    let named = |container: &&v1::Container| container.name == listing::container_name(owner, idle);
    let found = containers.iter().find(named).unwrap();
    assert_eq!(found.state(), v1::container::State::Idle);
    host.drain(PATIENCE).await;
}

#[tokio::test]
async fn what_a_guest_says_of_its_containers_is_kept_for_their_function() {
    let dir = tempfile::tempdir().unwrap();
    let guests = InProcess::default();
    guests.script().talks = true;
    let deps = Fixture::deps(dir.path(), guests.clone(), |_| {}).await;
    let logs = deps.logs.clone();
    let fixture = Fixture::of(guests, HostHandle::start(deps).await.unwrap());
    let mut reader = logs.reader(&fixture.function, Filter::default()).await.unwrap();
    assert!(reader.next().await.unwrap().is_empty());
    fixture.invoke("").await.unwrap();
    let more = tokio::time::timeout(PATIENCE, reader.more()).await.unwrap();
    assert!(more);
    let lines = reader.next().await.unwrap();
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert_eq!((lines[0].request_id.as_str(), lines[0].text.as_str()), ("r-1", "hello"));
    let made = SystemTime::try_from(lines[0].time.unwrap()).unwrap();
    assert!(made > SystemTime::now() - PATIENCE, "a guest's clock is not believed");
}
