//! A ledger that is pinned: what it counts while nobody has it open. Needs root and cgroup v2.

mod common;

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use common::system::{Bpffs, Cgroup, wait_for};
use common::{Load, VISITORS, agree, open, run_as_load};
use stoker_ebpf::{CgroupId, Ledger, LedgerError, Limits, LoadError, Part, PinsError, Usage};
use stoker_testkit::tracefs::need_tracefs;

const MIB: u64 = 1 << 20;

/// Not a test: what the tests below start, to load the system or to have a ledger open.
#[test]
fn load() -> Result<()> {
    run_as_load()
}

/// A folder for pins that is not there yet.
fn folder() -> Result<(Bpffs, PathBuf)> {
    need_tracefs()?;
    let bpffs = Bpffs::mount()?;
    let folder = bpffs.path().join("stoker/pins");
    Ok((bpffs, folder))
}

/// A cgroup's CPU time as the kernel counts it, in ns.
fn cpu_ns(cgroup: &Cgroup) -> Result<u64> {
    Ok(cgroup.cpu_stat("usage_usec")? * 1000)
}

/// A ledger that nobody opens or takes over, and that counts the same.
struct Control(Ledger);

impl Control {
    fn of(subject: CgroupId, cgroups: &[CgroupId]) -> Result<Self> {
        let ledger = Ledger::load(Limits::GUEST)?;
        ledger.add(subject)?;
        for &cgroup in cgroups {
            ledger.add_cgroup(subject, cgroup, Part::Vmm)?;
        }
        Ok(Self(ledger))
    }

    /// Whether another ledger counted all that this one did, and nothing twice. The subject is at rest.
    fn compare(&self, other: &Ledger, subject: CgroupId) -> Result<()> {
        let (ours, theirs) = (other.read_one(subject)?.cpu_ns, self.0.read_one(subject)?.cpu_ns);
        println!("{} us lost", (theirs as f64 - ours as f64) / 1e3);
        agree("CPU time, beside a ledger that was left alone", ours, theirs, 0.1)
    }
}

/// Waits until a cgroup has used so much more CPU time.
fn wait_for_cpu_time(cgroup: &Cgroup, more: Duration) -> Result<()> {
    let before = cpu_ns(cgroup)?;
    wait_for("some CPU time", || {
        Ok(Duration::from_nanos(cpu_ns(cgroup)? - before) >= more)
    })
}

/// The kernel's numbers of a ledger's programs.
fn programs(ledger: &Ledger) -> Result<Vec<u32>> {
    Ok(ledger.cost()?.into_iter().map(|program| program.id).collect())
}

/// Which of these programs the kernel has.
fn loaded(ids: &[u32]) -> Result<Vec<u32>> {
    let mut loaded = Vec::new();
    for program in aya::programs::loaded_programs() {
        match program {
            Ok(program) => loaded.push(program.id()),
            // One that was unloaded while it was looked at.
            Err(_) => continue,
        }
    }
    Ok(ids.iter().copied().filter(|id| loaded.contains(id)).collect())
}

fn gone(ids: &[u32]) -> Result<()> {
    wait_for("programs that are unloaded", || Ok(loaded(ids)?.is_empty()))
}

/// What lies in a folder of pins.
fn names(folder: &PathBuf) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

#[test]
fn counts_while_nobody_has_it_open() -> Result<()> {
    let (_bpffs, folder) = folder()?;
    let cgroup = Cgroup::new("left")?;
    let id = cgroup.id()?;
    let mut load = Load::start(&cgroup, "mixed 5000")?;
    let before = cpu_ns(&cgroup)?;
    let ledger = open(&folder, 8)?;
    ledger.add(id)?;
    let ids = programs(&ledger)?;
    load.go()?;
    for _ in 0..3 {
        wait_for_cpu_time(&cgroup, Duration::from_millis(300))?;
    }
    let told = ledger.read_one(id)?;
    drop(ledger);
    wait_for_cpu_time(&cgroup, Duration::from_millis(1000))?;
    ensure!(loaded(&ids)? == ids);
    let ledger = open(&folder, 8)?;
    ensure!(programs(&ledger)? == ids, "it loaded others");
    ensure!(ledger.subjects() == [id]);
    ensure!(matches!(ledger.add(id), Err(LedgerError::Known(_))));
    let now = ledger.read_one(id)?;
    ensure!(now.cpu_ns >= told.cpu_ns + 900_000_000, "{now:?} after {told:?}");
    drop(ledger);
    // Nobody looks when it ends.
    load.done()?;
    let ledger = open(&folder, 8)?;
    agree("CPU time", ledger.read_one(id)?.cpu_ns, cpu_ns(&cgroup)? - before, 0.01)?;
    agree("VmRSS", ledger.read_one(id)?.memory_bytes, load.resident()?, 5.0)?;
    ledger.remove(id)?;
    load.finish()
}

