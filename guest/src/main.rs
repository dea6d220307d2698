//! `stoker-init`: PID 1 of every guest.
//!
//! ```text
//!   boot ──► connection ──► service ──┬─► scratch      the drive that all is written to
//!                                     ├─► code         zips, unpacked once
//!                                     └─► container    launch, limits, life and end of each
//!                                           ├─ workload      the image that the machine was launched from, if it was
//!                                           ├─ budget        what may be spent on it, and was
//!                                           ├─ runtime_api   what the function speaks to
//!                                           ├─ credits       what it may spend of its machine's
//!                                           ├─ logs          what it writes
//!                                           └─ telemetry     what it uses
//! ```
//!
//! As PID 1 it brings the machine up, runs on the CPUs that it is plugged (`cpus`), serves the agent over vsock and powers the
//! machine off. Three more forms:
//!
//! * `stoker-init serve --socket PATH --image DIR [--scratch DEVICE] [--launched-from DEVICE]` does the same for containers
//!   without being PID 1 and dials a Unix socket: to work on it without a virtual machine. Needs root and cgroup v2 at
//!   `/sys/fs/cgroup`. All that is on the first device is lost; without one code and `/tmp` are in memory. The second has the
//!   image that the machine was launched from.
//! * `stoker-init launch` is how it starts itself to make a container, `stoker-init enter` to run another program in one.

mod blocking;
mod boot;
mod budget;
mod clock;
mod code;
mod connection;
mod container;
mod cpus;
mod credits;
mod invocations;
mod logs;
mod machine;
mod parts;
mod reaper;
mod runtime_api;
mod scratch;
mod service;
mod telemetry;
mod uevents;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use nix::mount::{MntFlags, umount2};
use tokio::signal::unix::{SignalKind, signal};

use code::CodeStore;
use connection::Agent;
use container::{Containers, LaunchedFrom, Places, Workload};
use reaper::Reaper;
use scratch::Scratch;
use service::Service;
use telemetry::Telemetry;

/// Where containers' cgroups are.
const CGROUPS: &str = "/sys/fs/cgroup/containers";
/// The folder of the run folder where the scratch drive is mounted.
const SCRATCH: &str = "scratch";
/// The folder of the run folder where the image is mounted that the machine was launched from.
const LAUNCHED_FROM: &str = "launched-from";
const USAGE: &str = "usage: stoker-init serve --socket PATH --image DIR [--scratch DEVICE] [--launched-from DEVICE]";

/// What this process is to do.
#[derive(Debug, PartialEq, Eq)]
enum Role {
    Init,
    Launch,
    Enter,
    Serve(Serve),
}

