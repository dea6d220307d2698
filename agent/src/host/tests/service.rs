//! The `Machines` service over machines whose guest is this process, as a client meets it.

use hyper_util::rt::TokioIo;
use stoker_proto::v1::machine::State;
use stoker_proto::v1::machine_end::Reason;
use stoker_proto::v1::machines_client::MachinesClient;
use stoker_proto::v1::machines_server::MachinesServer;
use stoker_proto::v1::threshold;
use tonic::Code;
use tonic::transport::{Channel, Endpoint, Server, Uri};
use tonic_types::StatusExt as _;

use super::*;
use crate::api::machines::Machines;
use crate::images::Images;

pub(super) const IMAGE: &str = "accounts/acme/images/web";

/// A host with an image, and who asks it.
struct Asking {
    fixture: Fixture,
    store: Store,
    images: Images,
    client: MachinesClient<Channel>,
}

// === impl Asking ===

impl Asking {
    async fn start(dir: &Path) -> Self {
        let guests = InProcess::default();
        let deps = Fixture::deps(dir, guests.clone(), |config| {
            config.pool.warming.clear();
            config.pool.cpu_overcommit = 8.0;
            config.pool.memory_mib = Some(8192);
            config.machines.vcpus = 4;
        })
        .await;
        let store = deps.store.clone();
        let fixture = Fixture::of(guests, HostHandle::start(deps).await.unwrap());
        let mut config = Config::default();
        config.store.path = dir.join("state");
        config.limits.images_mib = Some(100);
        let images = image(&config).await;
        let service = MachinesServer::new(Machines::new(fixture.host.clone(), images.clone()));
        let (ours, theirs) = UnixStream::pair().unwrap();
        // The server ends with what comes in: nothing more does, but it might.
        let once = tokio_stream::once(Ok::<_, std::io::Error>(theirs)).chain(tokio_stream::pending());
        tokio::spawn(Server::builder().add_service(service).serve_with_incoming(once));
        let mut once = Some(ours);
        let connect = tower::service_fn(move |_: Uri| {
            let taken = once.take();
            async move { taken.map(TokioIo::new).ok_or("it has hung up") }
        });
        let channel = Endpoint::from_static("http://agent").connect_with_connector_lazy(connect);
        Self {
            fixture,
            store,
            images,
            client: MachinesClient::new(channel),
        }
    }

    /// What the next agent knows of a machine whose program runs.
    async fn kept(&self, name: &str) -> v1::Machine {
        let mut kept = None;
        eventually("it to be kept that its program runs", async || {
            let all = self.store.machines().await.unwrap();
            kept = all.into_iter().find(|machine| {
                let runs = machine.launched.as_ref().is_some_and(|launched| launched.program_ran);
                runs && machine.name == name
            });
            kept.is_some()
        })
        .await;
        kept.unwrap()
    }

    async fn launch(&self, request: v1::LaunchMachineRequest) -> Result<v1::Machine, Status> {
        let launched = self.client.clone().launch_machine(request).await?;
        Ok(launched.into_inner())
    }

    async fn resize(&self, name: &str, size: v1::MachineSize) -> Result<v1::Resize, Status> {
        let request = v1::ResizeMachineRequest {
            name: name.to_owned(),
            size: Some(size),
            timeout: None,
        };
        let resized = self.client.clone().resize_machine(request).await?.into_inner();
        Ok(resized.resize.unwrap())
    }

    async fn set(&self, name: &str, thresholds: Vec<v1::Threshold>) -> Result<v1::Machine, Status> {
        self.replace(name, thresholds, "").await
    }

    /// The same, of the thresholds that are known by this.
    async fn replace(&self, name: &str, thresholds: Vec<v1::Threshold>, etag: &str) -> Result<v1::Machine, Status> {
        let (name, etag) = (name.to_owned(), etag.to_owned());
        let request = v1::SetThresholdsRequest { name, thresholds, etag };
        Ok(self.client.clone().set_thresholds(request).await?.into_inner())
    }

    async fn stop(&self, name: &str) -> Result<v1::Machine, Status> {
        let request = v1::StopMachineRequest {
            name: name.to_owned(),
            grace: None,
        };
        Ok(self.client.clone().stop_machine(request).await?.into_inner())
    }

