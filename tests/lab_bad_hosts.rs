//! What can be wrong with a host: files that are missing or cut short, guests that never come up, addresses in use,
//! VMMs that are killed, no descriptors left.

#![allow(clippy::expect_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use stoker_proto::v1::machines_client::MachinesClient;
use stoker_proto::v1::{self, machine::State, machine_end::Reason};
use stoker_testkit::agent::Setting;
use stoker_testkit::cpio::Archive;
use stoker_tests::code::{self, ECHO};
use stoker_tests::host::{self, Host, Options, python_function, spawn};
use stoker_tests::{cache, eventually};
use tempfile::TempDir;

/// Starts an agent that must refuse to, and returns its log.
async fn refuses(settings: Vec<Setting>) -> anyhow::Result<String> {
    let mut agent = spawn(Options { warming: 0, settings })?;
    let (status, log) = tokio::task::spawn_blocking(move || anyhow::Ok((agent.wait()?, agent.log()))).await??;
    assert!(!status.success(), "the agent must not start:\n{log}");
    Ok(log)
}

fn setting(key: &'static str, path: &Path) -> Setting {
    (key, path.display().to_string().into())
}

#[tokio::test]
async fn files_that_are_missing_or_cut_short() -> anyhow::Result<()> {
    for (key, file) in [
        ("machines.kernel", "kernel/tuned/vmlinux"),
        ("machines.kernel", "kernel/tuned/bzImage"),
        ("machines.initramfs", "image/initramfs-tuned.cpio"),
        ("machines.image", "image/root.erofs"),
    ] {
        let folder = TempDir::new()?;
        let missing = folder.path().join("missing");
        let log = refuses(vec![setting(key, &missing)]).await?;
        assert!(
            log.contains(&missing.display().to_string()),
            "{key}: the message names the file:\n{log}"
        );

        let short = folder.path().join("short");
        let whole = std::fs::read(cache(file)?)?;
        std::fs::write(&short, &whole[..whole.len() / 2])?;
        let log = refuses(vec![setting(key, &short)]).await?;
        assert!(
            log.contains(&short.display().to_string()),
            "{file}: the message names the file:\n{log}"
        );
    }
    // With files that are whole it starts and serves.
    let host = Host::start(Options::default()).await?;
    host.create(python_function("echo"), &code::python(ECHO)?).await?;
    host.answer("echo", &json!(1)).await?;
    host.stop().await?;
    Ok(())
}

/// Boots a host whose guests come up from `archive` and returns how the first of them ended.
async fn boots_badly(archive: Vec<u8>) -> anyhow::Result<(Host, v1::Machine)> {
    let folder = TempDir::new()?;
    let file: PathBuf = folder.path().join("initramfs.cpio");
    std::fs::write(&file, archive)?;
    let settings = vec![
        setting("machines.initramfs", &file),
        ("machines.boot_timeout", "15s".into()),
    ];
    let host = Host::start(Options { warming: 1, settings }).await?;
    let ended = eventually("the machine to be given up", async || {
        let machines = host.list_machines(true).await?;
        assert!(
            machines.iter().all(|machine| machine.state() != State::Warming),
            "a machine whose guest never answered is not ready"
        );
        Ok(machines.into_iter().find(|machine| machine.state() == State::Ended))
    })
    .await?;
    let id = ended.name.trim_start_matches("machines/").to_owned();
    assert_eq!(ended.pid, 0);
    assert!(!host.folder().join("run").join(&id).exists(), "its files are gone");
    assert!(
        host.machine_cgroups()?
            .iter()
            .all(|cgroup| !cgroup.path().ends_with(&id)),
        "its cgroup is gone"
    );
    Ok((host, ended))
}

#[tokio::test]
async fn guest_that_panics_at_boot() -> anyhow::Result<()> {
    let (host, machine) = boots_badly(Archive::default().finish()).await?;
    let end = machine.end.context("an ended machine says why")?;
    assert_eq!(end.reason(), Reason::GuestPanic, "{end:?}");
    assert!(end.console_tail.contains("Kernel panic"), "{end:?}");
    host.stop().await?;
    Ok(())
}

#[tokio::test]
async fn guest_that_hangs_at_boot() -> anyhow::Result<()> {
    let mut archive = Archive::default();
    archive.file("init", 0o755, &code::sleeper());
    let (host, machine) = boots_badly(archive.finish()).await?;
    let end = machine.end.context("an ended machine says why")?;
    assert_eq!(end.reason(), Reason::GuestHung, "{end:?}");
    host.stop().await?;
    Ok(())
}

