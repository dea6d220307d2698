//! Machines that accounts launch: what becomes of them, and what the next agent knows of them.

mod pressure;

use std::fs::File;
use std::path::Path;

use stoker_ebpf::Time;
use stoker_images::User;
use stoker_policy::Launch;
use stoker_policy::scale::{
    ChangeSpec, Comparison, Direction, LaunchError, Part, Resource, Size, SizeChange, ThresholdSpec, Thresholds, check,
};
use stoker_proto::v1::machine::State;
use stoker_proto::v1::machine_end::Reason;

use super::*;
use crate::host::{LaunchFailure, LaunchedError, Launching, ResizeFailure, base_mib};
use crate::machines::{LaunchRequest, Played, Program, Resizer};

const SECOND: Duration = Duration::from_secs(1);

/// What machines that run an image do and did.
#[derive(Clone, Debug, Default)]
pub(super) struct Images(Arc<Mutex<ImageScript>>);

#[derive(Debug, Default)]
struct ImageScript {
    /// The programs that guests were asked to run.
    asked: Vec<proto::RunImageRequest>,
    /// The image's container, once it has been started.
    container: String,
    /// Why programs can't be started.
    fails: Option<proto::FunctionError>,
    /// How programs were stopped.
    stopped: Vec<proto::StopImageRequest>,
    /// What every guest says of ends.
    ends: Vec<proto::ContainerEnd>,
    /// What guests say that they use, over and over.
    uses: Option<proto::MachineUse>,
    /// VMMs by their machines.
    vmms: BTreeMap<Ulid, Arc<Mutex<Played>>>,
    /// Guests take nothing of what they are asked to.
    refuse: bool,
    /// Machines have ended before their guests answer.
    gone: bool,
    /// Guests say that they grant input.
    grants: bool,
    /// What the next agent finds.
    records: BTreeMap<MachineId, RecordFile>,
    /// What vCPUs have used up to a time, and in thousandths of a CPU since.
    cpu_ns: u64,
    since: Option<Instant>,
    cpu_millis: u32,
}

