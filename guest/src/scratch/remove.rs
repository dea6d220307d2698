//! Removal of folders by a thread of its own, with all that a container left in them. The drive is told what is free when nothing
//! waits: what is free takes nothing of the host's disk and memory then.
//!
//! A folder may be as deep as it has files. So nothing here goes down into one: what a folder has of folders that are not
//! empty is moved up, beside it, and comes next. That takes two descriptors and no stack, however deep it was. No link
//! is followed.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, open, openat, renameat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::Contents;
use crate::boot::precedence;

/// Free parts that are smaller stay as they are, in bytes.
const LEAST_DISCARDED: u64 = 64 << 10;

mod ioctl {
    /// `struct fstrim_range` of linux/fs.h, in bytes.
    #[repr(C)]
    pub(super) struct Range {
        pub(super) start: u64,
        pub(super) length: u64,
        pub(super) least: u64,
    }

    // FITRIM of linux/fs.h.
    nix::ioctl_readwrite!(trim, b'X', 121, Range);
}

/// The thread that removes. Clones are the same; it ends with the last.
#[derive(Clone)]
pub(super) struct Remover(Sender<Contents>);

/// Where things go to be removed.
struct Bin {
    folder: OwnedFd,
    /// How many have been moved here: their names.
    moved: u64,
}

// === impl Remover ===

impl Remover {
    /// `bin`: an empty folder on the same file system as all that is to be removed.
    pub(super) fn start(bin: &Path) -> std::io::Result<Self> {
        let mut bin = Bin::open(bin)?;
        let (sender, doomed) = channel();
        std::thread::Builder::new().name("remove".to_owned()).spawn(move || {
            // A container may have left millions of files.
            precedence::low();
            bin.empty(doomed);
        })?;
        Ok(Self(sender))
    }

    /// Has it removed, by and by.
    pub(super) fn remove(&self, contents: Contents) {
        // Without the thread nothing is removed.
        if let Err(unsent) = self.0.send(contents) {
            unsent.0.stays();
        }
    }
}

// === impl Bin ===

impl Bin {
    fn open(path: &Path) -> nix::Result<Self> {
        let folder = open(
            path,
            OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC,
            Mode::empty(),
        )?;
        Ok(Self { folder, moved: 0 })
    }

    /// Removes what comes, for as long as anything may.
    fn empty(&mut self, doomed: Receiver<Contents>) {
        while let Ok(first) = doomed.recv() {
            for contents in std::iter::once(first).chain(doomed.try_iter()) {
                match self.remove(&contents.path) {
                    Ok(()) => contents.gone(),
                    Err(errno) => {
                        tracing::error!("cannot remove {}: {errno}", contents.path.display());
                        contents.stays();
                    }
                }
            }
            // Not every drive takes it.
            let _ = self.discard_free();
        }
    }

    /// Discards what is free on the file system and was not discarded before.
    fn discard_free(&self) -> nix::Result<()> {
        let mut all = ioctl::Range {
            start: 0,
            length: u64::MAX,
            least: LEAST_DISCARDED,
        };
        // SAFETY: the call reads and writes a `struct fstrim_range`, which `Range` is.
        unsafe { ioctl::trim(self.folder.as_raw_fd(), &mut all) }.map(drop)
    }

    /// Removes a folder and all in it. One that is not there is removed already.
    fn remove(&mut self, path: &Path) -> nix::Result<()> {
        let path = CString::new(path.as_os_str().as_encoded_bytes()).map_err(|_| Errno::EINVAL)?;
        let mut waiting = match self.take(AT_FDCWD, &path) {
            Err(Errno::ENOENT) => return Ok(()),
            taken => vec![taken?],
        };
        while let Some(name) = waiting.pop() {
            while !self.clear(&name, &mut waiting)? {}
        }
        Ok(())
    }

