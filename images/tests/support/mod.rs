//! Images as tests make them, from the specification alone, and how they look to a kernel.

#![allow(dead_code, reason = "each test program uses some of it")]

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};
use stoker_images::{Config, Credentials, Digest, Image, ImageError, Limits, Store};
use tempfile::TempDir;

pub(crate) const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
pub(crate) const ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
pub(crate) const PLAIN: &str = "application/vnd.oci.image.layer.v1.tar";
pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const CONFIG: &str = "application/vnd.oci.image.config.v1+json";

/// A tar.
#[derive(Default, Clone)]
pub(crate) struct Tar(Vec<u8>);

/// What a header of it says.
pub(crate) struct Entry<'a> {
    pub(crate) path: &'a [u8],
    pub(crate) kind: u8,
    pub(crate) link: &'a [u8],
    pub(crate) mode: u32,
    pub(crate) owner: (u64, u64),
    pub(crate) pax: &'a [(&'a str, &'a [u8])],
    pub(crate) content: &'a [u8],
}

impl Default for Entry<'_> {
    fn default() -> Self {
        Self {
            path: b"",
            kind: b'0',
            link: b"",
            mode: 0o644,
            owner: (0, 0),
            pax: &[],
            content: b"",
        }
    }
}

impl Tar {
    pub(crate) fn file(self, path: &str, content: &[u8]) -> Self {
        self.entry(&Entry {
            path: path.as_bytes(),
            content,
            ..Entry::default()
        })
    }

    pub(crate) fn folder(self, path: &str, mode: u32) -> Self {
        self.entry(&Entry {
            path: path.as_bytes(),
            kind: b'5',
            mode,
            ..Entry::default()
        })
    }

    pub(crate) fn link(self, path: &str, target: &str) -> Self {
        self.linked(path, b'2', target)
    }

    pub(crate) fn hard_link(self, path: &str, target: &str) -> Self {
        self.linked(path, b'1', target)
    }

    pub(crate) fn special(self, path: &str, kind: u8) -> Self {
        self.linked(path, kind, "")
    }

    fn linked(self, path: &str, kind: u8, target: &str) -> Self {
        self.entry(&Entry {
            path: path.as_bytes(),
            kind,
            link: target.as_bytes(),
            ..Entry::default()
        })
    }

    /// With a pax header where one is needed.
    pub(crate) fn entry(mut self, entry: &Entry<'_>) -> Self {
        let mut pax: Vec<(&str, &[u8])> = entry.pax.to_vec();
        if entry.path.len() > 100 {
            pax.push(("path", entry.path));
        }
        if entry.link.len() > 100 {
            pax.push(("linkpath", entry.link));
        }
        let records: Vec<u8> = pax.iter().flat_map(|(key, value)| record(key, value)).collect();
        if !records.is_empty() {
            self.header(b"pax", b'x', b"", 0o644, (0, 0), records.len());
            self.content(&records);
        }
        let [path, link] = [entry.path, entry.link].map(|name| &name[..name.len().min(100)]);
        self.header(path, entry.kind, link, entry.mode, entry.owner, entry.content.len());
        self.content(entry.content);
        self
    }

    fn header(&mut self, path: &[u8], kind: u8, link: &[u8], mode: u32, owner: (u64, u64), size: usize) {
        let mut header = tar::Header::new_ustar();
        let old = header.as_old_mut();
        old.name[..path.len()].copy_from_slice(path);
        old.linkname[..link.len()].copy_from_slice(link);
        header.set_entry_type(tar::EntryType::new(kind));
        header.set_mode(mode);
        header.set_uid(owner.0);
        header.set_gid(owner.1);
        header.set_mtime(1_000_000_000);
        header.set_size(size as u64);
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
    }

    fn content(&mut self, content: &[u8]) {
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
    }

    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    [format!("{length} {key}=").as_bytes(), value, b"\n"].concat()
}

/// An OCI image layout in a folder.
pub(crate) struct Layout(pub(crate) TempDir);

impl Layout {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("blobs/sha256")).unwrap();
        fs::write(folder.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        Self(folder)
    }

    /// One with an image of these layers and nothing else.
    pub(crate) fn of(layers: &[Tar]) -> Self {
        let mut layout = Self::new();
        let layers: Vec<(&str, Vec<u8>)> = layers.iter().map(|layer| (PLAIN, layer.clone().finish())).collect();
        let image = layout.image(&layers, json!({}));
        layout.index(&[image]);
        layout
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn blob_path(&self, digest: &str) -> PathBuf {
        self.path().join("blobs").join(digest.replace(':', "/"))
    }

    /// Puts bytes in it; what comes back names them.
    pub(crate) fn blob(&mut self, media_type: &str, bytes: &[u8]) -> Value {
        let digest = Digest::of(bytes).to_string();
        fs::write(self.blob_path(&digest), bytes).unwrap();
        json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
    }

    pub(crate) fn json(&mut self, media_type: &str, value: &Value) -> Value {
        self.blob(media_type, value.to_string().as_bytes())
    }

    /// An image of layers, uncompressed as they are given; they are compressed as their media type says.
    pub(crate) fn image(&mut self, layers: &[(&str, Vec<u8>)], config: Value) -> Value {
        let config = config_of(layers.iter().map(|(_, tar)| &**tar), &config);
        self.image_of(layers, &config)
    }

    /// The same with a configuration as it is given.
    pub(crate) fn image_of(&mut self, layers: &[(&str, Vec<u8>)], config: &Value) -> Value {
        let layers: Vec<Value> = layers
            .iter()
            .map(|(media_type, tar)| self.blob(media_type, &compress(media_type, tar)))
            .collect();
        let config = self.json(CONFIG, config);
        let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers});
        self.json(MANIFEST, &manifest)
    }

    pub(crate) fn index(&self, manifests: &[Value]) {
        let index = json!({"schemaVersion": 2, "manifests": manifests});
        fs::write(self.path().join("index.json"), index.to_string()).unwrap();
    }

    /// The layout as a tar.
    pub(crate) fn tar(&self) -> Vec<u8> {
        let mut tar = Tar::default();
        let mut todo = vec![self.path().to_owned()];
        while let Some(folder) = todo.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                let name = path.strip_prefix(self.path()).unwrap().to_str().unwrap().to_owned();
                if path.is_dir() {
                    tar = tar.folder(&name, 0o755);
                    todo.push(path);
                } else {
                    tar = tar.file(&name, &fs::read(path).unwrap());
                }
            }
        }
        tar.finish()
    }
}

