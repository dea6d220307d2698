//! `cargo xtask`: every developer command of Stoker.
//!
//! | module | does |
//! |---|---|
//! | `setup` | makes what the other commands need, in the cache folder, step by step |
//! | `kernel`, `image` | the steps that make guest kernels, the guest image and the initramfs archives |
//! | `web_image` | the step that makes a container image to launch machines from |
//! | `lab` | boots the lab, a known host in QEMU, and runs a command in it |
//! | `probe`, `host` | finds out whether this machine can be a host itself, and runs a command natively or in the lab |
//! | `test` | all checks and tests |
//! | `demo` | the main job, shown |
//! | `bench` | what is claimed of speed and memory, measured |
//! | `soak` | a host kept busy, where nothing may go wrong |
//! | `dist` | the Debian packages |
//! | `build`, `agent` | the binaries as users run them; a running agent, driven by its command line |

mod agent;
mod bench;
mod build;
mod cache;
mod demo;
mod dist;
mod host;
mod image;
mod kernel;
mod lab;
mod probe;
mod process;
mod setup;
mod soak;
mod test;
mod web_image;

use std::{env, ffi::OsString, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

use crate::{cache::Cache, lab::Lab};

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    about = "Every developer command of Stoker"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make everything the other commands need (they call it themselves).
    Setup {
        /// Ask Debian for newer versions and rebuild what they change.
        #[arg(long)]
        update: bool,
    },
    /// Show the main job: real programs deployed and invoked in real microVMs.
    Demo(demo::Options),
    /// Measure what is claimed of speed and memory, beside a peer.
    Bench(bench::Options),
    /// Keep a host busy with machines that come and go, and fail at what should not happen in it.
    Soak(soak::Options),
    /// Check, lint and test everything, in the lab where this machine cannot run microVMs; or only what FILTER names.
    Test(test::Options),
    /// Run the listed test programs; what `test` runs in its host.
    #[command(hide = true)]
    TestsHere,
    /// Run a command in the lab: a known host with cgroup v2, eBPF and a real /dev/kvm, in QEMU.
    Lab(LabArgs),
    /// Build the guest kernels.
    Kernel,
    /// Build the guest image and the initramfs archives.
    Image,
    /// Make the Debian packages that users install.
    Dist(dist::Options),
    /// Say whether this machine can run microVMs itself, and why not.
    Probe,
}

#[derive(Args)]
struct LabArgs {
    /// CPUs of the lab.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: u32,
    /// Boot a kernel with sched_ext, Debian's latest, rather than one of the series that the guests run.
    #[arg(long)]
    sched_ext: bool,
    /// Memory of the lab in MiB; what is written to its file systems takes of it, but for /var/tmp.
    #[arg(long, default_value_t = 6144, value_parser = clap::value_parser!(u32).range(1024..))]
    memory: u32,
    /// Seconds after which a lab that has not ended is stopped (exit code 124).
    #[arg(long, default_value_t = 1800)]
    timeout: u64,
    /// Host folder to show as $STOKER_LAB_OUT; a temporary one otherwise.
    #[arg(long)]
    out: Option<PathBuf>,
    /// NAME=VALUE for the command's environment; may be repeated.
    #[arg(long = "env", value_name = "NAME=VALUE", value_parser = parse_env)]
    envs: Vec<(String, String)>,
    /// The command, run as root in the current folder.
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

fn parse_env(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("expected NAME=VALUE")?;
    if name.is_empty() {
        return Err("the name is empty".to_owned());
    }
    Ok((name.to_owned(), value.to_owned()))
}

/// Where Debian keeps programs that a plain `su` leaves out of the PATH, `depmod` and `chroot` among them.
const SYSTEM_PROGRAMS: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

fn main() -> ExitCode {
    let mut path = env::var("PATH").unwrap_or_default();
    for folder in SYSTEM_PROGRAMS {
        // With another PATH than cargo itself was called with, it would compile again what depends on the PATH.
        if !path.split(':').any(|known| known == folder) {
            path = format!("{path}:{folder}");
        }
    }
    // SAFETY: no other thread is there yet that could read the environment.
    unsafe { env::set_var("PATH", path) };
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    let cache = Cache::open()?;
    match cli.command {
        Command::Setup { update } => setup::everything(&cache, update)?,
        Command::Demo(options) => demo::run(&cache, &options)?,
        Command::Bench(options) => bench::run(&cache, &options)?,
        Command::Soak(options) => soak::run(&cache, &options)?,
        Command::Test(options) => return test::run(&cache, &options),
        Command::TestsHere => return test::run_here(),
        Command::Lab(args) => {
            let mut lab = Lab::new(args.command)
                .kernel(lab::Kernel::with_sched_ext(args.sched_ext))
                .cpus(args.cpus)
                .memory_mib(args.memory)
                .timeout(Duration::from_secs(args.timeout))
                .out(args.out);
            for (name, value) in args.envs {
                lab = lab.env(name, value);
            }
            return Ok(lab.run(&cache)?.into());
        }
        Command::Kernel => setup::ensure(&cache, &[&kernel::TUNED, &kernel::STOCK])?,
        Command::Image => image::everything(&cache, build::Profile::Release)?,
        Command::Dist(options) => dist::run(&cache, &options)?,
        Command::Probe => println!("{}", probe::probe()),
    }
    Ok(ExitCode::SUCCESS)
}
