//! Functions and code in real folders.

use std::path::Path;
use std::sync::OnceLock;

use stoker_testkit::zip::zip;
use tempfile::TempDir;

use super::*;
use crate::owner;

const GRACE: Duration = Duration::from_secs(24 * 3600);

struct Host {
    dir: TempDir,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { dir }
    }

    async fn open(&self, database: &str) -> Catalog {
        self.open_with(database, Limits::default(), Arc::new(|_| {})).await
    }

    async fn open_with(&self, database: &str, limits: Limits, deleted: Deleted) -> Catalog {
        let store = Store::open(&self.dir.path().join(database)).unwrap();
        let codes = CodeStore::open(&self.code(), store.owner()).unwrap();
        let may_create: MayCreate = Arc::new(|_, has| match has < 3 {
            true => Ok(()),
            false => Err(TooManyFunctions { has, limit: 3 }),
        });
        let resizing = ResizingDefaults::default();
        let catalog = Catalog::open(store, codes, limits, GRACE, resizing, may_create, deleted);
        catalog.await.unwrap()
    }

    fn code(&self) -> std::path::PathBuf {
        self.dir.path().join("code")
    }

    /// The hashes of the zips that are kept.
    fn kept(&self) -> BTreeSet<String> {
        let names = std::fs::read_dir(self.code().join("objects")).unwrap();
        let hash = |name: &Path| name.file_stem().unwrap().to_str().unwrap().to_owned();
        names.map(|entry| hash(&entry.unwrap().path())).collect()
    }
}

fn name(account: &str, function: &str) -> FunctionName {
    FunctionName::new(account, function).unwrap()
}

/// Makes a function of an account whose zip holds that text.
async fn create(catalog: &Catalog, account: &str, function: &str, text: &str) -> Result<FunctionRecord, CatalogError> {
    create_with(catalog, account, function, text, 512).await
}

/// The same with a `/tmp` of that many MiB, where a container may take 4096 MiB of a machine's scratch disk.
async fn create_with(
    catalog: &Catalog,
    account: &str,
    function: &str,
    text: &str,
    ephemeral_storage_mib: u32,
) -> Result<FunctionRecord, CatalogError> {
    let zip = zip(&[("app.py", 0o644, text.as_bytes())]).unwrap();
    let mut upload = catalog.upload().unwrap();
    assert!(upload.write(zip.into()).await.unwrap());
    let spec = FunctionSpec {
        name: name(account, function),
        runtime: "python3.11".into(),
        handler: "app.handler".into(),
        environment: [("KEY".to_owned(), "value".to_owned())].into(),
        timeout: Duration::from_secs(3),
        amount: v1::Amount {
            cpu_millis: 250,
            memory_mib: 128,
        },
        freeze: true,
        ephemeral_storage_mib,
        resizing: None,
    };
    catalog.create(spec, String::new(), upload.finish().await?, 4096).await
}

#[tokio::test]
async fn memory_is_what_the_database_holds() {
    let host = Host::new();
    let catalog = host.open("state").await;
    let made = create(&catalog, "acme", "a", "1").await.unwrap();
    let gone = create(&catalog, "acme", "b", "2").await.unwrap();
    catalog.delete(gone.name.clone()).await.unwrap();
    assert_eq!(**catalog.get(&made.name).unwrap(), made);
    let twice = create(&catalog, "acme", "a", "3").await.unwrap_err();
    assert!(matches!(twice, CatalogError::AlreadyExists(_)), "{twice}");
    assert_eq!(**catalog.get(&made.name).unwrap(), made);
    let missing = catalog.delete(gone.name.clone()).await.unwrap_err();
    assert!(matches!(missing, CatalogError::NotFound(_)), "{missing}");
    drop(catalog);
    let catalog = host.open("state").await;
    assert_eq!(**catalog.get(&made.name).unwrap(), made);
    assert!(catalog.get(&gone.name).is_none());
}

#[tokio::test]
async fn an_accounts_functions_are_counted_as_they_come_and_go() {
    let host = Host::new();
    let catalog = host.open("state").await;
    let made = create(&catalog, "acme", "a", "1").await.unwrap();
    for function in ["b", "c"] {
        create(&catalog, "acme", function, "1").await.unwrap();
    }
    create(&catalog, "other", "a", "1").await.unwrap();
    assert_eq!(
        (catalog.count("acme"), catalog.count("other"), catalog.count("none")),
        (3, 1, 0)
    );
    let full = create(&catalog, "acme", "d", "4").await.unwrap_err();
    let CatalogError::AccountFull { account, why } = &full else {
        panic!("{full}");
    };
    assert_eq!(
        (account.to_string().as_str(), why.has, why.limit),
        ("accounts/acme", 3, 3)
    );
    assert_eq!(host.kept().len(), 1, "its code is not kept");
    // It is known before the zip is sent; what is there already is told of first.
    let check = async |function: &str| catalog.check_new(&name("acme", function), "").await.unwrap_err();
    assert!(matches!(check("d").await, CatalogError::AccountFull { .. }));
    assert!(matches!(check("a").await, CatalogError::AlreadyExists(_)));
    drop(catalog);
    let catalog = host.open("state").await;
    assert_eq!(catalog.accounts(), ["acme", "other"]);
    assert_eq!(catalog.count("acme"), 3);
    catalog.delete(made.name).await.unwrap();
    catalog.delete(name("other", "a")).await.unwrap();
    assert_eq!(catalog.accounts(), ["acme"]);
    create(&catalog, "acme", "d", "4").await.unwrap();
}

