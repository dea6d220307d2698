//! Debian packages: those installed on this machine, and those of later suites that are only unpacked in the cache.
//!
//! The latter come by an apt configuration of our own for each [`Release`], made from the mirror that this machine's apt
//! uses, so that the machine's own package lists stay as they are. apt verifies signatures and digests.

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

/// A Debian release with its later suites, whose package lists we keep.
pub(crate) struct Release {
    /// Its name in archives.
    pub(crate) codename: &'static str,
    /// Packages of it whose versions decide whether a step's outputs are still current.
    watched: &'static [&'static str],
}

/// The release that we build on; its backports have later kernels.
pub(crate) static BOOKWORM: Release = Release {
    codename: "bookworm",
    watched: &[
        "linux-image-amd64",
        "linux-image-cloud-amd64",
        "linux-source-6.12",
        "busybox-static",
        "libc6",
        "libssl3",
        "python3.11-minimal",
        "ca-certificates",
    ],
};

/// The one after it; its backports have a later QEMU, the compiler's own sources, and a kernel with `sched_ext`.
pub(crate) static TRIXIE: Release = Release {
    codename: "trixie",
    watched: &["qemu-system-x86"],
};

const RELEASES: [&Release; 2] = [&BOOKWORM, &TRIXIE];
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Every file's time in what is installed in a folder, in s since the epoch, so that equal content gives equal bytes:
/// 2025-01-01.
pub(crate) const FILE_TIME: &str = "1735689600";
/// Age at which the package lists are fetched again before anything is downloaded by them.
const INDEX_MAX_AGE: Duration = Duration::from_secs(24 * 3600);

/// The versions of the watched packages as of the last look; empty before the first.
pub(super) fn known_versions(cache: &Cache) -> BTreeMap<String, String> {
    RELEASES
        .iter()
        .flat_map(|release| release.known_versions(cache))
        .collect()
}

/// Whether package lists have to be fetched before packages are downloaded by them.
pub(super) fn index_is_old(cache: &Cache) -> bool {
    RELEASES.iter().any(|release| release.is_old(cache))
}

