//! vCPUs that are plugged and unplugged.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use stoker_proto::vmm::Status;
use stoker_proto::vmm::status::State;
use stoker_vmm::control::Client;
use stoker_vmm::exit_report::Reason;

use crate::machine::{Kernel, Kernels, Machine, PATIENCE};

const POLL: Duration = Duration::from_millis(2);
/// More than a kernel's data of one CPU takes (`.data..percpu`, 190 and 230 KiB here, and what is allocated beside it).
const CPU_KIB: u64 = 512;
/// What is touched differs by so much from boot to boot: some huge pages.
const SPREAD_KIB: u64 = 16 << 10;
/// Resizes of a machine under load.
const STEPS: usize = 200;

fn start(kernels: &Kernels, kernel: Kernel, vcpus: u32, max_vcpus: u32, task: &str) -> Machine {
    let mut config = kernels.config(kernel, "vmlinux", vcpus, task);
    config.max_vcpus = Some(max_vcpus);
    Machine::start(config)
}

fn until(machine: &Machine, control: &mut Client, what: &str, is: impl Fn(&Status) -> bool) -> Duration {
    let start = Instant::now();
    loop {
        let status = control.query().unwrap();
        if is(&status) {
            return start.elapsed();
        }
        assert!(
            start.elapsed() < PATIENCE,
            "not {what}: {status:?}; the console: {}",
            machine.console()
        );
        thread::sleep(POLL);
    }
}

/// Waits until the guest has taken as many vCPUs as were asked for, and given back all others.
fn until_taken(machine: &Machine, control: &mut Client) -> Duration {
    until(machine, control, "taken", |status| {
        let amounts = status.amounts.clone().unwrap();
        (amounts.vcpus_taken, status.vcpus) == (amounts.vcpus_asked, amounts.vcpus_asked)
    })
}

/// Names of the threads of vCPUs.
fn vcpu_threads(machine: &Machine) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{}/task", machine.pid())).unwrap();
    let names = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok());
    let mut names: Vec<_> = names
        .map(|name| name.trim().to_owned())
        .filter(|name| name.starts_with("vcpu"))
        .collect();
    names.sort_unstable();
    names
}

pub(super) fn vcpus_are_plugged_and_unplugged_under_the_tuned_kernel(kernels: &Kernels) {
    vcpus_are_plugged_and_unplugged(kernels, Kernel::Tuned);
}

pub(super) fn vcpus_are_plugged_and_unplugged_under_the_stock_kernel(kernels: &Kernels) {
    vcpus_are_plugged_and_unplugged(kernels, Kernel::Stock);
}

fn vcpus_are_plugged_and_unplugged(kernels: &Kernels, kernel: Kernel) {
    let mut machine = start(kernels, kernel, 1, 8, "cpus");
    machine.wait_for("cpus possible 0-7");
    assert!(machine.console().contains("guest: cpus 0 "), "{}", machine.console());
    assert_eq!(vcpu_threads(&machine), ["vcpu0"], "the others cost no thread");
    let mut control = machine.control();
    for (vcpus, memory_mib) in [(Some(0), None), (Some(9), None), (Some(2), Some(512)), (None, None)] {
        control.resize(vcpus, memory_mib).unwrap_err();
    }
    let amounts = control.query().unwrap().amounts.unwrap();
    assert_eq!((amounts.vcpus_asked, amounts.vcpus_taken), (1, 1));

    for (vcpus, online) in [(2, "0-1"), (8, "0-7"), (3, "0-2"), (1, "0"), (5, "0-4")] {
        let status = control.resize(Some(vcpus), None).unwrap();
        assert_eq!(status.amounts.unwrap().vcpus_asked, vcpus);
        let took = until_taken(&machine, &mut control);
        println!("  {kernel:?}: {vcpus} vCPUs after {took:.2?}");
        machine.wait_for(&format!("cpus online {online}."));
        let status = control.query().unwrap();
        assert_eq!(status.amounts.unwrap().vcpus_refused, "");
        let threads: Vec<_> = (0..vcpus).map(|number| format!("vcpu{number}")).collect();
        // The last instructions of those that were given back may be still to come.
        until(&machine, &mut control, "ended", |_| vcpu_threads(&machine) == threads);
    }
    // One that stands still hears of it when it runs again.
    assert_eq!(control.pause().unwrap().state(), State::Paused);
    let status = control.resize(Some(6), None).unwrap();
    assert_eq!((status.vcpus, status.amounts.unwrap().vcpus_taken), (6, 5));
    assert_eq!(control.pause().unwrap().state(), State::Paused);
    assert_eq!(control.resume().unwrap().state(), State::Running);
    until_taken(&machine, &mut control);
    machine.wait_for("cpus online 0-5.");
    for _ in 0..10 {
        assert_eq!(control.pause().unwrap().state(), State::Paused);
        assert_eq!(control.resume().unwrap().state(), State::Running);
    }
    control.stop().unwrap();
    let report = machine.end();
    assert_eq!(report.reason, Reason::Stopped, "{report:?}");

    // Without a ceiling it has what it has.
    let machine = Machine::start(kernels.config(kernel, "vmlinux", 2, "tick"));
    let mut control = machine.control();
    let refused = control.resize(Some(1), None).unwrap_err().to_string();
    assert!(refused.contains("`max_vcpus`"), "{refused}");
    assert_eq!(control.resize(Some(2), Some(256)).unwrap().vcpus, 2);
    control.stop().unwrap();
    machine.end();
}

