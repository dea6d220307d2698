//! Machines that accounts launch from an image: launched, entered, resized, left by their agent, and ended.

#![allow(clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::sys::signal::Signal;
use serde_json::json;
use stoker_linux::Cgroup;
use stoker_proto::v1::machine_end::Reason;
use stoker_proto::v1::{self, exec_request, exec_response, forward_port_request, import_image_request, machine};
use stoker_tests::host::{Host, Options};
use stoker_tests::{ACCOUNT, eventually};
use tonic::{Code, Status};

/// Serves files, and at its end says goodbye.
const SERVER: &str = "\
trap 'echo goodbye; exit 5' TERM
httpd -f -p 8080 -h /www &
echo listening
wait
";

/// What a shell of busybox finds its programs by.
const APPLETS: [&str; 9] = ["sh", "httpd", "cat", "nproc", "sleep", "killall", "yes", "echo", "dd"];

fn options() -> Options {
    Options {
        warming: 0,
        settings: vec![
            // The lab has two CPUs.
            ("machines.vcpus", json!(4)),
            // Nothing is held back but by what is asked for.
            ("credits.launch", json!(1000.0)),
        ],
    }
}

/// A root file system as a tar: busybox, and a page.
fn root(folder: &Path) -> anyhow::Result<Vec<u8>> {
    let root = folder.join("image");
    for part in ["bin", "etc", "tmp", "www"] {
        std::fs::create_dir_all(root.join(part))?;
    }
    std::fs::copy("/bin/busybox", root.join("bin/busybox")).context("the Debian package busybox-static")?;
    for applet in APPLETS {
        symlink("busybox", root.join("bin").join(applet))?;
    }
    std::fs::write(root.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\n")?;
    std::fs::write(root.join("www/index.html"), "a page\n")?;
    let tar = Command::new("tar").arg("-C").arg(&root).args(["-c", "."]).output()?;
    ensure!(tar.status.success(), "{}", String::from_utf8_lossy(&tar.stderr));
    Ok(tar.stdout)
}

/// A host with an image; answers with what that is called.
async fn start() -> anyhow::Result<(Host, String)> {
    start_with(options()).await
}

async fn start_with(options: Options) -> anyhow::Result<(Host, String)> {
    let host = Host::start(options).await?;
    let folder = tempfile::tempdir()?;
    let tar = root(folder.path())?;
    let name = format!("{ACCOUNT}/images/box");
    let header = v1::ImportImageHeader {
        name: name.clone(),
        reference: String::new(),
    };
    let part = |part| v1::ImportImageRequest { part: Some(part) };
    let chunks = tar.chunks(512 << 10).map(|chunk| chunk.to_vec().into());
    let mut parts = vec![part(import_image_request::Part::Header(header))];
    parts.extend(chunks.map(|chunk| part(import_image_request::Part::Chunk(chunk))));
    host.images().import_image(tokio_stream::iter(parts)).await?;
    Ok((host, name))
}

fn launch(image: &str, program: &[&str]) -> v1::LaunchMachineRequest {
    v1::LaunchMachineRequest {
        parent: ACCOUNT.into(),
        image: image.into(),
        size: size(1, 512),
        ceiling: size(3, 1024),
        entrypoint: program.iter().map(|&word| word.into()).collect(),
        environment: [("PATH".to_owned(), "/bin".to_owned())].into(),
        ..Default::default()
    }
}

fn size(vcpus: u32, memory_mib: u32) -> Option<v1::MachineSize> {
    Some(v1::MachineSize {
        vcpus,
        cpu_millis: vcpus * 1000,
        memory_mib,
    })
}

fn duration(duration: Duration) -> Option<prost_types::Duration> {
    duration.try_into().ok()
}

async fn launched(host: &Host, request: v1::LaunchMachineRequest) -> Result<v1::Machine, Status> {
    Ok(host.machines().launch_machine(request).await?.into_inner())
}

async fn machine(host: &Host, name: &str) -> anyhow::Result<v1::Machine> {
    let name = name.to_owned();
    Ok(host
        .machines()
        .get_machine(v1::GetMachineRequest { name })
        .await?
        .into_inner())
}

async fn taken(host: &Host, name: &str) -> anyhow::Result<Option<v1::MachineSize>> {
    Ok(machine(host, name).await?.launched.context("launched")?.taken)
}

/// What a program in the machine answers to that input, and what it exits with.
async fn exec(host: &Host, name: &str, command: &[&str], input: &'static str) -> Result<(String, i32), Status> {
    let part = |part| v1::ExecRequest { part: Some(part) };
    let start = v1::ExecStart {
        name: name.to_owned(),
        command: command.iter().map(|&word| word.into()).collect(),
        ..Default::default()
    };
    let mut parts = vec![part(exec_request::Part::Start(start))];
    if !input.is_empty() {
        parts.push(part(exec_request::Part::Stdin(input.into())));
    }
    parts.push(part(exec_request::Part::Stdin(Default::default())));
    let mut answers = host.machines().exec(tokio_stream::iter(parts)).await?.into_inner();
    let mut output = Vec::new();
    while let Some(answer) = answers.message().await? {
        match answer.part {
            Some(exec_response::Part::Stdout(bytes) | exec_response::Part::Stderr(bytes)) => {
                output.extend_from_slice(&bytes);
            }
            Some(exec_response::Part::ExitStatus(status)) => {
                return Ok((String::from_utf8_lossy(&output).into_owned(), status));
            }
            Some(exec_response::Part::StdinGrant(_)) | None => {}
        }
    }
    Err(Status::data_loss("it did not say what it exited with"))
}

/// All that somebody who listens there answers.
async fn through(host: &Host, name: &str, port: u32, request: &'static str) -> Result<String, Status> {
    let part = |part| v1::ForwardPortRequest { part: Some(part) };
    let start = v1::ForwardPortStart {
        name: name.to_owned(),
        port,
    };
    let parts = vec![
        part(forward_port_request::Part::Start(start)),
        part(forward_port_request::Part::Data(request.into())),
    ];
    let mut answers = host
        .machines()
        .forward_port(tokio_stream::iter(parts))
        .await?
        .into_inner();
    let mut answer = Vec::new();
    while let Some(more) = answers.message().await? {
        answer.extend_from_slice(&more.data);
    }
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// Processes that wait for memory over and over, for their cgroup has too little; until this is dropped.
struct Pressed(Cgroup, Child);

impl Pressed {
    fn begin() -> anyhow::Result<Self> {
        let all = Cgroup::at(Cgroup::mount()?);
        all.enable("memory")?;
        let cgroup = all.create(format!("stoker-test-pressure-{}", std::process::id()))?;
        cgroup.write("memory.high", &(4 << 20).to_string())?;
        let allocate = "while :; do dd if=/dev/zero of=/dev/null bs=64M count=1 2> /dev/null; done";
        let enter = format!("echo 0 > {}/cgroup.procs && {allocate}", cgroup.path().display());
        let child = Command::new("sh").args(["-c", &enter]).spawn()?;
        Ok(Self(cgroup, child))
    }
}

impl Drop for Pressed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.1.wait();
        let _ = self.0.destroy();
    }
}

