//! What other people made that our builds take: the standard library's sources, and programs that are compiled here.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::{
    cache::{self, Cache},
    process,
    setup::{
        Step, Work,
        apt::{self, Fetch, TRIXIE},
    },
};

const CARGO_DENY_VERSION: &str = "0.20.2";

const CARGO_DEB_VERSION: &str = "3.8.0";

/// The standard library's sources, from which `core` is built for the BPF target; `rust-src` is a link to them.
pub(crate) static RUST_SRC: Step = Step {
    name: "rust-src",
    says: "the standard library's sources",
    seconds: 10,
    needs: &[],
    packages: &[],
    debs: &[],
    as_root: false,
    outputs: &["rust-src"],
    inputs: |cache| Ok(format!("{}\n{}", rustc(cache, &["-vV"])?, rust_src(cache)?.display())),
    make: |work| {
        ensure_rust_src(work)?;
        symlink(rust_src(work.cache())?, work.out("rust-src")?).context("make a link to the sources")
    },
};

/// cargo-deny, in `bin/`: the licences and sources of dependencies.
pub(crate) static CARGO_DENY: Step = Step {
    name: "cargo-deny",
    says: "cargo-deny, compiled from crates.io",
    seconds: 120,
    needs: &[],
    packages: &["gcc", "libc6-dev"],
    debs: &[],
    as_root: false,
    outputs: &["bin/cargo-deny"],
    inputs: |_| Ok(CARGO_DENY_VERSION.to_owned()),
    make: |work| install(work, "cargo-deny", CARGO_DENY_VERSION),
};

/// cargo-deb, in `bin/`: makes Debian packages; `dpkg-shlibdeps` tells it what programs depend on.
pub(crate) static CARGO_DEB: Step = Step {
    name: "cargo-deb",
    says: "cargo-deb, compiled from crates.io",
    seconds: 60,
    needs: &[],
    packages: &["gcc", "libc6-dev", "dpkg-dev"],
    debs: &[],
    as_root: false,
    outputs: &["bin/cargo-deb"],
    inputs: |_| Ok(CARGO_DEB_VERSION.to_owned()),
    make: |work| install(work, "cargo-deb", CARGO_DEB_VERSION),
};

/// Compiles a program from crates.io into `bin/`.
fn install(work: &Work<'_>, name: &str, version: &str) -> Result<()> {
    let root = work.scratch().join("root");
    work.run(
        cargo(work.cache())
            .args(["install", name, "--locked", "--version", version, "--root"])
            .arg(&root)
            .arg("--target-dir")
            .arg(work.scratch().join("target")),
    )?;
    fs::rename(root.join("bin").join(name), work.out(&format!("bin/{name}"))?).with_context(|| format!("move {name}"))
}

/// cargo, run in the checkout so that the pinned toolchain is the one used.
pub(crate) fn cargo(cache: &Cache) -> Command {
    let mut command = Command::new("cargo");
    command.current_dir(cache.source(""));
    // What `cargo run` sets for us is not meant for another cargo.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || matches!(&*text, "CARGO_MANIFEST_DIR" | "CARGO_MANIFEST_PATH") {
            command.env_remove(name);
        }
    }
    command
}

/// Where cargo puts what it builds.
pub(crate) fn target_dir(cache: &Cache) -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        // A relative one is meant from where cargo is run, and we run it in the checkout.
        Some(folder) => cache.source(folder),
        None => cache.source("target"),
    }
}

fn rustc(cache: &Cache, arguments: &[&str]) -> Result<String> {
    process::output(Command::new("rustc").args(arguments).current_dir(cache.source("")))
}

/// Where `-Z build-std` looks for the standard library's sources.
fn rust_src(cache: &Cache) -> Result<PathBuf> {
    Ok(PathBuf::from(rustc(cache, &["--print", "sysroot"])?).join("lib/rustlib/src/rust/library"))
}

/// Lays the standard library's sources where they are looked for: by rustup, else from Debian's package.
fn ensure_rust_src(work: &Work<'_>) -> Result<()> {
    let place = rust_src(work.cache())?;
    if place.join("Cargo.lock").exists() {
        return Ok(());
    }
    let mut rustup = Command::new("rustup");
    rustup
        .args(["component", "add", "rust-src"])
        .current_dir(work.cache().source(""));
    if work.run(&mut rustup).is_ok() && place.join("Cargo.lock").exists() {
        return Ok(());
    }
    let release = rustc(work.cache(), &["--version"])?;
    let release = release
        .split_whitespace()
        .nth(1)
        .context("rustc does not say its version")?;
    if apt::index_is_old(work.cache()) {
        apt::require_debian(&[])?;
        apt::update_index(work.cache())?;
    }
    let prefix = format!("{release}+");
    let Some(version) = TRIXIE
        .versions(work.cache(), "rust-src")?
        .into_iter()
        .find(|version| version.starts_with(&prefix))
    else {
        bail!(
            "the sources of the standard library are missing: `rustup component add rust-src` failed and Debian has \
             no package rust-src of version {release}"
        );
    };
    let unpacked = work.scratch().join("rust-src");
    TRIXIE.unpack(work, &[&format!("rust-src={version}")], Fetch::Alone, &unpacked)?;
    lay(&unpacked.join(format!("usr/src/rustc-{release}/library")), &place)
}

/// Copies a folder beside its place and renames it, so that it is there whole or not at all.
fn lay(from: &Path, to: &Path) -> Result<()> {
    let parent = to.parent().with_context(|| format!("{} has no folder", to.display()))?;
    fs::create_dir_all(parent).with_context(|| format!("make {}", parent.display()))?;
    let beside = parent.join("library.partial");
    cache::remove(&beside)?;
    process::output(Command::new("cp").arg("-a").arg(from).arg(&beside))?;
    cache::remove(to)?;
    fs::rename(&beside, to).with_context(|| format!("move {} to {}", beside.display(), to.display()))
}

/// `pip install` into a folder, for the guests' Python and C library rather than this machine's. Every requirement must
/// name its digest, and nothing is built from source.
pub(crate) fn pip_install(folder: &Path) -> Command {
    let mut command = Command::new("/usr/bin/python3");
    command
        .args([
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-compile",
            "--require-hashes",
            "--target",
        ])
        .arg(folder)
        .args([
            "--only-binary",
            ":all:",
            "--python-version",
            "3.11",
            "--implementation",
            "cp",
        ])
        .args([
            "--platform",
            "manylinux_2_28_x86_64",
            "--platform",
            "manylinux2014_x86_64",
        ])
        .args([
            "--no-warn-script-location",
            "--root-user-action",
            "ignore",
            "--disable-pip-version-check",
        ]);
    command
}
