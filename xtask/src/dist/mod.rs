//! `cargo xtask dist`: the Debian packages `stoker` (the programs and their units) and `stoker-guest` (what machines boot).
//!
//! What is in them stands in `[package.metadata.deb]` of `agent/Cargo.toml` and `guest/Cargo.toml`, the units and scripts in
//! `agent/debian`. What is not built by cargo is laid in the folder `packaging` beside the programs first ([`stage`]).

mod debian;
mod stage;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::{
    build::{self, Profile},
    cache::{self, Cache},
    image, kernel, process,
    setup::{self, Step, tools},
};

/// A package's name, and the Cargo package that says what is in it.
type Package = (&'static str, &'static str);

const PACKAGES: [Package; 2] = [("stoker", "stoker-agent"), ("stoker-guest", "stoker-init")];

/// What packages take, beside what [`image::everything`] makes.
const STEPS: &[&Step] = &[&tools::CARGO_DEB, &kernel::TUNED];

/// What it takes to test them, beside what every test in a host does.
pub(crate) const TEST_STEPS: &[&Step] = &[&tools::CARGO_DEB, &debian::DEBIAN];

/// What `cargo xtask dist` was asked.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// How the programs are built.
    #[arg(long, value_enum, default_value_t = Profile::Dist)]
    profile: Profile,
    /// The packages' version; Cargo's, with the revision 1, where it is not given.
    #[arg(long)]
    version: Option<String>,
    /// The folder to put them in; `debian` beside the programs' where it is not given.
    #[arg(long)]
    out: Option<PathBuf>,
}

/// Makes the packages and says where they are.
pub(crate) fn run(cache: &Cache, options: &Options) -> Result<()> {
    let Options { profile, version, out } = options;
    setup::ensure(cache, STEPS)?;
    image::everything(cache, *profile)?;
    build::programs(cache, *profile)?;
    stage::everything(cache, *profile)?;
    let out = out.clone().unwrap_or_else(|| tools::target_dir(cache).join("debian"));
    let mut arguments = vec!["--profile", profile.name()];
    if let Some(version) = version {
        arguments.extend(["--deb-version", version]);
    }
    let packages = make(cache, &PACKAGES, &arguments, &out)?;
    for package in &packages {
        let size = fs::metadata(package).context("look at a package")?.len();
        println!("{:7.1} MB  {}", size as f64 / 1e6, package.display());
    }
    println!("Install them: apt install {}", shown(&packages));
    Ok(())
}

/// Makes what `tests/lab_package.rs` installs, of released programs that are there: both packages of one version in the
/// folder `1`, and the programs' of a later one in `2`.
pub(crate) fn for_test(cache: &Cache, folder: &Path) -> Result<()> {
    setup::ensure(cache, TEST_STEPS)?;
    let profile = Profile::Release;
    stage::everything(cache, profile)?;
    let [programs, _] = PACKAGES;
    for (revision, packages) in [("1", PACKAGES.as_slice()), ("2", &[programs])] {
        let version = format!("{}-{revision}", env!("CARGO_PKG_VERSION"));
        // Soon made, if larger.
        let arguments = ["--profile", profile.name(), "--deb-version", &version, "--fast"];
        make(cache, packages, &arguments, &folder.join(revision))?;
    }
    Ok(())
}

/// Makes packages of what is built and staged, in a folder, and returns their paths. Earlier ones in it are removed, so that
/// `stoker_*.deb` is one file.
fn make(cache: &Cache, packages: &[Package], arguments: &[&str], out: &Path) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(out).with_context(|| format!("make {}", out.display()))?;
    for old in found(out)? {
        cache::remove(&old)?;
    }
    for (_, package) in packages {
        process::output(
            Command::new(cache.path("bin/cargo-deb"))
                .current_dir(cache.source(""))
                // Built and stripped already.
                .args(["--no-build", "--no-strip", "--quiet", "--package", package])
                .args(arguments)
                .arg("--output")
                .arg(out),
        )?;
    }
    let made = found(out)?;
    ensure!(
        made.len() == packages.len(),
        "expected {} packages in {}, found {made:?}",
        packages.len(),
        out.display()
    );
    Ok(made)
}

/// The packages in a folder, sorted.
fn found(out: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(out).with_context(|| format!("list {}", out.display()))? {
        let path = entry.with_context(|| format!("list {}", out.display()))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let is_ours = PACKAGES.iter().any(|(package, _)| {
            name.strip_prefix(package)
                .is_some_and(|rest| rest.starts_with('_') && rest.ends_with(".deb"))
        });
        if is_ours {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Paths as arguments of a command.
fn shown(paths: &[PathBuf]) -> String {
    let paths: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
    paths.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_packages_are_found() {
        let folder = tempfile::tempdir().unwrap();
        for name in [
            "stoker_1_amd64.deb",
            "stoker-guest_1_amd64.deb",
            "stoker-other_1.deb",
            "stoker_1.txt",
            "x.deb",
        ] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let found = found(folder.path()).unwrap();
        let names: Vec<_> = found
            .iter()
            .map(|path| path.file_name().unwrap().to_string_lossy())
            .collect();
        assert_eq!(names, ["stoker-guest_1_amd64.deb", "stoker_1_amd64.deb"]);
    }
}
