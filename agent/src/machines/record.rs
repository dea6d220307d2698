//! What is written beside a machine, for the agent that comes after this one: `machine.json` in its folder.
//!
//! Not synced: a host that crashes has no machines left, and a file that was renamed is whole for whoever reads it.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use stoker_credits::Mode;
use stoker_policy::{ContainerId, Kind, Shape};

use super::{Ceiling, LaunchRecord, Size};
use crate::files::{read_json, write_json};
use crate::names::FunctionName;
use crate::owner::Owner;

/// The file's name.
pub(super) const FILE: &str = "machine.json";

/// A machine, as an agent has to know it that did not start it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The agent that it belongs to.
    pub owner: Owner,
    /// A path below the cgroup v2 mount; its last part is the machine's id.
    pub cgroup: PathBuf,
    /// What it has loaded.
    pub runtime: Arc<str>,
    /// What it started with.
    pub shape: Shape,
    /// The most that it may ever have; what it started with where an earlier version started it.
    #[serde(default)]
    pub ceiling: Option<Ceiling>,
    /// What it was asked to have last, where that was ever another size.
    #[serde(default)]
    pub size: Option<Size>,
    /// When it was made: time since 1970.
    pub created: Duration,
    /// From its start to its guest's answer; nothing before that.
    pub boot_duration: Option<Duration>,
    /// What becomes of it without credits, where something else was asked for than is configured.
    #[serde(default)]
    pub mode: Option<Mode>,
    /// The one account that it serves; nothing of an account is in it before it is written here.
    pub account: Option<Arc<str>>,
    /// Its containers; none is made before it is written here.
    pub containers: BTreeMap<ContainerId, ContainerRecord>,
    /// What runs in it instead, where an account launched it.
    #[serde(default)]
    pub launched: Option<Box<LaunchRecord>>,
}

/// A container.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ContainerRecord {
    /// What it is.
    pub kind: Kind,
    /// Of its function.
    pub function: FunctionName,
    /// When it was made: time since 1970.
    pub created: Duration,
}

/// The file; clones are the same.
#[derive(Clone, Debug)]
pub struct RecordFile(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    latest: Mutex<Latest>,
    /// The version that is in the file. Locked while one is written.
    saved: tokio::sync::Mutex<u64>,
}

#[derive(Debug)]
struct Latest {
    record: Record,
    version: u64,
}

// === impl RecordFile ===

impl RecordFile {
    /// Writes a new machine's. Blocks.
    ///
    /// # Errors
    /// Where it can't be written.
    pub(crate) fn create(folder: &Path, record: Record) -> io::Result<Self> {
        let file = Self::over(folder, record);
        write_json(&file.0.path, &file.latest().record, false)?;
        Ok(file)
    }

    /// The one in a machine's folder; `None` where there is none. Blocks.
    ///
    /// # Errors
    /// Where it can't be read or is not what an agent wrote.
    pub(crate) fn find(folder: &Path) -> io::Result<Option<Self>> {
        let record = read_json(&folder.join(FILE))?;
        Ok(record.map(|record| Self::over(folder, record)))
    }

    fn over(folder: &Path, record: Record) -> Self {
        Self(Arc::new(Shared {
            path: folder.join(FILE),
            latest: Mutex::new(Latest { record, version: 0 }),
            saved: tokio::sync::Mutex::new(0),
        }))
    }

    /// As it stands, saved or not.
    #[must_use]
    pub fn get(&self) -> Record {
        self.latest().record.clone()
    }

    /// Changes it in memory; [`Self::save`] writes it.
    pub fn change(&self, change: impl FnOnce(&mut Record)) {
        let mut latest = self.latest();
        change(&mut latest.record);
        latest.version += 1;
    }

    /// Resolves once all that was changed before is in the file.
    ///
    /// # Errors
    /// Where it can't be written, as when the machine's folder is gone.
    pub async fn save(&self) -> io::Result<()> {
        let mut saved = self.0.saved.lock().await;
        let (record, version) = {
            let latest = self.latest();
            if latest.version == *saved {
                return Ok(());
            }
            (latest.record.clone(), latest.version)
        };
        let path = self.0.path.clone();
        tokio::task::spawn_blocking(move || write_json(&path, &record, false)).await??;
        *saved = version;
        Ok(())
    }

    /// Every change leaves it whole, so a panic elsewhere does no harm.
    fn latest(&self) -> MutexGuard<'_, Latest> {
        self.0.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use ulid::Ulid;

    use super::*;

    pub(in super::super) fn record(owner: Owner, cgroup: PathBuf) -> Record {
        Record {
            owner,
            cgroup,
            runtime: "provided".into(),
            shape: Shape {
                vcpus: 1,
                memory_mib: 128,
                drive_mib: 512,
                baseline_millis: 200,
            },
            ceiling: None,
            size: None,
            created: Duration::from_millis(1),
            boot_duration: None,
            mode: None,
            account: None,
            containers: BTreeMap::new(),
            launched: None,
        }
    }

    #[tokio::test]
    async fn what_is_saved_is_found_by_the_next() {
        let dir = tempfile::tempdir().unwrap();
        assert!(RecordFile::find(dir.path()).unwrap().is_none());
        let owner = Owner {
            host: Ulid::generate(),
            store: "/store".into(),
        };
        let first = record(owner, "machines/m".into());
        let file = RecordFile::create(dir.path(), first.clone()).unwrap();
        let found = || RecordFile::find(dir.path()).unwrap().unwrap().get();
        assert_eq!(found(), first);
        file.change(|record| record.account = Some("a".into()));
        assert_eq!(found(), first, "only in memory");
        file.save().await.unwrap();
        assert_eq!(found(), file.get());
        assert_eq!(file.get().account.as_deref(), Some("a"));
        // One that is saved already is not written again.
        std::fs::remove_file(dir.path().join(FILE)).unwrap();
        file.save().await.unwrap();
        assert!(RecordFile::find(dir.path()).unwrap().is_none());
        std::fs::write(dir.path().join(FILE), "{").unwrap();
        assert!(RecordFile::find(dir.path()).is_err());
    }

    #[test]
    fn a_machine_of_before_there_were_drives_has_none() {
        let owner = Owner {
            host: Ulid::generate(),
            store: "/store".into(),
        };
        let now = record(owner, "machines/m".into());
        let text = serde_json::to_string(&now).unwrap();
        let before = text.replace(",\"drive_mib\":512", "");
        assert_ne!(before, text);
        let found: Record = serde_json::from_str(&before).unwrap();
        assert_eq!((found.shape.drive_mib, found.shape.memory_mib), (0, 128));
    }

    #[tokio::test]
    async fn a_folder_that_is_gone_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let owner = Owner {
            host: Ulid::generate(),
            store: "/store".into(),
        };
        let file = RecordFile::create(dir.path(), record(owner, "m".into())).unwrap();
        dir.close().unwrap();
        file.change(|record| record.account = Some("a".into()));
        assert!(file.save().await.is_err());
    }
}
