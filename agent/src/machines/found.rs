//! Machines that an earlier run of this agent left; those of others are left alone.
//!
//! A machine's folder holds `machine.json`, which names the agent that it belongs to and its cgroup. It is written before
//! the cgroup is made, and the folder goes after the cgroup: so what no such file names is another's. The cgroup goes once
//! the machine's end is recorded: so one without a cgroup is a machine that never ran, or of which no more is to be told.

use std::collections::BTreeSet;
use std::path::{Component, Path};

use stoker_linux::Cgroup;
use ulid::Ulid;

use super::process::Machine;
use super::record::{self, RecordFile};
use super::vmm::Folder;
use super::vmm_process::VmmProcess;
use super::{MachinesError, during};
use crate::files;
use crate::owner::Owner;

/// Finds the machines of this agent. What else there is below `run_dir` and in the cgroup of all machines is named in the
/// log. Both must be locked.
pub(super) fn look(
    machines: &Cgroup,
    mount: &Path,
    run_dir: &Path,
    this: &Owner,
) -> Result<Vec<Machine>, MachinesError> {
    let (mut found, mut known) = (Vec::new(), BTreeSet::new());
    for entry in std::fs::read_dir(run_dir).map_err(during("list", run_dir))? {
        let entry = entry.map_err(during("list", run_dir))?;
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse::<Ulid>().ok()) else {
            continue;
        };
        let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if !is_folder || entry.file_name() != id.to_string().as_str() {
            continue;
        }
        match RecordFile::find(&entry.path()) {
            Ok(Some(record)) => {
                let said = record.get();
                let cgroup = Cgroup::at(mount.join(&said.cgroup));
                known.insert(cgroup.path().to_owned());
                let folder = Folder::new(run_dir, &id.to_string());
                let is_own = said.owner == *this && is_cgroup_of(&said.cgroup, id);
                if is_own && !cgroup.path().exists() {
                    super::remove(&folder);
                } else if is_own {
                    found.push(Machine {
                        id,
                        folder,
                        vmm: VmmProcess::find(&cgroup)?,
                        cgroup,
                        record,
                    });
                } else {
                    tracing::warn!(
                        folder = %entry.path().display(),
                        cgroup = %cgroup.path().display(),
                        "left alone: a machine of {}",
                        said.owner
                    );
                }
            }
            // Left where the agent died before it wrote the file: nothing of a machine is there.
            Ok(None) if remove_empty(&entry.path()).is_ok() => {}
            Ok(None) => tracing::warn!(folder = %entry.path().display(), "left alone: nothing says whose it is"),
            Err(error) => {
                tracing::warn!(folder = %entry.path().display(), %error, "left alone: can't read whose it is");
            }
        }
    }
    for cgroup in machines.children()? {
        if !known.contains(cgroup.path()) {
            tracing::warn!(
                cgroup = %cgroup.path().display(),
                "left alone: no machine of this agent in machines.run_dir is in this cgroup"
            );
        }
    }
    Ok(found)
}

/// Removes the folder of a machine that was not begun.
fn remove_empty(folder: &Path) -> std::io::Result<()> {
    files::remove_unfinished(&folder.join(record::FILE))?;
    std::fs::remove_dir(folder)
}

/// Whether it can be what an agent wrote: nothing else is ever touched.
fn is_cgroup_of(below_mount: &Path, id: Ulid) -> bool {
    let is_below = below_mount
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    is_below
        && below_mount
            .file_name()
            .is_some_and(|name| name == id.to_string().as_str())
}
