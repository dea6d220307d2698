//! The ledger against what the kernel itself counts. Needs root and cgroup v2.

mod common;

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use common::system::{Cgroup, wait_for};
use common::{Load, agree, run_as_load};
use stoker_ebpf::{CgroupId, Ledger, LedgerError, Limits, Lost, Part, Time, Usage};
use stoker_testkit::tracefs::need_tracefs;

const MIB: u64 = 1 << 20;

/// In percent: the same, but for what `cpu.stat` leaves out of a microsecond.
const EXACT: f64 = 0.01;

/// Not a test: what the tests below start, to load the system.
#[test]
fn load() -> Result<()> {
    run_as_load()
}

fn ledger() -> Result<Ledger> {
    need_tracefs()?;
    Ok(Ledger::load(Limits::GUEST)?)
}

/// Runs a load to its end; its cgroup's CPU time as counted by us and by the kernel, in ns.
fn run_to_end(load: &str) -> Result<(Usage, u64)> {
    let ledger = ledger()?;
    let cgroup = Cgroup::new("load")?;
    let mut load = Load::start(&cgroup, load)?;
    ledger.add(cgroup.id()?)?;
    let before = cgroup.cpu_stat("usage_usec")?;
    load.go()?;
    load.done()?;
    let usage = ledger.read_one(cgroup.id()?)?;
    let after = cgroup.cpu_stat("usage_usec")?;
    println!("{} switches, {usage:?}", load.switches()?);
    load.finish()?;
    ensure!(ledger.lost()? == Lost::default(), "{:?}", ledger.lost()?);
    Ok((usage, (after - before) * 1000))
}

#[test]
fn a_busy_load_agrees_with_cpu_stat() -> Result<()> {
    let (usage, theirs) = run_to_end("spin 4000")?;
    agree("CPU time", usage.cpu_ns, theirs, EXACT)
}

#[test]
fn a_mixed_load_agrees_with_cpu_stat() -> Result<()> {
    let (usage, theirs) = run_to_end("mixed 5000")?;
    agree("CPU time", usage.cpu_ns, theirs, EXACT)
}

#[test]
fn processes_that_come_and_go_agree_with_cpu_stat() -> Result<()> {
    let (usage, theirs) = run_to_end("forks 500")?;
    agree("CPU time", usage.cpu_ns, theirs, EXACT)
}

#[test]
fn loads_that_take_cpus_from_one_another_agree_with_cpu_stat() -> Result<()> {
    let ledger = ledger()?;
    let mut loads = Vec::new();
    for load in ["mixed 4000", "mixed 4000", "forks 400", "thief 100 4000", "spin 4000"] {
        let cgroup = Cgroup::new("crowd")?;
        let process = Load::start(&cgroup, load)?;
        ledger.add(cgroup.id()?)?;
        let before = cgroup.cpu_stat("usage_usec")?;
        loads.push((load, cgroup, process, before));
    }
    for (_, _, process, _) in &mut loads {
        process.go()?;
    }
    for (load, cgroup, mut process, before) in loads {
        process.done()?;
        let ours = ledger.read_one(cgroup.id()?)?.cpu_ns;
        let theirs = (cgroup.cpu_stat("usage_usec")? - before) * 1000;
        agree(load, ours, theirs, EXACT)?;
        process.finish()?;
    }
    Ok(())
}

#[test]
fn a_thief_that_sleeps_before_the_tick_pays() -> Result<()> {
    let (usage, theirs) = run_to_end("thief 700 4000")?;
    agree("CPU time", usage.cpu_ns, theirs, EXACT)
}

#[test]
fn what_runs_is_counted_up_to_now() -> Result<()> {
    let ledger = ledger()?;
    let cgroup = Cgroup::new("busy")?;
    let mut load = Load::start(&cgroup, "spin 90000")?;
    ledger.add(cgroup.id()?)?;
    let start = Instant::now();
    load.go()?;
    // Where it has not left its CPU between two readings, it was charged for all the time between them.
    let mut uninterrupted = 0;
    wait_for("a thread that computes without leaving its CPU", || {
        let before = load.switches()?;
        let first = ledger.read_one(cgroup.id()?)?.cpu_ns;
        let inner = Instant::now();
        thread::sleep(Duration::from_millis(2));
        let inner = inner.elapsed();
        let second = ledger.read_one(cgroup.id()?)?.cpu_ns;
        // What the scheduler takes to a switch, or to look at the time, is told late.
        let all = start.elapsed();
        ensure!(
            Duration::from_nanos(second) <= all,
            "{second} ns of CPU time in {all:?}"
        );
        let charged = Duration::from_nanos(second - first);
        // It may have come to its CPU late, which is no switch of its own.
        if load.switches()? == before && charged >= inner {
            println!("in more than {inner:?}: {charged:?}");
            uninterrupted += 1;
        }
        Ok(uninterrupted == 5)
    })?;
    load.kill()
}

