//! Machines that run an image: what their VMM is given, and how their programs come to an end.

use std::os::unix::fs::MetadataExt as _;
use std::sync::Mutex;

use stoker_images::User;
use stoker_policy::Launch;
use stoker_policy::scale::{Size, Taken, Thresholds};

use super::*;

/// How programs were asked to end: the signal, and for how long they had.
static STOPPED: Mutex<Vec<(i32, Duration)>> = Mutex::new(Vec::new());

/// The signal by which a program does not end, whatever time it has.
const STAYS: i32 = 1;

pub(super) async fn stop_image(request: proto::StopImageRequest) {
    let grace = request.grace.unwrap().try_into().unwrap();
    STOPPED.lock().unwrap().push((request.signal, grace));
    if request.signal == STAYS {
        std::future::pending().await
    }
}

/// How long the programs that were asked to end by this signal had for that, in seconds. Each test has its own.
fn stopped_by(signal: i32) -> Vec<u64> {
    let all = STOPPED.lock().unwrap();
    let by = all.iter().filter(|(by, _)| *by == signal);
    by.map(|(_, grace)| grace.as_secs()).collect()
}

fn launched(file: fs::File) -> Spec {
    let size = Size {
        vcpus: 1,
        cpu_millis: 500,
        memory_mib: 512,
    };
    let record = LaunchRecord {
        launch: Launch {
            image: "sha256:00".into(),
            size,
            ceiling: Size::whole(2, 1024),
            base_mib: 128,
            drive_mib: 512,
            thresholds: Thresholds::default(),
            mode: None,
        },
        counts: Taken {
            vcpus: 1,
            memory_mib: 512,
        },
        image: "accounts/a/images/web".parse().unwrap(),
        digest: "sha256:00".into(),
        program: Program {
            command: vec!["/bin/server".into()],
            environment: Vec::new(),
            working_dir: "/".into(),
            user: User {
                uid: 0,
                gid: 0,
                groups: Vec::new(),
                home: "/root".into(),
            },
            stop_signal: 3,
        },
        request: None,
        resizes: [].into(),
        ran: false,
        stop: None,
    };
    Spec {
        ceiling: Some(Ceiling {
            vcpus: 2,
            memory_mib: 1024,
        }),
        runtime: "".into(),
        launched: Some(FromImage {
            account: "a".into(),
            record,
            file: Arc::new(file),
        }),
        ..spec()
    }
}

#[test]
fn an_image_is_a_drive_that_is_there_though_the_image_is_deleted() {
    with_vmm("exec sleep 1000", async |machines| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("root.erofs");
        fs::write(&path, "the image").unwrap();
        let file = fs::File::open(&path).unwrap();
        file.lock_shared().unwrap();
        let inode = file.metadata().unwrap().ino();
        let spec = launched(file);
        let known = spec.launched.clone().unwrap().record;
        let process = machines.spawn(spec, |_| {}).await.unwrap();
        fs::remove_file(&path).unwrap();
        let config = fs::read_to_string(process.folder.path().join("config.json")).unwrap();
        let config: stoker_vmm::config::MachineConfig = serde_json::from_str(&config).unwrap();
        let [first, image] = &config.drives[..] else {
            panic!("{:?}", config.drives);
        };
        assert_eq!(first.path, machines.setup.image);
        assert!(first.read_only && image.read_only);
        let fd = image.path.strip_prefix("/proc/self/fd").unwrap();
        // As its VMM sees it, once that has been executed.
        let of_vmm = Path::new("/proc").join(process.pid().to_string()).join("fd").join(fd);
        assert_eq!(fs::metadata(&of_vmm).unwrap().ino(), inode);
        assert_eq!(fs::read_to_string(&of_vmm).unwrap(), "the image");
        // By its lock the image is known to be in use, though the agent has let go of it.
        let again = fs::File::open(&of_vmm).unwrap();
        assert!(matches!(again.try_lock(), Err(fs::TryLockError::WouldBlock)));
        assert!(
            config
                .cmdline
                .ends_with(" stoker.image=/dev/vdb stoker.scratch=/dev/vdc"),
            "{}",
            config.cmdline
        );
        // The rest of its memory is plugged later, and its vCPU is held to its share from the start.
        assert_eq!((config.memory_mib, config.max_memory_mib), (128, Some(1024)));
        assert_eq!((config.vcpus, config.max_vcpus), (1, Some(2)));
        let record = RecordFile::find(process.folder.path()).unwrap().unwrap().get();
        assert_eq!(record.account.as_deref(), Some("a"));
        assert_eq!(record.size, Some(known.launch.size));
        assert_eq!(record.launched.as_deref(), Some(&known));
        clear_away(process, Cause::NoAnswer(Duration::ZERO)).await;
    });
}

