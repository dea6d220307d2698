//! The Debian in which the packages are tested: with systemd, and all that they depend on, so that it needs no network.

use std::{fs, path::Path};

use anyhow::{Context, Result};

use crate::{
    cache,
    setup::{Step, Work, apt::BOOKWORM},
};

/// Its folder in the cache.
const FOLDER: &str = "lab/debian";
const PACKAGES: &[&str] = &["systemd", "systemd-sysv"];
/// What no test reads.
const UNWANTED: &[&str] = &["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*"];
/// The units that have nothing to do where there is no terminal, no network and no schedule.
const MASKED: &[&str] = &[
    "getty.target",
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "systemd-networkd.service",
];

/// It is made from Debian's packages, as a folder.
pub(super) static DEBIAN: Step = Step {
    name: "lab-debian",
    says: "a Debian with systemd to test our packages in (150 MB)",
    seconds: 20,
    needs: &[],
    packages: &["mmdebstrap", "debian-archive-keyring"],
    debs: &[],
    // Its files are root's.
    as_root: true,
    outputs: &[FOLDER],
    inputs: |_| Ok(format!("{PACKAGES:?}{UNWANTED:?}{MASKED:?}")),
    make,
};

fn make(work: &Work<'_>) -> Result<()> {
    let root = work.out(FOLDER)?;
    BOOKWORM.bootstrap(work, "apt", PACKAGES, UNWANTED, &root)?;
    // What is left out of it is not to be left out of our packages.
    cache::remove(&root.join("etc/dpkg/dpkg.cfg.d/99mmdebstrap"))?;
    // Devices are those of the host that it runs in.
    empty(&root.join("dev"))?;
    let units = root.join("etc/systemd/system");
    for unit in MASKED {
        std::os::unix::fs::symlink("/dev/null", units.join(unit)).with_context(|| format!("mask {unit}"))?;
    }
    Ok(())
}

fn empty(folder: &Path) -> Result<()> {
    cache::remove(folder)?;
    fs::create_dir(folder).with_context(|| format!("make {}", folder.display()))
}
