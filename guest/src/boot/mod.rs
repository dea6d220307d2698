//! What PID 1 does before it serves, and at the very end.

mod console;
mod modules;
mod mounts;
pub(crate) mod power;
pub(crate) mod process;

use std::path::PathBuf;

pub(crate) use mounts::delegate_controllers;

/// Why a machine could not come up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    #[error("cannot mount {what} on {on}: {source}")]
    Mount {
        what: &'static str,
        on: PathBuf,
        source: nix::Error,
    },
    #[error("cannot make {path}: {source}")]
    Directory { path: PathBuf, source: std::io::Error },
    #[error("cannot read the list of kernel modules: {0}")]
    ModuleList(std::io::Error),
    #[error("cannot load the kernel module {path}: {source}")]
    Module { path: String, source: std::io::Error },
    #[error("{device} did not appear within {seconds} s: does the machine have a drive, and the kernel its driver?")]
    NoDrive { device: &'static str, seconds: u64 },
    #[error("cannot switch the root: {0}")]
    Root(nix::Error),
    #[error("cannot enable the cgroup controllers of containers: {0}")]
    Controllers(#[from] stoker_linux::CgroupError),
}

/// Brings the machine from the kernel's hand-over to where containers can be made. Returns where the image is mounted.
pub(crate) fn boot() -> Result<PathBuf, BootError> {
    mounts::root_that_can_be_pivoted()?;
    mounts::kernel_filesystems()?;
    console::take();
    power::off_on_panic();
    modules::load("/modules.load".as_ref())?;
    mounts::harden();
    mounts::image()
}