#[test]
fn waits_are_counted_while_nobody_has_it_open() -> Result<()> {
    let (_bpffs, folder) = folder()?;
    let cgroups = [Cgroup::new("left")?, Cgroup::new("right")?];
    let ids = [cgroups[0].id()?, cgroups[1].id()?];
    let ledger = open(&folder, 8)?;
    let controls = [Control::of(ids[0], &[])?, Control::of(ids[1], &[])?];
    let mut loads = Vec::new();
    for (cgroup, id) in cgroups.iter().zip(ids) {
        ledger.add(id)?;
        loads.push(Load::start(cgroup, "pinned 0 3000")?);
    }
    drop(ledger);
    for load in &mut loads {
        load.go()?;
    }
    for load in &mut loads {
        load.done()?;
    }
    let ledger = open(&folder, 8)?;
    for (control, id) in controls.iter().zip(ids) {
        let (ours, theirs) = (ledger.read_one(id)?.wait_ns, control.0.read_one(id)?.wait_ns);
        agree("wait", ours, theirs, 0.5)?;
        ensure!(ours > 1_000_000_000, "waited only {ours} ns of 3 s");
    }
    loads.into_iter().try_for_each(Load::finish)
}

#[test]
fn goes_on_after_a_process_that_was_killed() -> Result<()> {
    let (_bpffs, folder) = folder()?;
    let own = Cgroup::new("agent")?;
    let cgroup = Cgroup::new("machine")?;
    let id = cgroup.id()?;
    let ledger = open(&folder, 8)?;
    ledger.add(id)?;
    drop(ledger);
    let control = Control::of(id, &[])?;
    let mut load = Load::start(&cgroup, "spin 5000")?;
    let path = folder.to_str().context("a path")?;
    let mut agent = Load::start(&own, &format!("open {path} 8"))?;
    agent.go()?;
    agent.expect("open")?;
    load.go()?;
    wait_for_cpu_time(&cgroup, Duration::from_millis(300))?;
    ensure!(matches!(open(&folder, 8), Err(LoadError::Pins(PinsError::InUse(_)))));
    agent.kill()?;
    load.done()?;
    let ledger = open(&folder, 8)?;
    control.compare(&ledger, id)?;
    load.finish()
}

#[test]
fn another_version_goes_on_with_the_sums() -> Result<()> {
    let (_bpffs, folder) = folder()?;
    let (busy, child, big) = (Cgroup::new("busy")?, Cgroup::new("child")?, Cgroup::new("big")?);
    let (id, other) = (busy.id()?, big.id()?);
    let mut loads = [Load::start(&busy, "mixed 600000")?, Load::start(&child, "spin 600000")?];
    let before = cpu_ns(&busy)? + cpu_ns(&child)?;
    let mut ledger = open(&folder, 100)?;
    // Before there is anything: what a process has is told when that changes, and its code may not.
    ledger.add(other)?;
    let mut hold = Load::start(&big, "anonymous 200")?;
    ledger.add(id)?;
    ledger.add_cgroup(id, child.id()?, Part::Vcpus)?;
    let control = Control::of(id, &[child.id()?])?;
    hold.go()?;
    hold.expect("touched")?;
    for load in &mut loads {
        load.go()?;
    }
    let mut told = ledger.read()?;
    let mut ids = programs(&ledger)?;
    for version in 101..111 {
        wait_for_cpu_time(&busy, Duration::from_millis(100))?;
        drop(ledger);
        let start = Instant::now();
        ledger = open(&folder, version)?;
        println!("taken over in {:?}", start.elapsed());
        let now = ledger.read()?;
        ensure!(now.len() == 2);
        for (id, before) in &told {
            let now = now.get(id).context("a subject")?;
            ensure!(
                now.cpu_ns >= before.cpu_ns && now.wait_ns >= before.wait_ns,
                "{now:?} after {before:?}"
            );
            ensure!(now.memory_peak_bytes >= before.memory_peak_bytes);
        }
        told = now;
        gone(&ids)?;
        ids = programs(&ledger)?;
        ensure!(names(&folder)?.len() == 1, "{:?}", names(&folder)?);
    }
    for load in &loads {
        load.stop()?;
    }
    control.compare(&ledger, id)?;
    let theirs = cpu_ns(&busy)? + cpu_ns(&child)? - before;
    agree("CPU time", ledger.read_one(id)?.cpu_ns, theirs, 0.1)?;
    let full = ledger.read_one(other)?;
    agree("VmRSS", full.memory_bytes, hold.resident()?, 1.0)?;
    hold.go()?;
    hold.done()?;
    let freed = ledger.read_one(other)?;
    ensure!(freed.memory_bytes < 20 * MIB, "still {freed:?}");
    ensure!(
        freed.memory_peak_bytes >= full.memory_bytes && freed.memory_peak_bytes < 220 * MIB,
        "{freed:?}"
    );
    hold.finish()?;
    loads.into_iter().try_for_each(Load::kill)?;
    for id in [id, other] {
        ensure!(ledger.remove(id)?.memory_bytes == 0);
    }
    Ok(())
}

