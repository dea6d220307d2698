//! `stoker.guest.v1.Guest`: what the agent asks of this machine.

mod answers;
mod checks;
mod exec;
mod forward;
mod image;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use stoker_archive::ArchiveError;
use stoker_proto::guest;
use stoker_proto::guest::guest_server::Guest;
use stoker_proto::guest::{
    AskCredits, ContainerUse, CreateContainerRequest, CreateContainerResponse, Credits, FollowLogsRequest,
    FollowLogsResponse, HelloRequest, HelloResponse, InvokeRequest, InvokeResponse, PowerOffRequest, PowerOffResponse,
    PutCodeRequest, PutCodeResponse, StopContainerRequest, StopContainerResponse, WatchRequest, WatchResponse,
    put_code_request,
};
use stoker_proto::limits::{INVOCATION_NAME_BYTES, PAYLOAD_BYTES, STDIN_WINDOW_BYTES, STDIN_WINDOW_KEY};
use stoker_proto::v1;
use tokio::sync::{Notify, broadcast, mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status, Streaming};

use crate::budget;
use crate::clock::Clock;
use crate::code::{Code, CodeError, CodeStore, FunctionCode};
use crate::container::{Containers, Creation, Failure, Workload};
use crate::invocations::{Asked, Invocations};
use crate::machine;
use crate::parts::{Answers, Parts, Windows};
use answers::{container_end, function_error, into_execution, into_log, into_usage};
use checks::{WATCH_INTERVALS, at_most, duration, function, identifier, runtime, tmp_mib};

/// How many answers may wait for the connection before those that come later wait themselves.
const ANSWERS: usize = 16;

/// The service. Clones are the same.
#[derive(Clone)]
pub(crate) struct Service {
    containers: Containers,
    workload: Workload,
    code: CodeStore,
    invocations: Invocations,
    clock: Arc<Clock>,
    power_off: Arc<Notify>,
}

// === impl Service ===

impl Service {
    pub(crate) fn new(containers: Containers, workload: Workload, code: CodeStore) -> Self {
        Self {
            containers,
            workload,
            code,
            invocations: Invocations::default(),
            clock: Arc::new(Clock::new()),
            power_off: Arc::default(),
        }
    }

    /// Whether the machine was launched from an image.
    pub(crate) fn is_launched(&self) -> bool {
        self.workload.is_launched()
    }

    /// Resolves when the machine is to be powered off.
    pub(crate) async fn powering_off(&self) {
        self.power_off.notified().await;
    }

    /// Makes a container; one that has not initialised when its agent has `left` is ended, for nobody knows of it.
    async fn create(
        &self,
        request: CreateContainerRequest,
        left: impl Future<Output = ()>,
    ) -> Result<CreateContainerResponse, Status> {
        let id = identifier("id", request.id.clone())?;
        let (tmp_mib, drive_mib) = (tmp_mib(request.scratch_mib)?, request.drive_mib);
        let (sha256, layers) = (request.code_sha256.clone(), request.layers_sha256.clone());
        let function = function(request)?;
        let mut code = FunctionCode {
            own: self.code(&sha256).await?,
            layers: Vec::new(),
        };
        for sha256 in layers {
            code.layers.push(self.code(&sha256).await?);
        }
        let share = match self.code.room_for_container(tmp_mib, drive_mib).await {
            Ok(share) => share,
            Err(error) => {
                return Ok(CreateContainerResponse {
                    error: Some(function_error(Failure::setup(error.to_string()))),
                    log: None,
                    execution: None,
                });
            }
        };
        let Creation { result, log, execution } = self
            .containers
            .create(id, function, code, share, left)
            .await
            .map_err(|error| Status::already_exists(error.to_string()))?;
        Ok(CreateContainerResponse {
            error: result.err().map(function_error),
            log: Some(into_log(log)),
            execution: execution.map(into_execution),
        })
    }

    async fn code(&self, sha256: &str) -> Result<Arc<Code>, Status> {
        self.code.get(sha256).await.ok_or_else(|| {
            Status::failed_precondition(format!("the code {sha256} is not in this machine: PutCode brings it"))
        })
    }

