//! What guests boot into: the image that all machines share, and an initramfs per kernel with `stoker-init` in it.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use stoker_testkit::cpio::Archive;

use crate::{
    build::{self, Profile},
    cache::{self, Cache},
    kernel, lab, process,
    setup::{
        self, Step, Work,
        apt::{BOOKWORM, FILE_TIME},
        stamp, tools,
    },
};

const PACKAGES: &str = "guest/image/packages.txt";
const REQUIREMENTS: &str = "guest/image/requirements.txt";
/// What Python functions start with.
const BOOTSTRAP: &str = "guest/image/bootstrap.py";
/// Raised when the way of making changes what comes out.
const RECIPE: u32 = 5;
/// The image's own id, fixed for the same reason.
const UUID: &str = "5b0c7e12-6c0f-4d52-9d3c-57a0c2e5f001";
/// Where the client of the Runtime API lies, with what functions need not bring: `LAMBDA_RUNTIME_DIR`.
const RUNTIME_DIR: &str = "var/runtime";

/// The image of all guests, `image/root.erofs`.
pub(crate) static ROOT: Step = Step {
    name: "image-root",
    says: "the guest image, from Debian's packages and PyPI",
    seconds: 60,
    needs: &[],
    packages: &["mmdebstrap", "erofs-utils", "python3-pip", "debian-archive-keyring"],
    debs: &["libc6", "libssl3", "python3.11-minimal", "ca-certificates"],
    // The files of the image are root's.
    as_root: true,
    outputs: &["image/root.erofs"],
    inputs: |cache| {
        let read = |path: &str| fs::read_to_string(cache.source(path)).with_context(|| format!("read {path}"));
        let [packages, requirements, bootstrap] = [PACKAGES, REQUIREMENTS, BOOTSTRAP].map(read);
        Ok(format!("{RECIPE}\n{}\n{}\n{}", packages?, requirements?, bootstrap?))
    },
    make: root,
};

/// The initramfs for our kernel, which has all drivers built in.
static INITRAMFS_TUNED: Step = Step {
    name: "initramfs-tuned",
    says: "the initramfs for the tuned kernel",
    seconds: 1,
    needs: &[],
    packages: &[],
    debs: &[],
    as_root: false,
    outputs: &["image/initramfs-tuned.cpio"],
    inputs: init_digest,
    make: |work| write_initramfs(work, "image/initramfs-tuned.cpio", &[]),
};

/// The initramfs for Debian's kernel, with the modules that it takes.
static INITRAMFS_STOCK: Step = Step {
    name: "initramfs-stock",
    says: "the initramfs for the stock kernel",
    seconds: 1,
    needs: &[&kernel::STOCK],
    packages: &["xz-utils"],
    debs: &[],
    as_root: false,
    outputs: &["image/initramfs-stock.cpio"],
    inputs: |cache| {
        let kernel = stamp::digest_file(&cache.path("kernel/stock/bzImage"))?;
        Ok(format!(
            "{kernel}\n{}\n{}",
            init_digest(cache)?,
            STOCK_MODULES.join(" ")
        ))
    },
    make: |work| write_initramfs(work, "image/initramfs-stock.cpio", STOCK_MODULES),
};

/// Drivers and file systems that Debian's cloud kernel has as modules.
const STOCK_MODULES: &[&str] = &[
    "virtio_mmio",
    "virtio_blk",
    "vmw_vsock_virtio_transport",
    "virtio_rng",
    "virtio_balloon",
    "virtio_mem",
    "erofs",
    "overlay",
    // ext4 itself is built in.
    "quota_v2",
    "ptp_kvm",
];

/// The image, and what the archives are made with.
pub(crate) const STEPS: &[&Step] = &[&ROOT, &tools::RUST_SRC, &kernel::STOCK];

/// Makes all that a guest boots into, `stoker-init` from this checkout.
pub(crate) fn everything(cache: &Cache, profile: Profile) -> Result<()> {
    setup::ensure(cache, STEPS)?;
    let built = build::init(cache, profile)?;
    // Under one name, however it was built. Renamed, for the one that is there may be running.
    let (init, new) = (init_binary(cache), cache.path("image/stoker-init.new"));
    fs::copy(&built, &new).with_context(|| format!("copy {}", built.display()))?;
    fs::rename(&new, &init).with_context(|| format!("write {}", init.display()))?;
    setup::ensure(cache, &[&INITRAMFS_TUNED, &INITRAMFS_STOCK])
}

/// The program of every guest as [`everything`] has made it last.
pub(crate) fn init_binary(cache: &Cache) -> PathBuf {
    cache.path("image/stoker-init")
}

fn init_digest(cache: &Cache) -> Result<String> {
    stamp::digest_file(&init_binary(cache))
}