/// Ends with instructions where this is not the Debian release that setup knows.
pub(super) fn require_debian(packages: &[&str]) -> Result<()> {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    if release
        .lines()
        .any(|line| line.trim() == format!("VERSION_CODENAME={}", BOOKWORM.codename))
    {
        return Ok(());
    }
    let mut text = format!(
        "setup makes everything from Debian 12 ({}) packages, and this is another system.\n\
         Run it on Debian 12 or in a Debian 12 container (with /dev/kvm, if there is one)",
        BOOKWORM.codename
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

/// Makes our configurations from the machine's and fetches the package lists.
pub(super) fn update_index(cache: &Cache) -> Result<()> {
    eprintln!("Reading Debian's package lists");
    let configured = configured(cache)?;
    RELEASES
        .iter()
        .try_for_each(|release| release.update(cache, &configured))
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

/// What to download of a package.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fetch {
    /// It alone.
    Alone,
    /// It and all that it depends on, the C library included.
    WithDependencies,
}

// === impl Release ===

impl Release {
    /// The folder of its lists and what apt needs to read them.
    fn folder(&self, cache: &Cache) -> PathBuf {
        cache.path("apt").join(self.codename)
    }

    fn versions_file(&self, cache: &Cache) -> PathBuf {
        self.folder(cache).join("versions.json")
    }

    /// Where later versions are taken from, before all other suites.
    fn backports(&self) -> String {
        format!("{}-backports", self.codename)
    }

    fn known_versions(&self, cache: &Cache) -> BTreeMap<String, String> {
        fs::read(self.versions_file(cache))
            .ok()
            .and_then(|text| serde_json::from_slice(&text).ok())
            .unwrap_or_default()
    }

    fn is_old(&self, cache: &Cache) -> bool {
        let age = fs::metadata(self.versions_file(cache))
            .and_then(|metadata| metadata.modified())
            .ok()
            .and_then(|time| SystemTime::now().duration_since(time).ok());
        let known = self.known_versions(cache);
        age.is_none_or(|age| age > INDEX_MAX_AGE) || self.watched.iter().any(|package| !known.contains_key(*package))
    }

    /// A command of the apt family that knows this release's packages alone.
    fn apt(&self, cache: &Cache, program: &str) -> Command {
        configured_by(&self.folder(cache).join("apt.conf"), program)
    }

    fn update(&self, cache: &Cache, configured: &str) -> Result<()> {
        let folder = self.folder(cache);
        let sources = self.sources(configured)?;
        let apart = apart(&folder)?;
        let (list, status) = (folder.join("sources.list"), folder.join("status"));
        fs::write(&list, sources).context("write our apt sources")?;
        // Nothing is installed, for all that this apt knows: what it chooses is the same on every machine.
        fs::write(&status, "").context("write an empty list of installed packages")?;
        let text = format!(
            "Dir::Etc::SourceList \"{}\";\nDir::Etc::SourceParts \"/dev/null\";\nDir::State::Status \"{}\";\n{apart}\
             APT::Install-Recommends \"false\";\nAPT::Default-Release \"{}\";\n",
            list.display(),
            status.display(),
            self.backports(),
        );
        fs::write(folder.join("apt.conf"), text).context("write our apt configuration")?;
        process::output(
            self.apt(cache, "apt-get")
                .args(["-qq", "-o", "APT::Update::Error-Mode=any", "update"]),
        )?;
        let mut versions = BTreeMap::new();
        for package in self.watched {
            let policy = process::output(self.apt(cache, "apt-cache").args(["policy", package]))?;
            let candidate = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "));
            match candidate {
                Some(version) if version != "(none)" => versions.insert((*package).to_owned(), version.to_owned()),
                _ => bail!("Debian's {} has no package {package}", self.codename),
            };
        }
        stamp::write_atomically(&self.versions_file(cache), &serde_json::to_vec_pretty(&versions)?)
    }

    /// Its suites, each from where the machine has it, else from where it has the suite of that kind of the release that
    /// we build on, else from where it has that release itself.
    fn sources(&self, configured: &str) -> Result<String> {
        let mut mirrors = BTreeMap::new();
        for line in configured.lines() {
            if let [suite, "main", uri] = line.split_whitespace().collect::<Vec<_>>()[..] {
                mirrors.entry(suite).or_insert(uri);
            }
        }
        let ours = BOOKWORM.codename;
        let Some(main) = mirrors.get(ours) else {
            bail!("this machine's apt has no mirror for Debian {ours} (main): add one to /etc/apt/sources.list.d");
        };
        let mut text = String::new();
        for kind in ["", "-updates", "-security", "-backports"] {
            let suite = format!("{}{kind}", self.codename);
            let known = mirrors
                .get(suite.as_str())
                .or_else(|| mirrors.get(format!("{ours}{kind}").as_str()));
            // The security suite lies on another path than the rest; without an entry there is none to derive.
            let uri = match known {
                Some(uri) => uri,
                None if kind == "-security" => continue,
                None => main,
            };
            text += &format!("deb [signed-by={KEYRING}] {uri} {suite} main\n");
        }
        Ok(text)
    }

    /// Its sources with its updates, and nothing of later suites.
    fn own_sources(&self, cache: &Cache) -> Result<String> {
        let text = fs::read_to_string(self.folder(cache).join("sources.list")).context("read our apt sources")?;
        let later = format!(" {} ", self.backports());
        Ok(text
            .lines()
            .filter(|line| !line.contains(&later))
            .map(|line| format!("{line}\n"))
            .collect())
    }

    /// Installs this release in a folder by mmdebstrap(1): what its variant has and these packages, without the files at
    /// `unwanted`, but with every package's copyright.
    pub(crate) fn bootstrap(
        &self,
        work: &Work<'_>,
        variant: &str,
        packages: &[&str],
        unwanted: &[&str],
        root: &Path,
    ) -> Result<()> {
        let sources = work.scratch().join("sources.list");
        fs::write(&sources, self.own_sources(work.cache())?).context("write apt sources")?;
        // How this machine reaches its mirror holds for these packages too.
        let options = work.scratch().join("apt.conf");
        let acquire: String = process::output(Command::new("apt-config").arg("dump"))?
            .lines()
            .filter(|line| line.starts_with("Acquire::"))
            .map(|line| format!("{line}\n"))
            .collect();
        fs::write(&options, acquire).context("write apt options")?;
        work.run(
            // Its mounts (/proc, /sys ...) are nobody else's business, and end with it however it ends.
            Command::new("unshare")
                .args(["--mount", "--propagation", "private", "mmdebstrap"])
                .args(["--format=directory", "--mode=root"])
                .arg(format!("--variant={variant}"))
                .arg(format!("--include={}", packages.join(",")))
                .arg(format!("--aptopt={}", options.display()))
                .args(unwanted.iter().map(|path| format!("--dpkgopt=path-exclude={path}")))
                .arg("--dpkgopt=path-include=/usr/share/doc/*/copyright")
                .arg(self.codename)
                .arg(root)
                .arg(&sources)
                .env("SOURCE_DATE_EPOCH", FILE_TIME),
        )
    }

    /// Downloads packages (`NAME` or `NAME=VERSION`) and unpacks them into the folder.
    pub(crate) fn unpack(&self, work: &Work<'_>, packages: &[&str], fetch: Fetch, folder: &Path) -> Result<()> {
        let archives = work.scratch().join("archives");
        fs::create_dir_all(archives.join("partial")).context("make a folder for packages")?;
        fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
        let mut command = self.apt(work.cache(), "apt-get");
        match fetch {
            Fetch::Alone => command.arg("download").current_dir(&archives),
            Fetch::WithDependencies => command
                .args(["install", "--yes", "--download-only", "-o"])
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
    pub(crate) fn real_name(&self, cache: &Cache, meta: &str) -> Result<String> {
        let text = process::output(self.apt(cache, "apt-cache").args(["depends", "--important", meta]))?;
        text.lines()
            .find_map(|line| line.trim().strip_prefix("Depends: "))
            .map(str::to_owned)
            .with_context(|| format!("the package {meta} depends on nothing"))
    }

    /// The versions of a package in any of its suites, in apt's order.
    pub(crate) fn versions(&self, cache: &Cache, package: &str) -> Result<Vec<String>> {
        let text = process::output(self.apt(cache, "apt-cache").args(["madison", package]))?;
        Ok(text
            .lines()
            .filter_map(|line| line.split('|').nth(1))
            .map(|version| version.trim().to_owned())
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suites_are_taken_from_where_the_machine_has_them() {
        let configured = "bookworm main http://mirror.invalid/debian\nbookworm contrib http://contrib.invalid\n\
                          bookworm-security main http://mirror.invalid/security\nnodistro main http://other.invalid\n\
                          trixie-backports main http://near.invalid/debian\n";
        let lines = |release: &Release| -> Vec<String> {
            let text = release.sources(configured).unwrap();
            text.lines()
                .map(|line| line.split_once("] ").unwrap().1.to_owned())
                .collect()
        };
        assert_eq!(
            lines(&BOOKWORM),
            [
                "http://mirror.invalid/debian bookworm main",
                "http://mirror.invalid/debian bookworm-updates main",
                "http://mirror.invalid/security bookworm-security main",
                "http://mirror.invalid/debian bookworm-backports main",
            ]
        );
        assert_eq!(
            lines(&TRIXIE),
            [
                "http://mirror.invalid/debian trixie main",
                "http://mirror.invalid/debian trixie-updates main",
                "http://mirror.invalid/security trixie-security main",
                "http://near.invalid/debian trixie-backports main",
            ]
        );
    }

    #[test]
    fn no_mirror_is_an_error_that_says_what_to_do() {
        let error = BOOKWORM
            .sources("trixie main http://mirror.invalid/debian\n")
            .unwrap_err();
        assert!(error.to_string().contains("/etc/apt/sources.list.d"));
    }
}
