//! A `stoker-init` that serves containers on this host, and what the agent would ask of it.

#![allow(dead_code, reason = "each test program uses some of it")]

mod drive;

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sha2::{Digest as _, Sha256};
use stoker_proto::guest::guest_client::GuestClient;
use stoker_proto::guest::put_code_request::Part;
use stoker_proto::guest::{
    CreateContainerRequest, CreateContainerResponse, InvokeRequest, InvokeResponse, PutCodeHeader, PutCodeRequest,
    StopContainerRequest,
};
use stoker_proto::v1::Amount;
use tokio::net::{UnixListener, UnixStream};
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

pub(crate) use drive::Drive;

/// More than anything takes in an emulated host that is busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A running `stoker-init`, and the agent's end of its connection.
pub(crate) struct Guest {
    pub(crate) client: GuestClient<Channel>,
    process: Child,
    drive: Option<Drive>,
    launched_from: Option<Drive>,
    folder: tempfile::TempDir,
    listener: UnixListener,
}

/// A function to be run.
#[derive(Clone)]
pub(crate) struct Function {
    pub(crate) runtime: &'static str,
    pub(crate) handler: &'static str,
    pub(crate) zip: Vec<u8>,
    pub(crate) layers: Vec<Vec<u8>>,
    pub(crate) environment: Vec<(&'static str, &'static str)>,
    pub(crate) amount: Amount,
    pub(crate) init_timeout: Duration,
    pub(crate) freeze: bool,
    pub(crate) scratch_mib: u32,
    pub(crate) drive_mib: u32,
}

// === impl Guest ===

impl Guest {
    /// Starts one and waits for it to dial.
    pub(crate) async fn start() -> Self {
        Self::start_on(tempfile::tempdir_in("/run").unwrap(), image(), None, None).await
    }

    /// The same in a machine that was launched from the image in this file, with a scratch drive of so many MiB or none.
    pub(crate) async fn start_launched(file: &Path, scratch_mib: Option<u32>) -> Self {
        let folder = tempfile::tempdir_in("/run").unwrap();
        let drive = scratch_mib.map(Drive::make);
        Self::start_on(folder, image(), drive, Some(Drive::of(file))).await
    }

    /// The same with a scratch drive of so many MiB.
    pub(crate) async fn start_with_drive(mib: u32) -> Self {
        let folder = tempfile::tempdir_in("/run").unwrap();
        let drive = Drive::make(mib);
        Self::start_on(folder, image(), Some(drive), None).await
    }

