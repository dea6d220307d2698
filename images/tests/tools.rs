//! Images that other programs make, and a real registry: umoci, skopeo and docker-registry as Debian has them. They run where
//! `cargo xtask test` has put them; without it these tests say so and end.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking, its helpers too"
)]

use std::{
    env, fs,
    io::{BufRead as _, BufReader},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use stoker_images::{Credentials, ImageError, Limits, RegistryError, Store};
use stoker_testkit::CACHE;
use support::{Mounted, TestStore, files, pull};

mod support;

/// `secret`, by bcrypt.
const USERS: &str = "user:$2b$04$h/Tzco22h1WP5DSYDM5J0eewGPZqI5/jsoXKLYYMIiaW3qRguPYQ6\n";

/// The folder in which Debian's packages are unpacked.
struct Tools(PathBuf);

impl Tools {
    fn find() -> Option<Self> {
        let Some(cache) = env::var_os(CACHE) else {
            eprintln!("{CACHE} is not set: `cargo xtask test images` makes what this test needs, and sets it");
            return None;
        };
        Some(Self(Path::new(&cache).join("image-tools")))
    }

    /// A program on the libraries that were unpacked with it, the C library and its loader among them.
    fn command(&self, name: &str, folder: &Path) -> Command {
        let [usr, root] = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"].map(|path| self.0.join(path));
        let mut command = Command::new(root.join("ld-linux-x86-64.so.2"));
        command
            .arg("--library-path")
            .arg(env::join_paths([usr, root]).unwrap())
            .arg(self.0.join("usr/bin").join(name))
            .current_dir(folder)
            .env("HOME", folder);
        command
    }

    /// Runs a program with these words, which have no spaces in them.
    fn run(&self, folder: &Path, words: &str) {
        let mut words = words.split_whitespace();
        let output = self
            .command(words.next().unwrap(), folder)
            .args(words)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// skopeo, which wants to be told whom it trusts.
    fn copy(&self, folder: &Path, words: &str) {
        fs::write(
            folder.join("policy.json"),
            r#"{"default":[{"type":"insecureAcceptAnything"}]}"#,
        )
        .unwrap();
        self.run(folder, &format!("skopeo --policy policy.json copy {words}"));
    }

    /// The image with its layers compressed by zstd, in the layout `zstd`.
    fn zstd(&self, folder: &Path) {
        self.copy(
            folder,
            "--dest-compress-format zstd --dest-compress oci:image:v1 oci:zstd:v1",
        );
        let mut blobs = fs::read_dir(folder.join("zstd/blobs/sha256")).unwrap();
        let is_zstd = |bytes: Vec<u8>| bytes.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]);
        assert!(blobs.any(|blob| is_zstd(fs::read(blob.unwrap().path()).unwrap())));
    }

    /// An image in the layout `image`, tag `v1`: this machine's `/etc`, of which later layers change something.
    fn image(&self, folder: &Path) {
        let new = folder.join("new");
        fs::create_dir_all(new.join("apt")).unwrap();
        fs::write(new.join("passwd"), "web:x:101:102::/srv:/bin/sh\n").unwrap();
        fs::write(new.join("apt/only"), "only").unwrap();
        for words in [
            "init --layout image",
            "new --image image:v1",
            "insert --image image:v1 /etc /etc",
            "insert --image image:v1 new/passwd /etc/passwd",
            "insert --image image:v1 --whiteout /etc/debian_version",
            "insert --image image:v1 --opaque new/apt /etc/apt",
            "config --image image:v1 --config.user web --config.cmd serve --config.cmd -v --config.env A=b \
             --config.stopsignal SIGQUIT --config.exposedports 80/tcp --config.workingdir /srv",
        ] {
            self.run(folder, &format!("umoci {words}"));
        }
    }
}

/// docker-registry, on a port of this machine that it finds itself.
struct Registry {
    process: Child,
    address: String,
}

