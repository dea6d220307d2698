//! An agent with one machine, which is made up: it uses half a CPU, programs and ports echo, and what is asked is remembered.

mod calls;

use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use stoker_agent::api::errors::{aborted, busy, not_found, unavailable};
use stoker_proto::limits::{STDIN_WINDOW_BYTES, STDIN_WINDOW_KEY};
use stoker_proto::v1;
use stoker_proto::v1::credits_server::{Credits, CreditsServer};
use stoker_proto::v1::logs_server::{Logs, LogsServer};
use stoker_proto::v1::machines_server::{Machines, MachinesServer};
use stoker_proto::v1::telemetry_server::{Telemetry, TelemetryServer};
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::{IntervalStream, ReceiverStream, UnixListenerStream};
use tokio_stream::{Stream, StreamExt as _};
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};
use v1::exec_request::Part as Asked;
use v1::forward_port_request::Part as PortPart;

use crate::common::socket;

pub(crate) const MACHINE: &str = "machines/01JABCDEFGHJKMNPQRSTVWXYZ0";

/// The ports that something listens on: what is sent comes back; how much was sent is told once there is no more; what is sent is
/// taken, while the port's side has ended at once; and nothing is even taken.
pub(crate) const ECHO: u32 = 7;
pub(crate) const COUNT: u32 = 8;
pub(crate) const TAKE: u32 = 9;
pub(crate) const CLOSED: u32 = 10;

/// What was asked.
#[derive(Debug, Default)]
pub(crate) struct Heard {
    pub(crate) launches: Vec<v1::LaunchMachineRequest>,
    pub(crate) resizes: Vec<v1::ResizeMachineRequest>,
    pub(crate) stops: Vec<v1::StopMachineRequest>,
    pub(crate) logs: Vec<v1::ReadLogsRequest>,
    pub(crate) starts: Vec<v1::ExecStart>,
    /// How many bytes the port that takes all was sent, and the program that reads nothing.
    pub(crate) taken: usize,
    pub(crate) unread: usize,
    pub(crate) thresholds: Vec<v1::Threshold>,
    /// What somebody else adds when thresholds are to be replaced by who has read them.
    pub(crate) added: Option<v1::Threshold>,
}

/// An agent; clones are the same.
#[derive(Clone, Default)]
pub(crate) struct Fake(Arc<Mutex<Heard>>);

// === impl Fake ===

impl Fake {
    /// Serves on the socket of a folder, as long as the task runs.
    pub(crate) fn serve(folder: &Path) -> (Self, JoinHandle<Result<(), tonic::transport::Error>>) {
        let fake = Self::default();
        let incoming = UnixListenerStream::new(UnixListener::bind(socket(folder)).unwrap());
        let router = Server::builder()
            .add_service(MachinesServer::new(fake.clone()))
            .add_service(CreditsServer::new(fake.clone()))
            .add_service(LogsServer::new(fake.clone()))
            .add_service(TelemetryServer::new(fake.clone()));
        (fake, tokio::spawn(router.serve_with_incoming(incoming)))
    }

