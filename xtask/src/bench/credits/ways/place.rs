//! Where the processes run: cgroups as machines have them, and what the kernel is.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use stoker_linux::Cgroup;

/// Where dynamic preemption is read and set, where debugfs is mounted.
const PREEMPT: &str = "/sys/kernel/debug/sched/preempt";

/// The cgroup that all of the bench is in, where there is a CPU controller; it goes with what runs in it when this is dropped.
#[derive(Debug)]
pub(super) struct Groups(Cgroup);

/// The cgroup of a process that stands for a machine.
#[derive(Debug)]
pub(super) struct Group {
    /// As the machine's own.
    pub(super) machine: Cgroup,
    /// As that of its threads, in it.
    pub(super) threads: Cgroup,
}

/// Full preemption, until this is dropped.
#[derive(Debug)]
pub(super) struct FullPreemption {
    before: String,
}

// === impl Groups ===

impl Groups {
    /// None where cgroup v2 has no CPU controller.
    pub(super) fn new() -> Result<Option<Self>> {
        let root = Cgroup::at(Cgroup::mount()?);
        if !root.controllers()?.iter().any(|name| name == "cpu") {
            return Ok(None);
        }
        root.enable("cpu")?;
        let all = Self(root.create(format!("stoker-bench-{}", std::process::id()))?);
        all.0.enable("cpu")?;
        Ok(Some(all))
    }

    pub(super) fn group(&self, name: &str) -> Result<Group> {
        let machine = self.0.create(name)?;
        machine.enable("cpu")?;
        Ok(Group {
            threads: machine.create("threads")?,
            machine,
        })
    }

    /// Removes what [`Groups::group`] has made, with what runs there.
    pub(super) fn clear(&self) -> Result<()> {
        for group in self.0.children()? {
            group.destroy()?;
        }
        Ok(())
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        if let Err(error) = self.0.destroy() {
            eprintln!("left over: {error}");
        }
    }
}

// === impl FullPreemption ===

impl FullPreemption {
    pub(super) fn new() -> Result<Self> {
        let before = preemption().context("this kernel does not tell how it preempts")?;
        fs::write(PREEMPT, "full").context("set full preemption")?;
        Ok(Self { before })
    }
}

impl Drop for FullPreemption {
    fn drop(&mut self) {
        if let Err(error) = fs::write(PREEMPT, &self.before) {
            eprintln!("preemption stays full: {error}");
        }
    }
}

/// How the kernel preempts what is not real-time: `none`, `voluntary`, `full` or `lazy`.
fn preemption() -> Option<String> {
    let text = fs::read_to_string(PREEMPT).ok()?;
    chosen(&text).map(str::to_owned)
}

/// `none (voluntary) full`: what is in parentheses.
fn chosen(text: &str) -> Option<&str> {
    let (_, after) = text.split_once('(')?;
    Some(after.split_once(')')?.0)
}

/// The kernel and how it schedules, in a line.
pub(super) fn kernel(cgroups: bool) -> Result<String> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").context("ask for the kernel's version")?;
    let cpus = std::thread::available_parallelism()?;
    let preempt = preemption().unwrap_or_else(|| "not told".to_owned());
    let autogroup = fs::read_to_string("/proc/sys/kernel/sched_autogroup_enabled").is_ok_and(|text| text.trim() == "1");
    let groups = match (cgroups, autogroup) {
        (true, _) => "each process in cgroups of its own",
        (false, true) => "no CPU controller in cgroup v2, each process in a session of its own (autogroup)",
        (false, false) => "no CPU controller in cgroup v2",
    };
    Ok(format!(
        "Linux {}, {cpus} CPUs, preemption {preempt}, {groups}",
        release.trim()
    ))
}

/// Whether debugfs tells how the kernel preempts; mounts it in this process's own mounts where it does not.
pub(super) fn mount_debugfs() {
    if !Path::new(PREEMPT).exists() {
        let none = None::<&str>;
        let flags = nix::mount::MsFlags::empty();
        // Without it, methods that take it are left out.
        let _ = nix::mount::mount(Some("debugfs"), "/sys/kernel/debug", Some("debugfs"), flags, none);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_preemption_is_what_is_in_parentheses() {
        assert_eq!(chosen("none (voluntary) full\n"), Some("voluntary"));
        assert_eq!(chosen("(lazy)"), Some("lazy"));
        assert_eq!(chosen("none voluntary"), None);
    }
}