fn write_initramfs(work: &Work<'_>, output: &str, modules: &[&str]) -> Result<()> {
    let mut archive = Archive::default();
    let init = init_binary(work.cache());
    archive
        .folder("proc")
        .folder("sys")
        .folder("dev")
        .device("dev/console", 0o600, 5, 1)
        .file(
            "init",
            0o755,
            &fs::read(&init).with_context(|| format!("read {}", init.display()))?,
        );
    if !modules.is_empty() {
        let folder = work.cache().path("kernel/stock/modules");
        let mut list = String::new();
        for module in lab::with_dependencies(&folder, modules)? {
            let path = folder.join(module);
            let file = path.file_name().context("a module has no name")?.to_string_lossy();
            let name = format!("modules/{}", file.trim_end_matches(".xz"));
            archive.file(&name, 0o644, &lab::decompress(&path)?);
            list += &format!("/{name}\n");
        }
        archive.file("modules.load", 0o644, list.as_bytes());
    }
    fs::write(work.out(output)?, archive.finish()).with_context(|| format!("write {output}"))
}

fn root(work: &Work<'_>) -> Result<()> {
    let root = work.scratch().join("root");
    install_debian(work, &root)?;
    make_locale(work, &root)?;
    purge_perl(work, &root)?;
    keep_mke2fs(&root)?;
    install_runtime(work, &root)?;
    work.progress("byte-compiling Python");
    compile_python(work, &root)?;
    strip(&root)?;
    lay_out(&root)?;
    work.run(
        Command::new("mkfs.erofs")
            // Uncompressed: the host's page cache holds it once for all machines, and reading it costs guests no CPU.
            .args(["--quiet", "-T", FILE_TIME, "-U", UUID, "-x", "1"])
            .arg(work.out("image/root.erofs")?)
            .arg(&root),
    )
}

fn install_debian(work: &Work<'_>, root: &Path) -> Result<()> {
    let list = fs::read_to_string(work.cache().source(PACKAGES)).with_context(|| format!("read {PACKAGES}"))?;
    let packages: Vec<&str> = list
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .collect();
    BOOKWORM.bootstrap(work, "essential", &packages, UNWANTED, root)
}

/// Files of packages that no function reads.
const UNWANTED: &[&str] = &[
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    "/usr/share/lintian/*",
    "/usr/share/bash-completion/*",
    "/usr/lib/python3*/idlelib/*",
    "/usr/lib/python3*/turtledemo/*",
];

/// Makes the locale that functions start in, as on Lambda. `C.UTF-8` is part of Debian's C library.
fn make_locale(work: &Work<'_>, root: &Path) -> Result<()> {
    work.run(Command::new("chroot").arg(root).args([
        "localedef",
        "--no-archive",
        "--inputfile=en_US",
        "--charmap=UTF-8",
        "en_US.UTF-8",
    ]))
}

/// Takes away all of Perl but the part that Debian calls essential: a package that only converts old installations
/// (usrmerge) brings 45 MB of it in.
fn purge_perl(work: &Work<'_>, root: &Path) -> Result<()> {
    let installed =
        process::output(
            Command::new("chroot")
                .arg(root)
                .args(["dpkg-query", "--show", "--showformat=${Package}\\n"]),
        )?;
    let unwanted = installed.lines().filter(|name| {
        matches!(*name, "usrmerge" | "perl")
            || name.starts_with("libperl")
            || name.starts_with("perl-modules")
            || name.ends_with("-perl")
    });
    work.run(
        Command::new("chroot")
            .arg(root)
            .args(["dpkg", "--purge", "--force-depends"])
            .args(unwanted),
    )
}

/// Takes away all programs of e2fsprogs but the one that a guest's own PID 1 runs.
fn keep_mke2fs(root: &Path) -> Result<()> {
    let list = root.join("var/lib/dpkg/info/e2fsprogs.list");
    let files = fs::read_to_string(&list).with_context(|| format!("read {}", list.display()))?;
    for path in files.lines().map(|line| Path::new(line.trim_start_matches('/'))) {
        let is_program = path
            .parent()
            .is_some_and(|folder| folder.ends_with("bin") || folder.ends_with("sbin"));
        if is_program && !path.ends_with("mke2fs") {
            cache::remove(&root.join(path))?;
        }
    }
    Ok(())
}

fn install_runtime(work: &Work<'_>, root: &Path) -> Result<()> {
    let folder = root.join(RUNTIME_DIR);
    work.run(
        tools::pip_install(&folder)
            .arg("--requirement")
            .arg(work.cache().source(REQUIREMENTS)),
    )?;
    fs::copy(work.cache().source(BOOTSTRAP), folder.join("bootstrap.py"))
        .with_context(|| format!("copy {BOOTSTRAP}"))?;
    Ok(())
}

