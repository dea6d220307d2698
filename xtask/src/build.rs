//! The binaries as users run them: built for release.

use std::{env, path::PathBuf};

use anyhow::{Context, Result};

use crate::{cache::Cache, process, setup, setup::tools};

/// Names the folder of the binaries to what runs in a host.
pub(crate) const BIN_DIR: &str = "STOKER_BIN_DIR";

/// Builds the VMM and the agent and returns the folder they are in.
pub(crate) fn release(cache: &Cache) -> Result<PathBuf> {
    setup::ensure(cache, &[&tools::BPF_LINKER])?;
    // Apart: built together, cargo would give the VMM the gRPC stack of the agent's copy of the protocols. And the VMM is
    // static: finding and binding libraries would be a fifth of the time from its start to its guest's.
    process::run(
        tools::cargo(cache)
            .args(["rustc", "--release", "--package", "stoker-vmm", "--bin", "stoker-vmm"])
            .args(["--", "-C", "target-feature=+crt-static"]),
    )?;
    process::run(tools::cargo(cache).args(["build", "--release", "--bins", "--package", "stoker-agent"]))?;
    Ok(tools::target_dir(cache).join("release"))
}

/// The folder that [`BIN_DIR`] names.
pub(crate) fn named() -> Result<PathBuf> {
    env::var_os(BIN_DIR)
        .map(PathBuf::from)
        .with_context(|| format!("{BIN_DIR} is not set"))
}