/// What it serves with, where it is no machine's PID 1.
#[derive(Debug, Default, PartialEq, Eq)]
struct Serve {
    socket: PathBuf,
    image: PathBuf,
    scratch: Option<PathBuf>,
    launched_from: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match role(std::process::id() == 1, &arguments) {
        Some(Role::Init) => init(),
        Some(Role::Launch) => {
            container::launch::run();
            return ExitCode::SUCCESS;
        }
        Some(Role::Enter) => {
            container::launch::enter();
            return ExitCode::SUCCESS;
        }
        Some(Role::Serve(serve)) => develop(serve),
        None => Err(anyhow::anyhow!(USAGE)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stoker-init: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// PID 1 takes no notice of its arguments: they are what the kernel made of its command line.
fn role(first: bool, arguments: &[String]) -> Option<Role> {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        _ if first => Some(Role::Init),
        ["launch"] => Some(Role::Launch),
        ["enter"] => Some(Role::Enter),
        ["serve", "--socket", socket, "--image", image, rest @ ..] => {
            let mut serve = Serve {
                socket: socket.into(),
                image: image.into(),
                ..Serve::default()
            };
            let (options, rest) = rest.as_chunks::<2>();
            for [option, device] in options {
                match *option {
                    "--scratch" => serve.scratch = Some(device.into()),
                    "--launched-from" => serve.launched_from = Some(device.into()),
                    _ => return None,
                }
            }
            rest.is_empty().then_some(Role::Serve(serve))
        }
        _ => None,
    }
}

/// A machine from its kernel's hand-over to its end. Never returns as PID 1: that would be a kernel panic.
fn init() -> anyhow::Result<()> {
    log_to_console();
    let outcome = boot::boot()
        .context("cannot bring the machine up")
        .and_then(|(image, drives)| run(Agent::Vsock, image, drives.into(), Path::new("/run/stoker")));
    if let Err(error) = &outcome {
        eprintln!("stoker-init: {error:#}; powering off");
    }
    let refused = boot::power::off();
    Err(anyhow::anyhow!("the kernel refuses to power off: {refused}"))
}

/// Everything but the machine.
fn develop(serve: Serve) -> anyhow::Result<()> {
    let Serve {
        socket,
        image,
        scratch,
        launched_from,
    } = serve;
    log_to_console();
    nix::sys::prctl::set_child_subreaper(true).context("cannot become the reaper of orphans")?;
    let image = image
        .canonicalize()
        .with_context(|| format!("there is no image {}", image.display()))?;
    let run_folder = socket.with_extension("d");
    let mounted = [
        scratch.as_ref().map(|_| SCRATCH),
        launched_from.as_ref().map(|_| LAUNCHED_FROM),
    ];
    let devices = Devices { scratch, launched_from };
    let outcome = run(Agent::Socket(socket), image, devices, &run_folder);
    for folder in mounted.into_iter().flatten() {
        // It is there where the drive could be used.
        let _ = umount2(&run_folder.join(folder), MntFlags::MNT_DETACH);
    }
    outcome
}

/// Drives beside that of the machine's own root file system.
struct Devices {
    scratch: Option<PathBuf>,
    launched_from: Option<PathBuf>,
}

impl From<boot::Drives> for Devices {
    fn from(drives: boot::Drives) -> Self {
        Self {
            scratch: drives.scratch,
            launched_from: drives.image,
        }
    }
}

fn run(agent: Agent, image: PathBuf, devices: Devices, folder: &Path) -> anyhow::Result<()> {
    boot::precedence::first();
    // One thread: there is little to do here, and what takes long (zips) has threads of its own.
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .on_thread_park(budget::before_rest)
        .build()
        .context("cannot start the runtime")?
        .block_on(async {
            let reaper = Reaper::default();
            budget::spawn_uncounted(reaper.clone().run());
            // A machine's are its own; those of the machine that it is developed on are not.
            if matches!(agent, Agent::Vsock) {
                budget::spawn_uncounted(cpus::run_on_all());
            }
            let has_drive = devices.scratch.is_some();
            let scratch = match devices.scratch {
                Some(device) => Scratch::on(device, folder.join(SCRATCH), image.clone(), reaper.clone()),
                None => Scratch::none("no scratch drive was named"),
            };
            let places = Places::make(image, folder, Path::new(CGROUPS))?;
            let code = CodeStore::new(folder.join("code"), scratch.clone()).context("cannot keep code")?;
            // The console's last line of a good start, for whoever reads it: `cargo xtask bench` does.
            eprintln!("stoker-init: ready");
            // Telemetry loads while the agent is dialled and the runtime is loaded.
            let containers = Containers::new(places, reaper, Telemetry::start());
            let launched_from = devices.launched_from.map(|device| LaunchedFrom {
                device,
                on: folder.join(LAUNCHED_FROM),
                scratch: has_drive.then_some(scratch),
            });
            let workload = Workload::new(containers.clone(), launched_from);
            let service = Service::new(containers.clone(), workload.clone(), code);
            tokio::select! {
                () = budget::uncounted(connection::serve(&agent, &service)) => {}
                told = told_to_end() => told.context("cannot listen to signals")?,
            }
            workload.kill().await;
            containers.stop_all().await;
            Ok(())
        })
}

/// Resolves at SIGTERM, or at SIGINT, which is what the kernel makes of Ctrl-Alt-Del for PID 1.
async fn told_to_end() -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

fn log_to_console() {
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::WARN)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .without_time()
        .init();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_its_role() {
        let role = |first, arguments: &[&str]| {
            let arguments: Vec<String> = arguments.iter().map(|&word| word.to_owned()).collect();
            super::role(first, &arguments)
        };
        assert_eq!(role(true, &["quiet", "launch"]), Some(Role::Init));
        assert_eq!(role(false, &["launch"]), Some(Role::Launch));
        assert_eq!(role(false, &["enter"]), Some(Role::Enter));
        let serve = |more: &[&str]| role(false, &[&["serve", "--socket", "/s", "--image", "/i"], more].concat());
        let with = |scratch: Option<&str>, launched_from: Option<&str>| {
            Some(Role::Serve(Serve {
                socket: "/s".into(),
                image: "/i".into(),
                scratch: scratch.map(Into::into),
                launched_from: launched_from.map(Into::into),
            }))
        };
        assert_eq!(serve(&[]), with(None, None));
        assert_eq!(serve(&["--scratch", "/d"]), with(Some("/d"), None));
        assert_eq!(
            serve(&["--launched-from", "/l", "--scratch", "/d"]),
            with(Some("/d"), Some("/l"))
        );
        for wrong in [
            &["/d"][..],
            &["--scratch"],
            &["--scratch", "/d", "x"],
            &["--other", "/d"],
        ] {
            assert_eq!(serve(wrong), None, "{wrong:?}");
        }
        assert_eq!(role(false, &[]), None);
        assert_eq!(role(false, &["serve"]), None);
    }
}