impl Images {
    fn lock(&self) -> MutexGuard<'_, ImageScript> {
        self.0.lock().unwrap()
    }

    pub(super) fn resizer(&self, id: Ulid, folder: &Path, record: &RecordFile) -> Resizer {
        let vmm = {
            let mut state = self.lock();
            let refuses = state.refuse;
            let new = || {
                let played = Played {
                    refuses,
                    ..Played::default()
                };
                Arc::new(Mutex::new(played))
            };
            state.vmms.entry(id).or_insert_with(new).clone()
        };
        Played::resizer(&vmm, folder, record)
    }

    pub(super) fn has_gone(&self) -> bool {
        self.lock().gone
    }

    /// Guests grant input from now on, and say so.
    pub(super) fn grant(&self) {
        self.lock().grants = true;
    }

    pub(super) fn grants(&self) -> bool {
        self.lock().grants
    }

    /// How long programs were given to end, each time that they were asked to.
    fn graces(&self) -> Vec<Duration> {
        let stopped = self.lock().stopped.clone();
        let graces = stopped
            .iter()
            .map(|stop| Duration::try_from(stop.grace.unwrap()).unwrap());
        graces.collect()
    }

    pub(super) fn found(&self, id: Ulid, record: &RecordFile) {
        self.lock().records.insert(MachineId(id), record.clone());
    }

    pub(super) fn vcpu_time(&self) -> Time {
        let mut state = self.lock();
        state.charge();
        Time {
            cpu_ns: state.cpu_ns,
            ..Time::default()
        }
    }

    pub(super) fn container(&self) -> String {
        self.lock().container.clone()
    }

    pub(super) fn begin(&self, request: proto::RunImageRequest) -> Result<(), Status> {
        let mut state = self.lock();
        let again = state.asked.iter().any(|asked| asked.id == request.id);
        state.asked.push(request);
        match again {
            true => Err(Status::already_exists("it runs")),
            false => Ok(()),
        }
    }

    pub(super) fn begun(&self) -> Result<proto::RunImageResponse, Status> {
        let mut state = self.lock();
        let error = state.fails.clone();
        if error.is_none() {
            state.container = state.asked.last().unwrap().id.clone();
        }
        Ok(proto::RunImageResponse { error })
    }

    pub(super) fn stop(&self, request: proto::StopImageRequest) {
        self.lock().stopped.push(request);
    }

    /// What a guest says, message by message.
    pub(super) fn say(&self) -> impl Stream<Item = Result<proto::WatchResponse, Status>> + Send + use<> {
        let (to, said) = mpsc::channel(1);
        let images = self.clone();
        tokio::spawn(async move {
            let mut told = 0;
            while !to.is_closed() {
                let says = {
                    let state = images.lock();
                    let ended = state.ends[told..].to_vec();
                    told = state.ends.len();
                    proto::WatchResponse {
                        containers: Vec::new(),
                        ended,
                        machine: state.uses,
                    }
                };
                if says != proto::WatchResponse::default() && to.send(Ok(says)).await.is_err() {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        ReceiverStream::new(said)
    }

    /// Its vCPUs use so much from now on.
    fn load(&self, cpu_millis: u32) {
        let mut state = self.lock();
        state.charge();
        state.cpu_millis = cpu_millis;
    }

    fn vmm(&self, machine: &str) -> Arc<Mutex<Played>> {
        self.lock().vmms[&id(machine).parse().unwrap()].clone()
    }

    /// A guest whose program has ended says so.
    fn end(&self, machine: &str, exit_status: i32) {
        let end = proto::ContainerEnd {
            id: id(machine).to_owned(),
            error: None,
            exit_status: Some(exit_status),
        };
        self.lock().ends.push(end);
    }
}

impl ImageScript {
    fn charge(&mut self) {
        let now = Instant::now();
        let passed = self.since.map_or(Duration::ZERO, |since| now - since);
        self.cpu_ns += u64::try_from(passed.as_nanos()).unwrap() * u64::from(self.cpu_millis) / 1000;
        self.since = Some(now);
    }
}

/// What a program is given comes back; at its end it exits with 0.
pub(super) fn echo(request: Result<v1::ExecRequest, Status>) -> Result<v1::ExecResponse, Status> {
    use v1::exec_request::Part as Asked;
    use v1::exec_response::Part as Answered;
    let part = match request?.part {
        Some(Asked::Stdin(input)) if input.is_empty() => Answered::ExitStatus(0),
        Some(Asked::Stdin(input)) => Answered::Stdout(input),
        _ => Answered::Stdout(Bytes::new()),
    };
    Ok(v1::ExecResponse { part: Some(part) })
}

fn config(config: &mut Config) {
    config.pool.warming.clear();
    config.pool.cpu_overcommit = 8.0;
    config.pool.memory_mib = Some(8192);
    config.machines.vcpus = 4;
}

async fn start(dir: &Path) -> Fixture {
    Fixture::with(dir, config).await
}

const SMALL: Size = Size {
    vcpus: 1,
    cpu_millis: 1000,
    memory_mib: 512,
};

const CEILING: Size = Size {
    vcpus: 4,
    cpu_millis: 4000,
    memory_mib: 1024,
};

fn request(id: &str) -> LaunchRequest {
    LaunchRequest {
        id: id.to_owned(),
        sha256: "77".to_owned(),
    }
}

fn launching(request_id: &str) -> Launching {
    let file = tempfile::tempfile().unwrap();
    of_file(request_id, file)
}

fn of_file(request_id: &str, file: File) -> Launching {
    let program = Program {
        command: vec!["/bin/server".into(), "-p".into(), "80".into()],
        environment: vec!["A=1".into()],
        working_dir: "/srv".into(),
        user: User {
            uid: 33,
            gid: 34,
            groups: vec![35],
            home: "/var/www".into(),
        },
        stop_signal: 3,
    };
    Launching {
        account: "a".into(),
        request: (!request_id.is_empty()).then(|| request(request_id)),
        image: "accounts/a/images/web".parse().unwrap(),
        digest: "sha256:00".into(),
        file: Arc::new(file),
        program,
        launch: Launch {
            image: "".into(),
            size: SMALL,
            ceiling: CEILING,
            base_mib: base_mib(SMALL, CEILING),
            drive_mib: 0,
            thresholds: Thresholds::default(),
            mode: None,
        },
        by: "a test".into(),
    }
}

fn machine_id(machine: &v1::Machine) -> MachineId {
    listing::machine_id(&machine.name).unwrap()
}

impl Fixture {
    async fn launched(&self) -> v1::Machine {
        let machine = self.host.launch(launching("")).await.unwrap();
        assert_eq!(machine.state(), State::Active);
        machine
    }

    async fn machine(&self, name: &str) -> v1::Machine {
        let machines = self.host.machines(true).await;
        machines.into_iter().find(|machine| machine.name == name).unwrap()
    }

    fn images(&self) -> &Images {
        &self.guests.images
    }

    /// An agent that takes over what is known of these.
    async fn over(dir: &Path, images: &Images) -> Self {
        let records = images.lock().records.clone();
        let left: BTreeMap<_, _> = records.into_iter().map(|(id, file)| (id, file.get())).collect();
        let guests = InProcess {
            left: Arc::new(left),
            images: images.clone(),
            ..InProcess::default()
        };
        let deps = Self::deps(dir, guests.clone(), config).await;
        let host = HostHandle::start(deps).await.unwrap();
        Self::of(guests, host)
    }

    /// The guest says what it uses, which is then known.
    async fn measured(&self, machine: &v1::Machine, memory_mib: u64) {
        let used = proto::MachineUse {
            memory_bytes: memory_mib << 20,
            ..Default::default()
        };
        self.images().lock().uses = Some(used);
        eventually("its use to be known", async || {
            let shown = self.machine(&machine.name).await.launched.unwrap();
            shown.metrics.contains_key("memory_use") && shown.metrics.contains_key("cpu_use")
        })
        .await;
    }
}

/// An agent that is killed, with all that it was doing, and the one that comes after it.
fn killed<T>(first: impl AsyncFnOnce(Fixture) -> T, then: impl AsyncFnOnce(Fixture, T)) {
    let dir = tempfile::tempdir().unwrap();
    let images = Images::default();
    let runtime = || {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        builder.enable_all().build().unwrap()
    };
    let one = runtime();
    let known = one.block_on(async {
        let fixture = Fixture::over(dir.path(), &images).await;
        first(fixture).await
    });
    drop(one);
    runtime().block_on(async {
        let fixture = Fixture::over(dir.path(), &images).await;
        then(fixture, known).await;
    });
}

fn size(vcpus: u32, memory_mib: u32) -> Option<v1::MachineSize> {
    Some(v1::MachineSize {
        vcpus,
        cpu_millis: vcpus * 1000,
        memory_mib,
    })
}

fn to(vcpus: u32, memory_mib: u32) -> SizeChange {
    SizeChange {
        vcpus: Some(vcpus),
        cpu_millis: None,
        memory_mib: Some(memory_mib),
    }
}

#[tokio::test]
async fn a_machine_runs_its_images_program_with_all_that_it_was_launched_with() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = start(dir.path()).await;
    let machine = fixture.host.launch(launching("mine")).await.unwrap();
    assert_eq!((machine.state(), &*machine.account), (State::Active, "accounts/a"));
    assert_eq!(machine.runtime, "");
    let launched = machine.launched.clone().unwrap();
    assert_eq!(
        (&*launched.image, &*launched.digest),
        ("accounts/a/images/web", "sha256:00")
    );
    // It was booted with less, and had the rest before its program was started.
    assert_eq!((launched.size, launched.taken), (size(1, 512), size(1, 512)));
    assert_eq!(launched.ceiling, size(4, 1024));
    assert_eq!(base_mib(SMALL, CEILING), 256);
    assert_eq!(fixture.images().vmm(&machine.name).lock().unwrap().taken, (1, 512));
    // The drive of any other machine.
    assert!(machine.scratch_mib > 0);
    let asked = fixture.images().lock().asked.clone();
    let [asked] = &asked[..] else { panic!("{asked:?}") };
    assert_eq!(asked.id, id(&machine.name));
    assert_eq!(asked.command, ["/bin/server", "-p", "80"]);
    assert_eq!((&*asked.working_dir, &*asked.home), ("/srv", "/var/www"));
    assert_eq!((asked.uid, asked.gid, &asked.groups[..]), (33, 34, &[35][..]));
    // Who asks again has the same; another account's id is another's.
    let again = fixture.host.launch(launching("mine")).await.unwrap();
    assert_eq!(again.name, machine.name);
    let before = fixture.host.launched_before("a".into(), request("mine")).await;
    assert_eq!(before.unwrap().unwrap().name, machine.name);
    assert!(
        fixture
            .host
            .launched_before("b".into(), request("mine"))
            .await
            .is_none()
    );
    let reused = Launching {
        request: Some(LaunchRequest {
            sha256: "88".into(),
            ..request("mine")
        }),
        ..launching("")
    };
    let error = fixture.host.launch(reused).await.unwrap_err();
    assert!(matches!(error, LaunchFailure::Reused), "{error}");
    let others = Launching {
        account: "b".into(),
        ..launching("mine")
    };
    let other = fixture.host.launch(others).await.unwrap();
    assert_ne!(other.name, machine.name);
    let why = fixture.why(id(&machine.name)).await;
    assert_eq!(why[0], "launch machine", "{why:?}");
    fixture.host.drain(PATIENCE).await;
    let ended = fixture.machine(&machine.name).await;
    assert_eq!(ended.end.unwrap().reason(), Reason::Stopped);
    let stopped = fixture.images().lock().stopped.clone();
    assert_eq!(stopped.iter().map(|stop| stop.signal).collect::<Vec<_>>(), [3, 3]);
}

#[tokio::test]
async fn what_can_not_be_had_is_refused_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = Fixture::with(dir.path(), |all| {
        config(all);
        all.account.machines = Some(1);
    })
    .await;
    let large = Launching {
        launch: Launch {
            size: Size::whole(5, 512),
            ..launching("").launch
        },
        ..launching("")
    };
    let error = fixture.host.launch(large).await.unwrap_err();
    assert!(matches!(error, LaunchFailure::Refused(LaunchError::Size(_))), "{error}");
    assert_eq!(fixture.host.machines(true).await, []);
    fixture.launched().await;
    let error = fixture.host.launch(launching("")).await.unwrap_err();
    let LaunchFailure::Refused(LaunchError::Account { part, .. }) = error else {
        panic!("{error}");
    };
    assert_eq!(part, Part::Machines);
    assert_eq!(fixture.host.machines(true).await.len(), 1);
    let bounds = fixture.host.bounds_for("a".into()).await.unwrap();
    assert_eq!((bounds.machine.vcpus, bounds.machine.memory_mib), (4, 8192));
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn a_program_that_ends_ends_its_machine_with_what_it_exited_with() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = start(dir.path()).await;
    let machine = fixture.launched().await;
    let other = fixture.launched().await;
    let end = tokio::spawn({
        let (host, id) = (fixture.host.clone(), machine_id(&machine));
        async move { host.end_of(id).await }
    });
    fixture.images().end(&machine.name, 3);
    let ended = end.await.unwrap().unwrap();
    let end = ended.end.clone().unwrap();
    assert_eq!((end.reason(), end.exit_status), (Reason::ProgramEnded, Some(3)));
    assert_eq!(ended.state(), State::Ended);
    // Also for who comes later.
    assert_eq!(fixture.host.end_of(machine_id(&machine)).await, Some(ended.clone()));
    let error = fixture.host.guest(machine_id(&machine)).await.unwrap_err();
    assert!(matches!(error, LaunchedError::Ended(_)), "{error}");
    let stopped = fixture.host.stop(machine_id(&machine), SECOND, "me".into()).await;
    assert_eq!(stopped.unwrap(), ended, "it had ended");
    assert_eq!(fixture.machine(&other.name).await.state(), State::Active);
    assert!(!fixture.host.pulse().await.unwrap().boots_fail);
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn a_program_that_can_not_be_started_fails_the_launch_however_often_that_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = start(dir.path()).await;
    fixture.images().lock().fails = Some(proto::FunctionError {
        message: "there is no /bin/server".into(),
        ..Default::default()
    });
    for _ in 0..2 {
        let error = fixture.host.launch(launching("mine")).await.unwrap_err();
        let LaunchFailure::Ended(machine) = error else {
            panic!("{error}");
        };
        let end = machine.end.unwrap();
        assert_eq!(
            (end.reason(), &*end.detail),
            (Reason::ProgramFailed, "there is no /bin/server")
        );
    }
    assert_eq!(fixture.host.machines(true).await.len(), 1);
    assert_eq!(fixture.host.machines(false).await.len(), 0);
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn a_machine_that_is_stopped_has_its_program_end_first() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = start(dir.path()).await;
    let machine = fixture.launched().await;
    let id = machine_id(&machine);
    let grace = Duration::from_secs(77);
    let (one, other) = tokio::join!(
        fixture.host.stop(id, grace, "me".into()),
        fixture.host.stop(id, grace, "me too".into())
    );
    let ended = one.unwrap();
    assert_eq!(ended, other.unwrap());
    let end = ended.end.unwrap();
    assert_eq!((end.reason(), &*end.detail), (Reason::Stopped, "me asked for it"));
    let stopped = fixture.images().lock().stopped.clone();
    let [stop] = &stopped[..] else { panic!("{stopped:?}") };
    assert_eq!(Duration::try_from(stop.grace.unwrap()).unwrap(), grace);
    let unknown = fixture.host.stop(MachineId(Ulid(7)), grace, "me".into()).await;
    assert!(matches!(unknown, Err(LaunchedError::Unknown)), "{unknown:?}");
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn a_machine_is_made_larger_and_smaller_and_remembers_it() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = start(dir.path()).await;
    let machine = fixture.launched().await;
    let id = machine_id(&machine);
    let resize = async |change| fixture.host.resize(id, change, "me".into(), PATIENCE).await;
    let resized = resize(to(3, 1024)).await.unwrap();
    assert_eq!((resized.before, resized.asked), (size(1, 512), size(3, 1024)));
    assert_eq!((resized.taken, &*resized.reason), (size(3, 1024), "me asked for it"));
    assert!(resized.duration.is_some());
    let shown = fixture.machine(&machine.name).await;
    assert_eq!(shown.amount.unwrap().memory_mib, 1024);
    // Of what it uses nothing is known yet.
    let error = resize(to(1, 512)).await.unwrap_err();
    assert!(matches!(error, ResizeFailure::Refused(_)), "{error}");
    fixture.measured(&machine, 700).await;
    let error = resize(to(1, 512)).await.unwrap_err().to_string();
    assert!(error.contains("what it uses needs"), "{error}");
    let smaller = resize(to(2, 1024)).await.unwrap();
    assert_eq!((smaller.before, smaller.taken), (size(3, 1024), size(2, 1024)));
    // A part of the time of its vCPUs needs nothing of its guest.
    let calls = fixture.images().vmm(&machine.name).lock().unwrap().calls;
    let share = SizeChange {
        cpu_millis: Some(1500),
        ..SizeChange::default()
    };
    let held = resize(share).await.unwrap();
    assert_eq!(held.asked.unwrap().cpu_millis, 1500);
    assert_eq!(held.duration, Some(prost_types::Duration::default()));
    eventually("its devices to know", async || {
        fixture.images().vmm(&machine.name).lock().unwrap().calls > calls
    })
    .await;
    // What it has already is no change.
    let same = resize(share).await.unwrap();
    assert_eq!(same.asked, held.asked);
    let all = fixture.host.resizes(id).await.unwrap();
    let asked: Vec<_> = all.iter().map(|resize| resize.asked).collect();
    assert_eq!(asked, [held.asked, size(2, 1024), size(3, 1024)], "the youngest first");
    assert!(all[1].metrics.contains_key("memory_use"), "{:?}", all[1]);
    fixture.host.drain(PATIENCE).await;
    assert_eq!(
        fixture.host.resizes(id).await.unwrap().len(),
        3,
        "as long as it is remembered"
    );
}

#[tokio::test]
async fn a_guest_that_takes_nothing_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = start(dir.path()).await;
    let machine = fixture.launched().await;
    let id = machine_id(&machine);
    fixture.measured(&machine, 100).await;
    let vmm = fixture.images().vmm(&machine.name);
    vmm.lock().unwrap().refuses = true;
    let resized = fixture
        .host
        .resize(id, to(4, 1024), "me".into(), Duration::from_millis(50));
    let resized = resized.await.unwrap();
    assert_eq!((resized.duration, resized.taken), (None, size(1, 512)));
    let shown = fixture.machine(&machine.name).await;
    assert_eq!(shown.amount.unwrap().memory_mib, 1024, "it may have it at any time");
    // A later one takes its place, and who waited for the first waits no longer.
    let waits = fixture.host.resize(id, to(3, 1024), "me".into(), PATIENCE);
    let (first, second) = tokio::join!(waits, async {
        eventually("the first to be asked for", async || {
            vmm.lock().unwrap().asked == (3, 1024)
        })
        .await;
        let second = fixture.host.resize(id, to(2, 1024), "me".into(), PATIENCE);
        let (second, ()) = tokio::join!(second, async {
            eventually("the second", async || vmm.lock().unwrap().asked == (2, 1024)).await;
            vmm.lock().unwrap().refuses = false;
        });
        second
    });
    assert_eq!(first.unwrap().duration, None);
    let second = second.unwrap();
    assert!(second.duration.is_some());
    assert_eq!(second.taken, size(2, 1024));
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn a_machine_that_ends_while_it_is_resized_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = start(dir.path()).await;
    let machine = fixture.launched().await;
    let id = machine_id(&machine);
    let vmm = fixture.images().vmm(&machine.name);
    vmm.lock().unwrap().refuses = true;
    let (resized, ()) = tokio::join!(fixture.host.resize(id, to(2, 1024), "me".into(), PATIENCE), async {
        eventually("it to be asked for", async || vmm.lock().unwrap().asked == (2, 1024)).await;
        fixture.guests.kill.send_modify(|kills| *kills += 1);
    });
    let Err(ResizeFailure::Ended(ended)) = resized else {
        panic!("{resized:?}");
    };
    assert_eq!(ended.end.unwrap().reason(), Reason::Killed);
    assert_eq!(fixture.host.resizes(id).await.unwrap().len(), 1);
    fixture.host.drain(PATIENCE).await;
}

