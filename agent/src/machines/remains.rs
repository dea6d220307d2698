//! What is left of a machine once its process is to be no more: ended, and removed once that is recorded.

use std::io;
use std::time::Duration;

use stoker_linux::{Cgroup, CgroupError, KILL_LIMIT};
use stoker_policy::MAX_WEIGHT;
use ulid::Ulid;

use super::ThreadCgroups;
use super::cpu::{self, Schedulers};
use super::vmm::Folder;
use crate::failpoints::{self, Failpoint};

/// How long to wait before a VMM that did not end is killed again.
const KILL_AGAIN: Duration = Duration::from_secs(5);

/// Cgroup and folder of a machine that has ended. Until they are removed the next agent finds the machine.
#[derive(Debug)]
pub struct Remains {
    pub(super) cgroup: Cgroup,
    pub(super) folder: Folder,
}

// === impl Remains ===

impl Remains {
    /// Removes them, once the machine's end is recorded: that a folder has no cgroup any more says so.
    pub async fn remove(self) {
        let path = self.cgroup.path().to_owned();
        let removed = tokio::task::spawn_blocking(move || {
            let Self { cgroup, folder } = self;
            cgroup.destroy().map_err(io::Error::other)?;
            failpoints::reach(Failpoint::MachineCgroupRemoved);
            remove(&folder);
            Ok::<_, io::Error>(())
        });
        if let Err(error) = removed.await.map_err(io::Error::from).flatten() {
            tracing::error!(%error, path = %path.display(), "a machine's cgroup is left over");
        }
    }
}

/// Lets a machine be urgent no more, and [empties](empty) its cgroup.
pub(super) async fn calm_and_empty(schedulers: &Schedulers, id: Ulid, cgroup: &Cgroup) {
    let leaves = schedulers.clone();
    let left = tokio::task::spawn_blocking(move || leaves.leave(id)).await;
    if let Err(error) = left.map_err(io::Error::from).flatten() {
        tracing::warn!(machine = %id, %error, "it may still be urgent");
    }
    empty(cgroup).await;
    if let Err(error) = schedulers.forget(id) {
        tracing::warn!(machine = %id, %error, "its place in the scheduler stays taken");
    }
}

/// Ends what is in a cgroup; resolves when nothing runs in it, however long that takes, for until then it has its memory.
pub(super) async fn empty(cgroup: &Cgroup) {
    end(cgroup, KILL_LIMIT, KILL_AGAIN).await;
}

/// The same, where that may take so long before it is killed again, after a pause.
pub(super) async fn end(cgroup: &Cgroup, limit: Duration, pause: Duration) {
    // Killed, it takes CPU only to be gone, and gives its memory back when it is.
    let weighed = cgroup.write("cpu.weight", &MAX_WEIGHT.to_string());
    for error in [weighed, cpu::lift_limit(&ThreadCgroups::of(cgroup))]
        .into_iter()
        .filter_map(Result::err)
    {
        tracing::debug!(%error, "a machine may take longer to end");
    }
    loop {
        let again = cgroup.clone();
        let emptied = tokio::task::spawn_blocking(move || again.empty(limit)).await;
        match emptied.map_err(io::Error::from) {
            Ok(Ok(())) => return,
            Ok(Err(error @ CgroupError::StillThere { .. })) => {
                tracing::error!(%error, "a machine does not end; what it has stays counted");
            }
            Ok(Err(error)) => return tracing::error!(%error, "can't tell whether a machine has ended"),
            Err(error) => {
                let path = cgroup.path().display();
                return tracing::error!(%error, %path, "can't tell whether a machine has ended");
            }
        }
        tokio::time::sleep(pause).await;
    }
}

pub(super) fn remove(folder: &Folder) {
    if let Err(error) = folder.remove() {
        tracing::error!(%error, ?folder, "a machine's folder is left over");
    }
}
