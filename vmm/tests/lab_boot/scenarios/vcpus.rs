//! vCPUs that are plugged and unplugged.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use stoker_proto::vmm::status::State;
use stoker_vmm::exit_report::Reason;

use super::resizes::until_vcpus_are_taken;
use crate::machine::{Kernel, Kernels, Machine};

/// More than a kernel takes for one CPU that may come (`.data..percpu`, 190 and 230 KiB here, and what is allocated beside it).
const CPU_KIB: u64 = 1024;
/// What is free differs by so much from boot to boot.
const SPREAD_KIB: u64 = 1 << 10;

fn start(kernels: &Kernels, kernel: Kernel, vcpus: u32, max_vcpus: u32, task: &str) -> Machine {
    let mut config = kernels.config(kernel, "vmlinux", vcpus, task);
    config.max_vcpus = Some(max_vcpus);
    Machine::start(config)
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
    machine.wait_for("cpus possible 0-7,");
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
        let took = until_vcpus_are_taken(&machine, &mut control);
        println!("  {kernel:?}: {vcpus} vCPUs after {took:.2?}");
        machine.wait_for(&format!("cpus online {online}."));
        let status = control.query().unwrap();
        assert_eq!(status.amounts.unwrap().vcpus_refused, "");
        let threads: Vec<_> = (0..vcpus).map(|number| format!("vcpu{number}")).collect();
        // The last instructions of those that were given back may be still to come.
        machine.until(&mut control, "ended", |_| vcpu_threads(&machine) == threads);
    }
    // One that stands still hears of it when it runs again.
    assert_eq!(control.pause().unwrap().state(), State::Paused);
    let status = control.resize(Some(6), None).unwrap();
    assert_eq!((status.vcpus, status.amounts.unwrap().vcpus_taken), (6, 5));
    assert_eq!(control.pause().unwrap().state(), State::Paused);
    assert_eq!(control.resume().unwrap().state(), State::Running);
    until_vcpus_are_taken(&machine, &mut control);
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
            let resized = control.resize(Some(vcpus), None);
            resized.unwrap_or_else(|error| panic!("{error}: {}\n{}", machine.stdout(), machine.console()));
            vcpus = 7 - vcpus;
            thread::sleep(Duration::from_millis(50));
        }
        control.resize(Some(4), None).unwrap();
        until_vcpus_are_taken(&machine, &mut control);
        control.resize(Some(1), None).unwrap();
        until_vcpus_are_taken(&machine, &mut control);
        machine.wait_for("cpus online 0.");
        control.stop().unwrap();
        assert_eq!(machine.end().reason, Reason::Stopped);
    }
}

/// Tells what a ceiling takes, in time and memory; fails where that is more than the kernel's own data of each CPU explains.
pub(super) fn a_ceiling_costs_little_at_boot(kernels: &Kernels) {
    for kernel in [Kernel::Tuned, Kernel::Stock] {
        let mut without = None;
        for (max_vcpus, max_memory_mib) in [(None, None), (None, Some(1024)), (Some(8), None), (Some(64), None)] {
            let mut config = kernels.config(kernel, "vmlinux", 1, "cpus");
            (config.max_vcpus, config.max_memory_mib) = (max_vcpus, max_memory_mib);
            let begin = Instant::now();
            let mut machine = Machine::start(config);
            machine.wait_for("of memory free");
            let ready = begin.elapsed();
            let console = machine.console();
            let free = console
                .split_once("cpus possible ")
                .and_then(|(_, rest)| rest.split(' ').nth(1));
            let free: u64 = free.unwrap().parse().unwrap();
            let rss = fs::read_to_string(format!("/proc/{}/status", machine.pid())).unwrap();
            let rss = rss.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
            println!(
                "  {kernel:?}, up to {max_vcpus:?} vCPUs and {max_memory_mib:?} MiB: user space after {ready:.2?}, {free} KiB free, \
                 {} of the host's",
                rss.trim()
            );
            assert_eq!(vcpu_threads(&machine), ["vcpu0"]);
            let more = without.get_or_insert(free).saturating_sub(free);
            assert!(
                more <= u64::from(max_vcpus.unwrap_or(0)) * CPU_KIB + SPREAD_KIB,
                "{more} KiB more"
            );
            machine.control().stop().unwrap();
            machine.end();
        }
    }
}