    /// The same where the image has some files more: name, permissions, content.
    pub(crate) async fn start_with(files: &[(&str, u32, &[u8])]) -> Self {
        let folder = tempfile::tempdir_in("/run").unwrap();
        let (layer, on) = (folder.path().join("layer"), folder.path().join("image"));
        for (name, mode, content) in files {
            let path = layer.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, content).unwrap();
            std::fs::set_permissions(&path, Permissions::from_mode(*mode)).unwrap();
        }
        std::fs::create_dir(&on).unwrap();
        let layers = format!("lowerdir={}:{}", layer.display(), image().display());
        let mounted = Command::new("mount")
            .args(["-t", "overlay", "-o", &layers, "overlay"])
            .arg(&on)
            .status()
            .unwrap();
        assert!(mounted.success(), "cannot mount {layers}");
        Self::start_on(folder, &on, None, None).await
    }

    async fn start_on(
        folder: tempfile::TempDir,
        image: &Path,
        drive: Option<Drive>,
        launched_from: Option<Drive>,
    ) -> Self {
        let socket = folder.path().join("agent");
        let listener = UnixListener::bind(&socket).unwrap();
        let process = Command::new(env!("CARGO_BIN_EXE_stoker-init"))
            .args(["serve", "--socket"])
            .arg(&socket)
            .arg("--image")
            .arg(image)
            .args(
                drive
                    .iter()
                    .flat_map(|drive| ["--scratch".as_ref(), drive.device().as_os_str()]),
            )
            .args(
                launched_from
                    .iter()
                    .flat_map(|drive| ["--launched-from".as_ref(), drive.device().as_os_str()]),
            )
            .spawn()
            .unwrap();
        let (stream, _) = tokio::time::timeout(PATIENCE, listener.accept())
            .await
            .expect("stoker-init did not dial")
            .unwrap();
        Self {
            client: client(stream, launched_from.is_some()).await,
            process,
            drive,
            launched_from,
            folder,
            listener,
        }
    }

    /// As an agent that was restarted: drops the connection and takes the next.
    pub(crate) async fn reconnect(&mut self) {
        // The old connection ends with its last client.
        let (side, _other) = UnixStream::pair().unwrap();
        let launched = self.launched_from.is_some();
        self.client = client(side, launched).await;
        let (stream, _) = tokio::time::timeout(PATIENCE, self.listener.accept())
            .await
            .expect("stoker-init did not dial again")
            .unwrap();
        self.client = client(stream, launched).await;
    }

    pub(crate) fn drive(&self) -> &Drive {
        self.drive.as_ref().unwrap()
    }

    /// Where it has mounted its drive.
    pub(crate) fn drive_folder(&self) -> PathBuf {
        self.folder.path().join("agent.d/scratch")
    }

    /// Resident memory of the process itself, in KiB.
    pub(crate) fn resident_kib(&self) -> u64 {
        stoker_linux::memory::resident(self.process.id()).unwrap() >> 10
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// CPU time that the thread that serves has used (`schedstat` of proc(5)).
    pub(crate) fn served(&self) -> Duration {
        let told = std::fs::read_to_string(format!("/proc/{}/schedstat", self.process.id())).unwrap();
        Duration::from_nanos(told.split(' ').next().unwrap().parse().unwrap())
    }

    /// Brings code in. Its SHA-256.
    pub(crate) async fn put_code(&mut self, zip: &[u8]) -> Result<String, Status> {
        let sha256 = digest(zip);
        self.put_code_as(&sha256, zip).await.map(|_| sha256)
    }

    /// Brings code in under a name. Whether it was there.
    pub(crate) async fn put_code_as(&mut self, sha256: &str, zip: &[u8]) -> Result<bool, Status> {
        let header = Part::Header(PutCodeHeader {
            sha256: sha256.to_owned(),
            size_bytes: zip.len() as u64,
            drive_mib: 0,
        });
        let chunks: Vec<Part> = zip
            .chunks(1 << 20)
            .map(|chunk| Part::Chunk(chunk.to_vec().into()))
            .collect();
        let parts = std::iter::once(header)
            .chain(chunks)
            .map(|part| PutCodeRequest { part: Some(part) });
        let response = self
            .client
            .put_code(tokio_stream::iter(parts.collect::<Vec<_>>()))
            .await?;
        Ok(response.into_inner().present)
    }

    /// Announces code and brings none.
    pub(crate) async fn put_header(&mut self, header: PutCodeHeader) -> Result<(), Status> {
        let part = Some(Part::Header(header));
        let put = self.client.put_code(tokio_stream::once(PutCodeRequest { part })).await;
        put.map(drop)
    }

    /// Brings the code in and makes a container of it.
    pub(crate) async fn create(&mut self, function: &Function) -> (String, CreateContainerResponse) {
        let request = self.creation(function).await;
        let id = request.id.clone();
        let response = self.client.create_container(request).await.unwrap();
        (id, response.into_inner())
    }

    /// Brings the code in; what to ask for then.
    pub(crate) async fn creation(&mut self, function: &Function) -> CreateContainerRequest {
        let code_sha256 = self.put_code(&function.zip).await.unwrap();
        let mut layers_sha256 = Vec::new();
        for layer in &function.layers {
            layers_sha256.push(self.put_code(layer).await.unwrap());
        }
        CreateContainerRequest {
            id: new_id(),
            function_name: "accounts/acme/functions/trial".to_owned(),
            runtime: function.runtime.to_owned(),
            handler: function.handler.to_owned(),
            environment: function
                .environment
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect(),
            amount: Some(function.amount),
            code_sha256,
            account: "acme".to_owned(),
            init_timeout: Some(function.init_timeout.try_into().unwrap()),
            timeout: None,
            freeze: Some(function.freeze),
            scratch_mib: function.scratch_mib,
            layers_sha256,
            drive_mib: function.drive_mib,
        }
    }

    /// Makes a container that must come to life.
    pub(crate) async fn container(&mut self, function: &Function) -> String {
        let (id, response) = self.create(function).await;
        assert!(response.error.is_none(), "{response:?}");
        id
    }

    pub(crate) async fn invoke(&mut self, container: &str, event: serde_json::Value) -> InvokeResponse {
        self.invoke_within(container, event, PATIENCE).await.unwrap()
    }

    pub(crate) async fn invoke_within(
        &mut self,
        container: &str,
        event: serde_json::Value,
        timeout: Duration,
    ) -> Result<InvokeResponse, Status> {
        invoke(&mut self.client, request(container, event, timeout)).await
    }

    pub(crate) async fn stop(&mut self, container: &str) -> Result<(), Status> {
        let id = container.to_owned();
        self.client.stop_container(StopContainerRequest { id }).await.map(drop)
    }
}

/// An invocation that was not asked for before.
pub(crate) fn request(container: &str, event: serde_json::Value, timeout: Duration) -> InvokeRequest {
    InvokeRequest {
        container: container.to_owned(),
        request_id: new_id(),
        payload: event.to_string().into(),
        timeout: Some(timeout.try_into().unwrap()),
        call: 7,
        name: new_id(),
        ..Default::default()
    }
}

/// One invocation on a stream of its own. One that was not begun is FAILED_PRECONDITION.
pub(crate) async fn invoke(
    client: &mut GuestClient<Channel>,
    request: InvokeRequest,
) -> Result<InvokeResponse, Status> {
    let call = request.call;
    let mut answers = client.invoke(tokio_stream::once(request)).await?.into_inner();
    let answer = answers.message().await?.expect("an answer");
    assert_eq!(answer.call, call);
    if answer.not_begun.is_empty() {
        Ok(answer)
    } else {
        Err(Status::failed_precondition(answer.not_begun))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Takes its containers and mounts with it.
        if let Ok(pid) = self.process.id().try_into() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        let _ = self.process.wait();
        let image = self.folder.path().join("image");
        if image.exists() {
            let _ = Command::new("umount").arg("--lazy").arg(image).status();
        }
    }
}

