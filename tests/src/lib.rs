//! What the end-to-end tests share: a whole host (agent and controller as processes, with real microVMs) and functions
//! to put on it.
//!
//! The tests speak to the agent through its public API alone, and look at the host only to see that nothing is left
//! behind. `cargo xtask test` tells them where things are: `STOKER_BIN_DIR` (the binaries) and `STOKER_CACHE` (kernels,
//! images and the demo's functions).

pub mod code;
pub mod host;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

/// How long a condition may take to come true. Generous: the lab emulates its processors, and others use the machine.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The account that tests use where it does not matter.
pub const ACCOUNT: &str = "accounts/acme";

/// A file in the cache folder.
///
/// # Errors
///
/// Where `cargo xtask test` did not say where the folder is.
pub fn cache(path: &str) -> anyhow::Result<PathBuf> {
    let cache =
        std::env::var_os("STOKER_CACHE").context("STOKER_CACHE is not set: run the tests by `cargo xtask test`")?;
    Ok(PathBuf::from(cache).join(path))
}

/// One of the project's binaries.
///
/// # Errors
///
/// Where `cargo xtask test` did not say where they are.
pub fn binary(name: &str) -> anyhow::Result<PathBuf> {
    let folder =
        std::env::var_os("STOKER_BIN_DIR").context("STOKER_BIN_DIR is not set: run the tests by `cargo xtask test`")?;
    Ok(PathBuf::from(folder).join(name))
}

/// Asks until there is an answer. The pause between two questions only spares the processor.
///
/// # Errors
///
/// The question's own error, or that [`PATIENCE`] ended before there was an answer.
pub async fn eventually<T>(
    what: &str,
    mut question: impl AsyncFnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let start = Instant::now();
    loop {
        if let Some(answer) = question().await? {
            return Ok(answer);
        }
        if start.elapsed() > PATIENCE {
            bail!("waited {PATIENCE:?} for {what}");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
