//! tracefs, which the ledger's programs find a tracepoint in.

use std::path::Path;

use anyhow::{Context as _, Result};
use nix::mount::{MsFlags, mount};

/// Mounts tracefs where it is not, as a host that nothing has traced has it.
///
/// # Errors
/// Where it can't be mounted.
pub fn need_tracefs() -> Result<()> {
    let path = Path::new("/sys/kernel/tracing");
    if !path.join("events").is_dir() {
        mount(None::<&str>, path, Some("tracefs"), MsFlags::empty(), None::<&str>).context("mounting tracefs")?;
    }
    Ok(())
}