pub(super) fn vcpus_that_come_while_the_kernel_boots_are_used(kernels: &Kernels) {
    for kernel in [Kernel::Tuned, Kernel::Stock] {
        let mut machine = start(kernels, kernel, 1, 4, "cpus");
        let mut control = machine.control();
        // Before its kernel has found any device; and up to when it has, again and again.
        let mut vcpus = 4;
        while !machine.console().contains("cpus possible") {
            control.resize(Some(vcpus), None).unwrap();
            vcpus = 7 - vcpus;
            thread::sleep(Duration::from_millis(50));
        }
        control.resize(Some(4), None).unwrap();
        until_taken(&machine, &mut control);
        control.resize(Some(1), None).unwrap();
        until_taken(&machine, &mut control);
        machine.wait_for("cpus online 0.");
        control.stop().unwrap();
        assert_eq!(machine.end().reason, Reason::Stopped);
    }
}

pub(super) fn many_resizes_under_load_end_where_they_should(kernels: &Kernels) {
    for kernel in [Kernel::Tuned, Kernel::Stock] {
        let mut machine = start(kernels, kernel, 2, 8, "busy-cpus");
        machine.wait_for("cpus possible 0-7");
        let mut control = machine.control();
        // xorshift: the same steps each time.
        let mut random = 0x2545_f491_u32;
        let mut took = Vec::new();
        for step in 0..STEPS {
            random ^= random << 13;
            random ^= random >> 17;
            random ^= random << 5;
            control.resize(Some(1 + random % 8), None).unwrap();
            // Most of them are overtaken by the next.
            if step % 4 == 0 {
                took.push(until_taken(&machine, &mut control));
            }
        }
        until_taken(&machine, &mut control);
        took.sort_unstable();
        println!(
            "  {kernel:?}: {STEPS} resizes under load, median {:.2?}, longest {:.2?}",
            took[took.len() / 2],
            took[took.len() - 1]
        );
        let said = machine.console();
        for trouble in ["BUG:", "WARNING:", "Oops"] {
            assert!(!said.contains(trouble), "{trouble}: {said}");
        }
        control.stop().unwrap();
        let report = machine.end();
        assert_eq!(report.reason, Reason::Stopped, "{report:?}");
    }
}

/// Tells what a ceiling takes, in time and memory; fails where that is more than the kernel's own data of each CPU explains.
pub(super) fn a_ceiling_costs_little_at_boot(kernels: &Kernels) {
    for kernel in [Kernel::Tuned, Kernel::Stock] {
        let mut without = None;
        for ceiling in [None, Some(8), Some(64)] {
            let mut config = kernels.config(kernel, "vmlinux", 1, "cpus");
            config.max_vcpus = ceiling;
            let begin = Instant::now();
            let mut machine = Machine::start(config);
            machine.wait_for("cpus possible");
            let ready = begin.elapsed();
            let status = fs::read_to_string(format!("/proc/{}/status", machine.pid())).unwrap();
            let rss = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
            let rss: u64 = rss.split_whitespace().nth(1).unwrap().parse().unwrap();
            println!(
                "  {kernel:?}, ceiling {ceiling:?}: user space after {ready:.2?}, {} MiB",
                rss >> 10
            );
            assert_eq!(vcpu_threads(&machine), ["vcpu0"]);
            let more = rss.saturating_sub(*without.get_or_insert(rss));
            assert!(
                more <= u64::from(ceiling.unwrap_or(0)) * CPU_KIB + SPREAD_KIB,
                "{more} KiB more"
            );
            machine.control().stop().unwrap();
            machine.end();
        }
    }
}
