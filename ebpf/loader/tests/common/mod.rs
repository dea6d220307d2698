//! Loads that run in cgroups. A load is this test binary run once more, with what to do in its environment: see [`run_as_load`].
#![allow(dead_code, reason = "no program of tests needs all of it")]

use std::fs;
use std::hint::black_box;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MsFlags, mount};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use stoker_ebpf::{CgroupId, Ledger, Limits, LoadError, Part};

pub(crate) mod system;

use system::{Cgroup, wait_for};

/// Where the load is to go; not set once it has begun anew there.
const CGROUP: &str = "STOKER_TEST_CGROUP";
const LOAD: &str = "STOKER_TEST_LOAD";

/// The first of the ids under which `visit` adds subjects: of no cgroup that there is.
pub(crate) const VISITORS: u64 = 1 << 60;

/// Whether two figures agree to so many percent of the second.
pub(crate) fn agree(what: &str, ours: u64, theirs: u64, percent: f64) -> Result<()> {
    let off = (ours as f64 / theirs as f64 - 1.0) * 100.0;
    println!("{what}: ours {ours}, theirs {theirs}, off {off:+.3}%");
    ensure!(
        off.abs() <= percent,
        "{what}: ours {ours}, theirs {theirs}: off {off:+.2}%, more than {percent}%"
    );
    Ok(())
}

/// A process that works in a cgroup.
pub(crate) struct Load {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Load {
    /// Starts one in a cgroup and waits until it is about to begin.
    pub(crate) fn start(cgroup: &Cgroup, load: &str) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args([
                "--exact",
                "load",
                "--include-ignored",
                "--nocapture",
                "--test-threads=1",
            ])
            .env(CGROUP, cgroup.path())
            .env(LOAD, load)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = child.stdin.take().context("its input")?;
        let output = BufReader::new(child.stdout.take().context("its output")?);
        let mut load = Self { child, input, output };
        load.expect("ready")?;
        Ok(load)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Lets it begin, or go on where it waits to be told.
    pub(crate) fn go(&mut self) -> Result<()> {
        Ok(self.input.write_all(b"\n")?)
    }

    /// Waits until it says so.
    pub(crate) fn expect(&mut self, word: &str) -> Result<()> {
        let mut line = String::new();
        loop {
            line.clear();
            ensure!(
                self.output.read_line(&mut line)? > 0,
                "the load ended before it said {word}"
            );
            if line.trim_end().ends_with(word) {
                return Ok(());
            }
        }
    }

    /// Waits until it says that it is done and all its threads sleep: what is read then no longer changes.
    pub(crate) fn done(&mut self) -> Result<()> {
        self.expect("done")?;
        self.rest('S')
    }

    /// Waits until all its threads are in this state.
    fn rest(&self, rest: char) -> Result<()> {
        wait_for("a load at rest", || {
            for thread in fs::read_dir(format!("/proc/{}/task", self.pid()))? {
                // One that ends while it is looked at (ENOENT, ESRCH) is not at rest yet.
                let Ok(text) = fs::read_to_string(thread?.path().join("stat")) else {
                    return Ok(false);
                };
                let state = text.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
                if state != Some(rest) {
                    return Ok(false);
                }
            }
            Ok(true)
        })
    }

    /// Waits for its end.
    pub(crate) fn finish(mut self) -> Result<()> {
        drop(self.input);
        let mut rest = String::new();
        self.output.read_to_string(&mut rest)?;
        let status = self.child.wait()?;
        ensure!(status.success(), "a load ended with {status}: {rest}");
        Ok(())
    }

    /// Stops it, for good: what is read then no longer changes.
    pub(crate) fn stop(&self) -> Result<()> {
        kill(Pid::from_raw(i32::try_from(self.pid())?), Signal::SIGSTOP)?;
        self.rest('T')
    }

    /// Ends it at once.
    pub(crate) fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// `run_delay` of all its threads, in ns: what the kernel counted of their waiting.
    pub(crate) fn run_delay(&self) -> Result<u64> {
        let mut sum = 0;
        for thread in fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            let text = fs::read_to_string(thread?.path().join("schedstat"))?;
            sum += text.split(' ').nth(1).context("run_delay")?.parse::<u64>()?;
        }
        Ok(sum)
    }

