//! An agent with its controller: two processes, with a configuration and all they keep in a folder of their own.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use stoker_linux::Cgroup;
use tempfile::TempDir;

/// How long the agent may take to serve, to make machines warm or to end. Generous: the lab emulates its processors, and
/// others use the machine.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// How often what is waited for is looked at.
pub const TICK: Duration = Duration::from_millis(20);

/// A key of the agent's configuration, as `pool.queue_timeout`, and its value.
pub type Setting = (&'static str, Value);

/// `stokerd` and `stoker-controller`. Dropped, both are killed, and their machines with them.
#[derive(Debug)]
pub struct Processes {
    program: PathBuf,
    stokerd: Child,
    started: Instant,
    controller: Child,
    cgroup: Cgroup,
    folder: TempDir,
    /// On a disk, also in the lab, where all else is in memory.
    _scratch: TempDir,
}

// === impl Processes ===

impl Processes {
    /// Starts both programs, which lie in `binaries`, and does not wait until they serve. Their machines boot what is in
    /// the cache folder. A setting takes the place of an earlier one of the same key.
    ///
    /// # Errors
    ///
    /// Where there is no cgroup v2, or a file can't be written or a program not be started.
    pub fn start(binaries: &Path, cache: &Path, settings: &[Setting]) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("stoker-")
            .tempdir()
            .context("make a folder for the agent")?;
        let scratch = tempfile::Builder::new()
            .prefix("stoker-")
            .tempdir_in("/var/tmp")
            .context("make a folder for the machines' scratch disks")?;
        let path = |name: &str| folder.path().join(name);
        let name = folder.path().file_name().context("the folder has no name")?;
        let cgroup = Cgroup::at(Cgroup::mount()?.join(name));
        let text = |path: PathBuf| Value::from(path.display().to_string());
        let places = [
            ("api.socket", text(path("stokerd.sock"))),
            ("store.path", text(path("store"))),
            ("code.path", text(path("code"))),
            ("machines.vmm", text(binaries.join("stoker-vmm"))),
            ("machines.kernel", text(cache.join("kernel/tuned/vmlinux"))),
            ("machines.initramfs", text(cache.join("image/initramfs-tuned.cpio"))),
            ("machines.image", text(cache.join("image/root.erofs"))),
            ("machines.run_dir", text(path("run"))),
            ("machines.scratch_dir", text(scratch.path().to_owned())),
            ("machines.cgroup", text(name.into())),
            ("controller.address", controller(folder.path()).into()),
        ];
        let settings = places.into_iter().chain(settings.iter().cloned());
        fs::write(path("stokerd.toml"), configuration(settings)).context("write the agent's configuration")?;
        let controller = start_controller(binaries, folder.path())?;
        let program = binaries.join("stokerd");
        let started = Instant::now();
        let stokerd = start(&program, folder.path())?;
        Ok(Self {
            program,
            stokerd,
            started,
            controller,
            cgroup,
            folder,
            _scratch: scratch,
        })
    }

    /// Their folder.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A file of their folder, as `stokerd.sock`.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The cgroup that `machines.cgroup` names.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// The cgroups of the machines that there are.
    ///
    /// # Errors
    ///
    /// Where the agent has not come so far as to make the cgroup that they are in.
    pub fn machine_cgroups(&self) -> Result<Vec<Cgroup>> {
        Ok(Cgroup::at(self.cgroup.path().join("machines")).children()?)
    }

    /// What the agent has logged.
    pub fn log(&self) -> String {
        let log = fs::read(self.path("stokerd.log")).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }

    /// What the controller has heard so far, an event a value.
    ///
    /// # Errors
    ///
    /// Where the controller printed what is no JSON.
    pub fn reports(&self) -> Result<Vec<Value>> {
        let text = fs::read_to_string(self.path("reports.jsonl")).context("read what the controller heard")?;
        // The last line may be only half written.
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        whole
            .lines()
            .map(|line| serde_json::from_str(line).with_context(|| format!("understand {line}")))
            .collect()
    }

    /// How the agent has ended, where it has.
    ///
    /// # Errors
    ///
    /// What waitpid(2) returns.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.stokerd.try_wait().context("wait for stokerd")
    }

    /// The agent's process id.
    ///
    /// # Errors
    ///
    /// Never, on Linux.
    pub fn pid(&self) -> Result<Pid> {
        let pid = self.stokerd.id().try_into().context("stokerd's process id")?;
        Ok(Pid::from_raw(pid))
    }

    /// When the agent was last started.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Waits until the agent has ended. Blocks.
    ///
    /// # Errors
    ///
    /// Where it has not within [`PATIENCE`], with its log.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            ensure!(
                start.elapsed() < PATIENCE,
                "stokerd did not end; its log:\n{}",
                self.log()
            );
            thread::sleep(TICK);
        }
    }

    /// Ends the agent alone by a signal, and starts it again with the same configuration, once it has ended. Does not wait
    /// until it serves. Blocks.
    ///
    /// # Errors
    ///
    /// Where it does not end within [`PATIENCE`], or can't be started.
    pub fn restart(&mut self, signal: Signal) -> Result<()> {
        kill(self.pid()?, signal).context("end stokerd")?;
        self.wait()?;
        self.started = Instant::now();
        self.stokerd = start(&self.program, self.folder.path())?;
        Ok(())
    }

    /// What a loss of power leaves of this host: its disk. All processes end at once, and cgroups, pinned eBPF objects and the
    /// run folder are gone; controller and agent are started again. Does not wait until it serves. Blocks.
    ///
    /// # Errors
    ///
    /// Where something of it can't be removed, or can't be started.
    pub fn reboot(&mut self, host: &str) -> Result<()> {
        end(&mut self.stokerd);
        end(&mut self.controller);
        self.cgroup.destroy()?;
        fs::remove_dir_all(self.path("run")).context("remove the run folder")?;
        fs::remove_dir_all(Path::new("/sys/fs/bpf").join(format!("stoker-{host}"))).context("remove what is pinned")?;
        let binaries = self.program.parent().context("the agent's program has no folder")?;
        self.controller = start_controller(binaries, self.folder.path())?;
        self.started = Instant::now();
        self.stokerd = start(&self.program, self.folder.path())?;
        Ok(())
    }

    /// Kills the controller: what is reported from now on waits.
    pub fn kill_controller(&mut self) {
        end(&mut self.controller);
    }

    /// Puts another build in the place of the agent's program, by a rename as package managers do. The agent that runs goes
    /// on; the next start is of that build. Blocks.
    ///
    /// # Errors
    ///
    /// Where it can't be copied.
    pub fn upgrade(&mut self, build: &Path) -> Result<()> {
        let (new, program) = (self.path("stokerd.new"), self.path("stokerd"));
        fs::copy(build, &new).with_context(|| format!("copy {}", build.display()))?;
        fs::rename(&new, &program).context("put the new program in its place")?;
        self.program = program;
        Ok(())
    }

    /// Tells the agent to end its machines and itself, as Ctrl-C does, and waits until it has. Blocks.
    ///
    /// # Errors
    ///
    /// Where it does not end, or not well, with its log, or leaves a machine's cgroup.
    pub fn stop(&mut self) -> Result<()> {
        if self.ended()?.is_none() {
            kill(self.pid()?, Signal::SIGINT).context("tell stokerd to stop")?;
        }
        let status = self.wait()?;
        ensure!(
            status.success(),
            "stokerd ended with {status}; its log:\n{}",
            self.log()
        );
        let left = self.machine_cgroups()?;
        ensure!(left.is_empty(), "cgroups are left behind: {left:?}");
        Ok(())
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        end(&mut self.stokerd);
        end(&mut self.controller);
        // Fails only where it is gone already.
        let _ = self.cgroup.destroy();
    }
}

