//! The files behind drives: images, which are there before and after the machine, and scratch drives, which are made for it
//! and go with it.

use std::fs::{File, OpenOptions, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use stoker_proto::limits::MAX_SCRATCH_MIB;
use vmm_sys_util::fallocate::{FallocateMode, fallocate};

use super::super::buffers::{Buffers, Transfer, transfer};
use crate::memory::GuestMemory;

/// Bytes of a sector, in which virtio counts (virtio 1.3, 5.2.4).
pub const SECTOR: u64 = 512;
/// Sectors of a MiB.
const SECTORS_PER_MIB: u64 = (1 << 20) / SECTOR;

/// Why a drive could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// It is missing, or may not be opened.
    #[error("cannot open the drive {path}: {source}; check the path and that this user may {access} it")]
    Open {
        /// The image.
        path: PathBuf,
        /// `read` or `write`.
        access: &'static str,
        /// The underlying error.
        source: io::Error,
    },
    /// Another machine has it.
    #[error(
        "the drive {0} is in use by another machine; a writable drive belongs to one, give this one a copy or make it read-only in all"
    )]
    InUse(PathBuf),
    /// It is not a whole number of sectors.
    #[error(
        "the drive {path} has {size} bytes, which is no positive multiple of 512: it is no raw image or was cut short; make it again"
    )]
    Size {
        /// The image.
        path: PathBuf,
        /// Bytes it has.
        size: u64,
    },
    /// A scratch drive's file could not be made.
    #[error(
        "cannot make a scratch drive of {size_mib} MiB in {folder}: {source}; check that the folder is there, that this user may write to it, and that its file system takes files of this size"
    )]
    Scratch {
        /// Where it was to lie.
        folder: PathBuf,
        /// What it was to hold.
        size_mib: u32,
        /// The underlying error.
        source: io::Error,
    },
}

/// Why a drive did not grow. It is as it was.
#[derive(Debug, thiserror::Error)]
pub enum GrowError {
    /// More than is allowed.
    #[error("a scratch drive of {0} MiB is too large; it may have {MAX_SCRATCH_MIB} MiB at most")]
    TooLarge(u32),
    /// The host did not make the file larger.
    #[error("cannot make the scratch drive {size_mib} MiB large: {source}")]
    File {
        /// What it was to hold.
        size_mib: u32,
        /// The underlying error.
        source: io::Error,
    },
}

/// A file that serves as a drive, open.
#[derive(Debug)]
pub struct Disk {
    image: Arc<Image>,
    kind: Kind,
    /// What is written is on the disk before the driver hears so.
    pub(super) write_through: bool,
}

/// What may be done with a drive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Reading.
    ReadOnly,
    /// Writing too, and what was written lasts.
    Writable,
    /// Writing, and nothing outlives the machine. It takes of the host's disk what is written, and may grow.
    Scratch,
}

/// The file, and how much of it the driver may use. Whoever makes it larger has it too.
#[derive(Debug)]
pub(super) struct Image {
    file: File,
    sectors: AtomicU64,
}

// === impl Disk ===

