//! `stokerd`, `stoker` and `stoker-controller` as processes: what they print, and their exit codes.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use serde_json::Value;
use stoker_agent::address::Address;
use stoker_agent::api::listen;
use stoker_agent::config::{self, DEFAULT_TOML};
use stoker_agent::lock::Lock;
use stoker_agent::report::Reporter;
use stoker_agent::store::Store;
use stoker_agent::tasks::Essential;
use stoker_proto::v1::{self, event::Event};
use stoker_testkit::bzimage::bzimage;
use stoker_testkit::cpio::Archive;
use tokio::process::Command;
use tokio_util::sync::CancellationToken;
use tonic::Code;

use crate::common::*;

const STOKERD: &str = env!("CARGO_BIN_EXE_stokerd");
pub(crate) const STOKER: &str = env!("CARGO_BIN_EXE_stoker");
const CONTROLLER: &str = env!("CARGO_BIN_EXE_stoker-controller");

pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

async fn run(program: &str, args: &[&str]) -> Ran {
    run_in(Path::new("/nonexistent"), program, args).await
}

/// Runs a program for a user whose settings are in a folder.
async fn run_in(settings: &Path, program: &str, args: &[&str]) -> Ran {
    let running = Command::new(program)
        .args(args)
        .env_remove("STOKER_SOCKET")
        .env_remove("STOKER_ACCOUNT")
        .env("XDG_CONFIG_HOME", settings)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let Output { status, stdout, stderr } = tokio::time::timeout(PATIENCE, running).await.unwrap().unwrap();
    Ran {
        code: status.code().unwrap_or(-1),
        out: String::from_utf8(stdout).unwrap(),
        err: String::from_utf8(stderr).unwrap(),
    }
}

#[tokio::test]
async fn the_command_line_ends_quietly_where_nobody_reads_on() {
    let doctor = async |out: Stdio| {
        let mut doctor = Command::new(STOKER);
        let running = doctor.arg("doctor").stdout(out).stderr(Stdio::piped()).spawn().unwrap();
        let ran = tokio::time::timeout(PATIENCE, running.wait_with_output()).await;
        let Output { status, stderr, .. } = ran.unwrap().unwrap();
        (status.code(), String::from_utf8(stderr).unwrap())
    };
    // As the left end of `stoker doctor | head -0`.
    let (unread, out) = std::io::pipe().unwrap();
    drop(unread);
    assert_eq!(doctor(out.into()).await, (Some(0), String::new()));
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let (code, error) = doctor(full.into()).await;
    assert!(code == Some(1) && error.contains("No space left"), "{error}");
}

/// A folder with a configuration whose boot files look whole.
struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        let host = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        // The least that an erofs image can be.
        let mut image = vec![0; 4096];
        image[1024..1028].copy_from_slice(&0xe0f5_e1e2u32.to_le_bytes());
        image[1024 + 12] = 12;
        image[1024 + 36] = 1;
        for (name, bytes) in [
            ("kernel", bzimage(16)),
            ("initramfs", Archive::default().finish()),
            ("image", image),
        ] {
            std::fs::write(host.path(name), bytes).unwrap();
        }
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes the configuration, and answers where.
    fn configure(&self, more: &str) -> String {
        let at = |name: &str| self.path(name).display().to_string();
        let text = format!(
            "[store]\npath = '{}'\n[code]\npath = '{}'\n[machines]\nvmm = '/bin/sh'\nkernel = '{}'\ninitramfs = '{}'\n\
             image = '{}'\nrun_dir = '{}'\nscratch_dir = '{}'\n[pool]\nscratch_gib = 100\n[api]\nsocket = '{}'\n{more}\n",
            at("state"),
            at("code"),
            at("kernel"),
            at("initramfs"),
            at("image"),
            at("run"),
            at("scratch"),
            at("stokerd.sock"),
        );
        std::fs::write(self.path("stokerd.toml"), text).unwrap();
        at("stokerd.toml")
    }

    /// Starts an agent that must refuse to run.
    async fn refuses(&self, more: &str) -> Ran {
        let ran = run(STOKERD, &["--config", &self.configure(more)]).await;
        assert_eq!(ran.code, 1, "{}", ran.err);
        ran
    }
}