    /// An invocation and its end; not an answer where the request is not valid. What the function streams goes to `parts`
    /// before.
    async fn run(&self, request: InvokeRequest, parts: Option<Parts>) -> Result<InvokeResponse, Status> {
        let call = request.call;
        let timeout = duration("timeout", request.timeout)?;
        let id = identifier("request_id", request.request_id)?;
        at_most(PAYLOAD_BYTES, "the payload", request.payload.len())?;
        let name = request.name;
        if name.is_empty() {
            return Err(Status::invalid_argument("the invocation has no name"));
        }
        at_most(INVOCATION_NAME_BYTES, "the name", name.len())?;
        let not_begun = |why: String| InvokeResponse {
            call,
            not_begun: why,
            ..Default::default()
        };
        let asked = if request.attach {
            self.invocations.find(&name).map(Asked::Again)
        } else {
            Some(self.invocations.ask(name, request.container.clone()))
        };
        let invocation = match asked {
            Some(Asked::First(first)) => first,
            Some(Asked::Again(again)) => {
                let answer = again.answer().await.map(|answer| InvokeResponse { call, ..answer });
                return Ok(answer.unwrap_or_else(|| not_begun("the first of its name did not begin".to_owned())));
            }
            None => return Ok(not_begun("none of its name runs".to_owned())),
        };
        let Some(container) = self.containers.get(&request.container) else {
            return Ok(not_begun(format!("there is no container {}", request.container)));
        };
        self.clock.follow(request.host_time_ns);
        let budget = container.budget().clone();
        budget.invoked(request.payload.len());
        let invoked = budget
            .counted(container.invoke(id, request.payload, timeout, parts.clone()))
            .await;
        let partial = match parts {
            Some(parts) => parts.end().await,
            None => false,
        };
        let answer = match invoked {
            Ok(answer) => answer,
            Err(why) => return Ok(not_begun(why.to_string())),
        };
        let (payload, error) = match answer.result {
            Ok(payload) => (payload, None),
            Err(failure) => (failure.payload(), Some(function_error(failure))),
        };
        let answer = InvokeResponse {
            payload,
            error,
            log: Some(into_log(answer.log)),
            usage: Some(into_usage(answer.execution.used)),
            execution: Some(into_execution(answer.execution)),
            container_ended: answer.ended,
            call,
            ..Default::default()
        };
        if partial {
            let end = InvokeResponse {
                partial,
                ..answer.clone()
            };
            invocation.over(&end, request.keep);
        } else {
            invocation.over(&answer, request.keep);
        }
        Ok(answer)
    }

    /// The ids of the containers that can be invoked.
    fn ready(&self) -> Vec<String> {
        let all = self.containers.list().into_iter();
        let ready = all.filter(|container| container.is_ready());
        ready.map(|container| container.id().to_owned()).collect()
    }

    /// Carries out what comes, each to its end even where the agent leaves in the middle.
    async fn run_all(self, mut requests: Streaming<InvokeRequest>, to: Answers) {
        let mut windows = Windows::default();
        while let Some(Ok(request)) = requests.next().await {
            if request.grant_bytes > 0 {
                windows.grant(request.call, request.grant_bytes);
                continue;
            }
            let parts = request.stream.then(|| windows.open(request.call, to.clone()));
            let (service, to) = (self.clone(), to.clone());
            budget::spawn_uncounted(async move {
                let answer = service.run(request, parts).await;
                // Nobody hears it where the agent has left.
                let _ = to.send(answer).await;
            });
        }
    }

    /// What all containers have used up to now, and the machine as a whole where it runs an image.
    fn uses(&self) -> WatchResponse {
        let functions = self.containers.list();
        let functions = functions.iter().map(|container| ContainerUse {
            id: container.id().to_owned(),
            usage: Some(into_usage(container.used())),
        });
        self.workload.follow_machine();
        let image = image::used(&self.workload);
        WatchResponse {
            machine: image.as_ref().map(|_| machine::used()),
            containers: functions.chain(image).collect(),
            ended: Vec::new(),
        }
    }

    /// Watches until the agent leaves.
    async fn watch_for(self, interval: Duration, to: mpsc::Sender<Result<WatchResponse, Status>>) {
        let mut ends = self.containers.ends();
        // Told to each who watches, however often: the agent before may not have heard it.
        let mut end_of_image = std::pin::pin!(self.workload.over());
        let mut image_ended = false;
        let mut ticks = tokio::time::interval(interval);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let response = tokio::select! {
                () = to.closed() => return,
                _ = ticks.tick() => self.uses(),
                ended = &mut end_of_image, if !image_ended => {
                    image_ended = true;
                    WatchResponse {
                        ended: vec![image::end(&ended)],
                        ..WatchResponse::default()
                    }
                }
                end = ends.recv() => match end {
                    Ok((id, end)) => WatchResponse {
                        ended: vec![container_end(id, &end)],
                        ..WatchResponse::default()
                    },
                    // The next tick shows who is left.
                    Err(broadcast::error::RecvError::Lagged(_)) => continue,
                    Err(broadcast::error::RecvError::Closed) => return,
                },
            };
            if to.send(Ok(response)).await.is_err() {
                return;
            }
        }
    }
}

