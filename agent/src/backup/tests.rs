//! Archives of real folders, whole and damaged.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use stoker_proto::v1;
use stoker_testkit::zip::zip;
use tempfile::TempDir;

use super::*;
use crate::catalog::{Catalog, FunctionSpec, ResizingDefaults};
use crate::code::CodeStore;
use crate::config::{Config, Limits};
use crate::lock::Lock;
use crate::names::FunctionName;
use crate::store::{FunctionRecord, KEY_FILE, Store, StoreError};

struct Host {
    dir: TempDir,
    config: Config,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.store.path = dir.path().join("state");
        config.code.path = dir.path().join("code");
        Self { dir, config }
    }

    async fn catalog(&self) -> Catalog {
        let store = Store::open(&self.config.store.path).unwrap();
        let codes = CodeStore::open(&self.config.code.path, store.owner()).unwrap();
        let (limits, grace) = (Limits::default(), Duration::ZERO);
        Catalog::open(
            store,
            codes,
            limits,
            grace,
            ResizingDefaults::default(),
            Arc::new(|_, _| Ok(())),
            Arc::new(|_| {}),
        )
        .await
        .unwrap()
    }

    async fn close(&self, catalog: Catalog) {
        drop(catalog);
        let wal = self.config.store.path.join("state.db-wal");
        eventually("the database to be closed", || !wal.exists()).await;
    }

    /// An archive of a host with two functions, and what these are.
    async fn archived(&self, with_key: bool) -> (PathBuf, Vec<FunctionRecord>) {
        let catalog = self.catalog().await;
        for (id, text) in [("a", "1"), ("b", "2")] {
            create(&catalog, id, text).await;
        }
        let file = self.dir.path().join("archive");
        let archive = std::fs::File::create(&file).unwrap();
        catalog.backup(with_key, archive).await.unwrap();
        let functions = functions(&catalog);
        self.close(catalog).await;
        (file, functions)
    }

    fn key(&self) -> PathBuf {
        self.config.store.path.join(KEY_FILE)
    }

    /// Whether nothing was put there.
    fn is_empty(&self) -> bool {
        let names = std::fs::read_dir(&self.config.store.path).unwrap();
        names
            .map(|entry| entry.unwrap().file_name())
            .all(|name| name == "stokerd.lock")
    }
}

async fn create(catalog: &Catalog, id: &str, text: &str) -> FunctionRecord {
    create_with(catalog, id, text, &[]).await
}

async fn create_with(catalog: &Catalog, id: &str, text: &str, layers: &[&str]) -> FunctionRecord {
    let mut upload = catalog.upload().unwrap();
    let of = |name: &str, text: &str| zip(&[(name, 0o644, text.as_bytes())]).unwrap();
    upload.write(of("app.py", text).into()).await.unwrap();
    for layer in layers {
        upload.begin_layer().await.unwrap();
        upload.write(of("lib/data", layer).into()).await.unwrap();
    }
    let spec = FunctionSpec {
        name: FunctionName::new("acme", id).unwrap(),
        runtime: "python3.11".into(),
        handler: "app.handler".into(),
        environment: [("TOKEN".to_owned(), format!("secret of {id}"))].into(),
        timeout: Duration::from_secs(3),
        amount: v1::Amount {
            cpu_millis: 250,
            memory_mib: 128,
        },
        freeze: true,
        ephemeral_storage_mib: 512,
        resizing: None,
    };
    let staged = upload.finish().await.unwrap();
    catalog.create(spec, String::new(), staged, 4096).await.unwrap()
}

fn functions(catalog: &Catalog) -> Vec<FunctionRecord> {
    let all = catalog.list(None, None, 100).into_iter();
    all.map(|function| FunctionRecord::clone(&function)).collect()
}

async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = std::time::Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(60), "waited for {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn a_host_comes_back_as_it_was() {
    let host = Host::new();
    let (archive, archived) = host.archived(true).await;
    assert_eq!(read_through(&archive).unwrap().files.len(), 4);
    let other = Host::new();
    let restored = restore(&archive, &other.config, false).await.unwrap();
    assert_eq!((restored.codes, restored.replaced), (2, None));
    // Also before the agent has put the key in its place.
    assert_eq!(check(&other.config).await.unwrap().problems, [""; 0]);
    let catalog = other.catalog().await;
    assert_eq!(functions(&catalog), archived);
    assert_eq!(catalog.orphans().await.unwrap(), []);
    other.close(catalog).await;
    let checked = check(&other.config).await.unwrap();
    assert_eq!((checked.codes, checked.orphans, checked.problems), (2, 0, vec![]));
}