#[tokio::test]
async fn configurations_are_printed_and_checked() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("stokerd.toml");
    let check = async |text: &str| {
        std::fs::write(&file, text).unwrap();
        run(STOKERD, &["--check-config", "--config", file.to_str().unwrap()]).await
    };
    let printed = run(STOKERD, &["--print-config"]).await;
    assert_eq!((printed.code, printed.out.as_str()), (0, DEFAULT_TOML));
    let good = check(DEFAULT_TOML).await;
    assert_eq!(good.code, 0, "{}", good.err);
    assert!(good.out.contains("is right"), "{}", good.out);
    for (text, says) in [
        ("[api]\nsoket = '/x'\n", "unknown field `soket`"),
        ("[api]\ntcp = '0.0.0.0:7070'\n", "not a loopback address"),
        ("[metrics]\naddress = 'localhost'\n", "invalid socket address"),
        (
            "[metrics]\naddress = '127.0.0.1:0'\n",
            "metrics.address: 127.0.0.1:0 names no port",
        ),
        ("[machines]\nvcpus = 0\n", "machines.vcpus: 0 is not 1 to 8"),
        ("[log]\nformat = 'xml'\n", "unknown variant `xml`"),
        ("[log\n", "stokerd.toml"),
    ] {
        let bad = check(text).await;
        assert_eq!(bad.code, 2, "{text}");
        assert!(bad.err.contains(says), "{text}: {}", bad.err);
    }
    let missing = run(STOKERD, &["--config", "/nonexistent/stokerd.toml"]).await;
    assert_eq!(missing.code, 2);
    assert!(missing.err.contains("/nonexistent/stokerd.toml"), "{}", missing.err);
}

#[tokio::test]
async fn boot_files_that_are_missing_or_cut_short() {
    for name in ["kernel", "initramfs", "image"] {
        let host = Host::new();
        let whole = std::fs::read(host.path(name)).unwrap();
        std::fs::write(host.path(name), &whole[..whole.len() - 20]).unwrap();
        let ran = host.refuses("").await;
        let path = host.path(name).display().to_string();
        assert!(ran.err.contains(&path) && ran.err.contains("cut short"), "{}", ran.err);
        std::fs::write(host.path(name), "").unwrap();
        let ran = host.refuses("").await;
        assert!(ran.err.contains(&path) && ran.err.contains("is empty"), "{}", ran.err);
        std::fs::remove_file(host.path(name)).unwrap();
        let ran = host.refuses("").await;
        assert!(
            ran.err.contains(&path) && ran.err.contains("No such file"),
            "{}",
            ran.err
        );
    }
}

#[tokio::test]
async fn a_second_agent_and_addresses_in_use() {
    let host = Host::new();
    for (folder, setting) in [("state", "store.path"), ("code", "code.path")] {
        let lock = Lock::folder(&host.path(folder), setting).unwrap();
        let ran = host.refuses("").await;
        let pid = format!("already running (pid {})", std::process::id());
        let advice = format!("set {setting} of this one");
        assert!(ran.err.contains(&pid) && ran.err.contains(&advice), "{}", ran.err);
        drop(lock);
    }

    // Other folders, the same socket; the one that serves there goes on serving.
    let agent = Agent::start(host.dir.path()).await;
    let other = Host::new();

    let taken = socket(host.dir.path());
    std::os::unix::fs::symlink(&taken, other.path("stokerd.sock")).unwrap();
    let ran = other.refuses("").await;
    assert!(ran.err.contains("stokerd.sock"), "{}", ran.err);
    std::fs::remove_file(other.path("stokerd.sock")).unwrap();
    let (listener, file) = listen::unix(&other.path("stokerd.sock")).await.unwrap();
    let ran = other.refuses("").await;
    assert!(ran.err.contains("already running"), "{}", ran.err);
    drop((listener, file));
    agent.create(function("good"), &app()).await.unwrap();

    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = port.local_addr().unwrap();
    let ran = other.refuses(&format!("tcp = '{address}'")).await;
    assert!(ran.err.contains(&format!("can't listen on {address}")), "{}", ran.err);
    assert!(!other.path("stokerd.sock").exists());
    let ran = other.refuses(&format!("[metrics]\naddress = '{address}'")).await;
    let says = [&format!("can't listen on {address}"), "change metrics.address"];
    assert!(says.iter().all(|says| ran.err.contains(says)), "{}", ran.err);
    assert!(!other.path("stokerd.sock").exists());
}

