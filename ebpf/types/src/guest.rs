//! What KVM does for a machine.

/// How many reasons of exits are told apart.
pub const EXITS: usize = 12;

/// Why a guest was left. Processors have some hundred reasons, each maker's its own numbers; these are what they come to.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Exit {
    /// All that is none of the others.
    Other = 0,
    /// The host was interrupted.
    Interrupt = 1,
    /// The guest can take an interrupt now.
    InterruptWindow = 2,
    /// `hlt`: the vCPU has nothing to do.
    Halt = 3,
    /// `pause` in a loop: it waits for another vCPU.
    Pause = 4,
    /// An access to an I/O port.
    Io = 5,
    /// An access to memory that is not mapped: to a device, or for the first time.
    Memory = 6,
    /// An access to a model-specific register.
    Msr = 7,
    /// `cpuid`.
    Cpuid = 8,
    /// A call of the guest to KVM.
    Hypercall = 9,
    /// An access to the interrupt controller.
    Apic = 10,
    /// KVM's own timer of the guest's deadline.
    Timer = 11,
}

/// How many codes `EXIT_REASONS` has room for: VMX's reasons, SVM's codes, and those of SVM from 0x400 on.
pub const EXIT_CODES: u32 = 3 * CODES;

const CODES: u32 = 256;

/// `KVM_ISA_VMX` of the kernel's `kvm_host.h`; `KVM_ISA_SVM` is 2.
const ISA_VMX: u32 = 1;

/// Where `EXIT_REASONS` has what an exit comes to, by the fields `isa` and `exit_reason` of `kvm:kvm_exit`.
#[inline(always)]
pub const fn exit_index(isa: u32, reason: u32) -> u32 {
    let code = reason % CODES;
    if isa == ISA_VMX {
        // The upper bits tell other things.
        code
    } else if reason < CODES {
        CODES + code
    } else if reason >> 8 == 4 {
        2 * CODES + code
    } else {
        // SVM has no such code: it is none of those that are known.
        CODES + (CODES - 1)
    }
}

impl Exit {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; EXITS] = [
        Self::Other,
        Self::Interrupt,
        Self::InterruptWindow,
        Self::Halt,
        Self::Pause,
        Self::Io,
        Self::Memory,
        Self::Msr,
        Self::Cpuid,
        Self::Hypercall,
        Self::Apic,
        Self::Timer,
    ];

    /// What the exit with this [`exit_index`] comes to. The numbers are those of `arch/x86/include/uapi/asm/vmx.h` and `svm.h`.
    pub const fn of_index(index: u32) -> Self {
        match (index / CODES, index % CODES) {
            (0, 1) | (1, 0x60) => Self::Interrupt,
            (0, 7) | (1, 0x64) => Self::InterruptWindow,
            (0, 12) | (1, 0x78) => Self::Halt,
            (0, 40) | (1, 0x77) => Self::Pause,
            (0, 30) | (1, 0x7b) => Self::Io,
            (0, 48 | 49) | (2, 0) => Self::Memory,
            (0, 31 | 32) | (1, 0x7c) => Self::Msr,
            (0, 10) | (1, 0x72) => Self::Cpuid,
            (0, 18) | (1, 0x81) => Self::Hypercall,
            (0, 44 | 45 | 56) | (2, 1 | 2) => Self::Apic,
            (0, 52) => Self::Timer,
            _ => Self::Other,
        }
    }
}

/// What KVM did for one subject. It only grows while the slot has the same owner.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Guest {
    /// The generation of the slot's owner: see [`Subject::generation`](crate::Subject::generation).
    pub generation: u64,
    /// Time in ns that its vCPUs were in the guest.
    pub guest_ns: u64,
    /// How often they left it, by [`Exit`].
    pub exits: [u64; EXITS],
}
