//! Makes the file system of the drive.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use stoker_proto::scratch::{BLOCK, BYTES_AN_INODE};
use tokio::time::Instant;

use crate::blocking;
use crate::reaper::{Exit, Reaper};

/// How long the device may take to appear.
const DEVICE_TIMEOUT: Duration = Duration::from_secs(3);
/// In the image. It is run by the image's own loader and libraries, so that nothing needs to be mounted for it.
const MKE2FS: &str = "usr/sbin/mke2fs";
const LOADER: &str = "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2";
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";
/// All that is wanted of ext4, by name, whatever the image's `mke2fs.conf` says. No journal: nothing here outlives the
/// machine.
const FEATURES: &str = "none,dir_index,dir_nlink,extent,extra_isize,filetype,flex_bg,huge_file,large_file,metadata_csum,\
                        quota,resize_inode,sparse_super";
/// The largest that it can grow to, in blocks of 4 KiB: 128 GiB. It costs one block for each 8 GiB.
const MOST_BLOCKS: u64 = 32 << 20;
/// What is written has its place, and is counted, before the write is over: what the kernel would place later it may not refuse, so
/// that the metadata of scattered writes went beyond any limit. Limits count from the beginning, no write waits for the host's disk, and unused inodes need no zeroes: the drive has
/// nothing else where it was not written to.
const MOUNT_OPTIONS: &str = "usrquota,nodelalloc,nobarrier,noinit_itable,errors=remount-ro";

/// Why there is no file system.
#[derive(Debug, thiserror::Error)]
pub(super) enum FormatError {
    #[error("the machine has no scratch drive: {} did not appear within {} s", .0.display(), DEVICE_TIMEOUT.as_secs())]
    NoDevice(PathBuf),
    #[error("cannot run mke2fs: {0}")]
    Run(std::io::Error),
    #[error("mke2fs made no file system on {}, as the console says: {exit}", device.display())]
    Failed { device: PathBuf, exit: Exit },
    #[error("cannot mount {} as ext4 with quotas: {source}", device.display())]
    Mount { device: PathBuf, source: nix::Error },
}

/// Waits for the device.
pub(super) async fn appeared(device: &Path) -> Result<(), FormatError> {
    let deadline = Instant::now() + DEVICE_TIMEOUT;
    while !device.exists() {
        if Instant::now() >= deadline {
            return Err(FormatError::NoDevice(device.to_owned()));
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(())
}

/// Makes the file system, by `mke2fs` of the image.
pub(super) async fn format(device: &Path, image: &Path, reaper: &Reaper) -> Result<(), FormatError> {
    let (reaper, mut program) = (reaper.clone(), mke2fs(device, image));
    // A program has the precedence of the thread that starts it, and this one has none.
    let started = blocking::on_a_thread("mke2fs", move || reaper.spawn(&mut program)).await;
    let (_, exit) = started.flatten().map_err(FormatError::Run)?;
    match exit.await {
        Ok(Exit::Code(0)) => Ok(()),
        Ok(exit) => Err(FormatError::Failed {
            device: device.to_owned(),
            exit,
        }),
        Err(lost) => Err(FormatError::Run(std::io::Error::other(lost))),
    }
}

fn mke2fs(device: &Path, image: &Path) -> Command {
    let mut command = Command::new(image.join(LOADER));
    let extended =
        format!("quotatype=usrquota,lazy_itable_init=1,assume_storage_prezeroed=1,nodiscard,resize={MOST_BLOCKS}");
    command
        .arg("--library-path")
        .arg(image.join(LIBRARIES))
        .arg(image.join(MKE2FS))
        .args(["-q", "-F", "-m", "0", "-I", "256"])
        .args(["-b", &BLOCK.to_string(), "-i", &BYTES_AN_INODE.to_string()])
        .args(["-O", FEATURES, "-E", &extended])
        .arg(device)
        .env_clear()
        // One that says nothing.
        .env("MKE2FS_CONFIG", "/dev/null")
        .stdin(Stdio::null());
    command
}

/// Mounts it on the folder `on`.
pub(super) fn mount_on(on: &Path, device: &Path) -> Result<(), FormatError> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
    mount(Some(device), on, Some("ext4"), flags, Some(MOUNT_OPTIONS)).map_err(|source| FormatError::Mount {
        device: device.to_owned(),
        source,
    })
}
