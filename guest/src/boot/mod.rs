//! What PID 1 does before it serves, and at the very end.

mod console;
mod drives;
mod modules;
mod mounts;
pub(crate) mod power;
pub(crate) mod precedence;

use std::path::{Path, PathBuf};

use nix::sys::resource::{Resource, setrlimit};
use stoker_proto::limits;

pub(crate) use drives::Drives;
use drives::DrivesError;
pub(crate) use mounts::{delegate_controllers, mount_image};

/// The drive that has the image.
const IMAGE_DRIVE: &str = "/dev/vda";
/// Where it is mounted.
const IMAGE: &str = "/image";
/// Descriptors that a container can make PID 1 hold: its connections to the Runtime API, pipes and sockets.
const DESCRIPTORS_A_CONTAINER: u64 = 64;

/// Why a machine could not come up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    #[error("cannot mount {what} on {on}: {source}")]
    Mount {
        what: String,
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
    NoDrive { device: String, seconds: u64 },
    #[error("cannot read the kernel's command line: {0}")]
    CommandLine(std::io::Error),
    #[error(transparent)]
    Drives(#[from] DrivesError),
    #[error("cannot raise the limit on open files: {0}")]
    Descriptors(nix::Error),
    #[error("cannot switch the root: {0}")]
    Root(nix::Error),
    #[error("cannot enable the cgroup controllers of containers: {0}")]
    Controllers(#[from] stoker_linux::CgroupError),
}

/// Brings the machine from the kernel's hand-over to where containers can be made. Returns where the image is mounted, and what
/// other drives there are.
pub(crate) fn boot() -> Result<(PathBuf, Drives), BootError> {
    mounts::root_that_can_be_pivoted()?;
    mounts::kernel_filesystems()?;
    console::take();
    power::off_on_panic();
    modules::load("/modules.load".as_ref())?;
    mounts::harden();
    let descriptors = DESCRIPTORS_A_CONTAINER * limits::CONTAINERS as u64;
    setrlimit(Resource::RLIMIT_NOFILE, descriptors, descriptors).map_err(BootError::Descriptors)?;
    // The kernel bounds its length (`COMMAND_LINE_SIZE`).
    let command_line = std::fs::read_to_string("/proc/cmdline").map_err(BootError::CommandLine)?;
    let drives = Drives::named(&command_line)?;
    let image = Path::new(IMAGE);
    mount_image(Path::new(IMAGE_DRIVE), image)?;
    Ok((image.to_owned(), drives))
}
