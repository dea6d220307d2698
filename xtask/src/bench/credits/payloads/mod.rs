//! The same of guests without a kernel, on a machine whose KVM can't run one: what they compute runs at full speed there, where a lab's
//! processors are emulated. There is no agent without cgroup v2, so the one that wakes up is scheduled here as the agent schedules a
//! machine of the class high. It is woken by its own timer alone: there is nothing in it that a device could reach.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sys::resource::{UsageWho, getrusage},
    sys::time::TimeValLike as _,
    time::{clock_getcpuclockid, clock_gettime},
    unistd::Pid,
};
use serde_json::json;
use stoker_linux::sched::{self, Policy};
use stoker_testkit::permille::permille;
use stoker_testkit::wake;
use tempfile::TempDir;

use super::super::{Bar, Options};
use super::figures::{ALONE, CREDITS, Hogs, Line, Lines, SETTINGS, TIMER, Wakes};
use crate::{host, process};

const SOURCE: &str = include_str!("payload.S");

/// How many compute without pause, for each CPU.
const HOGS_A_CPU: usize = 4;

/// How often it wakes up in a round, and how many rounds there are in a quick run.
const WAKE_UPS: usize = 240;
const QUICK_WAKE_UPS: usize = 60;
const QUICK_ROUNDS: u32 = 2;

/// How long it sleeps at least: with what is added at random it is [`wake::EVERY`] on average.
const SLEEP: Duration = Duration::from_micros(47_900);

/// As the agent has machines of the class high.
const URGENT: Policy = Policy::RoundRobin { priority: 1 };

/// How much longer those that compute do so than the one that wakes up takes alone: by a part of that, and by so much.
const LONGER: u32 = 4;
const MARGIN: Duration = Duration::from_secs(3);

/// How long a VMM may take until its vCPU runs.
const PATIENCE: Duration = Duration::from_secs(30);
const TICK: Duration = Duration::from_millis(2);

/// How long is looked how fast the time stamp counter is.
const CLOCKED: Duration = Duration::from_millis(500);

/// What is needed for all of them.
struct Bench {
    folder: TempDir,
    vmm: PathBuf,
    /// Ticks of the time stamp counter in a second.
    ticks: f64,
    wake_ups: usize,
    hogs: usize,
}

/// A guest, until this is dropped.
struct Guest {
    child: Child,
    console: PathBuf,
}

/// What was measured in a setting, round by round.
#[derive(Default)]
struct Rounds {
    all_ms: Vec<f64>,
    p50_ms: Vec<f64>,
    p99_ms: Vec<f64>,
    used_percent: Vec<f64>,
    real_time_percent: Vec<f64>,
    spread_percent: Vec<f64>,
    longest_wait_ms: Vec<f64>,
    cpu_percent: Vec<f64>,
}

/// Measures on this very machine, where it can; says why where it can't.
pub(super) fn bars(binaries: &Path, options: &Options) -> Result<Vec<Bar>> {
    let wake_ups = if options.quick { QUICK_WAKE_UPS } else { WAKE_UPS };
    let rounds = if options.quick { QUICK_ROUNDS } else { options.runs };
    let bench = Bench::new(binaries, wake_ups)?;
    if let Err(error) = bench.try_once() {
        println!(
            "Guests without a kernel are not measured on {}: {error:#}",
            host::place()
        );
        return Ok(Vec::new());
    }
    println!("Waking a guest without a kernel alone and among others, {rounds} rounds of {wake_ups} wake-ups.");
    let mut settings: [Rounds; SETTINGS.len()] = Default::default();
    for round in 0..rounds as usize {
        for index in (0..SETTINGS.len()).map(|at| (at + round) % SETTINGS.len()) {
            if let (Some(setting), Some(rounds_of)) = (SETTINGS.get(index), settings.get_mut(index)) {
                println!("  round {} of {rounds}: {setting}", round + 1);
                rounds_of
                    .measure(&bench, setting)
                    .with_context(|| (*setting).to_owned())?;
            }
        }
    }
    let all = SETTINGS.into_iter().zip(settings);
    let lines = Lines {
        place: "guests without a kernel".into(),
        ways: &[TIMER],
        all: all.flat_map(|(setting, rounds)| rounds.lines(setting)).collect(),
    };
    println!("\nGuests without a kernel on {}:\n\n{}", host::place(), lines.table()?);
    lines.judge()
}

// === impl Bench ===

