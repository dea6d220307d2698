//! Small and read-only disks, for tests of what a program does on them. They take root.

use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// Does something on a thread of its own with mounts of its own: what is mounted there nobody else sees, and it is gone at
/// the end. Threads that it starts see it too.
///
/// # Panics
/// Where mounts are not allowed, or the work panics.
pub fn with_own_mounts<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let apart = || {
        let unshared = unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS);
        assert!(
            unshared.is_ok(),
            "this test mounts something, which takes root: {unshared:?}"
        );
        change_mount(None, Path::new("/"), MsFlags::MS_REC | MsFlags::MS_PRIVATE, None);
        work()
    };
    match std::thread::scope(|scope| scope.spawn(apart).join()) {
        Ok(done) => done,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// Mounts an empty disk of so many bytes on a folder.
///
/// # Panics
/// Where it can't be.
pub fn mount_small(folder: &Path, bytes: u64) {
    change_mount(Some("tmpfs"), folder, MsFlags::empty(), Some(&format!("size={bytes}")));
}

/// Makes a folder read-only, with all that is in it.
///
/// # Panics
/// Where it can't be.
pub fn mount_read_only(folder: &Path) {
    let bound = mount(Some(folder), folder, None::<&str>, MsFlags::MS_BIND, None::<&str>);
    assert!(bound.is_ok(), "{}: {bound:?}", folder.display());
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    change_mount(None, folder, read_only, None);
}

/// Writes to a file until the disk is full.
///
/// # Panics
/// Where it fails for another reason.
pub fn fill(file: &Path) {
    let written = std::fs::File::create(file).and_then(|mut file| std::io::copy(&mut std::io::repeat(7), &mut file));
    let full = |error: &std::io::Error| error.kind() == std::io::ErrorKind::StorageFull;
    assert!(written.as_ref().is_err_and(full), "{written:?}");
}

/// Removes what [`fill`] wrote. A process that is being started elsewhere may still have the file: its blocks go all the same.
///
/// # Panics
/// Where it can't be.
pub fn free(file: &Path) {
    let freed = std::fs::File::create(file).and_then(|_| std::fs::remove_file(file));
    assert!(freed.is_ok(), "{}: {freed:?}", file.display());
}

/// Mounts a file system of this kind on a folder.
pub(crate) fn mount_kind(kind: &str, folder: &Path) {
    change_mount(Some(kind), folder, MsFlags::empty(), None);
}

fn change_mount(kind: Option<&str>, folder: &Path, flags: MsFlags, options: Option<&str>) {
    let mounted = mount(kind, folder, kind, flags, options);
    assert!(mounted.is_ok(), "{}: {mounted:?}", folder.display());
}
