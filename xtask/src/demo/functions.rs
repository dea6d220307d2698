//! The programs that the demo deploys and what it gives them, in `demo/` of the cache folder.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::build;
use crate::cache::Cache;
use crate::setup::apt::{BOOKWORM, Fetch};
use crate::setup::{Step, Work, stamp, tools};

/// Wallpapers that are photographs.
const WALLPAPERS: &str = "lomiri-wallpapers-16.04";
const PHOTOGRAPH: &str = "usr/share/backgrounds/Picture_1A_by_freespace.jpg";

/// The Python function with its third-party wheel.
pub(crate) static THUMBNAIL: Step = Step {
    name: "demo-thumbnail",
    says: "the demo's Python function, with Pillow from PyPI",
    seconds: 5,
    needs: &[],
    packages: &["python3", "python3-pip"],
    debs: &[],
    as_root: false,
    outputs: &["demo/thumbnail.zip"],
    inputs: |cache| {
        digest(
            cache,
            &["demo/thumbnail/thumbnail.py", "demo/thumbnail/requirements.txt"],
        )
    },
    make: thumbnail,
};

/// The native function on the `lambda_runtime` crate.
pub(crate) static WORDCOUNT: Step = Step {
    name: "demo-wordcount",
    says: "the demo's native function, on the lambda_runtime crate",
    seconds: 20,
    needs: &[],
    packages: &["gcc", "libc6-dev", "python3"],
    debs: &[],
    as_root: false,
    outputs: &["demo/wordcount.zip"],
    inputs: |cache| {
        digest(
            cache,
            &[
                "demo/wordcount/Cargo.toml",
                "demo/wordcount/Cargo.lock",
                "demo/wordcount/src/main.rs",
            ],
        )
    },
    make: wordcount,
};

/// The photograph for the Python function.
pub(crate) static PHOTO: Step = Step {
    name: "demo-photograph",
    says: "a photograph from a Debian package",
    seconds: 3,
    needs: &[],
    packages: &[],
    debs: &[WALLPAPERS],
    as_root: false,
    outputs: &["demo/photograph.jpg"],
    inputs: |_| Ok(PHOTOGRAPH.to_owned()),
    make: |work| {
        let unpacked = work.scratch().join("package");
        BOOKWORM.unpack(work, &[WALLPAPERS], Fetch::Alone, &unpacked)?;
        fs::rename(unpacked.join(PHOTOGRAPH), work.out("demo/photograph.jpg")?).context("take the photograph")
    },
};

/// The digest of what is made of these files.
pub(crate) fn digest(cache: &Cache, sources: &[&str]) -> Result<String> {
    sources
        .iter()
        .map(|source| stamp::digest_file(&cache.source(source)))
        .collect()
}

fn thumbnail(work: &Work<'_>) -> Result<()> {
    let source = work.cache().source("demo/thumbnail");
    let folder = work.scratch().join("function");
    work.run(
        tools::pip_install(&folder)
            .arg("--requirement")
            .arg(source.join("requirements.txt")),
    )?;
    fs::copy(source.join("thumbnail.py"), folder.join("thumbnail.py")).context("take the function")?;
    zip(work, &folder, "demo/thumbnail.zip")
}

fn wordcount(work: &Work<'_>) -> Result<()> {
    let program = native(work, "demo/wordcount", "bootstrap")?;
    let folder = work.scratch().join("function");
    fs::create_dir(&folder).context("make the function's folder")?;
    fs::copy(program, folder.join("bootstrap")).context("take the function")?;
    zip(work, &folder, "demo/wordcount.zip")
}

/// Builds a program of a customer's crate. Where it is.
pub(crate) fn native(work: &Work<'_>, source: &str, program: &str) -> Result<PathBuf> {
    // Where the agent is compiled too: much of what both are made of is the same.
    let target = tools::target_dir(work.cache());
    let manifest = work.cache().source(source).join("Cargo.toml");
    let of: [&OsStr; 6] = [
        "--release".as_ref(),
        "--locked".as_ref(),
        "--manifest-path".as_ref(),
        manifest.as_os_str(),
        "--target-dir".as_ref(),
        target.as_os_str(),
    ];
    // Static, so that it runs whatever C library this machine has and the image has not.
    work.run(&mut build::static_program(work.cache(), program, of, &[]))?;
    Ok(target.join("release").join(program))
}

/// Packs what is in the folder as one does for Lambda.
pub(crate) fn zip(work: &Work<'_>, folder: &Path, output: &str) -> Result<()> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .with_context(|| format!("list {}", folder.display()))?
        .map(|entry| Ok(entry?.file_name()))
        .collect::<Result<_>>()?;
    names.sort();
    work.run(
        Command::new("/usr/bin/python3")
            .args(["-m", "zipfile", "-c"])
            .arg(work.out(output)?)
            .args(names)
            .current_dir(folder),
    )
}
