//! The host's programs.

use std::{env, path::PathBuf};

use anyhow::{Context, Result};

use crate::{cache::Cache, process, setup, setup::tools};

/// Names the folder of the binaries to what runs in a host.
pub(crate) const BIN_DIR: &str = "STOKER_BIN_DIR";

/// How they are built.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Profile {
    /// Optimised, and soon built: for tests and the demo.
    Release,
    /// As they are given to users, which takes minutes: for benches.
    Dist,
}

// === impl Profile ===

impl Profile {
    /// Cargo's name for it, and for the folder.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Release => "release",
            Self::Dist => "dist",
        }
    }
}

/// Builds the VMM and the agent and returns the folder they are in.
pub(crate) fn programs(cache: &Cache, profile: Profile) -> Result<PathBuf> {
    setup::ensure(cache, &[&tools::BPF_LINKER])?;
    // Apart: built together, cargo would give the VMM the gRPC stack of the agent's copy of the protocols. And the VMM is
    // static: finding and binding libraries would be a fifth of the time from its start to its guest's.
    process::run(
        tools::cargo(cache)
            .args([
                "rustc",
                "--profile",
                profile.name(),
                "--package",
                "stoker-vmm",
                "--bin",
                "stoker-vmm",
            ])
            .args(["--", "-C", "target-feature=+crt-static"]),
    )?;
    process::run(tools::cargo(cache).args(["build", "--profile", profile.name()]).args([
        "--bins",
        "--package",
        "stoker-agent",
    ]))?;
    Ok(tools::target_dir(cache).join(profile.name()))
}

/// The folder that [`BIN_DIR`] names.
pub(crate) fn named() -> Result<PathBuf> {
    env::var_os(BIN_DIR)
        .map(PathBuf::from)
        .with_context(|| format!("{BIN_DIR} is not set"))
}
