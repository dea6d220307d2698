//! What the tests share: an API over a real Unix socket, and zips.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use stoker_agent::accounts::Accounts;
use stoker_agent::address::Address;
use stoker_agent::api::Api;
use stoker_agent::api::admin::Admin;
use stoker_agent::api::code::Code;
use stoker_agent::api::functions::Functions;
use stoker_agent::api::health::Health;
use stoker_agent::api::images::Images as ImageService;
use stoker_agent::api::listen::Listeners;
use stoker_agent::catalog::{Catalog, ResizingDefaults};
use stoker_agent::code::CodeStore;
use stoker_agent::config::{self, Config, Limits};
use stoker_agent::host;
use stoker_agent::images::Images;
use stoker_agent::store::Store;
use stoker_policy::Amount;
use stoker_proto::v1;
use stoker_proto::v1::admin_server::AdminServer;
use stoker_proto::v1::code_server::CodeServer;
use stoker_proto::v1::create_function_request::Part;
use stoker_proto::v1::functions_client::FunctionsClient;
use stoker_proto::v1::functions_server::FunctionsServer;
use stoker_proto::v1::images_client::ImagesClient;
use stoker_proto::v1::images_server::ImagesServer;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::transport::Channel;

/// Generous: others use the machine too.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// An agent's API with functions and images, without machines, on a Unix socket in its folder.
pub(crate) struct Agent {
    pub(crate) folder: PathBuf,
    pub(crate) channel: Channel,
    pub(crate) deleted: Arc<Mutex<Vec<String>>>,
    pub(crate) health: watch::Sender<Health>,
    stop: CancellationToken,
    serving: JoinHandle<()>,
}

impl Agent {
    pub(crate) async fn start(folder: &Path) -> Self {
        Self::with_limits(folder, Limits::default()).await
    }

    pub(crate) async fn with_limits(folder: &Path, limits: Limits) -> Self {
        let config = Config {
            limits,
            ..Config::default()
        };
        Self::with_config(folder, config).await
    }

    /// Its folders and its socket are in `folder`, whatever the configuration says.
    pub(crate) async fn with_config(folder: &Path, mut config: Config) -> Self {
        config.store.path = folder.join("state");
        config.api.socket = socket(folder);
        let store = Store::open(&config.store.path).unwrap();
        let images = Images::open(&config).unwrap();
        let limits = config.limits.clone();
        let codes = CodeStore::open(&folder.join("code"), store.owner()).unwrap();
        let largest = Amount {
            cpu_millis: 2000,
            memory_mib: 2048,
            scratch_mib: 4096,
        };
        let deleted = Arc::new(Mutex::new(Vec::new()));
        let heard = deleted.clone();
        let hear = Arc::new(move |uid| heard.lock().unwrap().push(uid));
        let grace = config::Code::default().orphan_grace;
        // Whatever the disk has free.
        config.pool.scratch_gib = Some(16);
        let rules = host::rules(&config).unwrap();
        let accounts = Accounts::open(&config, rules, store.clone()).await.unwrap();
        let catalog = Catalog::open(
            store.clone(),
            codes,
            limits.clone(),
            grace,
            ResizingDefaults::default(),
            accounts.may_create(),
            hear,
        )
        .await
        .unwrap();
        let listeners = Listeners::bind(&config.api).await.unwrap();
        let stop = CancellationToken::new();
        let token = stop.clone();
        let (health, healthy) = watch::channel(Health::GOOD);
        let sweeping = tokio::spawn(images.clone().sweep());
        let serving = tokio::spawn(async move {
            let api = Api::new()
                .unwrap()
                .with(FunctionsServer::new(Functions::new(catalog.clone(), largest)))
                .with(CodeServer::new(Code::new(catalog.clone())))
                .with(ImagesServer::new(ImageService::new(images, catalog.clone())))
                .with(AdminServer::new(Admin::new(catalog, store)));
            api.serve(listeners, &limits, Duration::from_secs(10), token, healthy)
                .await
                .unwrap();
            sweeping.abort();
        });
        let channel = Address::Unix(socket(folder)).connect().await.unwrap();
        Self {
            folder: folder.to_owned(),
            channel,
            deleted,
            health,
            stop,
            serving,
        }
    }

