//! Makes vCPUs: those that a machine starts with, and those that it is given later.

use std::sync::Arc;

use kvm_bindings::{CpuId, Msrs};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use super::build::{BuildError, refused};
use crate::boot::{cpuid, registers};

/// Makes the vCPUs of one machine.
pub(super) struct VcpuMaker {
    vm: Arc<VmFd>,
    supported: CpuId,
    deadline_timer: bool,
    ceiling: u32,
}

// === impl VcpuMaker ===

impl VcpuMaker {
    /// For a machine that may ever have up to `ceiling` vCPUs: that is what they say of themselves.
    ///
    /// # Errors
    /// Where this host's KVM allows fewer, or does not say what it supports.
    pub(super) fn new(kvm: &Kvm, vm: Arc<VmFd>, ceiling: u32) -> Result<Self, BuildError> {
        let allowed = kvm.get_max_vcpus();
        if ceiling as usize > allowed {
            return Err(BuildError::TooManyVcpus {
                asked: ceiling,
                allowed,
            });
        }
        let supported = kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(refused("tell what CPUID it supports"))?;
        let deadline_timer = vm.check_extension(Cap::TscDeadlineTimer);
        Ok(Self {
            vm,
            supported,
            deadline_timer,
            ceiling,
        })
    }

    /// Makes the vCPU of that number. All but the first wait for the guest to start them.
    ///
    /// # Errors
    /// Where KVM refuses, as it does where there is one of that number.
    pub(super) fn make(&self, number: u32) -> Result<VcpuFd, BuildError> {
        let fd = self.vm.create_vcpu(number.into()).map_err(refused("create a vCPU"))?;
        let leaves = cpuid::leaves(self.supported.as_slice(), number, self.ceiling, self.deadline_timer);
        let leaves = CpuId::from_entries(&leaves).map_err(|_| BuildError::Lacks("room for the CPUID leaves"))?;
        fd.set_cpuid2(&leaves).map_err(refused("set CPUID"))?;
        set_msrs(&fd);
        Ok(fd)
    }

    /// Makes one in a machine whose guest runs already.
    ///
    /// # Errors
    /// Where KVM refuses.
    pub(super) fn make_later(&self, number: u32) -> Result<VcpuFd, BuildError> {
        let fd = self.make(number)?;
        // KVM finds whom an interrupt goes to in a map that it makes anew whenever a local APIC changes, but for one that is new
        // (`kvm_recalculate_apic_map` in Linux). Until then nobody could start this vCPU.
        let apic = fd.get_lapic().map_err(refused("read a local APIC"))?;
        fd.set_lapic(&apic).map_err(refused("set a local APIC"))?;
        Ok(fd)
    }
}

/// Sets the MSRs one by one: what KVM refuses (a KVM in software knows few) the guest has to do without.
fn set_msrs(fd: &VcpuFd) {
    for msr in registers::msrs() {
        if let Ok(msrs) = Msrs::from_entries(&[msr]) {
            let _ = fd.set_msrs(&msrs);
        }
    }
}
