//! Accounts of credits in the kernel. Needs root and cgroup v2.

mod common;

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use common::system::{Bpffs, Cgroup, wait_for};
use common::{Load, VISITORS, run_as_load};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::time::{ClockId, clock_getres};
use stoker_credits::{Account, Credits, Level, Mode, Plan, Terms};
use stoker_ebpf::{CgroupId, Crossing, Ledger, LedgerError, Limits, Part};
use stoker_testkit::tracefs::need_tracefs;

/// The longest time between two charges of a thread that runs on and on (`CONFIG_HZ` is 100 or more), and some more.
const TICK: Duration = Duration::from_millis(12);

/// Not a test: what the tests below start, to load the system.
#[test]
fn load() -> Result<()> {
    run_as_load()
}

/// For some machines.
const LIMITS: Limits = Limits {
    machines: true,
    ..Limits::GUEST
};

fn ledger() -> Result<Ledger> {
    need_tracefs()?;
    Ok(Ledger::load(LIMITS)?)
}

/// Of a machine that is of the high class at the start, and has spent all after 3.6 s of CPU time: it earns next to nothing.
fn plan() -> Plan {
    Plan {
        cap: Some(Credits::from_millis(100)),
        high_enter: Some(Credits::from_millis(50)),
        high_leave: Some(Credits::from_millis(40)),
        low: Some(Credits::from_millis(30)),
        recover: Some(Credits::from_millis(5)),
        launch: Credits::from_millis(60),
        ..Plan::new(1, 1, Mode::Standard)
    }
}

fn terms() -> Result<Terms> {
    Ok(plan().terms()?)
}

/// That nothing came of nothing, and nothing was lost.
fn check(account: &Account) -> Result<()> {
    let totals = account.totals();
    let written_off = totals.billed.get() + totals.forgiven.get();
    let had = totals.earned.get() + totals.granted.get() + written_off + u128::from(account.owed_ps());
    let left = u128::from(account.spendable_ps());
    ensure!(had == totals.spent.get() + left + totals.discarded.get(), "{account:?}");
    Ok(())
}

/// What an account has spent, in ns.
fn spent_ns(account: &Account) -> u64 {
    u64::try_from(account.totals().spent.get() / 1000).unwrap_or(u64::MAX)
}

fn drained(ledger: &Ledger) -> Vec<Crossing> {
    let mut crossings = Vec::new();
    ledger.drain(|crossing| crossings.push(crossing));
    crossings
}

fn is_readable(fd: BorrowedFd<'_>, timeout: PollTimeout) -> Result<bool> {
    Ok(poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout)? > 0)
}

#[test]
fn every_ns_of_every_part_is_spent() -> Result<()> {
    let ledger = ledger()?;
    let machine = Cgroup::new("machine")?;
    let id = machine.id()?;
    ledger.add(id)?;
    {
        let parts = [
            (machine.child("vcpus")?, Part::Vcpus),
            (machine.child("vmm")?, Part::Vmm),
        ];
        let mut loads = Vec::new();
        for ((cgroup, part), load) in parts.iter().zip(["mixed 3000", "thief 700 3000"]) {
            ledger.add_cgroup(id, cgroup.id()?, *part)?;
            loads.push(Load::start(cgroup, load)?);
        }
        let before = ledger.read_one(id)?.cpu_ns;
        ledger.open_account(id, &terms()?)?;
        for load in &mut loads {
            load.go()?;
        }
        for load in &mut loads {
            load.done()?;
        }
        let account = ledger.settle_account(id)?;
        check(&account)?;
        let usage = ledger.charged(id)?;
        ensure!(
            usage.part(Part::Vcpus).cpu_ns > 0 && usage.part(Part::Vmm).cpu_ns > 0,
            "{usage:?}"
        );
        let (spent, used) = (spent_ns(&account), usage.cpu_ns - before);
        ensure!(spent == used, "spent {spent} ns of {used}");
        for load in loads {
            load.finish()?;
        }
    }
    ledger.remove(id)?;
    Ok(())
}