fn grow_cpu() -> ThresholdSpec {
    ThresholdSpec {
        metric: "cpu_use".into(),
        comparison: Comparison::Above,
        value: 80.0,
        held: Some(SECOND),
        resource: Resource::Vcpus,
        direction: Direction::Grow,
        change: ChangeSpec::By(1),
        least: None,
        most: Some(2),
        cooldown: Some(SECOND),
    }
}

#[tokio::test]
async fn a_machine_grows_by_what_is_measured_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = start(dir.path()).await;
    let machine = fixture.launched().await;
    let id = machine_id(&machine);
    let bounds = fixture.host.bounds_of(id).await.unwrap();
    assert_eq!((bounds.machine, bounds.base_mib), (CEILING, 256));
    let thresholds = check(&[grow_cpu()], &bounds).unwrap();
    let shown = fixture
        .host
        .set_thresholds(id, thresholds, None, "me".into())
        .await
        .unwrap();
    assert_eq!(shown.launched.unwrap().thresholds.len(), 1);
    fixture.images().lock().uses = Some(proto::MachineUse::default());
    fixture.images().load(1000);
    eventually("it to grow", async || {
        fixture.machine(&machine.name).await.launched.unwrap().taken == size(2, 512)
    })
    .await;
    let resizes = fixture.host.resizes(id).await.unwrap();
    let [resize] = &resizes[..] else { panic!("{resizes:?}") };
    assert!(resize.reason.starts_with("cpu_use was above 80%"), "{}", resize.reason);
    assert!(resize.metrics["cpu_use"] > 80.0, "{:?}", resize.metrics);
    let why = fixture.why(super::id(&machine.name)).await;
    for verb in ["set thresholds", "resize machine", "report resize"] {
        assert!(why.contains(&verb.to_owned()), "{why:?}");
    }
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn what_a_guests_kernel_does_not_count_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = start(dir.path()).await;
    let machine = fixture.launched().await;
    assert_eq!(
        machine.launched.unwrap().unsupported_metrics,
        [] as [&str; 0],
        "nobody knows yet"
    );
    let pressures = ["cpu_pressure", "memory_pressure", "io_pressure"];
    let used = proto::MachineUse {
        memory_bytes: 100 << 20,
        ..Default::default()
    };
    fixture.images().lock().uses = Some(used);
    eventually("it to be known that its pressure is not", async || {
        let shown = fixture.machine(&machine.name).await.launched.unwrap();
        let known = pressures.iter().any(|name| shown.metrics.contains_key(*name));
        !known && shown.unsupported_metrics == pressures
    })
    .await;
    // With one of them all are counted: an older init does not tell of those that are 0.
    let used = proto::MachineUse {
        io_pressure_us: Some(7),
        ..used
    };
    fixture.images().lock().uses = Some(used);
    eventually("its pressure to be known", async || {
        let shown = fixture.machine(&machine.name).await.launched.unwrap();
        let known = pressures.iter().all(|name| shown.metrics.contains_key(*name));
        known && shown.unsupported_metrics.is_empty()
    })
    .await;
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn a_guest_that_lies_harms_itself_alone() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = start(dir.path()).await;
    let machine = fixture.launched().await;
    let other = fixture.host.launch(Launching {
        account: "b".into(),
        ..launching("")
    });
    let other = other.await.unwrap();
    let id = machine_id(&machine);
    let memory = ThresholdSpec {
        metric: "memory_use".into(),
        resource: Resource::Memory,
        change: ChangeSpec::ByPercent(900.0),
        most: Some(768),
        ..grow_cpu()
    };
    let bounds = fixture.host.bounds_of(id).await.unwrap();
    let thresholds = check(&[memory], &bounds).unwrap();
    fixture
        .host
        .set_thresholds(id, thresholds, None, "me".into())
        .await
        .unwrap();
    {
        let mut state = fixture.images().lock();
        state.uses = Some(proto::MachineUse {
            memory_bytes: u64::MAX,
            cpu_pressure_us: Some(u64::MAX),
            memory_pressure_us: Some(u64::MAX),
            io_pressure_us: Some(u64::MAX),
        });
        // Of a container that nobody has.
        state.ends.push(proto::ContainerEnd {
            id: "../x".into(),
            ..Default::default()
        });
        state.ends.push(proto::ContainerEnd {
            id: Ulid::generate().to_string(),
            ..Default::default()
        });
    }
    eventually("it to grow as far as it may", async || {
        fixture.machine(&machine.name).await.launched.unwrap().size == size(1, 768)
    })
    .await;
    let others = fixture.machine(&other.name).await;
    assert_eq!(others.launched.unwrap().size, size(1, 512));
    fixture.host.drain(PATIENCE).await;
}

