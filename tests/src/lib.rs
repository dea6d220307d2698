//! What the end-to-end tests share: a whole host (agent and controller as processes, with real microVMs) and functions
//! to put on it.
//!
//! The tests speak to the agent through its public API alone, and look at the host only to see that nothing is left
//! behind. `cargo xtask test` tells them where things are, in the variables [`BIN_DIR`] and [`CACHE`].

pub mod code;
pub mod cpu;
pub mod debian;
pub mod dice;
pub mod host;
pub mod metrics;
pub mod outlive;
pub mod runtime_api;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, bail};
pub use stoker_testkit::agent::PATIENCE;
use stoker_testkit::agent::TICK;
use stoker_testkit::{BIN_DIR, CACHE, PACKAGES};

/// The account that tests use where it does not matter.
pub const ACCOUNT: &str = "accounts/acme";

/// A file in the cache folder.
///
/// # Errors
///
/// Where `cargo xtask test` did not say where the folder is.
pub fn cache(path: &str) -> anyhow::Result<PathBuf> {
    Ok(named(CACHE)?.join(path))
}

/// One of the project's binaries.
///
/// # Errors
///
/// Where `cargo xtask test` did not say where they are.
pub fn binary(name: &str) -> anyhow::Result<PathBuf> {
    Ok(named(BIN_DIR)?.join(name))
}

/// The folder of our Debian packages: both in `1`, and the programs' of a later version in `2`.
///
/// # Errors
///
/// Where `cargo xtask test` did not say where they are.
pub fn packages() -> anyhow::Result<PathBuf> {
    named(PACKAGES)
}

/// The folder that a variable of the environment names.
fn named(variable: &str) -> anyhow::Result<PathBuf> {
    let folder = std::env::var_os(variable);
    Ok(folder
        .with_context(|| format!("{variable} is not set: run the tests by `cargo xtask test`"))?
        .into())
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
        tokio::time::sleep(TICK).await;
    }
}