#[tokio::test]
async fn a_live_view_takes_a_terminal() {
    // Whether an agent is there or not.
    for args in [&["top"][..], &["--json", "top"]] {
        let ran = run(STOKER, args).await;
        assert_eq!((ran.code, ran.out.as_str()), (2, ""), "{}", ran.err);
        assert!(
            ran.err.contains("takes a terminal") && ran.err.contains("stoker usage --watch"),
            "{}",
            ran.err
        );
    }
}

#[tokio::test]
async fn logs_are_json_where_configured() {
    let host = Host::new();
    std::fs::remove_file(host.path("kernel")).unwrap();
    let ran = host.refuses("[log]\nformat = 'json'").await;
    let line: Value = serde_json::from_str(ran.err.lines().last().unwrap()).unwrap();
    assert_eq!(line["level"], "ERROR");
    assert!(line["message"].as_str().unwrap().contains("machines.kernel"), "{line}");
}

pub(crate) async fn stoker(folder: &Path, args: &[&str]) -> Ran {
    stoker_of(Path::new("/nonexistent"), folder, args).await
}

/// The same of a user whose settings are in a folder.
pub(crate) async fn stoker_of(settings: &Path, folder: &Path, args: &[&str]) -> Ran {
    let socket = socket(folder).display().to_string();
    run_in(settings, STOKER, &[&["--socket", &socket], args].concat()).await
}

