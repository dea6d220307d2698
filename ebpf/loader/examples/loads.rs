//! The ledger beside what the kernel counts, over a long time of mixed load: `loads SECONDS`. Prints a line of JSON for each load,
//! `{"load":"thief 3900","cpu_s":…,"off_percent":…,"account_off_ns":…,"switches_per_s":…}`: what `cpu.stat` of its cgroup has, how
//! far the ledger is from that, how far its account of credits is from the ledger, and how often CPUs of the host went to another thread. Needs root and
//! cgroup v2.
//!
//! The loads are those of the tests: threads that hand one another work, some that compute, and thieves who sleep just before a tick
//! could see them.

use std::env;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use stoker_credits::{Mode, Plan};
use stoker_ebpf::{Ledger, Limits, Lost};
use stoker_testkit::tracefs::need_tracefs;

#[path = "../tests/common/mod.rs"]
mod common;

use common::Load;
use common::system::Cgroup;

/// Each in a cgroup of its own, without how long it is to last. Ticks are 4 ms apart with `CONFIG_HZ=250`.
const LOADS: [&str; 6] = ["mixed", "mixed", "thief 700", "thief 3900", "thief 100", "spin"];

/// How often all is read meanwhile.
const READ: Duration = Duration::from_secs(1);

/// What was counted of a load before it began.
struct Before {
    usec: u64,
    charged_ns: u64,
}

fn main() -> Result<()> {
    if common::is_load() {
        return common::run_as_load();
    }
    let seconds: u64 = env::args().nth(1).context("how many seconds")?.parse()?;
    need_tracefs()?;
    let ledger = Ledger::load(Limits::HOST)?;
    for lack in ledger.lacks() {
        eprintln!("{lack}");
    }
    // Of a size at which nothing is discarded.
    let terms = Plan::new(2, 400, Mode::Standard).terms()?;
    let mut loads = Vec::new();
    for load in LOADS {
        let cgroup = Cgroup::new("soak")?;
        let process = Load::start(&cgroup, &format!("{load} {}", seconds * 1000))?;
        let id = cgroup.id()?;
        ledger.add(id)?;
        let before = Before {
            usec: cgroup.cpu_stat("usage_usec")?,
            charged_ns: ledger.charged(id)?.cpu_ns,
        };
        ledger.open_account(id, &terms)?;
        loads.push((load, cgroup, process, before));
    }
    let (start, switches_before) = (Instant::now(), switches()?);
    for (_, _, process, _) in &mut loads {
        process.go()?;
    }
    // What is read must not go back, and reading must change nothing.
    let mut before = ledger.read()?;
    while start.elapsed() < Duration::from_secs(seconds) {
        thread::sleep(READ.min(Duration::from_secs(seconds)));
        let now = ledger.read()?;
        for (id, usage) in &now {
            let had = before.get(id).context("one that was there")?.cpu_ns;
            ensure!(usage.cpu_ns >= had, "{id} had {had} ns, and now {}", usage.cpu_ns);
        }
        ledger.accounts()?;
        before = now;
    }
    for (_, _, process, _) in &mut loads {
        process.done()?;
    }
    let per_second = (switches()? - switches_before) as f64 / start.elapsed().as_secs_f64();
    for (load, cgroup, process, had) in loads {
        let id = cgroup.id()?;
        let account = ledger.close_account(id)?;
        let ours = ledger.charged(id)?.cpu_ns - had.charged_ns;
        let theirs = (cgroup.cpu_stat("usage_usec")? - had.usec) * 1000;
        let off = (ours as f64 / theirs as f64 - 1.0).abs() * 100.0;
        let spent = account.totals().spent.get() / 1000;
        println!(
            r#"{{"load":"{load}","cpu_s":{:.3},"off_percent":{off:.6},"account_off_ns":{},"switches_per_s":{per_second:.0}}}"#,
            theirs as f64 / 1e9,
            spent.abs_diff(u128::from(ours)),
        );
        process.finish()?;
    }
    ensure!(ledger.lost()? == Lost::default(), "{:?}", ledger.lost()?);
    Ok(())
}

/// How often CPUs went to another thread since the host was started (proc_stat(5)).
fn switches() -> Result<u64> {
    let stat = fs::read_to_string("/proc/stat")?;
    let switches = stat.lines().find_map(|line| line.strip_prefix("ctxt "));
    Ok(switches.context("ctxt in /proc/stat")?.parse()?)
}