pub(crate) fn config_of<'a>(layers: impl Iterator<Item = &'a [u8]>, config: &Value) -> Value {
    let diff_ids: Vec<String> = layers.map(|tar| Digest::of(tar).to_string()).collect();
    json!({"architecture": "amd64", "os": "linux", "config": config,
           "rootfs": {"type": "layers", "diff_ids": diff_ids}})
}

pub(crate) fn compress(media_type: &str, bytes: &[u8]) -> Vec<u8> {
    if media_type.ends_with("gzip") {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    } else if media_type.ends_with("zstd") {
        zstd::encode_all(bytes, 1).unwrap()
    } else {
        bytes.to_vec()
    }
}

/// A store in a folder of its own, whose limits are small.
pub(crate) struct TestStore {
    pub(crate) folder: TempDir,
    pub(crate) store: Store,
}

impl TestStore {
    pub(crate) fn new() -> Self {
        Self::with(Limits {
            unpacked: 64 << 20,
            entries: 5000,
            names: 1 << 20,
            document: 256 << 10,
            ..Limits::default()
        })
    }

    pub(crate) fn with(limits: Limits) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), limits).unwrap();
        Self { folder, store }
    }

    /// Imports layers as an image, and has the kernel read it.
    pub(crate) fn mounted(&self, layers: &[Tar]) -> (Mounted, Config) {
        let layout = Layout::of(layers);
        let image = self.store.import("test", layout.path(), None).unwrap();
        (Mounted::new(&image.path), image.config)
    }

    /// That an image is refused, and nothing is left of it.
    pub(crate) fn refused(&self, path: &Path) -> ImageError {
        let error = self.store.import("test", path, None).unwrap_err();
        self.assert_empty();
        error
    }

    pub(crate) fn assert_empty(&self) {
        assert_eq!(files(self.folder.path()), Vec::<String>::new());
    }
}

/// Pulls an image, and keeps it.
pub(crate) async fn pull(
    store: &Store,
    name: &str,
    reference: &str,
    credentials: Option<&Credentials>,
) -> Result<Image, ImageError> {
    let fetched = store.fetch(reference, credentials, |_| {}).await?;
    store.keep(name, fetched)
}

/// All that is in a store but its lock and its folders.
pub(crate) fn files(store: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for folder in ["images", "names", "partial"] {
        for entry in fs::read_dir(store.join(folder)).unwrap() {
            found.push(format!("{folder}/{}", entry.unwrap().file_name().to_str().unwrap()));
        }
    }
    found.sort();
    found
}

/// A tar in a file.
pub(crate) fn file_of(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// An image as the kernel has it, mounted for the thread that is running, until that ends.
pub(crate) struct Mounted(TempDir);

impl Mounted {
    pub(crate) fn new(image: &Path) -> Self {
        let checked = Command::new("fsck.erofs").arg(image).output().unwrap();
        assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let mount = |arguments: &[&str], paths: &[&Path]| {
            let output = Command::new("mount").args(arguments).args(paths).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        };
        mount(&["--make-rprivate"], &[Path::new("/")]);
        mount(&["-t", "erofs", "-o", "loop,ro"], &[image, folder.path()]);
        Self(folder)
    }

    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    pub(crate) fn read(&self, path: &str) -> String {
        fs::read_to_string(self.path(path)).unwrap()
    }

    /// All paths with what they are: `d`, `f`, `p`, or `-> TARGET`.
    pub(crate) fn list(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut todo = vec![self.0.path().to_owned()];
        while let Some(folder) = todo.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                let kind = fs::symlink_metadata(&path).unwrap().file_type();
                let what = if kind.is_dir() {
                    "d".to_owned()
                } else if kind.is_symlink() {
                    format!("-> {}", fs::read_link(&path).unwrap().display())
                } else if kind.is_file() {
                    "f".to_owned()
                } else {
                    "p".to_owned()
                };
                found.push(format!(
                    "{} {what}",
                    path.strip_prefix(self.0.path()).unwrap().display()
                ));
                if kind.is_dir() {
                    todo.push(path);
                }
            }
        }
        found.sort();
        found
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).output();
    }
}