impl Registry {
    fn start(tools: &Tools, folder: &Path, users: Option<&str>) -> Self {
        let auth = users.map(|users| {
            let path = folder.join("users");
            fs::write(&path, users).unwrap();
            format!("auth:\n  htpasswd:\n    realm: test\n    path: {}\n", path.display())
        });
        let config = format!(
            "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: 127.0.0.1:0\n{}",
            folder.join("registry").display(),
            auth.unwrap_or_default(),
        );
        fs::write(folder.join("registry.yml"), config).unwrap();
        let mut command = tools.command("docker-registry", folder);
        let mut process = command
            .args(["serve", "registry.yml"])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let mut lines = lines.map_while(Result::ok);
        let address = lines.find_map(|line| Some(line.split_once("listening on ")?.1.split_once('"')?.0.to_owned()));
        std::thread::spawn(move || lines.for_each(drop));
        Self {
            process,
            address: address.unwrap(),
        }
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// That a folder of an image is as one of this machine's, but for what is named.
fn assert_same(ours: &Path, theirs: &Path, but: &[&str]) -> usize {
    let mut count = 0;
    for entry in fs::read_dir(theirs).unwrap() {
        let name = entry.unwrap().file_name();
        let [ours, theirs] = [ours, theirs].map(|folder| folder.join(&name));
        if but.iter().any(|path| theirs == Path::new(path)) {
            continue;
        }
        count += 1;
        let [a, b] = [&ours, &theirs].map(|path| fs::symlink_metadata(path).unwrap());
        assert_eq!(
            (a.mode(), a.uid(), a.gid()),
            (b.mode(), b.uid(), b.gid()),
            "{}",
            theirs.display()
        );
        if b.is_dir() {
            count += assert_same(&ours, &theirs, but);
        } else if b.is_symlink() {
            assert_eq!(fs::read_link(&ours).unwrap(), fs::read_link(&theirs).unwrap());
        } else if b.is_file() {
            assert!(
                fs::read(&ours).unwrap() == fs::read(&theirs).unwrap(),
                "{}",
                theirs.display()
            );
        }
    }
    count
}

fn store() -> TestStore {
    TestStore::with(Limits::default())
}

#[test]
fn what_umoci_and_skopeo_write_is_imported() {
    let Some(tools) = Tools::find() else { return };
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    tools.image(folder);
    tools.copy(folder, "oci:image:v1 docker-archive:saved.tar:web:1");
    tools.copy(folder, "oci:image:v1 oci-archive:archive.tar:v1");
    tools.zstd(folder);
    let store = store();
    let image = store.store.import("web", &folder.join("image"), Some("v1")).unwrap();
    let config = &image.config;
    assert_eq!(
        (config.user.uid, config.user.gid, &*config.user.home),
        (101, 102, "/srv")
    );
    assert_eq!(
        (&*config.cmd, &*config.working_dir, config.stop_signal),
        (&["serve".into(), "-v".into()][..], "/srv", 3)
    );
    assert!(config.env.contains(&"A=b".to_owned()));
    assert_eq!(config.exposed_ports[0].number, 80);
    let mounted = Mounted::new(&image.path);
    let but = ["/etc/passwd", "/etc/apt", "/etc/debian_version"];
    let count = assert_same(&mounted.path("etc"), Path::new("/etc"), &but);
    assert!(count > 100, "{count}");
    assert_eq!(mounted.read("etc/passwd"), "web:x:101:102::/srv:/bin/sh\n");
    assert_eq!(fs::read_dir(mounted.path("etc/apt")).unwrap().count(), 1);
    assert!(!mounted.path("etc/debian_version").exists());
    let bytes = fs::read(&image.path).unwrap();
    for (path, wanted) in [
        ("saved.tar", None),
        ("saved.tar", Some("web:1")),
        ("archive.tar", Some("v1")),
        ("zstd", None),
    ] {
        // Docker's configuration of it has other words, and so another digest.
        let other = store.store.import("other", &folder.join(path), wanted).unwrap();
        assert_eq!(other.config, image.config, "{path}");
        let root = |bytes: &[u8]| bytes[2048..].to_vec();
        assert!(root(&fs::read(&other.path).unwrap()) == root(&bytes), "{path}");
    }
}

#[tokio::test]
async fn images_are_pulled_from_a_registry() {
    let Some(tools) = Tools::find() else { return };
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    tools.image(folder);
    tools.zstd(folder);
    let registry = Registry::start(&tools, folder, None);
    let to = format!("oci:image:v1 docker://{}/acme/web", registry.address);
    tools.copy(folder, &format!("--digestfile digest --dest-tls-verify=false {to}:1"));
    tools.copy(folder, &format!("--dest-tls-verify=false --format v2s2 {to}:docker"));
    tools.copy(
        folder,
        &format!(
            "--dest-tls-verify=false oci:zstd:v1 docker://{}/acme/zstd:1",
            registry.address
        ),
    );
    let store = store();
    let imported = store.store.import("imported", &folder.join("image"), None).unwrap();
    let reference = |rest: &str| format!("{}/acme/web{rest}", registry.address);
    let pulled = pull(&store.store, "pulled", &reference(":1"), None).await.unwrap();
    assert_eq!(pulled.id, imported.id);
    // Nothing was there before.
    for name in ["web:docker", "zstd:1", "web:1"] {
        let other = TestStore::with(Limits::default());
        let image = pull(&other.store, "new", &format!("{}/acme/{name}", registry.address), None)
            .await
            .unwrap();
        assert_eq!(image.config, imported.config, "{name}");
        assert!(
            fs::read(&image.path).unwrap()[2048..] == fs::read(&imported.path).unwrap()[2048..],
            "{name}"
        );
    }
    // As the registry has it: what was pushed may be in other words than umoci's.
    let digest = fs::read_to_string(folder.join("digest")).unwrap();
    let by_digest = TestStore::with(Limits::default());
    let pulled = pull(&by_digest.store, "digest", &reference(&format!("@{digest}")), None).await;
    assert_eq!(pulled.unwrap().id, imported.id);
    let before = files(store.folder.path());
    for missing in [
        ":2",
        "-other:1",
        "@sha256:0000000000000000000000000000000000000000000000000000000000000000",
    ] {
        let error = pull(&store.store, "missing", &reference(missing), None)
            .await
            .unwrap_err();
        assert!(is_status(&error, 404), "{error}");
    }
    assert_eq!(files(store.folder.path()), before);
}

fn is_status(error: &ImageError, expected: u16) -> bool {
    matches!(error, ImageError::Registry(RegistryError::Status { status, .. }) if *status == expected)
}

#[tokio::test]
async fn a_registry_that_wants_a_password_is_told_it() {
    let Some(tools) = Tools::find() else { return };
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    tools.image(folder);
    let registry = Registry::start(&tools, folder, Some(USERS));
    let reference = format!("{}/web:1", registry.address);
    tools.copy(
        folder,
        &format!("--dest-tls-verify=false --dest-creds user:secret oci:image:v1 docker://{reference}"),
    );
    let store = store();
    let error = pull(&store.store, "web", &reference, None).await.unwrap_err();
    assert!(
        matches!(error, ImageError::Registry(RegistryError::Login { .. })),
        "{error}"
    );
    let mut credentials = Credentials {
        username: "user".to_owned(),
        password: "wrong".to_owned(),
    };
    let error = pull(&store.store, "web", &reference, Some(&credentials))
        .await
        .unwrap_err();
    assert!(is_status(&error, 401), "{error}");
    store.assert_empty();
    credentials.password = "secret".to_owned();
    pull(&store.store, "web", &reference, Some(&credentials)).await.unwrap();
    Store::open(store.folder.path(), Limits::default())
        .unwrap()
        .get("web")
        .unwrap();
}
