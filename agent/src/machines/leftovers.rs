//! Machines that an earlier agent left: those of this agent are ended, all others are left alone.
//!
//! A machine's folder holds `owner.json`, which names the agent that it belongs to and its cgroup. It is written before
//! the cgroup is made, and the folder goes after the cgroup: so what no such file names is another's.

use std::collections::BTreeSet;
use std::io;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};
use stoker_linux::Cgroup;
use ulid::Ulid;

use super::vmm::Folder;
use super::{MachinesError, during};
use crate::owner::{self, Owner};

/// What is written beside a machine.
#[derive(Debug, Serialize, Deserialize)]
struct Owned {
    #[serde(flatten)]
    owner: Owner,
    /// A path below the cgroup v2 mount; its last part is the machine's id.
    cgroup: PathBuf,
}

/// Says in a machine's folder whose it is; `cgroup` is a path below the cgroup v2 mount.
pub(super) fn write_owner(folder: &Folder, owner: &Owner, cgroup: &Path) -> io::Result<()> {
    let owned = Owned {
        owner: owner.clone(),
        cgroup: cgroup.to_owned(),
    };
    owner::write(&folder.owner(), &owned)
}

/// Ends the machines that this agent left when it died, and removes their folders. What else there is below `run_dir` and
/// in the cgroup of all machines is named in the log. Both must be locked.
pub(super) fn end(machines: &Cgroup, mount: &Path, run_dir: &Path, this: &Owner) -> Result<(), MachinesError> {
    let mut others = BTreeSet::new();
    for entry in std::fs::read_dir(run_dir).map_err(during("list", run_dir))? {
        let entry = entry.map_err(during("list", run_dir))?;
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse::<Ulid>().ok()) else {
            continue;
        };
        let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if !is_folder || entry.file_name() != id.to_string().as_str() {
            continue;
        }
        let folder = Folder::new(run_dir, &id.to_string());
        match owner::read::<Owned>(&folder.owner()) {
            Ok(Some(owned)) if owned.owner == *this && is_cgroup_of(&owned.cgroup, id) => {
                tracing::info!(machine = %id, "ending a machine that an earlier run of this agent left");
                Cgroup::at(mount.join(&owned.cgroup)).destroy()?;
                folder.remove().map_err(during("remove", &entry.path()))?;
            }
            Ok(Some(owned)) => {
                let cgroup = mount.join(owned.cgroup);
                tracing::warn!(
                    folder = %entry.path().display(),
                    cgroup = %cgroup.display(),
                    "left alone: a machine of {}",
                    owned.owner
                );
                others.insert(cgroup);
            }
            // Left where the agent died before it wrote the file: nothing of a machine is there.
            Ok(None) if std::fs::remove_dir(entry.path()).is_ok() => {}
            Ok(None) => tracing::warn!(folder = %entry.path().display(), "left alone: nothing says whose it is"),
            Err(error) => {
                tracing::warn!(folder = %entry.path().display(), %error, "left alone: can't read whose it is");
            }
        }
    }
    for cgroup in machines.children()? {
        if !others.contains(cgroup.path()) {
            tracing::warn!(
                cgroup = %cgroup.path().display(),
                "left alone: no machine of this agent in machines.run_dir is in this cgroup"
            );
        }
    }
    Ok(())
}

/// Whether it can be what an agent wrote: nothing else is ever ended.
fn is_cgroup_of(below_mount: &Path, id: Ulid) -> bool {
    let is_below = below_mount
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    is_below
        && below_mount
            .file_name()
            .is_some_and(|name| name == id.to_string().as_str())
}