#[test]
fn the_next_agent_knows_all_of_a_machine_that_was_launched() {
    let first = async |fixture: Fixture| {
        let machine = fixture.host.launch(launching("mine")).await.unwrap();
        let id = machine_id(&machine);
        let bounds = fixture.host.bounds_of(id).await.unwrap();
        let thresholds = check(&[grow_cpu()], &bounds).unwrap();
        fixture
            .host
            .set_thresholds(id, thresholds, None, "me".into())
            .await
            .unwrap();
        let resized = fixture
            .host
            .resize(id, to(2, 768), "me".into(), PATIENCE)
            .await
            .unwrap();
        assert!(resized.duration.is_some());
        // In the middle of this one it is killed.
        fixture.images().vmm(&machine.name).lock().unwrap().refuses = true;
        let asked = fixture
            .host
            .resize(id, to(3, 1024), "me".into(), Duration::from_millis(50));
        assert_eq!(asked.await.unwrap().duration, None);
        fixture.machine(&machine.name).await
    };
    killed(first, async |fixture, machine| {
        let (id, before) = (machine_id(&machine), machine.launched.unwrap());
        let again = fixture.host.launch(launching("mine")).await.unwrap();
        assert_eq!(again.name, machine.name);
        assert_eq!(fixture.images().lock().asked.len(), 1, "its program was not run again");
        let launched = again.launched.unwrap();
        assert_eq!((launched.size, launched.ceiling), (size(3, 1024), before.ceiling));
        assert_eq!(launched.thresholds, before.thresholds);
        assert_eq!((launched.image, launched.digest), (before.image, before.digest));
        let resizes = fixture.host.resizes(id).await.unwrap();
        let asked: Vec<_> = resizes.iter().map(|resize| resize.asked).collect();
        assert_eq!(asked, [size(3, 1024), size(2, 768)]);
        // Its devices tell this agent that its guest has it.
        fixture.images().vmm(&machine.name).lock().unwrap().refuses = false;
        eventually("it to be taken", async || {
            fixture.machine(&machine.name).await.launched.unwrap().taken == size(3, 1024)
        })
        .await;
        eventually("that to be told", async || {
            fixture.host.resizes(id).await.unwrap()[0].duration.is_some()
        })
        .await;
        fixture.images().end(&machine.name, 137);
        let end = fixture.host.end_of(id).await.unwrap().end.unwrap();
        assert_eq!((end.reason(), end.exit_status), (Reason::ProgramEnded, Some(137)));
        fixture.host.drain(PATIENCE).await;
    });
}