async fn client(stream: UnixStream, launched: bool) -> GuestClient<Channel> {
    let mut stream = Some(stream);
    let mut endpoint = Endpoint::from_static("http://guest");
    if launched {
        // As the agent: what nobody reads of one call keeps no other waiting.
        endpoint = endpoint
            .initial_stream_window_size(256 << 10)
            .initial_connection_window_size(32 << 20);
    }
    let channel = endpoint
        .connect_with_connector(tower::service_fn(move |_| {
            let stream = stream
                .take()
                .ok_or_else(|| std::io::Error::other("the connection ended"));
            async move { stream.map(TokioIo::new) }
        }))
        .await
        .unwrap();
    GuestClient::new(channel)
        .max_decoding_message_size(16 << 20)
        .max_encoding_message_size(16 << 20)
}

// === impl Function ===

impl Function {
    /// The Python functions of `tests/functions/app.py`.
    pub(crate) fn python(handler: &'static str) -> Self {
        Self::python_with(handler, &[])
    }

    /// The same, with more files beside it.
    pub(crate) fn python_with(handler: &'static str, more: &[(&str, u32, &[u8])]) -> Self {
        let source: (&str, u32, &[u8]) = ("app.py", 0o644, include_bytes!("../functions/app.py"));
        Self {
            runtime: "python3.11",
            handler,
            ..Self::native(zip(&[&[source], more].concat()))
        }
    }

    /// A Python function of these files (name, content) with the handler `app.handler`.
    pub(crate) fn python_files(files: &[(&str, &str)]) -> Self {
        let files: Vec<(&str, u32, &[u8])> = files
            .iter()
            .map(|&(name, content)| (name, 0o644, content.as_bytes()))
            .collect();
        Self {
            runtime: "python3.11",
            handler: "app.handler",
            ..Self::native(zip(&files))
        }
    }

    /// The program of `examples/probe.rs`.
    pub(crate) fn probe() -> Self {
        static ZIP: OnceLock<Vec<u8>> = OnceLock::new();
        let zip = ZIP.get_or_init(|| {
            let programs = Path::new(env!("CARGO_BIN_EXE_stoker-init")).parent().unwrap();
            let probe = std::fs::read(programs.join("examples/probe"))
                .expect("`cargo test` builds the example `probe`; with `--test` alone add `--examples`");
            zip(&[("bootstrap", 0o755, &probe)])
        });
        Self::native(zip.clone())
    }

    pub(crate) fn native(zip: Vec<u8>) -> Self {
        Self {
            runtime: "provided",
            handler: "none",
            zip,
            layers: Vec::new(),
            environment: Vec::new(),
            amount: Amount {
                cpu_millis: 1000,
                memory_mib: 128,
            },
            init_timeout: PATIENCE,
            freeze: true,
            scratch_mib: 0,
            drive_mib: 0,
        }
    }

    pub(crate) fn layered(mut self, layers: &[&[u8]]) -> Self {
        self.layers = layers.iter().map(|layer| layer.to_vec()).collect();
        self
    }

    pub(crate) fn with(mut self, name: &'static str, value: &'static str) -> Self {
        self.environment.push((name, value));
        self
    }
}

/// A zip of these files: name, permissions, content.
pub(crate) fn zip(files: &[(&str, u32, &[u8])]) -> Vec<u8> {
    stoker_testkit::zip::zip(files).unwrap()
}

pub(crate) fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Names of containers and requests, each new.
pub(crate) fn new_id() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("{:08x}-0000-4000-8000-{number:012x}", std::process::id())
}

/// What `cargo xtask` has made.
pub(crate) fn cache(name: &str) -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache"),
        PathBuf::from,
    );
    cache.join("stoker").join(name)
}

/// The guest image, mounted once.
fn image() -> &'static Path {
    static IMAGE: OnceLock<PathBuf> = OnceLock::new();
    IMAGE.get_or_init(|| {
        let file = cache("image/root.erofs");
        let on = PathBuf::from(format!("/run/image-{}", std::process::id()));
        std::fs::create_dir_all(&on).unwrap();
        for module in ["loop", "erofs", "overlay"] {
            // Built in, in some kernels.
            let _ = Command::new("modprobe").arg(module).status();
        }
        let mounted = Command::new("mount")
            .args(["-t", "erofs", "-o", "ro,loop"])
            .arg(&file)
            .arg(&on)
            .status()
            .unwrap();
        assert!(
            mounted.success(),
            "cannot mount {}: `cargo xtask image` makes it; this test wants root and is for the lab: \
             `cargo xtask lab -- cargo test -p stoker-init`",
            file.display()
        );
        on
    })
}
