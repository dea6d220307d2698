//! The database in real files, also where these are damaged, full, held or of another version.

use super::*;

#[tokio::test]
async fn the_host_id_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let first = Store::open(dir.path()).unwrap().owner().clone();
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(dir.path(), &link).unwrap();
    assert_eq!(Store::open(&link).unwrap().owner(), &first);
}

#[tokio::test]
async fn a_failed_call_undoes_itself_alone() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let insert = |store: Store, key: &'static str, fail: bool| async move {
        store
            .call("test", move |c| {
                c.execute("INSERT INTO meta VALUES (?1, 'x')", [key])?;
                if fail {
                    return Err(Fault::Corrupt("on purpose".into()));
                }
                Ok(())
            })
            .await
    };
    let (a, b, c) = tokio::join!(
        insert(store.clone(), "a", false),
        insert(store.clone(), "b", true),
        insert(store.clone(), "c", false)
    );
    assert!(a.is_ok() && b.is_err() && c.is_ok());
    let kept = store
        .call("test", |c| {
            let mut statement = c.prepare("SELECT key FROM meta WHERE value = 'x' ORDER BY key")?;
            let keys = statement.query_map([], |row| row.get::<_, String>(0))?;
            Ok(keys.collect::<Result<Vec<_>, _>>()?)
        })
        .await
        .unwrap();
    assert_eq!(kept, ["a", "c"]);
}

/// A function of some kind, which has no environment.
pub(crate) fn record(name: &str) -> FunctionRecord {
    FunctionRecord {
        name: name.parse().unwrap(),
        uid: Ulid::generate(),
        runtime: "python3.11".into(),
        handler: "app.handler".into(),
        environment: BTreeMap::new(),
        timeout: Duration::from_secs(3),
        amount: v1::Amount {
            cpu_millis: 250,
            memory_mib: 128,
        },
        version: 1,
        code_sha256: "ab".repeat(32),
        code_size: 1234,
        layers: Vec::new(),
        unpacked_bytes: Some(5678),
        freeze: true,
        ephemeral_storage_mib: 512,
        create_time: from_millis(1_700_000_000_123),
        resizing: None,
        kept: None,
    }
}

fn function(id: usize) -> NewFunction {
    NewFunction {
        record: FunctionRecord {
            environment: [("KEY".to_owned(), "x".repeat(1000))].into(),
            ..record(&format!("accounts/acme/functions/f{id}"))
        },
        request_id: None,
        limit: 1_000_000,
        may_create: Ok(()),
    }
}

fn machine_report() -> Report {
    Report::new(v1::event::Event::Machine(v1::Machine::default()))
}

async fn names(store: &Store) -> Vec<String> {
    let functions = store.functions().await.unwrap().into_iter();
    let mut names: Vec<_> = functions.map(|function| function.name.to_string()).collect();
    names.sort();
    names
}

/// Another program holds the database: who only reads is answered, who writes is told so, and served once it is free.
#[tokio::test]
async fn a_busy_database_is_read_and_written_again_later() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    store.create_function(function(1)).await.unwrap();
    let other = Connection::open(dir.path().join("state.db")).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let error = store.create_function(function(2)).await.unwrap_err();
    assert_eq!(error.failure(), Some(Failure::Busy), "{error}");
    let text = error.to_string();
    assert!(text.contains("state.db") && text.contains("fuser"), "{text}");
    assert_eq!(names(&store).await.len(), 1);
    assert_eq!(store.touch().await.unwrap_err().failure(), Some(Failure::Busy));
    other.execute_batch("COMMIT").unwrap();
    store.touch().await.unwrap();
    store.create_function(function(2)).await.unwrap();
    drop(store);
    // At the start too.
    other
        .execute_batch("PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE; DELETE FROM meta; ROLLBACK")
        .unwrap();
    let error = Store::open(dir.path()).unwrap_err();
    assert_eq!(error.failure(), Some(Failure::Busy), "{error}");
    drop(other);
    assert_eq!(names(&Store::open(dir.path()).unwrap()).await.len(), 2);
}

#[test]
fn a_full_disk_loses_nothing_that_was_acknowledged_and_counts_what_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = || tokio::runtime::Builder::new_current_thread().build().unwrap();
    stoker_testkit::disk::with_own_mounts(|| {
        stoker_testkit::disk::mount_small(dir.path(), 2 << 20);
        runtime().block_on(on_a_full_disk(dir.path()));
    });
}

