//! The cgroup of all machines, and those of each.

use std::path::Path;

use stoker_linux::{Cgroup, CgroupError};

/// The controllers that machines are limited by. One may be absent, or bound to cgroup v1: then there is no such limit.
const CONTROLLERS: [&str; 4] = ["cpu", "io", "memory", "pids"];

/// Opens the cgroup at `below` the mount and makes it, and those above it, where they are missing. The controllers that
/// there are become usable in each of them.
///
/// # Errors
/// Where one can't be made.
pub(super) fn open(mount: &Path, below: &Path) -> Result<Cgroup, CgroupError> {
    let mut cgroup = Cgroup::at(mount.to_owned());
    for part in below.components() {
        cgroup = match child(&cgroup, part.as_ref()) {
            Err(CgroupError::Io { path, source, .. }) if source.kind() == std::io::ErrorKind::AlreadyExists => {
                Cgroup::at(path)
            }
            other => other?,
        };
    }
    Ok(cgroup)
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

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write as _;
    use std::os::unix::process::CommandExt as _;
    use std::process::Command;

    use super::super::tests::with_cgroups;
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
