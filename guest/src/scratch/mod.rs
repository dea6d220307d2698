//! The machine's scratch drive: where all lies that is written in this machine, zips on their way, unpacked code and each
//! container's `/tmp`. It is a block device that ends with the machine; it only grows.
//!
//! ```text
//!   Scratch ── made at boot (format) ──► Drive ── share (room) ──► Share ── for a container (quota) ──► Folder
//!                                          │                         └───── for code ─────────────────► Folder
//!                                          └── grow                                  dropped: removed, by and by
//! ```
//!
//! Nobody is given room that another was given: what a container may fill is taken when it is made.

mod format;
mod grow;
mod quota;
mod remove;
mod room;

use std::fs::{File, Permissions};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::statvfs::fstatvfs;
use stoker_archive::Size;
use stoker_proto::scratch::{BLOCK, BYTES_AN_INODE};
use tokio::sync::watch;

use crate::blocking;
use crate::budget;
use crate::reaper::Reaper;
use format::FormatError;
pub(crate) use grow::GrowError;
use remove::Remover;
pub(crate) use room::{NoRoom, Space};
use room::{Reservation, Room};

/// For the folders of all the folders here, in bytes.
const SPARE_BYTES: u64 = 8 << 20;

/// The drive once it is there, or why there is none. Clones are the same.
#[derive(Clone)]
pub(crate) struct Scratch(watch::Receiver<Option<Result<Drive, Arc<str>>>>);

/// A drive that can be used. Clones are the same.
#[derive(Clone)]
pub(crate) struct Drive(Arc<Inner>);

struct Inner {
    path: PathBuf,
    device: File,
    /// Where it is mounted.
    folder: PathBuf,
    /// The same, open.
    root: File,
    /// What the file system holds by itself.
    own: Space,
    /// How large the file system is, in bytes.
    size: Mutex<u64>,
    room: Room,
    remover: Remover,
    /// Folders for code so far.
    folders: AtomicU64,
}

/// A part of the drive that was taken and is not used yet; free again when it is dropped.
pub(crate) struct Share {
    drive: Drive,
    reservation: Reservation,
}

/// A folder on the drive. It goes when it is dropped, with all that is in it, by and by; then what it took is free.
pub(crate) struct Folder {
    path: PathBuf,
    drive: Drive,
    contents: Option<Contents>,
}

/// What is left of a folder.
struct Contents {
    path: PathBuf,
    reservation: Reservation,
    /// Of a container: the device, and who is limited there.
    quota: Option<(PathBuf, u32)>,
}

/// Why there is no drive.
#[derive(Debug, thiserror::Error)]
enum DriveError {
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error("cannot read the drive's size: {0}")]
    Size(#[from] GrowError),
    #[error("cannot use the drive: {0}")]
    Use(#[from] std::io::Error),
}

/// Why there is no folder.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FolderError {
    #[error("cannot make a folder on the machine's drive: {0}")]
    Make(std::io::Error),
    #[error("cannot limit what the container writes to the machine's drive: {0}")]
    Limit(nix::Error),
}

// === impl Space ===

impl Space {
    /// Of a container whose `/tmp` holds so many MiB.
    pub(crate) fn of_tmp(mib: u32) -> Self {
        let bytes = u64::from(mib) << 20;
        Self {
            bytes,
            inodes: bytes / BYTES_AN_INODE,
        }
    }

    /// Of an unpacked zip.
    pub(crate) fn of_code(size: Size) -> Self {
        Self {
            // As `stoker_proto::scratch::unpacked_bytes` has it.
            bytes: size.bytes + size.files * BLOCK,
            // And the folder that it is unpacked into.
            inodes: size.files + 1,
        }
    }

    /// Of a file without a name.
    pub(crate) fn of_file(bytes: u64) -> Self {
        Self { bytes, inodes: 1 }
    }
}

// === impl Scratch ===

impl Scratch {
    /// There is none.
    pub(crate) fn none(why: &str) -> Self {
        Self(watch::channel(Some(Err(why.into()))).1)
    }

    /// Begins to make the file system on `device`, with `mke2fs` of `image`, and to mount it on `folder`.
    pub(crate) fn on(device: PathBuf, folder: PathBuf, image: PathBuf, reaper: Reaper) -> Self {
        let (sender, made) = watch::channel(None);
        budget::spawn_uncounted(async move {
            let drive = Drive::make(device, folder, &image, &reaper).await.map_err(|error| {
                tracing::error!("{error}");
                error.to_string().into()
            });
            sender.send_replace(Some(drive));
        });
        Self(made)
    }

    /// The drive, or why there is none; waits until that is known.
    pub(crate) async fn drive(&self) -> Result<Drive, Arc<str>> {
        let mut made = self.0.clone();
        let drive = made
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|drive| drive.clone());
        drive.unwrap_or_else(|| Err("the drive was not made".into()))
    }
}

// === impl Drive ===

impl Drive {
    async fn make(device: PathBuf, folder: PathBuf, image: &Path, reaper: &Reaper) -> Result<Self, DriveError> {
        format::appeared(&device).await?;
        format::format(&device, image, reaper).await?;
        blocking::on_a_thread("scratch", move || Self::mount(device, folder)).await?
    }

