//! Whether `/dev/kvm` can run machines.
//!
//! It may be there and yet be unable to run a stock kernel (a software KVM that emulates the guest's ring 0 one instruction
//! at a time), so a payload that counts instructions is run and timed.

use std::io;
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_API_VERSION, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};

/// Instructions of the payload's loop.
const INSTRUCTIONS: u32 = 2 * 0x8000;
/// How often it is run.
const RUNS: u32 = 3;
/// The longest that an instruction of a guest's kernel may take: hardware takes less than 1 ns, emulation 400 and more.
const SLOWEST: Duration = Duration::from_nanos(50);

/// Why `/dev/kvm` can't run machines.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// It is not there, or may not be opened.
    #[error("can't open /dev/kvm: {0}")]
    Open(#[source] io::Error),
    /// The kernel is older than anything that is supported.
    #[error("/dev/kvm has the API version {0} and not {KVM_API_VERSION}")]
    Version(i32),
    /// A small machine did not run.
    #[error("/dev/kvm can't run a small machine: can't {operation}: {source}")]
    Failed {
        /// What was being done.
        operation: &'static str,
        /// The underlying error.
        source: io::Error,
    },
    /// A small machine ended otherwise than its program says.
    #[error("/dev/kvm can't run a small machine: it ended by {0}")]
    Ended(String),
    /// It is a software KVM.
    #[error("/dev/kvm emulates the kernels of its guests: {} ns an instruction", .0.as_nanos())]
    Emulated(Duration),
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

/// Runs a small machine, within milliseconds.
///
/// # Errors
///
/// [`KvmError`] says why no stock kernel can be run.
pub fn probe() -> Result<(), KvmError> {
    let kvm = Kvm::new().map_err(|error| KvmError::Open(error.into()))?;
    let version = kvm.get_api_version();
    if u32::try_from(version) != Ok(KVM_API_VERSION) {
        return Err(KvmError::Version(version));
    }
    let each = run_payload(&kvm)? / INSTRUCTIONS;
    if each > SLOWEST {
        return Err(KvmError::Emulated(each));
    }
    Ok(())
}

/// Runs the payload in a VM of one page and returns the time it took.
fn run_payload(kvm: &Kvm) -> Result<Duration, KvmError> {
    let during = |operation| {
        move |error: kvm_ioctls::Error| KvmError::Failed {
            operation,
            source: error.into(),
        }
    };
    // Before the VM, so that it outlives it.
    let mut page = Box::new(Page([0; 4096]));
    for (to, from) in page.0.iter_mut().zip(PAYLOAD) {
        *to = *from;
    }
    let vm = kvm.create_vm().map_err(during("make it"))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: ENTRY,
        memory_size: 4096,
        userspace_addr: std::ptr::from_mut(page.as_mut()) as u64,
    };
    // SAFETY: the region is one whole page that lives until the VM is gone, and nothing here touches it meanwhile.
    unsafe { vm.set_user_memory_region(region) }.map_err(during("give it memory"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(during("give it a vCPU"))?;
    let mut sregs = vcpu.get_sregs().map_err(during("read its registers"))?;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu.set_sregs(&sregs).map_err(during("set its registers"))?;
    // The first run pays for the host's page faults and, on an emulated host, for translation; the last is timed.
    let mut took = Duration::ZERO;
    for _ in 0..RUNS {
        let mut regs = vcpu.get_regs().map_err(during("read its registers"))?;
        regs.rip = ENTRY;
        regs.rflags = 2;
        vcpu.set_regs(&regs).map_err(during("set its registers"))?;
        let start = Instant::now();
        match vcpu.run().map_err(during("run it"))? {
            VcpuExit::Hlt => took = start.elapsed(),
            exit => return Err(KvmError::Ended(format!("{exit:?}"))),
        }
    }
    Ok(took)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_this_host_is_the_probe_says_so() {
        match probe() {
            Ok(()) => {}
            Err(error) => assert!(error.to_string().contains("/dev/kvm"), "{error}"),
        }
    }
}