#[test]
fn a_launch_that_its_agent_did_not_survive_goes_on_under_the_next() {
    let first = async |fixture: Fixture| {
        fixture.hold(true);
        let host = fixture.host.clone();
        tokio::spawn(async move { host.launch(launching("mine")).await });
        let images = fixture.images().clone();
        eventually("its program to be started", async || images.lock().asked.len() == 1).await;
    };
    killed(first, async |fixture, ()| {
        let machine = fixture.host.launch(launching("mine")).await.unwrap();
        assert_eq!(fixture.host.machines(true).await.len(), 1);
        let asked = fixture.images().lock().asked.clone();
        assert_eq!(asked.len(), 2, "it was asked for again, and the guest knew it");
        assert!(asked.iter().all(|asked| asked.id == id(&machine.name)));
        fixture.host.drain(PATIENCE).await;
    });
}

#[test]
fn who_asks_again_has_the_machine_that_ended_while_no_agent_was_there() {
    let first = async |fixture: Fixture| {
        let machine = fixture.host.launch(launching("mine")).await.unwrap();
        fixture.images().lock().gone = true;
        machine.name
    };
    killed(first, async |fixture, name| {
        let id = listing::machine_id(&name).unwrap();
        let ended = tokio::time::timeout(PATIENCE, fixture.host.end_of(id)).await;
        let again = fixture.host.launch(launching("mine")).await.unwrap();
        assert_eq!(Some(&again), ended.unwrap().as_ref());
        assert_eq!(again.state(), State::Ended);
        fixture.host.drain(PATIENCE).await;
    });
}