/// What the host has taken back of a machine's memory, in MiB.
async fn taken_back(host: &Host, name: &str) -> anyhow::Result<u32> {
    Ok(machine(host, name).await?.launched.context("launched")?.balloon_mib)
}

/// What was decided about a machine's balloon.
async fn balloon_set(host: &Host, name: &str) -> anyhow::Result<Vec<v1::Decision>> {
    let why = host.why(name).await?;
    let set = why.into_iter().filter(|decision| decision.command == "set balloon");
    Ok(set.collect())
}

/// What its program has written; all of it, where the machine has ended.
async fn written(host: &Host, name: &str, follow: bool) -> anyhow::Result<Vec<String>> {
    let request = v1::ReadLogsRequest {
        name: name.to_owned(),
        follow,
        ..Default::default()
    };
    let mut stream = host.logs().read_logs(request).await?.into_inner();
    let mut lines = Vec::new();
    while let Some(more) = stream.message().await? {
        lines.extend(more.lines.into_iter().map(|line| line.text));
    }
    Ok(lines)
}

#[tokio::test]
async fn an_image_runs_is_entered_resized_and_stopped() -> anyhow::Result<()> {
    let (host, image) = start().await?;
    let launch = v1::LaunchMachineRequest {
        request_id: "mine".into(),
        ..launch(&image, &["/bin/sh", "-c", SERVER])
    };
    let server = launched(&host, launch.clone()).await?;
    let name = server.name.clone();
    assert_eq!((server.state(), &*server.account), (machine::State::Active, ACCOUNT));
    assert_eq!(server.launched.context("launched")?.taken, size(1, 512));
    assert_eq!(launched(&host, launch).await?.name, name, "who asks again has the same");
    eventually("it to say so", async || {
        let lines = written(&host, &name, false).await?;
        Ok((lines == ["listening"]).then_some(()))
    })
    .await?;

    let (echoed, status) = exec(&host, &name, &["sh", "-c", "cat; exit 7"], "through and back").await?;
    assert_eq!((&*echoed, status), ("through and back", 7));
    let page = through(&host, &name, 8080, "GET / HTTP/1.0\r\n\r\n").await?;
    ensure!(page.ends_with("a page\n"), "{page}");
    let nobody = through(&host, &name, 8081, "hello").await;
    assert_eq!(nobody.map_err(|status| status.code()), Err(Code::Unavailable));

    let resize = async |wanted| -> Result<v1::Resize, Status> {
        let request = v1::ResizeMachineRequest {
            name: name.clone(),
            size: wanted,
            timeout: duration(Duration::from_secs(60)),
        };
        let resized = host.machines().resize_machine(request).await?.into_inner();
        resized.resize.ok_or_else(|| Status::data_loss("no resize"))
    };
    let nproc = async || exec(&host, &name, &["nproc"], "").await;
    for (vcpus, memory_mib) in [(3, 1024), (1, 512)] {
        // To be made smaller it has to be measured, and to use no more than it is to have.
        eventually("it to be seen quiet", async || {
            let metrics = machine(&host, &name).await?.launched.context("launched")?.metrics;
            let quiet = metrics.get("cpu_use").is_some_and(|percent| *percent < 25.0);
            Ok((quiet && metrics.contains_key("memory_use")).then_some(()))
        })
        .await?;
        let resized = resize(size(vcpus, memory_mib)).await?;
        assert_eq!(resized.taken, size(vcpus, memory_mib), "{resized:?}");
        ensure!(resized.duration.is_some(), "{resized:?}");
        assert_eq!(nproc().await?.0.trim(), vcpus.to_string());
    }

    // A load that one vCPU is not enough for.
    let threshold = v1::Threshold {
        metric: "cpu_use".into(),
        comparison: v1::threshold::Comparison::Above.into(),
        value: 50.0,
        held: duration(Duration::from_secs(1)),
        resource: v1::threshold::Resource::Vcpus.into(),
        direction: v1::threshold::Direction::Grow.into(),
        change: Some(v1::threshold::Change::By(1)),
        most: Some(2),
        cooldown: duration(Duration::from_secs(1)),
        ..Default::default()
    };
    let request = v1::SetThresholdsRequest {
        name: name.clone(),
        thresholds: vec![threshold],
        ..Default::default()
    };
    host.machines().set_thresholds(request).await?;
    let load = exec(&host, &name, &["sh", "-c", "yes > /dev/null"], "");
    let grown = eventually("it to grow", async || {
        Ok((taken(&host, &name).await? == size(2, 512)).then_some(()))
    });
    // The load ends with who asked for it.
    tokio::select! {
        ended = load => anyhow::bail!("the load ended: {ended:?}"),
        grown = grown => grown?,
    }
    let request = v1::ListResizesRequest {
        parent: name.clone(),
        ..Default::default()
    };
    let resizes = host.machines().list_resizes(request).await?.into_inner().resizes;
    assert_eq!(resizes.len(), 3, "{resizes:?}");
    ensure!(
        resizes[0].reason.starts_with("cpu_use was above 50%"),
        "{:?}",
        resizes[0]
    );

    // What it takes and then frees is the host's again.
    let memory = async || -> anyhow::Result<u64> {
        let usage = machine(&host, &name).await?.usage;
        Ok(usage.context("usage")?.memory_bytes)
    };
    let before = memory().await?;
    let load = exec(&host, &name, &["dd", "if=/dev/zero", "of=/dev/null", "bs=200M"], "");
    let taken = eventually("memory to be taken", async || {
        Ok((memory().await? > before + (150 << 20)).then_some(()))
    });
    tokio::select! {
        ended = load => anyhow::bail!("the load ended: {ended:?}"),
        taken = taken => taken?,
    }
    eventually("memory to be given back", async || {
        Ok((memory().await? < before + (75 << 20)).then_some(()))
    })
    .await?;

    let request = v1::StopMachineRequest {
        name: name.clone(),
        grace: duration(Duration::from_secs(30)),
    };
    let ended = host.machines().stop_machine(request).await?.into_inner();
    let end = ended.end.context("an end")?;
    assert_eq!((end.reason(), end.exit_status), (Reason::Stopped, Some(5)), "{end:?}");
    let lines = written(&host, &name, true).await?;
    assert_eq!(lines, ["listening", "goodbye"]);
    let after = exec(&host, &name, &["nproc"], "").await;
    assert_eq!(after.map_err(|status| status.code()), Err(Code::Unavailable));
    host.stop().await?;
    Ok(())
}

