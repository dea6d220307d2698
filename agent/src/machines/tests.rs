//! Machines whose VMM is a shell script and whose guest is this process: every way in which either can go wrong.

mod crashes;
mod images;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::pin::Pin;
use std::time::SystemTime;

use stoker_linux::sched::Policy;
use stoker_proto::guest as proto;
use stoker_proto::guest::guest_server::Guest as GuestService;
use stoker_proto::v1;
use stoker_proto::v1::machine_end::Reason;
use stoker_testkit::cgroup::with_cgroups;
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status, Streaming};

use super::process::Machine;
use super::remains::end;
use super::*;
use crate::fake_guest;
use crate::lock::Lock;

/// A host whose VMM is that script; nothing of it may be left when the test is over.
fn with_vmm<F: Future<Output = ()>>(script: &'static str, test: impl FnOnce(Machines) -> F + Send) {
    with_cgroups(move |mount| {
        let dir = tempfile::tempdir().unwrap();
        let machines = host(mount, dir.path(), script);
        let (cgroup, run_dir) = (machines.setup.cgroup.clone(), machines.setup.run_dir.clone());
        block_on(test(machines));
        nothing_is_left(&cgroup, &run_dir);
    });
}

/// A host of its own in a folder and in a cgroup of that name, whose VMM is that script.
fn host(mount: &Path, folder: &Path, script: &str) -> Machines {
    let vmm = folder.join("vmm");
    fs::write(&vmm, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&vmm, fs::Permissions::from_mode(0o755)).unwrap();
    let run_dir = folder.join("run");
    let cgroup = cgroup::open(mount, &Path::new(folder.file_name().unwrap()).join("machines")).unwrap();
    let locks = [
        Lock::folder(&run_dir, "machines.run_dir").unwrap(),
        Lock::cgroup(cgroup.path(), "machines.cgroup").unwrap(),
    ];
    let setup = Setup {
        vmm,
        kernel: "/kernel".into(),
        initramfs: "/initramfs".into(),
        image: "/image".into(),
        boot_timeout: Duration::from_secs(10),
        ceilings: Ceilings::new(&config::Machines::default(), host_size()),
        run_dir,
        scratch_dir: folder.join("scratch"),
        cgroup,
        mount: mount.to_owned(),
        // This host's may all be bound to cgroup v1.
        controllers: &[],
        schedulers: Schedulers::default(),
        next_cid: AtomicU32::new(0),
        owner: owner(),
        _locks: locks,
    };
    Machines { setup: Arc::new(setup) }
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.unwrap().block_on(work)
}

/// There is no machine any more, and nothing of one; removes the cgroup of all.
fn nothing_is_left(cgroup: &Cgroup, run_dir: &Path) {
    assert_eq!(cgroup.children().unwrap(), [], "cgroups are left");
    let left = fs::read_dir(run_dir).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(left.collect::<Vec<_>>(), ["stokerd.lock"], "files are left");
    Cgroup::at(cgroup.path().parent().unwrap().to_owned())
        .destroy()
        .unwrap();
}

fn owner() -> Owner {
    Owner {
        host: Ulid::from_parts(1, 1),
        store: "/var/lib/stoker/state".into(),
    }
}

fn spec() -> Spec {
    Spec {
        id: Ulid::generate(),
        shape: Shape {
            vcpus: 1,
            memory_mib: 128,
            drive_mib: 512,
            baseline_millis: 200,
        },
        ceiling: None,
        runtime: "python3.11".into(),
        cpu_weight: 500,
        terms: None,
        created: Duration::from_millis(7),
        launched: None,
    }
}

async fn spawn(machines: &Machines) -> Process {
    machines.spawn(spec(), |_| {}).await.unwrap()
}

/// Ends a machine as one does whose end is recorded.
async fn clear_away(process: Process, cause: Cause) -> v1::MachineEnd {
    let (end, remains) = process.end(cause).await;
    remains.remove().await;
    end
}

