//! What can be wrong with a host: files that are missing or cut short, addresses in use, no descriptors left.

#![allow(clippy::expect_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use serde_json::json;
use stoker_proto::v1::machines_client::MachinesClient;
use stoker_proto::v1::{self, machine::State};
use stoker_testkit::agent::Setting;
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
    let host = Host::start(Options::warming(1)).await?;
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