impl Disk {
    /// Opens an image and locks it (`flock`): shared where it is only read, else for this machine alone.
    ///
    /// # Errors
    /// Where it cannot be opened, another machine has it, or its size is wrong.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, DiskError> {
        let access = if read_only { "read" } else { "write" };
        let fail = |source| DiskError::Open {
            path: path.to_owned(),
            access,
            source,
        };
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .open(path)
            .map_err(fail)?;
        let locked = if read_only {
            file.try_lock_shared()
        } else {
            file.try_lock()
        };
        match locked {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(DiskError::InUse(path.to_owned())),
            // A file system without locks cannot protect a writable image; reading needs no protection.
            Err(TryLockError::Error(_)) if read_only => {}
            Err(TryLockError::Error(source)) => return Err(fail(source)),
        }
        // The end is where a seek says it is, for block devices too.
        let size = io::Seek::seek(&mut &file, io::SeekFrom::End(0)).map_err(fail)?;
        if size == 0 || !size.is_multiple_of(SECTOR) {
            return Err(DiskError::Size {
                path: path.to_owned(),
                size,
            });
        }
        let kind = if read_only { Kind::ReadOnly } else { Kind::Writable };
        Ok(Self::new(file, size / SECTOR, kind))
    }

    /// Makes an empty drive of `size_mib` MiB whose file lies in `folder` and has no name there, so that it is gone with the
    /// process that has it open.
    ///
    /// # Errors
    /// Where the folder or its file system does not take such a file.
    pub fn scratch(folder: &Path, size_mib: u32) -> Result<Self, DiskError> {
        let sectors = u64::from(size_mib) * SECTORS_PER_MIB;
        let make = || {
            let file = tempfile::tempfile_in(folder)?;
            file.set_permissions(Permissions::from_mode(0o600))?;
            file.set_len(sectors * SECTOR)?;
            Ok(file)
        };
        let file = make().map_err(|source| DiskError::Scratch {
            folder: folder.to_owned(),
            size_mib,
            source,
        })?;
        Ok(Self::new(file, sectors, Kind::Scratch))
    }

    pub(super) fn new(file: File, sectors: u64, kind: Kind) -> Self {
        let image = Image {
            file,
            sectors: AtomicU64::new(sectors),
        };
        Self {
            image: Arc::new(image),
            kind,
            write_through: false,
        }
    }

    pub(super) fn kind(&self) -> Kind {
        self.kind
    }

    pub(super) fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// Moves all of `length` bytes between the file, from `sector`, and `buffers`, from `offset`.
    pub(super) fn move_all(
        &self,
        write: bool,
        sector: u64,
        buffers: &Buffers,
        offset: u64,
        length: u64,
        memory: &GuestMemory,
    ) -> io::Result<()> {
        if !length.is_multiple_of(SECTOR) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let start = self.image.start_of(sector, length / SECTOR)?;
        let mut done = 0;
        while done < length {
            let direction = if write {
                Transfer::WriteAt(start + done)
            } else {
                Transfer::ReadAt(start + done)
            };
            match transfer(
                buffers,
                memory,
                offset + done,
                length - done,
                &self.image.file,
                direction,
            )? {
                // The image became shorter than it was when it was opened.
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                moved => done += moved as u64,
            }
        }
        Ok(())
    }

    /// Makes a hole of `sectors` sectors in the file: they read as zeros, and take nothing of the host's disk.
    pub(super) fn punch(&self, sector: u64, sectors: u64) -> io::Result<()> {
        let start = self.image.start_of(sector, sectors)?;
        // A hole without a size is no hole to fallocate(2).
        if sectors == 0 {
            return Ok(());
        }
        fallocate(
            &self.image.file,
            FallocateMode::PunchHole,
            true,
            start,
            sectors * SECTOR,
        )
        .map_err(io::Error::from)
    }

    /// What was written is on the host's disk afterwards, where it is to last.
    pub(super) fn sync(&self) -> io::Result<()> {
        match self.kind {
            Kind::Writable => self.image.file.sync_data(),
            Kind::ReadOnly | Kind::Scratch => Ok(()),
        }
    }

    #[cfg(test)]
    pub(super) fn file(&self) -> &File {
        &self.image.file
    }
}

// === impl Image ===

impl Image {
    pub(super) fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::Acquire)
    }

    pub(super) fn size_mib(&self) -> u32 {
        u32::try_from(self.sectors() / SECTORS_PER_MIB).unwrap_or(u32::MAX)
    }

    /// The byte at which a range of sectors starts that the driver may use.
    fn start_of(&self, sector: u64, sectors: u64) -> io::Result<u64> {
        match sector.checked_add(sectors) {
            Some(end) if end <= self.sectors() => Ok(sector * SECTOR),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// Makes the file larger, then lets the driver use it.
    pub(super) fn grow(&self, size_mib: u32) -> Result<(), GrowError> {
        if size_mib > MAX_SCRATCH_MIB {
            return Err(GrowError::TooLarge(size_mib));
        }
        let sectors = u64::from(size_mib) * SECTORS_PER_MIB;
        self.file
            .set_len(sectors * SECTOR)
            .map_err(|source| GrowError::File { size_mib, source })?;
        self.sectors.store(sectors, Ordering::Release);
        Ok(())
    }
}