fn kill(process: &Process) {
    let pid = nix::unistd::Pid::from_raw(process.pid().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
}

/// What a guest does when it is called.
#[derive(Clone, Copy, PartialEq)]
enum Manner {
    Good,
    /// Its answers are larger than anything may be.
    Huge,
    /// It can't load the runtime.
    NoRuntime,
    /// It can't use its scratch drive.
    NoDrive,
    /// It runs an image, and no runtime.
    Image,
}

/// Dials as a guest does, and serves until what is returned is dropped.
async fn dial(process: &Process, manner: Manner) -> oneshot::Sender<()> {
    let stream = dialled(process).await.unwrap();
    let (guard, dropped) = oneshot::channel::<()>();
    tokio::spawn(fake_guest::serve(manner, stream, dropped));
    guard
}

async fn dialled(process: &Process) -> io::Result<UnixStream> {
    dialled_at(process.folder.vsock()).await
}

/// Dials an agent that has just come, and serves until that is dropped.
async fn dial_until_heard(vsock: PathBuf, dropped: oneshot::Receiver<()>) {
    let stream = loop {
        match dialled_at(vsock.clone()).await {
            Ok(stream) => break stream,
            Err(_) => tokio::task::yield_now().await,
        }
    };
    fake_guest::serve(Manner::Good, stream, dropped).await;
}

async fn dialled_at(vsock: PathBuf) -> io::Result<UnixStream> {
    let mut path = vsock.into_os_string();
    path.push(format!("_{}", stoker_proto::limits::GUEST_PORT));
    UnixStream::connect(path).await
}

#[tonic::async_trait]
impl GuestService for Manner {
    type InvokeStream = Pin<Box<dyn Stream<Item = Result<proto::InvokeResponse, Status>> + Send>>;
    type WatchStream = Pin<Box<dyn Stream<Item = Result<proto::WatchResponse, Status>> + Send>>;

    async fn hello(&self, request: Request<proto::HelloRequest>) -> Result<Response<proto::HelloResponse>, Status> {
        let runtime = if *self == Self::Image { "" } else { "python3.11" };
        assert_eq!(request.into_inner().runtime, runtime);
        let runtime_error = match self {
            Self::NoRuntime => "there is no interpreter".repeat(1000),
            Self::Good | Self::Huge | Self::NoDrive | Self::Image => String::new(),
        };
        let scratch_error = match self {
            Self::NoDrive => "mke2fs made no file system".repeat(1000),
            Self::Good | Self::Huge | Self::NoRuntime | Self::Image => String::new(),
        };
        Ok(Response::new(proto::HelloResponse {
            runtime_error,
            scratch_error,
            ..Default::default()
        }))
    }

    async fn put_code(
        &self,
        request: Request<Streaming<proto::PutCodeRequest>>,
    ) -> Result<Response<proto::PutCodeResponse>, Status> {
        fake_guest::put_code(request).await
    }

    async fn create_container(
        &self,
        _: Request<proto::CreateContainerRequest>,
    ) -> Result<Response<proto::CreateContainerResponse>, Status> {
        Err(Status::failed_precondition("no code"))
    }

    async fn invoke(
        &self,
        requests: Request<Streaming<proto::InvokeRequest>>,
    ) -> Result<Response<Self::InvokeStream>, Status> {
        let manner = *self;
        let answers = requests.into_inner().map(move |request| {
            let size = if manner == Self::Huge { 8 << 20 } else { 10 };
            Ok(proto::InvokeResponse {
                call: request?.call,
                payload: vec![b' '; size].into(),
                ..Default::default()
            })
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn stop_container(
        &self,
        _: Request<proto::StopContainerRequest>,
    ) -> Result<Response<proto::StopContainerResponse>, Status> {
        Err(Status::not_found("gone"))
    }

    async fn run_image(&self, _: Request<proto::RunImageRequest>) -> Result<Response<proto::RunImageResponse>, Status> {
        Err(Status::unimplemented("no such call"))
    }

    async fn stop_image(
        &self,
        request: Request<proto::StopImageRequest>,
    ) -> Result<Response<proto::StopImageResponse>, Status> {
        images::stop_image(request.into_inner()).await;
        Ok(Response::new(proto::StopImageResponse {}))
    }

    type ExecStream = Pin<Box<dyn Stream<Item = Result<v1::ExecResponse, Status>> + Send>>;

    async fn exec(&self, _: Request<Streaming<v1::ExecRequest>>) -> Result<Response<Self::ExecStream>, Status> {
        Err(Status::unimplemented("no such call"))
    }

    type ForwardPortStream = Pin<Box<dyn Stream<Item = Result<v1::ForwardPortResponse, Status>> + Send>>;

    async fn forward_port(
        &self,
        _: Request<Streaming<v1::ForwardPortRequest>>,
    ) -> Result<Response<Self::ForwardPortStream>, Status> {
        Err(Status::unimplemented("no such call"))
    }

    type FollowLogsStream = Pin<Box<dyn Stream<Item = Result<proto::FollowLogsResponse, Status>> + Send>>;

    async fn follow_logs(
        &self,
        _: Request<proto::FollowLogsRequest>,
    ) -> Result<Response<Self::FollowLogsStream>, Status> {
        // As a guest of an earlier version.
        Err(Status::unimplemented("no such call"))
    }

    type FollowCreditsStream = Pin<Box<dyn Stream<Item = Result<proto::AskCredits, Status>> + Send>>;

    async fn follow_credits(
        &self,
        _: Request<Streaming<proto::Credits>>,
    ) -> Result<Response<Self::FollowCreditsStream>, Status> {
        // The same.
        Err(Status::unimplemented("no such call"))
    }

    async fn watch(&self, _: Request<proto::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let count = if *self == Self::Huge { 1025 } else { 1 };
        let error = proto::FunctionError {
            message: if *self == Self::Huge {
                String::new()
            } else {
                "é".repeat(10_000)
            },
            ..Default::default()
        };
        let end = proto::ContainerEnd {
            id: String::new(),
            error: Some(error),
            exit_status: None,
        };
        let usage = v1::Usage {
            measure_time: Some(prost_types::Timestamp { seconds: 1, nanos: 0 }),
            ..Default::default()
        };
        let used = proto::ContainerUse {
            id: String::new(),
            usage: Some(usage),
        };
        let said = proto::WatchResponse {
            containers: vec![used],
            ended: vec![end; count],
            machine: None,
        };
        let once = tokio_stream::once(Ok(said));
        Ok(Response::new(Box::pin(tokio_stream::StreamExt::chain(
            once,
            tokio_stream::pending(),
        ))))
    }

    async fn power_off(&self, _: Request<proto::PowerOffRequest>) -> Result<Response<proto::PowerOffResponse>, Status> {
        Ok(Response::new(proto::PowerOffResponse {}))
    }
}

#[test]
fn a_vmm_that_fails_tells_why() {
    const SCRIPT: &str = r#"echo '{"reason":"error","detail":"/kernel: no such file","uptime_us":1,"console_tail":""}'
        exit 1"#;
    with_vmm(SCRIPT, async |machines| {
        let (_stopper, mut stopped) = Stopper::new();
        let mut process = spawn(&machines).await;
        let cause = process.until_ready(&mut stopped).await.unwrap_err();
        let end = clear_away(process, cause).await;
        assert_eq!(
            (end.reason(), &*end.detail),
            (Reason::VmmError, "/kernel: no such file")
        );
    });
}

#[test]
fn a_vmm_that_cannot_be_started_leaves_nothing() {
    with_vmm("", async |machines| {
        fs::remove_file(&machines.setup.vmm).unwrap();
        let error = machines.spawn(spec(), |_| {}).await.unwrap_err();
        assert!(matches!(error, MachinesError::Spawn { .. }), "{error}");
        assert!(
            error.to_string().ends_with("machines.vmm must name a program"),
            "{error}"
        );
    });
}

#[test]
fn what_to_do_fits_why_a_vmm_is_not_started() {
    let of = |errno| {
        let source = io::Error::from_raw_os_error(errno);
        let path = "/usr/bin/stoker-vmm".into();
        MachinesError::Spawn { path, source }.to_string()
    };
    assert!(of(nix::libc::EOPNOTSUPP).contains("Operation not supported"));
    assert!(of(nix::libc::EOPNOTSUPP).contains("into its cgroup"));
    assert!(of(nix::libc::ENOENT).contains("machines.vmm"));
    assert!(of(nix::libc::ENOMEM).ends_with("(os error 12)"));
}

/// As one in an uninterruptible wait: the folder of a cgroup whose processes do not end.
#[tokio::test]
async fn a_vmm_that_does_not_die_is_killed_again_and_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let (kill, events) = (dir.path().join("cgroup.kill"), dir.path().join("cgroup.events"));
    fs::write(&events, "populated 1\nfrozen 0\n").unwrap();
    let ending = async {
        let moment = Duration::from_millis(20);
        end(&Cgroup::at(dir.path().to_owned()), moment, moment).await;
    };
    let mut ending = std::pin::pin!(ending);
    for _ in 0..3 {
        fs::write(&kill, "").unwrap();
        tokio::select! {
            () = &mut ending => panic!("it is there still, and its memory counts"),
            () = async {
                while fs::read_to_string(&kill).unwrap() != "1" {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            } => {}
        }
    }
    fs::write(&events, "populated 0\nfrozen 0\n").unwrap();
    tokio::time::timeout(Duration::from_secs(60), ending).await.unwrap();
}

#[test]
fn a_machine_that_cannot_be_bounded_is_not_started() {
    with_vmm("exec sleep 1000", async |mut machines| {
        let setup = Arc::get_mut(&mut machines.setup).unwrap();
        // With a process in it, it can't pass on what controllers there are.
        let keeps = setup.cgroup.create("keeps").unwrap();
        let mut process = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        keeps.take(process.id()).unwrap();
        (setup.cgroup, setup.controllers) = (keeps.clone(), &cgroup::CONTROLLERS);
        let error = machines.spawn(spec(), |_| {}).await.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, MachinesError::Unbounded { .. }), "{error}");
        assert!(
            text.contains("was not started") && text.contains("memory.max"),
            "{text}"
        );
        assert_eq!(keeps.children().unwrap(), [], "nothing is left of it");
        keeps.destroy().unwrap();
        assert!(!process.wait().unwrap().success());
    });
}

#[test]
fn what_is_left_of_a_machine_without_a_process_is_cleared_away() {
    with_vmm("exec sleep 1000", async |machines| {
        let process = spawn(&machines).await;
        let (id, pid, cgroup) = (process.id(), process.pid(), process.cgroup().clone());
        drop(process);
        let cgroup_id = cgroup.id().unwrap();
        assert_eq!(cgroup.processes().unwrap(), [pid]);
        let (remains, found) = machines.clear_away(id).await;
        assert_eq!(found, Some(cgroup_id));
        remains.remove().await;
        assert!(!cgroup.path().exists());
        assert_eq!(machines.clear_away(id).await.1, None);
    });
}

#[test]
fn a_machine_that_can_not_be_recorded_is_not_started() {
    with_vmm("", async |machines| {
        let run_dir = machines.setup.run_dir.clone();
        stoker_testkit::disk::mount_small(&run_dir, 1 << 20);
        let ballast = run_dir.join("ballast");
        stoker_testkit::disk::fill(&ballast);
        let error = machines.spawn(spec(), |_| panic!("it was to start")).await.unwrap_err();
        assert!(
            matches!(&error, MachinesError::Folder { source, .. } if source.kind() == io::ErrorKind::StorageFull),
            "{error}"
        );
        let names = fs::read_dir(&run_dir).unwrap().map(|entry| entry.unwrap().file_name());
        assert_eq!(names.collect::<Vec<_>>(), ["ballast"]);
        stoker_testkit::disk::free(&ballast);
        let process = machines.spawn(spec(), |_| {}).await.unwrap();
        clear_away(process, Cause::Stopped(Stop::Now("enough".into()))).await;
        nix::mount::umount2(&run_dir, nix::mount::MntFlags::MNT_DETACH).unwrap();
    });
}

#[test]
fn a_guest_that_never_answers_is_hung() {
    const SCRIPT: &str = "echo 'Loading ...' > console.log; sleep 1000 & exec sleep 1000";
    with_vmm(SCRIPT, async |mut machines| {
        Arc::get_mut(&mut machines.setup).unwrap().boot_timeout = Duration::from_millis(300);
        let (_stopper, mut stopped) = Stopper::new();
        let mut process = spawn(&machines).await;
        let cause = process.until_ready(&mut stopped).await.unwrap_err();
        assert!(matches!(cause, Cause::NoAnswer(_)), "{cause:?}");
        let end = clear_away(process, cause).await;
        assert_eq!(
            (end.reason(), &*end.console_tail),
            (Reason::BootTimedOut, "Loading ...\n")
        );
    });
}

#[test]
fn a_machine_is_ready_once_its_guest_answered_and_ends_when_told() {
    with_vmm("exec sleep 1000", async |machines| {
        let (stopper, mut stopped) = Stopper::new();
        let mut process = spawn(&machines).await;
        assert!(process.pid() > 0 && !process.cgroup_below_mount().starts_with('/'));
        let _guest = dial(&process, Manner::Good).await;
        let ready = process.until_ready(&mut stopped).await.unwrap();
        // Nobody else is let in.
        assert!(dialled(&process).await.is_err());
        ready.guest.stop_container("x".into()).await.unwrap();
        let mut watch = ready.guest.watch(Duration::from_secs(1)).await.unwrap();
        let asked = SystemTime::now();
        let said = watch.message().await.unwrap();
        let measured = said.containers[0].usage.unwrap().measure_time.unwrap();
        assert!(
            SystemTime::try_from(measured).unwrap() >= asked,
            "its clock is not believed"
        );
        let kept = said.ended[0].error.as_ref().unwrap().message.len();
        assert_eq!(kept, MAX_DETAIL, "what it says is cut");
        let refused = ready.guest.create_container(Default::default(), Duration::ZERO).await;
        assert!(matches!(refused, Err(GuestError::Refused { .. })), "{refused:?}");
        stopper.stop(Stop::Now("nobody needs it".into()));
        stopper.stop(Stop::Broken("too late".into()));
        let cause = process.until_ended(ready, &mut stopped).await;
        let end = clear_away(process, cause).await;
        assert_eq!((end.reason(), &*end.detail), (Reason::Stopped, "nobody needs it"));
    });
}

#[test]
fn a_guest_without_the_runtime_is_not_ready() {
    with_vmm("exec sleep 1000", async |machines| {
        let (_stopper, mut stopped) = Stopper::new();
        let mut process = spawn(&machines).await;
        let _guest = dial(&process, Manner::NoRuntime).await;
        let cause = process.until_ready(&mut stopped).await.unwrap_err();
        let end = clear_away(process, cause).await;
        assert_eq!(end.reason(), Reason::RuntimeFailed);
        assert!(
            end.detail
                .starts_with("the runtime python3.11 does not start: there is no interpreter"),
            "{}",
            end.detail
        );
        assert!(end.detail.len() < 9000);
    });
}

#[test]
fn a_guest_without_its_drive_is_not_ready() {
    with_vmm("exec sleep 1000", async |machines| {
        let (_stopper, mut stopped) = Stopper::new();
        let mut process = spawn(&machines).await;
        let config = fs::read_to_string(process.folder.path().join("config.json")).unwrap();
        let config: stoker_vmm::config::MachineConfig = serde_json::from_str(&config).unwrap();
        let drive = config.scratch.unwrap();
        assert_eq!(
            (drive.folder, drive.size_mib),
            (machines.setup.scratch_dir.clone(), 512)
        );
        let _guest = dial(&process, Manner::NoDrive).await;
        let cause = process.until_ready(&mut stopped).await.unwrap_err();
        let end = clear_away(process, cause).await;
        assert_eq!(end.reason(), Reason::ScratchFailed);
        let says = "the guest can't use its scratch disk: mke2fs made no file system";
        assert!(end.detail.starts_with(says), "{}", end.detail);
        assert!(end.detail.len() < 9000);
        // One that was booted without a drive does without.
        let without = Spec {
            shape: Shape {
                drive_mib: 0,
                ..spec().shape
            },
            ..spec()
        };
        let mut process = machines.spawn(without, |_| {}).await.unwrap();
        let _guest = dial(&process, Manner::NoDrive).await;
        let ready = process.until_ready(&mut stopped).await.unwrap();
        drop(ready);
        clear_away(process, Cause::NoAnswer(Duration::ZERO)).await;
    });
}

#[test]
fn a_vmm_that_is_killed_is_told_apart() {
    with_vmm("exec sleep 1000", async |machines| {
        let (stopper, mut stopped) = Stopper::new();
        let mut process = spawn(&machines).await;
        let _guest = dial(&process, Manner::Good).await;
        let ready = process.until_ready(&mut stopped).await.unwrap();
        kill(&process);
        // As a call in flight says when the connection breaks.
        stopper.stop(Stop::Broken("the connection broke".into()));
        let cause = process.until_ended(ready, &mut stopped).await;
        let end = clear_away(process, cause).await;
        assert_eq!(end.reason(), Reason::Killed);
        assert!(end.detail.contains("SIGKILL"), "{}", end.detail);
    });
}

#[test]
fn a_guest_that_hangs_up_takes_its_machine_with_it() {
    with_vmm("exec sleep 1000", async |machines| {
        let (_stopper, mut stopped) = Stopper::new();
        let mut process = spawn(&machines).await;
        let guest = dial(&process, Manner::Good).await;
        let ready = process.until_ready(&mut stopped).await.unwrap();
        drop(guest);
        let cause = process.until_ended(ready, &mut stopped).await;
        assert!(matches!(&cause, Cause::HungUp(how) if !how.is_empty()), "{cause:?}");
        assert_eq!(clear_away(process, cause).await.reason(), Reason::GuestHung);
    });
}

#[test]
fn a_guest_that_speaks_something_else_is_never_ready() {
    use tokio::io::AsyncWriteExt as _;
    with_vmm("exec sleep 1000", async |machines| {
        let (_stopper, mut stopped) = Stopper::new();
        let mut process = spawn(&machines).await;
        let mut stream = dialled(&process).await.unwrap();
        stream.write_all(&[0x41; 4096]).await.unwrap();
        let cause = process.until_ready(&mut stopped).await.unwrap_err();
        assert!(matches!(cause, Cause::HungUp(_)), "{cause:?}");
        assert_eq!(clear_away(process, cause).await.reason(), Reason::GuestHung);
    });
}

#[test]
fn an_answer_that_is_too_large_is_not_taken() {
    with_vmm("exec sleep 1000", async |machines| {
        let (stopper, mut stopped) = Stopper::new();
        let mut process = spawn(&machines).await;
        let _guest = dial(&process, Manner::Huge).await;
        let ready = process.until_ready(&mut stopped).await.unwrap();
        let answer = ready.guest.invoke(Default::default(), Duration::from_secs(1)).await;
        assert!(matches!(answer, Err(GuestError::Broken { .. })), "{answer:?}");
        // Nor one that tells of more containers than there can be.
        let said = ready.guest.watch(Duration::from_secs(1)).await.unwrap().message().await;
        assert!(matches!(said, Err(GuestError::Broken { .. })), "{said:?}");
        stopper.stop(Stop::Now("done".into()));
        let cause = process.until_ended(ready, &mut stopped).await;
        clear_away(process, cause).await;
    });
}

#[test]
fn the_use_of_as_many_containers_as_a_machine_holds_is_taken() {
    let used = proto::ContainerUse {
        id: Ulid::generate().to_string(),
        usage: Some(v1::Usage {
            cpu_ns: u64::MAX,
            wait_ns: u64::MAX,
            memory_bytes: u64::MAX,
            memory_peak_bytes: u64::MAX,
            measure_time: None,
        }),
    };
    // Of 10 millicores each, the least that the API takes, on 8 vCPUs.
    let said = proto::WatchResponse {
        containers: vec![used; 800],
        ended: Vec::new(),
        machine: None,
    };
    assert!(prost::Message::encoded_len(&said) < guest::MAX_WATCH_MESSAGE);
}

#[test]
fn a_text_is_cut_between_characters() {
    let mut text = format!("x{}", "é".repeat(MAX_DETAIL));
    cut(&mut text);
    assert_eq!(text.len(), MAX_DETAIL - 1);
    let mut short = "é".to_owned();
    cut(&mut short);
    assert_eq!(short, "é");
}

#[test]
fn code_is_brought_once() {
    with_vmm("exec sleep 1000", async |machines| {
        let dir = tempfile::tempdir().unwrap();
        let store = crate::code::CodeStore::open(dir.path(), &owner()).unwrap();
        let mut staged = store.stage().unwrap();
        io::Write::write_all(&mut staged, &vec![7; 3 << 20]).unwrap();
        store.put("00", staged.path()).await.unwrap();
        let (stopper, mut stopped) = Stopper::new();
        let mut process = spawn(&machines).await;
        let _guest = dial(&process, Manner::Good).await;
        let ready = process.until_ready(&mut stopped).await.unwrap();
        let missing = ready.guest.put_code(&store, "01", 0).await;
        assert!(matches!(missing, Err(GuestError::Code(_))), "{missing:?}");
        ready.guest.put_code(&store, "00", 0).await.unwrap();
        // It is there now: the host's own is not asked for any more.
        store.remove("00").await.unwrap();
        ready.guest.put_code(&store, "00", 0).await.unwrap();
        // A guest that has dropped it is brought it again.
        let refused = ready.guest.create_container(Default::default(), Duration::ZERO).await;
        assert!(refused.is_err_and(|error| error.is_precondition()));
        ready.guest.forget_code("00");
        let missing = ready.guest.put_code(&store, "00", 0).await;
        assert!(matches!(missing, Err(GuestError::Code(_))), "{missing:?}");
        stopper.stop(Stop::Now("done".into()));
        let cause = process.until_ended(ready, &mut stopped).await;
        clear_away(process, cause).await;
    });
}

/// As the next agent of this owner finds them.
fn found(machines: &Machines, this: &Owner) -> Vec<Machine> {
    let setup = &machines.setup;
    found::look(&setup.cgroup, &setup.mount, &setup.run_dir, this).unwrap()
}

/// Whether a machine whose agent died goes on, and keeps its folder.
fn goes_on(process: &Process) -> bool {
    process.cgroup.processes().is_ok_and(|pids| pids == [process.pid()]) && process.folder.path().exists()
}

#[test]
fn what_an_earlier_run_left_is_taken_over() {
    with_vmm("exec sleep 1000", async |machines| {
        let (_stopper, mut stopped) = Stopper::new();
        let mut first = spawn(&machines).await;
        let guest = dial(&first, Manner::Good).await;
        let ready = first.until_ready(&mut stopped).await.unwrap();
        first.record().change(|record| record.account = Some("a".into()));
        first.record().save().await.unwrap();
        let (id, pid) = (first.id(), first.pid());
        // Its agent dies, and its guest sees that.
        drop((first, ready, guest));
        let run_dir = machines.setup.run_dir.clone();
        let (notes, empty) = (run_dir.join("notes"), run_dir.join(Ulid::generate().to_string()));
        fs::create_dir(&notes).unwrap();
        fs::create_dir(&empty).unwrap();
        let mut found = machines.found().unwrap();
        assert!(notes.exists(), "what is not a machine's is left alone");
        assert!(
            !empty.exists(),
            "the agent may have died before it wrote whose the machine is"
        );
        let mut again = found.pop().unwrap();
        assert_eq!((found.len(), again.id(), again.pid()), (0, id, pid));
        let record = again.record().get();
        assert_eq!((record.account.as_deref(), record.created), (Some("a"), spec().created));
        let (_guest, dropped) = oneshot::channel::<()>();
        tokio::spawn(dial_until_heard(again.folder.vsock(), dropped));
        let answered = again.until_ready(&mut stopped).await.unwrap();
        assert_eq!(
            Some(answered.boot_duration),
            record.boot_duration,
            "it did not boot again"
        );
        answered.guest.stop_container("x".into()).await.unwrap();
        kill(&again);
        let cause = again.until_ended(answered, &mut stopped).await;
        assert!(matches!(cause, Cause::Exited(Ok(None))), "{cause:?}");
        let end = clear_away(again, cause).await;
        assert_eq!(end.reason(), Reason::Killed);
        assert!(end.detail.contains("an earlier agent started it"), "{}", end.detail);
        fs::remove_dir(notes).unwrap();
    });
}

#[test]
fn a_machine_of_a_version_that_did_not_part_threads_is_taken_over() {
    with_vmm("exec sleep 1000", async |machines| {
        let first = spawn(&machines).await;
        let threads = ThreadCgroups::of(first.cgroup());
        let pid = first.pid();
        assert_eq!(
            threads.vmm.threads().unwrap(),
            [pid],
            "it starts where devices' threads are"
        );
        first.cgroup().take(pid).unwrap();
        threads.all().into_iter().for_each(|part| part.remove().unwrap());
        // Another agent left it so when it died.
        Policy::RoundRobin { priority: 1 }.apply(pid).unwrap();
        drop(first);
        let again = machines.found().unwrap().pop().unwrap();
        assert_eq!((again.pid(), threads.vmm.threads().unwrap()), (pid, Vec::new()));
        again.take_threads().await;
        assert_eq!(threads.vmm.threads().unwrap(), [pid]);
        assert!(matches!(Policy::of(pid).unwrap(), Policy::Fair { nice: 0, .. }));
        clear_away(again, Cause::Stopped(Stop::Now("enough".into()))).await;
    });
}

#[test]
fn what_ended_without_an_agent_is_found_until_that_is_recorded() {
    const SCRIPT: &str = r#"echo '{"reason":"guest_panic","detail":"no init","uptime_us":1,"console_tail":""}'"#;
    with_vmm(SCRIPT, async |machines| {
        let process = spawn(&machines).await;
        while process.cgroup.keyed_number("cgroup.events", "populated") != Some(0) {
            tokio::task::yield_now().await;
        }
        drop(process);
        let (_stopper, mut stopped) = Stopper::new();
        let mut remains = None;
        // Each agent dies before the end is recorded.
        for _ in 0..3 {
            let mut found = machines.found().unwrap().pop().unwrap();
            assert_eq!(found.pid(), 0);
            let cause = found.until_ready(&mut stopped).await.unwrap_err();
            let (end, left) = found.end(cause).await;
            assert_eq!(
                (end.reason(), &*end.detail),
                (Reason::GuestPanic, "no init; its console says nothing")
            );
            remains = Some(left);
        }
        // This one afterwards, while it removes what is left.
        let Remains { cgroup, folder } = remains.unwrap();
        cgroup.destroy().unwrap();
        fs::remove_file(folder.path().join("exit_report")).unwrap();
        assert!(machines.found().unwrap().is_empty());
        assert!(!folder.path().exists());
    });
}

#[test]
fn what_another_agent_left_is_left_alone() {
    with_vmm("exec sleep 1000", async |machines| {
        let process = spawn(&machines).await;
        // Another host's, and one whose database is a copy.
        for other in [
            Owner {
                host: Ulid::generate(),
                ..owner()
            },
            Owner {
                store: "/copy".into(),
                ..owner()
            },
        ] {
            assert!(found(&machines, &other).is_empty(), "{other}");
            assert!(goes_on(&process), "{other}");
        }
        // What names no cgroup of a machine is not what an agent wrote.
        let file = process.folder.path().join(record::FILE);
        let good = fs::read_to_string(&file).unwrap();
        let below_mount = process.cgroup_below_mount();
        let parent = Path::new(&below_mount).parent().unwrap().to_str().unwrap();
        for bad in [parent, "", &format!("../{below_mount}"), &format!("/{below_mount}")] {
            fs::write(&file, good.replace(&below_mount, bad)).unwrap();
            assert!(found(&machines, &owner()).is_empty() && goes_on(&process), "{bad}");
        }
        fs::write(&file, "{").unwrap();
        assert!(found(&machines, &owner()).is_empty() && goes_on(&process));
        fs::remove_file(&file).unwrap();
        let nothing_says = found(&machines, &owner());
        assert!(nothing_says.is_empty() && goes_on(&process), "nothing says whose it is");
        process.folder.remove().unwrap();
        assert!(found(&machines, &owner()).is_empty());
        assert_eq!(process.cgroup.processes().unwrap(), [process.pid()], "it has no folder");
        clear_away(process, Cause::NoAnswer(Duration::ZERO)).await;
    });
}

#[test]
fn a_second_agent_is_refused() {
    with_vmm("exec sleep 1000", async |machines| {
        let setup = &machines.setup;
        let process = spawn(&machines).await;
        let other = tempfile::tempdir().unwrap();
        let below_mount = setup.below_mount(&setup.cgroup);
        let same_folder = config::Machines {
            run_dir: setup.run_dir.clone(),
            cgroup: below_mount.join("other"),
            ..config::Machines::default()
        };
        let same_cgroup = config::Machines {
            run_dir: other.path().join("run"),
            cgroup: below_mount.parent().unwrap().to_owned(),
            ..config::Machines::default()
        };
        for (config, setting) in [(same_folder, "machines.run_dir"), (same_cgroup, "machines.cgroup")] {
            let error = Claim::new(&config).unwrap_err().to_string();
            assert!(
                error.contains("already running") && error.contains(&format!("set {setting} of this one")),
                "{error}"
            );
            assert!(goes_on(&process));
        }
        clear_away(process, Cause::NoAnswer(Duration::ZERO)).await;
    });
}