async fn on_a_full_disk(disk: &Path) {
    let ballast = disk.join("ballast");
    let folder = disk.join("state");
    std::fs::create_dir(&folder).unwrap();
    stoker_testkit::disk::fill(&ballast);
    let error = Store::open(&folder).unwrap_err();
    assert_eq!(error.failure(), Some(Failure::Full), "{error}");
    assert!(error.to_string().contains("state.db"), "{error}");
    stoker_testkit::disk::free(&ballast);

    let store = Store::open(&folder).unwrap();
    let mut acknowledged = Vec::new();
    for id in 0..10 {
        store.create_function(function(id)).await.unwrap();
        acknowledged.push(function(id).record.name.to_string());
    }
    stoker_testkit::disk::fill(&ballast);
    // Many at once, so that they share a transaction.
    let calls = (10..200).map(|id| {
        tokio::spawn({
            let store = store.clone();
            async move { (id, store.create_function(function(id)).await) }
        })
    });
    let mut refused = 0;
    for call in calls.collect::<Vec<_>>() {
        match call.await.unwrap() {
            (id, Ok(_)) => acknowledged.push(function(id).record.name.to_string()),
            (_, Err(error)) => {
                assert_eq!(error.failure(), Some(Failure::Full), "{error}");
                refused += 1;
            }
        }
    }
    assert!(refused > 0);
    acknowledged.sort();
    assert_eq!(names(&store).await, acknowledged, "it is still read");
    for _ in 0..3 {
        let error = store.append_report(machine_report(), 1 << 20).await.unwrap_err();
        assert_eq!(error.failure(), Some(Failure::Full), "{error}");
    }
    let decision = StoredDecision {
        machine: None,
        container: None,
        request: None,
        decision: v1::Decision {
            detail: "x".repeat(8192),
            ..Default::default()
        },
    };
    store.append_decisions(vec![decision.clone(); 7]).await.unwrap_err();
    assert_eq!(store.decisions_lost(), 7);

    stoker_testkit::disk::free(&ballast);
    store.touch().await.unwrap();
    store.append_report(machine_report(), 1 << 20).await.unwrap();
    let reports = store.reports_after(0, 100, 1 << 20).await.unwrap();
    let lost = v1::ReportsDropped {
        lifecycle: 3,
        ..Default::default()
    };
    assert_eq!(reports.last().unwrap().event, Some(v1::event::Event::Dropped(lost)));
    store.append_decisions(vec![decision]).await.unwrap();
    store.create_function(function(1000)).await.unwrap();
    drop(store);
    let store = Store::open(&folder).unwrap();
    acknowledged.push(function(1000).record.name.to_string());
    acknowledged.sort();
    assert_eq!(names(&store).await, acknowledged);
    assert_eq!(store.decisions_lost(), 7, "over a restart");
}

#[test]
fn a_read_only_file_system_is_said_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    drop(Store::open(dir.path()).unwrap());
    let error = stoker_testkit::disk::with_own_mounts(|| {
        stoker_testkit::disk::mount_read_only(dir.path());
        Store::open(dir.path()).unwrap_err()
    });
    assert_eq!(error.failure(), Some(Failure::ReadOnly), "{error}");
    assert!(
        error.to_string().contains("state.db") && error.to_string().contains("writable"),
        "{error}"
    );
    Store::open(dir.path()).unwrap();
}

#[tokio::test]
async fn one_that_became_read_only_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    store.create_function(function(1)).await.unwrap();
    let read_only = |on| store.call("test", move |c| Ok(c.pragma_update(None, "query_only", on)?));
    read_only(true).await.unwrap();
    let error = store.create_function(function(2)).await.unwrap_err();
    assert_eq!(error.failure(), Some(Failure::ReadOnly), "{error}");
    assert_eq!(names(&store).await.len(), 1);
    read_only(false).await.unwrap();
    store.create_function(function(2)).await.unwrap();
}

#[tokio::test]
async fn damage_is_said_at_the_start_and_while_it_runs() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("state.db");
    std::fs::write(&file, vec![7; 8192]).unwrap();
    let error = Store::open(dir.path()).unwrap_err();
    assert_eq!(error.failure(), Some(Failure::Damaged), "{error}");
    let text = error.to_string();
    assert!(
        text.contains("state.db") && text.contains("stoker admin restore"),
        "{text}"
    );
    assert_eq!(std::fs::read(&file).unwrap(), vec![7; 8192], "it is left as it was");

    std::fs::remove_file(&file).unwrap();
    let store = Store::open(dir.path()).unwrap();
    for id in 0..20 {
        store.create_function(function(id)).await.unwrap();
    }
    store.close().await;
    let store = Store::open(dir.path()).unwrap();
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[4096..].fill(0x5a);
    std::fs::write(&file, &bytes).unwrap();
    let forget = |c: &Connection| Ok(c.execute_batch("PRAGMA shrink_memory")?);
    store.call("test", forget).await.unwrap();
    let error = store.functions().await.unwrap_err();
    assert_eq!(error.failure(), Some(Failure::Damaged), "{error}");
    let error = store.create_function(function(99)).await.unwrap_err();
    assert_eq!(error.failure(), Some(Failure::Damaged), "{error}");
}

#[tokio::test]
async fn a_thread_that_panics_is_told_of_and_answers_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let early = tokio::time::timeout(Duration::from_millis(20), store.ended()).await;
    assert!(early.is_err(), "it runs");
    let panicked = store.call::<()>("panic", |_| panic!("as the test wants it")).await;
    assert!(matches!(panicked, Err(StoreError::Closed)), "{panicked:?}");
    store.ended().await;
    assert!(matches!(store.functions().await, Err(StoreError::Closed)));
}