#[tokio::test]
async fn functions_on_the_command_line() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path()).await;
    let code = dir.path().join("app");
    std::fs::create_dir(&code).unwrap();
    std::fs::write(code.join("app.py"), "def handler(event, context): return event\n").unwrap();
    let code = code.to_str().unwrap();
    let name = "accounts/acme/functions/echo";
    let create = [
        "function",
        "create",
        name,
        code,
        "--runtime",
        "python3.11",
        "--handler",
        "app.handler",
        "--env",
        "KEY=b=c",
        "--amount",
        "500m,256MiB",
        "--timeout",
        "30s",
    ];
    let made = stoker(dir.path(), &create).await;
    assert_eq!(made.code, 0, "{}", made.err);
    assert!(
        made.out.starts_with(name) && made.out.contains("KEY") && !made.out.contains("b=c"),
        "{}",
        made.out
    );
    let got = stoker(dir.path(), &["function", "get", name, "--json"]).await;
    let function: Value = serde_json::from_str(&got.out).unwrap();
    assert_eq!(function["amount"]["cpuMillis"], 500);
    assert_eq!(function["timeout"], "30s");
    assert_eq!(function["environment"]["KEY"], "");
    let got = stoker(dir.path(), &["function", "get", name, "--show-values"]).await;
    assert!(got.out.contains("KEY=b=c"), "{}", got.out);
    let all = stoker(dir.path(), &["function", "list", "--show-values", "--json"]).await;
    assert!(all.out.contains("b=c"), "{}", all.out);
    let rotated = stoker(dir.path(), &["admin", "rotate-key"]).await;
    assert!(
        rotated.code == 0 && rotated.out.starts_with("1 values are encrypted"),
        "{}",
        rotated.err
    );

    let twice = stoker(dir.path(), &create).await;
    assert_eq!(twice.code, 1);
    assert!(twice.err.contains("already; delete it first"), "{}", twice.err);

    // The same from a zip.
    let zip = dir.path().join("app.zip");
    std::fs::write(&zip, app()).unwrap();
    let zip = zip.to_str().unwrap();
    let made = stoker(
        dir.path(),
        &[
            "function",
            "create",
            "accounts/acme/functions/zipped",
            zip,
            "--runtime",
            "python3.11",
            "--handler",
            "app.handler",
        ],
    )
    .await;
    assert_eq!(made.code, 0, "{}", made.err);
    let list = stoker(dir.path(), &["function", "list"]).await;
    assert_eq!(list.out.lines().count(), 3, "{}", list.out);
    let list = stoker(
        dir.path(),
        &["function", "list", "--account", "accounts/acme", "--json"],
    )
    .await;
    let functions: Value = serde_json::from_str(&list.out).unwrap();
    assert_eq!(functions["functions"].as_array().unwrap().len(), 2);

    let bad = stoker(
        dir.path(),
        &[
            "function",
            "create",
            "accounts/acme/functions/Bad",
            zip,
            "--runtime",
            "cobol",
            "--timeout",
            "1h",
        ],
    )
    .await;
    assert_eq!(bad.code, 1);
    for says in [
        "the request is not valid",
        "\n  function.name: ",
        "\n  function.runtime: ",
        "\n  function.timeout: ",
    ] {
        assert!(bad.err.contains(says), "{says}: {}", bad.err);
    }
    for (args, says) in [
        (
            &[
                "function",
                "create",
                "accounts/a/functions/x",
                "/nonexistent",
                "--runtime",
                "provided",
            ][..],
            "/nonexistent",
        ),
        (
            &[
                "function",
                "create",
                "x",
                zip,
                "--runtime",
                "provided",
                "--amount",
                "much",
            ],
            "500m,256MiB",
        ),
    ] {
        let bad = stoker(dir.path(), args).await;
        assert_eq!(bad.code, 2, "{}", bad.err);
        assert!(bad.err.contains(says), "{}", bad.err);
    }

    let deleted = stoker(dir.path(), &["function", "delete", name]).await;
    assert_eq!(
        (deleted.code, deleted.out.trim()),
        (0, format!("deleted {name}").as_str())
    );
    let gone = stoker(dir.path(), &["function", "get", name]).await;
    assert_eq!(gone.code, 1);
    assert!(
        gone.err.contains(&format!("there is no function {name}")),
        "{}",
        gone.err
    );
    agent.stop().await;

    let unreachable = stoker(dir.path(), &["function", "list"]).await;
    assert_eq!(unreachable.code, 3);
    assert!(
        unreachable.err.contains("can't reach stokerd") && unreachable.err.contains("hint: is it running?"),
        "{}",
        unreachable.err
    );
}

#[tokio::test]
async fn a_zip_that_finds_no_place_is_sent_again() {
    let dir = tempfile::tempdir().unwrap();
    let limits = config::Limits {
        concurrent_uploads: 1,
        upload_idle_timeout: Duration::from_secs(2),
        ..config::Limits::default()
    };
    let agent = Agent::with_limits(dir.path(), limits).await;
    let mut client = agent.functions();
    let silent = tokio::spawn(async move { client.create_function(tokio_stream::pending()).await });
    let staging = agent.folder.join("code/staging");
    eventually("the only place to be taken", || !names(&staging).is_empty()).await;
    let zip = dir.path().join("app.zip");
    std::fs::write(&zip, app()).unwrap();
    let zip = zip.to_str().unwrap();
    let name = "accounts/acme/functions/late";
    let create = [
        "function",
        "create",
        name,
        zip,
        "--runtime",
        "python3.11",
        "--handler",
        "app.handler",
    ];
    let made = stoker(dir.path(), &create).await;
    assert_eq!(made.code, 0, "{}", made.err);
    assert_eq!(silent.await.unwrap().unwrap_err().code(), Code::DeadlineExceeded);
    agent.stop().await;
}

