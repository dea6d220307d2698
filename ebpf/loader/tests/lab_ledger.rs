//! The ledger against what the kernel itself counts. Needs root: runs in the lab, and natively with
//! `cargo test -p stoker-ebpf -- --ignored`.

mod common;

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use common::{Cgroup, need_tracefs, pin, run_as_load, wait_for};
use stoker_ebpf::{CgroupId, Ledger, LedgerError, Limits, Lost, Usage};

const MIB: u64 = 1 << 20;

/// Not a test: what the tests below start, to load the system.
#[test]
#[ignore = "a load, does nothing by itself"]
fn load() -> Result<()> {
    run_as_load()
}

fn ledger() -> Result<Ledger> {
    need_tracefs()?;
    Ok(Ledger::load(Limits::GUEST)?)
}

/// Whether two figures agree to so many percent of the second.
fn agree(what: &str, ours: u64, theirs: u64, percent: f64) -> Result<()> {
    let off = (ours as f64 / theirs as f64 - 1.0) * 100.0;
    println!("{what}: ours {ours}, theirs {theirs}, off {off:+.3}%");
    ensure!(
        off.abs() <= percent,
        "{what}: ours {ours}, theirs {theirs}: off {off:+.2}%, more than {percent}%"
    );
    Ok(())
}

/// Runs a load to its end; its cgroup's CPU time as counted by us and by the kernel, in ns.
fn run_to_end(load: &str) -> Result<(Usage, u64)> {
    let ledger = ledger()?;
    let cgroup = Cgroup::new("load")?;
    let mut load = cgroup.run(load)?;
    ledger.add(cgroup.id()?)?;
    let before = cgroup.cpu_stat("usage_usec")?;
    load.go()?;
    load.expect("done")?;
    let usage = ledger.read_one(cgroup.id()?)?;
    let after = cgroup.cpu_stat("usage_usec")?;
    println!("{} switches, {usage:?}", load.switches()?);
    load.finish()?;
    ensure!(ledger.lost()? == Lost::default());
    Ok((usage, (after - before) * 1000))
}

#[test]
#[ignore = "needs root"]
fn a_busy_load_agrees_with_cpu_stat() -> Result<()> {
    let (usage, theirs) = run_to_end("spin 4000")?;
    agree("CPU time", usage.cpu_ns, theirs, 1.0)
}

#[test]
#[ignore = "needs root"]
fn a_mixed_load_agrees_with_cpu_stat() -> Result<()> {
    let (usage, theirs) = run_to_end("mixed 5000")?;
    agree("CPU time", usage.cpu_ns, theirs, 1.0)
}

#[test]
#[ignore = "needs root"]
fn a_thief_that_sleeps_before_the_tick_pays() -> Result<()> {
    let (usage, theirs) = run_to_end("thief 700 4000")?;
    agree("CPU time", usage.cpu_ns, theirs, 1.0)
}

#[test]
#[ignore = "needs root"]
fn what_runs_is_counted_up_to_now() -> Result<()> {
    let ledger = ledger()?;
    let cgroup = Cgroup::new("busy")?;
    let mut load = cgroup.run("spin 6000")?;
    ledger.add(cgroup.id()?)?;
    let start = load.cpu_clock()?;
    load.go()?;
    for _ in 0..20 {
        thread::sleep(Duration::from_millis(100));
        // The load may run on while we read: what we read lies between two readings of the kernel's clock.
        let before = load.cpu_clock()? - start;
        let ours = ledger.read_one(cgroup.id()?)?.cpu_ns;
        let after = load.cpu_clock()? - start;
        println!("between {before} and {after}: {ours}");
        let slack = 200_000 + after / 100;
        ensure!(
            before <= ours + slack && ours <= after + slack,
            "{ours} is not between {before} and {after}"
        );
    }
    load.kill()
}
