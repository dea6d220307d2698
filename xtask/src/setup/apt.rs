//! Debian packages: those installed on this machine, and those of later suites that are only unpacked in the cache.
//!
//! The latter come by an apt configuration of our own, made from the mirror that this machine's apt uses with other
//! suites added, so that the machine's own package lists stay as they are. apt verifies signatures and digests.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result, bail};

use crate::{
    cache::{self, Cache},
    process,
    setup::{Work, stamp},
};

/// The Debian release that we build on.
pub(crate) const RELEASE: &str = "bookworm";
/// Suites beside it: later kernels and QEMU; the compiler's own sources.
const SUITES: &[&str] = &[
    RELEASE,
    "bookworm-updates",
    "bookworm-security",
    "bookworm-backports",
    "trixie-backports",
];
/// Taken from where there is a choice.
const PREFERRED_SUITE: &str = "bookworm-backports";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Age at which the package index is fetched again before anything is downloaded by it.
const INDEX_MAX_AGE: Duration = Duration::from_secs(24 * 3600);
/// Packages whose versions decide whether a step's outputs are still current.
const WATCHED: &[&str] = &[
    "qemu-system-x86",
    "linux-image-amd64",
    "linux-image-cloud-amd64",
    "linux-source-6.12",
    "busybox-static",
    "libc6",
    "libssl3",
    "python3.11-minimal",
    "ca-certificates",
];

fn conf(cache: &Cache) -> PathBuf {
    cache.path("apt/apt.conf")
}

fn sources_file(cache: &Cache) -> PathBuf {
    cache.path("apt/sources.list")
}

fn versions_file(cache: &Cache) -> PathBuf {
    cache.path("apt/versions.json")
}

/// The versions of the watched packages as of the last look; empty before the first.
pub(super) fn known_versions(cache: &Cache) -> BTreeMap<String, String> {
    fs::read(versions_file(cache))
        .ok()
        .and_then(|text| serde_json::from_slice(&text).ok())
        .unwrap_or_default()
}

/// Whether the index has to be fetched before packages are downloaded by it.
pub(super) fn index_is_old(cache: &Cache) -> bool {
    let age = fs::metadata(versions_file(cache))
        .and_then(|metadata| metadata.modified())
        .ok()
        .and_then(|time| SystemTime::now().duration_since(time).ok());
    let known = known_versions(cache);
    age.is_none_or(|age| age > INDEX_MAX_AGE) || WATCHED.iter().any(|package| !known.contains_key(*package))
}

/// Ends with instructions where this is not the Debian release that setup knows.
pub(super) fn require_debian(packages: &[&str]) -> Result<()> {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    if release
        .lines()
        .any(|line| line.trim() == format!("VERSION_CODENAME={RELEASE}"))
    {
        return Ok(());
    }
    let mut text = format!(
        "setup makes everything from Debian 12 ({RELEASE}) packages, and this is another system.\n\
         Run it on Debian 12 or in a Debian 12 container (with /dev/kvm, if there is one)"
    );
    if !packages.is_empty() {
        text += ", with these installed:\n  ";
        text += &packages.join(" ");
    }
    bail!("{text}")
}

/// Those of the packages that are not installed.
pub(super) fn missing<'a>(packages: &[&'a str]) -> Vec<&'a str> {
    let installed = |package: &str| {
        Command::new("dpkg-query")
            .args(["-W", "-f", "${db:Status-Status}", package])
            .output()
            .is_ok_and(|output| output.stdout == b"installed")
    };
    packages.iter().copied().filter(|package| !installed(package)).collect()
}

/// Installs packages by the machine's own apt.
pub(super) fn install(packages: &[&str]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    eprintln!("Installing Debian packages: {}", packages.join(" "));
    let apt_get = || {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive").args(["-y", "-qq"]);
        command
    };
    process::output(apt_get().arg("update"))?;
    process::output(apt_get().args(["install", "--no-install-recommends"]).args(packages)).map(drop)
}