    /// `VmRSS` of the process, in bytes.
    pub(crate) fn resident(&self) -> Result<u64> {
        Ok(stoker_linux::memory::resident(self.child.id())?)
    }

    /// How often its threads have left a CPU.
    pub(crate) fn switches(&self) -> Result<u64> {
        let mut sum = 0;
        for thread in fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            let text = fs::read_to_string(thread?.path().join("status"))?;
            sum += text
                .lines()
                .filter_map(|line| line.split_once("ctxt_switches:")?.1.trim().parse::<u64>().ok())
                .sum::<u64>();
        }
        Ok(sum)
    }
}

/// Whether this process is to be a load.
pub(crate) fn is_load() -> bool {
    std::env::var_os(LOAD).is_some()
}

/// Does what a load is told to do; returns at once in a process that is none.
pub(crate) fn run_as_load() -> Result<()> {
    let Ok(load) = std::env::var(LOAD) else {
        return Ok(());
    };
    let words: Vec<&str> = load.split(' ').collect();
    if let Ok(cgroup) = std::env::var(CGROUP) {
        fs::write(Path::new(&cgroup).join("cgroup.procs"), std::process::id().to_string())?;
        // One whose memory is compared begins anew there, as a container does: of what a process has the ledger hears when that
        // changes, and the pages of code that came before may never.
        if matches!(words.first(), Some(&("forks" | "anonymous" | "shared"))) {
            let mut again = Command::new(std::env::current_exe()?);
            again.args(std::env::args_os().skip(1)).env_remove(CGROUP);
            return Err(again.exec()).context("begin anew in the cgroup");
        }
    }
    say("ready")?;
    told()?;
    let number = |at: usize| -> Result<u64> { Ok(words.get(at).context("a number")?.parse()?) };
    match words.first().copied().unwrap_or_default() {
        // spin MS: one thread computes.
        "spin" => spin(Duration::from_millis(number(1)?)),
        // pinned CPU MS: the same on one CPU.
        "pinned" => {
            pin(usize::try_from(number(1)?)?)?;
            spin(Duration::from_millis(number(2)?));
        }
        // mixed MS: threads that hand one another work all the time, and some that compute.
        "mixed" => mixed(Duration::from_millis(number(1)?)),
        // thief US MS: computes for so many us, then yields before a tick can see it.
        "thief" => {
            let end = Instant::now() + Duration::from_millis(number(2)?);
            while Instant::now() < end {
                spin(Duration::from_micros(number(1)?));
                thread::sleep(Duration::from_micros(50));
            }
        }
        // forks N: makes so many short processes.
        "forks" => {
            for _ in 0..number(1)? {
                ensure!(Command::new("/bin/true").status()?.success());
            }
        }
        // anonymous MIB / shared MIB: touches memory, says so, gives it back when told, says so.
        "anonymous" => hold(vec![0u8; usize::try_from(number(1)? << 20)?])?,
        "shared" => hold(shared(usize::try_from(number(1)? << 20)?)?)?,
        // guests N: runs so many small machines by KVM, each of which halts three times.
        "guests" => {
            for _ in 0..number(1)? {
                // How fast they are is not what is asked.
                let _ = stoker_linux::kvm::probe();
            }
        }
        // open FOLDER SUBJECTS: goes on with what is pinned there, or pins it.
        "open" => {
            let _ledger = open(words.get(1).context("a folder")?, number(2)?)?;
            say("open")?;
            told()?;
        }
        // visit FOLDER SUBJECTS: adds subjects and removes them until it is killed.
        "visit" => {
            let ledger = open(words.get(1).context("a folder")?, number(2)?)?;
            say("open")?;
            for visitor in VISITORS.. {
                ledger.add(CgroupId::from(visitor))?;
                ledger.add_cgroup(
                    CgroupId::from(visitor),
                    CgroupId::from(visitor | VISITORS << 1),
                    Part::Vmm,
                )?;
                ledger.remove(CgroupId::from(visitor))?;
            }
        }
        // What a ledger says where it can't be loaded.
        "without-rights" => {
            nix::unistd::setuid(nix::unistd::Uid::from_raw(65534))?;
            ensure!(matches!(Ledger::load(Limits::GUEST), Err(LoadError::Permission(_))));
            if let Some(&folder) = words.get(1) {
                ensure!(matches!(open(folder, 1), Err(LoadError::Permission(_))));
            }
        }
        "without-tracefs" => {
            system::unshare_mounts()?;
            // Hides tracefs, and debugfs which has it too.
            mount(
                None::<&str>,
                "/sys/kernel",
                Some("tmpfs"),
                MsFlags::empty(),
                None::<&str>,
            )?;
            ensure!(matches!(Ledger::load(Limits::GUEST), Err(LoadError::Tracefs)));
        }
        other => bail!("no load {other}"),
    }
    say("done")?;
    told()
}

