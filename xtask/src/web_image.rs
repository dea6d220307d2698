//! A web server as a container image: Debian's nginx, in an archive as `docker save` writes it. No registry is asked.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use serde_json::json;

use crate::{
    cache::Cache,
    setup::{
        Step, Work,
        apt::{BOOKWORM, FILE_TIME, Fetch},
        stamp,
    },
};

/// The archive, in the cache.
const ARCHIVE: &str = "web-image/nginx.tar";

/// The server, and a shell with its programs for who looks around in it.
const PACKAGES: &[&str] = &["nginx", "dash", "coreutils"];

/// Raised when the way of making changes what comes out.
const RECIPE: u32 = 1;

/// Where it listens: any user may.
pub(crate) const PORT: u16 = 8080;

/// A page of 140 KB, which the server packs anew for whoever wants it packed: work that a load can be made of.
const PAGE: &str = "var/www/html/page.txt";
const PAGE_SOURCE: &str = "/usr/share/common-licenses/GPL-3";
const PAGE_TIMES: usize = 4;

/// Of each page that it packs, a worker makes all on one CPU: there are as many as the machine may ever want.
const CONFIGURATION: &str = "\
worker_processes 4;
pid /run/nginx.pid;
error_log stderr;
events {}
http {
    access_log off;
    types { text/plain txt; text/html html; }
    gzip on;
    gzip_comp_level 9;
    gzip_types text/plain;
    server {
        listen 8080;
        root /var/www/html;
    }
}
";

/// What Debian's own installation would make by scripts: who its server runs as.
const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n";
const GROUP: &str = "root:x:0:\nnogroup:x:65534:\n";

/// Makes it.
pub(crate) static NGINX: Step = Step {
    name: "web-image",
    says: "an image of a web server, from Debian's nginx",
    seconds: 10,
    needs: &[],
    packages: &[],
    debs: &["libc6"],
    as_root: false,
    outputs: &[ARCHIVE],
    inputs: |_| Ok(format!("{RECIPE}\n{PACKAGES:?}\n{CONFIGURATION}\n{PASSWD}{GROUP}")),
    make,
};

/// The archive, once it is made.
pub(crate) fn archive(cache: &Cache) -> PathBuf {
    cache.path(ARCHIVE)
}

fn make(work: &Work<'_>) -> Result<()> {
    let (root, image) = (work.scratch().join("root"), work.scratch().join("image"));
    BOOKWORM.unpack(work, PACKAGES, Fetch::WithDependencies, &root)?;
    configure(&root)?;
    fs::create_dir(&image).context("make a folder for the image")?;
    let layer = image.join("layer.tar");
    work.run(archive_of(&root, &layer).arg("."))?;
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {
            "Entrypoint": ["/usr/sbin/nginx"],
            "Cmd": ["-g", "daemon off;"],
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "ExposedPorts": { format!("{PORT}/tcp"): {} },
            "StopSignal": "SIGQUIT",
            "WorkingDir": "/",
        },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", stamp::digest_file(&layer)?)] },
    });
    let manifest = json!([{ "Config": "config.json", "RepoTags": ["web:1"], "Layers": ["layer.tar"] }]);
    for (name, content) in [("config.json", config), ("manifest.json", manifest)] {
        fs::write(image.join(name), content.to_string()).with_context(|| format!("write {name}"))?;
    }
    let files = ["manifest.json", "config.json", "layer.tar"];
    work.run(archive_of(&image, &work.out(ARCHIVE)?).args(files))
}

/// tar(1), told to archive what is in a folder so that equal content gives equal bytes.
fn archive_of(folder: &Path, archive: &Path) -> Command {
    let mut command = Command::new("tar");
    command
        .args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner"])
        .arg(format!("--mtime=@{FILE_TIME}"))
        .arg("--file")
        .arg(archive)
        .arg("--directory")
        .arg(folder)
        .arg("--create");
    command
}

/// Writes what the packages' scripts would, as far as the server wants it, and the page.
fn configure(root: &Path) -> Result<()> {
    let page = fs::read(PAGE_SOURCE).with_context(|| format!("read {PAGE_SOURCE}"))?;
    let files = [
        ("etc/nginx/nginx.conf", CONFIGURATION.into()),
        ("etc/passwd", PASSWD.into()),
        ("etc/group", GROUP.into()),
        ("var/www/html/index.html", b"<h1>It works.</h1>\n".to_vec()),
        (PAGE, page.repeat(PAGE_TIMES)),
    ];
    for (path, content) in files {
        let path = root.join(path);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
        }
        fs::write(&path, content).with_context(|| format!("write {}", path.display()))?;
    }
    for folder in ["run", "tmp", "root", "var/lib/nginx", "var/log/nginx"] {
        let path = root.join(folder);
        fs::create_dir_all(&path).with_context(|| format!("make {}", path.display()))?;
    }
    let shell = root.join("bin/sh");
    match fs::symlink_metadata(&shell) {
        Ok(_) => Ok(()),
        Err(_) => symlink("dash", &shell).with_context(|| format!("make {}", shell.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_configured_once_its_packages_are_unpacked() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("bin")).unwrap();
        configure(root.path()).unwrap();
        let text = fs::read_to_string(root.path().join("etc/nginx/nginx.conf")).unwrap();
        assert!(text.contains(&format!("listen {PORT};")));
        assert_eq!(fs::read_link(root.path().join("bin/sh")).unwrap(), Path::new("dash"));
        let page = fs::metadata(root.path().join(PAGE)).unwrap().len();
        assert_eq!(page, fs::metadata(PAGE_SOURCE).unwrap().len() * PAGE_TIMES as u64);
        // What is there stays.
        configure(root.path()).unwrap();
    }
}
