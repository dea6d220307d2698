//! Whether this machine can run microVMs itself.
//!
//! A `/dev/kvm` may be there and yet be unable to run a stock kernel (a software KVM that emulates the guest's ring 0 one
//! instruction at a time), so a payload that counts instructions is run and timed.

use std::{
    fmt, fs,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit};

use crate::process;

/// Instructions of the payload's loop.
const INSTRUCTIONS: u32 = 2 * 0x8000;
/// How often it is run.
const RUNS: u32 = 3;
/// Hardware runs one in under a ns, and emulation takes 400 and more.
const LIMIT_NS: u128 = 50;
/// What machines, limits and telemetry take.
const CONTROLLERS: &[&str] = &["cpu", "memory", "pids", "io"];

/// What was found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// This machine runs microVMs itself.
    Native,
    /// The lab is needed, for this reason.
    Lab(String),
}

impl fmt::Display for Verdict {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Native => write!(formatter, "Running natively: this machine has KVM and cgroup v2."),
            Self::Lab(reason) => write!(formatter, "Running in the lab (QEMU, emulated), since {reason}."),
        }
    }
}

/// Looks at user, cgroups and KVM.
pub(crate) fn probe() -> Verdict {
    match user().and_then(|()| cgroups()).and_then(|()| kvm()) {
        Ok(()) => Verdict::Native,
        Err(reason) => Verdict::Lab(format!("{reason:#}")),
    }
}

fn user() -> Result<()> {
    if !process::is_root() {
        bail!("this is not root, which loading eBPF programs and making cgroups takes");
    }
    Ok(())
}

fn cgroups() -> Result<()> {
    let Ok(text) = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers") else {
        bail!("/sys/fs/cgroup is not cgroup v2");
    };
    for controller in CONTROLLERS {
        if !text.split_whitespace().any(|name| name == *controller) {
            bail!("cgroup v2 has no {controller} controller here");
        }
    }
    Ok(())
}

/// A page of guest memory.
#[repr(C, align(4096))]
struct Page([u8; 4096]);

/// Real-mode code: a loop, an instruction of SSE4.2's time (which software KVMs cannot emulate), and the end.
#[rustfmt::skip]
const PAYLOAD: &[u8] = &[
    0xb9, 0x00, 0x80,       // mov cx, 0x8000
    0x49,                   // 1: dec cx
    0x75, 0xfd,             // jnz 1b
    0xf3, 0x0f, 0xb8, 0xc1, // popcnt ax, cx
    0xf4,                   // hlt
];
const ENTRY: u64 = 0x1000;

fn kvm() -> Result<()> {
    let took = run_payload().context("/dev/kvm cannot run a stock kernel (a small payload failed)")?;
    let each = took.as_nanos() / u128::from(INSTRUCTIONS);
    if each > LIMIT_NS {
        bail!("/dev/kvm emulates its guests' kernels: {each} ns an instruction");
    }
    Ok(())
}

/// Runs the payload in a VM of one page and returns the time it took.
fn run_payload() -> Result<Duration> {
    // Before the VM, so that it outlives it.
    let mut page = Box::new(Page([0; 4096]));
    for (to, from) in page.0.iter_mut().zip(PAYLOAD) {
        *to = *from;
    }
    let kvm = Kvm::new().context("open")?;
    let vm = kvm.create_vm().context("make a VM")?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: ENTRY,
        memory_size: 4096,
        userspace_addr: std::ptr::from_mut(page.as_mut()) as u64,
    };
    // SAFETY: the region is one whole page that lives until the VM is gone, and nothing here touches it meanwhile.
    unsafe { vm.set_user_memory_region(region) }.context("give it memory")?;
    let mut vcpu = vm.create_vcpu(0).context("make a vCPU")?;
    let mut sregs = vcpu.get_sregs().context("read registers")?;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu.set_sregs(&sregs).context("set registers")?;
    // The first run pays for the host's page faults and, on an emulated host, for translation; the last is timed.
    let mut took = Duration::ZERO;
    for _ in 0..RUNS {
        let mut regs = vcpu.get_regs().context("read registers")?;
        regs.rip = ENTRY;
        regs.rflags = 2;
        vcpu.set_regs(&regs).context("set registers")?;
        let start = Instant::now();
        match vcpu.run().context("run it")? {
            VcpuExit::Hlt => took = start.elapsed(),
            exit => bail!("it ended by {exit:?}"),
        }
    }
    Ok(took)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_says_why() {
        assert!(Verdict::Lab("x".to_owned()).to_string().contains("since x"));
        // Whatever this machine is, the probe ends with an answer.
        let _ = probe();
    }
}
