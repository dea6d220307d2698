//! The lab: a known host with cgroup v2, eBPF and a real `/dev/kvm`, on any machine.
//!
//! QEMU (TCG) with AMD's virtualisation emulated runs a Debian kernel. This machine's root file system is shown in it
//! read-only by 9p, under an overlay whose writable layer is in the lab's memory, so that every path is the same as here. Only
//! `/var/tmp` is a disk: a file of this machine's that is there for one run, and takes of its disk what is written.
//! The command's output comes out by virtio-serial ports, its exit code and `$STOKER_LAB_OUT` by a writable 9p share.
//! Nothing in it has a fixed port or name: labs may run side by side.

mod kernel;
mod qemu_patch;
mod setup;

use std::{
    collections::BTreeMap,
    env,
    ffi::OsString,
    fmt,
    fs::{self, File},
    io::{self, Write},
    os::{fd::AsRawFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::{cache::Cache, process, setup as steps};
pub(crate) use kernel::Kernel;
pub(crate) use setup::{KERNEL, QEMU, decompress, with_dependencies};

/// Exit code of a lab that ran out of time, as timeout(1) has it.
const TIMED_OUT: u8 = 124;
/// A lab that has not started its command by then hangs; it takes 4 s.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// On a very busy machine an emulated boot can fail for want of time.
const BOOT_ATTEMPTS: u32 = 3;
/// The console of the lab that died last, in the cache.
const DEATH: &str = "logs/lab-died.log";
/// How often a running lab is looked at.
const TICK: Duration = Duration::from_millis(50);
/// Each of a lab's processors gives a sign of life every 5 s. One that has not for so long is stuck: not seen with QEMU 11,
/// but often with 10.0, whose emulation of SVM could leave one halted for ever.
const STILL_LIMIT: Duration = Duration::from_secs(90);

/// Emulated, `rep movsb` and `rep stosb` go byte by byte: a lab told that they are fast (ERMS and the like) cleared pages at a
/// third of the speed, and booted machines in twice the time.
const CPU: &str = "max,+svm,-erms,-fsrm,-fzrm,-fsrs";

/// What the lab's disk holds, in bytes.
const DISK_BYTES: u64 = 64 << 30;

/// Variables that the command gets from here; all others would only tie it to this shell.
const KEPT: &[&str] = &[
    "PATH",
    "HOME",
    "TERM",
    "RUST_LOG",
    "RUST_BACKTRACE",
    "CI",
    "XDG_CACHE_HOME",
];

/// A command to run in the lab.
#[derive(Debug, Clone)]
pub(crate) struct Lab {
    command: Vec<OsString>,
    kernel: Kernel,
    cpus: u32,
    memory_mib: u32,
    timeout: Duration,
    out: Option<PathBuf>,
    env: BTreeMap<String, OsString>,
}

impl Lab {
    /// A lab of 2 CPUs and 6 GiB that runs the command for at most half an hour.
    pub(crate) fn new(command: Vec<OsString>) -> Self {
        let mut env: BTreeMap<String, OsString> = env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
            .filter(|(name, _)| KEPT.contains(&name.as_str()) || name.starts_with("STOKER_"))
            .collect();
        env.entry("PATH".to_owned())
            .or_insert_with(|| "/usr/sbin:/usr/bin:/sbin:/bin".into());
        env.insert("STOKER_LAB".to_owned(), "1".into());
        Self {
            command,
            kernel: Kernel::default(),
            cpus: 2,
            memory_mib: 6144,
            timeout: Duration::from_secs(1800),
            out: None,
            env,
        }
    }

    pub(crate) fn kernel(mut self, kernel: Kernel) -> Self {
        self.kernel = kernel;
        self
    }

    pub(crate) fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// Memory in MiB.
    pub(crate) fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// Time from the start of QEMU after which it is stopped.
    pub(crate) fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The folder to show as `$STOKER_LAB_OUT`; a temporary one where there is none.
    pub(crate) fn out(mut self, out: Option<PathBuf>) -> Self {
        self.out = out;
        self
    }

    /// Sets a variable of the command's environment.
    pub(crate) fn env(mut self, name: impl Into<String>, value: impl Into<OsString>) -> Self {
        self.env.insert(name.into(), value.into());
        self
    }

    /// Boots the lab, runs the command and returns its exit code (124 if time ran out).
    pub(crate) fn run(&self, cache: &Cache) -> Result<u8> {
        steps::ensure(cache, &self.kernel.steps())?;
        let run = tempfile::Builder::new()
            .prefix("stoker-lab-")
            .tempdir()
            .context("make a folder for the lab")?;
        let control = run.path().join("control");
        fs::create_dir(&control).context("make a folder for the lab")?;
        let out = match &self.out {
            Some(out) => {
                fs::create_dir_all(out).with_context(|| format!("make {}", out.display()))?;
                out.canonicalize().with_context(|| format!("find {}", out.display()))?
            }
            None => {
                let out = run.path().join("out");
                fs::create_dir(&out).context("make a folder for the lab")?;
                out
            }
        };
        fs::write(control.join("command"), self.script()?).context("write the lab's command")?;
        let disk = Disk::make(cache)?;
        let console = run.path().join("console.log");
        let started = control.join("started");
        let mut ended = Ended::NeverStarted;
        for attempt in 1..=BOOT_ATTEMPTS {
            let mut qemu = Running::start(&mut self.qemu(cache, &control, &out, &disk, &console))?;
            ended = qemu.wait(self.timeout, &control)?;
            if started.exists() || matches!(ended, Ended::OutOfTime) {
                break;
            }
            // Nothing of the command was done yet, so that another try is safe.
            eprintln!(
                "the lab did not come up (try {attempt} of {BOOT_ATTEMPTS}); its console said last:\n{}",
                process::tail_of(&console)
            );
        }
        match (ended, fs::read_to_string(control.join("status"))) {
            (Ended::Over(_), Ok(status)) => status
                .trim()
                .parse()
                .with_context(|| format!("the lab left an odd exit code: {status}")),
            (Ended::Over(how), Err(_)) if started.exists() => {
                let kept = cache.path(DEATH);
                fs::copy(&console, &kept).context("keep the lab's console")?;
                Err(Died {
                    how,
                    console: process::tail_of(&console),
                    kept,
                }
                .into())
            }
            (Ended::Over(_) | Ended::NeverStarted, _) => bail!("the lab did not come up"),
            (Ended::OutOfTime, _) => {
                eprintln!(
                    "error: the lab was stopped after {} s (--timeout); its console said last:\n{}",
                    self.timeout.as_secs(),
                    process::tail_of(&console)
                );
                Ok(TIMED_OUT)
            }
        }
    }

    /// What the lab's init runs.
    fn script(&self) -> Result<Vec<u8>> {
        let mut script = Vec::new();
        for (name, value) in &self.env {
            write!(script, "export {name}=").context("write the lab's command")?;
            quote(value.as_bytes(), &mut script);
            script.push(b'\n');
        }
        script.extend_from_slice(b"cd ");
        quote(
            env::current_dir()
                .context("find the current folder")?
                .as_os_str()
                .as_bytes(),
            &mut script,
        );
        script.extend_from_slice(b" || exit 126\nexec");
        for word in &self.command {
            script.push(b' ');
            quote(word.as_bytes(), &mut script);
        }
        script.push(b'\n');
        Ok(script)
    }

    fn qemu(&self, cache: &Cache, control: &Path, out: &Path, disk: &Disk, console: &Path) -> Command {
        let kernel = cache.path(self.kernel.folder());
        // setpriv: QEMU must not outlive us, however we end.
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL"])
            .arg(cache.path(setup::QEMU_PROGRAM));
        command.args([
            "-M",
            "q35",
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            CPU,
            "-nodefaults",
            "-no-user-config",
        ]);
        command.args(["-display", "none", "-no-reboot", "-monitor", "none"]);
        command.arg("-smp").arg(self.cpus.to_string());
        command.arg("-m").arg(self.memory_mib.to_string());
        command.arg("-kernel").arg(kernel.join("vmlinuz"));
        command.arg("-initrd").arg(kernel.join("initramfs.cpio"));
        command.arg("-append").arg(format!(
            // What is calibrated or checked against time would fail where the host is slow to run us.
            "console=ttyS0 quiet loglevel=4 panic=-1 psi=1 mitigations=off nowatchdog no_timer_check tsc=reliable \
             rcupdate.rcu_cpu_stall_suppress=1 stoker.modules={}",
            kernel.join("modules").display()
        ));
        command.arg("-serial").arg(format!("file:{}", console.display()));
        command.args(["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]);
        for name in ["stdout", "stderr"] {
            // Opened anew by QEMU, which works on the pipes that we made of them.
            command.arg("-chardev").arg(format!("file,id={name},path=/dev/{name}"));
            command
                .arg("-device")
                .arg(format!("virtserialport,chardev={name},name={name}"));
        }
        // Unsafe: nothing of it outlives the run, so nothing waits for this machine's disk.
        command.arg("-drive").arg(format!(
            "id=disk,if=none,format=raw,cache=unsafe,discard=unmap,file={}",
            disk.path().display()
        ));
        command.args(["-device", "virtio-blk-pci,drive=disk"]);
        let host = "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap";
        command.args(["-virtfs", host]);
        for (tag, path) in [("control", control), ("out", out)] {
            let path = path.display().to_string().replace(',', ",,");
            command.arg("-virtfs").arg(format!(
                "local,path={path},mount_tag={tag},security_model=none,multidevs=remap"
            ));
        }
        command
    }
}

/// The lab's disk: a file without a name, which is gone with this process, however that ends.
struct Disk(File);

impl Disk {
    /// Makes an empty one with a file system on it. Beside the cache, where there is room.
    fn make(cache: &Cache) -> Result<Self> {
        let file = tempfile::tempfile_in(cache.root()).context("make a file for the lab's disk")?;
        file.set_len(DISK_BYTES).context("make the lab's disk")?;
        let disk = Self(file);
        // A journal would never be read; tables of inodes are made as they come into use.
        process::output(
            Command::new("/usr/sbin/mke2fs")
                .args([
                    "-q",
                    "-t",
                    "ext4",
                    "-O",
                    "^has_journal",
                    "-E",
                    "lazy_itable_init=1,nodiscard",
                ])
                .args(["-m", "0", "-i", "262144"])
                .arg(disk.path()),
        )
        .context("make a file system on the lab's disk")?;
        Ok(disk)
    }

    /// By which programs that this one starts can open it.
    fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()).into()
    }
}

/// The QEMU that the lab runs in, for other uses.
pub(crate) fn qemu(cache: &Cache) -> Command {
    Command::new(cache.path(setup::QEMU_PROGRAM))
}

/// Whether this runs in the lab.
pub(crate) fn is_inside() -> bool {
    env::var_os("STOKER_LAB").is_some()
}

/// Appends the word, quoted for a POSIX shell.
fn quote(word: &[u8], script: &mut Vec<u8>) {
    script.push(b'\'');
    for byte in word {
        match byte {
            b'\'' => script.extend_from_slice(b"'\\''"),
            byte => script.push(*byte),
        }
    }
    script.push(b'\'');
}

enum Ended {
    /// By itself, or one of its processors had stood still: says which.
    Over(String),
    OutOfTime,
    NeverStarted,
}

/// The lab's own kernel, or QEMU, ended in the middle of a command.
#[derive(Debug)]
pub(crate) struct Died {
    how: String,
    /// What it said last.
    console: String,
    /// The whole of it.
    kept: PathBuf,
}

impl fmt::Display for Died {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "the lab ended before its command did ({}); its console, kept in {}, said last:\n{}",
            self.how,
            self.kept.display(),
            self.console
        )
    }
}

