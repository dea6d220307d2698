//! A running agent with its controller, driven by the command line that users have.

#![allow(clippy::indexing_slicing, reason = "a JSON value that lacks a name reads as null")]

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{sys::signal::Signal, unistd::Pid};
use serde_json::Value;
use stoker_testkit::agent::{PATIENCE, Processes, TICK};

use crate::{cache::Cache, process};

/// What machines boot.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kernel {
    /// Debian's own, which is there as soon as it is downloaded.
    Stock,
    /// Ours, which takes minutes to compile and boots in a quarter of the time.
    Tuned,
}

impl Kernel {
    /// It and its initramfs, in the cache folder.
    fn files(self) -> [&'static str; 2] {
        match self {
            Self::Stock => ["kernel/stock/vmlinux", "image/initramfs-stock.cpio"],
            Self::Tuned => ["kernel/tuned/vmlinux", "image/initramfs-tuned.cpio"],
        }
    }
}

/// `stokerd` and `stoker-controller`, with all they keep in a folder of their own. Dropped, both are killed.
pub(crate) struct Agent {
    processes: Processes,
    binaries: PathBuf,
}

impl Agent {
    /// Starts both with so many warm machines wanted for each runtime, which boot that kernel, and waits until the agent
    /// serves. Its patience is for the lab, whose processors are emulated; a machine that is empty makes room for the next
    /// at once.
    pub(crate) fn start(cache: &Cache, binaries: &Path, kernel: Kernel, warming: Value) -> Result<Self> {
        let [kernel, initramfs] = kernel.files().map(|file| cache.path(file).display().to_string());
        let settings = [
            ("machines.kernel", kernel.into()),
            ("machines.initramfs", initramfs.into()),
            ("pool.init_timeout", "2m".into()),
            ("pool.machine_idle_timeout", "1s".into()),
            ("pool.warming", warming),
        ];
        let mut agent = Self {
            processes: Processes::start(binaries, cache.root(), &settings)?,
            binaries: binaries.to_owned(),
        };
        agent.until_it_serves()?;
        Ok(agent)
    }

    /// Kills the agent alone, starts it again, and waits until it serves.
    pub(crate) fn kill_and_start(&mut self) -> Result<()> {
        self.processes.restart(Signal::SIGKILL)?;
        self.until_it_serves()
    }

    /// How long ago it was started.
    pub(crate) fn age(&self) -> Duration {
        self.processes.started().elapsed()
    }

    fn until_it_serves(&mut self) -> Result<()> {
        self.until("the agent serves", |agent| {
            Ok(agent
                .command(&["machine", "list"])
                .output()
                .is_ok_and(|output| output.status.success()))
        })
    }

    /// A file of its folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.processes.path(name)
    }

    /// `stoker ARGUMENTS`, speaking to this agent.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.binaries.join("stoker"));
        command
            .arg("--socket")
            .arg(self.path("stokerd.sock"))
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    /// What `stoker ARGUMENTS --json` prints.
    pub(crate) fn ask(&self, arguments: &[&str]) -> Result<Value> {
        let mut command = self.command(arguments);
        let text = process::output(command.arg("--json"))?;
        serde_json::from_str(&text).with_context(|| format!("understand what `{}` printed", process::line(&command)))
    }

    /// The agent's process id.
    pub(crate) fn pid(&self) -> Result<Pid> {
        self.processes.pid()
    }

    /// Every machine that runs.
    pub(crate) fn machines(&self) -> Result<Vec<Value>> {
        Ok(list(&self.ask(&["machine", "list"])?, "machines"))
    }

    /// Waits until there are that many warm machines.
    pub(crate) fn until_warm(&mut self, count: usize) -> Result<Vec<Value>> {
        let mut warm = Vec::new();
        self.until("machines are warm", |agent| {
            warm = agent.machines()?;
            warm.retain(|machine| machine["state"] == "WARMING");
            Ok(warm.len() >= count)
        })?;
        Ok(warm)
    }

    /// What the controller has heard, an event a value.
    pub(crate) fn reports(&self) -> Result<Vec<Value>> {
        self.processes.reports()
    }

    /// Waits for a condition, as long as the agent lives.
    pub(crate) fn until(&mut self, what: &str, mut holds: impl FnMut(&Self) -> Result<bool>) -> Result<()> {
        let start = Instant::now();
        while !holds(self)? {
            if let Some(status) = self.processes.ended()? {
                bail!("stokerd ended with {status}; its log:\n{}", self.processes.log());
            }
            ensure!(
                start.elapsed() < PATIENCE,
                "waited {} s until {what}; stokerd's log:\n{}",
                PATIENCE.as_secs(),
                self.processes.log()
            );
            thread::sleep(TICK);
        }
        Ok(())
    }

    /// Tells the agent to stop, as systemd does, and waits until it has drained.
    pub(crate) fn stop(&mut self) -> Result<()> {
        self.processes.stop()
    }
}

/// The list of that name in what a list call printed; empty where it is absent, as protobuf's JSON has it.
pub(crate) fn list(value: &Value, name: &str) -> Vec<Value> {
    value[name].as_array().cloned().unwrap_or_default()
}