/// Opens a ledger with room for so many subjects: of another version for each number.
pub(crate) fn open(folder: impl AsRef<Path>, subjects: u64) -> Result<Ledger, LoadError> {
    let limits = Limits {
        subjects: u32::try_from(subjects).unwrap_or(u32::MAX),
        ..Limits::GUEST
    };
    Ledger::open(limits, folder.as_ref())
}

fn say(word: &str) -> Result<()> {
    println!("{word}");
    Ok(std::io::stdout().flush()?)
}

/// Waits for a line of input, or its end.
fn told() -> Result<()> {
    std::io::stdin().read_line(&mut String::new())?;
    Ok(())
}

fn spin(time: Duration) {
    let end = Instant::now() + time;
    let mut x = 1u64;
    while Instant::now() < end {
        for _ in 0..200 {
            x = black_box(x.wrapping_mul(6364136223846793005).wrapping_add(1));
        }
    }
}

pub(crate) fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
}

fn mixed(time: Duration) {
    let end = Instant::now() + time;
    thread::scope(|scope| {
        for _ in 0..2 {
            let (ask, asked) = mpsc::sync_channel::<()>(0);
            let (answer, answered) = mpsc::sync_channel::<()>(0);
            scope.spawn(move || {
                while asked.recv().is_ok() {
                    spin(Duration::from_micros(20));
                    if answer.send(()).is_err() {
                        break;
                    }
                }
            });
            scope.spawn(move || {
                while Instant::now() < end && ask.send(()).is_ok() && answered.recv().is_ok() {
                    spin(Duration::from_micros(5));
                }
            });
        }
        scope.spawn(move || {
            while Instant::now() < end {
                spin(Duration::from_millis(3));
                thread::yield_now();
            }
        });
        scope.spawn(move || {
            while Instant::now() < end {
                spin(Duration::from_micros(300));
                thread::sleep(Duration::from_micros(200));
            }
        });
    });
}

fn hold(mut memory: impl AsMut<[u8]>) -> Result<()> {
    for byte in memory.as_mut().iter_mut().step_by(4096) {
        *byte = 1;
    }
    say("touched")?;
    told()?;
    drop(black_box(memory));
    Ok(())
}

/// Memory in a file of a tmpfs.
fn shared(bytes: usize) -> Result<impl AsMut<[u8]>> {
    struct Mapping(std::ptr::NonNull<std::ffi::c_void>, usize);
    impl AsMut<[u8]> for Mapping {
        fn as_mut(&mut self) -> &mut [u8] {
            // SAFETY: mapped for as long as this lives, in this process alone.
            unsafe { std::slice::from_raw_parts_mut(self.0.as_ptr().cast(), self.1) }
        }
    }
    impl Drop for Mapping {
        fn drop(&mut self) {
            // SAFETY: mapped by `shared` with this length; nothing refers to it any more.
            let _ = unsafe { nix::sys::mman::munmap(self.0, self.1) };
        }
    }
    let length = std::num::NonZeroUsize::new(bytes).context("some memory")?;
    // SAFETY: a new mapping, which replaces none.
    let address = unsafe {
        nix::sys::mman::mmap_anonymous(
            None,
            length,
            nix::sys::mman::ProtFlags::PROT_READ | nix::sys::mman::ProtFlags::PROT_WRITE,
            nix::sys::mman::MapFlags::MAP_SHARED,
        )?
    };
    Ok(Mapping(address, bytes))
}
