//! Kills an agent at every failpoint, each time that one is reached, and looks at what the next finds.
//!
//! What an agent does is a list of [`STEPS`], carried out once undisturbed: the state that an agent finds after each is what
//! there may be. Then a process of its own carries them out for each failpoint, until it is killed there. What the next agent
//! finds must be the state before or after the step at which that was, and all that is left to do leads to the same end.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use clap::Parser as _;
use nix::sys::signal::{Signal, raise};
use rusqlite::OpenFlags;
use stoker_policy::{Amount, Shape};
use stoker_proto::v1;
use stoker_proto::v1::admin_server::AdminServer;
use stoker_proto::v1::create_function_request::Part;
use stoker_proto::v1::functions_client::FunctionsClient;
use stoker_proto::v1::functions_server::FunctionsServer;
use stoker_testkit::zip::zip;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use ulid::Ulid;

use super::Failpoint;
use crate::address::Address;
use crate::api::Api;
use crate::api::admin::Admin;
use crate::api::functions::Functions;
use crate::api::health::Health;
use crate::api::listen::Listeners;
use crate::backup;
use crate::catalog::{Catalog, ResizingDefaults};
use crate::cli::{self, Cli};
use crate::code::CodeStore;
use crate::config::{self, Config, Limits};
use crate::host::answers::tests::OneRequest;
use crate::machines::{Record, RecordFile};
use crate::owner::Owner;
use crate::store::{self, KEY_FILE, Store, StoredDecision};

/// Set for the process that is to be killed: its folder, the failpoint, and which time that is reached.
const FOLDER: &str = "STOKER_CRASH_FOLDER";
const POINT: &str = "STOKER_CRASH_POINT";
const TIME: &str = "STOKER_CRASH_TIME";

// === failpoints ===

/// What the process that is to be killed knows.
struct Crash {
    point: String,
    time: usize,
    /// Every failpoint that was reached, a line each.
    trace: Mutex<(std::fs::File, BTreeMap<Failpoint, usize>)>,
}

/// Kills this process where that is what it is for.
pub(crate) fn reach(point: Failpoint) {
    static CRASH: OnceLock<Option<Crash>> = OnceLock::new();
    let crash = CRASH.get_or_init(|| {
        let folder = PathBuf::from(std::env::var_os(FOLDER)?);
        let trace = append_to(&folder.join("trace"));
        Some(Crash {
            point: std::env::var(POINT).unwrap(),
            time: std::env::var(TIME).unwrap().parse().unwrap(),
            trace: Mutex::new((trace, BTreeMap::new())),
        })
    });
    let Some(crash) = crash else { return };
    let mut trace = crash.trace.lock().unwrap();
    writeln!(trace.0, "{point:?}").unwrap();
    let times = trace.1.entry(point).or_default();
    *times += 1;
    if format!("{point:?}") == crash.point && *times == crash.time {
        raise(Signal::SIGKILL).unwrap();
    }
}

fn append_to(path: &Path) -> std::fs::File {
    std::fs::File::options().append(true).create(true).open(path).unwrap()
}

// === an agent ===

/// A host's folders, and an agent while one runs.
struct Host {
    folder: PathBuf,
    agent: Option<Agent>,
}

struct Agent {
    store: Store,
    catalog: Catalog,
    answers: OneRequest,
    functions: FunctionsClient<tonic::transport::Channel>,
    stop: CancellationToken,
    serving: JoinHandle<()>,
}

impl Host {
    fn new(folder: &Path) -> Self {
        let host = Self {
            folder: folder.to_owned(),
            agent: None,
        };
        std::fs::create_dir_all(host.path("archives")).unwrap();
        std::fs::create_dir_all(host.path("run/machine")).unwrap();
        let text = format!(
            "[store]\npath = {:?}\n[code]\npath = {:?}\n",
            host.path("state"),
            host.path("code")
        );
        std::fs::write(host.path("stokerd.toml"), text).unwrap();
        host.make_earlier();
        host
    }

