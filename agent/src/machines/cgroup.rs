//! The cgroup of all machines, and those of each.

use std::io;
use std::path::{Path, PathBuf};

use stoker_linux::{Cgroup, CgroupError};

mod threads;

pub use threads::ThreadCgroups;

/// The controllers that machines are bounded by.
pub(super) const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

/// The cgroup that the agent moves itself to where it is in one that machines' cgroups are to be below.
const ASIDE: &str = "stokerd-agent";

/// How often the agent looks whether all processes have moved there: those that are being started come later.
const TRIES: u32 = 100;

/// Why machines can't have cgroups of their own that bound them.
#[derive(Debug, thiserror::Error)]
pub enum NoCgroup {
    /// A cgroup can't be made or used.
    #[error("machines.cgroup: {source}{}", hint(.source))]
    Unusable {
        /// What failed.
        #[from]
        source: CgroupError,
    },
    /// The host, or the part of it that this process sees, does not have a controller.
    #[error(
        "machines.cgroup: {} has no controller {controller}, without which machines can't be bounded: it is bound to cgroup \
         v1 (boot with systemd.unified_cgroup_hierarchy=1), or turned off on the kernel's command line, or, in a container, not \
         delegated to it (enable it in the cgroups above, or use the host's cgroup namespace)", path.display()
    )]
    Absent {
        /// `cpu`, `memory` or `pids`.
        controller: &'static str,
        /// The topmost cgroup.
        path: PathBuf,
    },
    /// A cgroup above machines' does not pass a controller on.
    #[error(
        "machines.cgroup: the controller {controller}, without which machines can't be bounded, is not passed on: {source}{}",
        hint(.source)
    )]
    Kept {
        /// `cpu`, `memory` or `pids`.
        controller: &'static str,
        /// What failed.
        source: CgroupError,
    },
}

/// Opens the cgroup at `below` the mount and makes it, and those above it, where they are missing. The controllers that
/// there are become usable in each of them. Where this process is in one that is above it, it moves to another, with all
/// that is in there.
///
/// # Errors
/// Where one can't be made, or there are processes that can't be moved.
pub(super) fn open(mount: &Path, below: &Path) -> Result<Cgroup, CgroupError> {
    step_aside(mount, below)?;
    let mut cgroup = Cgroup::at(mount.to_owned());
    for part in below.components() {
        cgroup = match child(&cgroup, part.as_ref()) {
            Err(CgroupError::Io { path, source, .. }) if source.kind() == io::ErrorKind::AlreadyExists => {
                Cgroup::at(path)
            }
            other => other?,
        };
    }
    Ok(cgroup)
}

/// A cgroup that has processes can't pass controllers on ("no internal process constraint", cgroup-v2.rst), but for the host's
/// topmost one. In a cgroup namespace of its own the agent is in the topmost that it sees, which is not that.
fn step_aside(mount: &Path, below: &Path) -> Result<(), CgroupError> {
    let own = Cgroup::of_this_process(mount)?;
    if own.is_root() || !mount.join(below).starts_with(own.path()) {
        return Ok(());
    }
    let aside = match own.create(ASIDE) {
        Err(CgroupError::Io { path, source, .. }) if source.kind() == io::ErrorKind::AlreadyExists => Cgroup::at(path),
        other => other?,
    };
    for _ in 0..TRIES {
        // One of another PID namespace has no id here.
        let mut processes = own.processes()?;
        processes.retain(|process| *process != 0);
        if processes.is_empty() {
            break;
        }
        for process in processes {
            aside.take(process)?;
        }
    }
    tracing::info!(cgroup = %aside.path().display(), "moved to a cgroup beside those of machines");
    Ok(())
}

/// Sees to it that those below a cgroup, which [`open`] has returned, have the controllers that bound them.
///
/// # Errors
/// [`NoCgroup`] says which they can't have, and why.
pub(super) fn require_controllers(mount: &Path, cgroup: &Cgroup) -> Result<(), NoCgroup> {
    let below = cgroup.path().strip_prefix(mount).unwrap_or(Path::new(""));
    for controller in CONTROLLERS {
        let mut above = Cgroup::at(mount.to_owned());
        if !above.controllers()?.iter().any(|name| name == controller) {
            let path = mount.to_owned();
            return Err(NoCgroup::Absent { controller, path });
        }
        for part in below.components().map(Some).chain([None]) {
            above
                .enable(controller)
                .map_err(|source| NoCgroup::Kept { controller, source })?;
            if let Some(part) = part {
                above = Cgroup::at(above.path().join(part));
            }
        }
    }
    Ok(())
}

/// Makes a new cgroup below one, which lets it have its controllers.
///
/// # Errors
/// Where there is one of that name already, or it can't be made.
pub(super) fn child(parent: &Cgroup, name: &Path) -> Result<Cgroup, CgroupError> {
    let controllers = parent.controllers().unwrap_or_default();
    // One at a time, so that one that can't be had keeps no other away.
    for controller in controllers.iter().filter(|name| CONTROLLERS.contains(&name.as_str())) {
        if let Err(error) = parent.enable(controller) {
            tracing::debug!(controller, %error, "controller not enabled");
        }
    }
    parent.create(name)
}

/// What to do about it.
fn hint(error: &CgroupError) -> &'static str {
    let CgroupError::Io { source, .. } = error else {
        return "";
    };
    match source.kind() {
        io::ErrorKind::ReadOnlyFilesystem => {
            "; the cgroup file system is mounted read-only: run the container privileged"
        }
        io::ErrorKind::PermissionDenied => {
            "; run stokerd as root, or let machines.cgroup name a cgroup that is delegated to it"
        }
        // EBUSY and EOPNOTSUPP.
        io::ErrorKind::ResourceBusy | io::ErrorKind::Unsupported => {
            "; there are processes in that cgroup, and only one without can pass controllers on: let machines.cgroup name another"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write as _;
    use std::os::unix::process::CommandExt as _;
    use std::process::Command;

    use stoker_testkit::cgroup::with_cgroups;

    use super::*;

    #[test]
    fn a_process_starts_in_its_cgroup_and_ends_with_it() {
        with_cgroups(|mount| {
            let name = format!("stoker-test-{}", std::process::id());
            let root = open(mount, &Path::new(&name).join("machines")).unwrap();
            assert_eq!(open(mount, &Path::new(&name).join("machines")).unwrap(), root);
            let cgroup = child(&root, "one".as_ref()).unwrap();
            let again = child(&root, "one".as_ref()).unwrap_err();
            assert!(again.to_string().contains("make the cgroup"), "{again}");
            assert_eq!(cgroup.keyed_number("cgroup.events", "populated"), Some(0));
            let mut procs_file = cgroup.procs_file().unwrap();
            let mut command = Command::new("sh");
            command.args(["-c", "sleep 1000 & sleep 1000"]);
            // SAFETY: the closure only writes to a file that is open already.
            unsafe { command.pre_exec(move || procs_file.write_all(b"0")) };
            let mut process = command.spawn().unwrap();
            let procs = fs::read_to_string(cgroup.path().join("cgroup.procs")).unwrap();
            assert!(procs.lines().any(|pid| pid == process.id().to_string()), "{procs}");
            assert_eq!(cgroup.keyed_number("cgroup.events", "populated"), Some(1));
            assert_eq!(root.children().unwrap(), std::slice::from_ref(&cgroup));
            cgroup.destroy().unwrap();
            cgroup.destroy().unwrap();
            assert!(!process.wait().unwrap().success());
            assert!(!cgroup.path().exists());
            Cgroup::at(mount.join(name)).destroy().unwrap();
        });
    }
}
