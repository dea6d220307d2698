//! What containers take of the scratch drive of their machine: one computation for the agent, which sees to it that there is
//! room, and for guests, which hold containers to it.

/// What the drive's file system takes for itself, in MiB, whatever its size and whatever is in it: room that the kernel keeps
/// to write back what it was given (16 MiB in ext4), the file system's own files, and what the parts below leave out.
pub const SCRATCH_BASE_MIB: u32 = 64;

/// The file system has an inode of 256 bytes for each so many bytes.
pub const BYTES_AN_INODE: u64 = 16 << 10;

/// The file system's block, in bytes.
pub const BLOCK: u64 = 4096;

/// What an unpacked zip takes, in bytes: its content, in whole pages, a block for each file, folder and link, and as much as
/// it has inodes for these.
#[must_use]
pub fn unpacked_bytes(content_bytes: u64, files: u64) -> u64 {
    let content = content_bytes.saturating_add(files.saturating_mul(BLOCK));
    // And the folder that it is unpacked into.
    let inodes = files.saturating_add(1).saturating_mul(BYTES_AN_INODE);
    content.max(inodes)
}

/// What a container takes of its machine's drive, in MiB: its `/tmp`, and its code and layers as zips and unpacked, though
/// others of the machine may share these. With a part of the file system's tables of inodes, which take 1/64 of the drive.
#[must_use]
pub fn container_scratch_mib(tmp_mib: u32, zipped_bytes: u64, unpacked_bytes: u64) -> u32 {
    let code = zipped_bytes.saturating_add(unpacked_bytes).div_ceil(1 << 20);
    let all = u64::from(tmp_mib).saturating_add(code);
    let all = all.saturating_mul(65).div_ceil(64).saturating_add(1);
    u32::try_from(all).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::MAX_SCRATCH_MIB;

    #[test]
    fn a_container_takes_its_tmp_its_code_and_a_part_of_the_tables() {
        assert_eq!(container_scratch_mib(512, 0, 0), 521);
        assert_eq!(container_scratch_mib(512, 1, 0), 523, "a byte is a MiB");
        assert_eq!(container_scratch_mib(10_240, 50 << 20, 250 << 20), 10_706);
        assert_eq!(container_scratch_mib(u32::MAX, u64::MAX, u64::MAX), u32::MAX);
    }

    #[test]
    fn many_small_files_take_their_inodes() {
        assert_eq!(unpacked_bytes(0, 0), BYTES_AN_INODE);
        assert_eq!(unpacked_bytes(100 << 20, 10), (100 << 20) + 10 * BLOCK);
        assert_eq!(unpacked_bytes(1 << 20, 1000), 1001 * BYTES_AN_INODE);
        assert_eq!(unpacked_bytes(u64::MAX, u64::MAX), u64::MAX);
    }

    /// With what ext4 is known to take: inode tables, two bitmaps for each 128 MiB, the 16 MiB that it keeps free, its own
    /// files, and what guests keep for folders of folders.
    #[test]
    fn what_containers_were_given_is_there_however_large_the_drive() {
        for each in [1_u32, 513, 812, 10_540] {
            for containers in [1_u32, 2, 20, 120] {
                let drive = SCRATCH_BASE_MIB + containers * container_scratch_mib(each, 0, 0);
                if drive > MAX_SCRATCH_MIB {
                    continue;
                }
                let kib = u64::from(drive) * 1024;
                let taken = kib / 64 + kib.div_ceil(128 << 10) * 8 + (16 + 4 + 8) * 1024;
                assert!(
                    kib - taken >= u64::from(each * containers) * 1024,
                    "{containers} of {each} MiB"
                );
            }
        }
    }
}