#[tonic::async_trait]
impl Guest for Service {
    async fn hello(&self, request: Request<HelloRequest>) -> Result<Response<HelloResponse>, Status> {
        let wanted = request.into_inner().runtime;
        let loaded = match wanted.as_str() {
            "" => Ok(()),
            name => {
                let (containers, code, runtime) = (self.containers.clone(), self.code.clone(), runtime(name)?);
                // It goes on where its agent leaves, and the next one waits for it.
                let loading = budget::spawn_uncounted(async move { containers.load_runtime(runtime, &code).await });
                loading.await.unwrap_or_else(|error| Err(error.to_string()))
            }
        };
        Ok(Response::new(HelloResponse {
            kernel: machine::kernel(),
            init_version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_us: u64::try_from(machine::uptime().as_micros()).unwrap_or(u64::MAX),
            cpus: machine::cpus(),
            memory_available_bytes: machine::memory_available_bytes(),
            telemetry_error: self.containers.telemetry().error().await.unwrap_or_default(),
            runtime_error: loaded.err().unwrap_or_default(),
            containers: self.ready(),
            code_sha256: self.code.list(),
            scratch_error: self.code.scratch_error().await.unwrap_or_default().to_string(),
            invocations: self.invocations.list(),
            image_container: self.workload.id().unwrap_or_default(),
        }))
    }

    async fn put_code(&self, request: Request<Streaming<PutCodeRequest>>) -> Result<Response<PutCodeResponse>, Status> {
        let mut parts = request.into_inner();
        let Some(put_code_request::Part::Header(header)) = next_part(&mut parts).await? else {
            return Err(Status::invalid_argument("the first message is to be the header"));
        };
        let (sender, incoming) =
            CodeStore::channel(header.sha256, header.size_bytes, header.drive_mib).map_err(code_status)?;
        let feed = async move {
            while let Some(part) = next_part(&mut parts).await? {
                let put_code_request::Part::Chunk(chunk) = part else {
                    return Err(Status::invalid_argument("there is one header only"));
                };
                if sender.send(chunk).await.is_err() {
                    break;
                }
            }
            Ok(())
        };
        // Ends with the code in its place or with what is wrong with it, whatever more the agent has to send.
        let put = self.code.put(incoming);
        tokio::pin!(feed, put);
        let mut fed = false;
        loop {
            tokio::select! {
                biased;
                present = &mut put => {
                    let present = present.map_err(code_status)?;
                    return Ok(Response::new(PutCodeResponse { present }));
                }
                result = &mut feed, if !fed => {
                    result?;
                    fed = true;
                }
            }
        }
    }

    async fn create_container(
        &self,
        request: Request<CreateContainerRequest>,
    ) -> Result<Response<CreateContainerResponse>, Status> {
        let service = self.clone();
        // Dropped with this call.
        let (_here, left) = oneshot::channel::<()>();
        let left = async {
            let _ = left.await;
        };
        detached(async move { service.create(request.into_inner(), left).await }).await
    }

    type InvokeStream = ReceiverStream<Result<InvokeResponse, Status>>;

    async fn invoke(&self, request: Request<Streaming<InvokeRequest>>) -> Result<Response<Self::InvokeStream>, Status> {
        let (sender, answers) = mpsc::channel(ANSWERS);
        budget::spawn_uncounted(self.clone().run_all(request.into_inner(), sender));
        Ok(Response::new(ReceiverStream::new(answers)))
    }

