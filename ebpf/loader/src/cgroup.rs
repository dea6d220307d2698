//! Names of cgroups.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use crate::error::LedgerError;

/// The id of a cgroup of the v2 hierarchy, as `bpf_get_current_cgroup_id` returns it. No other gets it while the
/// system runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CgroupId(u64);

// === impl CgroupId ===

impl CgroupId {
    /// The root of the hierarchy: all threads that are in no other cgroup, idle threads among them.
    const ROOT: Self = Self(1);

    /// The id of the cgroup whose folder is `path`: its inode number (`kernfs_node.id` on 64-bit systems).
    ///
    /// # Errors
    ///
    /// Where `path` does not exist or is not in a cgroup v2 file system.
    pub fn of(path: &Path) -> Result<Self, LedgerError> {
        let failed = |source: std::io::Error| LedgerError::Cgroup {
            path: path.to_owned(),
            source,
        };
        let system = statfs(path).map_err(|errno| failed(errno.into()))?;
        let folder = fs::metadata(path).map_err(failed)?;
        if system.filesystem_type() != CGROUP2_SUPER_MAGIC || !folder.is_dir() {
            return Err(LedgerError::NotCgroup { path: path.to_owned() });
        }
        Ok(Self(folder.ino()))
    }

    /// The id as a number.
    pub const fn get(self) -> u64 {
        self.0
    }

    pub(crate) fn is_countable(self) -> bool {
        self > Self::ROOT
    }
}

impl From<u64> for CgroupId {
    fn from(id: u64) -> Self {
        Self(id)
    }
}

impl fmt::Display for CgroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cgroup {}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_is_no_cgroup() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(
            CgroupId::of(folder.path()),
            Err(LedgerError::NotCgroup { .. })
        ));
        let missing = CgroupId::of(&folder.path().join("missing")).unwrap_err();
        assert!(matches!(missing, LedgerError::Cgroup { .. }));
        assert!(missing.to_string().contains("missing"), "{missing}");
    }
}
