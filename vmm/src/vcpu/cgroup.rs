//! The cgroup of the vCPUs' threads: a threaded one (cgroup-v2.rst), so that what the guest may use of the host's CPUs is limited and
//! counted apart from what the VMM itself does.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

/// Why the vCPUs' threads are not in the cgroup that they are to be in. A guest that could escape its limits so never runs.
#[derive(Debug, thiserror::Error)]
pub enum VcpuCgroupError {
    /// It can't be opened.
    #[error(
        "cannot open {}: {source}; `vcpus_cgroup` must name a threaded cgroup below the one that this process is in, and this user \
         must be able to write it", path.display()
    )]
    Open {
        /// Its file `cgroup.threads`.
        path: PathBuf,
        /// The underlying error.
        source: io::Error,
    },
    /// A thread can't be moved there.
    #[error("cannot move a vCPU's thread by {}: {source}{}", path.display(), hint(.source))]
    Move {
        /// Its file `cgroup.threads`.
        path: PathBuf,
        /// The underlying error.
        source: io::Error,
    },
}

/// The cgroup that vCPUs' threads move to.
#[derive(Debug)]
pub struct VcpuCgroup {
    path: PathBuf,
    threads: File,
}

// === impl VcpuCgroup ===

impl VcpuCgroup {
    /// Opens the cgroup in that folder.
    ///
    /// # Errors
    /// Where it has no file that threads can be moved by, or that can't be written.
    pub fn open(folder: &Path) -> Result<Self, VcpuCgroupError> {
        let path = folder.join("cgroup.threads");
        match File::options().write(true).open(&path) {
            Ok(threads) => Ok(Self { path, threads }),
            Err(source) => Err(VcpuCgroupError::Open { path, source }),
        }
    }

    /// Moves a thread of this process there; 0 is the calling one.
    ///
    /// # Errors
    /// Where the kernel does not let it, as when the cgroup has been removed meanwhile.
    pub fn take(&self, thread: libc::pid_t) -> Result<(), VcpuCgroupError> {
        let id = thread.to_string();
        (&self.threads)
            .write_all(id.as_bytes())
            .map_err(|source| VcpuCgroupError::Move {
                path: self.path.clone(),
                source,
            })
    }
}

/// What to do about it.
fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENODEV) => "; the cgroup was removed meanwhile",
        Some(libc::EOPNOTSUPP) => "; it is not a threaded cgroup below the one that this process is in",
        Some(libc::EACCES | libc::EPERM) => {
            "; this user must be able to write the `cgroup.procs` of the cgroup above too"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_is_not_there_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = VcpuCgroup::open(&folder.path().join("vcpus")).unwrap_err().to_string();
        assert!(
            error.contains("vcpus/cgroup.threads") && error.contains("vcpus_cgroup"),
            "{error}"
        );
    }

    #[test]
    fn one_that_does_not_take_the_thread_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        // Takes nothing, as the file of a cgroup that was removed.
        std::os::unix::fs::symlink("/dev/full", folder.path().join("cgroup.threads")).unwrap();
        let cgroup = VcpuCgroup::open(folder.path()).unwrap();
        let error = cgroup.take(0).unwrap_err().to_string();
        assert!(error.contains("cannot move a vCPU's thread"), "{error}");
    }

    #[test]
    fn one_that_is_removed_meanwhile_is_told() {
        stoker_testkit::cgroup::with_cgroups(|mount| {
            let name = format!("stoker-test-vcpus-{}", std::process::id());
            let cgroup = stoker_linux::Cgroup::at(mount.to_owned()).create(name).unwrap();
            let opened = VcpuCgroup::open(cgroup.path()).unwrap();
            cgroup.remove().unwrap();
            let error = opened.take(0).unwrap_err().to_string();
            assert!(error.ends_with("removed meanwhile"), "{error}");
        });
    }

    #[test]
    fn the_error_says_what_to_do() {
        let of = |errno| {
            let source = io::Error::from_raw_os_error(errno);
            let path = "/c".into();
            VcpuCgroupError::Move { path, source }.to_string()
        };
        assert!(of(libc::ENODEV).ends_with("removed meanwhile"));
        assert!(of(libc::EOPNOTSUPP).contains("not a threaded cgroup"));
        assert!(of(libc::EACCES).contains("cgroup above"));
        assert!(of(libc::EIO).ends_with("(os error 5)"));
    }
}
