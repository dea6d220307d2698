//! Memory that is plugged and unplugged, and a balloon, with real kernels.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use stoker_proto::vmm::{Balloon, Status};
use stoker_vmm::config::{MachineConfig, ScratchConfig};
use stoker_vmm::control::Client;
use stoker_vmm::exit_report::Reason;

use super::payload_machine;
use crate::guest::MEMORY_USED;
use crate::machine::{Kernel, Kernels, Machine, PATIENCE};

/// What machines start with, and may have, in MiB.
const MEMORY_MIB: u32 = 256;
const MAX_MEMORY_MIB: u32 = 1024;
/// Between two questions; each has the guest tell its statistics anew.
const PAUSE: Duration = Duration::from_millis(10);
/// How long a guest may take before it is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(2);
/// Random steps; each takes a busy lab seconds.
const STEPS: u32 = 20;

fn config(kernels: &Kernels, kernel: Kernel, task: &str) -> MachineConfig {
    let mut config = kernels.config(kernel, "vmlinux", 2, task);
    config.memory_mib = MEMORY_MIB;
    config.max_memory_mib = Some(MAX_MEMORY_MIB);
    config.balloon = true;
    config.cmdline = format!("memhp_default_state=online_movable {}", config.cmdline);
    config
}

/// Asks how the machine is until it is so, and says how long that took.
fn wait_until(control: &mut Client, what: &str, is_so: impl Fn(&Status) -> bool) -> Status {
    let start = Instant::now();
    loop {
        let status = control.query().unwrap();
        if is_so(&status) {
            println!("  {what}: {:.3} s", start.elapsed().as_secs_f64());
            return status;
        }
        assert!(start.elapsed() < PATIENCE, "{what}: {status:?}");
        thread::sleep(PAUSE);
    }
}

/// Has the machine resized, and waits until it is. It is asked again now and then, as an agent does: Linux, where memory was in use, tries
/// again by itself after 50 s.
fn resize(control: &mut Client, mib: u32) {
    let start = Instant::now();
    let mut asked: Option<Instant> = None;
    loop {
        let is_due = asked.is_none_or(|asked| asked.elapsed() > ASK_AGAIN);
        let status = if is_due {
            asked = Some(Instant::now());
            control.resize(None, Some(mib)).unwrap()
        } else {
            control.query().unwrap()
        };
        let amounts = status.amounts.as_ref().unwrap();
        assert_eq!(amounts.memory_asked_mib, mib);
        if amounts.memory_taken_mib == mib {
            break;
        }
        assert!(start.elapsed() < PATIENCE, "{mib} MiB: {status:?}");
        thread::sleep(PAUSE);
    }
    println!("  {mib} MiB taken: {:.3} s", start.elapsed().as_secs_f64());
}

fn balloon(control: &mut Client, mib: u32) {
    control.set_balloon(mib).unwrap();
    wait_until(control, &format!("{mib} MiB in the balloon"), |status| {
        let Balloon {
            asked_mib,
            taken_mib,
            told_mib,
            ..
        } = status.balloon.unwrap();
        (asked_mib, taken_mib, told_mib) == (mib, mib, mib)
    });
}

/// What the VMM has of the host's memory, the guest's part with it, in MiB.
fn resident_mib(machine: &Machine) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", machine.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() >> 10
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
    let status = wait_until(&mut control, "statistics", |status| {
        status.balloon.unwrap().statistics.is_some()
    });
    let statistics = status.balloon.unwrap().statistics.unwrap();
    let total = statistics.total_bytes.unwrap() >> 20;
    assert!(
        (u64::from(MEMORY_MIB) / 2..=u64::from(MEMORY_MIB)).contains(&total),
        "{statistics:?}"
    );
    assert!(statistics.available_bytes.unwrap() < statistics.total_bytes.unwrap());

    // More is there, and can be used; what is freed goes back by itself.
    let before = resident_mib(&machine);
    resize(&mut control, 512);
    machine.wait_for(&format!("memory is {} MiB", total + 256));
    machine.wait_for("memory is used ");
    let pages = MEMORY_USED << 8;
    machine.wait_for(&format!("memory is used {pages}"));
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

    resize(&mut control, MAX_MEMORY_MIB);
    resize(&mut control, MEMORY_MIB);
    resize(&mut control, 514);
    resize(&mut control, MEMORY_MIB);
    machine.wait_for(&format!("memory is {total} MiB"));
    assert!(
        resident_mib(&machine) < u64::from(MEMORY_MIB) + 32,
        "{} MiB",
        resident_mib(&machine)
    );
    balloon(&mut control, 64);
    balloon(&mut control, 0);
    control.stop().unwrap();
    assert_eq!(machine.end().reason, Reason::Stopped);
}

pub(super) fn is_resized_at_random_under_load(kernels: &Kernels) {
    for kernel in [Kernel::Tuned, Kernel::Stock] {
        let mut machine = Machine::start(config(kernels, kernel, "churn"));
        machine.wait_for("churning");
        let mut control = machine.control();
        // Numerical Recipes' generator: the same steps each time.
        let mut random = 13u32;
        for _ in 0..STEPS {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let blocks = (MAX_MEMORY_MIB - MEMORY_MIB) / 2;
            let mib = MEMORY_MIB + (random >> 8) % (blocks + 1) * 2;
            control.resize(None, Some(mib)).unwrap();
            // Every other step is on its way when the next one comes.
            if random & 0x80 != 0 {
                resize(&mut control, mib);
            }
        }
        resize(&mut control, MEMORY_MIB);
        resize(&mut control, MAX_MEMORY_MIB);
        assert!(!machine.console().contains("FAILED"), "{}", machine.console());
        control.stop().unwrap();
        let report = machine.end();
        assert_eq!(report.reason, Reason::Stopped, "{report:?}");
    }
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
