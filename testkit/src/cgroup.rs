//! A cgroup v2 for tests, whatever the host has.

use std::path::Path;

use nix::mount::{MntFlags, umount2};

use crate::disk::{mount_kind, with_own_mounts};

/// Does something where a cgroup v2 is mounted, on a thread with mounts of its own: so that it works under cgroup v1 too, where it
/// has no controllers, and leaves no mount. Skipped, which is said, where this is not root.
///
/// # Panics
/// Where it can't be mounted, or the work panics.
pub fn with_cgroups(work: impl FnOnce(&Path) + Send) {
    if !nix::unistd::geteuid().is_root() {
        return eprintln!("skipped: only root may mount a cgroup v2");
    }
    with_own_mounts(|| {
        let folder = tempfile::tempdir();
        let Ok(folder) = folder else {
            unreachable!("a temporary folder is made: {folder:?}");
        };
        mount_kind("cgroup2", folder.path());
        work(folder.path());
        // A child of another test, between its fork and its exec, holds open whatever was open here: detached, the mount
        // goes with that.
        let unmounted = umount2(folder.path(), MntFlags::MNT_DETACH);
        assert!(unmounted.is_ok(), "{unmounted:?}");
    });
}