#[test]
fn waiting_agrees_with_the_kernels_run_delay() -> Result<()> {
    // Of machines the kernel's own counts are taken, where they are to be had.
    for machines in [false, true] {
        need_tracefs()?;
        let ledger = Ledger::load(Limits {
            machines,
            ..Limits::GUEST
        })?;
        println!("machines: {machines}; {:?}", ledger.lacks());
        waiting_agrees(&ledger, if machines { 0.5 } else { 3.0 })?;
    }
    Ok(())
}

/// Two that compute on one CPU wait as long as the kernel says, to so many percent.
#[allow(clippy::indexing_slicing, reason = "of two, the first and the second")]
fn waiting_agrees(ledger: &Ledger, percent: f64) -> Result<()> {
    let cgroups = [Cgroup::new("left")?, Cgroup::new("right")?];
    let mut loads = Vec::new();
    for cgroup in &cgroups {
        ledger.add(cgroup.id()?)?;
        loads.push(Load::start(cgroup, "pinned 0 6000")?);
    }
    let waited = |cgroup: &Cgroup, load: &Load| -> Result<(u64, u64)> {
        Ok((ledger.read_one(cgroup.id()?)?.wait_ns, load.run_delay()?))
    };
    let mut before = Vec::new();
    for (cgroup, load) in cgroups.iter().zip(&mut loads) {
        before.push(waited(cgroup, load)?);
    }
    for load in &mut loads {
        load.go()?;
    }
    for load in &mut loads {
        load.done()?;
    }
    for ((cgroup, load), before) in cgroups.iter().zip(&loads).zip(before) {
        let (ours, theirs) = waited(cgroup, load)?;
        let (ours, theirs) = (ours - before.0, theirs - before.1);
        agree("wait", ours, theirs, percent)?;
        // Two that compute on one CPU wait half of the time, more where others want it too.
        ensure!(ours > 2_500_000_000, "waited only {ours} ns of 6 s");
    }
    loads.into_iter().try_for_each(Load::finish)
}

#[test]
fn memory_agrees_with_memory_current() -> Result<()> {
    let ledger = ledger()?;
    for kind in ["anonymous", "shared"] {
        let cgroup = Cgroup::new(kind)?;
        let id = cgroup.id()?;
        ledger.add(id)?;
        let mut load = Load::start(&cgroup, &format!("{kind} 400"))?;
        load.go()?;
        load.expect("touched")?;
        let full = ledger.read_one(id)?;
        agree("VmRSS", full.memory_bytes, load.resident()?, 1.0)?;
        match cgroup.memory_current() {
            Some(theirs) => agree("memory.current", full.memory_bytes, theirs, 5.0)?,
            None => println!("no memory controller here: compared with VmRSS alone"),
        }
        ensure!(full.memory_peak_bytes >= full.memory_bytes);
        load.go()?;
        load.done()?;
        let freed = ledger.read_one(id)?;
        ensure!(freed.memory_bytes < 20 * MIB, "still {freed:?}");
        ensure!(
            freed.memory_peak_bytes >= 400 * MIB && freed.memory_peak_bytes < 420 * MIB,
            "{freed:?}"
        );
        ensure!(ledger.begin_peak(id)? == freed.memory_peak_bytes);
        let anew = ledger.read_one(id)?;
        ensure!(anew.memory_peak_bytes < 20 * MIB, "of before: {anew:?}");
        load.finish()?;
        let ended = ledger.read_one(id)?;
        ensure!(ended.memory_bytes == 0, "of nobody: {ended:?}");
        ensure!(ended.memory_peak_bytes >= anew.memory_peak_bytes && ended.memory_peak_bytes < 20 * MIB);
    }
    Ok(())
}

#[test]
fn short_processes_leave_nothing_behind() -> Result<()> {
    need_tracefs()?;
    // Far less room than processes: each must make way for the next.
    let ledger = Ledger::load(Limits {
        tasks: 256,
        processes: 256,
        ..Limits::GUEST
    })?;
    let cgroup = Cgroup::new("forks")?;
    let id = cgroup.id()?;
    // Before the load is there: what it has is told when that changes, and its code may not.
    ledger.add(id)?;
    let mut load = Load::start(&cgroup, "forks 1000")?;
    load.go()?;
    load.done()?;
    let usage = ledger.read_one(id)?;
    agree("VmRSS", usage.memory_bytes, load.resident()?, 5.0)?;
    load.finish()?;
    ensure!(ledger.read_one(id)?.memory_bytes == 0);
    ensure!(ledger.lost()? == Lost::default(), "{:?}", ledger.lost()?);
    Ok(())
}

