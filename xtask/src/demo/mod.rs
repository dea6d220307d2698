//! `cargo xtask demo`: the main job, shown. Two real programs are deployed and run in real microVMs, a call outlives its agent,
//! a function gets what it turns out to need, a machine launched from an image grows and shrinks with what it has to do, and a machine
//! with credits runs ahead of busy ones.

mod bars;
mod credits;
pub(crate) mod functions;
mod launched;
mod outlive;
mod resized;
mod show;
mod table;

use std::{env, ffi::OsString, path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};
use clap::Args;
use stoker_testkit::BIN_DIR;

use crate::{
    build,
    cache::Cache,
    host::{self, HostCommand},
    image, lab,
    setup::{self, Step, left},
    web_image,
};

/// What the demo deploys and its input.
pub(crate) const FUNCTIONS: &[&Step] = &[
    &functions::THUMBNAIL,
    &functions::WORDCOUNT,
    &functions::PHOTO,
    &web_image::NGINX,
];

/// What the show alone takes, the lab's boot included, where the time that is left is estimated.
const SHOW: Duration = Duration::from_secs(150);

/// The demo's time in the lab, its boot included.
const LIMIT: Duration = Duration::from_secs(15 * 60);

/// What `cargo xtask demo` was asked.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Show it on this machine, which is the lab or can do what the lab can.
    #[arg(long, hide = true)]
    here: bool,
}

/// Makes all it needs and shows the main job.
pub(crate) fn run(cache: &Cache, options: &Options) -> Result<()> {
    if options.here {
        let out = env::var_os("STOKER_LAB_OUT").context("STOKER_LAB_OUT is not set")?;
        return show::run(cache, &build::named()?, &PathBuf::from(out));
    }
    build::expect(cache);
    left::expect("demo", SHOW);
    // In one go, so that all that is missing is said at once.
    let mut steps = image::STEPS.to_vec();
    steps.extend(host::steps(lab::Kernel::Usual));
    steps.extend(FUNCTIONS);
    setup::ensure(cache, &steps)?;
    image::everything(cache, build::Profile::Release)?;
    let binaries = build::programs(cache, build::Profile::Release)?;
    if left::begin("demo") {
        eprintln!("Showing it ... {}", left::words());
    }
    let out = cache.path("demo/out");
    let mut command = vec![OsString::from(env::current_exe().context("find xtask")?)];
    command.extend(["demo", "--here"].map(OsString::from));
    let code = host::run_in_host(
        cache,
        &HostCommand {
            command,
            env: vec![(BIN_DIR.into(), binaries.into())],
            out: out.clone(),
            timeout: LIMIT,
            kernel: lab::Kernel::Usual,
            labs: host::LABS,
        },
    )?;
    ensure!(code == 0, "the demo failed (exit code {code})");
    println!("The thumbnails are in {}.", out.display());
    println!("\n{}", show::NEXT);
    Ok(())
}