#[tokio::test]
async fn layers_are_archived_and_checked_as_code_is() {
    let host = Host::new();
    let catalog = host.catalog().await;
    create_with(&catalog, "a", "1", &["x", "y"]).await;
    create_with(&catalog, "b", "2", &["y"]).await;
    let archived = functions(&catalog);
    let file = host.dir.path().join("archive");
    let archive = std::fs::File::create(&file).unwrap();
    catalog.backup(true, archive).await.unwrap();
    host.close(catalog).await;
    let other = Host::new();
    let restored = restore(&file, &other.config, false).await.unwrap();
    assert_eq!(restored.codes, 4);
    let catalog = other.catalog().await;
    assert_eq!(functions(&catalog), archived);
    other.close(catalog).await;
    let checked = check(&other.config).await.unwrap();
    assert_eq!((checked.codes, checked.orphans, checked.problems), (4, 0, vec![]));
    let layer = format!("objects/{}.zip", archived[0].layers[0].code_sha256);
    std::fs::remove_file(other.config.code.path.join(layer)).unwrap();
    let problems = check(&other.config).await.unwrap().problems;
    assert!(
        matches!(&problems[..], [one] if one.contains("missing")),
        "{problems:?}"
    );
}

#[tokio::test]
async fn without_its_key_an_archive_is_not_restored() {
    let host = Host::new();
    let (archive, archived) = host.archived(false).await;
    let secret = std::fs::read(host.key()).unwrap();
    let content = std::fs::read(&archive).unwrap();
    assert!(!content.windows(secret.len()).any(|window| window == secret));
    let other = Host::new();
    let error = restore(&archive, &other.config, false).await.unwrap_err();
    assert!(matches!(error, BackupError::Key { .. }), "{error}");
    assert!(other.is_empty());
    std::fs::copy(host.key(), other.key()).unwrap();
    restore(&archive, &other.config, false).await.unwrap();
    assert_eq!(functions(&other.catalog().await), archived);
}

#[tokio::test]
async fn what_is_there_is_replaced_only_where_that_is_said_and_kept() {
    let host = Host::new();
    let (archive, archived) = host.archived(true).await;
    let other = Host::new();
    let catalog = other.catalog().await;
    create(&catalog, "theirs", "3").await;
    let theirs = functions(&catalog);
    other.close(catalog).await;
    let their_key = std::fs::read(other.key()).unwrap();
    let error = restore(&archive, &other.config, false).await.unwrap_err();
    assert!(matches!(error, BackupError::Exists { .. }), "{error}");
    let restored = restore(&archive, &other.config, true).await.unwrap();
    let catalog = other.catalog().await;
    assert_eq!(functions(&catalog), archived);
    other.close(catalog).await;
    assert_eq!(std::fs::read(other.key()).unwrap(), std::fs::read(host.key()).unwrap());
    // Back again, by hand.
    std::fs::rename(restored.replaced.unwrap(), other.config.store.path.join("state.db")).unwrap();
    let error = Store::open(&other.config.store.path).unwrap_err();
    assert!(matches!(error, StoreError::Key(_)), "{error}");
    let is_theirs = |path: &PathBuf| std::fs::read(path).is_ok_and(|bytes| bytes == their_key);
    let names = std::fs::read_dir(&other.config.store.path).unwrap();
    let kept = names.map(|entry| entry.unwrap().path()).find(is_theirs).unwrap();
    std::fs::rename(kept, other.key()).unwrap();
    assert_eq!(functions(&other.catalog().await), theirs);
}

