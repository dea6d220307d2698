//! Why machines do not run: throttling, others, and what KVM tells of those that do. Needs root, cgroup v2 and, for the last, KVM.

mod common;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use common::system::{Cgroup, wait_for, without_type_information};
use common::{Load, agree, run_as_load};
use stoker_ebpf::{Exit, Lack, Ledger, Limits};
use stoker_testkit::tracefs::need_tracefs;

/// Not a test: what the tests below start, to load the system.
#[test]
fn load() -> Result<()> {
    run_as_load()
}

fn ledger() -> Result<Ledger> {
    need_tracefs()?;
    Ok(Ledger::load(Limits {
        machines: true,
        ..Limits::GUEST
    })?)
}

/// Whether waits are told apart here; where not, the ledger says so and tells nothing.
fn knows_throttling(ledger: &Ledger) -> bool {
    let lacks = ledger
        .lacks()
        .iter()
        .find(|lack| matches!(lack, Lack::Throttling { .. }));
    if let Some(lack) = lacks {
        println!("{lack}");
    }
    lacks.is_none()
}

#[test]
fn waiting_for_a_limit_is_told_apart_from_waiting_for_others() -> Result<()> {
    let ledger = ledger()?;
    let (held, crowded) = (Cgroup::new("held")?, Cgroup::new("crowded")?);
    ledger.add(held.id()?)?;
    ledger.add(crowded.id()?)?;
    // Two threads on one CPU, a fiftieth of which is theirs: one is held back while it runs, the other while it waits for it.
    let limit = held.limit(2_000)?;
    let mut loads = Vec::new();
    for _ in 0..2 {
        let load = Load::start(&held, "pinned 0 4000")?;
        limit.take(load.pid())?;
        loads.push(load);
    }
    // And two on the other, whom nobody holds back.
    for _ in 0..2 {
        loads.push(Load::start(&crowded, "pinned 1 4000")?);
    }
    let start = Instant::now();
    for load in &mut loads {
        load.go()?;
    }
    for load in &mut loads {
        load.done()?;
    }
    let both_ns = 2 * start.elapsed().as_nanos();
    let (held_use, crowded_use) = (ledger.read_one(held.id()?)?, ledger.read_one(crowded.id()?)?);
    println!("held {held_use:?}\ncrowded {crowded_use:?}");
    ensure!(crowded_use.wait_ns > 1_000_000_000, "{crowded_use:?}");
    ensure!(crowded_use.throttled_ns == 0, "{crowded_use:?}");
    if knows_throttling(&ledger) {
        // Nearly all of the 8 s or more that two threads have. Only on a busy machine they wait for others too, once a period has begun.
        let throttled = held_use.throttled_ns;
        ensure!(
            throttled > 5_000_000_000 && u128::from(throttled) <= both_ns,
            "{held_use:?} in {both_ns} ns"
        );
        ensure!(held_use.wait_ns > throttled, "{held_use:?}");
        if let Ok(theirs) = held.cpu_stat("throttled_usec") {
            // The kernel counts the cgroup's time, and both its threads wait for all of it.
            agree("throttled", throttled, theirs * 2000, 12.0)?;
        }
    } else {
        ensure!(held_use.throttled_ns == 0);
    }
    for load in loads {
        load.finish()?;
    }
    drop(limit);
    Ok(())
}

#[test]
fn one_that_is_woken_while_its_cgroup_is_held_back_waits_for_the_limit() -> Result<()> {
    let ledger = ledger()?;
    let held = Cgroup::new("held")?;
    ledger.add(held.id()?)?;
    // It has most often gone to sleep when the limit is used up, and nobody else is held back.
    let mut load = Load::start(&held, "thief 1500 4000")?;
    let limit = held.limit(2_000)?;
    limit.take(load.pid())?;
    load.go()?;
    load.done()?;
    let (used, theirs) = (ledger.read_one(held.id()?)?, load.run_delay()?);
    println!("{used:?}, run_delay {theirs}");
    if knows_throttling(&ledger) {
        // All that it waited for, but for others on a busy machine.
        ensure!(used.throttled_ns > 2_500_000_000, "{used:?}");
        ensure!(used.throttled_ns <= used.wait_ns, "{used:?}");
    }
    load.finish()?;
    drop(limit);
    Ok(())
}