#[test]
fn any_other_machine_is_told_nothing_of_images() {
    with_vmm("exec sleep 1000", async |machines| {
        let process = spawn(&machines).await;
        let config = fs::read_to_string(process.folder.path().join("config.json")).unwrap();
        assert!(!config.contains("stoker.image") && !config.contains("psi="), "{config}");
        assert_eq!(process.record().get().launched, None);
        clear_away(process, Cause::NoAnswer(Duration::ZERO)).await;
    });
}

#[test]
fn a_program_is_asked_to_end_before_its_machine_is() {
    with_vmm("exec sleep 1000", async |machines| {
        let (stopper, mut stopped) = Stopper::new();
        let file = tempfile::tempfile().unwrap();
        let mut process = machines.spawn(launched(file), |_| {}).await.unwrap();
        let _guest = dial(&process, Manner::Image).await;
        let ready = process.until_ready(&mut stopped).await.unwrap();
        let grace = Duration::from_secs(7);
        stopper.stop(Stop::AfterProgram {
            why: "somebody asked for it".into(),
            signal: 3,
            grace,
        });
        // What its guest says of that afterwards is no other end.
        stopper.stop(Stop::ProgramEnded {
            detail: "it ended".into(),
            exit_status: Some(0),
        });
        let cause = process.until_ended(ready, &mut stopped).await;
        let end = clear_away(process, cause).await;
        assert_eq!((end.reason(), &*end.detail), (Reason::Stopped, "somebody asked for it"));
        assert_eq!(stopped_by(3), [7]);
    });
}

#[test]
fn a_program_that_has_its_time_may_be_left_less() {
    with_vmm("exec sleep 1000", async |machines| {
        let (stopper, mut stopped) = Stopper::new();
        let file = tempfile::tempfile().unwrap();
        let mut process = machines.spawn(launched(file), |_| {}).await.unwrap();
        let _guest = dial(&process, Manner::Image).await;
        let ready = process.until_ready(&mut stopped).await.unwrap();
        let after = |why: &str, seconds| Stop::AfterProgram {
            why: why.into(),
            signal: STAYS,
            grace: Duration::from_secs(seconds),
        };
        let asked = async |graces: &[u64]| {
            while stopped_by(STAYS) != graces {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let telling = async {
            stopper.stop(after("first", 600));
            asked(&[600]).await;
            stopper.stop(after("later", 600));
            stopper.stop(after("sooner", 60));
            asked(&[600, 60]).await;
            stopper.stop(Stop::Gently("nobody needs it".into()));
            stopper.stop(Stop::Now("at once".into()));
        };
        let ending = async { tokio::join!(process.until_ended(ready, &mut stopped), telling).0 };
        let cause = tokio::time::timeout(Duration::from_secs(60), ending).await.unwrap();
        let end = clear_away(process, cause).await;
        assert_eq!((end.reason(), &*end.detail), (Reason::Stopped, "at once"));
    });
}

#[test]
fn a_program_that_was_found_has_its_time_too() {
    with_vmm("exec sleep 1000", async |machines| {
        let (stopper, mut stopped) = Stopper::new();
        let file = tempfile::tempfile().unwrap();
        let mut process = machines.spawn(launched(file), |_| {}).await.unwrap();
        // As it is found: its guest is to dial again.
        process
            .record()
            .change(|record| record.boot_duration = Some(Duration::from_secs(1)));
        stopper.stop(Stop::AfterProgram {
            why: "somebody asked for it".into(),
            signal: 2,
            grace: Duration::from_secs(7),
        });
        let _guest = dial(&process, Manner::Image).await;
        let ready = process.until_ready(&mut stopped).await.unwrap();
        let cause = process.until_ended(ready, &mut stopped).await;
        let end = clear_away(process, cause).await;
        assert_eq!((end.reason(), &*end.detail), (Reason::Stopped, "somebody asked for it"));
        assert_eq!(stopped_by(2), [7]);
    });
}