#[tokio::test]
async fn the_doctor_looks_and_changes_nothing() {
    let host = Host::new();
    let config = host.configure("");
    let doctor = async |more: &[&str]| run(STOKER, &[&["doctor", "--config", &config], more].concat()).await;
    let ran = doctor(&["--json"]).await;
    let report: Value = serde_json::from_str(&ran.out).unwrap();
    let findings = report["findings"].as_array().unwrap();
    let verdict = |check: &str| {
        let found = findings.iter().find(|finding| finding["check"] == check);
        found.unwrap()["verdict"].as_str().unwrap()
    };
    for check in [
        "configuration",
        "kernel",
        "boot-files",
        "database",
        "store.path",
        "code.path",
        "agent",
    ] {
        assert_eq!(verdict(check), "ok", "{check}: {}", ran.out);
    }
    // What there is beside depends on the host.
    let fails = findings.iter().any(|finding| finding["verdict"] == "fail");
    assert_eq!(ran.code, i32::from(fails), "{} {}", ran.out, ran.err);
    for made in ["state", "code", "run", "stokerd.sock"] {
        assert!(!host.path(made).exists(), "{made}");
    }

    std::fs::write(host.path("kernel"), "").unwrap();
    let ran = doctor(&[]).await;
    let line = ran.out.lines().find(|line| line.starts_with("FAIL  boot-files"));
    assert!(line.is_some_and(|line| line.contains("machines.kernel")), "{}", ran.out);
    assert!(ran.code == 1 && ran.err.contains("checks failed"), "{}", ran.err);

    let agent = Agent::start(host.dir.path()).await;
    let ran = doctor(&[]).await;
    assert!(ran.out.contains("an agent has it open"), "{}", ran.out);
    agent.create(function("good"), &app()).await.unwrap();
    agent.stop().await;
    let wal = host.path("state/state.db-wal");
    eventually("the database to be closed", || !wal.exists()).await;
    std::fs::write(host.path("state/state.db"), vec![7; 8192]).unwrap();
    let ran = doctor(&[]).await;
    assert!(
        ran.out.contains("\nFAIL  database") && ran.out.contains("stoker admin restore"),
        "{}",
        ran.out
    );

    std::fs::write(&config, "[api]\nsoket = '/x'\n").unwrap();
    let ran = doctor(&[]).await;
    assert!(
        ran.code == 1 && ran.out.starts_with("FAIL  configuration"),
        "{}",
        ran.out
    );
}

#[tokio::test]
async fn names_are_short_in_the_account_that_is_set() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path()).await;
    let made = agent.create(function("resize"), &app()).await.unwrap();
    let other = v1::Function {
        name: "accounts/other/functions/resize".into(),
        ..function("resize")
    };
    let other = agent.create(other, &app()).await.unwrap();
    let (settings, at) = (dir.path().join("settings"), socket(dir.path()).display().to_string());
    let stoker = async |args: &[&str]| run_in(&settings, STOKER, &[&["--socket", &at], args].concat()).await;

    let unknown = stoker(&["function", "get", "resize"]).await;
    assert_eq!(unknown.code, 2);
    assert!(unknown.err.contains("stoker account set-default"), "{}", unknown.err);
    let all = stoker(&["function", "list"]).await;
    assert_eq!(all.out.lines().count(), 3, "{}", all.out);

    let wrong = stoker(&["account", "set-default", "Acme"]).await;
    assert!(wrong.code == 2 && wrong.err.contains("a-z, 0-9"), "{}", wrong.err);
    let set = stoker(&["account", "set-default", "acme"]).await;
    assert!(set.code == 0 && set.out.starts_with("accounts/acme ("), "{}", set.err);
    let shown = stoker(&["account", "show-default", "--json"]).await;
    let shown: Value = serde_json::from_str(&shown.out).unwrap();
    assert_eq!(shown["account"], "accounts/acme");

    // What is given goes before what is set, and names are printed in full.
    for (args, name) in [
        (&["get", "resize"][..], &made.name),
        (&["get", "resize", "--account", "other"], &other.name),
        (&["get", "resize", "--account", "accounts/other"], &other.name),
        (&["get", other.name.as_str()], &other.name),
    ] {
        let got = stoker(&[&["function"], args].concat()).await;
        assert!(got.out.starts_with(name), "{args:?}: {} {}", got.out, got.err);
    }
    for (args, lines) in [(&["function", "list"][..], 2), (&["function", "list", "--all"], 3)] {
        let listed = stoker(args).await;
        assert_eq!(listed.out.lines().count(), lines, "{}", listed.out);
    }
    let deleted = stoker(&["function", "delete", "resize"]).await;
    assert_eq!(deleted.out.trim(), format!("deleted {}", made.name), "{}", deleted.err);

    stoker(&["account", "unset-default"]).await;
    assert_eq!(stoker(&["function", "get", "resize"]).await.code, 2);
    std::fs::write(settings.join("stoker/config.toml"), "acount = 'acme'").unwrap();
    let wrong = stoker(&["function", "get", "resize"]).await;
    assert!(wrong.code == 2 && wrong.err.contains("acount"), "{}", wrong.err);
    agent.stop().await;
}