#[test]
fn without_type_information_waits_are_counted_all_the_same() -> Result<()> {
    need_tracefs()?;
    let ledger = without_type_information(|| {
        Ok(Ledger::load(Limits {
            machines: true,
            ..Limits::GUEST
        })?)
    })?;
    for lack in ledger.lacks() {
        println!("{lack}");
    }
    for lacks in [
        |lack: &Lack| matches!(lack, Lack::Waits { why } if why.contains("CONFIG_DEBUG_INFO_BTF")),
        |lack: &Lack| matches!(lack, Lack::Throttling { why } if why.contains("CONFIG_DEBUG_INFO_BTF")),
    ] {
        ensure!(ledger.lacks().iter().any(lacks), "{:?}", ledger.lacks());
    }
    let cgroups = [Cgroup::new("left")?, Cgroup::new("right")?];
    let mut loads = Vec::new();
    for cgroup in &cgroups {
        ledger.add(cgroup.id()?)?;
        loads.push(Load::start(cgroup, "pinned 0 3000")?);
    }
    let mut before = Vec::new();
    for load in &mut loads {
        before.push(load.run_delay()?);
        load.go()?;
    }
    for load in &mut loads {
        load.done()?;
    }
    for ((cgroup, load), before) in cgroups.iter().zip(&loads).zip(before) {
        let used = ledger.read_one(cgroup.id()?)?;
        agree("wait", used.wait_ns, load.run_delay()? - before, 3.0)?;
        ensure!(used.throttled_ns == 0, "{used:?}");
    }
    loads.into_iter().try_for_each(Load::finish)
}

#[test]
fn says_who_took_whose_cpu() -> Result<()> {
    let ledger = ledger()?;
    let cgroups = [Cgroup::new("left")?, Cgroup::new("right")?];
    let ids = [cgroups[0].id()?, cgroups[1].id()?];
    let mut loads = Vec::new();
    for cgroup in &cgroups {
        ledger.add(cgroup.id()?)?;
        loads.push(Load::start(cgroup, "pinned 0 600000")?);
    }
    for load in &mut loads {
        load.go()?;
    }
    let times = |subject, by| -> Result<u64> {
        let all = ledger.preemptions()?;
        let found = all
            .iter()
            .find(|found| found.subject == subject && found.by == Some(by));
        Ok(found.map_or(0, |found| found.times))
    };
    wait_for("each to take the other's CPU", || {
        Ok(times(ids[0], ids[1])? >= 5 && times(ids[1], ids[0])? >= 5)
    })?;
    ensure!(times(ids[0], ids[0])? == 0, "from itself");
    ledger.remove(ids[1])?;
    ensure!(
        ledger.preemptions()?.iter().all(|found| found.subject != ids[1]),
        "of one that is gone"
    );
    loads.into_iter().try_for_each(Load::kill)
}

#[test]
fn guest_time_and_exits_are_told_where_the_kernel_has_them() -> Result<()> {
    const GUESTS: u64 = 20;
    let ledger = ledger()?;
    let machine = Cgroup::new("machine")?;
    let id = machine.id()?;
    let mut load = Load::start(&machine, &format!("guests {GUESTS}"))?;
    ledger.add(id)?;
    let lack = ledger.lacks().iter().find(|lack| matches!(lack, Lack::Guest { .. }));
    load.go()?;
    load.done()?;
    let told = ledger.guest(id)?;
    if let Some(lack) = lack {
        println!("{lack}");
        ensure!(told.is_none(), "{told:?}");
        return load.finish();
    }
    let told = told.context("what KVM did")?;
    println!("{told:?}");
    let halts = told
        .exits()
        .find(|(exit, _)| *exit == Exit::Halt)
        .map_or(0, |(_, times)| times);
    let all: u64 = told.exits().map(|(_, times)| times).sum();
    // A software KVM has the tracepoints and never reaches them.
    if all == 0 && stoker_linux::kvm::probe().is_err() {
        println!("this KVM does not tell");
        return load.finish();
    }
    ensure!(halts == 3 * GUESTS, "{halts} halts of {GUESTS} guests: {told:?}");
    let (guest, used) = (
        Duration::from_nanos(told.guest_ns),
        Duration::from_nanos(ledger.read_one(id)?.cpu_ns),
    );
    ensure!(guest > Duration::ZERO && guest <= used, "{guest:?} of {used:?}");
    load.finish()
}