impl std::error::Error for Died {}

/// A running QEMU; stopped when dropped.
struct Running {
    child: Child,
    start: Instant,
    copies: Vec<JoinHandle<io::Result<u64>>>,
}

impl Running {
    fn start(command: &mut Command) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("start QEMU by setpriv (Debian package util-linux)")?;
        let mut copies = Vec::new();
        if let Some(mut stdout) = child.stdout.take() {
            copies.push(thread::spawn(move || io::copy(&mut stdout, &mut io::stdout())));
        }
        if let Some(mut stderr) = child.stderr.take() {
            copies.push(thread::spawn(move || io::copy(&mut stderr, &mut io::stderr())));
        }
        Ok(Self {
            child,
            start: Instant::now(),
            copies,
        })
    }

    /// Waits for QEMU's end, at most so long. What the lab leaves in the control folder says that the command was started,
    /// and that its processors run.
    fn wait(&mut self, timeout: Duration, control: &Path) -> Result<Ended> {
        let (started, alive) = (control.join("started"), control.join("alive"));
        let mut is_started = false;
        let ended = loop {
            if let Some(status) = self.child.try_wait().context("wait for QEMU")? {
                break Ended::Over(format!("QEMU: {status}"));
            }
            let elapsed = self.start.elapsed();
            is_started = is_started || started.exists();
            if elapsed > timeout {
                break Ended::OutOfTime;
            }
            if !is_started && elapsed > BOOT_LIMIT {
                break Ended::NeverStarted;
            }
            if is_started && longest_silence(&alive) > STILL_LIMIT {
                let limit = STILL_LIMIT.as_secs();
                break Ended::Over(format!("one of its processors had stood still for {limit} s"));
            }
            thread::sleep(TICK);
        };
        self.stop();
        Ok(ended)
    }

    fn stop(&mut self) {
        // Fails only where it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        for copy in self.copies.drain(..) {
            // Fails where our own output is closed: nobody is left to tell.
            let _ = copy.join();
        }
        let _ = io::stdout().flush();
    }
}