#[test]
fn processes_that_come_and_go_meanwhile_leave_nothing_behind() -> Result<()> {
    let (_bpffs, folder) = folder()?;
    let cgroup = Cgroup::new("forks")?;
    let id = cgroup.id()?;
    let mut ledger = open(&folder, 100)?;
    ledger.add(id)?;
    let mut load = Load::start(&cgroup, "forks 1500")?;
    load.go()?;
    for version in 101..121 {
        drop(ledger);
        ledger = open(&folder, version)?;
    }
    load.done()?;
    agree("VmRSS", ledger.read_one(id)?.memory_bytes, load.resident()?, 5.0)?;
    load.finish()?;
    let usage = ledger.read_one(id)?;
    ensure!(usage.memory_bytes == 0, "of nobody: {usage:?}");
    Ok(())
}

#[test]
fn what_does_not_fit_goes_on_as_it_was() -> Result<()> {
    let (_bpffs, folder) = folder()?;
    let ids = [CgroupId::from(VISITORS), CgroupId::from(VISITORS + 1)];
    let ledger = open(&folder, 2)?;
    ledger.add(ids[0])?;
    ledger.add(ids[1])?;
    let programs_before = programs(&ledger)?;
    drop(ledger);
    match open(&folder, 1) {
        Err(LoadError::Carry(LedgerError::Full { subjects: 1 })) => {}
        other => anyhow::bail!("{other:?}"),
    }
    let ledger = open(&folder, 2)?;
    ensure!(programs(&ledger)? == programs_before);
    ensure!(ledger.subjects().len() == 2);
    ensure!(matches!(ledger.add(ids[1]), Err(LedgerError::Known(_))));
    ensure!(names(&folder)?.len() == 1, "{:?}", names(&folder)?);
    Ok(())
}

#[test]
fn a_part_of_the_pins_is_as_good_as_none() -> Result<()> {
    let (_bpffs, folder) = folder()?;
    let cgroup = Cgroup::new("again")?;
    let id = cgroup.id()?;
    let mut load = Load::start(&cgroup, "spin 600000")?;
    load.go()?;
    drop(open(&folder, 8)?);
    let version = folder.join(names(&folder)?.first().context("a version")?);
    let pins = names(&version)?;
    ensure!(pins.len() > 10, "{pins:?}");
    for pin in pins {
        let ledger = open(&folder, 8)?;
        ledger.add(id)?;
        let ids = programs(&ledger)?;
        drop(ledger);
        fs::remove_file(version.join(&pin))?;
        // As one leaves it that was killed while it pinned.
        fs::create_dir(folder.join("unfinished"))?;
        let ledger = open(&folder, 8)?;
        ensure!(ledger.subjects().is_empty(), "without {pin}");
        gone(&ids)?;
        ensure!(names(&folder)?.len() == 1);
        ledger.add(id)?;
        wait_for_cpu_time(&cgroup, Duration::from_millis(20))?;
        let usage = ledger.read_one(id)?;
        ensure!(usage.cpu_ns >= 10_000_000, "{usage:?}");
        ledger.remove(id)?;
    }
    load.kill()
}

