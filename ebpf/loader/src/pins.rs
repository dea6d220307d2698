//! The folder in which programs and maps are pinned, so that they stay when their process ends.
//!
//! ```text
//! FOLDER/                  0700, locked by the process that uses it
//!   1-8f0c6e1b2a93d754/    the pins of one version, complete
//!   unfinished             pins that are being made or removed: of a process that ended meanwhile
//! ```
//!
//! A version comes and goes by one rename, so one that is there is whole. What else is in the folder is not touched.

use std::fs::{self, DirBuilder, File, Permissions, TryLockError};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use nix::unistd::geteuid;
use stoker_ebpf_types::LAYOUT;

use crate::error::PinsError;
use crate::kernel::Kernel;
use crate::ledger::Limits;
use crate::objects::OBJECT;

const UNFINISHED: &str = "unfinished";

/// For its owner alone.
const MODE: u32 = 0o700;

/// Names what is loaded: two that differ in anything have different names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Version(String);

/// A folder for pins, in use by this process alone.
#[derive(Debug)]
pub(crate) struct Pins {
    folder: PathBuf,
    _lock: File,
}

// === impl Version ===

impl Version {
    pub(crate) fn new(limits: Limits, kernel: &Kernel) -> Self {
        let mut hasher = DefaultHasher::new();
        (OBJECT, limits, kernel).hash(&mut hasher);
        Self(format!("{LAYOUT}-{:016x}", hasher.finish()))
    }

    fn parse(name: &str) -> Option<Self> {
        let (layout, hash) = name.split_once('-')?;
        let ours = hash.len() == 16
            && hash.bytes().all(|digit| digit.is_ascii_hexdigit())
            && !layout.is_empty()
            && layout.bytes().all(|digit| digit.is_ascii_digit());
        ours.then(|| Self(name.to_owned()))
    }

    /// Whether its maps mean the same as this version's.
    pub(crate) fn is_readable(&self) -> bool {
        self.0
            .split_once('-')
            .is_some_and(|(layout, _)| layout == LAYOUT.to_string())
    }
}

// === impl Pins ===

impl Pins {
    /// Makes the folder where it is not there, sees to it that it is this user's and process's alone, and removes what others
    /// did not finish.
    pub(crate) fn open(folder: &Path) -> Result<Self, PinsError> {
        let failed = |doing| move |source: io::Error| PinsError::failed(doing, folder, source);
        let there = folder.ancestors().find(|path| path.is_dir()).unwrap_or(folder);
        let system = statfs(there).map_err(|errno| failed("looking for")(errno.into()))?;
        if system.filesystem_type() != BPF_FS_MAGIC {
            return Err(PinsError::NoBpffs(folder.to_owned()));
        }
        DirBuilder::new()
            .recursive(true)
            .mode(MODE)
            .create(folder)
            .map_err(failed("making"))?;
        // Anyone may make folders at the top of a BPF file system.
        let metadata = fs::symlink_metadata(folder).map_err(failed("looking at"))?;
        if !metadata.is_dir() || metadata.uid() != geteuid().as_raw() {
            return Err(PinsError::Foreign(folder.to_owned()));
        }
        fs::set_permissions(folder, Permissions::from_mode(MODE)).map_err(failed("setting the mode of"))?;
        let lock = File::open(folder).map_err(failed("opening"))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(PinsError::InUse(folder.to_owned())),
            Err(TryLockError::Error(source)) => return Err(failed("locking")(source)),
        }
        let pins = Self {
            folder: folder.to_owned(),
            _lock: lock,
        };
        pins.remove_unfinished()?;
        Ok(pins)
    }

    /// The folder of a version's pins.
    pub(crate) fn of(&self, version: &Version) -> PathBuf {
        self.folder.join(&version.0)
    }

    /// An empty folder for pins that are to be [published](Self::publish).
    pub(crate) fn begin(&self) -> Result<PathBuf, PinsError> {
        let path = self.folder.join(UNFINISHED);
        match DirBuilder::new().mode(MODE).create(&path) {
            Ok(()) => Ok(path),
            Err(source) => Err(PinsError::failed("making", &path, source)),
        }
    }

    /// Makes what lies in the folder that was begun the pins of a version that has none.
    pub(crate) fn publish(&self, version: &Version) -> Result<(), PinsError> {
        let path = self.of(version);
        fs::rename(self.folder.join(UNFINISHED), &path).map_err(|source| PinsError::failed("making", &path, source))
    }

    /// Removes the pins of a version, if there are any. What nobody holds by other means is detached and gone.
    pub(crate) fn discard(&self, version: &Version) -> Result<(), PinsError> {
        let path = self.of(version);
        match fs::rename(&path, self.folder.join(UNFINISHED)) {
            Ok(()) => self.remove_unfinished(),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(source) => Err(PinsError::failed("removing", &path, source)),
        }
    }

    /// Removes what was begun and not published.
    pub(crate) fn remove_unfinished(&self) -> Result<(), PinsError> {
        let path = self.folder.join(UNFINISHED);
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(PinsError::failed("removing", &path, error)),
            _ => Ok(()),
        }
    }

    /// The versions that have pins.
    pub(crate) fn versions(&self) -> Result<Vec<Version>, PinsError> {
        let failed = |source| PinsError::failed("listing", &self.folder, source);
        let mut versions = Vec::new();
        for entry in fs::read_dir(&self.folder).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            versions.extend(name.to_str().and_then(Version::parse));
        }
        Ok(versions)
    }

    /// Removes the folder, where nothing else is in it.
    pub(crate) fn remove(&self) -> Result<(), PinsError> {
        match fs::remove_dir(&self.folder) {
            Err(error) if error.kind() != ErrorKind::DirectoryNotEmpty => {
                Err(PinsError::failed("removing", &self.folder, error))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use stoker_ebpf_types::{KvmExitFields, RssStatFields, ThrottleFields, WaitFields};

    use super::*;

    #[test]
    fn a_version_is_named_after_all_that_is_loaded() {
        let kernel = Kernel {
            rss_stat: RssStatFields::DEFAULT,
            throttle: ThrottleFields::default(),
            waits: WaitFields::default(),
            kvm_exit: None,
            uncharged_ns: 0,
        };
        let version = Version::new(Limits::HOST, &kernel);
        assert_eq!(version, Version::new(Limits::HOST, &kernel));
        let with_kvm = Kernel {
            kvm_exit: Some(KvmExitFields::default()),
            ..kernel.clone()
        };
        assert_ne!(version, Version::new(Limits::HOST, &with_kvm));
        let larger = Limits {
            tasks: Limits::HOST.tasks + 1,
            ..Limits::HOST
        };
        assert_ne!(version, Version::new(larger, &kernel));
        assert_eq!(Version::parse(&version.0), Some(version.clone()));
        assert!(version.is_readable());
    }

    #[test]
    fn only_names_of_versions_are_ours() {
        for name in [
            "",
            "unfinished",
            "1",
            "1-",
            "x-0123456789abcdef",
            "+1-0123456789abcdef",
            "-0123456789abcdef",
            "1-+123456789abcdef",
            "1-0123456789abcde",
            "1-0123456789abcdeg",
        ] {
            assert_eq!(Version::parse(name), None, "{name}");
        }
        let other = Version::parse("2-0123456789abcdef").unwrap();
        assert!(!other.is_readable());
    }
}