/// The age of the oldest file in a folder; zero where there is none.
fn longest_silence(folder: &Path) -> Duration {
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    let ages = files.filter_map(|file| file.metadata().ok()?.modified().ok()?.elapsed().ok());
    ages.max().unwrap_or_default()
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_that_stands_still_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(longest_silence(&folder.path().join("none")), Duration::ZERO);
        fs::write(folder.path().join("0"), "").unwrap();
        let still = fs::File::create(folder.path().join("1")).unwrap();
        still
            .set_modified(std::time::SystemTime::now() - Duration::from_secs(100))
            .unwrap();
        let silence = longest_silence(folder.path());
        assert!(
            silence > STILL_LIMIT && silence < Duration::from_secs(200),
            "{silence:?}"
        );
    }

    #[test]
    fn the_disk_has_a_file_system_and_no_name() {
        let folder = tempfile::tempdir().unwrap();
        let disk = Disk::make(&Cache::at(folder.path())).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        let mut magic = [0; 2];
        // `s_magic` in the superblock, which starts at 1024 bytes.
        std::os::unix::fs::FileExt::read_exact_at(&disk.0, &mut magic, 1024 + 0x38).unwrap();
        assert_eq!(magic, [0x53, 0xef]);
        let metadata = disk.0.metadata().unwrap();
        assert_eq!(metadata.len(), DISK_BYTES);
        let taken = std::os::unix::fs::MetadataExt::blocks(&metadata) * 512;
        assert!(taken < 64 << 20, "{taken} bytes");
    }

    #[test]
    fn the_script_keeps_every_word_as_it_is() {
        let words = ["printf", "%s|", "it's", "$HOME `x` \"q\"", "", "a b\nc"];
        let script = Lab::new(words.iter().map(OsString::from).collect())
            .env("NAME", "a'b")
            .script()
            .unwrap();
        let output = Command::new("sh")
            .arg("-c")
            .arg(OsString::from(String::from_utf8(script).unwrap()))
            .output()
            .unwrap();
        assert_eq!(
            String::from_utf8(output.stdout).unwrap(),
            "it's|$HOME `x` \"q\"||a b\nc|"
        );
    }
}
