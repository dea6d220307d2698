//! A whole host: `stokerd` and `stoker-controller` as processes of their own, in a folder of their own.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{bail, ensure};
use hyper_util::rt::TokioIo;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::{Value, json};
use stoker_linux::Cgroup;
use stoker_proto::v1::credits_client::CreditsClient;
use stoker_proto::v1::decisions_client::DecisionsClient;
use stoker_proto::v1::functions_client::FunctionsClient;
use stoker_proto::v1::images_client::ImagesClient;
use stoker_proto::v1::invocations_client::InvocationsClient;
use stoker_proto::v1::logs_client::LogsClient;
use stoker_proto::v1::machines_client::MachinesClient;
use stoker_proto::v1::notifications_client::NotificationsClient;
use stoker_proto::v1::telemetry_client::TelemetryClient;
use stoker_proto::v1::{self, create_function_request::Part};
use stoker_testkit::agent::{Processes, Setting};
use stoker_testkit::{BIN_DIR, CACHE};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};

use crate::{ACCOUNT, eventually, named};

/// The largest message that passes either way: a payload of 6 MiB and what is around it.
const MESSAGE_LIMIT: usize = 8 << 20;

/// A running agent and its controller. Dropped, both are killed and their machines with them.
pub struct Host {
    processes: Processes,
    channel: Channel,
}

/// What a test wants of its host. A machine takes seconds to boot in an emulated host, and two of them twice as long: who
/// needs none in the pool is answered sooner.
#[derive(Default)]
pub struct Options {
    /// Machines of the Python runtime in the warming pool.
    pub warming: u32,
    /// What to set in the configuration beside where things are.
    pub settings: Vec<Setting>,
}

// === impl Options ===

impl Options {
    /// So many machines in the warming pool, and nothing else.
    pub fn warming(machines: u32) -> Self {
        Self {
            warming: machines,
            settings: Vec::new(),
        }
    }
}

// === impl Host ===

impl Host {
    /// Starts a host as `options` want it and waits until the agent serves.
    ///
    /// # Errors
    ///
    /// Where the agent ends or does not serve in time, with its log.
    pub async fn start(options: Options) -> anyhow::Result<Self> {
        let mut processes = spawn(options)?;
        match connect(&mut processes).await {
            Ok(channel) => Ok(Self { processes, channel }),
            Err(error) => Err(error.context(processes.log())),
        }
    }

    /// The folder with everything of this host.
    pub fn folder(&self) -> &Path {
        self.processes.folder()
    }

    /// The agent's process id.
    ///
    /// # Errors
    ///
    /// Never, on Linux.
    pub fn pid(&self) -> anyhow::Result<Pid> {
        self.processes.pid()
    }

    /// The cgroup below which its machines are.
    pub fn cgroup(&self) -> &Cgroup {
        self.processes.cgroup()
    }

    /// The cgroups of the machines that there are.
    ///
    /// # Errors
    ///
    /// Where they can't be listed.
    pub fn machine_cgroups(&self) -> anyhow::Result<Vec<Cgroup>> {
        self.processes.machine_cgroups()
    }

    /// `stoker.v1.Functions`
    pub fn functions(&self) -> FunctionsClient<Channel> {
        FunctionsClient::new(self.channel.clone())
    }

    /// `stoker.v1.Images`
    pub fn images(&self) -> ImagesClient<Channel> {
        ImagesClient::new(self.channel.clone())
    }

    /// `stoker.v1.Invocations`
    pub fn invocations(&self) -> InvocationsClient<Channel> {
        InvocationsClient::new(self.channel.clone())
            .max_decoding_message_size(MESSAGE_LIMIT)
            .max_encoding_message_size(MESSAGE_LIMIT * 2)
    }

    /// `stoker.v1.Credits`
    pub fn credits(&self) -> CreditsClient<Channel> {
        CreditsClient::new(self.channel.clone())
    }

    /// `stoker.v1.Logs`
    pub fn logs(&self) -> LogsClient<Channel> {
        LogsClient::new(self.channel.clone())
    }

    /// `stoker.v1.Machines`
    pub fn machines(&self) -> MachinesClient<Channel> {
        MachinesClient::new(self.channel.clone())
    }

    /// `stoker.v1.Notifications`
    pub fn notifications(&self) -> NotificationsClient<Channel> {
        NotificationsClient::new(self.channel.clone())
    }

    /// `stoker.v1.Telemetry`
    pub fn telemetry(&self) -> TelemetryClient<Channel> {
        TelemetryClient::new(self.channel.clone())
    }

    /// Creates a function whose zip is `code`.
    ///
    /// # Errors
    ///
    /// What the agent answered.
    pub async fn create(&self, function: v1::Function, code: &[u8]) -> Result<v1::Function, Status> {
        self.create_with(function, code, &[]).await
    }

