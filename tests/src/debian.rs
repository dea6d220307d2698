//! A Debian with systemd as its process 1, in namespaces of its own: a folder's file system under a layer in memory, and the
//! host's kernel, `/dev/kvm` and all that a machine takes.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use stoker_linux::Cgroup;
use stoker_testkit::agent::PATIENCE;
use tempfile::TempDir;

/// Makes the file system of `$1`, with the layer in the folder `$2` and the folder `$3` as `/srv`, the root, and starts
/// systemd in it. Its mounts, processes and cgroups are seen by nobody else, and end with it.
const BOOT: &str = r#"set -e
# As large as a disk, so that the agent has room to promise scratch disks of; what is written is little.
mount -t tmpfs -o size=8g layer "$2"
mkdir "$2/upper" "$2/work" "$2/root"
mount -t overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" root "$2/root"
cd "$2/root"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
# Until who started it is out of this cgroup, which could not pass controllers on: a process of elsewhere has no id here.
while grep -q '^0$' sys/fs/cgroup/cgroup.procs; do sleep 0.01; done
mount -t bpf bpf sys/fs/bpf
mount -t tracefs tracefs sys/kernel/tracing
mount -t tmpfs -o mode=755 dev dev
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
for device in null zero full random urandom tty kvm; do
  touch dev/$device
  mount --bind /dev/$device dev/$device
done
mount -t tmpfs -o mode=755 run run
mount -t tmpfs -o mode=1777 tmp tmp
mount --bind "$3" srv
hostname debian
pivot_root . .
umount -l .
# systemd knows by the variable that it has to bring up no hardware.
exec env -i container=stoker PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd
"#;

/// The controllers that systemd and the agent pass on to what they start.
const CONTROLLERS: [&str; 5] = ["cpu", "cpuset", "io", "memory", "pids"];

/// The pause between two looks, each of which is a process.
const PAUSE: Duration = Duration::from_millis(200);

/// A running Debian. Dropped, it is killed with all that runs in it.
#[derive(Debug)]
pub struct Debian {
    cgroup: Cgroup,
    starter: Child,
    init: u32,
    _layer: TempDir,
}

// === impl Debian ===

impl Debian {
    /// Boots the Debian in the folder `root` and waits until it is up. `srv` is its `/srv`. Blocks.
    ///
    /// # Errors
    ///
    /// Where it does not come up.
    pub fn boot(root: &Path, srv: &Path) -> anyhow::Result<Self> {
        let layer = tempfile::Builder::new().prefix("stoker-").tempdir()?;
        let name = layer.path().file_name().context("the folder has no name")?;
        let mount = Cgroup::at(Cgroup::mount()?);
        for controller in CONTROLLERS {
            mount.enable(controller)?;
        }
        let cgroup = mount.create(name)?;
        let mut command = Command::new("sh");
        command
            .args(["-c", "echo $$ > \"$0\" && exec \"$@\""])
            .arg(cgroup.path().join("cgroup.procs"))
            .args(["unshare", "--cgroup", "--mount", "--pid", "--uts", "--ipc", "--fork"])
            .args(["sh", "-c", BOOT, "sh"])
            .args([root, layer.path(), srv])
            .stdin(Stdio::null());
        let starter = match command.spawn() {
            Ok(starter) => starter,
            Err(error) => {
                cgroup.destroy()?;
                return Err(error).context("start unshare (Debian package util-linux)");
            }
        };
        let mut debian = Self {
            cgroup,
            starter,
            init: 0,
            _layer: layer,
        };
        debian.init = debian.find_init()?;
        let up = "systemctl is-system-running || true";
        debian.until(up, |state| matches!(state, "running" | "degraded"))?;
        Ok(debian)
    }

    /// Its process 1, as this process numbers it: the child of unshare.
    fn find_init(&mut self) -> anyhow::Result<u32> {
        let starter = self.starter.id();
        let ours = Cgroup::of_this_process(&Cgroup::mount()?)?;
        let children = PathBuf::from(format!("/proc/{starter}/task/{starter}/children"));
        let start = Instant::now();
        loop {
            if let Some(status) = self.starter.try_wait()? {
                bail!("the Debian ended at its start: {status}");
            }
            let text = std::fs::read_to_string(&children).unwrap_or_default();
            if let Some(init) = text.split_whitespace().next() {
                let init: u32 = init.parse().context("a process id")?;
                // It made the namespace and its child, and has only to wait.
                ours.take(starter)?;
                // Until then it is the shell that makes the file system.
                let name = std::fs::read_to_string(format!("/proc/{init}/comm")).unwrap_or_default();
                if name.trim() == "systemd" {
                    return Ok(init);
                }
            }
            ensure!(start.elapsed() < PATIENCE, "systemd did not start");
            thread::sleep(PAUSE);
        }
    }

    /// A shell in it that runs a script and ends at its first error.
    pub fn command(&self, script: &str) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args(["--target", &self.init.to_string()])
            .args(["--cgroup", "--mount", "--pid", "--uts", "--ipc", "--"])
            .args(["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"])
            .args(["DEBIAN_FRONTEND=noninteractive", "sh", "-ec", script])
            .stdin(Stdio::null());
        command
    }

    /// Runs a script in it and returns what that prints, without surrounding white space. Blocks.
    ///
    /// # Errors
    ///
    /// Where it fails, with what it printed.
    pub fn run(&self, script: &str) -> anyhow::Result<String> {
        let output = self.command(script).output().context("start nsenter")?;
        let Output { status, stdout, stderr } = output;
        let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
        ensure!(status.success(), "`{script}` failed ({status}):\n{stdout}{stderr}");
        Ok(stdout.trim().to_owned())
    }

    /// Runs a script again and again until what it prints is as wanted, and returns that. Blocks.
    ///
    /// # Errors
    ///
    /// Where that does not come in time, with what the script did last.
    pub fn until(&self, script: &str, wanted: impl Fn(&str) -> bool) -> anyhow::Result<String> {
        let start = Instant::now();
        loop {
            let printed = self.run(script);
            match printed {
                Ok(printed) if wanted(&printed) => return Ok(printed),
                printed if start.elapsed() > PATIENCE => bail!("waited {PATIENCE:?} for `{script}`; last: {printed:?}"),
                _ => thread::sleep(PAUSE),
            }
        }
    }
}

impl Drop for Debian {
    fn drop(&mut self) {
        // Where it has not come up, what starts it is in there too; else that ends with its process 1.
        if let Err(error) = self.cgroup.destroy() {
            eprintln!("a Debian is left over: {error}");
        }
        let _ = self.starter.wait();
    }
}
