//! Block devices for a guest: loop devices with a file on a disk.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A block device that a guest is given.
pub(crate) struct Drive {
    device: PathBuf,
    file: Option<tempfile::NamedTempFile>,
}

impl Drive {
    /// Of so many MiB.
    pub(crate) fn make(mib: u32) -> Self {
        // In the lab that is on a disk, and most else in memory.
        let file = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
        file.as_file().set_len(u64::from(mib) << 20).unwrap();
        // Else what is written would be cached twice, and charged to the container each time.
        let device = attach(&["--direct-io=on"], file.path());
        Self {
            device,
            file: Some(file),
        }
    }

    /// Of a file, to be read.
    pub(crate) fn of(file: &Path) -> Self {
        Self {
            device: attach(&["--read-only"], file),
            file: None,
        }
    }

    pub(crate) fn device(&self) -> &Path {
        &self.device
    }

    /// What it takes of its disk.
    pub(crate) fn bytes_taken(&self) -> u64 {
        self.file.as_ref().unwrap().as_file().metadata().unwrap().blocks() * 512
    }

    pub(crate) fn grow(&self, mib: u32) {
        let file = self.file.as_ref().unwrap().as_file();
        file.set_len(u64::from(mib) << 20).unwrap();
        losetup("--set-capacity", &self.device);
    }
}

impl Drop for Drive {
    fn drop(&mut self) {
        losetup("--detach", &self.device);
    }
}

fn attach(how: &[&str], file: &Path) -> PathBuf {
    for module in ["loop", "ext4", "quota_v2"] {
        // Built in, in some kernels.
        let _ = Command::new("modprobe").arg(module).status();
    }
    let made = Command::new("losetup")
        .args(["--find", "--show"])
        .args(how)
        .arg(file)
        .output();
    let made = made.unwrap();
    assert!(made.status.success(), "no loop device: {made:?}");
    String::from_utf8(made.stdout).unwrap().trim().into()
}

fn losetup(how: &str, device: &Path) {
    let done = Command::new("losetup").arg(how).arg(device).status().unwrap();
    assert!(done.success(), "losetup {how}");
}