    /// A database as an earlier agent left it, with a value in plain text.
    fn make_earlier(&self) {
        let folder = self.path("earlier");
        if folder.exists() {
            return;
        }
        std::fs::create_dir(&folder).unwrap();
        store::earlier(&folder, 3, |c| {
            c.execute_batch(
                "INSERT INTO functions VALUES ('01ARZ3NDEKTSV4RRFFQ69G5FAV', 'acme', 'old', 1);
                INSERT INTO versions VALUES ('01ARZ3NDEKTSV4RRFFQ69G5FAV', 1, 'python3.11', 'app.handler',
                    '{\"TOKEN\":\"secret\"}', 3000, 250, 128, 'ab', 7, 1700000000123)",
            )
            .unwrap();
        });
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn config(&self) -> Config {
        Config::load(&self.path("stokerd.toml")).unwrap()
    }

    async fn agent(&mut self) -> &mut Agent {
        if self.agent.is_none() {
            self.agent = Some(Agent::start(self).await);
        }
        self.agent.as_mut().unwrap()
    }

    async fn stop(&mut self) {
        let Some(agent) = self.agent.take() else { return };
        agent.stop.cancel();
        drop((agent.store, agent.catalog, agent.functions, agent.answers));
        agent.serving.await.unwrap();
        // The database is closed by its thread.
        let wal = self.path("state/state.db-wal");
        let start = std::time::Instant::now();
        while wal.exists() {
            assert!(start.elapsed() < Duration::from_secs(60), "the database is not closed");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// What `stoker` is told on the command line.
    async fn stoker(&self, args: &[&str]) {
        let socket = self.path("stokerd.sock").display().to_string();
        let args = ["stoker", "--socket", &socket].into_iter().chain(args.iter().copied());
        assert_eq!(cli::run(Cli::parse_from(args)).await, ExitCode::SUCCESS);
    }
}

impl Agent {
    async fn start(host: &Host) -> Self {
        let config = host.config();
        let store = Store::open(&config.store.path).unwrap();
        let codes = CodeStore::open(&config.code.path, store.owner()).unwrap();
        let grace = Duration::ZERO;
        let catalog = Catalog::open(
            store.clone(),
            codes,
            Limits::default(),
            grace,
            ResizingDefaults::default(),
            Arc::new(|_, _| Ok(())),
            Arc::new(|_| {}),
        );
        let catalog = catalog.await.unwrap();
        let socket = host.path("stokerd.sock");
        let listen = config::Api {
            socket: socket.clone(),
            ..config::Api::default()
        };
        let listeners = Listeners::bind(&listen).await.unwrap();
        let largest = Amount {
            cpu_millis: 2000,
            memory_mib: 2048,
            scratch_mib: 4096,
        };
        let api = Api::new()
            .unwrap()
            .with(FunctionsServer::new(Functions::new(catalog.clone(), largest)))
            .with(AdminServer::new(Admin::new(catalog.clone(), store.clone())));
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let serving = tokio::spawn(async move {
            let drain = Duration::from_secs(10);
            let (_keep, health) = watch::channel(Health::GOOD);
            api.serve(listeners, &Limits::default(), drain, stopped, health)
                .await
                .unwrap();
        });
        let channel = Address::Unix(socket).connect().await.unwrap();
        Self {
            store,
            catalog,
            answers: OneRequest::open(&host.path("run/answers")),
            functions: FunctionsClient::new(channel),
            stop,
            serving,
        }
    }

    async fn create(&mut self, id: &str, program: &str) {
        let function = v1::Function {
            name: format!("accounts/acme/functions/{id}"),
            runtime: "python3.11".into(),
            handler: "app.handler".into(),
            environment: [("TOKEN".to_owned(), format!("secret of {id}"))].into(),
            ..Default::default()
        };
        let header = v1::CreateFunctionHeader {
            function: Some(function),
            request_id: format!("request-{id}"),
        };
        let [code, layer] =
            ["app.py", "lib/data"].map(|name| Bytes::from(zip(&[(name, 0o644, program.as_bytes())]).unwrap()));
        let parts = [
            Part::Header(header),
            Part::Chunk(code),
            Part::Layer(v1::LayerHeader {}),
            Part::Chunk(layer),
        ];
        let parts = parts.map(|part| v1::CreateFunctionRequest { part: Some(part) });
        self.functions.create_function(tokio_stream::iter(parts)).await.unwrap();
    }

    async fn delete(&mut self, id: &str) {
        let name = format!("accounts/acme/functions/{id}");
        self.functions
            .delete_function(v1::DeleteFunctionRequest { name })
            .await
            .unwrap();
    }
}

// === what it does ===

/// What an agent, or somebody about it, does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Start,
    /// A function of that name, with a program.
    Create(&'static str, &'static str),
    Report,
    Decision,
    SaveMachine,
    RemoveMachine,
    Backup,
    RotateKey,
    Delete(&'static str),
    RecordMachine,
    RecordAccount,
    Place,
    Answer,
    ForgetAnswers,
    /// A new key is there that no value needs, and the agent is started again.
    StrayKey,
    RemoveOrphans,
    Restore,
    Upgrade,
}

use Step::*;

const STEPS: &[Step] = &[
    Start,
    Create("a", "1"),
    Create("b", "2"),
    // The same code.
    Create("c", "2"),
    Report,
    Decision,
    SaveMachine,
    Backup,
    RemoveMachine,
    RotateKey,
    Delete("b"),
    Delete("c"),
    RecordMachine,
    RecordAccount,
    Place,
    Answer,
    ForgetAnswers,
    StrayKey,
    Restore,
    Start,
    RemoveOrphans,
    Upgrade,
    Create("d", "3"),
];

impl Step {
    /// Whether who does not know that it was done may do it again, and nothing comes of it.
    fn is_repeatable(self) -> bool {
        !matches!(self, Report | Decision | Backup | Delete(_) | Place | Answer)
    }

    async fn run(self, host: &mut Host) {
        match self {
            Start => {
                host.agent().await;
            }
            Create(id, program) => host.agent().await.create(id, program).await,
            Delete(id) => host.agent().await.delete(id).await,
            Report => {
                let report = store::Report::new(v1::event::Event::Machine(v1::Machine::default()));
                host.agent().await.store.append_report(report, 1 << 20).await.unwrap();
            }
            Decision => {
                let decision = StoredDecision {
                    machine: None,
                    container: None,
                    request: None,
                    decision: v1::Decision {
                        sequence: 1,
                        ..Default::default()
                    },
                };
                host.agent().await.store.append_decisions(vec![decision]).await.unwrap();
            }
            SaveMachine => host.agent().await.store.save_machine(&machine()).await.unwrap(),
            RemoveMachine => host.agent().await.store.remove_machine(machine().name).await.unwrap(),
            Backup => {
                host.agent().await;
                let archive = host.path("archives/archive").display().to_string();
                host.stoker(&["admin", "backup", &archive, "--with-key"]).await;
            }
            RotateKey => {
                host.agent().await;
                host.stoker(&["admin", "rotate-key"]).await;
            }
            RecordMachine => drop(RecordFile::create(&host.path("run/machine"), record()).unwrap()),
            RecordAccount => {
                let file = RecordFile::find(&host.path("run/machine")).unwrap().unwrap();
                file.change(|record| record.account = Some("acme".into()));
                file.save().await.unwrap();
            }
            Place => host.agent().await.answers.place().await,
            Answer => host.agent().await.answers.answer().await,
            ForgetAnswers => host.agent().await.answers.forget().await,
            StrayKey => {
                host.stop().await;
                let mut options = std::fs::File::options();
                let stray = host.path("state").join(format!("{KEY_FILE}.new"));
                let stray = options.write(true).create(true).truncate(true).mode(0o600).open(stray);
                stray.unwrap().write_all(&[7; 32]).unwrap();
                host.agent().await;
            }
            Restore => {
                host.stop().await;
                let (archive, config) = (host.path("archives/archive"), host.path("stokerd.toml"));
                let [archive, config] = [archive, config].map(|path| path.display().to_string());
                host.stoker(&["admin", "restore", &archive, "--replace", "--config", &config])
                    .await;
            }
            RemoveOrphans => {
                host.agent().await.catalog.remove_orphans(None).await.unwrap();
            }
            Upgrade => drop(Store::open(&host.path("earlier")).unwrap()),
        }
    }
}

fn machine() -> v1::Machine {
    v1::Machine {
        name: "machines/01".into(),
        ..Default::default()
    }
}

fn record() -> Record {
    Record {
        owner: Owner {
            host: Ulid::nil(),
            store: "/state".into(),
        },
        cgroup: "machines/m".into(),
        runtime: "python3.11".into(),
        shape: Shape {
            vcpus: 1,
            memory_mib: 128,
            drive_mib: 512,
            baseline_millis: 200,
        },
        ceiling: None,
        size: None,
        created: Duration::from_secs(1),
        boot_duration: None,
        mode: None,
        account: None,
        containers: BTreeMap::new(),
        launched: None,
    }
}

// === what is there ===

/// What the next agent finds, a line each, but for what is random: ids, keys, times. `at` says when that is.
async fn state(host: &mut Host, at: &str) -> Vec<String> {
    host.stop().await;
    let mut state = Vec::new();
    let (record, archive) = (
        RecordFile::find(&host.path("run/machine")),
        host.path("archives/archive"),
    );
    state.push(format!(
        "machine.json: {:?}",
        record.unwrap().map(|file| file.get().account)
    ));
    // Whole, or not there.
    let files = archive
        .exists()
        .then(|| backup::read_through(&archive).unwrap().files.len());
    state.push(format!("archive: {files:?} files"));
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY;
    let earlier = rusqlite::Connection::open_with_flags(host.path("earlier/state.db"), flags).unwrap();
    let schema = earlier.pragma_query_value(None, "user_version", |row| row.get::<_, u32>(0));
    state.push(format!("earlier: schema {}", schema.unwrap()));
    drop(earlier);

    let agent = host.agent().await;
    for function in agent.catalog.list(None, None, 100) {
        let (environment, layers) = (&function.environment, function.layers.len());
        state.push(format!("{}: {environment:?}, {layers} layers", function.name));
    }
    for id in ["a", "b", "c", "d"] {
        let known = agent.store.request_is_known("acme".into(), format!("request-{id}"));
        state.push(format!("request-{id}: {}", known.await.unwrap()));
    }
    let reports = agent.store.reports_after(0, 100, 1 << 20).await.unwrap();
    let reports: Vec<_> = reports.iter().map(|report| report.sequence).collect();
    state.push(format!("reports: {reports:?}"));
    let decisions = agent.store.decisions(None, 0, 100, 100).await.unwrap().len();
    state.push(format!("decisions: {decisions}, {} lost", agent.store.decisions_lost()));
    let machines = agent.store.machines().await.unwrap();
    let machines: Vec<_> = machines.iter().map(|machine| &machine.name).collect();
    state.push(format!("machines: {machines:?}"));
    state.push(format!("answer: {}", agent.answers.look().await));
    host.stop().await;
    check(host, at).await;
    state
}

/// Whatever was done, a host is whole, and nothing half-done is left once an agent was there.
async fn check(host: &Host, at: &str) {
    let checked = backup::check(&host.config()).await.unwrap();
    assert_eq!(checked.problems, [""; 0], "{at}");
    let is = |name: &str, known: &[&str], begins: &[&str]| {
        known.contains(&name) || begins.iter().any(|begin| name.starts_with(begin))
    };
    for name in names(&host.path("state")) {
        let key = format!("{KEY_FILE}.");
        let known = is(
            &name,
            &["stokerd.lock", "state.db", KEY_FILE],
            &["state.db-", "state.db.replaced-"],
        );
        let kept_key = name.strip_prefix(&key).is_some_and(|id| id.len() == 16);
        assert!(known || kept_key, "{at}: state/{name} was left");
    }
    for name in names(&host.path("code")) {
        let known = ["stokerd.lock", "staging", "objects", "owner.json"];
        assert!(is(&name, &known, &[]), "{at}: code/{name} was left");
    }
    assert_eq!(names(&host.path("code/staging")), [""; 0], "{at}");
    for name in names(&host.path("code/objects")) {
        let zip = std::fs::read(host.path("code/objects").join(&name)).unwrap();
        let digest = crate::hex::hex(&<sha2::Sha256 as sha2::Digest>::digest(zip));
        assert_eq!(name, format!("{digest}.zip"), "{at}");
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

// === the tests ===

/// A runtime as [`tokio::test`] makes it.
fn block_on<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.unwrap().block_on(work)
}

const STEPS_PATH: &str = "failpoints::tests::steps_in_a_process";

/// Is not a test, but the process that is killed.
#[test]
#[ignore = "run by the test of crashes, in a process of its own"]
fn steps_in_a_process() {
    let folder = folder();
    block_on(async {
        let mut host = Host::new(&folder);
        for step in STEPS {
            step.run(&mut host).await;
            done(&folder, step);
        }
        host.stop().await;
    });
}

/// The process that is killed says that it has done a step.
pub(crate) fn done(folder: &Path, step: impl Debug) {
    writeln!(append_to(&folder.join("done")), "{step:?}").unwrap();
}

/// The folder of the process that is killed.
pub(crate) fn folder() -> PathBuf {
    PathBuf::from(std::env::var_os(FOLDER).unwrap())
}

/// Runs what is not a test in a process that is killed at a failpoint, the given time that this is reached. Says whether it
/// was, and how many steps were done.
pub(crate) fn crash(path: &str, folder: &Path, point: &str, time: usize) -> (bool, usize) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", path, "--ignored", "--nocapture"])
        .env(FOLDER, folder)
        .env(POINT, point)
        .env(TIME, time.to_string())
        .output()
        .unwrap();
    let killed = output.status.signal() == Some(Signal::SIGKILL as i32);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(killed || output.status.success(), "{point} {time}: {said}");
    let done = std::fs::read_to_string(folder.join("done")).unwrap_or_default();
    (killed, done.lines().count())
}

/// Every failpoint that a process which was not killed has reached, with the times that it was.
pub(crate) fn crashes(folder: &Path) -> Vec<(String, usize)> {
    let trace = std::fs::read_to_string(folder.join("trace")).unwrap();
    let mut times = BTreeMap::<_, usize>::new();
    let reached = trace.lines().map(|point| {
        let time = times.entry(point).or_default();
        *time += 1;
        (point.to_owned(), *time)
    });
    reached.collect()
}

#[test]
fn a_crash_at_any_failpoint_leaves_what_there_could_be_without() {
    let dir = tempfile::tempdir().unwrap();
    // What there is before and after each step.
    let states = block_on(async {
        let mut host = Host::new(dir.path());
        let mut states = vec![state(&mut host, "at the beginning").await];
        for step in STEPS {
            step.run(&mut host).await;
            states.push(state(&mut host, &format!("after {step:?}")).await);
        }
        states
    });

    let dir = tempfile::tempdir().unwrap();
    assert_eq!(crash(STEPS_PATH, dir.path(), "none", 0), (false, STEPS.len()));
    let crashes = crashes(dir.path());
    let all: BTreeSet<_> = Failpoint::OF_FILES.iter().map(|point| format!("{point:?}")).collect();
    let reached: BTreeSet<_> = crashes.iter().map(|(point, _)| point.clone()).collect();
    assert_eq!(reached, all, "the steps reach every failpoint");

    let next = AtomicUsize::new(0);
    let work = || {
        while let Some((point, time)) = crashes.get(next.fetch_add(1, Ordering::Relaxed)) {
            after_a_crash(point, *time, &states);
        }
    };
    std::thread::scope(|scope| {
        // Most of the time each waits for the disk.
        for _ in 0..8 {
            scope.spawn(work);
        }
    });
}

fn after_a_crash(point: &str, time: usize, states: &[Vec<String>]) {
    let dir = tempfile::tempdir().unwrap();
    let (killed, done) = crash(STEPS_PATH, dir.path(), point, time);
    assert!(killed, "{point} is not reached {time} times");
    let step = STEPS[done];
    let at = format!("{point}, time {time}, in {step:?}");
    block_on(async {
        let mut host = Host::new(dir.path());
        let found = state(&mut host, &at).await;
        let (before, after) = (&states[done], &states[done + 1]);
        assert!(
            found == *before || found == *after,
            "{at}: {found:#?}\nbefore: {before:#?}\nafter: {after:#?}"
        );
        if found != *after || step.is_repeatable() {
            step.run(&mut host).await;
            assert_eq!(state(&mut host, &at).await, *after, "{at}, and again");
        }
        for step in &STEPS[done + 1..] {
            step.run(&mut host).await;
        }
        assert_eq!(
            Some(&state(&mut host, &at).await),
            states.last(),
            "{at}, and all that comes after"
        );
        check_end(&host, &at);
    });
}

/// What is there only at the end: no code without its function, nothing unfinished beside what the last steps made.
fn check_end(host: &Host, at: &str) {
    let mut earlier = names(&host.path("earlier"));
    earlier.sort();
    earlier.retain(|name| !name.ends_with("-wal") && !name.ends_with("-shm"));
    assert_eq!(earlier, [KEY_FILE, "state.db", "state.db.v3.bak"], "{at}");
    let database = std::fs::read(host.path("earlier/state.db")).unwrap();
    let plain = b"\"TOKEN\":\"secret\"";
    assert!(!database.windows(plain.len()).any(|text| text == plain), "{at}");
    assert_eq!(names(&host.path("run/machine")), ["machine.json"], "{at}");
}