#[test]
fn may_be_killed_while_it_pins_and_takes_over() -> Result<()> {
    const KILLS: u32 = 24;
    let (_bpffs, folder) = folder()?;
    let own = Cgroup::new("agent")?;
    let cgroup = Cgroup::new("machine")?;
    let id = cgroup.id()?;
    let path = folder.to_str().context("a path")?;
    // How long it takes in a process of its own.
    let mut agent = Load::start(&own, &format!("open {path} 100"))?;
    let start = Instant::now();
    agent.go()?;
    agent.expect("open")?;
    let whole = start.elapsed();
    agent.kill()?;
    let ledger = open(&folder, 100)?;
    let mut load = Load::start(&cgroup, "mixed 600000")?;
    ledger.add(id)?;
    drop(ledger);
    let control = Control::of(id, &[])?;
    load.go()?;
    let mut last = 0;
    let mut reached = HashMap::new();
    for kill in 0..KILLS {
        let versions = u64::from(100 + kill % 2);
        let mut agent = Load::start(&own, &format!("open {path} {versions}"))?;
        agent.go()?;
        // The moment of its death.
        thread::sleep(whole * kill / KILLS * 5 / 4);
        agent.kill()?;
        *reached.entry(names(&folder)?).or_insert(0) += 1;
        // Now and then the one that was there before is back.
        let again = u64::from(100 + (kill + kill / 8 % 2) % 2);
        let ledger = open(&folder, again)?;
        ensure!(ledger.subjects() == [id]);
        ensure!(names(&folder)?.len() == 1, "{:?}", names(&folder)?);
        let now = ledger.read_one(id)?.cpu_ns;
        ensure!(now > last, "{now} after {last}");
        last = now;
    }
    println!("{whole:?} to take over; what the dead left: {reached:?}");
    load.stop()?;
    control.compare(&open(&folder, 100)?, id)?;
    load.kill()
}

#[test]
fn may_be_killed_while_subjects_come_and_go() -> Result<()> {
    const PLACES: u64 = 3;
    let (_bpffs, folder) = folder()?;
    let own = Cgroup::new("agent")?;
    let cgroup = Cgroup::new("machine")?;
    let id = cgroup.id()?;
    let path = folder.to_str().context("a path")?;
    let mut load = Load::start(&cgroup, "spin 600000")?;
    let ledger = open(&folder, PLACES)?;
    ledger.add(id)?;
    drop(ledger);
    let control = Control::of(id, &[])?;
    load.go()?;
    let mut half_done = 0;
    for kill in 0..32u64 {
        let mut agent = Load::start(&own, &format!("visit {path} {PLACES}"))?;
        agent.go()?;
        agent.expect("open")?;
        thread::sleep(Duration::from_micros(1000 + 137 * kill));
        agent.kill()?;
        let ledger = open(&folder, PLACES)?;
        for subject in ledger.subjects() {
            if subject != id {
                half_done += 1;
                ensure!(ledger.remove(subject)? == Usage::default());
            }
        }
        ensure!(ledger.subjects() == [id]);
        // Each place is there, and once.
        let others = (0..PLACES - 1).map(|which| CgroupId::from(VISITORS + which));
        for other in others.clone() {
            ledger.add(other)?;
        }
        let full = ledger.add(CgroupId::from(VISITORS + PLACES));
        ensure!(matches!(full, Err(LedgerError::Full { .. })));
        for other in others {
            ensure!(ledger.remove(other)? == Usage::default());
        }
    }
    println!("{half_done} subjects were there still");
    load.stop()?;
    control.compare(&open(&folder, PLACES)?, id)?;
    load.kill()
}