#[tokio::test]
async fn the_controller_prints_and_acknowledges() {
    for as_json in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let address = Address::Unix(dir.path().join("controller.sock"));
        let printed = dir.path().join("out");
        let mut command = Command::new(CONTROLLER);
        command.arg("--listen").arg(address.to_string());
        if as_json {
            command.arg("--json");
        }
        let mut controller = command
            .stdin(Stdio::null())
            .stdout(std::fs::File::create(&printed).unwrap())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let store = Store::open(&dir.path().join("state")).unwrap();
        let stop = CancellationToken::new();
        let reporter = Reporter::start(
            store.clone(),
            Some(address),
            &config::Controller::default(),
            &Essential::default(),
            stop.clone(),
        );
        let _stop = stop.drop_guard();
        let event = Event::Machine(v1::Machine {
            name: "machines/01ARZ3NDEKTSV4RRFFQ69G5FAV".into(),
            state: v1::machine::State::Booting.into(),
            runtime: "python3.11".into(),
            ..Default::default()
        });
        reporter.record(event).await.unwrap();
        assert!(reporter.flush(PATIENCE).await);
        // What is acknowledged is printed.
        let text = std::fs::read_to_string(&printed).unwrap();
        assert_eq!(text.lines().count(), 1, "{text}");
        if as_json {
            let line: Value = serde_json::from_str(&text).unwrap();
            assert_eq!(line["machine"]["state"], "BOOTING");
            assert_eq!(line["host"], store.host().to_string());
            assert_eq!(line["sequence"], "1");
        } else {
            assert!(
                text.contains("RFFQ69G5FAV".get(3..).unwrap()) && text.contains("BOOTING"),
                "{text}"
            );
        }
        controller.kill().await.unwrap();
    }
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", taken.local_addr().unwrap());
    let ran = run(CONTROLLER, &["--listen", &address]).await;
    assert_eq!(ran.code, 1);
    assert!(ran.err.contains("can't listen"), "{}", ran.err);
}

/// `store.path` was mistyped: a start that finds no function removes no code.
#[tokio::test]
async fn code_that_the_database_does_not_know_is_kept() {
    let host = Host::new();
    let objects = host.path("code/objects");
    std::fs::create_dir_all(&objects).unwrap();
    let zip = objects.join(format!("{}.zip", "a".repeat(64)));
    std::fs::write(&zip, app()).unwrap();
    // What keeps the agent from going on after it has opened its stores.
    std::fs::write(host.path("run"), "").unwrap();
    let ran = host.refuses("").await;
    assert!(ran.err.contains("machines.run_dir"), "{}", ran.err);
    assert!(host.path("state/state.db").exists() && zip.exists());
}

#[tokio::test]
async fn orphans_on_the_command_line() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path()).await;
    let none = stoker(dir.path(), &["code", "orphans"]).await;
    assert!(none.code == 0 && none.out.starts_with("no orphans"), "{}", none.err);
    let hash = "a".repeat(64);
    std::fs::write(dir.path().join(format!("code/objects/{hash}.zip")), app()).unwrap();
    let listed = stoker(dir.path(), &["code", "orphans"]).await;
    assert!(listed.out.contains(&hash), "{}", listed.out);
    let listed = stoker(dir.path(), &["code", "orphans", "--json"]).await;
    let orphans: Value = serde_json::from_str(&listed.out).unwrap();
    assert_eq!(orphans["orphans"][0]["codeSha256"], hash);
    let removed = stoker(dir.path(), &["code", "remove-orphans"]).await;
    assert_eq!(
        (removed.code, removed.out.trim()),
        (0, "removed 0 (0 B)"),
        "{}",
        removed.err
    );
    let short = stoker(dir.path(), &["code", "remove-orphans", "--older-than", "1h"]).await;
    assert_eq!(short.code, 1);
    assert!(short.err.contains("code.orphan_grace"), "{}", short.err);
    assert_eq!(agent.kept().len(), 1);
    agent.stop().await;
}

