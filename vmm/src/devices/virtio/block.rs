//! Virtio block device (virtio 1.3, 5.2) on a raw file: read, write, flush, get-id, and for a scratch drive discard and write
//! zeroes. Its worker's thread does the I/O, straight between the file and guest memory.
//!
//! A scratch drive offers no flush: nothing of it outlives its machine, so there is nothing that had to be on the host's disk.

use std::io;
use std::sync::Arc;

use virtio_bindings::{virtio_blk, virtio_ids};

use super::buffers::{Buffers, ChainBuffers};
use super::config_space::ConfigSpace;
use super::queue::VirtQueue;
use super::{Activation, DeviceInfo, Progress, VirtioDevice, feature};
use crate::memory::GuestMemory;

mod disk;
mod growth;

pub use disk::{Disk, DiskError, GrowError, SECTOR};
pub use growth::Growth;

use disk::Kind;

/// Bytes of the answer to get-id.
const ID_BYTES: usize = virtio_blk::VIRTIO_BLK_ID_BYTES as usize;

const QUEUE_SIZE: u16 = 128;
/// Most data segments of a request: all descriptors but header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Requests served before the driver is interrupted and commands are looked for.
const BUDGET: usize = 16;
/// Bytes of the request's header: type, reserved, sector (virtio 1.3, 5.2.6).
const HEADER_BYTES: usize = 16;

/// Most ranges of a discard or write zeroes request.
const RANGES_MAX: usize = 16;
/// Most sectors of a range: 1 GiB.
const RANGE_SECTORS_MAX: u32 = 1 << 21;
/// Bytes of a range: sector, sectors, flags (virtio 1.3, 5.2.6).
const RANGE_BYTES: usize = 16;
/// What discards had better be aligned to, in sectors: the blocks of the host's file systems.
const DISCARD_ALIGNMENT: u32 = 8;

const FEATURE_SEG_MAX: u64 = 1 << virtio_blk::VIRTIO_BLK_F_SEG_MAX;
const FEATURE_READ_ONLY: u64 = 1 << virtio_blk::VIRTIO_BLK_F_RO;
const FEATURE_FLUSH: u64 = 1 << virtio_blk::VIRTIO_BLK_F_FLUSH;
const FEATURE_DISCARD: u64 = 1 << virtio_blk::VIRTIO_BLK_F_DISCARD;
const FEATURE_WRITE_ZEROES: u64 = 1 << virtio_blk::VIRTIO_BLK_F_WRITE_ZEROES;

/// The device.
pub struct Block {
    disk: Disk,
    config: Arc<ConfigSpace>,
    id: [u8; ID_BYTES],
    queue: Option<VirtQueue>,
    buffers: ChainBuffers,
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
            config: ConfigSpace::new(config(disk.image().sectors(), disk.kind() == Kind::Scratch)),
            disk,
            id: bytes,
            queue: None,
            buffers: ChainBuffers::default(),
        }
    }

    /// What makes the drive larger; only a scratch drive grows.
    pub fn growth(&self) -> Option<Growth> {
        (self.disk.kind() == Kind::Scratch).then(|| Growth::new(self.disk.image().clone(), self.config.clone()))
    }
}

/// `struct virtio_blk_config` up to `seg_max`, or with what discards and write zeroes take too (virtio 1.3, 5.2.4).
fn config(sectors: u64, discards: bool) -> Vec<u8> {
    let mut bytes = sectors.to_le_bytes().to_vec();
    let mut field = |value: u32| bytes.extend(value.to_le_bytes());
    // size_max, seg_max
    field(0);
    field(SEG_MAX);
    if discards {
        // geometry, blk_size, topology (two words), writeback to num_queues: of features that are not offered
        for _ in 0..5 {
            field(0);
        }
        // max_discard_sectors, max_discard_seg, discard_sector_alignment
        field(RANGE_SECTORS_MAX);
        field(RANGES_MAX as u32);
        field(DISCARD_ALIGNMENT);
        // max_write_zeroes_sectors, max_write_zeroes_seg, write_zeroes_may_unmap
        field(RANGE_SECTORS_MAX);
        field(RANGES_MAX as u32);
        field(1);
    }
    bytes
}

impl VirtioDevice for Block {
    fn info(&self) -> DeviceInfo {
        let features = match self.disk.kind() {
            Kind::ReadOnly => FEATURE_FLUSH | FEATURE_READ_ONLY,
            Kind::Writable => FEATURE_FLUSH,
            Kind::Scratch => FEATURE_DISCARD | FEATURE_WRITE_ZEROES,
        };
        DeviceInfo {
            kind: virtio_ids::VIRTIO_ID_BLOCK,
            features: feature::COMMON | FEATURE_SEG_MAX | features,
            queue_sizes: vec![QUEUE_SIZE],
            config: self.config.clone(),
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
    let kind = u32::from_le_bytes([k0, k1, k2, k3]);
    match kind {
        virtio_blk::VIRTIO_BLK_T_IN => {
            disk.move_all(false, sector, &buffers.writable, 0, room, memory)?;
            Ok(room)
        }
        virtio_blk::VIRTIO_BLK_T_OUT if disk.kind() == Kind::ReadOnly => Err(io::ErrorKind::ReadOnlyFilesystem.into()),
        virtio_blk::VIRTIO_BLK_T_OUT => {
            let start = HEADER_BYTES as u64;
            let length = buffers.readable.len() - start;
            disk.move_all(true, sector, &buffers.readable, start, length, memory)?;
            if disk.write_through {
                disk.sync()?;
            }
            Ok(0)
        }
        virtio_blk::VIRTIO_BLK_T_FLUSH => disk.sync().map(|()| 0),
        virtio_blk::VIRTIO_BLK_T_DISCARD if disk.kind() == Kind::Scratch => {
            clear(disk, 0, &buffers.readable, memory).map(|()| 0)
        }
        virtio_blk::VIRTIO_BLK_T_WRITE_ZEROES if disk.kind() == Kind::Scratch => {
            let unmap = virtio_blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
            clear(disk, unmap, &buffers.readable, memory).map(|()| 0)
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

/// Makes holes of the ranges that follow the header, with or without leave to (`unmap`): in a file of which no block is
/// there before it is written, a hole is as good as zeros that were written. `flags` are those that the request may have.
fn clear(disk: &Disk, flags: u32, request: &Buffers, memory: &GuestMemory) -> io::Result<()> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
    let mut bytes = [0; RANGES_MAX * RANGE_BYTES];
    let length = (request.len() as usize).checked_sub(HEADER_BYTES).ok_or_else(invalid)?;
    let bytes = bytes.get_mut(..length).ok_or_else(invalid)?;
    request
        .read(memory, HEADER_BYTES as u64, bytes)
        .map_err(io::Error::other)?;
    let (ranges, rest) = bytes.as_chunks::<RANGE_BYTES>();
    if ranges.is_empty() || !rest.is_empty() {
        return Err(invalid());
    }
    let ranges = ranges.iter().map(|range| {
        let range = u128::from_le_bytes(*range);
        (range as u64, (range >> 64) as u32, (range >> 96) as u32)
    });
    if ranges.clone().any(|(_, _, has)| has & !flags != 0) {
        return Err(io::ErrorKind::Unsupported.into());
    }
    for (sector, sectors, _) in ranges {
        if sectors > RANGE_SECTORS_MAX {
            return Err(invalid());
        }
        disk.punch(sector, sectors.into())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