    async fn stop_container(
        &self,
        request: Request<StopContainerRequest>,
    ) -> Result<Response<StopContainerResponse>, Status> {
        let id = request.into_inner().id;
        let container = self
            .containers
            .get(&id)
            .ok_or_else(|| Status::not_found(format!("there is no container {id}")))?;
        detached(async move {
            container.stop().await;
            Ok(StopContainerResponse {})
        })
        .await
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<WatchResponse, Status>> + Send>>;

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let interval = duration("interval", request.into_inner().interval)?;
        if !WATCH_INTERVALS.contains(&interval) {
            return Err(Status::invalid_argument("`interval` is to be between 10 ms and 1 h"));
        }
        let (sender, receiver) = mpsc::channel(4);
        budget::spawn_uncounted(self.clone().watch_for(interval, sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    type FollowLogsStream = ReceiverStream<Result<FollowLogsResponse, Status>>;

    async fn follow_logs(&self, _: Request<FollowLogsRequest>) -> Result<Response<Self::FollowLogsStream>, Status> {
        let (sender, batches) = mpsc::channel(1);
        budget::spawn_uncounted(self.containers.feeds().clone().send(sender));
        Ok(Response::new(ReceiverStream::new(batches)))
    }

    type FollowCreditsStream = ReceiverStream<Result<AskCredits, Status>>;

    async fn follow_credits(
        &self,
        told: Request<Streaming<Credits>>,
    ) -> Result<Response<Self::FollowCreditsStream>, Status> {
        let (sender, questions) = mpsc::channel(1);
        let containers = self.containers.clone();
        let told = told.into_inner();
        budget::spawn_uncounted(async move { containers.credits().follow(told, sender).await });
        Ok(Response::new(ReceiverStream::new(questions)))
    }

    async fn run_image(
        &self,
        request: Request<guest::RunImageRequest>,
    ) -> Result<Response<guest::RunImageResponse>, Status> {
        let workload = self.workload.clone();
        // Dropped with this call.
        let (here, _waits) = oneshot::channel::<()>();
        detached(async move { image::run(&workload, request.into_inner(), here).await }).await
    }

    async fn stop_image(
        &self,
        request: Request<guest::StopImageRequest>,
    ) -> Result<Response<guest::StopImageResponse>, Status> {
        let workload = self.workload.clone();
        detached(async move { image::stop(&workload, request.into_inner()).await }).await
    }

    type ExecStream = ReceiverStream<Result<v1::ExecResponse, Status>>;

    async fn exec(&self, request: Request<Streaming<v1::ExecRequest>>) -> Result<Response<Self::ExecStream>, Status> {
        let mut requests = request.into_inner();
        let process = exec::start(&self.workload, &mut requests).await?;
        let (sender, answers) = mpsc::channel(1);
        budget::spawn_uncounted(exec::carry(self.workload.clone(), process, requests, sender));
        let mut response = Response::new(ReceiverStream::new(answers));
        let headers = response.metadata_mut();
        headers.insert(STDIN_WINDOW_KEY, STDIN_WINDOW_BYTES.into());
        Ok(response)
    }

    type ForwardPortStream = ReceiverStream<Result<v1::ForwardPortResponse, Status>>;

    async fn forward_port(
        &self,
        request: Request<Streaming<v1::ForwardPortRequest>>,
    ) -> Result<Response<Self::ForwardPortStream>, Status> {
        let mut requests = request.into_inner();
        let connection = forward::connect(&self.workload, &mut requests).await?;
        let (sender, answers) = mpsc::channel(1);
        budget::spawn_uncounted(forward::carry(self.workload.clone(), connection, requests, sender));
        Ok(Response::new(ReceiverStream::new(answers)))
    }

    async fn power_off(&self, _: Request<PowerOffRequest>) -> Result<Response<PowerOffResponse>, Status> {
        self.workload.kill().await;
        self.workload.lines_sent().await;
        self.containers.stop_all().await;
        self.power_off.notify_one();
        Ok(Response::new(PowerOffResponse {}))
    }
}

/// Carries something to its end even where the connection breaks in the middle.
async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T, Status>> + Send + 'static,
) -> Result<Response<T>, Status> {
    budget::spawn_uncounted(work)
        .await
        .unwrap_or_else(|error| Err(Status::internal(error.to_string())))
        .map(Response::new)
}

async fn next_part(parts: &mut Streaming<PutCodeRequest>) -> Result<Option<put_code_request::Part>, Status> {
    match parts.next().await {
        None => Ok(None),
        Some(message) => match message?.part {
            Some(part) => Ok(Some(part)),
            None => Err(Status::invalid_argument("a message is empty")),
        },
    }
}

fn code_status(error: CodeError) -> Status {
    let message = error.to_string();
    match error {
        CodeError::Size(_) | CodeError::NoMemory { .. } | CodeError::NoRoom(_) | CodeError::Grow(_) => {
            Status::resource_exhausted(message)
        }
        CodeError::Archive(error) if error.is_size() => Status::resource_exhausted(message),
        CodeError::Archive(ArchiveError::Io(_))
        | CodeError::Unpack(_)
        | CodeError::Folder(_)
        | CodeError::Io { .. } => Status::internal(message),
        _ => Status::invalid_argument(message),
    }
}
