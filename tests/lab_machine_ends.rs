//! Machines that end unasked: whatever ended one, its cause is told, by the API and by `stoker machine list --ended`.

#![allow(clippy::expect_used, reason = "a test fails by panicking")]

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use stoker_proto::v1::{self, machine::State, machine_end::Reason};
use stoker_testkit::cpio::Archive;
use stoker_tests::code;
use stoker_tests::host::{Host, Options, python_function};
use stoker_tests::{binary, eventually};
use tempfile::TempDir;

/// The machine has ended for that reason; both the API and the command line say it in these words.
async fn told(host: &Host, machine: &v1::Machine, reason: Reason, words: &[&str]) -> anyhow::Result<()> {
    let end = machine.end.clone().context("an ended machine says why")?;
    assert_eq!(end.reason(), reason, "{end:?}");
    assert!(end.end_time.is_some(), "{end:?}");
    let mut stoker = Command::new(binary("stoker")?);
    stoker
        .arg("--socket")
        .arg(host.folder().join("stokerd.sock"))
        .args(["machine", "list", "--ended"])
        .stdin(Stdio::null());
    let listed = tokio::task::spawn_blocking(move || stoker.output()).await??;
    ensure!(listed.status.success(), "{listed:?}");
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    let id = machine.name.trim_start_matches("machines/");
    let line = listed.lines().find(|line| line.starts_with(id));
    let line = line.with_context(|| format!("{id} is not listed:\n{listed}"))?;
    for word in words.iter().chain([&&*reason.as_str_name().to_lowercase()]) {
        assert!(line.contains(word), "{word}: {line}");
    }
    for word in words {
        assert!(end.detail.contains(word), "{word}: {end:?}");
    }
    Ok(())
}

/// The machine of this name, once it has ended.
async fn ended(host: &Host, name: &str) -> anyhow::Result<v1::Machine> {
    eventually("the end to be told", async || {
        let request = v1::GetMachineRequest { name: name.to_owned() };
        let machine = host.machines().get_machine(request).await?.into_inner();
        Ok((machine.state() == State::Ended).then_some(machine))
    })
    .await
}

/// A host and the machine that is warm in it.
async fn warm() -> anyhow::Result<(Host, v1::Machine)> {
    let host = Host::start(Options::warming(1)).await?;
    let machine = eventually("a warm machine", async || {
        let machines = host.list_machines(false).await?;
        Ok(machines.into_iter().find(|machine| machine.state() == State::Warming))
    })
    .await?;
    Ok((host, machine))
}

/// Boots a host whose guests come up from `archive` and returns how the first of them ended.
async fn boots_badly(archive: Vec<u8>) -> anyhow::Result<(Host, v1::Machine)> {
    let folder = TempDir::new()?;
    let file: PathBuf = folder.path().join("initramfs.cpio");
    std::fs::write(&file, archive)?;
    let settings = vec![
        ("machines.initramfs", file.display().to_string().into()),
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
    // Its end is told first, so that an agent that dies between tells it all the same.
    eventually("its files and its cgroup to be gone", async || {
        let cgroups = host.machine_cgroups()?;
        let gone = cgroups.iter().all(|cgroup| !cgroup.path().ends_with(&id));
        Ok((gone && !host.folder().join("run").join(&id).exists()).then_some(()))
    })
    .await?;
    Ok((host, ended))
}

#[tokio::test]
async fn guest_that_panics_at_boot() -> anyhow::Result<()> {
    let (host, machine) = boots_badly(Archive::default().finish()).await?;
    told(&host, &machine, Reason::GuestPanic, &["Kernel panic - not syncing"]).await?;
    let end = machine.end.context("an ended machine says why")?;
    assert!(end.console_tail.contains("Kernel panic"), "{end:?}");
    host.stop().await?;
    Ok(())
}

#[tokio::test]
async fn guest_that_hangs_at_boot() -> anyhow::Result<()> {
    let mut archive = Archive::default();
    archive.file("init", 0o755, &code::sleeper());
    let (host, machine) = boots_badly(archive.finish()).await?;
    told(&host, &machine, Reason::BootTimedOut, &["had not answered 15s"]).await?;
    host.stop().await?;
    Ok(())
}

#[tokio::test]
async fn guest_that_powers_itself_off() -> anyhow::Result<()> {
    let mut archive = Archive::default();
    archive.file("init", 0o755, &code::power_off());
    let (host, machine) = boots_badly(archive.finish()).await?;
    told(&host, &machine, Reason::GuestOff, &["powered itself off"]).await?;
    host.stop().await?;
    Ok(())
}

/// A warm machine, of which nobody waits for anything, has used what its cgroup may have.
#[tokio::test]
async fn vmm_without_memory() -> anyhow::Result<()> {
    let (host, machine) = warm().await?;
    let id = machine.name.trim_start_matches("machines/");
    let cgroups = host.machine_cgroups()?;
    let cgroup = cgroups.iter().find(|cgroup| cgroup.path().ends_with(id));
    cgroup.context("its cgroup")?.write("memory.max", "1048576")?;
    let machine = ended(&host, &machine.name).await?;
    told(&host, &machine, Reason::OutOfMemory, &["its cgroup may have", "1 MiB"]).await?;
    host.stop().await?;
    Ok(())
}

/// Somebody else ends the VMM of a warm machine, as it lets itself be.
#[tokio::test]
async fn vmm_that_is_asked_to_end() -> anyhow::Result<()> {
    let (host, machine) = warm().await?;
    kill(Pid::from_raw(machine.pid.try_into()?), Signal::SIGTERM)?;
    let machine = ended(&host, &machine.name).await?;
    told(&host, &machine, Reason::Killed, &["signal 15", "this agent did not"]).await?;
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
    let ended = ended(&host, &machine).await?;
    told(&host, &ended, Reason::Killed, &["9 (SIGKILL)", "neither this agent"]).await?;
    host.answer("sleeps", &json!(0)).await?;
    host.stop().await?;
    Ok(())
}
