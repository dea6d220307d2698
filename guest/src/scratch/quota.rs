//! What one user may fill of the drive: user quotas, quotactl(2). A container has a user of its own and can't change the owner
//! of a file, so it can't leave them.

use std::path::Path;

use nix::sys::quota::{Dqblk, QuotaType, QuotaValidFlags, quotactl_set};

use super::room::Space;

/// Quotas count blocks of this size in bytes, whatever the file system's are.
const QUOTA_BLOCK: u64 = 1024;

/// Limits what the user owns on the file system of this device; nothing: no limit.
pub(super) fn limit(device: &Path, uid: u32, most: Option<Space>) -> nix::Result<()> {
    let mut limits = Dqblk::default();
    if let Some(most) = most {
        limits.set_blocks_hard_limit(most.bytes / QUOTA_BLOCK);
        limits.set_inodes_hard_limit(most.inodes);
    }
    let uid = uid.try_into().map_err(|_| nix::errno::Errno::EINVAL)?;
    quotactl_set(QuotaType::USRQUOTA, device, uid, &limits, QuotaValidFlags::QIF_LIMITS)
}