    pub(crate) fn images(&self) -> ImagesClient<Channel> {
        ImagesClient::new(self.channel.clone())
    }

    pub(crate) fn functions(&self) -> FunctionsClient<Channel> {
        FunctionsClient::new(self.channel.clone())
    }

    pub(crate) async fn create(&self, function: v1::Function, zip: &[u8]) -> Result<v1::Function, Status> {
        self.create_with(header(function, ""), zip).await
    }

    pub(crate) async fn create_with(
        &self,
        header: v1::CreateFunctionHeader,
        zip: &[u8],
    ) -> Result<v1::Function, Status> {
        self.send(parts(header, zip)).await
    }

    pub(crate) async fn send(&self, parts: Vec<v1::CreateFunctionRequest>) -> Result<v1::Function, Status> {
        let created = self.functions().create_function(tokio_stream::iter(parts)).await?;
        Ok(created.into_inner())
    }

    pub(crate) async fn get(&self, name: &str) -> Result<v1::Function, Status> {
        let request = v1::GetFunctionRequest {
            name: name.to_owned(),
            ..Default::default()
        };
        Ok(self.functions().get_function(request).await?.into_inner())
    }

    pub(crate) async fn delete(&self, name: &str) -> Result<(), Status> {
        let request = v1::DeleteFunctionRequest { name: name.to_owned() };
        self.functions().delete_function(request).await.map(|_| ())
    }

    /// Names of the zips that are kept.
    pub(crate) fn kept(&self) -> Vec<String> {
        names(&self.folder.join("code/objects"))
    }

    /// Waits until nothing of a call that failed is left.
    pub(crate) async fn nothing_staged(&self) {
        let folder = self.folder.join("code/staging");
        eventually("the staging folder to be empty", || names(&folder).is_empty()).await;
    }

    /// Stops serving and closes the database.
    pub(crate) async fn stop(self) {
        self.stop.cancel();
        drop(self.channel);
        self.serving.await.unwrap();
    }
}

pub(crate) fn socket(folder: &Path) -> PathBuf {
    folder.join("stokerd.sock")
}

pub(crate) fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

pub(crate) fn header(function: v1::Function, request_id: &str) -> v1::CreateFunctionHeader {
    v1::CreateFunctionHeader {
        function: Some(function),
        request_id: request_id.into(),
    }
}

pub(crate) fn parts(header: v1::CreateFunctionHeader, zip: &[u8]) -> Vec<v1::CreateFunctionRequest> {
    std::iter::once(Part::Header(header))
        .chain(
            zip.chunks(1 << 20)
                .map(|chunk| Part::Chunk(Bytes::copy_from_slice(chunk))),
        )
        .map(|part| v1::CreateFunctionRequest { part: Some(part) })
        .collect()
}

pub(crate) fn function(id: &str) -> v1::Function {
    v1::Function {
        name: format!("accounts/acme/functions/{id}"),
        runtime: "python3.11".into(),
        handler: "app.handler".into(),
        ..Default::default()
    }
}

pub(crate) fn zip(files: &[(&str, u32, &[u8])]) -> Vec<u8> {
    stoker_testkit::zip::zip(files).unwrap()
}

pub(crate) fn app() -> Vec<u8> {
    zip(&[("app.py", 0o644, b"def handler(event, context): return event\n")])
}

/// Replaces bytes wherever they are in a zip, in the local and the central header for example.
pub(crate) fn patched(mut zip: Vec<u8>, from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let places: Vec<usize> = (0..=zip.len() - from.len())
        .filter(|at| zip[*at..].starts_with(from))
        .collect();
    assert!(!places.is_empty());
    for at in places {
        zip[at..at + to.len()].copy_from_slice(to);
    }
    zip
}

/// Waits for a condition; the pause only spares the processor.
pub(crate) async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = std::time::Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
