//! `stoker-init`: PID 1 of every guest.
//!
//! ```text
//!   boot ──► connection ──► service ──┬─► scratch      the drive that all is written to
//!                                     ├─► code         zips, unpacked once
//!                                     └─► container    launch, limits, life and end of each
//!                                           ├─ budget        what may be spent on it, and was
//!                                           ├─ runtime_api   what the function speaks to
//!                                           ├─ credits       what it may spend of its machine's
//!                                           ├─ logs          what it writes
//!                                           └─ telemetry     what it uses
//! ```
//!
//! As PID 1 it brings the machine up, runs on the CPUs that it is plugged (`cpus`), serves the agent over vsock and powers the
//! machine off. Two more forms:
//!
//! * `stoker-init serve --socket PATH --image DIR [--scratch DEVICE]` does the same for containers without being PID 1 and dials
//!   a Unix socket: to work on it without a virtual machine. Needs root and cgroup v2 at `/sys/fs/cgroup`. All that is on the
//!   device is lost; without one code and `/tmp` are in memory.
//! * `stoker-init launch` is how it starts itself to make a container.

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

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use nix::mount::{MntFlags, umount2};
use tokio::signal::unix::{SignalKind, signal};

use code::CodeStore;
use connection::Agent;
use container::{Containers, Places};
use reaper::Reaper;
use scratch::Scratch;
use service::Service;
use telemetry::Telemetry;

/// Where containers' cgroups are.
const CGROUPS: &str = "/sys/fs/cgroup/containers";
/// The folder of the run folder where the scratch drive is mounted.
const SCRATCH: &str = "scratch";
const USAGE: &str = "usage: stoker-init serve --socket PATH --image DIR [--scratch DEVICE]";

/// What this process is to do.
#[derive(Debug, PartialEq, Eq)]
enum Role {
    Init,
    Launch,
    Serve {
        socket: PathBuf,
        image: PathBuf,
        scratch: Option<PathBuf>,
    },
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match role(std::process::id() == 1, &arguments) {
        Some(Role::Init) => init(),
        Some(Role::Launch) => {
            container::launch::run();
            return ExitCode::SUCCESS;
        }
        Some(Role::Serve { socket, image, scratch }) => develop(socket, image, scratch),
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
        ["serve", "--socket", socket, "--image", image, rest @ ..] => Some(Role::Serve {
            socket: socket.into(),
            image: image.into(),
            scratch: match rest {
                [] => None,
                ["--scratch", device] => Some(device.into()),
                _ => return None,
            },
        }),
        _ => None,
    }
}

/// A machine from its kernel's hand-over to its end. Never returns as PID 1: that would be a kernel panic.
fn init() -> anyhow::Result<()> {
    log_to_console();
    let outcome = boot::boot().context("cannot bring the machine up").and_then(|image| {
        let scratch = Some(boot::SCRATCH_DRIVE.into());
        run(Agent::Vsock, image, scratch, Path::new("/run/stoker"))
    });
    if let Err(error) = &outcome {
        eprintln!("stoker-init: {error:#}; powering off");
    }
    let refused = boot::power::off();
    Err(anyhow::anyhow!("the kernel refuses to power off: {refused}"))
}

/// Everything but the machine.
fn develop(socket: PathBuf, image: PathBuf, scratch: Option<PathBuf>) -> anyhow::Result<()> {
    log_to_console();
    nix::sys::prctl::set_child_subreaper(true).context("cannot become the reaper of orphans")?;
    let image = image
        .canonicalize()
        .with_context(|| format!("there is no image {}", image.display()))?;
    let run_folder = socket.with_extension("d");
    let with_drive = scratch.is_some();
    let outcome = run(Agent::Socket(socket), image, scratch, &run_folder);
    if with_drive {
        // It is there where the drive could be used.
        let _ = umount2(&run_folder.join(SCRATCH), MntFlags::MNT_DETACH);
    }
    outcome
}

fn run(agent: Agent, image: PathBuf, scratch: Option<PathBuf>, folder: &Path) -> anyhow::Result<()> {
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
            let scratch = match scratch {
                Some(device) => Scratch::on(device, folder.join(SCRATCH), image.clone(), reaper.clone()),
                None => Scratch::none("no scratch drive was named"),
            };
            let places = Places::make(image, folder, Path::new(CGROUPS))?;
            let code = CodeStore::new(folder.join("code"), scratch).context("cannot keep code")?;
            // The console's last line of a good start, for whoever reads it: `cargo xtask bench` does.
            eprintln!("stoker-init: ready");
            // Telemetry loads while the agent is dialled and the runtime is loaded.
            let containers = Containers::new(places, reaper, Telemetry::start());
            let service = Service::new(containers.clone(), code);
            tokio::select! {
                () = budget::uncounted(connection::serve(&agent, &service)) => {}
                told = told_to_end() => told.context("cannot listen to signals")?,
            }
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
        assert_eq!(
            role(false, &["serve", "--socket", "/s", "--image", "/i"]),
            Some(Role::Serve {
                socket: "/s".into(),
                image: "/i".into(),
                scratch: None
            })
        );
        assert_eq!(
            role(false, &["serve", "--socket", "/s", "--image", "/i", "--scratch", "/d"]),
            Some(Role::Serve {
                socket: "/s".into(),
                image: "/i".into(),
                scratch: Some("/d".into())
            })
        );
        assert_eq!(role(false, &["serve", "--socket", "/s", "--image", "/i", "/d"]), None);
        assert_eq!(role(false, &[]), None);
        assert_eq!(role(false, &["serve"]), None);
    }
}
