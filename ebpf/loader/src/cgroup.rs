//! Names of cgroups.

use std::fmt;

/// The id of a cgroup of the v2 hierarchy, as `bpf_get_current_cgroup_id` returns it: the inode number of its folder
/// (`kernfs_node.id` on 64-bit systems). No other gets it while the system runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CgroupId(u64);

// === impl CgroupId ===

impl CgroupId {
    /// The root of the hierarchy: all threads that are in no other cgroup, idle threads among them.
    const ROOT: Self = Self(1);

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
