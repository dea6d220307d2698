//! Memory that is plugged and unplugged, and a balloon, with real kernels.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use stoker_vmm::config::{MachineConfig, ScratchConfig};
use stoker_vmm::control::Client;
use stoker_vmm::exit_report::Reason;

use super::payload_machine;
use super::resizes::{may_have_memory, until_memory_is_taken};
use crate::guest::{MEMORY_PLUGGED, MEMORY_USED};
use crate::machine::{Kernel, Kernels, Machine, PATIENCE};

/// What machines start with, and may have, in MiB.
const MEMORY_MIB: u32 = 256;
const MAX_MEMORY_MIB: u32 = 1024;
/// Between two looks at what the VMM has.
const PAUSE: Duration = Duration::from_millis(10);

fn config(kernels: &Kernels, kernel: Kernel, task: &str) -> MachineConfig {
    let mut config = kernels.config(kernel, "vmlinux", 2, task);
    config.memory_mib = MEMORY_MIB;
    may_have_memory(&mut config, MAX_MEMORY_MIB);
    config
}

/// Has the machine resized, waits until it is, and says how long that took.
fn resize(machine: &Machine, control: &mut Client, mib: u32) {
    control.resize(None, Some(mib)).unwrap();
    let took = until_memory_is_taken(machine, control);
    println!("  {mib} MiB taken: {took:.2?}");
}

fn balloon(machine: &Machine, control: &mut Client, mib: u32) {
    control.set_balloon(mib).unwrap();
    let took = machine.until(control, "in the balloon", |status| {
        let balloon = status.balloon.unwrap();
        [balloon.asked_mib, balloon.taken_mib, balloon.told_mib] == [mib; 3]
    });
    println!("  {mib} MiB in the balloon: {took:.2?}");
}

/// What the VMM has of the host's memory, the guest's part with it, in MiB.
fn resident_mib(machine: &Machine) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", machine.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() >> 10
}

/// How much memory the guest has said last that it has, in MiB.
fn told_mib(machine: &Machine) -> u64 {
    let console = machine.console();
    let mut told = console.lines().rev().filter_map(|line| {
        let mib = line.strip_prefix("memory is ")?.strip_suffix(" MiB")?;
        mib.parse().ok()
    });
    told.next().unwrap_or(0)
}

pub(super) fn comes_and_goes_under_the_tuned_kernel(kernels: &Kernels) {
    comes_and_goes(kernels, Kernel::Tuned);
}

pub(super) fn comes_and_goes_under_the_stock_kernel(kernels: &Kernels) {
    comes_and_goes(kernels, Kernel::Stock);
}

fn comes_and_goes(kernels: &Kernels, kernel: Kernel) {
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let mut config = config(kernels, kernel, "memory");
    config.scratch = Some(ScratchConfig {
        folder: folder.path().to_owned(),
        size_mib: 1,
    });
    let mut machine = Machine::start(config);
    machine.wait_for("memory is ");
    let mut control = machine.control();
    machine.until(&mut control, "told of", |status| {
        status.balloon.unwrap().statistics.is_some()
    });
    let statistics = control.query().unwrap().balloon.unwrap().statistics.unwrap();
    let total = statistics.total_bytes.unwrap() >> 20;
    assert!(
        (u64::from(MEMORY_MIB) / 2..=u64::from(MEMORY_MIB)).contains(&total),
        "{statistics:?}"
    );
    assert!(statistics.available_bytes.unwrap() < statistics.total_bytes.unwrap());

    // More is there, and can be used; what is freed goes back by itself.
    let before = resident_mib(&machine);
    resize(&machine, &mut control, MEMORY_MIB + MEMORY_PLUGGED as u32);
    machine.until(&mut control, "told", |_| told_mib(&machine) >= total + MEMORY_PLUGGED);
    let pages = MEMORY_USED << 8;
    machine.wait_for(&format!("memory is used {pages}."));
    let used = resident_mib(&machine);
    assert!(used >= before + MEMORY_USED * 3 / 4, "{before} MiB, then {used} MiB");
    control.grow_scratch(2).unwrap();
    machine.wait_for("memory is freed");
    let freed = Instant::now();
    while resident_mib(&machine) + MEMORY_USED * 3 / 4 > used {
        assert!(
            freed.elapsed() < PATIENCE,
            "{used} MiB, now {} MiB",
            resident_mib(&machine)
        );
        thread::sleep(PAUSE);
    }
    println!(
        "  {MEMORY_USED} MiB reported free: {:.3} s",
        freed.elapsed().as_secs_f64()
    );

    resize(&machine, &mut control, MAX_MEMORY_MIB);
    resize(&machine, &mut control, MEMORY_MIB);
    resize(&machine, &mut control, 514);
    resize(&machine, &mut control, MEMORY_MIB);
    machine.until(&mut control, "told", |_| told_mib(&machine) <= MEMORY_MIB.into());
    assert!(
        resident_mib(&machine) < u64::from(MEMORY_MIB) + 32,
        "{} MiB",
        resident_mib(&machine)
    );
    balloon(&machine, &mut control, 64);
    balloon(&machine, &mut control, 0);
    control.stop().unwrap();
    assert_eq!(machine.end().reason, Reason::Stopped);
}

pub(super) fn a_guest_that_writes_where_nothing_is_plugged_ends(kernels: &Kernels) {
    // mov dword [0xbff8], 0x83; mov dword [0xbffc], 1: the last 2 MiB of the first GiB are those at 4 GiB.
    let mut code = vec![0xc7, 0x04, 0x25, 0xf8, 0xbf, 0, 0, 0x83, 0, 0, 0];
    code.extend([0xc7, 0x04, 0x25, 0xfc, 0xbf, 0, 0, 1, 0, 0, 0]);
    // mov eax, [0x3fe00000], which can be read; mov [0x3fe00000], eax; hlt
    code.extend([0x8b, 0x04, 0x25, 0, 0, 0xe0, 0x3f]);
    code.extend([0x89, 0x04, 0x25, 0, 0, 0xe0, 0x3f, 0xf4]);
    let (_file, machine) = payload_machine(kernels, &code, |config| config.max_memory_mib = Some(MAX_MEMORY_MIB));
    let report = machine.end();
    assert_eq!(report.reason, Reason::Error, "{report:?}");
    assert!(report.detail.contains("memory that is not plugged"), "{report:?}");
}