#[test]
fn what_goes_uncounted_where_maps_are_full_is_told() -> Result<()> {
    need_tracefs()?;
    let ledger = Ledger::load(Limits {
        tasks: 1,
        processes: 1,
        ..Limits::GUEST
    })?;
    let cgroup = Cgroup::new("crowd")?;
    // More threads than the eight places that there are at least.
    let mut loads = [Load::start(&cgroup, "mixed 2000")?, Load::start(&cgroup, "mixed 2000")?];
    let mut other = Load::start(&cgroup, "anonymous 8")?;
    let id = cgroup.id()?;
    ledger.add(id)?;
    let before = cgroup.cpu_stat("usage_usec")?;
    for load in &mut loads {
        load.go()?;
    }
    other.go()?;
    other.expect("touched")?;
    for load in &mut loads {
        load.done()?;
    }
    let usage = ledger.read_one(id)?;
    let theirs = (cgroup.cpu_stat("usage_usec")? - before) * 1000;
    let lost = ledger.lost()?;
    println!("{lost:?}");
    ensure!(lost.tasks > 0 && lost.processes > 0, "{lost:?}");
    // What other CPUs charged a thread with that had no place is not counted, and it is said so.
    let exact = agree("CPU time", usage.cpu_ns, theirs, EXACT);
    ensure!(
        exact.is_ok() || (lost.charges > 0 && usage.cpu_ns < theirs && usage.cpu_ns > theirs / 2),
        "{exact:?}, {lost:?}"
    );
    Ok(())
}

#[test]
fn where_there_is_no_room_for_a_cgroup_the_others_count_on() -> Result<()> {
    need_tracefs()?;
    let ledger = Ledger::load(Limits {
        cgroups: 2,
        ..Limits::GUEST
    })?;
    let machine = Cgroup::new("machine")?;
    {
        let (vcpus, vmm) = (machine.child("vcpus")?, machine.child("vmm")?);
        ledger.add(machine.id()?)?;
        ledger.add_cgroup(machine.id()?, vcpus.id()?, Part::Vcpus)?;
        let full = ledger.add_cgroup(machine.id()?, vmm.id()?, Part::Vmm);
        ensure!(matches!(full, Err(LedgerError::Map { map: "CGROUPS", .. })), "{full:?}");
        let other = ledger.add(vmm.id()?);
        ensure!(
            matches!(other, Err(LedgerError::Map { map: "CGROUPS", .. })),
            "{other:?}"
        );
        let mut load = Load::start(&vcpus, "mixed 500")?;
        let before = (ledger.read_one(machine.id()?)?.cpu_ns, vcpus.cpu_stat("usage_usec")?);
        load.go()?;
        load.done()?;
        let ours = ledger.read_one(machine.id()?)?.cpu_ns - before.0;
        agree("CPU time", ours, (vcpus.cpu_stat("usage_usec")? - before.1) * 1000, 0.1)?;
        load.finish()?;
        // There is room again once one is gone.
        ledger.remove(machine.id()?)?;
        ledger.add(vmm.id()?)?;
    }
    Ok(())
}

#[test]
fn a_slot_passes_on_nothing() -> Result<()> {
    need_tracefs()?;
    let ledger = Ledger::load(Limits {
        subjects: 1,
        ..Limits::GUEST
    })?;
    let old = Cgroup::new("old")?;
    let mut busy = Load::start(&old, "spin 600000")?;
    let mut big = Load::start(&old, "anonymous 100")?;
    ledger.add(old.id()?)?;
    let new = Cgroup::new("new")?;
    ensure!(matches!(ledger.add(new.id()?), Err(LedgerError::Full { subjects: 1 })));
    busy.go()?;
    big.go()?;
    big.expect("touched")?;
    wait_for("some CPU time", || Ok(ledger.read_one(old.id()?)?.cpu_ns > 50_000_000))?;
    // Both owners' threads are at work all the while.
    for _ in 0..200 {
        let total = ledger.remove(old.id()?)?;
        ledger.add(new.id()?)?;
        thread::sleep(Duration::from_millis(2));
        ensure!(ledger.read_one(new.id()?)? == Usage::default());
        ensure!(ledger.remove(new.id()?)? == Usage::default());
        ensure!(total.memory_bytes <= 110 * MIB, "{total:?}");
        ledger.add(old.id()?)?;
    }
    ledger.remove(old.id()?)?;
    ledger.add(new.id()?)?;
    big.go()?;
    big.done()?;
    ensure!(
        ledger.read_one(new.id()?)? == Usage::default(),
        "the old owner's memory was freed at the new one's cost"
    );
    busy.kill()?;
    big.finish()
}

