//! A running agent with its controller, driven by the command line that users have.

#![allow(clippy::indexing_slicing, reason = "a JSON value that lacks a name reads as null")]

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use tempfile::TempDir;

use crate::{cache::Cache, process};

/// How long the agent may take to serve, to make machines warm or to end.
const PATIENCE: Duration = Duration::from_secs(120);
/// How often what is waited for is looked at.
const TICK: Duration = Duration::from_millis(25);

/// `stokerd` and `stoker-controller`, with all they keep in a folder of their own. Dropped, both are killed.
pub(crate) struct Agent {
    folder: TempDir,
    binaries: PathBuf,
    stokerd: Child,
    controller: Child,
}

impl Agent {
    /// Starts both with that many warm machines wanted for each runtime, and waits until the agent serves.
    pub(crate) fn start(cache: &Cache, binaries: &Path, warming: &[(&str, u32)]) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("stoker-")
            .tempdir()
            .context("make a folder for the agent")?;
        let path = |name: &str| folder.path().join(name);
        fs::write(
            path("stokerd.toml"),
            configuration(cache, binaries, folder.path(), warming),
        )
        .context("write the agent's configuration")?;
        let controller = Command::new(binaries.join("stoker-controller"))
            .arg("--json")
            .arg("--listen")
            .arg(format!("unix:{}", path("controller.sock").display()))
            .stdin(Stdio::null())
            .stdout(File::create(path("reports.jsonl")).context("make a file for reports")?)
            .spawn()
            .context("start stoker-controller")?;
        let log = File::create(path("stokerd.log")).context("make the agent's log")?;
        let stokerd = Command::new(binaries.join("stokerd"))
            .arg("--config")
            .arg(path("stokerd.toml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("share the agent's log")?)
            .stderr(log)
            .spawn()
            .context("start stokerd")?;
        let mut agent = Self {
            folder,
            binaries: binaries.to_owned(),
            stokerd,
            controller,
        };
        agent.until("the agent serves", |agent| {
            Ok(agent
                .command(&["machine", "list"])
                .output()
                .is_ok_and(|output| output.status.success()))
        })?;
        Ok(agent)
    }

    /// A file of its folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
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
        let text = fs::read_to_string(self.path("reports.jsonl")).context("read what the controller heard")?;
        // The last line may be only half written.
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        whole
            .lines()
            .map(|line| serde_json::from_str(line).with_context(|| format!("understand {line}")))
            .collect()
    }

    /// Waits for a condition, as long as the agent lives.
    pub(crate) fn until(&mut self, what: &str, mut holds: impl FnMut(&Self) -> Result<bool>) -> Result<()> {
        let start = Instant::now();
        while !holds(self)? {
            if let Some(status) = self.stokerd.try_wait().context("wait for stokerd")? {
                bail!(
                    "stokerd ended with {status}; its log:\n{}",
                    process::tail_of(&self.path("stokerd.log"))
                );
            }
            ensure!(
                start.elapsed() < PATIENCE,
                "waited {} s until {what}; stokerd's log:\n{}",
                PATIENCE.as_secs(),
                process::tail_of(&self.path("stokerd.log"))
            );
            thread::sleep(TICK);
        }
        Ok(())
    }

    /// Tells the agent to stop, as systemd does, waits until it has drained, and looks once more.
    pub(crate) fn stop_and(mut self, look: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
        let pid = i32::try_from(self.stokerd.id()).context("stokerd's process id")?;
        kill(Pid::from_raw(pid), Signal::SIGTERM).context("tell stokerd to stop")?;
        let start = Instant::now();
        loop {
            if let Some(status) = self.stokerd.try_wait().context("wait for stokerd")? {
                let log = process::tail_of(&self.path("stokerd.log"));
                ensure!(status.success(), "stokerd ended with {status}; its log:\n{log}");
                return look(&self);
            }
            ensure!(start.elapsed() < PATIENCE, "stokerd did not end");
            thread::sleep(TICK);
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        for child in [&mut self.stokerd, &mut self.controller] {
            // Fails only where it has ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The list of that name in what a list call printed; empty where it is absent, as protobuf's JSON has it.
pub(crate) fn list(value: &Value, name: &str) -> Vec<Value> {
    value[name].as_array().cloned().unwrap_or_default()
}

/// Its patience is for the lab, whose processors are emulated; a machine that is empty makes room for the next at once.
fn configuration(cache: &Cache, binaries: &Path, folder: &Path, warming: &[(&str, u32)]) -> String {
    let path = |name: &str| folder.join(name).display().to_string();
    let cached = |name: &str| cache.path(name).display().to_string();
    let warming: Vec<String> = warming
        .iter()
        .map(|(runtime, count)| format!("{runtime:?} = {count}"))
        .collect();
    format!(
        "[api]\nsocket = {:?}\n\
         [store]\npath = {:?}\n\
         [code]\npath = {:?}\n\
         [machines]\nvmm = {:?}\nkernel = {:?}\ninitramfs = {:?}\nimage = {:?}\nrun_dir = {:?}\n\
         [pool]\ninit_timeout = \"2m\"\nmachine_idle_timeout = \"1s\"\n\
         [pool.warming]\n{}\n\
         [controller]\naddress = {:?}\n",
        path("stokerd.sock"),
        path("store"),
        path("code"),
        binaries.join("stoker-vmm").display().to_string(),
        cached("kernel/tuned/vmlinux"),
        cached("image/initramfs-tuned.cpio"),
        cached("image/root.erofs"),
        path("run"),
        warming.join("\n"),
        format!("unix:{}", path("controller.sock")),
    )
}