    /// Creates a function whose zip is `code`, with layers.
    ///
    /// # Errors
    ///
    /// What the agent answered.
    pub async fn create_with(
        &self,
        function: v1::Function,
        code: &[u8],
        layers: &[Vec<u8>],
    ) -> Result<v1::Function, Status> {
        let mut parts = creation(function, "", code);
        for layer in layers {
            parts.push(request(Part::Layer(v1::LayerHeader {})));
            parts.extend(chunks(layer));
        }
        let parts = tokio_stream::iter(parts);
        Ok(self.functions().create_function(parts).await?.into_inner())
    }

    /// Invokes a function of [`ACCOUNT`] with a JSON payload.
    ///
    /// # Errors
    ///
    /// What the agent answered.
    pub async fn invoke(&self, id: &str, payload: &Value) -> Result<v1::InvokeResponse, Status> {
        self.invoke_with(v1::InvokeRequest {
            name: format!("{ACCOUNT}/functions/{id}"),
            payload: payload.to_string().into(),
            ..Default::default()
        })
        .await
    }

    /// Invokes what the request says.
    ///
    /// # Errors
    ///
    /// What the agent answered.
    pub async fn invoke_with(&self, request: v1::InvokeRequest) -> Result<v1::InvokeResponse, Status> {
        Ok(self.invocations().invoke(request).await?.into_inner())
    }

    /// Invokes what the request says, and has the answer as it comes.
    ///
    /// # Errors
    ///
    /// What the agent answered.
    pub async fn stream(
        &self,
        request: v1::InvokeRequest,
    ) -> Result<Streaming<v1::InvokeWithResponseStreamResponse>, Status> {
        let answer = self.invocations().invoke_with_response_stream(request).await?;
        Ok(answer.into_inner())
    }

    /// Invokes a function of [`ACCOUNT`] that must answer, and reads its answer.
    ///
    /// # Errors
    ///
    /// Where it did not answer.
    pub async fn answer(&self, id: &str, payload: &Value) -> anyhow::Result<(Value, v1::InvokeResponse)> {
        let response = self.invoke(id, payload).await?;
        ensure!(
            response.function_error.is_empty(),
            "{id} failed: {}\nits log: {}",
            String::from_utf8_lossy(&response.payload),
            String::from_utf8_lossy(&response.log),
        );
        Ok((serde_json::from_slice(&response.payload)?, response))
    }

    /// Every machine there is.
    ///
    /// # Errors
    ///
    /// What the agent answered.
    pub async fn list_machines(&self, include_ended: bool) -> Result<Vec<v1::Machine>, Status> {
        let request = v1::ListMachinesRequest {
            include_ended,
            page_size: 1000,
            ..Default::default()
        };
        Ok(self.machines().list_machines(request).await?.into_inner().machines)
    }

    /// Every container there is.
    ///
    /// # Errors
    ///
    /// What the agent answered.
    pub async fn list_containers(&self) -> Result<Vec<v1::Container>, Status> {
        let request = v1::ListContainersRequest {
            parent: "machines/-".into(),
            page_size: 1000,
            ..Default::default()
        };
        Ok(self.machines().list_containers(request).await?.into_inner().containers)
    }

    /// What was decided about a machine, container or request, in order.
    ///
    /// # Errors
    ///
    /// What the agent answered.
    pub async fn why(&self, subject: &str) -> Result<Vec<v1::Decision>, Status> {
        let request = v1::ListDecisionsRequest {
            subject: subject.to_owned(),
            page_size: 1000,
            ..Default::default()
        };
        let mut client = DecisionsClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_LIMIT);
        Ok(client.list_decisions(request).await?.into_inner().decisions)
    }

    /// What the controller has heard so far, an event a value.
    ///
    /// # Errors
    ///
    /// Where the controller printed what is no JSON.
    pub fn reports(&self) -> anyhow::Result<Vec<Value>> {
        self.processes.reports()
    }

    /// Kills the controller: what is reported from now on waits.
    pub fn kill_controller(&mut self) {
        self.processes.kill_controller();
    }

    /// What the agent has logged.
    pub fn log(&self) -> String {
        self.processes.log()
    }

    /// When the agent was last started.
    pub fn started(&self) -> Instant {
        self.processes.started()
    }

    /// Ends the agent alone by a signal and starts it again; waits until it serves.
    ///
    /// # Errors
    ///
    /// Where it does not end, or does not serve again in time, with its log.
    pub async fn restart(self, signal: Signal) -> anyhow::Result<Self> {
        self.respawn(signal).await?.serving().await
    }

    /// Lets the host lose its power and starts it again, with what its disk has; waits until the agent serves.
    ///
    /// # Errors
    ///
    /// Where it can't be taken down, or does not serve again in time, with its log.
    pub async fn reboot(self, id: String) -> anyhow::Result<Self> {
        let rebooted = self.blocking(move |processes| processes.reboot(&id));
        rebooted.await?.serving().await
    }

    /// Waits until the agent serves.
    ///
    /// # Errors
    ///
    /// Where it ends or does not serve in time, with its log.
    pub async fn serving(mut self) -> anyhow::Result<Self> {
        match connect(&mut self.processes).await {
            Ok(channel) => Ok(Self { channel, ..self }),
            Err(error) => Err(error.context(self.processes.log())),
        }
    }

    /// Ends the agent alone by a signal and starts it again, and does not wait until it serves.
    ///
    /// # Errors
    ///
    /// Where it does not end, or can't be started.
    pub async fn respawn(self, signal: Signal) -> anyhow::Result<Self> {
        self.blocking(move |processes| processes.restart(signal)).await
    }

    /// Puts another build in the place of `stokerd`; the next start is of that one.
    ///
    /// # Errors
    ///
    /// Where it can't be copied.
    pub async fn upgrade(self, build: PathBuf) -> anyhow::Result<Self> {
        self.blocking(move |processes| processes.upgrade(&build)).await
    }

    async fn blocking(
        self,
        change: impl FnOnce(&mut Processes) -> anyhow::Result<()> + Send + 'static,
    ) -> anyhow::Result<Self> {
        let Self { mut processes, channel } = self;
        let changed = tokio::task::spawn_blocking(move || change(&mut processes).map(|()| processes));
        Ok(Self {
            processes: changed.await??,
            channel,
        })
    }

    /// Tells the agent to end its machines and itself, and waits until it has. Returns what it leaves.
    ///
    /// # Errors
    ///
    /// Where it did not end, or not well.
    pub async fn stop(self) -> anyhow::Result<Processes> {
        let mut processes = self.processes;
        tokio::task::spawn_blocking(move || processes.stop().map(|()| processes)).await?
    }
}