/// Byte-compiles all Python there is: the image is read-only, so guests could not keep what they compile themselves.
/// "Unchecked" means that Python takes it without comparing the source's time.
fn compile_python(work: &Work<'_>, root: &Path) -> Result<()> {
    for folder in ["usr/lib/python3.11", "usr/lib/python3/dist-packages", RUNTIME_DIR] {
        remove_named(&root.join(folder), "__pycache__")?;
        work.run(
            Command::new("chroot")
                .arg(root)
                .args([
                    "/usr/bin/python3.11",
                    "-m",
                    "compileall",
                    "-q",
                    "-f",
                    "--invalidation-mode",
                    "unchecked-hash",
                ])
                .arg(format!("/{folder}"))
                .env("PYTHONHASHSEED", "0"),
        )?;
    }
    Ok(())
}

/// Takes away what only installing needs, and what differs from one installation to the next.
fn strip(root: &Path) -> Result<()> {
    for path in [
        "var/lib/apt",
        "var/lib/dpkg",
        "etc/apt",
        "etc/machine-id",
        "etc/hostname",
        "etc/resolv.conf",
        // What locales are made of.
        "usr/share/i18n",
    ] {
        cache::remove(&root.join(path))?;
    }
    for folder in ["dev", "proc", "sys", "run", "tmp", "var/cache", "var/log", "var/tmp"] {
        let path = root.join(folder);
        cache::remove(&path)?;
        fs::create_dir(&path).with_context(|| format!("make {}", path.display()))?;
        let mode = if folder.ends_with("tmp") { 0o1777 } else { 0o755 };
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))
            .with_context(|| format!("set permissions of {}", path.display()))?;
    }
    without_set_id(root)
}

/// Folders and links that are where functions look for them on Lambda.
fn lay_out(root: &Path) -> Result<()> {
    // Code and layers.
    for folder in ["var/task", "opt"] {
        let path = root.join(folder);
        fs::create_dir_all(&path).with_context(|| format!("make {}", path.display()))?;
    }
    for (link, target) in [
        ("var/lang/bin/python", "/usr/bin/python3.11"),
        ("var/lang/bin/python3", "/usr/bin/python3.11"),
        ("var/lang/bin/python3.11", "/usr/bin/python3.11"),
        ("etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/certs/ca-certificates.crt"),
    ] {
        let path = root.join(link);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
        }
        symlink(target, &path).with_context(|| format!("make {}", path.display()))?;
    }
    Ok(())
}

/// Nothing in the image may raise its user's rights.
fn without_set_id(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))? {
        let path = entry.with_context(|| format!("list {}", folder.display()))?.path();
        let metadata = fs::symlink_metadata(&path).with_context(|| format!("look at {}", path.display()))?;
        let mode = metadata.permissions().mode();
        if metadata.is_dir() {
            without_set_id(&path)?;
        } else if metadata.is_file() && mode & 0o6000 != 0 {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode & 0o1777))
                .with_context(|| format!("set permissions of {}", path.display()))?;
        }
    }
    Ok(())
}

fn remove_named(folder: &Path, name: &str) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))? {
        let entry = entry.with_context(|| format!("list {}", folder.display()))?;
        let kind = entry
            .file_type()
            .with_context(|| format!("look at {}", entry.path().display()))?;
        if kind.is_dir() && entry.file_name() == name {
            cache::remove(&entry.path())?;
        } else if kind.is_dir() {
            remove_named(&entry.path(), name)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_e2fsprogs_mke2fs_is_left() {
        let root = tempfile::tempdir().unwrap();
        let files = ["sbin/mke2fs", "sbin/e2fsck", "usr/bin/chattr", "etc/mke2fs.conf"];
        let others = ["sbin/other"];
        for file in files.iter().chain(&others) {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        let info = root.path().join("var/lib/dpkg/info");
        fs::create_dir_all(&info).unwrap();
        let list = ["/.", "/sbin", "/usr/bin", "/etc"].map(str::to_owned).to_vec();
        let listed = files.iter().map(|file| format!("/{file}"));
        fs::write(
            info.join("e2fsprogs.list"),
            list.into_iter().chain(listed).collect::<Vec<_>>().join("\n"),
        )
        .unwrap();
        keep_mke2fs(root.path()).unwrap();
        for (file, left) in [
            ("sbin/mke2fs", true),
            ("sbin/e2fsck", false),
            ("usr/bin/chattr", false),
            ("etc/mke2fs.conf", true),
            ("sbin/other", true),
        ] {
            assert_eq!(root.path().join(file).exists(), left, "{file}");
        }
    }

    #[test]
    fn functions_find_what_is_on_lambda_where_it_is_there() {
        let root = tempfile::tempdir().unwrap();
        lay_out(root.path()).unwrap();
        for folder in ["var/task", "opt"] {
            assert!(root.path().join(folder).is_dir(), "{folder}");
        }
        for (link, target) in [
            ("var/lang/bin/python3.11", "/usr/bin/python3.11"),
            ("etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/certs/ca-certificates.crt"),
        ] {
            assert_eq!(fs::read_link(root.path().join(link)).unwrap(), Path::new(target));
        }
    }
}