#[test]
fn a_busy_machine_goes_down_every_level_and_who_polls_is_woken() -> Result<()> {
    let ledger = ledger()?;
    let machine = Cgroup::new("machine")?;
    let id = machine.id()?;
    let mut load = Load::start(&machine, "spin 600000")?;
    ledger.add(id)?;
    let opened = ledger.open_account(id, &terms()?)?;
    ensure!(opened.level() == Level::HIGH, "{opened:?}");
    ensure!(!is_readable(ledger.crossings(), PollTimeout::ZERO)?);
    load.go()?;
    let start = Instant::now();
    let (mut levels, mut told) = (vec![opened.level()], Vec::new());
    while levels.last() != Some(&Level::EXHAUSTED) {
        let woken = is_readable(ledger.crossings(), PollTimeout::from(60_000_u16))?;
        ensure!(woken, "no crossing for a minute, after {levels:?}");
        for crossing in drained(&ledger) {
            let late = ledger.account(id)?.context("an account")?.1.settled_ns() - crossing.account.settled_ns();
            told.push(Duration::from_nanos(late));
            ensure!(
                crossing.owner == id && levels.last() == Some(&crossing.from),
                "{crossing:?}"
            );
            ensure!(crossing.account.level() == crossing.to, "{crossing:?}");
            levels.push(crossing.to);
            check(&crossing.account)?;
            // It is seen where it happens, not at the next settlement.
            let borrowed = Duration::from_nanos(u64::try_from(crossing.account.totals().borrowed.get() / 1000)?);
            ensure!(
                borrowed <= TICK,
                "used {borrowed:?} more than it had before that was seen"
            );
        }
    }
    println!("{levels:?} within {:?}; told {told:?} later", start.elapsed());
    ensure!(levels.len() == 10, "{levels:?}");
    ensure!(ledger.lost()?.crossings == 0);
    load.kill()
}

#[test]
fn one_that_runs_on_near_to_another_level_is_told_of_and_falls_in_time() -> Result<()> {
    let ledger = ledger()?;
    let machine = Cgroup::new("machine")?;
    let id = machine.id()?;
    let mut load = Load::start(&machine, "spin 600000")?;
    ledger.add(id)?;
    ledger.open_account(id, &terms()?)?;
    ensure!(!is_readable(ledger.near(), PollTimeout::ZERO)?, "far from all levels");
    load.go()?;
    let tick = clock_getres(ClockId::CLOCK_MONOTONIC_COARSE)?;
    let mut levels = 0;
    while levels < 9 {
        if Duration::from(tick) <= Duration::from_millis(1) {
            ensure!(is_readable(ledger.crossings(), PollTimeout::from(60_000_u16))?);
            ensure!(
                !is_readable(ledger.near(), PollTimeout::ZERO)?,
                "the tick comes soon enough"
            );
        } else {
            ensure!(is_readable(ledger.near(), PollTimeout::from(60_000_u16))?, "not told");
            let mut told = Vec::new();
            ledger.drain_near(|owner, left_ns| told.push((owner, left_ns)));
            ensure!(told.len() == 1 && told[0].0 == id, "{told:?}");
            ensure!(told[0].1 <= u64::try_from(Duration::from(tick).as_nanos())?, "{told:?}");
            // Until it has fallen, nobody is told again: who is told has it charged.
            while !is_readable(ledger.crossings(), PollTimeout::ZERO)? {
                thread::sleep(Duration::from_micros(200));
                ledger.charge(id)?;
            }
            ensure!(!is_readable(ledger.near(), PollTimeout::ZERO)?, "told twice");
            ledger.settle_account(id)?;
        }
        levels += drained(&ledger).len();
    }
    load.kill()
}

#[test]
fn one_that_never_leaves_its_cpu_is_charged_as_it_runs() -> Result<()> {
    let ledger = ledger()?;
    let machine = Cgroup::new("machine")?;
    let id = machine.id()?;
    let mut load = Load::start(&machine, "spin 600000")?;
    ledger.add(id)?;
    ledger.open_account(id, &terms()?)?;
    load.go()?;
    let spent = || Ok::<_, anyhow::Error>(spent_ns(&ledger.account(id)?.context("an account")?.1));
    // For three ticks without a switch.
    wait_for("a thread that computes without leaving its CPU", || {
        let (switches, before, start) = (load.switches()?, spent()?, Instant::now());
        thread::sleep(TICK * 3);
        let (after, took) = (spent()?, start.elapsed());
        if load.switches()? != switches {
            return Ok(false);
        }
        let charged = Duration::from_nanos(after - before);
        println!("{charged:?} in {took:?}");
        Ok(charged + TICK >= took)
    })?;
    load.kill()
}

