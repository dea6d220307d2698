//! The size of the drive, and of the file system on it.

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use stoker_proto::limits::ROOM_WAIT;
use stoker_proto::scratch::BLOCK;

const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// Why the file system is not as large as it is to be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GrowError {
    #[error("cannot read the size of the machine's drive: {0}")]
    Size(nix::Error),
    #[error("the machine's drive is to have {wanted_mib} MiB and has {bytes} bytes after {} s", ROOM_WAIT.as_secs())]
    Device { wanted_mib: u32, bytes: u64 },
    #[error("cannot make the drive's file system larger: {0}")]
    Resize(nix::Error),
    #[error("cannot read how much the drive holds: {0}")]
    Measure(std::io::Error),
}

mod ioctl {
    // BLKGETSIZE64 of linux/fs.h, whose type is `size_t` and whose answer has 64 bits.
    nix::ioctl_read!(device_bytes, 0x12, 114, u64);
    // EXT4_IOC_RESIZE_FS of linux/ext4.h: a number of blocks.
    nix::ioctl_write_ptr!(resize, b'f', 16, u64);
}

/// The device's size in bytes once it is `mib` or more. Blocks.
pub(super) fn device_of(device: &File, mib: u32) -> Result<u64, GrowError> {
    // Its host has made it so before: only the news is on its way.
    let deadline = Instant::now() + ROOM_WAIT;
    let mut pause = Duration::from_millis(1);
    loop {
        let bytes = device_bytes(device).map_err(GrowError::Size)?;
        if bytes >= u64::from(mib) << 20 {
            return Ok(bytes);
        }
        if Instant::now() >= deadline {
            return Err(GrowError::Device { wanted_mib: mib, bytes });
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

fn device_bytes(device: &File) -> nix::Result<u64> {
    let mut bytes = 0;
    // SAFETY: the call writes the 64 bits that `bytes` has.
    unsafe { ioctl::device_bytes(device.as_raw_fd(), &mut bytes) }?;
    Ok(bytes)
}

/// Makes the file system that has the open folder `root` as large as a device of so many bytes. Blocks.
pub(super) fn file_system_to(root: &File, device_bytes: u64) -> Result<(), GrowError> {
    let blocks = device_bytes / BLOCK;
    // SAFETY: the call reads the 64 bits of `blocks`.
    unsafe { ioctl::resize(root.as_raw_fd(), &blocks) }.map_err(GrowError::Resize)?;
    Ok(())
}