#[test]
fn only_what_is_registered_counts() -> Result<()> {
    let ledger = ledger()?;
    let (ours, others) = (Cgroup::new("ours")?, Cgroup::new("others")?);
    ledger.add(ours.id()?)?;
    let mut load = Load::start(&others, "mixed 500")?;
    load.go()?;
    load.done()?;
    let read = ledger.read()?;
    ensure!(read.len() == 1 && read[&ours.id()?] == Usage::default(), "{read:?}");
    ensure!(matches!(ledger.read_one(others.id()?), Err(LedgerError::Unknown(_))));
    ensure!(matches!(ledger.remove(others.id()?), Err(LedgerError::Unknown(_))));
    ensure!(matches!(ledger.add(ours.id()?), Err(LedgerError::Known(_))));
    ensure!(matches!(ledger.add(CgroupId::from(1)), Err(LedgerError::Root(_))));
    load.finish()
}

#[test]
fn several_cgroups_count_towards_one_subject() -> Result<()> {
    let ledger = ledger()?;
    let machine = Cgroup::new("machine")?;
    ledger.add(machine.id()?)?;
    {
        let parts = [
            (machine.child("vcpus")?, Part::Vcpus),
            (machine.child("vmm")?, Part::Vmm),
        ];
        let mut loads = Vec::new();
        for (cgroup, part) in &parts {
            ledger.add_cgroup(machine.id()?, cgroup.id()?, *part)?;
            ensure!(matches!(
                ledger.add_cgroup(machine.id()?, cgroup.id()?, *part),
                Err(LedgerError::Known(_))
            ));
            loads.push(Load::start(cgroup, "spin 1500")?);
        }
        let own = |which: usize| Ok::<_, anyhow::Error>(parts[which].0.cpu_stat("usage_usec")? * 1000);
        let before_each = [own(0)?, own(1)?];
        let start_each = ledger.read_one(machine.id()?)?;
        let before = machine.cpu_stat("usage_usec")? * 1000;
        let start = ledger.read_one(machine.id()?)?.cpu_ns;
        for load in &mut loads {
            load.go()?;
        }
        for load in &mut loads {
            load.done()?;
        }
        let usage = ledger.read_one(machine.id()?)?;
        let after = machine.cpu_stat("usage_usec")? * 1000;
        agree("CPU time", usage.cpu_ns - start, after - before, EXACT)?;
        for (which, (_, part)) in parts.iter().enumerate() {
            let ours = usage.part(*part).cpu_ns - start_each.part(*part).cpu_ns;
            agree("CPU time of a part", ours, own(which)? - before_each[which], EXACT)?;
        }
        ensure!(usage.part(Part::Own) == Time::default(), "{usage:?}");
        for load in loads {
            load.finish()?;
        }
    }
    ensure!(ledger.read()?.len() == 1);
    ledger.remove(machine.id()?)?;
    ensure!(ledger.read()?.is_empty());
    Ok(())
}

#[test]
fn many_may_ask_at_once() -> Result<()> {
    let ledger = ledger()?;
    let cgroup = Cgroup::new("asked")?;
    let id = cgroup.id()?;
    let mut load = Load::start(&cgroup, "mixed 3000")?;
    ledger.add(id)?;
    let before = cgroup.cpu_stat("usage_usec")?;
    load.go()?;
    thread::scope(|scope| -> Result<()> {
        let askers: Vec<_> = (0..4u64)
            .map(|which| {
                let ledger = &ledger;
                scope.spawn(move || -> Result<()> {
                    let mut last = 0;
                    for round in 0..300 {
                        let now = ledger.read_one(id)?.cpu_ns;
                        ensure!(now >= last, "{now} after {last}");
                        last = now;
                        let visitor = CgroupId::from(1 << 60 | which << 32 | round);
                        ledger.add(visitor)?;
                        ensure!(ledger.remove(visitor)? == Usage::default());
                    }
                    Ok(())
                })
            })
            .collect();
        for asker in askers {
            asker.join().map_err(|_| anyhow::anyhow!("an asker panicked"))??;
        }
        Ok(())
    })?;
    load.done()?;
    let usage = ledger.read_one(id)?;
    let after = cgroup.cpu_stat("usage_usec")?;
    agree("CPU time", usage.cpu_ns, (after - before) * 1000, EXACT)?;
    load.finish()
}

#[test]
fn says_what_is_missing() -> Result<()> {
    need_tracefs()?;
    let cgroup = Cgroup::new("refused")?;
    for load in ["without-rights", "without-tracefs"] {
        let mut load = Load::start(&cgroup, load)?;
        load.go()?;
        load.done()?;
        load.finish()?;
    }
    Ok(())
}
