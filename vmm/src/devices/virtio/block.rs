//! Virtio block device (virtio 1.3, 5.2) on a raw image file: read, write, flush and get-id. Its worker's thread does the
//! I/O, straight between the file and guest memory.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use virtio_bindings::{virtio_blk, virtio_ids};

use super::buffers::{Buffers, ChainBuffers, Transfer, transfer};
use super::queue::VirtQueue;
use super::{Activation, DeviceInfo, Progress, VirtioDevice, feature};
use crate::memory::GuestMemory;

/// Bytes of a sector, in which virtio counts (virtio 1.3, 5.2.4).
pub const SECTOR: u64 = 512;
/// Bytes of the answer to get-id.
const ID_BYTES: usize = virtio_blk::VIRTIO_BLK_ID_BYTES as usize;

const QUEUE_SIZE: u16 = 128;
/// Most data segments of a request: all descriptors but header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Requests served before the driver is interrupted and commands are looked for.
const BUDGET: usize = 16;
/// Bytes of the request's header: type, reserved, sector (virtio 1.3, 5.2.6).
const HEADER_BYTES: usize = 16;

const FEATURE_SEG_MAX: u64 = 1 << virtio_blk::VIRTIO_BLK_F_SEG_MAX;
const FEATURE_READ_ONLY: u64 = 1 << virtio_blk::VIRTIO_BLK_F_RO;
const FEATURE_FLUSH: u64 = 1 << virtio_blk::VIRTIO_BLK_F_FLUSH;

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
}

/// A raw image, open and locked.
#[derive(Debug)]
pub struct Disk {
    file: File,
    sectors: u64,
    read_only: bool,
    /// What is written is on the disk before the driver hears so.
    write_through: bool,
}

/// The device.
pub struct Block {
    disk: Disk,
    id: [u8; ID_BYTES],
    queue: Option<VirtQueue>,
    buffers: ChainBuffers,
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
        Ok(Self {
            file,
            sectors: size / SECTOR,
            read_only,
            write_through: false,
        })
    }

    /// Moves all of `length` bytes between the image, from `sector`, and `buffers`, from `offset`.
    fn move_all(
        &self,
        write: bool,
        sector: u64,
        buffers: &Buffers,
        offset: u64,
        length: u64,
        memory: &GuestMemory,
    ) -> io::Result<()> {
        let sectors = length / SECTOR;
        if !length.is_multiple_of(SECTOR) || sector.checked_add(sectors).is_none_or(|end| end > self.sectors) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let start = sector * SECTOR;
        let mut done = 0;
        while done < length {
            let direction = if write {
                Transfer::WriteAt(start + done)
            } else {
                Transfer::ReadAt(start + done)
            };
            match transfer(buffers, memory, offset + done, length - done, &self.file, direction)? {
                // The image became shorter than it was when it was opened.
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                moved => done += moved as u64,
            }
        }
        Ok(())
    }
}

// === impl Block ===

impl Block {
    /// A device on `disk` that calls itself `id` (cut to 20 bytes).
    pub fn new(disk: Disk, id: &str) -> Self {
        let mut bytes = [0; ID_BYTES];
        for (to, from) in bytes.iter_mut().zip(id.bytes()) {
            *to = from;
        }
        Self {
            disk,
            id: bytes,
            queue: None,
            buffers: ChainBuffers::default(),
        }
    }
}

impl VirtioDevice for Block {
    fn info(&self) -> DeviceInfo {
        let mut features = feature::COMMON | FEATURE_SEG_MAX | FEATURE_FLUSH;
        if self.disk.read_only {
            features |= FEATURE_READ_ONLY;
        }
        // `struct virtio_blk_config`: capacity, size_max, seg_max (virtio 1.3, 5.2.4).
        let mut config = self.disk.sectors.to_le_bytes().to_vec();
        config.extend(0u32.to_le_bytes());
        config.extend(SEG_MAX.to_le_bytes());
        DeviceInfo {
            kind: virtio_ids::VIRTIO_ID_BLOCK,
            features,
            queue_sizes: vec![QUEUE_SIZE],
            config,
        }
    }

    fn activate(&mut self, activation: Activation) {
        // A driver without the request for it relies on what it wrote being there (virtio 1.3, 5.2.6.2).
        self.disk.write_through = activation.features & FEATURE_FLUSH == 0;
        self.queue = activation.queues.into_iter().next().flatten();
    }

    fn process(&mut self) -> Progress {
        let Some(queue) = &mut self.queue else {
            return Progress::Idle;
        };
        let (disk, id, buffers) = (&self.disk, &self.id, &mut self.buffers);
        queue.serve(BUDGET, |memory, chain| match buffers.fill(chain) {
            Ok(()) => serve(disk, id, buffers, memory),
            Err(_) => 0,
        })
    }

    fn reset(&mut self) {
        self.queue = None;
    }
}

/// Serves one request and writes its status. Returns how many bytes were written for the driver.
fn serve(disk: &Disk, id: &[u8; ID_BYTES], buffers: &ChainBuffers, memory: &GuestMemory) -> u32 {
    // Without a byte for the status there is no way to answer.
    let Some(room) = buffers.writable.len().checked_sub(1) else {
        return 0;
    };
    let (status, written) = match execute(disk, id, buffers, room, memory) {
        Ok(written) => (virtio_blk::VIRTIO_BLK_S_OK, written),
        Err(error) if error.kind() == io::ErrorKind::Unsupported => (virtio_blk::VIRTIO_BLK_S_UNSUPP, 0),
        Err(_) => (virtio_blk::VIRTIO_BLK_S_IOERR, 0),
    };
    match buffers.writable.write(memory, room, &[status as u8]) {
        Ok(()) => u32::try_from(written + 1).unwrap_or(u32::MAX),
        Err(_) => 0,
    }
}

/// Does what the header asks; `room` is how many bytes may be written for the driver. Returns how many were.
fn execute(
    disk: &Disk,
    id: &[u8; ID_BYTES],
    buffers: &ChainBuffers,
    room: u64,
    memory: &GuestMemory,
) -> io::Result<u64> {
    let mut header = [0; HEADER_BYTES];
    buffers
        .readable
        .read(memory, 0, &mut header)
        .map_err(io::Error::other)?;
    let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    match u32::from_le_bytes([k0, k1, k2, k3]) {
        virtio_blk::VIRTIO_BLK_T_IN => {
            disk.move_all(false, sector, &buffers.writable, 0, room, memory)?;
            Ok(room)
        }
        virtio_blk::VIRTIO_BLK_T_OUT if !disk.read_only => {
            let start = HEADER_BYTES as u64;
            let length = buffers.readable.len() - start;
            disk.move_all(true, sector, &buffers.readable, start, length, memory)?;
            if disk.write_through {
                disk.file.sync_data()?;
            }
            Ok(0)
        }
        virtio_blk::VIRTIO_BLK_T_OUT => Err(io::ErrorKind::ReadOnlyFilesystem.into()),
        virtio_blk::VIRTIO_BLK_T_FLUSH => {
            if !disk.read_only {
                disk.file.sync_data()?;
            }
            Ok(0)
        }
        virtio_blk::VIRTIO_BLK_T_GET_ID => {
            buffers
                .writable
                .write(memory, 0, id.get(..room.min(id.len() as u64) as usize).unwrap_or(id))
                .map_err(io::Error::other)?;
            Ok(room.min(id.len() as u64))
        }
        _ => Err(io::ErrorKind::Unsupported.into()),
    }
}

#[cfg(test)]
mod tests;
