//! Lays beside the programs what packages hold and cargo does not build: the configuration, manual pages, shell completion,
//! and what machines boot.

use std::{
    fs::{self, hard_link},
    path::Path,
    process::Command,
};

use anyhow::{Context, Result, ensure};

use crate::{
    build::Profile,
    cache::{self, Cache},
    process,
    setup::tools,
};

/// The agent's configuration, each key with its default.
const CONFIGURATION: &str = "agent/stokerd.toml";
/// What is another default in the package: there a unit holds the machines' cgroup (`agent/debian/stoker-machines.service`).
const CGROUP: [&str; 2] = [
    "\ncgroup = \"stoker\"\n",
    "\ncgroup = \"stoker.slice/stoker-machines.service\"\n",
];
/// What machines boot, in the cache folder, and its name in the package.
const BOOT_FILES: [(&str, &str); 3] = [
    ("kernel/tuned/vmlinux", "vmlinux"),
    ("image/initramfs-tuned.cpio", "initramfs.cpio"),
    ("image/root.erofs", "root.erofs"),
];

/// Fills the folder `packaging` beside the programs of this profile.
pub(super) fn everything(cache: &Cache, profile: Profile) -> Result<()> {
    let folder = tools::target_dir(cache).join(profile.name()).join("packaging");
    cache::remove(&folder)?;
    let boot = folder.join("boot");
    fs::create_dir_all(&boot).with_context(|| format!("make {}", boot.display()))?;
    for (from, name) in BOOT_FILES {
        link(&cache.path(from), &boot.join(name))?;
    }
    let text = fs::read_to_string(cache.source(CONFIGURATION)).with_context(|| format!("read {CONFIGURATION}"))?;
    fs::write(folder.join("stokerd.toml"), configuration(&text)?).context("write the package's configuration")?;
    let example = ["--workspace", "--example", "manual"];
    // Of the whole workspace, as tests are: of one package cargo would make much of what it is made of anew, with other features.
    process::run(tools::cargo(cache).args(["build", "--quiet"]).args(example))?;
    process::run(Command::new(tools::target_dir(cache).join("debug/examples/manual")).arg(&folder))
        .context("make manual pages and shell completion")?;
    let mut gzip = Command::new("gzip");
    for page in fs::read_dir(folder.join("man")).context("list the manual pages")? {
        gzip.arg(page.context("list the manual pages")?.path());
    }
    // Without times, so that equal content gives equal bytes.
    process::run(gzip.args(["-9", "--no-name"]))
}

/// The configuration with the package's defaults.
fn configuration(text: &str) -> Result<String> {
    let [default, packaged] = CGROUP;
    ensure!(
        text.matches(default).count() == 1,
        "{CONFIGURATION} has no line `{}`",
        default.trim()
    );
    Ok(text.replace(default, packaged))
}

/// The same file at another place: a link, or a copy where that is on another disk.
fn link(from: &Path, to: &Path) -> Result<()> {
    hard_link(from, to)
        .or_else(|_| fs::copy(from, to).map(drop))
        .with_context(|| format!("copy {} to {}", from.display(), to.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_packages_configuration_is_the_documented_one_but_for_the_cgroup() {
        let text = include_str!("../../../agent/stokerd.toml");
        let changed = configuration(text).unwrap();
        let other: Vec<_> = text
            .lines()
            .zip(changed.lines())
            .filter(|(one, two)| one != two)
            .collect();
        assert_eq!(
            other,
            [(
                "cgroup = \"stoker\"",
                "cgroup = \"stoker.slice/stoker-machines.service\""
            )]
        );
        assert!(configuration("cgroup = \"other\"\n").is_err());
    }
}