/// A command of the apt family that reads our configuration and not the machine's lists.
fn apt(cache: &Cache, program: &str) -> Command {
    configured_by(&conf(cache), program)
}

/// A command of the apt family that reads this configuration beside the machine's.
fn configured_by(conf: &Path, program: &str) -> Command {
    let mut command = Command::new(program);
    command
        .env("APT_CONFIG", conf)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("LC_ALL", "C");
    command
}

/// Settings of apt by which anybody keeps lists and packages in a folder, which it makes.
fn apart(folder: &Path) -> Result<String> {
    let (lists, downloads) = (folder.join("lists"), folder.join("cache"));
    for part in [lists.join("partial"), downloads.join("archives/partial")] {
        fs::create_dir_all(&part).with_context(|| format!("make {}", part.display()))?;
    }
    Ok(format!(
        "Dir::State::Lists \"{}\";\nDir::Cache \"{}\";\nAcquire::Languages \"none\";\nAcquire::Retries \"3\";\n\
         APT::Sandbox::User \"root\";\nDebug::NoLocking \"true\";\n",
        lists.display(),
        downloads.display(),
    ))
}

/// Makes our configuration from the machine's and fetches the package lists.
pub(super) fn update_index(cache: &Cache) -> Result<()> {
    eprintln!("Reading Debian's package lists");
    let sources = sources(&configured(cache)?)?;
    let apart = apart(&cache.path("apt"))?;
    fs::write(sources_file(cache), sources).context("write our apt sources")?;
    let text = format!(
        "Dir::Etc::SourceList \"{}\";\nDir::Etc::SourceParts \"/dev/null\";\n{apart}\
         APT::Install-Recommends \"false\";\nAPT::Default-Release \"{PREFERRED_SUITE}\";\n",
        sources_file(cache).display(),
    );
    fs::write(conf(cache), text).context("write our apt configuration")?;
    process::output(apt(cache, "apt-get").args(["-qq", "-o", "APT::Update::Error-Mode=any", "update"]))?;
    let mut versions = BTreeMap::new();
    for package in WATCHED {
        let policy = process::output(apt(cache, "apt-cache").args(["policy", package]))?;
        let candidate = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "));
        match candidate {
            Some(version) if version != "(none)" => versions.insert((*package).to_owned(), version.to_owned()),
            _ => bail!("Debian's {PREFERRED_SUITE} has no package {package}"),
        };
    }
    stamp::write_atomically(&versions_file(cache), &serde_json::to_vec_pretty(&versions)?)
}

/// What the machine's apt is configured to fetch: `suite component uri` per line.
fn configured(cache: &Cache) -> Result<String> {
    let targets = |apt_get: &mut Command| {
        process::output(apt_get.args([
            "indextargets",
            "--format",
            "$(RELEASE) $(COMPONENT) $(REPO_URI)",
            "Created-By: Packages",
        ]))
    };
    let known = targets(&mut Command::new("apt-get"))?;
    if !known.is_empty() {
        return Ok(known);
    }
    // A machine that never had an `apt-get update` has no answer, so the lists are fetched, but not for it.
    let folder = cache.path("apt/machine");
    let conf = folder.join("apt.conf");
    let apart = apart(&folder)?;
    fs::write(&conf, apart).context("write a configuration for the machine's apt")?;
    process::output(configured_by(&conf, "apt-get").args(["-qq", "update"]))?;
    let known = targets(&mut configured_by(&conf, "apt-get"))?;
    cache::remove(&folder)?;
    Ok(known)
}

/// Our sources: the suites we need, each from where the machine has it, else from where it has the release itself.
fn sources(configured: &str) -> Result<String> {
    let mut mirrors = BTreeMap::new();
    for line in configured.lines() {
        if let [suite, "main", uri] = line.split_whitespace().collect::<Vec<_>>()[..] {
            mirrors.entry(suite).or_insert(uri);
        }
    }
    let Some(main) = mirrors.get(RELEASE) else {
        bail!("this machine's apt has no mirror for Debian {RELEASE} (main): add one to /etc/apt/sources.list.d");
    };
    let mut text = String::new();
    for suite in SUITES {
        // The security suite lies on another path than the rest; without its own entry there is none to derive.
        let uri = match mirrors.get(suite) {
            Some(uri) => uri,
            None if suite.ends_with("-security") => continue,
            None => main,
        };
        text += &format!("deb [signed-by={KEYRING}] {uri} {suite} main\n");
    }
    Ok(text)
}