#[tokio::test]
async fn what_takes_more_scratch_disk_than_a_machine_has_is_not_kept() {
    let host = Host::new();
    let catalog = host.open("state").await;
    let error = create_with(&catalog, "acme", "a", "1", 4040).await.unwrap_err();
    let says = error.to_string();
    assert!(
        matches!(error, CatalogError::ScratchTooLarge { needs_mib: 4106, .. }),
        "{says}"
    );
    assert!(
        says.contains("for 4040 MiB of /tmp") && says.contains("raise pool.scratch_gib"),
        "{says}"
    );
    assert!(catalog.get(&name("acme", "a")).is_none() && host.kept().is_empty());
    let made = create_with(&catalog, "acme", "a", "1", 4000).await.unwrap();
    // A page of content, 16 to spare, and a block for the file.
    assert_eq!(made.unpacked_bytes, Some((1 + 16 + 1) * 4096));
    drop(catalog);
    let catalog = host.open("state").await;
    assert_eq!(catalog.get(&made.name).unwrap().scratch_mib(), made.scratch_mib());
}

#[tokio::test]
async fn who_looked_a_function_up_learns_of_its_deletion() {
    let host = Host::new();
    let found = Arc::new(OnceLock::<Arc<Function>>::new());
    let told = Arc::new(OnceLock::new());
    let deleted: Deleted = {
        let (found, told) = (found.clone(), told.clone());
        Arc::new(move |uid| told.set((uid, found.get().unwrap().is_deleted())).unwrap())
    };
    let catalog = host.open_with("state", Limits::default(), deleted).await;
    let made = create(&catalog, "acme", "a", "1").await.unwrap();
    let function = catalog.get(&made.name).unwrap();
    assert!(!function.is_deleted());
    found.set(function).unwrap();
    catalog.delete(made.name.clone()).await.unwrap();
    assert_eq!(told.get(), Some(&(made.uid.to_string(), true)), "before it is told");
    // A later one of that name is another.
    create(&catalog, "acme", "a", "1").await.unwrap();
    assert!(!catalog.get(&made.name).unwrap().is_deleted());
    assert!(found.get().unwrap().is_deleted());
}

#[tokio::test]
async fn listing_goes_by_name_in_pages() {
    let host = Host::new();
    let catalog = host.open("state").await;
    for (account, function) in [("b", "x"), ("a", "z"), ("a", "y"), ("a-a", "x")] {
        create(&catalog, account, function, "1").await.unwrap();
    }
    let list = |account: Option<&str>, after: Option<(&str, &str)>, limit| {
        let account = account.map(|account| AccountName::new(account).unwrap());
        let after = after.map(|(account, function)| name(account, function));
        let listed = catalog.list(account.as_ref(), after.as_ref(), limit).into_iter();
        let short = |f: Arc<Function>| format!("{}/{}", f.name.account(), f.name.function());
        listed.map(short).collect::<Vec<_>>()
    };
    assert_eq!(list(None, None, 2), ["a/y", "a/z"]);
    assert_eq!(list(None, Some(("a", "z")), 9), ["a-a/x", "b/x"]);
    assert_eq!(list(Some("a"), None, 9), ["a/y", "a/z"]);
    assert_eq!(list(Some("a"), Some(("a", "y")), 9), ["a/z"]);
    assert_eq!(list(Some("a"), Some(("a", "y")), 0), Vec::<String>::new());
    assert_eq!(list(Some("c"), None, 9), Vec::<String>::new());
}

