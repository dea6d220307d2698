//! A whole host: `stokerd` and `stoker-controller` as processes of their own, in a folder of their own.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context as _, bail, ensure};
use hyper_util::rt::TokioIo;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use stoker_proto::v1::decisions_client::DecisionsClient;
use stoker_proto::v1::functions_client::FunctionsClient;
use stoker_proto::v1::invocations_client::InvocationsClient;
use stoker_proto::v1::machines_client::MachinesClient;
use stoker_proto::v1::telemetry_client::TelemetryClient;
use stoker_proto::v1::{self, create_function_request::Part};
use tempfile::TempDir;
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::{ACCOUNT, binary, cache, eventually};

/// The largest message that passes either way: a payload of 6 MiB and what is around it.
const MESSAGE_LIMIT: usize = 8 << 20;

/// A running agent and its controller. Dropped, both are killed and their machines with them.
pub struct Host {
    folder: TempDir,
    agent: Child,
    _controller: Child,
    channel: Channel,
    cgroup: String,
}

/// What a test wants of its host.
pub struct Options {
    /// Machines of the Python runtime in the warming pool.
    pub warming: u32,
    /// What to set in the configuration beside where things are, as `(section, key, value)`.
    pub settings: Vec<(&'static str, &'static str, toml::Value)>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            warming: 1,
            settings: Vec::new(),
        }
    }
}

impl Host {
    /// Starts a host as `options` want it and waits until the agent serves.
    ///
    /// # Errors
    ///
    /// Where the agent ends or does not serve in time, with its log.
    pub async fn start(options: Options) -> anyhow::Result<Self> {
        let folder = TempDir::new().context("making a folder")?;
        let config = configuration(folder.path(), &options)?;
        let controller = Command::new(binary("stoker-controller")?)
            .arg("--json")
            .arg("--listen")
            .arg(format!("unix:{}", folder.path().join("controller.sock").display()))
            .stdin(Stdio::null())
            .stdout(std::fs::File::create(folder.path().join("reports.jsonl"))?)
            .kill_on_drop(true)
            .spawn()
            .context("starting stoker-controller")?;
        let mut agent = spawn_agent(folder.path(), &config)?;
        let channel = match connect(folder.path(), &mut agent).await {
            Ok(channel) => channel,
            Err(error) => return Err(error.context(log_of(folder.path()))),
        };
        let cgroup = cgroup_of(folder.path())?;
        Ok(Self {
            folder,
            agent,
            _controller: controller,
            channel,
            cgroup,
        })
    }

    /// The folder with everything of this host.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The cgroup below which its machines are, a full path.
    pub fn cgroup(&self) -> PathBuf {
        Path::new("/sys/fs/cgroup").join(&self.cgroup)
    }

    /// What the agent has logged.
    pub fn log(&self) -> String {
        log_of(self.folder.path())
    }

    /// `stoker.v1.Functions`
    pub fn functions(&self) -> FunctionsClient<Channel> {
        FunctionsClient::new(self.channel.clone())
    }

    /// `stoker.v1.Invocations`
    pub fn invocations(&self) -> InvocationsClient<Channel> {
        InvocationsClient::new(self.channel.clone())
            .max_decoding_message_size(MESSAGE_LIMIT)
            .max_encoding_message_size(MESSAGE_LIMIT * 2)
    }

    /// `stoker.v1.Machines`
    pub fn machines(&self) -> MachinesClient<Channel> {
        MachinesClient::new(self.channel.clone())
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
        let header = v1::CreateFunctionHeader {
            function: Some(function),
            request_id: String::new(),
        };
        let mut parts = vec![v1::CreateFunctionRequest {
            part: Some(Part::Header(header)),
        }];
        parts.extend(code.chunks(512 << 10).map(|chunk| v1::CreateFunctionRequest {
            part: Some(Part::Chunk(chunk.to_vec().into())),
        }));
        Ok(self
            .functions()
            .create_function(tokio_stream::iter(parts))
            .await?
            .into_inner())
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
        let text = std::fs::read_to_string(self.folder.path().join("reports.jsonl"))?;
        // The last line may be only half written.
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        whole
            .lines()
            .map(|line| serde_json::from_str(line).with_context(|| line.to_owned()))
            .collect()
    }

