//! What accounts have, whose turn it is, and what is left of what fails.

mod disk;

use std::io::Read as _;
use std::path::Path;

use bytes::Bytes;
use tempfile::TempDir;

use super::*;

const MIB: u64 = 1 << 20;

/// A host's images, and the folder that they are in.
struct Host {
    folder: TempDir,
    config: Config,
}

impl Host {
    fn new(more: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let text = format!("[store]\npath = {:?}\n{more}", folder.path().join("state"));
        let config = Config::parse(&text, Path::new("test.toml")).unwrap();
        files::make_own_dir(&config.store.path).unwrap();
        Self { folder, config }
    }

    fn open(&self) -> Images {
        Images::open(&self.config).unwrap()
    }

    /// All files and folders of images, but for the locks.
    fn files(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut todo = vec![self.folder.path().join("state").join(FOLDER)];
        while let Some(folder) = todo.pop() {
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                let path = entry.path();
                if entry.file_type().unwrap().is_dir() {
                    todo.push(path.clone());
                }
                found.push(path.strip_prefix(self.folder.path()).unwrap().display().to_string());
            }
        }
        found.retain(|path| !path.ends_with("/lock"));
        found.sort();
        found
    }
}

fn name(name: &str) -> ImageName {
    let (account, image) = name.split_once('/').unwrap();
    ImageName::new(account, image).unwrap()
}

/// Where an image lies that has no name.
fn unnamed() -> String {
    format!("images/sha256-{:064}", 0)
}

/// The tar of a root file system with one file, of so many bytes, all of them this one.
fn root(byte: u8, size: u64) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(size);
    header.set_mode(0o644);
    let content = std::io::repeat(byte).take(size);
    tar.append_data(&mut header, "file", content).unwrap();
    tar.into_inner().unwrap()
}

async fn import(images: &Images, to: &str, tar: Vec<u8>) -> Result<Image, ImagesError> {
    let mut import = images.slot()?.import(name(to), None);
    for chunk in tar.chunks(MIB as usize) {
        if !import.write(Bytes::copy_from_slice(chunk)).await? {
            break;
        }
    }
    import.finish().await
}

/// Names as `account/image`.
async fn listed(images: &Images, account: Option<&str>, after: Option<&str>, limit: usize) -> Vec<String> {
    let account = account.map(|account| AccountName::new(account).unwrap());
    let found = images.list(account, after.map(name), limit).await.unwrap();
    let names = found.into_iter().map(|image| image.name);
    names
        .map(|name| format!("{}/{}", name.account(), name.image()))
        .collect()
}