#[tokio::test]
async fn a_damaged_archive_changes_nothing() {
    let host = Host::new();
    let (archive, _) = host.archived(true).await;
    let whole = std::fs::read(&archive).unwrap();
    let mut places = Vec::new();
    for entry in tar::Archive::new(whole.as_slice()).entries().unwrap() {
        let entry = entry.unwrap();
        places.push((entry.raw_file_position() as usize, entry.size() as usize));
    }
    assert_eq!(places.len(), 5);
    let other = Host::new();
    let damaged = other.dir.path().join("damaged");
    let refuses = async |bytes: &[u8], what: String| {
        std::fs::write(&damaged, bytes).unwrap();
        assert!(read_through(&damaged).is_err(), "{what}");
        assert!(restore(&damaged, &other.config, false).await.is_err(), "{what}");
        assert!(other.is_empty(), "{what}");
    };
    for (start, bytes) in places {
        for at in [start, start + bytes / 2, start + bytes - 1] {
            let mut changed = whole.clone();
            changed[at] ^= 1;
            // A figure of the manifest that says nothing of the files may be any.
            if start > 512 {
                refuses(&changed, format!("a bit of {at}")).await;
            }
            refuses(&whole[..at], format!("{at} bytes of it")).await;
        }
    }
    refuses(&whole[..0], "nothing of it".into()).await;
}

/// Deletes a function in the middle of a backup.
struct Deletes {
    to: std::fs::File,
    catalog: Option<(Catalog, FunctionName)>,
}

impl io::Write for Deletes {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some((catalog, name)) = self.catalog.take() {
            tokio::runtime::Handle::current()
                .block_on(catalog.delete(name))
                .unwrap();
        }
        self.to.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

#[tokio::test]
async fn a_function_that_is_deleted_meanwhile_is_in_it_with_its_code() {
    let host = Host::new();
    let catalog = host.catalog().await;
    let made = create(&catalog, "a", "1").await;
    let archive = host.dir.path().join("archive");
    let to = Deletes {
        to: std::fs::File::create(&archive).unwrap(),
        catalog: Some((catalog.clone(), made.name.clone())),
    };
    catalog.backup(true, to).await.unwrap();
    assert!(catalog.get(&made.name).is_none());
    let zip = host.config.code.path.join(format!("objects/{}.zip", made.code_sha256));
    eventually("its code to go", || !zip.exists()).await;
    let other = Host::new();
    restore(&archive, &other.config, false).await.unwrap();
    assert_eq!(functions(&other.catalog().await), [made]);
    assert_eq!(check(&other.config).await.unwrap().problems, [""; 0]);
}

#[tokio::test]
async fn a_check_names_what_is_wrong() {
    let host = Host::new();
    let (_, functions) = host.archived(false).await;
    let zip = |function: &FunctionRecord| {
        host.config
            .code
            .path
            .join(format!("objects/{}.zip", function.code_sha256))
    };
    let problems = async || check(&host.config).await.unwrap().problems;
    assert_eq!(problems().await, [""; 0]);

    let mut bytes = std::fs::read(zip(&functions[0])).unwrap();
    bytes[7] ^= 1;
    std::fs::write(zip(&functions[0]), bytes).unwrap();
    std::fs::remove_file(zip(&functions[1])).unwrap();
    let found = problems().await;
    let says = |function: &FunctionRecord, problem: &str| {
        let is_it = |found: &&String| found.contains(&function.code_sha256) && found.contains(problem);
        assert_eq!(found.iter().filter(is_it).count(), 1, "{found:?}");
    };
    says(&functions[0], "damaged");
    says(&functions[1], "missing");
    assert_eq!(found.len(), 2, "{found:?}");

    let key = std::fs::read(host.key()).unwrap();
    std::fs::write(host.key(), [7; 32]).unwrap();
    assert!(problems().await.iter().any(|problem| problem.contains("store.key")));
    std::fs::write(host.key(), key).unwrap();

    let file = host.config.store.path.join("state.db");
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[4096 * 3..4096 * 4].fill(0x5a);
    std::fs::write(&file, bytes).unwrap();
    let damaged = check(&host.config).await;
    assert!(damaged.is_err() || damaged.is_ok_and(|checked| checked.problems.len() > 2));
}

#[tokio::test]
async fn folders_that_an_agent_uses_are_left_alone() {
    let host = Host::new();
    let (archive, _) = host.archived(true).await;
    let folder: &Path = &host.config.code.path;
    let _lock = Lock::folder(folder, "code.path").unwrap();
    for refused in [
        restore(&archive, &host.config, true).await.map(drop),
        check(&host.config).await.map(drop),
    ] {
        assert!(matches!(refused, Err(BackupError::Lock(_))), "{refused:?}");
    }
}