impl Bench {
    fn new(binaries: &Path, wake_ups: usize) -> Result<Self> {
        let bench = Self {
            folder: tempfile::tempdir().context("make a folder for guests")?,
            vmm: binaries.join("stoker-vmm"),
            ticks: ticks_a_second()?,
            wake_ups,
            hogs: HOGS_A_CPU * thread::available_parallelism()?.get(),
        };
        fs::write(bench.path("payload.S"), SOURCE).context("write the guest")?;
        let time = wake::EVERY * u32::try_from(wake_ups)?;
        bench.assemble("once", 1, Duration::ZERO, &[])?;
        bench.assemble("wakes", wake_ups, Duration::ZERO, &[])?;
        bench.assemble("hog", 0, time + time / LONGER + MARGIN, &["-DHOG"])?;
        Ok(bench)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn assemble(&self, name: &str, wake_ups: usize, computes: Duration, more: &[&str]) -> Result<()> {
        let ticks = |time: Duration| (time.as_secs_f64() * self.ticks) as u64;
        process::output(
            Command::new("gcc")
                .args(["-nostdlib", "-static", "-Wl,-N,-Ttext=0x100000,--build-id=none", "-o"])
                .args([self.path(name), self.path("payload.S")])
                .arg(format!("-DWAKE_UPS={wake_ups}"))
                .arg(format!("-DEVERY_NS={}", SLEEP.as_nanos()))
                .arg(format!("-DWORK_TICKS={}", ticks(wake::WORK)))
                .arg(format!("-DHOG_TICKS={}", ticks(computes)))
                .args(more),
        )?;
        Ok(())
    }

    /// Starts the VMM with a guest of that name.
    fn start(&self, kernel: &str, id: &str) -> Result<Guest> {
        let (console, config) = (self.path(&format!("{id}.console")), self.path(&format!("{id}.json")));
        let machine = json!({
            "id": id, "vcpus": 1, "memory_mib": 32, "kernel": self.path(kernel), "console": console,
        });
        fs::write(&config, machine.to_string()).context("write a guest's configuration")?;
        // In a session of its own: of processes without cgroups the kernel may take those of one together (sched(7), "autogroup").
        let child = Command::new("setsid")
            .arg(&self.vmm)
            .arg("--config")
            .arg(config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("start a guest")?;
        Ok(Guest { child, console })
    }

    /// Whether this machine can run one.
    fn try_once(&self) -> Result<()> {
        ensure!(Path::new("/dev/kvm").exists(), "there is no /dev/kvm");
        self.wakes(&self.start("once", "once")?.end()?).map(drop)
    }

    /// How long each wake-up took, in ms, of what the guest tells.
    fn wakes(&self, told: &[u64]) -> Result<Vec<f64>> {
        let wakes = told.chunks_exact(3).map(|wake| match *wake {
            [slept, ns, worked] => worked.wrapping_sub(slept) as f64 / self.ticks * 1e3 - ns as f64 / 1e6,
            _ => f64::NAN,
        });
        let wakes: Vec<_> = wakes.collect();
        ensure!(!wakes.is_empty(), "a guest told nothing");
        Ok(wakes)
    }
}

/// Ticks of the time stamp counter in a second of the monotonic clock.
fn ticks_a_second() -> Result<f64> {
    let now = || -> Result<(u64, u64)> {
        // SAFETY: every x86-64 processor has the instruction, and it touches no memory.
        let ticks = unsafe { std::arch::x86_64::_rdtsc() };
        Ok((ticks, wake::now_ns()?))
    };
    let (ticks, ns) = now()?;
    thread::sleep(CLOCKED);
    let (ticks_then, ns_then) = now()?;
    Ok((ticks_then - ticks) as f64 / (ns_then - ns) as f64 * 1e9)
}

// === impl Guest ===

impl Guest {
    /// Waits until its vCPU runs; all of its VMM's threads are there then.
    fn until_it_runs(&self) -> Result<Vec<u32>> {
        let (process, start) = (self.child.id(), Instant::now());
        loop {
            let threads = sched::threads(process)?;
            let is_vcpu = |thread: &&u32| sched::name(process, **thread).is_ok_and(|name| name == "vcpu0");
            if threads.iter().any(|thread| is_vcpu(&thread)) {
                return Ok(threads);
            }
            ensure!(start.elapsed() < PATIENCE, "a guest does not start");
            thread::sleep(TICK);
        }
    }

    /// CPU time that its VMM has used.
    fn used(&self) -> Result<Duration> {
        let clock = clock_getcpuclockid(Pid::from_raw(self.child.id().cast_signed()))?;
        Ok(clock_gettime(clock)?.into())
    }

    fn runs(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Waits until it powers itself off; the numbers that it tells.
    fn end(mut self) -> Result<Vec<u64>> {
        let status = self.child.wait().context("wait for a guest")?;
        ensure!(
            status.success(),
            "this KVM does not run it (the VMM ended with {status})"
        );
        let told = fs::read(&self.console).context("read what a guest told")?;
        let numbers = told.chunks_exact(8).filter_map(|bytes| bytes.try_into().ok());
        Ok(numbers.map(u64::from_le_bytes).collect())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // One that has ended is only waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

// === impl Rounds ===

impl Rounds {
    /// Measures once more in a setting.
    fn measure(&mut self, bench: &Bench, setting: &str) -> Result<()> {
        let count = if setting == ALONE { 0 } else { bench.hogs };
        let hogs = (0..count).map(|hog| bench.start("hog", &format!("hog{hog}")));
        let mut hogs = hogs.collect::<Result<Vec<_>>>()?;
        for hog in &hogs {
            hog.until_it_runs()?;
        }
        let quiet = bench.start("wakes", "quiet")?;
        let threads = quiet.until_it_runs()?;
        if setting == CREDITS {
            for thread in &threads {
                URGENT.apply(*thread).context("schedule a guest in real time")?;
            }
        }
        let urgent = threads
            .iter()
            .filter(|thread| Policy::of(**thread).is_ok_and(|is| is == URGENT));
        self.real_time_percent
            .push(urgent.count() as f64 / threads.len() as f64 * 100.0);
        let used = |hogs: &[Guest]| hogs.iter().map(Guest::used).collect::<Result<Vec<_>>>();
        let (began, before, ended_before) = (Instant::now(), used(&hogs)?, ended_used()?);
        let mut wakes = bench.wakes(&quiet.end()?)?;
        ensure!(wakes.len() == bench.wake_ups, "it woke up {} times", wakes.len());
        let (took, after) = (began.elapsed(), used(&hogs)?);
        let percent = |used: Duration| used.as_secs_f64() / took.as_secs_f64() * 100.0;
        self.used_percent
            .push(percent(ended_used()?.saturating_sub(ended_before)));
        for hog in &mut hogs {
            ensure!(hog.runs()?, "those that compute ended before the one that wakes up");
        }
        let spent: Vec<_> = after
            .iter()
            .zip(before)
            .map(|(after, before)| after.saturating_sub(before))
            .collect();
        self.cpu_percent.push(percent(spent.iter().sum()));
        if let (Some(least), Some(most)) = (spent.iter().min(), spent.iter().max()) {
            let mean = spent.iter().sum::<Duration>().as_secs_f64() / spent.len() as f64;
            self.spread_percent.push((*most - *least).as_secs_f64() / mean * 100.0);
            let waits = hogs.into_iter().map(|hog| {
                let ticks = hog.end()?.first().copied().context("one that computes told nothing")?;
                Ok(ticks as f64 / bench.ticks * 1e3)
            });
            let waits = waits.collect::<Result<Vec<_>>>()?;
            self.longest_wait_ms.push(waits.into_iter().fold(0.0, f64::max));
        }
        wakes.sort_by(f64::total_cmp);
        self.p50_ms.push(permille(&wakes, 500).context("nobody woke up")?);
        self.p99_ms.push(permille(&wakes, 990).context("nobody woke up")?);
        self.all_ms.append(&mut wakes);
        Ok(())
    }

    fn lines(mut self, setting: &str) -> [Line; 2] {
        self.all_ms.sort_by(f64::total_cmp);
        [
            Line::Wakes(Wakes {
                setting: setting.to_owned(),
                way: TIMER.to_owned(),
                samples: self.all_ms.len() as u32,
                p50_ms: self.p50_ms,
                p99_ms: self.p99_ms,
                p999_ms: permille(&self.all_ms, 999).unwrap_or(f64::NAN),
                used_percent: self.used_percent,
                real_time_percent: self.real_time_percent,
            }),
            Line::Hogs(Hogs {
                setting: setting.to_owned(),
                spread_percent: self.spread_percent,
                longest_wait_ms: self.longest_wait_ms,
                cpu_percent: self.cpu_percent,
            }),
        ]
    }
}

/// CPU time of the processes that were waited for.
fn ended_used() -> Result<Duration> {
    let used = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let us = (used.user_time() + used.system_time()).num_microseconds();
    Ok(Duration::from_micros(us.try_into()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_tells_is_understood() {
        let bench = Bench {
            folder: tempfile::tempdir().unwrap(),
            vmm: PathBuf::new(),
            ticks: 2e9,
            wake_ups: 2,
            hogs: 0,
        };
        let told = [100, 50_000_000, 100_600_100, 7, 1_000_000, 2_400_007];
        let wakes = bench.wakes(&told).unwrap();
        assert!(
            (wakes[0] - 0.3).abs() < 1e-9 && (wakes[1] - 0.2).abs() < 1e-9,
            "{wakes:?}"
        );
        assert!(bench.wakes(&[1, 2]).is_err());
    }
}