    pub(crate) fn heard(&self) -> MutexGuard<'_, Heard> {
        self.0.lock().unwrap()
    }

    fn machine(&self) -> v1::Machine {
        let create_time = SystemTime::now() - Duration::from_secs(600);
        let thresholds = self.heard().thresholds.clone();
        v1::Machine {
            name: MACHINE.into(),
            state: v1::machine::State::Active.into(),
            account: "accounts/acme".into(),
            create_time: Some(create_time.into()),
            launched: Some(v1::Launched {
                balloon_mib: 0,
                image: "accounts/acme/images/web".into(),
                digest: "sha256:77".into(),
                size: size(2, 1024),
                taken: size(2, 1024),
                ceiling: size(4, 2048),
                thresholds_etag: etag(&thresholds),
                thresholds,
                metrics: [("cpu_use".to_owned(), 25.0)].into(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }
}

pub(crate) fn size(vcpus: u32, memory_mib: u32) -> Option<v1::MachineSize> {
    Some(v1::MachineSize {
        vcpus,
        cpu_millis: vcpus * 1000,
        memory_mib,
    })
}

/// `memory_use > 90%: memory +256MiB`
pub(crate) fn threshold() -> v1::Threshold {
    v1::Threshold {
        metric: "memory_use".into(),
        comparison: v1::threshold::Comparison::Above.into(),
        value: 90.0,
        resource: v1::threshold::Resource::Memory.into(),
        direction: v1::threshold::Direction::Grow.into(),
        change: Some(v1::threshold::Change::By(256)),
        ..Default::default()
    }
}

fn etag(thresholds: &[v1::Threshold]) -> String {
    format!("{thresholds:?}")
}

fn resize() -> v1::Resize {
    v1::Resize {
        time: Some((SystemTime::now() - Duration::from_secs(300)).into()),
        before: size(1, 1024),
        asked: size(2, 1024),
        taken: size(2, 1024),
        duration: Some(prost_types::Duration { seconds: 1, nanos: 0 }),
        reason: "cpu_use was above 80% for 10.0 s".into(),
        metrics: [("cpu_use".to_owned(), 100.0)].into(),
    }
}

#[tonic::async_trait]
impl Machines for Fake {
    async fn launch_machine(
        &self,
        request: Request<v1::LaunchMachineRequest>,
    ) -> Result<Response<v1::Machine>, Status> {
        let request = request.into_inner();
        let thresholds = request.thresholds.clone();
        let is_first = {
            let mut heard = self.heard();
            heard.launches.push(request);
            heard.thresholds = thresholds;
            heard.launches.len() == 1
        };
        match is_first {
            true => Err(busy("host", "try again", Duration::from_millis(10))),
            false => Ok(Response::new(self.machine())),
        }
    }

    async fn resize_machine(
        &self,
        request: Request<v1::ResizeMachineRequest>,
    ) -> Result<Response<v1::ResizeMachineResponse>, Status> {
        self.heard().resizes.push(request.into_inner());
        let resize = Some(resize());
        Ok(Response::new(v1::ResizeMachineResponse { resize }))
    }

    async fn set_thresholds(
        &self,
        request: Request<v1::SetThresholdsRequest>,
    ) -> Result<Response<v1::Machine>, Status> {
        let request = request.into_inner();
        assert_eq!(request.name, MACHINE);
        let present = self.machine().launched.unwrap_or_default().thresholds_etag;
        let mut heard = self.heard();
        let added = heard.added.take_if(|_| !request.etag.is_empty());
        let is_old = !request.etag.is_empty() && (added.is_some() || request.etag != present);
        heard.thresholds.extend(added);
        if is_old {
            return Err(aborted("THRESHOLDS_CHANGED", "they were changed"));
        }
        heard.thresholds = request.thresholds;
        drop(heard);
        Ok(Response::new(self.machine()))
    }

    async fn list_resizes(
        &self,
        request: Request<v1::ListResizesRequest>,
    ) -> Result<Response<v1::ListResizesResponse>, Status> {
        assert_eq!(request.into_inner().parent, MACHINE);
        Ok(Response::new(v1::ListResizesResponse {
            resizes: vec![resize()],
            next_page_token: String::new(),
        }))
    }

    async fn stop_machine(&self, request: Request<v1::StopMachineRequest>) -> Result<Response<v1::Machine>, Status> {
        self.heard().stops.push(request.into_inner());
        let end = v1::MachineEnd {
            reason: v1::machine_end::Reason::Stopped.into(),
            detail: "user 0 asked".into(),
            ..Default::default()
        };
        Ok(Response::new(v1::Machine {
            end: Some(end),
            ..self.machine()
        }))
    }

    type ExecStream = ReceiverStream<Result<v1::ExecResponse, Status>>;

    async fn exec(&self, request: Request<Streaming<v1::ExecRequest>>) -> Result<Response<Self::ExecStream>, Status> {
        let mut input = request.into_inner();
        let first = input.message().await?.and_then(|message| message.part);
        let Some(Asked::Start(start)) = first else {
            return Err(Status::invalid_argument("no start"));
        };
        if start.name != MACHINE {
            return Err(not_found("machine", &start.name));
        }
        self.heard().starts.push(start.clone());
        let (to, answers) = mpsc::channel(1);
        let mut response = Response::new(ReceiverStream::new(answers));
        // That one is in a guest that grants nothing.
        if start.command != ["count"] {
            let headers = response.metadata_mut();
            headers.insert(STDIN_WINDOW_KEY, STDIN_WINDOW_BYTES.into());
        }
        tokio::spawn(calls::run(self.clone(), start, input, to));
        Ok(response)
    }

    type ForwardPortStream = ReceiverStream<Result<v1::ForwardPortResponse, Status>>;

    async fn forward_port(
        &self,
        request: Request<Streaming<v1::ForwardPortRequest>>,
    ) -> Result<Response<Self::ForwardPortStream>, Status> {
        let mut data = request.into_inner();
        let first = data.message().await?.and_then(|message| message.part);
        let Some(PortPart::Start(start)) = first else {
            return Err(Status::invalid_argument("no start"));
        };
        assert_eq!(start.name, MACHINE);
        if ![ECHO, COUNT, TAKE, CLOSED].contains(&start.port) {
            return Err(unavailable("NOT_LISTENING", "nobody listens there"));
        }
        let (to, answers) = mpsc::channel(1);
        tokio::spawn(calls::connect(self.clone(), start.port, data, to));
        Ok(Response::new(ReceiverStream::new(answers)))
    }

    async fn get_machine(&self, request: Request<v1::GetMachineRequest>) -> Result<Response<v1::Machine>, Status> {
        let name = request.into_inner().name;
        match name == MACHINE {
            true => Ok(Response::new(self.machine())),
            false => Err(not_found("machine", &name)),
        }
    }

    async fn list_machines(
        &self,
        _: Request<v1::ListMachinesRequest>,
    ) -> Result<Response<v1::ListMachinesResponse>, Status> {
        Ok(Response::new(v1::ListMachinesResponse {
            machines: vec![self.machine()],
            next_page_token: String::new(),
        }))
    }

    async fn list_containers(
        &self,
        _: Request<v1::ListContainersRequest>,
    ) -> Result<Response<v1::ListContainersResponse>, Status> {
        Err(Status::unimplemented("nobody asks"))
    }
}

#[tonic::async_trait]
impl Credits for Fake {
    async fn list_machine_credits(
        &self,
        request: Request<v1::ListMachineCreditsRequest>,
    ) -> Result<Response<v1::ListMachineCreditsResponse>, Status> {
        assert_eq!(request.into_inner().parent, "machines/-");
        let mut credits = v1::MachineCredits {
            name: format!("{MACHINE}/credits"),
            balance: 5.5,
            launch: 0.25,
            time_to_empty: Some(prost_types::Duration { seconds: 383, nanos: 0 }),
            ..Default::default()
        };
        credits.set_class(v1::machine_credits::Class::High);
        Ok(Response::new(v1::ListMachineCreditsResponse {
            machine_credits: vec![credits],
            next_page_token: String::new(),
        }))
    }

    async fn get_machine_credits(
        &self,
        request: Request<v1::GetMachineCreditsRequest>,
    ) -> Result<Response<v1::MachineCredits>, Status> {
        Err(not_found("account of credits", &request.into_inner().name))
    }

    async fn update_machine_credits(
        &self,
        _: Request<v1::UpdateMachineCreditsRequest>,
    ) -> Result<Response<v1::MachineCredits>, Status> {
        Err(Status::unimplemented("nobody asks"))
    }

    async fn grant_machine_credits(
        &self,
        _: Request<v1::GrantMachineCreditsRequest>,
    ) -> Result<Response<v1::MachineCredits>, Status> {
        Err(Status::unimplemented("nobody asks"))
    }
}

#[tonic::async_trait]
impl Logs for Fake {
    type ReadLogsStream = ReceiverStream<Result<v1::ReadLogsResponse, Status>>;

    async fn read_logs(&self, request: Request<v1::ReadLogsRequest>) -> Result<Response<Self::ReadLogsStream>, Status> {
        self.heard().logs.push(request.into_inner());
        let (to, lines) = mpsc::channel(1);
        let line = v1::LogLine {
            text: "it serves".into(),
            ..Default::default()
        };
        let _ = to.try_send(Ok(v1::ReadLogsResponse { lines: vec![line] }));
        Ok(Response::new(ReceiverStream::new(lines)))
    }
}

#[tonic::async_trait]
impl Telemetry for Fake {
    type WatchUseStream = Pin<Box<dyn Stream<Item = Result<v1::UseSamples, Status>> + Send>>;

    async fn watch_use(&self, _: Request<v1::WatchUseRequest>) -> Result<Response<Self::WatchUseStream>, Status> {
        let begun = SystemTime::now();
        let ticks = IntervalStream::new(tokio::time::interval(Duration::from_millis(100)));
        let samples = ticks.map(move |_| {
            let now = SystemTime::now();
            let since = now.duration_since(begun).unwrap_or_default();
            let usage = v1::Usage {
                cpu_ns: u64::try_from(since.as_nanos()).unwrap() / 2,
                memory_bytes: 64 << 20,
                measure_time: Some(now.into()),
                ..Default::default()
            };
            Ok(v1::UseSamples {
                samples: vec![v1::UseSample {
                    name: MACHINE.into(),
                    account: "accounts/acme".into(),
                    usage: Some(usage),
                    ..Default::default()
                }],
                more: false,
            })
        });
        Ok(Response::new(Box::pin(samples)))
    }
}