#[test]
fn a_place_passes_on_nothing_to_another_process() -> Result<()> {
    let (_bpffs, folder) = folder()?;
    let (left, stays, new) = (Cgroup::new("left")?, Cgroup::new("stays")?, Cgroup::new("new")?);
    let mut busy = Load::start(&left, "spin 600000")?;
    let mut big = Load::start(&left, "anonymous 100")?;
    let mut load = Load::start(&stays, "mixed 3000")?;
    let ledger = open(&folder, 2)?;
    ledger.add(left.id()?)?;
    ledger.add(stays.id()?)?;
    let control = Control::of(stays.id()?, &[])?;
    busy.go()?;
    big.go()?;
    big.expect("touched")?;
    load.go()?;
    drop(ledger);
    for _ in 0..20 {
        let ledger = open(&folder, 2)?;
        ensure!(matches!(ledger.add(new.id()?), Err(LedgerError::Full { subjects: 2 })));
        ledger.remove(left.id()?)?;
        drop(ledger);
        let ledger = open(&folder, 2)?;
        ensure!(ledger.subjects() == [stays.id()?]);
        ledger.add(new.id()?)?;
        drop(ledger);
        let ledger = open(&folder, 2)?;
        ensure!(ledger.remove(new.id()?)? == Usage::default());
        ledger.add(left.id()?)?;
    }
    let ledger = open(&folder, 2)?;
    ledger.remove(left.id()?)?;
    ledger.add(new.id()?)?;
    drop(ledger);
    big.go()?;
    big.done()?;
    load.done()?;
    let ledger = open(&folder, 2)?;
    ensure!(
        ledger.read_one(new.id()?)? == Usage::default(),
        "the old owner's at the new one's cost"
    );
    control.compare(&ledger, stays.id()?)?;
    busy.kill()?;
    big.finish()?;
    load.finish()
}

#[test]
fn what_is_not_pinned_goes_with_the_ledger() -> Result<()> {
    let (_bpffs, folder) = folder()?;
    let ledger = Ledger::load(Limits::GUEST)?;
    let ids = programs(&ledger)?;
    ensure!(loaded(&ids)? == ids);
    drop(ledger);
    gone(&ids)?;

    let ledger = open(&folder, 8)?;
    let ids = programs(&ledger)?;
    let version = folder.join(names(&folder)?.first().context("a version")?);
    let visitor = CgroupId::from(VISITORS);
    ledger.add(visitor)?;
    // Who removes the pins does not end the count of one who has it open.
    fs::remove_dir_all(version)?;
    ensure!(ledger.remove(visitor)? == Usage::default());
    ensure!(loaded(&ids)? == ids);
    drop(ledger);
    gone(&ids)?;

    let ledger = open(&folder, 8)?;
    let ids = programs(&ledger)?;
    ledger.unpin()?;
    ensure!(!folder.exists());
    ensure!(loaded(&ids)? == ids);
    drop(ledger);
    gone(&ids)?;
    Ok(())
}

#[test]
fn the_folder_is_private_and_what_else_is_in_it_stays() -> Result<()> {
    let (_bpffs, folder) = folder()?;
    fs::create_dir_all(folder.join("others"))?;
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777))?;
    let ledger = open(&folder, 8)?;
    ensure!(fs::metadata(&folder)?.permissions().mode() & 0o7777 == 0o700);
    ensure!(matches!(open(&folder, 9), Err(LoadError::Pins(PinsError::InUse(_)))));
    drop(ledger);
    open(&folder, 9)?.unpin()?;
    ensure!(names(&folder)? == ["others"]);
    Ok(())
}

#[test]
fn says_why_a_folder_can_not_be_used() -> Result<()> {
    let (bpffs, folder) = folder()?;
    for elsewhere in ["/tmp/stoker-pins", "/sys/kernel/stoker-pins"] {
        let error = open(elsewhere, 8).err().context("an error")?;
        ensure!(matches!(error, LoadError::Pins(PinsError::NoBpffs(_))), "{error:?}");
        ensure!(error.to_string().contains("mount -t bpf"), "{error}");
        ensure!(!fs::exists(elsewhere)?);
    }
    drop(open(&folder, 8)?);
    let link = bpffs.path().join("link");
    symlink(&folder, &link)?;
    ensure!(matches!(open(&link, 8), Err(LoadError::Pins(PinsError::Foreign(_)))));

    let cgroup = Cgroup::new("refused")?;
    let path = bpffs.path().join("roots");
    drop(open(&path, 8)?);
    let path = path.to_str().context("a path")?;
    let mut load = Load::start(&cgroup, &format!("without-rights {path}"))?;
    load.go()?;
    load.done()?;
    load.finish()?;

    chown(path, Some(65534), None)?;
    ensure!(matches!(open(path, 8), Err(LoadError::Pins(PinsError::Foreign(_)))));

    bpffs.make_read_only()?;
    let path = bpffs.path().join("new");
    ensure!(matches!(open(path, 8), Err(LoadError::Pins(PinsError::Failed { .. }))));
    Ok(())
}