#[tokio::test]
async fn a_machine_outlives_its_agent_and_its_image() -> anyhow::Result<()> {
    let (mut host, image) = start().await?;
    let sleeper = launched(&host, launch(&image, &["sleep", "100000"])).await?;
    let name = sleeper.name.clone();
    let request = v1::DeleteImageRequest { name: image };
    host.images().delete_image(request).await?;
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        host = host.restart(signal).await?;
        let (page, status) = eventually("it to be taken over", async || {
            match exec(&host, &name, &["cat", "/www/index.html"], "").await {
                Ok(answer) => Ok(Some(answer)),
                Err(status) if matches!(status.code(), Code::Unavailable | Code::FailedPrecondition) => Ok(None),
                Err(status) => Err(status.into()),
            }
        })
        .await?;
        assert_eq!((&*page, status), ("a page\n", 0), "{signal}");
        let now = machine(&host, &name).await?;
        assert_eq!((now.pid, now.create_time), (sleeper.pid, sleeper.create_time));
    }
    exec(&host, &name, &["killall", "-9", "sleep"], "").await?;
    let ended = eventually("it to end with its program", async || {
        let machine = machine(&host, &name).await?;
        Ok(machine.end)
    })
    .await?;
    assert_eq!((ended.reason(), ended.exit_status), (Reason::ProgramEnded, Some(137)));
    host.stop().await?;
    Ok(())
}