    fn mount(path: PathBuf, folder: PathBuf) -> Result<Self, DriveError> {
        let device = File::open(&path)?;
        let size = grow::device_of(&device, 0)?;
        std::fs::create_dir_all(&folder)?;
        format::mount_on(&folder, &path)?;
        std::fs::set_permissions(&folder, Permissions::from_mode(0o711))?;
        let root = File::open(&folder)?;
        for (name, mode) in [("tmp", 0o711), ("code", 0o755), ("removed", 0o700)] {
            let path = folder.join(name);
            std::fs::create_dir(&path)?;
            std::fs::set_permissions(&path, Permissions::from_mode(mode))?;
        }
        let remover = Remover::start(&folder.join("removed"))?;
        let found = fstatvfs(&root).map_err(std::io::Error::from)?;
        let drive = Self(Arc::new(Inner {
            own: Space {
                bytes: found.blocks().saturating_sub(found.blocks_free()) * found.fragment_size() + SPARE_BYTES,
                inodes: found.files().saturating_sub(found.files_free()),
            },
            path,
            device,
            folder,
            root,
            size: Mutex::new(size),
            room: Room::default(),
            remover,
            folders: AtomicU64::new(0),
        }));
        drive.measure()?;
        Ok(drive)
    }

    /// Sees how much the file system holds.
    fn measure(&self) -> std::io::Result<()> {
        let found = fstatvfs(&self.0.root)?;
        // What is free and not for files, the kernel keeps to be able to write what it has taken over.
        let kept = found.blocks_free().saturating_sub(found.blocks_available());
        let blocks = found.blocks().saturating_sub(kept);
        self.0.room.resize(Space {
            bytes: (blocks * found.fragment_size()).saturating_sub(self.0.own.bytes),
            inodes: found.files().saturating_sub(self.0.own.inodes),
        });
        Ok(())
    }

    /// Makes the file system as large as the device, once that has `mib` or more. Blocks.
    pub(crate) fn grow(&self, mib: u32) -> Result<(), GrowError> {
        let bytes = grow::device_of(&self.0.device, mib)?;
        // One at a time.
        let mut size = self.0.size.lock().unwrap_or_else(PoisonError::into_inner);
        if bytes > *size {
            grow::file_system_to(&self.0.root, bytes)?;
            *size = bytes;
            self.measure().map_err(GrowError::Measure)?;
        }
        Ok(())
    }

    /// Takes a part of it. Where there is not enough room, `let_go` is called to have something removed that nobody uses,
    /// until it finds nothing (`false`). Blocks.
    pub(crate) fn share(&self, space: Space, let_go: impl FnMut() -> bool) -> Result<Share, NoRoom> {
        let reservation = self.0.room.reserve(space, let_go)?;
        Ok(Share {
            drive: self.clone(),
            reservation,
        })
    }

    /// A new folder on it that may take all of it, and stays as long as the drive: for an image, which has the machine to itself.
    /// Blocks.
    pub(crate) fn whole(&self, name: &str) -> std::io::Result<PathBuf> {
        let path = self.0.folder.join(name);
        std::fs::create_dir(&path)?;
        std::fs::set_permissions(&path, Permissions::from_mode(0o700))?;
        Ok(path)
    }

    /// A folder on it, for files without a name.
    pub(crate) fn folder(&self) -> &Path {
        &self.0.folder
    }
}

// === impl Share ===

impl Share {
    /// The `/tmp` of a container, which the user `uid` may fill with so much and no more. Blocks.
    pub(crate) fn for_container(self, uid: u32) -> Result<Folder, FolderError> {
        let drive = self.drive.clone();
        let path = drive.0.folder.join("tmp").join(uid.to_string());
        let folder = self.make(path, Some((drive.0.path.clone(), uid)))?;
        quota::limit(&drive.0.path, uid, Some(folder.space())).map_err(FolderError::Limit)?;
        // Also the folder itself is the user's, so that its names count.
        chown(folder.path(), Some(uid), Some(uid))
            .and_then(|()| std::fs::set_permissions(folder.path(), Permissions::from_mode(0o1777)))
            .map_err(FolderError::Make)?;
        Ok(folder)
    }

    /// A folder for code. Blocks.
    pub(crate) fn for_code(self) -> Result<Folder, FolderError> {
        let number = self.drive.0.folders.fetch_add(1, Ordering::Relaxed);
        let path = self.drive.0.folder.join("code").join(number.to_string());
        self.make(path, None)
    }

    fn make(self, path: PathBuf, quota: Option<(PathBuf, u32)>) -> Result<Folder, FolderError> {
        std::fs::create_dir(&path)
            .and_then(|()| std::fs::set_permissions(&path, Permissions::from_mode(0o755)))
            .map_err(FolderError::Make)?;
        let contents = Contents {
            path: path.clone(),
            reservation: self.reservation,
            quota,
        };
        Ok(Folder {
            path,
            drive: self.drive,
            contents: Some(contents),
        })
    }
}

// === impl Folder ===

impl Folder {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    fn space(&self) -> Space {
        self.contents
            .as_ref()
            .map_or_else(Space::default, |contents| contents.reservation.space())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Some(mut contents) = self.contents.take() {
            contents.reservation.leave();
            self.drive.0.remover.remove(contents);
        }
    }
}

impl std::fmt::Debug for Folder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.path.fmt(f)
    }
}

// === impl Contents ===

impl Contents {
    /// It can't be removed: what it takes is not free again.
    fn stays(self) {
        self.reservation.stay();
    }

    /// It is removed.
    fn gone(self) {
        if let Some((device, uid)) = self.quota
            && let Err(errno) = quota::limit(&device, uid, None)
        {
            tracing::warn!("cannot take the limits of user {uid} away: {errno}");
        }
    }
}
