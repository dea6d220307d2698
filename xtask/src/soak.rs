//! `cargo xtask soak`: a host kept busy for an hour, and the same decided again of all that it recorded, as the example `soak` of
//! the end-to-end tests does it.

use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Args;
use stoker_testkit::{BIN_DIR, CACHE};

use crate::{
    build,
    cache::Cache,
    host::{self, HostCommand},
    lab,
};

/// What the start, the end and the replay may take beside the time that the host is kept busy.
const BESIDE: Duration = Duration::from_secs(900);

/// What `cargo xtask soak` was asked.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// How long the host is kept busy.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=1440))]
    minutes: u32,
}

/// Fails where the lab dies: that it does not is a part of what is shown.
pub(crate) fn run(cache: &Cache, options: &Options) -> Result<()> {
    let minutes = options.minutes;
    let binaries = build::for_examples(cache, build::Profile::Dist)?;
    // Kept, so that a recording that is decided otherwise can be looked into.
    let out = cache.path("soak");
    println!("Keeping a host busy for {minutes} minutes.");
    let code = host::run_in_host(
        cache,
        &HostCommand {
            command: vec![binaries.join("examples/soak").into(), minutes.to_string().into()],
            env: vec![(BIN_DIR.into(), binaries.into()), (CACHE.into(), cache.root().into())],
            out,
            timeout: Duration::from_secs(u64::from(minutes) * 60) + BESIDE,
            kernel: lab::Kernel::Usual,
            labs: 1,
        },
    )?;
    ensure!(code == 0, "the host was not kept busy to the end (exit code {code})");
    Ok(())
}
