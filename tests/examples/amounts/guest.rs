//! Process 1 of the guests that are plugged: it tells the console what it has got, as soon as it can use it.

use std::fs;

use anyhow::Context as _;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use stoker_testkit::guest::{self, Uevents};

use super::plug::{GIB, VCPUS};

/// What it says begins with it.
pub(super) const SAYS: &str = "bench: ";
pub(super) const READY: &str = "ready";
pub(super) const THERE: &str = "memory is there";
pub(super) const USED: &str = "memory is used";
pub(super) const FREED: &str = "memory is freed";
const FAILED: &str = "FAILED";

/// Whether what it said is that it can't go on.
pub(super) fn has_failed(line: &str) -> bool {
    line.contains(SAYS) && line.contains(FAILED)
}

/// What it says once it runs on a CPU.
pub(super) fn runs_on(cpu: u32) -> String {
    format!("runs on CPU {cpu}.")
}

/// Runs the guest, and never returns.
pub(super) fn run() -> ! {
    if let Err(error) = follow() {
        println!("{SAYS}{FAILED}: {error:#}");
    }
    // The host ends the machine.
    loop {
        std::thread::park();
    }
}

/// Takes what comes. Memory is used as soon as it is there, and freed once the last vCPU has come.
fn follow() -> anyhow::Result<()> {
    guest::begin()?;
    let events = Uevents::listen()?;
    let start = guest::meminfo_kib("MemTotal")?;
    println!("{SAYS}{READY}");
    let (mut used, mut is_used) = (None, false);
    loop {
        let (action, path) = events.wait()?;
        if action == "add"
            && let Some(cpu) = path.strip_prefix("/devices/system/cpu/cpu")
        {
            let cpu = cpu.parse().with_context(|| format!("understand {path}"))?;
            run_on(cpu)?;
            if cpu + 1 == VCPUS && used.take().is_some() {
                println!("{SAYS}{FREED}");
            }
        } else if action == "online"
            && path.starts_with("/devices/system/memory/")
            && !is_used
            && guest::meminfo_kib("MemTotal")? >= start + (GIB >> 10)
        {
            println!("{SAYS}{THERE}");
            used = Some(fill());
            is_used = true;
            println!("{SAYS}{USED}");
        }
    }
}

/// Starts a CPU, as `stoker-init` does, says so there, and goes back to the first.
fn run_on(cpu: u32) -> anyhow::Result<()> {
    let file = format!("/sys/devices/system/cpu/cpu{cpu}/online");
    fs::write(&file, "1").with_context(|| format!("start CPU {cpu}"))?;
    only_on(cpu)?;
    println!("{SAYS}{}", runs_on(cpu));
    only_on(0)
}

fn only_on(cpu: u32) -> anyhow::Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu as usize)?;
    sched_setaffinity(Pid::from_raw(0), &cpus).with_context(|| format!("run on CPU {cpu}"))
}

/// A GiB, of which every page is written to.
fn fill() -> Vec<u8> {
    let mut memory = vec![0; GIB as usize];
    memory.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
    std::hint::black_box(memory)
}