#[tokio::test]
async fn backups_on_the_command_line() {
    let host = Host::new();
    let agent = Agent::start(host.dir.path()).await;
    let secret = v1::Function {
        environment: [("TOKEN".to_owned(), "b=c".to_owned())].into(),
        ..function("kept")
    };
    let made = agent.create(secret, &app()).await.unwrap();
    let archive = host.path("archive.tar").display().to_string();
    let backup = ["admin", "backup", &archive, "--with-key"];
    let saved = stoker(host.dir.path(), &backup).await;
    assert!(
        saved.code == 0 && saved.out.contains("3 files"),
        "{} {}",
        saved.out,
        saved.err
    );
    let mode = std::fs::metadata(&archive).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let again = stoker(host.dir.path(), &backup).await;
    assert!(
        again.code == 2 && again.err.contains("is there already"),
        "{}",
        again.err
    );
    agent.stop().await;

    let other = Host::new();
    let at = |name: &str| other.path(name).display().to_string();
    let config = at("stokerd.toml");
    let text = format!("[store]\npath = '{}'\n[code]\npath = '{}'\n", at("state"), at("code"));
    std::fs::write(&config, text).unwrap();
    let admin = async |args: &[&str]| run(STOKER, &[&["admin"], args, &["--config", &config]].concat()).await;
    let restored = admin(&["restore", &archive]).await;
    assert!(
        restored.code == 0 && restored.out.contains("1 zips"),
        "{} {}",
        restored.out,
        restored.err
    );
    let checked = admin(&["check"]).await;
    assert_eq!(checked.code, 0, "{} {}", checked.out, checked.err);
    let twice = admin(&["restore", &archive]).await;
    assert!(twice.code == 1 && twice.err.contains("--replace"), "{}", twice.err);
    let agent = Agent::start(other.dir.path()).await;
    assert_eq!(agent.get(&made.name).await.unwrap(), made);
    agent.stop().await;

    std::fs::remove_file(other.path(&format!("code/objects/{}.zip", made.code_sha256))).unwrap();
    let checked = admin(&["check"]).await;
    assert!(
        checked.code == 1 && checked.out.contains("is missing"),
        "{} {}",
        checked.out,
        checked.err
    );
    let restored = admin(&["restore", &archive, "--replace"]).await;
    assert_eq!(restored.code, 0, "{}", restored.err);
    assert_eq!(admin(&["check"]).await.code, 0);
    // While an agent runs there.
    let _lock = Lock::folder(&other.path("state"), "store.path").unwrap();
    for args in [&["check"][..], &["restore", &archive, "--replace"]] {
        let refused = admin(args).await;
        assert!(
            refused.code == 1 && refused.err.contains("already running"),
            "{}",
            refused.err
        );
    }
}