#[test]
fn a_sleeping_machine_rises_when_it_is_settled() -> Result<()> {
    let ledger = ledger()?;
    let id = CgroupId::from(VISITORS);
    ledger.add(id)?;
    let terms = Plan {
        launch: Credits::new(0),
        baseline_millis: 500,
        ..plan()
    };
    let opened = ledger.open_account(id, &terms.terms()?)?;
    ensure!(opened.level() == Level::EXHAUSTED);
    let until = opened.until_crossing(&terms.terms()?, 0).context("a crossing")?;
    wait_for("what it needs to rise", || {
        let account = ledger.account(id)?.context("an account")?.1;
        Ok(account.settled_ns() >= opened.settled_ns() + until)
    })?;
    // Nobody has told the kernel yet.
    ensure!(drained(&ledger).is_empty());
    let settled = ledger.settle_account(id)?;
    check(&settled)?;
    let crossings = drained(&ledger);
    ensure!(
        crossings.len() == 1 && crossings[0].to == settled.level(),
        "{crossings:?}"
    );
    ensure!(settled.level() > Level::EXHAUSTED && settled.totals().spent.get() == 0);
    Ok(())
}

#[test]
fn what_user_space_changes_gets_lost_no_more_than_what_is_used() -> Result<()> {
    const GRANTS: u64 = 500;
    const PS: u64 = 7_000_003;
    let ledger = ledger()?;
    let machine = Cgroup::new("machine")?;
    let id = machine.id()?;
    let mut load = Load::start(&machine, "mixed 3000")?;
    ledger.add(id)?;
    let before = ledger.read_one(id)?.cpu_ns;
    let opened = ledger.open_account(id, &terms()?)?;
    load.go()?;
    thread::scope(|scope| -> Result<()> {
        let askers: Vec<_> = (0..3)
            .map(|which| {
                let ledger = &ledger;
                scope.spawn(move || -> Result<()> {
                    for round in 0..GRANTS {
                        ledger.grant(id, PS)?;
                        // Terms of the same cap: nothing is discarded.
                        let plan = Plan {
                            high_leave: Some(Credits::from_millis(40 + (round + which) % 2)),
                            ..plan()
                        };
                        ledger.set_terms(id, &plan.terms()?)?;
                        check(&ledger.settle_account(id)?)?;
                        check(&ledger.account(id)?.context("an account")?.1)?;
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
    let account = ledger.close_account(id)?;
    let granted = account.totals().granted.get() - opened.totals().granted.get();
    ensure!(granted == u128::from(3 * GRANTS * PS), "granted {granted} ps");
    let (spent, used) = (spent_ns(&account), ledger.charged(id)?.cpu_ns - before);
    ensure!(spent == used, "spent {spent} ns of {used}");
    ensure!(matches!(ledger.settle_account(id), Err(LedgerError::NoAccount(_))));
    load.finish()
}

#[test]
fn more_crossings_than_there_is_room_for_are_counted() -> Result<()> {
    const TIMES: u64 = 600;
    let ledger = ledger()?;
    let id = CgroupId::from(VISITORS);
    ledger.add(id)?;
    let standard = Plan {
        launch: Credits::new(0),
        ..plan()
    };
    let unlimited = Plan {
        mode: Mode::Unlimited,
        ..standard
    }
    .terms()?;
    let standard = standard.terms()?;
    ledger.open_account(id, &standard)?;
    for _ in 0..TIMES / 2 {
        ensure!(ledger.set_terms(id, &unlimited)?.level() == Level::FULL);
        ensure!(ledger.set_terms(id, &standard)?.level() < Level::FULL);
    }
    let told = drained(&ledger).len() as u64;
    let lost = ledger.lost()?.crossings;
    println!("{told} told, {lost} lost");
    ensure!(lost > 0 && told + lost == TIMES, "{told} told, {lost} lost of {TIMES}");
    let account = ledger.settle_account(id)?;
    ensure!(u64::from(account.crossings()) == TIMES, "{account:?}");
    // There is room again.
    ledger.set_terms(id, &unlimited)?;
    ensure!(drained(&ledger).len() == 1);
    Ok(())
}

#[test]
fn a_place_passes_on_no_account() -> Result<()> {
    need_tracefs()?;
    let ledger = Ledger::load(Limits { subjects: 1, ..LIMITS })?;
    let (old, new) = (Cgroup::new("old")?, Cgroup::new("new")?);
    let mut busy = Load::start(&old, "spin 600000")?;
    ledger.add(old.id()?)?;
    ledger.open_account(old.id()?, &terms()?)?;
    busy.go()?;
    for _ in 0..100 {
        ledger.remove(old.id()?)?;
        ensure!(matches!(ledger.account(old.id()?), Err(LedgerError::Unknown(_))));
        ledger.add(new.id()?)?;
        ensure!(ledger.account(new.id()?)?.is_none());
        let granted = ledger.grant(new.id()?, 1);
        ensure!(matches!(granted, Err(LedgerError::NoAccount(_))), "{granted:?}");
        ledger.open_account(new.id()?, &terms()?)?;
        thread::sleep(Duration::from_millis(1));
        let account = ledger.close_account(new.id()?)?;
        ensure!(account.totals().spent.get() == 0, "{account:?}");
        ledger.remove(new.id()?)?;
        ledger.add(old.id()?)?;
        ledger.open_account(old.id()?, &terms()?)?;
    }
    wait_for("some use", || {
        Ok(spent_ns(&ledger.settle_account(old.id()?)?) > 1_000_000)
    })?;
    busy.kill()
}

#[test]
fn a_restored_account_has_no_more_than_it_had() -> Result<()> {
    let ledger = ledger()?;
    let id = CgroupId::from(VISITORS);
    ledger.add(id)?;
    let saved = ledger.open_account(id, &terms()?)?;
    let unsaved_ns = 50_000_000;
    let restored = ledger.restore_account(id, &terms()?, &saved, unsaved_ns)?;
    check(&restored)?;
    ensure!(restored.spendable_ps() == saved.spendable_ps() - unsaved_ns * 1000);
    ensure!(restored.totals().earned == saved.totals().earned, "earned meanwhile");
    Ok(())
}

#[test]
fn containers_have_no_accounts() -> Result<()> {
    need_tracefs()?;
    let ledger = Ledger::load(Limits::GUEST)?;
    let id = CgroupId::from(VISITORS);
    ledger.add(id)?;
    ensure!(matches!(
        ledger.open_account(id, &terms()?),
        Err(LedgerError::NoAccounts)
    ));
    ensure!(ledger.account(id)?.is_none() && ledger.accounts()?.is_empty());
    ensure!(drained(&ledger).is_empty());
    ledger.remove(id)?;
    Ok(())
}

fn rang(ledger: &Ledger) -> Vec<CgroupId> {
    let mut rang = Vec::new();
    ledger.drain_alarms(|subject| rang.push(subject));
    rang
}

#[test]
fn who_sets_an_alarm_is_woken_once_a_container_has_used_so_much() -> Result<()> {
    need_tracefs()?;
    let ledger = Ledger::load(Limits::GUEST)?;
    let (busy, calm) = (Cgroup::new("busy")?, Cgroup::new("calm")?);
    let mut load = Load::start(&busy, "spin 600000")?;
    let (busy_id, calm_id) = (busy.id()?, calm.id()?);
    let alarms = ledger.alarms()?;
    for id in [busy_id, calm_id] {
        ledger.add(id)?;
        ledger.set_alarm(id, 50_000_000)?;
    }
    ensure!(!is_readable(alarms.as_fd(), PollTimeout::ZERO)?);
    load.go()?;
    for round in 1..=5_u64 {
        let at_ns = round * 50_000_000;
        ensure!(is_readable(alarms.as_fd(), PollTimeout::from(60_000_u16))?);
        ensure!(rang(&ledger) == [busy_id], "the other has used nothing");
        let used_ns = ledger.charged(busy_id)?.cpu_ns;
        ensure!(used_ns >= at_ns, "after {used_ns} ns");
        // It is told of once, however much is used then.
        wait_for(
            "more use",
            || Ok(ledger.charged(busy_id)?.cpu_ns > used_ns + 20_000_000),
        )?;
        ensure!(rang(&ledger).is_empty());
        ledger.set_alarm(busy_id, at_ns + 50_000_000)?;
    }
    // Another that has its place has no alarm.
    load.kill()?;
    ledger.remove(busy_id)?;
    rang(&ledger);
    let mut load = Load::start(&calm, "spin 600000")?;
    ledger.set_alarm(calm_id, u64::MAX)?;
    load.go()?;
    wait_for("some use", || Ok(ledger.charged(calm_id)?.cpu_ns > 300_000_000))?;
    ensure!(rang(&ledger).is_empty());
    load.kill()?;
    let of_machines = self::ledger()?;
    of_machines.add(busy_id)?;
    ensure!(matches!(of_machines.set_alarm(busy_id, 1), Err(LedgerError::NoAlarms)));
    ensure!(of_machines.alarms().is_err());
    Ok(())
}

#[test]
fn all_accounts_are_read_at_once() -> Result<()> {
    const ACCOUNTS: u64 = 1000;
    need_tracefs()?;
    let ledger = Ledger::load(Limits {
        subjects: 1000,
        cgroups: 2000,
        ..LIMITS
    })?;
    let granted: HashMap<CgroupId, u64> = (0..ACCOUNTS)
        .map(|which| (CgroupId::from(VISITORS + which), which))
        .collect();
    for (&id, &ps) in &granted {
        ledger.add(id)?;
        ledger.open_account(id, &terms()?)?;
        ledger.grant(id, ps)?;
    }
    let launch = u128::from(terms()?.launch_ps());
    for round in 0..3 {
        let start = Instant::now();
        let accounts = ledger.accounts()?;
        println!("round {round}: {ACCOUNTS} accounts in {:?}", start.elapsed());
        ensure!(accounts.len() as u64 == ACCOUNTS);
        for (id, account) in accounts {
            let ps = granted.get(&id).context("one of them")?;
            ensure!(account.totals().granted.get() == launch + u128::from(*ps), "{id}");
            check(&account)?;
        }
    }
    Ok(())
}

/// Opens what is pinned, of another version for each number of subjects.
fn open(folder: &std::path::Path, subjects: u32) -> Result<Ledger> {
    Ok(Ledger::open(Limits { subjects, ..LIMITS }, folder)?)
}

#[test]
fn an_account_goes_on_while_nobody_has_it_open_and_in_another_version() -> Result<()> {
    need_tracefs()?;
    let bpffs = Bpffs::mount()?;
    let folder = bpffs.path().join("stoker/pins");
    let machine = Cgroup::new("machine")?;
    let id = machine.id()?;
    let mut load = Load::start(&machine, "spin 600000")?;
    let before = machine.cpu_stat("usage_usec")?;
    let ledger = open(&folder, 8)?;
    ledger.add(id)?;
    let opened = ledger.open_account(id, &terms()?)?;
    let switches_before = load.switches()?;
    load.go()?;
    drop(ledger);
    // It falls, and nobody looks.
    wait_for("half of what it has to be used", || {
        Ok((machine.cpu_stat("usage_usec")? - before) * 2_000_000 > opened.spendable_ps())
    })?;
    let ledger = open(&folder, 8)?;
    let crossings = drained(&ledger);
    ensure!(
        !crossings.is_empty() && crossings[0].from == Level::HIGH,
        "{crossings:?}"
    );
    let mut level = ledger.account(id)?.context("an account")?.1.level();
    ensure!(crossings.last().map(|last| last.to) == Some(level), "{crossings:?}");
    drop(ledger);
    // Each with what the one before had.
    let mut last = opened.totals().spent.get();
    for version in 100..105 {
        let ledger = open(&folder, version)?;
        let account = ledger.settle_account(id)?;
        check(&account)?;
        ensure!(
            account.totals().spent.get() >= last && account.level() <= level,
            "{account:?}"
        );
        (last, level) = (account.totals().spent.get(), account.level());
    }
    let ledger = open(&folder, 104)?;
    load.stop()?;
    let (account, used) = (
        ledger.settle_account(id)?,
        (machine.cpu_stat("usage_usec")? - before) * 1000,
    );
    let spent = spent_ns(&account);
    println!(
        "spent {spent} ns of {used}, {} switches",
        load.switches()? - switches_before
    );
    // Never less than was used: but for what it used before it had an account, and what `cpu.stat` leaves out of a us.
    ensure!(
        spent + 2_000_000 >= used && spent <= used + used / 100,
        "spent {spent} ns of {used}"
    );
    load.kill()
}
