//! vCPUs and memory that machines are plugged and give back: by our VMM and by QEMU's, in turn.
//!
//! Each machine is booted with one vCPU and 512 MiB. Then, in this order: a GiB is plugged, which the guest fills as soon as it is there;
//! vCPUs are plugged, one after the other; with the last one the guest frees that GiB; and all is taken back. The guest tells by its
//! console, and when that was is taken as the line arrives.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context as _;
use serde_json::json;
use stoker_testkit::guest::initramfs;
use stoker_tests::cache;

use super::guest;
use super::vmms::{Boot, Way, until};

/// The most vCPUs of a machine.
pub(super) const VCPUS: u32 = 4;
/// What it boots with.
pub(super) const MEMORY_MIB: u32 = 512;
/// What is plugged, in bytes.
pub(super) const GIB: u64 = 1 << 30;

/// What of a GiB that the guest has freed must be back at the host: the kernel keeps some pages at hand (`pcp` lists), and reports
/// whole free blocks alone.
const BACK: u64 = GIB / 100 * 95;

/// The part of what the agent's machines are given that suits both: QEMU's machine needs what the rest leaves out.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 reboot=t memhp_default_state=online_movable";

/// The kernels, each with what it has as modules, and by which ways it can be resized: ours has no PCI drivers, so of QEMU's it knows what
/// is told by ACPI alone.
const KERNELS: [Kernel; 2] = [
    Kernel {
        name: "stock",
        modules: &[
            "drivers/virtio/virtio_mmio",
            "drivers/virtio/virtio_mem",
            "drivers/virtio/virtio_balloon",
        ],
        ways: &[Way::Ours, Way::VirtioMem, Way::Dimm],
    },
    Kernel {
        name: "tuned",
        modules: &[],
        ways: &[Way::Ours, Way::Dimm],
    },
];

struct Kernel {
    name: &'static str,
    modules: &'static [&'static str],
    ways: &'static [Way],
}

/// Measures so often with each kernel, and prints a line of JSON a machine.
pub(super) fn measure(runs: u32, qemu: &Path) -> anyhow::Result<()> {
    let folder = tempfile::tempdir().context("make a folder")?;
    for kernel in KERNELS {
        let module = |name: &&str| cache(&format!("kernel/stock/modules/kernel/{name}.ko.xz"));
        let modules: Vec<PathBuf> = kernel.modules.iter().map(module).collect::<Result<_, _>>()?;
        let boot = Boot {
            kernel: cache(&format!("kernel/{}/vmlinux", kernel.name))?,
            initramfs: folder.path().join(kernel.name),
            command_line: COMMAND_LINE.to_owned(),
        };
        std::fs::write(&boot.initramfs, initramfs(&modules)?).context("write an initramfs")?;
        for run in 1..=runs {
            for way in kernel.ways {
                eprintln!("{} kernel, run {run} of {runs}: {}", kernel.name, way.name());
                let told = one(*way, &boot, qemu);
                let told = told.with_context(|| format!("{} kernel, {}", kernel.name, way.name()))?;
                println!("{}", json!({ "kernel": kernel.name, "vmm": way.name(), "took": told }));
            }
        }
    }
    Ok(())
}

fn one(way: Way, boot: &Boot, qemu: &Path) -> anyhow::Result<serde_json::Value> {
    let start = Instant::now();
    let mut machine = way.start(boot, qemu)?;
    let ready = machine.wait_for(guest::READY)?;

    let memory_asked = Instant::now();
    machine.vmm.set_memory(true)?;
    let there = machine.wait_for(guest::THERE)?;
    let used = machine.wait_for(guest::USED)?;
    let full = machine.resident()?;

    let mut vcpus_ms = Vec::new();
    for cpu in 1..VCPUS {
        let asked = Instant::now();
        machine.vmm.set_vcpus(cpu + 1)?;
        vcpus_ms.push(ms(asked, machine.wait_for(&guest::runs_on(cpu))?));
    }
    let freed = machine.wait_for(guest::FREED)?;
    let (mut freed_ms, mut memory_given_ms) = (None, None);
    if way.gives_back() {
        until("freed memory to be back", || {
            Ok((machine.resident()? + BACK <= full).then_some(()))
        })?;
        freed_ms = Some(ms(freed, Instant::now()));
        let asked = Instant::now();
        machine.vmm.set_memory(false)?;
        until("memory to be given back", || {
            Ok(machine.vmm.has_given_memory_back()?.then_some(()))
        })?;
        memory_given_ms = Some(ms(asked, Instant::now()));
    }
    let asked = Instant::now();
    machine.vmm.set_vcpus(1)?;
    until("vCPUs to be given back", || {
        Ok((machine.vmm.vcpus()? == 1).then_some(()))
    })?;
    Ok(json!({
        "boot_ms": ms(start, ready),
        "memory_ms": ms(memory_asked, there),
        "filled_ms": ms(there, used),
        "vcpus_ms": vcpus_ms,
        "freed_ms": freed_ms,
        "memory_given_ms": memory_given_ms,
        "vcpus_given_ms": ms(asked, Instant::now()),
    }))
}

fn ms(from: Instant, to: Instant) -> f64 {
    to.saturating_duration_since(from).as_secs_f64() * 1e3
}
