//! A machine that was launched from an image, made of programs of this host, and what the agent would ask of it.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Instant;

use stoker_images::{Limits, Store};
use stoker_proto::guest::{
    ContainerEnd, FollowLogsRequest, LogLines, RunImageRequest, RunImageResponse, StopImageRequest, WatchRequest,
    WatchResponse,
};
use stoker_proto::limits::STDIN_WINDOW_KEY;
use stoker_proto::v1::exec_request::Part as Ask;
use stoker_proto::v1::exec_response::Part as Tell;
use stoker_proto::v1::{ExecRequest, ExecResponse, ExecStart, TerminalSize};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::support::{Guest, PATIENCE, new_id};

/// Programs of this host that the image has.
const PROGRAMS: [&str; 9] = [
    "/bin/sh",
    "/bin/cat",
    "/bin/sleep",
    "/bin/stty",
    "/bin/dd",
    "/bin/ln",
    "/bin/rm",
    "/usr/bin/id",
    "/usr/bin/mkfifo",
];

/// The image, as an erofs file; made once.
pub(crate) fn image() -> &'static Path {
    static IMAGE: OnceLock<PathBuf> = OnceLock::new();
    IMAGE.get_or_init(|| {
        // It goes with the lab.
        let folder = tempfile::tempdir_in("/var/tmp").unwrap().keep();
        let root = folder.join("root");
        let server = Path::new(env!("CARGO_BIN_EXE_stoker-init"))
            .parent()
            .unwrap()
            .join("examples/server");
        copy_with_libraries(&server, &root.join("opt/server"), &root);
        for program in PROGRAMS {
            copy_with_libraries(program.as_ref(), &root.join(&program[1..]), &root);
        }
        // Who runs it is root for what it does.
        copy_with_libraries("/usr/bin/id".as_ref(), &root.join("usr/bin/root-id"), &root);
        fs::set_permissions(root.join("usr/bin/root-id"), fs::Permissions::from_mode(0o4755)).unwrap();
        for (name, content) in [
            ("passwd", "root:x:0:0:root:/root:/bin/sh\nweb:x:101:102::/srv:/bin/sh\n"),
            ("group", "root:x:0:\nweb:x:102:\nlog:x:4:web\n"),
            ("script", "no program\n"),
        ] {
            write(&root.join("etc").join(name), content, 0o644);
        }
        write(&root.join("etc/script"), "no program\n", 0o755);
        for (name, mode) in [("tmp", 0o1777), ("srv", 0o755), ("root", 0o700), ("proc", 0o555)] {
            fs::create_dir_all(root.join(name)).unwrap();
            fs::set_permissions(root.join(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        chown(root.join("srv"), Some(101), Some(102)).unwrap();
        symlink("/etc", root.join("srv/etc")).unwrap();
        let tar = folder.join("root.tar");
        let made = Command::new("tar")
            .args(["--numeric-owner", "-cf"])
            .arg(&tar)
            .arg("-C")
            .arg(&root)
            .arg(".")
            .status()
            .unwrap();
        assert!(made.success());
        let store = Store::open(&folder.join("store"), Limits::default()).unwrap();
        store.import("image", &tar, None).unwrap().path
    })
}

fn write(path: &Path, content: &str, mode: u32) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// Copies a program, and the libraries that it is linked with to where it looks for them.
fn copy_with_libraries(program: &Path, to: &Path, root: &Path) {
    let listed = Command::new("ldd").arg(program).output().unwrap();
    assert!(listed.status.success(), "{listed:?}");
    let libraries = String::from_utf8(listed.stdout).unwrap();
    let libraries = libraries.split_whitespace().filter(|word| word.starts_with('/'));
    for library in libraries {
        let copy = root.join(&library[1..]);
        if !copy.exists() {
            fs::create_dir_all(copy.parent().unwrap()).unwrap();
            fs::copy(library, copy).unwrap();
        }
    }
    fs::create_dir_all(to.parent().unwrap()).unwrap();
    fs::copy(program, to).unwrap();
}

/// A guest of such a machine.
pub(crate) struct Launched {
    pub(crate) guest: Guest,
    pub(crate) watch: Streaming<WatchResponse>,
    logs: Streaming<stoker_proto::guest::FollowLogsResponse>,
    written: Vec<LogLines>,
}

/// One that does nothing but to wait, as root.
pub(crate) fn waits() -> RunImageRequest {
    script("while :; do sleep 1; done")
}

/// One that runs a script, as root.
pub(crate) fn script(script: &str) -> RunImageRequest {
    RunImageRequest {
        id: new_id(),
        command: ["sh", "-c", script].map(str::to_owned).into(),
        environment: Vec::new(),
        working_dir: "/".to_owned(),
        uid: 0,
        gid: 0,
        groups: Vec::new(),
        home: "/root".to_owned(),
        hostname: "web-1".to_owned(),
    }
}

/// To run a script beside it.
pub(crate) fn also(script: &str) -> ExecStart {
    ExecStart {
        name: "machines/01J".to_owned(),
        command: ["sh", "-c", script].map(str::to_owned).into(),
        ..ExecStart::default()
    }
}

// === impl Launched ===

impl Launched {
    pub(crate) async fn start() -> Self {
        Self::start_with(Some(512)).await
    }

    /// With a scratch drive of so many MiB, or none.
    pub(crate) async fn start_with(scratch_mib: Option<u32>) -> Self {
        let mut guest = Guest::start_launched(image(), scratch_mib).await;
        let (watch, logs) = follow(&mut guest).await;
        Self {
            guest,
            watch,
            logs,
            written: Vec::new(),
        }
    }

    /// One whose program runs.
    pub(crate) async fn running(request: RunImageRequest) -> Self {
        let mut launched = Self::start().await;
        launched.run(request).await;
        launched
    }

    /// As an agent that was restarted.
    pub(crate) async fn reconnect(self) -> Self {
        let Self {
            mut guest,
            watch,
            logs,
            written,
        } = self;
        // A connection lasts as long as a stream of it.
        drop((watch, logs));
        guest.reconnect().await;
        let (watch, logs) = follow(&mut guest).await;
        Self {
            guest,
            watch,
            logs,
            written,
        }
    }

    pub(crate) async fn run(&mut self, request: RunImageRequest) {
        let response = self.try_run(request).await.unwrap();
        assert!(response.error.is_none(), "{response:?}");
    }

    pub(crate) async fn try_run(&mut self, request: RunImageRequest) -> Result<RunImageResponse, Status> {
        let response = self.guest.client.run_image(request).await?;
        Ok(response.into_inner())
    }

    pub(crate) async fn stop(&mut self, signal: i32, grace_ms: u64) {
        let grace = std::time::Duration::from_millis(grace_ms);
        let request = StopImageRequest {
            signal,
            grace: Some(grace.try_into().unwrap()),
        };
        self.guest.client.stop_image(request).await.unwrap();
    }

    /// What is told next that fits.
    pub(crate) async fn told(&mut self, fits: impl Fn(&WatchResponse) -> bool) -> WatchResponse {
        let watching = async {
            loop {
                let told = self.watch.message().await.unwrap().expect("the stream goes on");
                if fits(&told) {
                    return told;
                }
            }
        };
        tokio::time::timeout(PATIENCE, watching).await.expect("it was not told")
    }

    /// How it ended.
    pub(crate) async fn end(&mut self) -> ContainerEnd {
        self.told(|told| !told.ended.is_empty()).await.ended.remove(0)
    }

    /// Waits until its program has written this line. All lines up to then.
    pub(crate) async fn until_written(&mut self, line: &str) -> Vec<String> {
        let begin = Instant::now();
        loop {
            let lines: Vec<String> = self
                .written
                .iter()
                .flat_map(|lines| lines.lines().map(str::to_owned))
                .collect();
            if lines.iter().any(|written| written == line) {
                return lines;
            }
            let batch = tokio::time::timeout(PATIENCE, self.logs.message()).await;
            let batch = batch.unwrap_or_else(|_| panic!("no {line:?} among {lines:?}"));
            self.written.extend(batch.unwrap().expect("the stream goes on").lines);
            assert!(begin.elapsed() < PATIENCE, "no {line:?} among {lines:?}");
        }
    }

    /// Powers the machine off. All lines that have come by then.
    pub(crate) async fn power_off(mut self) -> Vec<String> {
        let request = stoker_proto::guest::PowerOffRequest {};
        self.guest.client.power_off(request).await.unwrap();
        while let Ok(Some(batch)) = tokio::time::timeout(PATIENCE, self.logs.message()).await.unwrap() {
            self.written.extend(batch.lines);
        }
        let lines = self.written.iter().flat_map(|lines| lines.lines());
        lines.map(str::to_owned).collect()
    }

    /// Begins a program beside it.
    pub(crate) async fn exec(&mut self, start: ExecStart) -> Result<Session, Status> {
        let (to, requests) = mpsc::channel(1);
        to.send(ask(Ask::Start(start))).await.unwrap();
        let answers = self.guest.client.exec(ReceiverStream::new(requests)).await?;
        assert!(answers.metadata().contains_key(STDIN_WINDOW_KEY));
        Ok(Session {
            to: Some(to),
            answers: answers.into_inner(),
            stdout: Vec::new(),
            stderr: Vec::new(),
        })
    }

    /// Runs a script beside it, to its end.
    pub(crate) async fn says(&mut self, script: &str) -> Said {
        self.exec(also(script)).await.unwrap().end().await.unwrap()
    }

    /// The folder of its cgroup, which is gone with it.
    pub(crate) fn cgroup(&self, id: &str) -> PathBuf {
        Path::new("/sys/fs/cgroup/containers").join(id)
    }
}

async fn follow(
    guest: &mut Guest,
) -> (
    Streaming<WatchResponse>,
    Streaming<stoker_proto::guest::FollowLogsResponse>,
) {
    let interval = prost_types::Duration {
        seconds: 0,
        nanos: 50_000_000,
    };
    let request = WatchRequest {
        interval: Some(interval),
    };
    let watch = guest.client.watch(request).await.unwrap().into_inner();
    let logs = guest
        .client
        .follow_logs(FollowLogsRequest {})
        .await
        .unwrap()
        .into_inner();
    (watch, logs)
}

fn ask(part: Ask) -> ExecRequest {
    ExecRequest { part: Some(part) }
}

/// A program that runs beside the image's.
pub(crate) struct Session {
    to: Option<mpsc::Sender<ExecRequest>>,
    answers: Streaming<ExecResponse>,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
}

/// What became of one.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) status: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

// === impl Session ===

impl Session {
    pub(crate) async fn ask(&mut self, part: Ask) {
        self.to.as_ref().unwrap().send(ask(part)).await.unwrap();
    }

    pub(crate) async fn input(&mut self, data: impl Into<Vec<u8>>) {
        self.ask(Ask::Stdin(data.into().into())).await;
    }

    /// There is no more of it; the call goes on.
    pub(crate) async fn end_input(&mut self) {
        self.input(Vec::new()).await;
    }

    pub(crate) async fn resize(&mut self, columns: u32, rows: u32) {
        self.ask(Ask::Terminal(TerminalSize { columns, rows })).await;
    }

    /// The exit status, if this was the end.
    pub(crate) async fn next(&mut self) -> Result<Option<i32>, Status> {
        let answer = tokio::time::timeout(PATIENCE, self.answers.message()).await;
        let answer = answer.expect("nothing came").and_then(|answer| {
            answer.ok_or_else(|| Status::data_loss(format!("it ended without a status: {:?}", self.stderr)))
        })?;
        match answer.part.unwrap() {
            Tell::Stdout(data) => self.stdout.extend_from_slice(&data),
            Tell::Stderr(data) => self.stderr.extend_from_slice(&data),
            Tell::ExitStatus(status) => return Ok(Some(status)),
            Tell::StdinGrant(_) => {}
        }
        Ok(None)
    }

    /// Waits until it has written this.
    pub(crate) async fn until(&mut self, text: &str) {
        while !String::from_utf8_lossy(&self.stdout).contains(text) {
            if let Some(status) = self.next().await.unwrap() {
                panic!(
                    "it ended with {status} and wrote no {text:?}: {:?}",
                    (&self.stdout, &self.stderr)
                );
            }
        }
    }

    pub(crate) async fn end(mut self) -> Result<Said, Status> {
        loop {
            if let Some(status) = self.next().await? {
                // Nothing comes after it.
                assert!(self.answers.message().await?.is_none());
                return Ok(Said {
                    status,
                    stdout: String::from_utf8_lossy(&self.stdout).into_owned(),
                    stderr: String::from_utf8_lossy(&self.stderr).into_owned(),
                });
            }
        }
    }
}

/// Waits until this is so.
pub(crate) async fn eventually(what: &str, so: impl Fn() -> bool) {
    let begin = Instant::now();
    while !so() {
        assert!(begin.elapsed() < PATIENCE, "{what}");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}