/// A machine whose program has been asked to end, and has so long for that.
async fn stopping(fixture: &Fixture, grace: Duration) -> MachineId {
    let machine = fixture.launched().await;
    fixture.hold(true);
    let (host, id) = (fixture.host.clone(), machine_id(&machine));
    tokio::spawn(async move { host.stop(id, grace, "me".into()).await });
    let images = fixture.images().clone();
    eventually("its program to be asked to end", async || images.graces() == [grace]).await;
    id
}

#[test]
fn a_stop_that_its_agent_did_not_survive_goes_on_with_the_time_that_is_left() {
    let grace = Duration::from_secs(300);
    let first = async |fixture: Fixture| stopping(&fixture, grace).await;
    killed(first, async |fixture, id| {
        let ended = tokio::time::timeout(PATIENCE, fixture.host.end_of(id)).await;
        let end = ended.unwrap().unwrap().end.unwrap();
        assert_eq!((end.reason(), &*end.detail), (Reason::Stopped, "me asked for it"));
        let graces = fixture.images().graces();
        assert_eq!(graces.len(), 2, "it is asked once more");
        assert!(graces[1] < grace && graces[1] > grace - PATIENCE, "{graces:?}");
        fixture.host.drain(PATIENCE).await;
    });
}

#[test]
fn a_stop_goes_on_with_some_time_however_long_no_agent_was_there() {
    let grace = Duration::from_millis(100);
    let first = async |fixture: Fixture| {
        let id = stopping(&fixture, grace).await;
        tokio::time::sleep(2 * grace).await;
        id
    };
    killed(first, async |fixture, id| {
        let ended = tokio::time::timeout(PATIENCE, fixture.host.end_of(id)).await;
        assert!(ended.unwrap().is_some());
        assert_eq!(fixture.images().graces(), [grace, grace]);
        fixture.host.drain(PATIENCE).await;
    });
}