/// Waits until images take no more than so much: another test may be about to start a program, which has all that is open for a moment.
async fn swept(images: &Images, used: u64) {
    let begun = std::time::Instant::now();
    let sweep = || {
        images.0.sweep();
        images.0.accounts().used()
    };
    while sweep() > used {
        assert!(begun.elapsed() < Duration::from_secs(60));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn each_account_has_images_of_its_own() {
    let host = Host::new("");
    let images = host.open();
    for to in ["b/web", "a/web", "a/db", "a-b/web"] {
        import(&images, to, root(1, 10)).await.unwrap();
    }
    assert_eq!(
        listed(&images, None, None, 9).await,
        ["a/db", "a/web", "a-b/web", "b/web"]
    );
    assert_eq!(listed(&images, None, Some("a/db"), 2).await, ["a/web", "a-b/web"]);
    assert_eq!(listed(&images, Some("a"), None, 9).await, ["a/db", "a/web"]);
    assert_eq!(listed(&images, Some("c"), None, 9).await, Vec::<String>::new());
    let [of_a, of_b] = [images.get(name("a/web")), images.get(name("b/web"))];
    let (of_a, of_b) = (of_a.await.unwrap(), of_b.await.unwrap());
    assert_eq!(of_a.id, of_b.id);
    assert!(of_a.config.is_some());
    // What one deletes the other has.
    images.delete(name("a/web")).await.unwrap();
    for gone in ["a/web", "c/web"] {
        assert!(matches!(images.get(name(gone)).await, Err(ImagesError::NotFound(_))));
        assert!(matches!(images.delete(name(gone)).await, Err(ImagesError::NotFound(_))));
    }
    assert_eq!(images.get(name("b/web")).await.unwrap().id, of_b.id);
    // The next agent finds the same.
    let again = host.open();
    assert_eq!(listed(&again, None, None, 9).await, ["a/db", "a-b/web", "b/web"]);
    for left in ["a/db", "a-b/web", "b/web"] {
        again.delete(name(left)).await.unwrap();
    }
    swept(&again, 0).await;
    assert_eq!(host.files(), Vec::<String>::new());
}

#[tokio::test]
async fn an_account_takes_in_one_image_at_a_time_and_all_so_many() {
    let host = Host::new("[limits]\nconcurrent_imports = 2");
    let images = host.open();
    let tar = root(1, 3 * MIB);
    let mut first = images.slot().unwrap().import(name("a/web"), None);
    // It has its turn once it has read something.
    for _ in 0..3 {
        assert!(first.write(Bytes::copy_from_slice(&tar[..MIB as usize])).await.unwrap());
    }
    let unnamed = host.config.store.path.join(FOLDER).join("a").join(unnamed());
    std::fs::create_dir(&unnamed).unwrap();
    let mut second = images.slot().unwrap().import(name("a/db"), None);
    while second.write(Bytes::from_static(b"x")).await.unwrap() {}
    // It hears so however slowly it comes, and nothing was swept for it.
    second.waits -= Pace::LEAST.window;
    assert!(!second.write(Bytes::from_static(b"x")).await.unwrap());
    let second = second.finish().await.unwrap_err();
    assert!(matches!(second, ImagesError::AccountBusy { .. }), "{second}");
    assert!(unnamed.exists());
    import(&images, "b/db", root(2, 10)).await.unwrap();
    let _taken = images.slot().unwrap();
    let third = images.slot().map(|_| ()).unwrap_err();
    assert!(matches!(third, ImagesError::Busy { limit: 2 }), "{third}");
    drop(first);
}

/// Waits until nothing of an import is left: that takes a moment, on a thread of its own.
async fn nothing_left(host: &Host, images: &Images) {
    let all = host.config.limits.concurrent_imports as usize;
    let begun = std::time::Instant::now();
    while images.0.slots.available_permits() < all {
        assert!(begun.elapsed() < Duration::from_secs(60));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(host.files(), Vec::<String>::new());
}

#[tokio::test]
async fn what_does_not_come_whole_leaves_nothing() {
    let host = Host::new("");
    let images = host.open();
    let tar = root(1, 3 * MIB);
    for length in [0, 512, 1000, MIB as usize, tar.len() - 1024, tar.len()] {
        // All that there is comes, and is not said to be all.
        let mut import = images.slot().unwrap().import(name("a/web"), None);
        for chunk in tar[..length].chunks(MIB as usize) {
            assert!(import.write(Bytes::copy_from_slice(chunk)).await.unwrap());
        }
        drop(import);
        nothing_left(&host, &images).await;
    }
    for length in [0, 1000, MIB as usize] {
        let error = import(&images, "a/web", tar[..length].to_vec()).await.unwrap_err();
        assert!(matches!(error, ImagesError::Image(_)), "{length}: {error}");
        nothing_left(&host, &images).await;
    }
    let error = import(&images, "a/web", vec![7; 10_000]).await.unwrap_err();
    let is_named = matches!(error, ImagesError::Image(ImageError::NotAnImage { .. }));
    assert!(is_named, "{error}");
    nothing_left(&host, &images).await;
    import(&images, "a/web", tar).await.unwrap();
}

#[tokio::test]
async fn what_a_crash_left_is_gone_at_the_next_start() {
    let host = Host::new("");
    let images = host.open();
    import(&images, "a/web", root(1, 10)).await.unwrap();
    drop(images);
    let expected = host.files();
    let folder = host.config.store.path.join(FOLDER);
    std::fs::create_dir(folder.join("a").join(unnamed())).unwrap();
    for left in ["a/partial/x", "b/partial/x", "b/images", "b/names"] {
        std::fs::create_dir_all(folder.join(left)).unwrap();
    }
    std::fs::write(folder.join("a/partial/x/half"), "half").unwrap();
    std::fs::write(folder.join("b/partial/x/half"), "half").unwrap();
    let images = host.open();
    assert_eq!(host.files(), expected);
    images.get(name("a/web")).await.unwrap();
}

#[tokio::test]
async fn images_whose_names_are_lost_stay_until_they_are_put_back() {
    let host = Host::new("");
    let images = host.open();
    import(&images, "a/web", root(1, 10)).await.unwrap();
    drop(images);
    let names = host.config.store.path.join(FOLDER).join("a/names");
    let away = host.folder.path().join("names");
    std::fs::rename(&names, &away).unwrap();
    let expected = host.files();
    let images = host.open();
    let error = images.get(name("a/web")).await.unwrap_err();
    assert!(
        matches!(error, ImagesError::Image(ImageError::NamesLost { .. })),
        "{error}"
    );
    assert_eq!(host.files(), expected);
    std::fs::rename(&away, &names).unwrap();
    images.get(name("a/web")).await.unwrap();
}

#[tokio::test]
async fn a_pull_that_nobody_waits_for_is_given_up() {
    let host = Host::new("[limits]\nconcurrent_imports = 1");
    let images = host.open();
    // It takes connections, and never answers.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let source = Source {
        reference: format!("{}/web:1", listener.local_addr().unwrap()),
        credentials: None,
    };
    let pull = images.slot().unwrap().pull(name("a/web"), source);
    let (_asked, _) = tokio::task::spawn_blocking(move || listener.accept().unwrap())
        .await
        .unwrap();
    assert!(images.slot().is_err());
    drop(pull);
    nothing_left(&host, &images).await;
    images.slot().unwrap();
}

#[tokio::test]
async fn who_sends_too_slowly_loses_the_place() {
    let host = Host::new("[limits]\nconcurrent_imports = 1");
    let images = host.open();
    let mut import = images.slot().unwrap().import(name("a/web"), None);
    let least = Pace::LEAST;
    let window = usize::try_from(least.rate * least.window.as_secs()).unwrap();
    for (count, is_enough) in [(window * 2, true), (window / 2, false)] {
        // As if the piece before had been taken so long ago.
        import.waits -= least.window;
        let taken = import.write(Bytes::from(vec![0; count])).await;
        match taken {
            Ok(_) if is_enough => {}
            Err(ImagesError::TooSlow(pace)) if !is_enough => assert_eq!(pace, least),
            other => panic!("{count}: {other:?}"),
        }
    }
    drop(import);
    nothing_left(&host, &images).await;
    images.slot().unwrap();
}

#[tokio::test]
async fn a_registry_that_sends_too_slowly_loses_the_place() {
    let host = Host::new("[limits]\nconcurrent_imports = 1");
    let mut images = host.open();
    let window = Duration::from_millis(50);
    Arc::get_mut(&mut images.0).unwrap().rules.pace.window = window;
    // It takes connections, and never answers.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let source = Source {
        reference: format!("{}/web:1", listener.local_addr().unwrap()),
        credentials: None,
    };
    let mut pull = images.slot().unwrap().pull(name("a/web"), source);
    let error = loop {
        if let Pulling::Done(done) = pull.next().await {
            break done.unwrap_err();
        }
    };
    assert!(
        matches!(error, ImagesError::TooSlow(pace) if pace.window == window),
        "{error}"
    );
    nothing_left(&host, &images).await;
    images.slot().unwrap();
}

#[tokio::test]
async fn images_are_pulled_from_where_they_may_be() {
    for (allowed, is_asked) in [
        ("registries = []", false),
        ("registries = ['docker.io', '127.0.0.1:1']", true),
        ("", true),
    ] {
        let host = Host::new(&format!("[limits]\n{allowed}"));
        let images = host.open();
        let source = Source {
            reference: "127.0.0.1:1/web:1".to_owned(),
            credentials: None,
        };
        let mut pull = images.slot().unwrap().pull(name("a/web"), source);
        let error = loop {
            if let Pulling::Done(done) = pull.next().await {
                break done.unwrap_err();
            }
        };
        match error {
            ImagesError::Registry(registry) if !is_asked => assert_eq!(registry, "127.0.0.1:1"),
            ImagesError::Image(ImageError::Registry(_)) if is_asked => {}
            other => panic!("{allowed}: {other}"),
        }
        nothing_left(&host, &images).await;
    }
}