/// `store.path` was mistyped, or the database is lost.
#[tokio::test]
async fn a_new_database_removes_no_code() {
    let host = Host::new();
    let catalog = host.open("state").await;
    let made = create(&catalog, "acme", "a", "1").await.unwrap();
    drop(catalog);
    let code = BTreeSet::from([made.code_sha256.clone()]);

    let later = SystemTime::now() + 2 * GRACE;
    let wrong = host.open("sttae").await;
    let orphans = wrong.orphans().await.unwrap();
    assert_eq!(orphans.len(), 1);
    assert_eq!(orphans[0].code_sha256, made.code_sha256);
    let refused = wrong.0.remove_orphans(None, later).await.unwrap_err();
    assert!(
        matches!(refused, CatalogError::Code(CodeError::NotOwner { .. })),
        "{refused}"
    );
    // Nor with a function that is made and deleted there.
    let same = create(&wrong, "acme", "a", "1").await.unwrap();
    assert_eq!(wrong.orphans().await.unwrap(), []);
    wrong.delete(same.name).await.unwrap();
    assert_eq!(host.kept(), code);
    drop(wrong);

    let right = host.open("state").await;
    assert_eq!(right.orphans().await.unwrap(), []);
    assert_eq!(right.0.remove_orphans(None, later).await.unwrap(), []);
    assert_eq!(host.kept(), code);
}

#[tokio::test]
async fn orphans_are_removed_on_request_once_they_are_old() {
    let host = Host::new();
    let lost = host.open("lost").await;
    let made = create(&lost, "acme", "a", "1").await.unwrap();
    let needed = create(&lost, "acme", "b", "2").await.unwrap();
    drop(lost);
    std::fs::remove_file(host.code().join(owner::FILE)).unwrap();
    let one = Limits {
        functions: 1,
        ..Limits::default()
    };
    let catalog = host.open_with("state", one.clone(), Arc::new(|_| {})).await;
    let orphans = catalog.orphans().await.unwrap();
    assert_eq!(orphans.len(), 2);
    let since = orphans[0].since;
    drop(catalog);
    let catalog = host.open_with("state", one, Arc::new(|_| {})).await;
    assert_eq!(catalog.orphans().await.unwrap(), orphans, "the time is durable");

    // Code that a function needs is none, and a call that fails takes none with it that was there before.
    create(&catalog, "acme", "b", "2").await.unwrap();
    let full = create(&catalog, "acme", "c", "1").await.unwrap_err();
    assert!(matches!(full, CatalogError::Full { limit: 1 }), "{full}");
    create(&catalog, "acme", "c", "3").await.unwrap_err();
    assert_eq!(
        host.kept(),
        [made.code_sha256.clone(), needed.code_sha256.clone()].into()
    );

    let remove = async |older_than, now| catalog.0.remove_orphans(older_than, now).await;
    let short = catalog.remove_orphans(Some(GRACE / 2)).await.unwrap_err();
    assert!(matches!(short, CatalogError::GraceTooShort { .. }), "{short}");
    let almost = since + GRACE - Duration::from_secs(1);
    for (older_than, now) in [
        (None, almost),
        (Some(2 * GRACE), since + GRACE),
        (None, SystemTime::UNIX_EPOCH),
    ] {
        assert_eq!(remove(older_than, now).await.unwrap(), []);
    }
    let removed = remove(None, since + GRACE).await.unwrap();
    assert_eq!(removed.len(), 1);
    assert_eq!(removed[0].code_sha256, made.code_sha256);
    assert_eq!(host.kept(), [needed.code_sha256].into());
    assert_eq!(catalog.orphans().await.unwrap(), []);
    // The last function that needs code takes it along.
    catalog.delete(needed.name).await.unwrap();
    assert!(host.kept().is_empty());
}

#[test]
fn a_full_disk_is_said_and_lists_go_on() {
    let host = Host::new();
    stoker_testkit::disk::with_own_mounts(|| {
        stoker_testkit::disk::mount_small(host.dir.path(), 2 << 20);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let catalog = host.open("state").await;
            let made = create(&catalog, "acme", "a", "1").await.unwrap();
            let orphan = host.dir.path().join("orphan");
            std::fs::write(&orphan, "zip").unwrap();
            let ballast = host.dir.path().join("ballast");
            stoker_testkit::disk::fill(&ballast);
            let noise: String = (0..20_000u32)
                .map(|n| n.wrapping_mul(2_654_435_761).to_string())
                .collect();
            let full = create(&catalog, "acme", "b", &noise).await.unwrap_err();
            assert!(
                matches!(&full, CatalogError::Code(code) if code.is_disk_full()),
                "{full:?}"
            );
            let status = tonic::Status::from(full);
            assert_eq!(status.code(), tonic::Code::ResourceExhausted, "{status:?}");
            assert_eq!(**catalog.get(&made.name).unwrap(), made);
            assert_eq!(catalog.list(None, None, 9).len(), 1);
            // An agent that starts serves them too, though it can't note that there is an orphan.
            std::fs::rename(orphan, host.code().join(format!("objects/{}.zip", "a".repeat(64)))).unwrap();
            drop(catalog);
            let catalog = host.open("state").await;
            assert_eq!(**catalog.get(&made.name).unwrap(), made);
            stoker_testkit::disk::free(&ballast);
            create(&catalog, "acme", "b", &noise).await.unwrap();
        });
    });
}
