//! Whether this machine can run microVMs itself.

use std::{fmt, fs};

use anyhow::{Result, bail};
use stoker_linux::kvm;

use crate::process;

/// What machines, limits and telemetry take.
const CONTROLLERS: &[&str] = &["cpu", "memory", "pids", "io"];

/// What was found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// This machine runs microVMs itself.
    Native,
    /// The lab is needed, for this reason.
    Lab(String),
}

impl fmt::Display for Verdict {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Native => write!(formatter, "Running natively: this machine has KVM and cgroup v2."),
            Self::Lab(reason) => write!(formatter, "Running in the lab (QEMU, emulated), since {reason}."),
        }
    }
}

/// Looks at user, cgroups and KVM.
pub(crate) fn probe() -> Verdict {
    match user().and_then(|()| cgroups()).and_then(|()| Ok(kvm::probe()?)) {
        Ok(()) => Verdict::Native,
        Err(reason) => Verdict::Lab(reason.to_string()),
    }
}

fn user() -> Result<()> {
    if !process::is_root() {
        bail!("this is not root, which loading eBPF programs and making cgroups takes");
    }
    Ok(())
}

fn cgroups() -> Result<()> {
    let Ok(text) = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers") else {
        bail!("/sys/fs/cgroup is not cgroup v2");
    };
    for controller in CONTROLLERS {
        if !text.split_whitespace().any(|name| name == *controller) {
            bail!("cgroup v2 has no {controller} controller here");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_says_why() {
        assert!(Verdict::Lab("x".to_owned()).to_string().contains("since x"));
        // Whatever this machine is, the probe ends with an answer.
        let _ = probe();
    }
}