#[tokio::test]
async fn a_program_that_can_not_be_started_leaves_an_end_that_says_why() -> anyhow::Result<()> {
    let (host, image) = start().await?;
    let refused = launched(&host, launch(&image, &["/no/such/program"])).await;
    let status = refused.err().context("it is no machine")?;
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    let machines = host.list_machines(true).await?;
    let ends: Vec<_> = machines
        .iter()
        .filter_map(|machine| machine.end.as_ref())
        .map(v1::MachineEnd::reason)
        .collect();
    assert_eq!(ends, [Reason::ProgramFailed]);
    host.stop().await?;
    Ok(())
}

#[tokio::test]
async fn a_host_short_of_memory_takes_what_a_machine_does_not_use_and_gives_it_back() -> anyhow::Result<()> {
    if let Err(error) = stoker_linux::pressure::waited("memory") {
        eprintln!("passed over: this kernel does not tell how long is waited for memory: {error}");
        return Ok(());
    }
    let mut options = options();
    // More than it has: it is pressed once something waits for memory.
    options.settings.push(("pool.reserve_mib", json!(1 << 20)));
    let (host, image) = start_with(options).await?;
    let name = launched(&host, launch(&image, &["sleep", "100000"])).await?.name;
    let pressed = Pressed::begin()?;
    let taken = eventually("the host to take memory back", async || {
        Ok(Some(taken_back(&host, &name).await?).filter(|taken| *taken >= 64))
    })
    .await?;
    ensure!(taken < 512 - 64, "{taken} MiB leave its guest too little");
    let set = balloon_set(&host, &name).await?;
    let first = set.first().context("a decision")?;
    ensure!(first.detail.starts_with("the host waited for memory"), "{first:?}");
    // The next agent finds it. What was decided last may not have been kept.
    let host = host.restart(Signal::SIGKILL).await?;
    eventually("the next agent to see it", async || {
        Ok((taken_back(&host, &name).await? > 0).then_some(()))
    })
    .await?;
    let answer = eventually("its guest to answer", async || {
        Ok(exec(&host, &name, &["echo", "alive"], "").await.ok())
    });
    assert_eq!(answer.await?, ("alive\n".to_owned(), 0));

    drop(pressed);
    // It is calm for 30 s first, or twice as long where it was pressed again meanwhile, and then a step takes 5 s.
    let start = Instant::now();
    while taken_back(&host, &name).await? > 0 {
        ensure!(start.elapsed() < Duration::from_secs(300), "not all is given back");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let set = balloon_set(&host, &name).await?;
    let last = set.last().context("a decision")?;
    ensure!(last.detail.ends_with("to 0 MiB"), "{last:?}");
    host.stop().await?;
    Ok(())
}