    /// Removes what is in a folder here, and itself, but for folders in it that are not empty: those wait beside it then.
    /// False where it is to be read again.
    fn clear(&mut self, name: &CStr, waiting: &mut Vec<CString>) -> nix::Result<bool> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let folder = openat(&self.folder, name, flags, Mode::empty())?;
        let copy = folder.try_clone().map_err(|_| Errno::last())?;
        let mut went = false;
        for entry in Dir::from_fd(copy)?.iter() {
            let entry = entry?;
            let entry = entry.file_name();
            if [c".", c".."].contains(&entry) {
                continue;
            }
            if !remove_one(&folder, entry)? {
                waiting.push(self.take(folder.as_fd(), entry)?);
            }
            went = true;
        }
        match unlinkat(&self.folder, name, UnlinkatFlags::RemoveDir) {
            Ok(()) => Ok(true),
            // What was removed while it was read may have hidden something from the reader.
            Err(Errno::ENOTEMPTY) if went => Ok(false),
            Err(errno) => Err(errno),
        }
    }

    /// Moves something here. Its name.
    fn take(&mut self, folder: BorrowedFd<'_>, name: &CStr) -> nix::Result<CString> {
        self.moved += 1;
        let new = CString::new(self.moved.to_string()).map_err(|_| Errno::EINVAL)?;
        renameat(folder, name, &self.folder, new.as_c_str())?;
        Ok(new)
    }
}

/// False where it is a folder that is not empty.
fn remove_one(folder: &OwnedFd, name: &CStr) -> nix::Result<bool> {
    match unlinkat(folder, name, UnlinkatFlags::NoRemoveDir) {
        Err(Errno::EISDIR) => match unlinkat(folder, name, UnlinkatFlags::RemoveDir) {
            Err(Errno::ENOTEMPTY) => Ok(false),
            other => other.map(|()| true),
        },
        other => other.map(|()| true),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    /// A bin, a folder to be removed and one that is to stay.
    fn folders() -> (tempfile::TempDir, Bin) {
        let all = tempfile::tempdir().unwrap();
        for folder in ["bin", "doomed", "kept"] {
            fs::create_dir(all.path().join(folder)).unwrap();
        }
        fs::write(all.path().join("kept/file"), "kept").unwrap();
        let bin = Bin::open(&all.path().join("bin")).unwrap();
        (all, bin)
    }

    fn removed(all: &tempfile::TempDir, bin: &mut Bin) {
        bin.remove(&all.path().join("doomed")).unwrap();
        assert!(!all.path().join("doomed").exists());
        assert_eq!(fs::read_dir(all.path().join("bin")).unwrap().count(), 0);
        assert_eq!(fs::read(all.path().join("kept/file")).unwrap(), b"kept");
    }

    #[test]
    fn all_kinds_go_and_no_link_is_followed() {
        let (all, mut bin) = folders();
        let doomed = all.path().join("doomed");
        fs::create_dir_all(doomed.join("a/b/c")).unwrap();
        fs::create_dir(doomed.join("empty")).unwrap();
        fs::write(doomed.join("a/b/file"), "x").unwrap();
        fs::hard_link(all.path().join("kept/file"), doomed.join("a/hard")).unwrap();
        symlink("../kept", doomed.join("folder-link")).unwrap();
        symlink(all.path().join("kept"), doomed.join("a/b/link")).unwrap();
        symlink("nothing", doomed.join("broken")).unwrap();
        nix::unistd::mkfifo(&doomed.join("fifo"), Mode::S_IRWXU).unwrap();
        fs::write(doomed.join("a/no-rights"), "x").unwrap();
        fs::set_permissions(doomed.join("a/no-rights"), fs::Permissions::from_mode(0o000)).unwrap();
        removed(&all, &mut bin);
        // Again: there is nothing.
        removed(&all, &mut bin);
    }

    #[test]
    fn a_link_in_place_of_the_folder_goes_alone() {
        let (all, mut bin) = folders();
        fs::remove_dir(all.path().join("doomed")).unwrap();
        symlink("kept", all.path().join("doomed")).unwrap();
        assert!(bin.remove(&all.path().join("doomed")).is_err());
        assert_eq!(fs::read(all.path().join("kept/file")).unwrap(), b"kept");
    }

    #[test]
    fn deep_and_wide_ones_go() {
        let (all, mut bin) = folders();
        // Deeper than descriptors, a stack or a path reach.
        let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY;
        let mut folder = open(&all.path().join("doomed"), flags, Mode::empty()).unwrap();
        for _ in 0..20_000 {
            nix::sys::stat::mkdirat(&folder, "d", Mode::S_IRWXU).unwrap();
            folder = openat(&folder, "d", flags, Mode::empty()).unwrap();
        }
        for number in 0..2_000 {
            fs::create_dir_all(all.path().join(format!("doomed/wide/{number}/one"))).unwrap();
            fs::write(all.path().join(format!("doomed/wide/{number}/file")), "x").unwrap();
        }
        removed(&all, &mut bin);
    }
}