    /// Begins a program; what is sent to it is to be sent here.
    async fn exec(&self, name: &str) -> Result<(mpsc::Sender<v1::ExecRequest>, Streaming<v1::ExecResponse>), Status> {
        let (to, input) = mpsc::channel(4);
        let start = v1::ExecStart {
            name: name.to_owned(),
            command: vec!["cat".into()],
            ..Default::default()
        };
        to.send(asks(v1::exec_request::Part::Start(start))).await.unwrap();
        let output = self.client.clone().exec(ReceiverStream::new(input)).await?;
        Ok((to, output.into_inner()))
    }

    /// What comes back from a port of what is sent to it.
    async fn forward(&self, name: &str, port: u32) -> Result<Bytes, Status> {
        let start = v1::ForwardPortStart {
            name: name.to_owned(),
            port,
        };
        let parts = [
            v1::forward_port_request::Part::Start(start),
            v1::forward_port_request::Part::Data("there and back".into()),
        ];
        let requests = parts.map(|part| v1::ForwardPortRequest { part: Some(part) });
        let answers = self.client.clone().forward_port(tokio_stream::iter(requests)).await?;
        let mut answers = answers.into_inner();
        let mut all = Vec::new();
        while let Some(answer) = answers.message().await? {
            all.extend_from_slice(&answer.data);
        }
        Ok(all.into())
    }
}

/// The images of an account that has one.
pub(super) async fn image(config: &Config) -> Images {
    let images = Images::open(config).unwrap();
    let mut import = images.slot().unwrap().import(IMAGE.parse().unwrap(), None);
    assert!(import.write(root().into()).await.unwrap());
    import.finish().await.unwrap();
    images
}

/// The tar of a root file system.
fn root() -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(2);
    header.set_mode(0o755);
    tar.append_data(&mut header, "server", &b"hi"[..]).unwrap();
    tar.into_inner().unwrap()
}

fn asks(part: v1::exec_request::Part) -> v1::ExecRequest {
    v1::ExecRequest { part: Some(part) }
}

fn stdin(bytes: &'static str) -> v1::ExecRequest {
    asks(v1::exec_request::Part::Stdin(bytes.into()))
}

pub(super) fn request() -> v1::LaunchMachineRequest {
    v1::LaunchMachineRequest {
        parent: "accounts/acme".into(),
        image: IMAGE.into(),
        command: vec!["/server".into(), "-v".into()],
        environment: [("A".to_owned(), "1".to_owned())].into(),
        ..Default::default()
    }
}

pub(super) fn vcpus(vcpus: u32) -> v1::MachineSize {
    v1::MachineSize {
        vcpus,
        ..Default::default()
    }
}

fn grows() -> v1::Threshold {
    v1::Threshold {
        metric: "cpu_use".into(),
        comparison: threshold::Comparison::Above.into(),
        value: 80.0,
        resource: threshold::Resource::Vcpus.into(),
        direction: threshold::Direction::Grow.into(),
        change: Some(threshold::Change::By(1)),
        ..Default::default()
    }
}

pub(super) fn fields(status: &Status) -> Vec<String> {
    let details = status.get_error_details();
    let violations = &details.bad_request().unwrap().field_violations;
    violations.iter().map(|violation| violation.field.clone()).collect()
}

pub(super) fn reason(status: &Status) -> String {
    let details = status.get_error_details();
    details.error_info().map(|info| info.reason.clone()).unwrap_or_default()
}