/// A VMM that is killed costs its machine alone: what ran in it is told so, and the next request finds another.
#[tokio::test]
async fn vmm_that_is_killed() -> anyhow::Result<()> {
    let host = Host::start(Options::default()).await?;
    let sleeps = "import time\ndef handler(event, context):\n    time.sleep(event)\n    return 'awake'\n";
    host.create(python_function("sleeps"), &code::python(sleeps)?).await?;
    let (_, first) = host.answer("sleeps", &json!(0)).await?;
    let machine = first.placement.context("a placement")?.machine;
    let found = host
        .machines()
        .get_machine(v1::GetMachineRequest { name: machine.clone() })
        .await?
        .into_inner();
    let hour = json!(3600);
    let (lost, killed) = tokio::join!(host.invoke("sleeps", &hour), async {
        eventually("the request to run", async || {
            let containers = host.list_containers().await?;
            Ok(containers
                .iter()
                .any(|container| container.state() == v1::container::State::Busy)
                .then_some(()))
        })
        .await?;
        anyhow::Ok(kill(Pid::from_raw(found.pid.try_into()?), Signal::SIGKILL)?)
    });
    killed?;
    let status = lost.expect_err("the machine is gone");
    assert_eq!(status.code(), tonic::Code::Aborted, "{status:?}");
    let ended = eventually("the end to be told", async || {
        let request = v1::GetMachineRequest { name: machine.clone() };
        let machine = host.machines().get_machine(request).await?.into_inner();
        Ok((machine.state() == State::Ended).then_some(machine))
    })
    .await?;
    assert_eq!(ended.end.context("why")?.reason(), Reason::Killed);
    host.answer("sleeps", &json!(0)).await?;
    host.stop().await?;
    Ok(())
}

/// An agent that listens where something else does already is refused.
#[tokio::test]
async fn address_in_use() -> anyhow::Result<()> {
    let taken = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = taken.local_addr()?.to_string();
    let log = refuses(vec![("api.tcp", address.clone().into())]).await?;
    assert!(log.contains(&address), "the message names the address:\n{log}");
    Ok(())
}

/// A second agent with everything of its own but one thing is refused, and ends no machine of the first.
#[tokio::test]
async fn second_agent() -> anyhow::Result<()> {
    let host = Host::start(Options::default()).await?;
    let warm = async || {
        let machines = host.list_machines(false).await?;
        anyhow::Ok(machines.into_iter().find(|machine| machine.state() == State::Warming))
    };
    let machine = eventually("a warm machine", warm).await?;
    let log = refuses(vec![setting("api.socket", &host.folder().join("stokerd.sock"))]).await?;
    assert!(log.contains("already running"), "{log}");
    let cgroup = host.cgroup().path().file_name().context("a name")?;
    for (key, value) in [
        ("store.path", host.folder().join("store")),
        ("code.path", host.folder().join("code")),
        ("machines.run_dir", host.folder().join("run")),
        ("machines.cgroup", cgroup.into()),
    ] {
        let log = refuses(vec![setting(key, &value)]).await?;
        assert!(
            log.contains("already running") && log.contains(&format!("set {key} of this one")),
            "{log}"
        );
    }
    let after = warm().await?.context("the machine is gone")?;
    assert_eq!((&after.name, after.pid), (&machine.name, machine.pid));
    kill(Pid::from_raw(machine.pid.try_into()?), None).context("its VMM runs")?;

    host.create(python_function("echo"), &code::python(ECHO)?).await?;
    host.answer("echo", &json!(1)).await?;
    host.stop().await?;
    Ok(())
}

/// How many ticks of a hundredth of a second of CPU time a process has used.
fn cpu_ticks(pid: Pid) -> anyhow::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // utime and stime, proc_pid_stat(5); the second field may hold spaces.
    let after_name = stat.rsplit_once(") ").context("a name")?.1;
    let fields: Vec<&str> = after_name.split(' ').collect();
    Ok(fields[11].parse::<u64>()? + fields[12].parse::<u64>()?)
}

/// An agent that has no descriptors left serves who is connected, at little cost, and others once it has some again.
#[tokio::test]
async fn no_descriptors_left() -> anyhow::Result<()> {
    let host = Host::start(Options {
        warming: 0,
        settings: Vec::new(),
    })
    .await?;
    let pid = host.pid()?;
    let open = || anyhow::Ok(std::fs::read_dir(format!("/proc/{pid}/fd"))?.count());
    let limit = open()? + 8;
    let prlimit = Command::new("prlimit")
        .args([format!("--pid={pid}"), format!("--nofile={limit}:")])
        .status()?;
    assert!(prlimit.success(), "prlimit (Debian package util-linux)");
    let socket = host.folder().join("stokerd.sock");
    let mut callers = Vec::new();
    for _ in 0..2 * limit {
        callers.push(tokio::net::UnixStream::connect(&socket).await?);
    }
    eventually("the agent to have no descriptors left", async || {
        Ok((open()? >= limit).then_some(()))
    })
    .await?;
    let (begun, before) = (Instant::now(), cpu_ticks(pid)?);
    while begun.elapsed() < Duration::from_secs(3) {
        host.list_machines(false).await?;
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let (took, used) = (begun.elapsed(), cpu_ticks(pid)? - before);
    let share = f64::from(u32::try_from(used)?) / 100.0 / took.as_secs_f64();
    assert!(share < 0.5, "it took {share:.2} of a CPU");
    drop(callers);
    let channel = host::channel(&socket).await?;
    MachinesClient::new(channel)
        .list_machines(v1::ListMachinesRequest::default())
        .await?;
    host.stop().await?;
    Ok(())
}
