//! The agent as a service manager and a container runtime start it: what it tells the one, and what it makes of the cgroup
//! namespace of the other.

#![allow(clippy::expect_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;

use anyhow::{Context as _, bail};
use nix::sys::signal::{Signal, kill};
use serde_json::json;
use stoker_linux::Cgroup;
use stoker_proto::v1::machines_client::MachinesClient;
use stoker_proto::v1::{self, machine::State};
use stoker_testkit::agent::{PATIENCE, Processes, Setting};
use stoker_tests::host::channel;
use stoker_tests::{binary, cache, eventually};
use tempfile::TempDir;
use tokio::net::UnixDatagram;
use tokio::sync::mpsc;

/// Programs of which `stokerd` is started as by systemd, in a cgroup with the name of its folder, which is the topmost of a
/// namespace of its own: as in a container.
fn in_container(notify: &Path) -> anyhow::Result<TempDir> {
    let programs = TempDir::new()?;
    for name in ["stoker-vmm", "stoker-controller"] {
        symlink(binary(name)?, programs.path().join(name))?;
    }
    let mount = Cgroup::mount()?;
    let root = Cgroup::at(mount.clone());
    for controller in ["cpu", "memory", "pids"] {
        root.enable(controller)?;
    }
    // Called with `--config FOLDER/stokerd.toml`.
    let script = format!(
        "#!/bin/sh -e\n\
         container={mount}/$(basename $(dirname $2))\n\
         mkdir $container\n\
         echo $$ > $container/cgroup.procs\n\
         export NOTIFY_SOCKET={notify} WATCHDOG_USEC=4000000\n\
         exec unshare --cgroup --mount sh -ec 'umount -l {mount}; mount -t cgroup2 none {mount}; exec {stokerd} \"$@\"' stokerd \"$@\"\n",
        mount = mount.display(),
        notify = notify.display(),
        stokerd = binary("stokerd")?.display(),
    );
    let program = programs.path().join("stokerd");
    fs::write(&program, script)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    Ok(programs)
}

/// What systemd would hear.
struct Service {
    said: mpsc::UnboundedReceiver<String>,
}

impl Service {
    fn listen(socket: &Path) -> anyhow::Result<Self> {
        let socket = UnixDatagram::bind(socket)?;
        let (to, said) = mpsc::unbounded_channel();
        // Read at once: the agent would wait otherwise.
        tokio::spawn(async move {
            let mut buffer = vec![0; 4096];
            while let Ok(bytes) = socket.recv(&mut buffer).await {
                let _ = to.send(String::from_utf8_lossy(&buffer[..bytes]).into_owned());
            }
        });
        Ok(Self { said })
    }

    /// All up to a message that has this in it.
    async fn hears(&mut self, wanted: &str) -> anyhow::Result<Vec<String>> {
        let mut all: Vec<String> = Vec::new();
        while !all.last().is_some_and(|last| last.contains(wanted)) {
            match tokio::time::timeout(PATIENCE, self.said.recv()).await {
                Ok(Some(said)) => all.push(said),
                _ => bail!("{wanted} was not heard, but {all:?}"),
            }
        }
        Ok(all)
    }
}

#[tokio::test]
async fn started_as_a_service_in_a_cgroup_namespace_of_its_own() -> anyhow::Result<()> {
    let folder = TempDir::new()?;
    let notify = folder.path().join("notify");
    let mut service = Service::listen(&notify)?;
    let programs = in_container(&notify)?;
    let settings: [Setting; 4] = [
        ("machines.boot_timeout", "60s".into()),
        ("machines.cgroup", "stoker".into()),
        ("pool.warming", json!({ "python3.11": 1 })),
        ("log.level", "info".into()),
    ];
    let mut agent = Processes::start(programs.path(), &cache("")?, &settings)?;
    let served = serves(&mut agent, &mut service).await;
    served.with_context(|| agent.log())
}

async fn serves(agent: &mut Processes, service: &mut Service) -> anyhow::Result<()> {
    service.hears("READY=1").await?;
    let machines = MachinesClient::new(channel(&agent.path("stokerd.sock")).await?);
    let machine = eventually("a machine to be warm", async || {
        let listed = machines
            .clone()
            .list_machines(v1::ListMachinesRequest::default())
            .await?;
        let mut machines = listed.into_inner().machines.into_iter();
        Ok(machines.find(|machine| machine.state() == State::Warming))
    })
    .await?;

    // It has moved out of the cgroup that it was started in, and its machines are bounded.
    let container = agent.cgroup().clone();
    assert!(container.processes()?.is_empty());
    let aside = Cgroup::at(container.path().join("stokerd-agent"));
    assert_eq!(aside.processes()?, [agent.pid()?.as_raw().unsigned_abs()]);
    let all = Cgroup::at(container.path().join("stoker/machines"));
    let bounded = Cgroup::at(all.path().join(machine.name.trim_start_matches("machines/")));
    assert_eq!(bounded.processes()?, [machine.pid]);
    let memory = bounded.number("memory.max").context("its memory is bounded")?;
    assert!(memory > 512 << 20 && memory < 1024 << 20, "{memory}");
    assert!(bounded.number("pids.max").is_some());
    let cpu = fs::read_to_string(bounded.path().join("cpu.max"))?;
    assert!(!cpu.starts_with("max"), "{cpu}");

    let alive = service.hears("WATCHDOG=1\nSTATUS=1 machines, 0 containers\n").await?;
    assert!(!alive.iter().any(|text| text.contains("RELOADING")), "{alive:?}");

    // What can be changed while it runs, and what can't.
    let file = agent.path("stokerd.toml");
    let good = fs::read_to_string(&file)?;
    let other = good
        .replace("log.level = \"info\"", "log.level = \"debug\"")
        .replace("machines.cgroup = \"stoker\"", "machines.cgroup = \"other\"");
    fs::write(&file, other)?;
    kill(agent.pid()?, Signal::SIGHUP)?;
    let reloading = service.hears("RELOADING=1").await?;
    let last = reloading.last().context("it was heard")?;
    assert!(last.contains("\nMONOTONIC_USEC="), "{last}");
    service.hears("READY=1").await?;
    let log = agent.log();
    assert!(
        log.contains("configuration reloaded") && log.contains("log.level"),
        "{log}"
    );
    assert!(log.contains("needs a restart: machines.cgroup"), "{log}");
    eventually("more to be logged", async || {
        machines
            .clone()
            .list_machines(v1::ListMachinesRequest::default())
            .await?;
        Ok(agent.log().contains("DEBUG").then_some(()))
    })
    .await?;
    fs::write(&file, "[limits]\nzip_mib = 0\n")?;
    kill(agent.pid()?, Signal::SIGHUP)?;
    service.hears("RELOADING=1").await?;
    service.hears("READY=1").await?;
    let log = agent.log();
    assert!(
        log.contains("nothing is reloaded") && log.contains("limits.zip_mib: 0"),
        "{log}"
    );

    kill(agent.pid()?, Signal::SIGINT)?;
    service.hears("STOPPING=1").await?;
    assert_eq!(agent.wait()?.code(), Some(0));
    assert!(all.children()?.is_empty());
    Ok(())
}