/// Starts an agent and its controller, and does not wait until the agent serves.
///
/// # Errors
///
/// Where a program can't be started, or `cargo xtask test` did not say where it is.
pub fn spawn(options: Options) -> anyhow::Result<Processes> {
    let mut settings: Vec<Setting> = vec![
        ("machines.boot_timeout", "60s".into()),
        ("pool.queue_timeout", "110s".into()),
        ("pool.init_timeout", "100s".into()),
        ("pool.warming", json!({ "python3.11": options.warming })),
        ("telemetry.interval", "500ms".into()),
        ("log.level", "info,stoker_agent=debug".into()),
    ];
    settings.extend(options.settings);
    Processes::start(&named(BIN_DIR)?, &named(CACHE)?, &settings)
}

/// The messages that create a function whose zip is `code`.
pub fn creation(function: v1::Function, request_id: &str, code: &[u8]) -> Vec<v1::CreateFunctionRequest> {
    let header = v1::CreateFunctionHeader {
        function: Some(function),
        request_id: request_id.to_owned(),
    };
    std::iter::once(request(Part::Header(header)))
        .chain(chunks(code))
        .collect()
}

fn chunks(zip: &[u8]) -> impl Iterator<Item = v1::CreateFunctionRequest> {
    zip.chunks(512 << 10)
        .map(|chunk| request(Part::Chunk(chunk.to_vec().into())))
}

fn request(part: Part) -> v1::CreateFunctionRequest {
    v1::CreateFunctionRequest { part: Some(part) }
}

/// A function of [`ACCOUNT`] in Python, 128 MiB, whose handler is `app.handler`.
pub fn python_function(id: &str) -> v1::Function {
    v1::Function {
        name: format!("{ACCOUNT}/functions/{id}"),
        runtime: "python3.11".into(),
        handler: "app.handler".into(),
        timeout: Some(prost_types::Duration { seconds: 60, nanos: 0 }),
        amount: Some(v1::Amount {
            cpu_millis: 500,
            memory_mib: 128,
        }),
        environment: HashMap::new(),
        ..Default::default()
    }
}

/// A connection to a gRPC server on a Unix socket.
///
/// # Errors
///
/// Where nobody serves there.
pub async fn channel(socket: &Path) -> Result<Channel, tonic::transport::Error> {
    let socket = socket.to_owned();
    let connector = tower::service_fn(move |_| connect_to(socket.clone()));
    Endpoint::from_static("http://server")
        .connect_with_connector(connector)
        .await
}

/// The same, connected at its first call, and again at the first after it broke.
pub fn lasting_channel(socket: &Path) -> Channel {
    let socket = socket.to_owned();
    let connector = tower::service_fn(move |_| connect_to(socket.clone()));
    Endpoint::from_static("http://server").connect_with_connector_lazy(connector)
}

async fn connect_to(socket: PathBuf) -> std::io::Result<TokioIo<UnixStream>> {
    UnixStream::connect(socket).await.map(TokioIo::new)
}

async fn connect(processes: &mut Processes) -> anyhow::Result<Channel> {
    eventually("the agent to serve", async || {
        if let Some(status) = processes.ended()? {
            bail!("stokerd ended with {status}");
        }
        let Ok(channel) = channel(&processes.path("stokerd.sock")).await else {
            return Ok(None);
        };
        match MachinesClient::new(channel.clone())
            .list_machines(v1::ListMachinesRequest::default())
            .await
        {
            Ok(_) => Ok(Some(channel)),
            Err(status) if status.code() == Code::Unavailable => Ok(None),
            Err(status) => Err(status.into()),
        }
    })
    .await
}
