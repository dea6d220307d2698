//! vCPUs and memory that come and go together, at random, while the guest has much to do.

use std::time::{Duration, Instant};

use stoker_proto::vmm::{Amounts, Status};
use stoker_vmm::config::MachineConfig;
use stoker_vmm::control::Client;
use stoker_vmm::exit_report::Reason;

use crate::machine::{Kernel, Kernels, Machine};

/// How often the machine is resized, where the variable of this name says nothing else. 200 take ten minutes of a busy lab.
const STEPS: (&str, usize) = ("STOKER_RESIZES", 20);
/// Of so many steps the vCPUs of one are waited for, and the memory; the next one overtakes the others. Memory takes a guest that is busy on
/// one vCPU of a busy lab a minute.
const VCPUS_WAITED_FOR: usize = 8;
const MEMORY_WAITED_FOR: usize = 20;
/// What the machine starts with, and what it may have.
const MEMORY_MIB: u32 = 256;
const MAX_MEMORY_MIB: u32 = 1024;
const MAX_VCPUS: u32 = 8;
/// How long a guest may take to plug or unplug memory before it is asked again, as an agent does, each time twice as long: Linux, where
/// memory was in use, tries again by itself after 50 s. Whoever asks makes it drop what it is at and begin anew (`config_changed` in
/// `drivers/virtio/virtio_mem.c`): asked more often than a busy guest needs to free the first of its blocks, it never comes to the others.
const ASK_AGAIN: Duration = Duration::from_secs(2);
const ASK_AGAIN_AT_LAST: Duration = Duration::from_secs(60);

/// Lets a machine have up to so much memory, and a balloon.
pub(super) fn may_have_memory(config: &mut MachineConfig, max_memory_mib: u32) {
    config.max_memory_mib = Some(max_memory_mib);
    config.balloon = true;
    config.cmdline = format!("memhp_default_state=online_movable {}", config.cmdline);
}

fn amounts(status: &Status) -> &Amounts {
    status.amounts.as_ref().unwrap()
}

/// Waits until the guest has taken as many vCPUs as were asked for, and given back all others.
pub(super) fn until_vcpus_are_taken(machine: &Machine, control: &mut Client) -> Duration {
    machine.until(control, "taken", |status| {
        let amounts = amounts(status);
        [amounts.vcpus_taken, status.vcpus] == [amounts.vcpus_asked; 2]
    })
}

/// Waits until the guest has just as much memory as was asked for.
pub(super) fn until_memory_is_taken(machine: &Machine, control: &mut Client) -> Duration {
    let mut other = machine.control();
    let (mut since, mut patience, mut had) = (Instant::now(), ASK_AGAIN, None);
    machine.until(control, "taken", |status| {
        let amounts = amounts(status);
        let is_taken = amounts.memory_taken_mib == amounts.memory_asked_mib;
        // One that gets on is left alone.
        if had.replace(amounts.memory_taken_mib) != Some(amounts.memory_taken_mib) {
            since = Instant::now();
        }
        if !is_taken && since.elapsed() > patience {
            other.resize(None, Some(amounts.memory_asked_mib)).unwrap();
            (since, patience) = (Instant::now(), (patience * 2).min(ASK_AGAIN_AT_LAST));
        }
        is_taken
    })
}

pub(super) fn at_random_under_the_tuned_kernel(kernels: &Kernels) {
    at_random(kernels, Kernel::Tuned);
}

pub(super) fn at_random_under_the_stock_kernel(kernels: &Kernels) {
    at_random(kernels, Kernel::Stock);
}

fn at_random(kernels: &Kernels, kernel: Kernel) {
    let mut config = kernels.config(kernel, "vmlinux", 2, "busy");
    config.max_vcpus = Some(MAX_VCPUS);
    config.memory_mib = MEMORY_MIB;
    may_have_memory(&mut config, MAX_MEMORY_MIB);
    let mut machine = Machine::start(config);
    machine.wait_for("cpus possible 0-7,");
    let mut control = machine.control();
    // xorshift: the same steps each time.
    let mut random = 0x2545_f491_u32;
    let mut next = |below: u32| {
        random ^= random << 13;
        random ^= random >> 17;
        random ^= random << 5;
        random % below
    };
    let (mut of_vcpus, mut of_memory) = (Vec::new(), Vec::new());
    let steps = std::env::var(STEPS.0).map_or(STEPS.1, |steps| steps.parse().unwrap());
    for step in 0..steps {
        let vcpus = 1 + next(MAX_VCPUS);
        let memory_mib = MEMORY_MIB + 2 * next((MAX_MEMORY_MIB - MEMORY_MIB) / 2 + 1);
        let (vcpus, memory_mib) = match next(3) {
            0 => (Some(vcpus), None),
            1 => (None, Some(memory_mib)),
            _ => (Some(vcpus), Some(memory_mib)),
        };
        control.resize(vcpus, memory_mib).unwrap();
        if step % VCPUS_WAITED_FOR == 0 {
            of_vcpus.push(until_vcpus_are_taken(&machine, &mut control));
        }
        if step % MEMORY_WAITED_FOR == 0 {
            of_memory.push(until_memory_is_taken(&machine, &mut control));
        }
    }
    for (vcpus, memory_mib) in [(1, MEMORY_MIB), (MAX_VCPUS, MAX_MEMORY_MIB)] {
        control.resize(Some(vcpus), Some(memory_mib)).unwrap();
        until_vcpus_are_taken(&machine, &mut control);
        until_memory_is_taken(&machine, &mut control);
    }
    machine.wait_for("cpus online 0-7.");
    for (what, mut took) in [("vCPUs", of_vcpus), ("memory", of_memory)] {
        took.sort_unstable();
        let (median, longest) = (took[took.len() / 2], took[took.len() - 1]);
        println!("  {kernel:?}, {steps} resizes under load: {what} taken after {median:.2?}, at most {longest:.2?}");
    }
    let said = machine.console();
    for trouble in ["BUG:", "WARNING:", "Oops", "FAILED"] {
        assert!(!said.contains(trouble), "{trouble}: {said}");
    }
    control.stop().unwrap();
    let report = machine.end();
    assert_eq!(report.reason, Reason::Stopped, "{report:?}");
}