    /// Tells the agent to stop, as systemd does, and waits until it has.
    ///
    /// # Errors
    ///
    /// Where it did not end, or not well.
    pub async fn stop(mut self) -> anyhow::Result<TempDir> {
        terminate(&self.agent)?;
        let status = tokio::time::timeout(crate::PATIENCE, self.agent.wait())
            .await
            .with_context(|| format!("stokerd did not end; its log:\n{}", log_of(self.folder.path())))??;
        ensure!(
            status.success(),
            "stokerd ended with {status}:\n{}",
            log_of(self.folder.path())
        );
        let left: Vec<_> = machine_cgroups(&self.cgroup())?;
        ensure!(left.is_empty(), "cgroups are left behind: {left:?}");
        Ok(self.folder)
    }
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

/// The agent's configuration in `folder`; returns the file's path.
///
/// # Errors
///
/// Where it can't be written.
pub fn configuration(folder: &Path, options: &Options) -> anyhow::Result<PathBuf> {
    let path = |name: &str| folder.join(name).display().to_string();
    let cached = |name: &str| cache(name).map(|path| path.display().to_string());
    let name = folder
        .file_name()
        .context("the folder has no name")?
        .to_string_lossy()
        .into_owned();
    let mut config = toml::toml! {
        [api]
        [store]
        [code]
        [machines]
        boot_timeout = "60s"
        [pool]
        queue_timeout = "110s"
        init_timeout = "100s"
        [journal]
        [telemetry]
        interval = "500ms"
        [controller]
        [log]
        level = "info,stoker_agent=debug"
    };
    let mut set = |section: &str, key: &str, value: toml::Value| -> anyhow::Result<()> {
        let table = config.get_mut(section).and_then(toml::Value::as_table_mut);
        table
            .with_context(|| format!("no section {section}"))?
            .insert(key.into(), value);
        Ok(())
    };
    set("api", "socket", path("stokerd.sock").into())?;
    set("store", "path", path("store").into())?;
    set("code", "path", path("code").into())?;
    set("machines", "vmm", binary("stoker-vmm")?.display().to_string().into())?;
    set("machines", "kernel", cached("kernel/tuned/vmlinux")?.into())?;
    set("machines", "initramfs", cached("image/initramfs-tuned.cpio")?.into())?;
    set("machines", "image", cached("image/root.erofs")?.into())?;
    set("machines", "run_dir", path("run").into())?;
    set(
        "machines",
        "cgroup",
        format!("stoker-{}", name.trim_start_matches('.')).into(),
    )?;
    let warming = toml::Table::from_iter([("python3.11".to_owned(), i64::from(options.warming).into())]);
    set("pool", "warming", warming.into())?;
    set(
        "controller",
        "address",
        format!("unix:{}", path("controller.sock")).into(),
    )?;
    for (section, key, value) in &options.settings {
        set(section, key, value.clone())?;
    }
    let file = folder.join("stokerd.toml");
    std::fs::write(&file, toml::to_string(&config)?)?;
    Ok(file)
}

/// Starts `stokerd`, its log in `stokerd.log`.
///
/// # Errors
///
/// Where it can't be started.
pub fn spawn_agent(folder: &Path, config: &Path) -> anyhow::Result<Child> {
    let log = std::fs::File::options()
        .create(true)
        .append(true)
        .open(folder.join("stokerd.log"))?;
    Command::new(binary("stokerd")?)
        .arg("--config")
        .arg(config)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .kill_on_drop(true)
        .spawn()
        .context("starting stokerd")
}

/// A connection to a gRPC server on a Unix socket.
///
/// # Errors
///
/// Where nobody serves there.
pub async fn channel(socket: &Path) -> Result<Channel, tonic::transport::Error> {
    let socket = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let endpoint = Endpoint::from_static("http://server");
    endpoint.connect_with_connector(connector).await
}

async fn connect(folder: &Path, agent: &mut Child) -> anyhow::Result<Channel> {
    let socket = folder.join("stokerd.sock");
    eventually("the agent to serve", async || {
        if let Some(status) = agent.try_wait()? {
            bail!("stokerd ended with {status}");
        }
        let Ok(channel) = channel(&socket).await else {
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

/// Sends SIGTERM.
fn terminate(child: &Child) -> anyhow::Result<()> {
    let pid = child.id().context("stokerd has ended already")?;
    kill(Pid::from_raw(pid.try_into()?), Signal::SIGTERM).context("telling stokerd to stop")
}

fn log_of(folder: &Path) -> String {
    std::fs::read_to_string(folder.join("stokerd.log")).unwrap_or_default()
}

fn cgroup_of(folder: &Path) -> anyhow::Result<String> {
    let config: toml::Table = std::fs::read_to_string(folder.join("stokerd.toml"))?.parse()?;
    let cgroup = config
        .get("machines")
        .and_then(|machines| machines.get("cgroup")?.as_str());
    Ok(cgroup.context("no machines.cgroup")?.to_owned())
}

/// The cgroups of machines below `root`.
///
/// # Errors
///
/// Where the folder can't be read for another reason than that it is not there.
pub fn machine_cgroups(root: &Path) -> anyhow::Result<Vec<PathBuf>> {
    match std::fs::read_dir(root.join("machines")) {
        Ok(entries) => entries
            .filter_map(|entry| match entry {
                Ok(entry) if entry.path().is_dir() => Some(Ok(entry.path())),
                Ok(_) => None,
                Err(error) => Some(Err(error.into())),
            })
            .collect(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error.into()),
    }
}