#[tokio::test]
async fn a_machine_is_launched_from_an_image_of_its_account() {
    let dir = tempfile::tempdir().unwrap();
    let asking = Asking::start(dir.path()).await;
    let with_id = v1::LaunchMachineRequest {
        request_id: "once".into(),
        thresholds: vec![grows()],
        ..request()
    };
    let machine = asking.launch(with_id.clone()).await.unwrap();
    assert_eq!((machine.state(), &*machine.account), (State::Active, "accounts/acme"));
    let launched = machine.launched.unwrap();
    assert_eq!((&*launched.image, launched.thresholds.len()), (IMAGE, 1));
    assert!(launched.digest.starts_with("sha256:"));
    assert_eq!(
        (launched.size.unwrap().memory_mib, launched.ceiling.unwrap().memory_mib),
        (512, 2048)
    );
    // The threshold's most is the machine's.
    assert_eq!(launched.thresholds[0].most, Some(launched.ceiling.unwrap().vcpus));
    // Who asks again has the same, though its image was deleted since.
    asking.images.delete(IMAGE.parse().unwrap()).await.unwrap();
    assert_eq!(asking.launch(with_id.clone()).await.unwrap().name, machine.name);
    let other = v1::LaunchMachineRequest {
        size: Some(vcpus(2)),
        ..with_id
    };
    assert_eq!(fields(&asking.launch(other).await.unwrap_err()), ["request_id"]);
    let mut import = asking.images.slot().unwrap().import(IMAGE.parse().unwrap(), None);
    assert!(import.write(root().into()).await.unwrap());
    import.finish().await.unwrap();

    let unknown = v1::LaunchMachineRequest {
        image: "accounts/acme/images/other".into(),
        ..request()
    };
    assert_eq!(asking.launch(unknown).await.unwrap_err().code(), Code::NotFound);
    // Its image names none.
    let no_program = v1::LaunchMachineRequest {
        command: Vec::new(),
        ..request()
    };
    assert_eq!(fields(&asking.launch(no_program).await.unwrap_err()), ["command"]);
    let wrong = v1::LaunchMachineRequest {
        thresholds: vec![
            grows(),
            v1::Threshold {
                most: Some(64),
                ..grows()
            },
        ],
        ..request()
    };
    assert_eq!(fields(&asking.launch(wrong).await.unwrap_err()), ["thresholds[1].most"]);
    let too_large = v1::LaunchMachineRequest {
        size: Some(v1::MachineSize {
            memory_mib: 1 << 20,
            ..Default::default()
        }),
        ..request()
    };
    assert_eq!(
        asking.launch(too_large).await.unwrap_err().code(),
        Code::InvalidArgument
    );
    asking.fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn who_may_not_change_credits_launches_no_machine_with_a_mode_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    // Of who calls here the kernel says nothing.
    let asking = Asking::start(dir.path()).await;
    for mode in [
        v1::machine_credits::Mode::Unlimited,
        v1::machine_credits::Mode::Standard,
    ] {
        let request = v1::LaunchMachineRequest {
            mode: mode.into(),
            ..request()
        };
        let refused = asking.launch(request).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{refused:?}");
    }
    assert_eq!(asking.fixture.host.machines(true).await, []);
    asking.launch(request()).await.unwrap();
    asking.fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn a_launched_machine_is_resized_and_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let asking = Asking::start(dir.path()).await;
    let machine = asking.launch(request()).await.unwrap();
    let name = machine.name.as_str();
    let resized = asking.resize(name, vcpus(2)).await.unwrap();
    assert_eq!((resized.before.unwrap().vcpus, resized.asked.unwrap().vcpus), (1, 2));
    assert!(
        resized.duration.is_some() && resized.reason.contains("asked"),
        "{resized:?}"
    );
    let refused = asking.resize(name, vcpus(64)).await.unwrap_err();
    assert_eq!(
        (refused.code(), &*reason(&refused)),
        (Code::FailedPrecondition, "SIZE_IN_THE_WAY")
    );
    // Less than it has is not given while nobody knows what it uses.
    let unmeasured = asking.resize(name, vcpus(1)).await.unwrap_err();
    assert!(
        unmeasured.message().contains("what it uses is not known"),
        "{unmeasured:?}"
    );
    asking.resize(name, vcpus(3)).await.unwrap();
    let mut request = v1::ListResizesRequest {
        parent: name.to_owned(),
        page_size: 1,
        page_token: String::new(),
    };
    let mut asked = Vec::new();
    loop {
        let page = asking
            .client
            .clone()
            .list_resizes(request.clone())
            .await
            .unwrap()
            .into_inner();
        asked.extend(page.resizes.iter().map(|resize| resize.asked.unwrap().vcpus));
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    // The youngest first.
    assert_eq!(asked, [3, 2]);

    let set = asking.set(name, vec![grows()]).await.unwrap();
    assert_eq!(set.launched.unwrap().thresholds[0].metric, "cpu_use");
    let unknown = v1::Threshold {
        metric: "load".into(),
        ..grows()
    };
    let refused = asking.set(name, vec![unknown]).await.unwrap_err();
    assert_eq!(fields(&refused), ["thresholds[0].metric"]);
    assert!(
        asking
            .set(name, Vec::new())
            .await
            .unwrap()
            .launched
            .unwrap()
            .thresholds
            .is_empty()
    );

    for _ in 0..2 {
        let stopped = asking.stop(name).await.unwrap();
        assert_eq!(stopped.end.unwrap().reason(), Reason::Stopped);
    }
    let gone = asking.resize(name, vcpus(2)).await.unwrap_err();
    assert_eq!(gone.code(), Code::FailedPrecondition, "{gone:?}");
    let nobody = "machines/01ARZ3NDEKTSV4RRFFQ69G5FAV";
    for refused in [
        asking.stop(nobody).await.map(drop),
        asking.resize(nobody, vcpus(2)).await.map(drop),
        asking.set(nobody, Vec::new()).await.map(drop),
        asking.exec(nobody).await.map(drop),
        asking.forward(nobody, 80).await.map(drop),
    ] {
        assert_eq!(refused.unwrap_err().code(), Code::NotFound);
    }
    asking.fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn thresholds_that_were_changed_since_they_were_read_are_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let asking = Asking::start(dir.path()).await;
    let machine = asking.launch(request()).await.unwrap();
    let name = machine.name.as_str();
    let etag = |machine: v1::Machine| machine.launched.unwrap().thresholds_etag;
    let none = etag(machine.clone());
    let one = etag(asking.replace(name, vec![grows()], &none).await.unwrap());
    assert_ne!(one, none);
    // Who read none comes too late, and nothing is lost.
    let refused = asking.replace(name, Vec::new(), &none).await.unwrap_err();
    assert_eq!(
        (refused.code(), &*reason(&refused)),
        (Code::Aborted, "THRESHOLDS_CHANGED")
    );
    let higher = v1::Threshold { value: 90.0, ..grows() };
    let other = etag(asking.replace(name, vec![higher], &one).await.unwrap());
    assert!(other != one && other != none);
    // The same are known by the same, and who does not say what it read replaces what there is.
    assert_eq!(etag(asking.set(name, vec![grows()]).await.unwrap()), one);
    asking.fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn what_runs_functions_is_not_an_accounts_to_change() {
    let dir = tempfile::tempdir().unwrap();
    let asking = Asking::start(dir.path()).await;
    asking.fixture.invoke("").await.unwrap();
    let machine = asking.fixture.host.machines(false).await.remove(0);
    for refused in [
        asking.stop(&machine.name).await.map(drop),
        asking.resize(&machine.name, vcpus(2)).await.map(drop),
        asking.set(&machine.name, Vec::new()).await.map(drop),
        asking.exec(&machine.name).await.map(drop),
    ] {
        let refused = refused.unwrap_err();
        assert_eq!(
            (refused.code(), &*reason(&refused)),
            (Code::FailedPrecondition, "NOT_LAUNCHED")
        );
    }
    asking.fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn programs_and_connections_go_through() {
    let dir = tempfile::tempdir().unwrap();
    let asking = Asking::start(dir.path()).await;
    let machine = asking.launch(request()).await.unwrap();
    let (to, mut output) = asking.exec(&machine.name).await.unwrap();
    to.send(stdin("there and back")).await.unwrap();
    to.send(stdin("")).await.unwrap();
    let mut said = Vec::new();
    let status = loop {
        match output.message().await.unwrap().unwrap().part.unwrap() {
            v1::exec_response::Part::Stdout(bytes) => said.extend_from_slice(&bytes),
            v1::exec_response::Part::ExitStatus(status) => break status,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!((said.as_slice(), status), (b"there and back".as_slice(), 0));
    assert!(output.message().await.unwrap().is_none());
    assert_eq!(asking.forward(&machine.name, 80).await.unwrap(), "there and back");
    let nobody = asking.forward(&machine.name, 1).await.unwrap_err();
    assert_eq!((nobody.code(), &*reason(&nobody)), (Code::Unavailable, "NOT_LISTENING"));
    assert_eq!(
        fields(&asking.forward(&machine.name, 65_536).await.unwrap_err()),
        ["start.port"]
    );
    asking.fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn that_input_is_granted_is_said_where_the_guest_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let asking = Asking::start(dir.path()).await;
    let machine = asking.launch(request()).await.unwrap();
    let start = v1::ExecStart {
        name: machine.name,
        command: vec!["cat".into()],
        ..Default::default()
    };
    for grants in [false, true] {
        if grants {
            asking.fixture.guests.images.grant();
        }
        let start = asks(v1::exec_request::Part::Start(start.clone()));
        let answers = asking.client.clone().exec(tokio_stream::once(start)).await.unwrap();
        assert_eq!(answers.metadata().contains_key(STDIN_WINDOW_KEY), grants);
    }
    asking.fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn a_program_in_a_machine_that_ends_is_told_why() {
    let dir = tempfile::tempdir().unwrap();
    let asking = Asking::start(dir.path()).await;
    let machine = asking.launch(request()).await.unwrap();
    let (_to, mut output) = asking.exec(&machine.name).await.unwrap();
    output.message().await.unwrap().unwrap();
    asking.fixture.guests.kill.send_modify(|kills| *kills += 1);
    let ended = tokio::time::timeout(PATIENCE, output.message())
        .await
        .unwrap()
        .unwrap_err();
    assert_eq!((ended.code(), &*reason(&ended)), (Code::Unavailable, "MACHINE_ENDED"));
    assert!(ended.message().starts_with("the machine ended: "), "{ended:?}");
    // As later ones are.
    for later in [
        asking.exec(&machine.name).await.map(drop),
        asking.forward(&machine.name, 80).await.map(drop),
    ] {
        let later = later.unwrap_err();
        assert_eq!((later.code(), &*reason(&later)), (Code::Unavailable, "MACHINE_ENDED"));
    }
    asking.fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn who_asks_again_has_the_machine_that_was_gone_when_the_agent_started() {
    let dir = tempfile::tempdir().unwrap();
    let asking = Asking::start(dir.path()).await;
    let with_id = v1::LaunchMachineRequest {
        request_id: "once".into(),
        ..request()
    };
    let machine = asking.launch(with_id.clone()).await.unwrap();
    let mut kept = asking.kept(&machine.name).await;
    asking.fixture.host.drain(PATIENCE).await;
    let dir = tempfile::tempdir().unwrap();
    {
        let store = Store::open(&dir.path().join("state")).unwrap();
        store.save_machine(&kept).await.unwrap();
    }
    let asking = Asking::start(dir.path()).await;
    let again = asking.launch(with_id.clone()).await.unwrap();
    // It knows by what is kept for it alone.
    let sha256 = |machine: &v1::Machine| machine.launched.as_ref().unwrap().request_sha256.clone();
    assert_eq!([sha256(&machine), sha256(&again)], ["", ""]);
    assert_eq!(sha256(&kept).len(), 64);
    assert_eq!(
        (&again.name, again.end.unwrap().reason()),
        (&machine.name, Reason::Lost)
    );
    let other = v1::LaunchMachineRequest {
        size: Some(vcpus(2)),
        ..with_id.clone()
    };
    assert_eq!(fields(&asking.launch(other).await.unwrap_err()), ["request_id"]);
    asking.fixture.host.drain(PATIENCE).await;
    // One whose program had not run is not what was asked for.
    kept.launched.as_mut().unwrap().program_ran = false;
    let dir = tempfile::tempdir().unwrap();
    {
        let store = Store::open(&dir.path().join("state")).unwrap();
        store.save_machine(&kept).await.unwrap();
    }
    let asking = Asking::start(dir.path()).await;
    let another = asking.launch(with_id).await.unwrap();
    assert_eq!(another.state(), State::Active);
    assert_ne!(another.name, machine.name);
    asking.fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn of_a_machine_that_was_gone_when_the_agent_started_there_are_no_resizes() {
    let dir = tempfile::tempdir().unwrap();
    let gone = "machines/01ARZ3NDEKTSV4RRFFQ69G5FAV";
    {
        let store = Store::open(&dir.path().join("state")).unwrap();
        let machine = v1::Machine {
            name: gone.into(),
            launched: Some(v1::Launched::default()),
            ..Default::default()
        };
        store.save_machine(&machine).await.unwrap();
    }
    let asking = Asking::start(dir.path()).await;
    let request = v1::ListResizesRequest {
        parent: gone.into(),
        ..Default::default()
    };
    let page = asking.client.clone().list_resizes(request).await.unwrap();
    assert!(page.into_inner().resizes.is_empty());
    asking.fixture.host.drain(PATIENCE).await;
}