/// The sources for `mmdebstrap`: the release with its updates, nothing of later suites.
pub(crate) fn release_sources(cache: &Cache) -> Result<String> {
    let text = fs::read_to_string(sources_file(cache)).context("read our apt sources")?;
    Ok(text
        .lines()
        .filter(|line| !line.contains("-backports "))
        .map(|line| format!("{line}\n"))
        .collect())
}

/// What to download of a package.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fetch {
    /// It alone.
    Alone,
    /// It and all that it depends on and this machine has not installed.
    WithDependencies,
}

/// Downloads packages (`NAME` or `NAME=VERSION`) and unpacks them into the folder.
pub(crate) fn unpack(work: &Work<'_>, packages: &[&str], fetch: Fetch, folder: &Path) -> Result<()> {
    let archives = work.scratch().join("archives");
    fs::create_dir_all(archives.join("partial")).context("make a folder for packages")?;
    fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    let mut command = apt(work.cache(), "apt-get");
    match fetch {
        Fetch::Alone => command.arg("download").current_dir(&archives),
        Fetch::WithDependencies => command
            .args(["install", "--yes", "--download-only", "--reinstall", "-o"])
            .arg(format!("Dir::Cache::Archives={}", archives.display())),
    };
    work.run(command.args(packages))
        .context("if the mirror no longer has a package, `cargo xtask setup --update` reads its lists anew")?;
    for archive in fs::read_dir(&archives).context("list the packages")? {
        let archive = archive.context("list the packages")?.path();
        if archive.extension().is_some_and(|extension| extension == "deb") {
            work.run(Command::new("dpkg-deb").arg("--extract").arg(&archive).arg(folder))?;
        }
    }
    cache::remove(&archives)
}

/// The first package that this one depends on: what a meta package stands for.
pub(crate) fn real_name(cache: &Cache, meta: &str) -> Result<String> {
    let text = process::output(apt(cache, "apt-cache").args(["depends", "--important", meta]))?;
    text.lines()
        .find_map(|line| line.trim().strip_prefix("Depends: "))
        .map(str::to_owned)
        .with_context(|| format!("the package {meta} depends on nothing"))
}

/// The versions of a package in any suite, in apt's order.
pub(crate) fn versions(cache: &Cache, package: &str) -> Result<Vec<String>> {
    let text = process::output(apt(cache, "apt-cache").args(["madison", package]))?;
    Ok(text
        .lines()
        .filter_map(|line| line.split('|').nth(1))
        .map(|version| version.trim().to_owned())
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suites_are_taken_from_where_the_machine_has_them() {
        let text = sources(
            "bookworm main http://mirror.invalid/debian\nbookworm contrib http://contrib.invalid\n\
             bookworm-security main http://mirror.invalid/security\nnodistro main http://other.invalid\n",
        )
        .unwrap();
        let lines: Vec<&str> = text.lines().map(|line| line.split_once("] ").unwrap().1).collect();
        assert_eq!(
            lines,
            [
                "http://mirror.invalid/debian bookworm main",
                "http://mirror.invalid/debian bookworm-updates main",
                "http://mirror.invalid/security bookworm-security main",
                "http://mirror.invalid/debian bookworm-backports main",
                "http://mirror.invalid/debian trixie-backports main",
            ]
        );
    }

    #[test]
    fn no_mirror_is_an_error_that_says_what_to_do() {
        let error = sources("trixie main http://mirror.invalid/debian\n").unwrap_err();
        assert!(error.to_string().contains("/etc/apt/sources.list.d"));
    }
}