/// Kills a process.
fn end(child: &mut Child) {
    // Each fails only at what has ended already.
    let _ = child.kill();
    let _ = child.wait();
}

/// Starts a controller at the socket in a folder; what it has heard goes on where there is some.
fn start_controller(binaries: &Path, folder: &Path) -> Result<Child> {
    let reports = File::options()
        .create(true)
        .append(true)
        .open(folder.join("reports.jsonl"));
    Command::new(binaries.join("stoker-controller"))
        .args(["--json", "--listen", &controller(folder)])
        .stdin(Stdio::null())
        .stdout(reports.context("open the file of reports")?)
        .spawn()
        .context("start stoker-controller")
}

/// Where the controller listens.
fn controller(folder: &Path) -> String {
    format!("unix:{}", folder.join("controller.sock").display())
}

/// Starts an agent with the configuration in a folder; its log goes on where there is one.
fn start(program: &Path, folder: &Path) -> Result<Child> {
    let log = File::options()
        .create(true)
        .append(true)
        .open(folder.join("stokerd.log"))
        .context("open the agent's log")?;
    Command::new(program)
        .arg("--config")
        .arg(folder.join("stokerd.toml"))
        .stdin(Stdio::null())
        .stdout(log.try_clone().context("share the agent's log")?)
        .stderr(log)
        .spawn()
        .context("start stokerd")
}

/// A TOML file with a line a key, the last setting of each.
fn configuration(settings: impl Iterator<Item = Setting>) -> String {
    let settings: BTreeMap<_, _> = settings.collect();
    let lines = settings
        .into_iter()
        .map(|(key, value)| format!("{key} = {}\n", toml(&value)));
    lines.collect()
}

/// A value in TOML, which is as in JSON but for tables.
fn toml(value: &Value) -> String {
    let Value::Object(table) = value else {
        return value.to_string();
    };
    let pairs: Vec<_> = table
        .iter()
        .map(|(key, value)| format!("{} = {}", Value::from(key.as_str()), toml(value)))
        .collect();
    format!("{{ {} }}", pairs.join(", "))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_configuration_is_toml() {
        let settings = [
            ("pool.queue", json!(1)),
            ("log.level", json!("a \"quoted\" word")),
            ("pool.warming", json!({ "python3.11": 1, "provided": 2 })),
            ("pool.queue", json!(2)),
        ];
        assert_eq!(
            configuration(settings.into_iter()),
            "log.level = \"a \\\"quoted\\\" word\"\n\
             pool.queue = 2\n\
             pool.warming = { \"provided\" = 2, \"python3.11\" = 1 }\n"
        );
    }
}