#[test]
fn a_stop_that_goes_on_is_not_put_off_by_one_that_is_asked_for_meanwhile() {
    let grace = Duration::from_secs(300);
    let first = async |fixture: Fixture| stopping(&fixture, grace).await;
    killed(first, async |fixture, id| {
        // Mostly before its guest has answered.
        fixture.hold(true);
        let stop = fixture.host.stop(id, Duration::from_secs(600), "you".into());
        let (ended, ()) = tokio::join!(stop, async {
            let images = fixture.images();
            eventually("it to have no more than it had", async || {
                let graces = images.graces();
                graces.len() > 1 && graces.last().is_some_and(|last| *last < grace)
            })
            .await;
            fixture.hold(false);
        });
        assert_eq!(ended.unwrap().end.unwrap().reason(), Reason::Stopped);
        fixture.host.drain(PATIENCE).await;
    });
}

#[tokio::test]
async fn another_program_runs_beside_the_images() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = start(dir.path()).await;
    let machine = fixture.launched().await;
    let guest = fixture.host.guest(machine_id(&machine)).await.unwrap();
    let (to, input) = mpsc::channel(1);
    let part = |part| v1::ExecRequest { part: Some(part) };
    let stdin = |bytes: &'static [u8]| part(v1::exec_request::Part::Stdin(Bytes::from_static(bytes)));
    to.send(part(v1::exec_request::Part::Start(v1::ExecStart::default())))
        .await
        .unwrap();
    let (mut output, grants) = guest.exec(input).await.unwrap();
    assert!(!grants, "it does not say so");
    to.send(stdin(b"hello")).await.unwrap();
    to.send(stdin(b"")).await.unwrap();
    let mut said = Vec::new();
    let status = loop {
        match output.message().await.unwrap().unwrap().part.unwrap() {
            v1::exec_response::Part::Stdout(bytes) => said.extend_from_slice(&bytes),
            v1::exec_response::Part::ExitStatus(status) => break status,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!((&said[..], status), (&b"hello"[..], 0));
    // One that ends takes it with it.
    fixture.images().grant();
    let (mut other, grants) = guest.exec(mpsc::channel(1).1).await.unwrap();
    assert!(grants);
    fixture.guests.kill.send_modify(|kills| *kills += 1);
    while let Ok(Some(_)) = other.message().await {}
    let end = fixture.host.end_of(machine_id(&machine)).await.unwrap().end.unwrap();
    assert_eq!(end.reason(), Reason::Killed);
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn what_its_program_writes_is_kept_for_the_machine() {
    let dir = tempfile::tempdir().unwrap();
    let guests = InProcess::default();
    let deps = Fixture::deps(dir.path(), guests.clone(), config).await;
    let logs = deps.logs.clone();
    let fixture = Fixture::of(guests.clone(), HostHandle::start(deps).await.unwrap());
    let machine = fixture.launched().await;
    let id = machine_id(&machine);
    let mut reader = logs.machine_reader(id.0, Filter::default()).await.unwrap();
    assert!(reader.next().await.unwrap().is_empty());
    guests.script().written.push(line(&id.to_string(), "listening"));
    assert!(tokio::time::timeout(PATIENCE, reader.more()).await.unwrap());
    let lines = reader.next().await.unwrap();
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert_eq!(lines[0].text, "listening");
    fixture.host.drain(PATIENCE).await;
}