/// What a host's disk may hold that this agent can't use is said at the start, and left as it is.
#[tokio::test]
async fn a_database_or_key_that_can_not_be_used() {
    let host = Host::new();
    let agent = Agent::start(host.dir.path()).await;
    let secret = v1::Function {
        environment: [("TOKEN".to_owned(), "b=c".to_owned())].into(),
        ..function("kept")
    };
    agent.create(secret, &app()).await.unwrap();
    agent.stop().await;
    let wal = host.path("state/state.db-wal");
    eventually("the database to be closed", || !wal.exists()).await;
    // What keeps an agent from going on that has opened its stores.
    std::fs::write(host.path("run"), "").unwrap();

    let (key, away) = (host.path("state/environment.key"), host.path("away"));
    std::fs::rename(&key, &away).unwrap();
    let ran = host.refuses("").await;
    assert!(
        ran.err.contains("there is no key") && ran.err.contains("store.key"),
        "{}",
        ran.err
    );
    std::fs::rename(&away, &key).unwrap();

    let private = std::fs::Permissions::from_mode;
    std::fs::set_permissions(host.path("state"), private(0o777)).unwrap();
    let ran = host.refuses("").await;
    assert!(ran.err.contains("may be written by others (mode 0777)"), "{}", ran.err);
    std::fs::set_permissions(host.path("state"), private(0o755)).unwrap();
    let ran = host.refuses("").await;
    assert!(
        ran.err.contains("machines.run_dir") && ran.err.contains("made private"),
        "{}",
        ran.err
    );

    std::fs::write(host.path("state/state.db"), vec![7; 8192]).unwrap();
    let ran = host.refuses("").await;
    assert!(
        ran.err.contains("is damaged") && ran.err.contains("stoker admin restore"),
        "{}",
        ran.err
    );
}

/// A database of a later agent, on a full disk, or on one that is read-only: said at the start by what to do, and unchanged.
#[test]
fn a_database_of_a_later_agent_or_on_a_disk_that_can_not_be_written() {
    let host = Host::new();
    let refuses = |says: &[&str]| {
        let ran = block_on(host.refuses(""));
        assert!(says.iter().all(|says| ran.err.contains(says)), "{}", ran.err);
    };
    stoker_testkit::disk::with_own_mounts(|| {
        std::fs::create_dir(host.path("state")).unwrap();
        stoker_testkit::disk::mount_small(&host.path("state"), 1 << 20);
        std::fs::set_permissions(host.path("state"), std::fs::Permissions::from_mode(0o700)).unwrap();
        let ballast = host.path("state/ballast");
        stoker_testkit::disk::fill(&ballast);
        refuses(&["state", "No space left on device"]);
        stoker_testkit::disk::free(&ballast);

        drop(Store::open(&host.path("state")).unwrap());
        let file = host.path("state/state.db");
        block_on(eventually("the database to be closed", || {
            !host.path("state/state.db-wal").exists()
        }));
        let whole = std::fs::read(&file).unwrap();
        let database = rusqlite::Connection::open(&file).unwrap();
        database.pragma_update(None, "user_version", 99).unwrap();
        drop(database);
        refuses(&["state.db", "schema 99", "use stokerd"]);

        std::fs::write(&file, &whole).unwrap();
        stoker_testkit::disk::mount_read_only(&host.path("state"));
        refuses(&["state", "ead-only"]);
        assert!(std::fs::read(&file).unwrap() == whole);
    });
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.unwrap().block_on(work)
}

/// The disk is full while an agent runs: what is there is shown, what can't be kept is refused, and then taken.
#[test]
fn a_disk_that_is_full_for_a_while() {
    let dir = tempfile::tempdir().unwrap();
    stoker_testkit::disk::with_own_mounts(|| {
        stoker_testkit::disk::mount_small(dir.path(), 2 << 20);
        block_on(async {
            let agent = Agent::start(dir.path()).await;
            let kept = agent.create(function("kept"), &app()).await.unwrap();
            let ballast = dir.path().join("ballast");
            stoker_testkit::disk::fill(&ballast);
            let refused = agent
                .create_with(header(function("later"), "r1"), &app())
                .await
                .unwrap_err();
            assert_eq!(refused.code(), tonic::Code::ResourceExhausted, "{refused:?}");
            assert_eq!(agent.get(&kept.name).await.unwrap(), kept);
            let socket = socket(dir.path()).display().to_string();
            let listed = run(STOKER, &["--socket", &socket, "function", "list"]).await;
            assert!(
                listed.code == 0 && listed.out.contains("kept"),
                "{}{}",
                listed.out,
                listed.err
            );
            assert!(!listed.out.contains("later"), "{}", listed.out);
            stoker_testkit::disk::free(&ballast);
            agent
                .create_with(header(function("later"), "r1"), &app())
                .await
                .unwrap();
            agent.nothing_staged().await;
            assert_eq!(agent.kept().len(), 1, "of both the code is the same");
            agent.stop().await;
        });
    });
}
