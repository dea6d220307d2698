//! What is said of a vCPU that KVM cannot run on: why, and where the guest was. It is all that is left to find the cause by.

use kvm_bindings::{
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES,
    KVM_INTERNAL_ERROR_SIMUL_EX, KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, kvm_regs, kvm_sregs,
};
use kvm_ioctls::VcpuFd;

/// What is in `kvm_run` after `KVM_EXIT_INTERNAL_ERROR` (KVM's api.rst).
#[derive(Clone, Debug)]
pub(super) struct InternalError {
    suberror: u32,
    data: Vec<u64>,
}

// === impl InternalError ===

impl InternalError {
    /// Of the exit by which `fd` has just returned.
    pub(super) fn of(fd: &mut VcpuFd) -> Self {
        let run = fd.get_kvm_run();
        // SAFETY: every pattern of bits is a value of this member, which is all numbers; whether the exit has filled it is for
        // the caller to know.
        let internal = unsafe { run.__bindgen_anon_1.internal };
        Self {
            suberror: internal.suberror,
            data: internal.data.into_iter().take(internal.ndata as usize).collect(),
        }
    }

    /// In words and numbers.
    pub(super) fn describe(&self) -> String {
        let meaning = match self.suberror {
            KVM_INTERNAL_ERROR_EMULATION => "an instruction that it cannot emulate",
            KVM_INTERNAL_ERROR_SIMUL_EX => "exceptions at the same time",
            KVM_INTERNAL_ERROR_DELIVERY_EV => "an exit while an event was delivered",
            KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "an exit that it does not know",
            _ => "one that this VMM does not know",
        };
        let mut text = format!("an internal error, suberror {} ({meaning})", self.suberror);
        if let Some(instruction) = self.instruction() {
            text.push_str(&format!(", instruction bytes {instruction:02x?}"));
        }
        text.push_str(&format!(", data {:x?}", self.data));
        text
    }

    /// The bytes at the instruction pointer, where the error is about them and tells them: flags, then the number of bytes and
    /// 15 of them (`emulation_failure` in Linux's kvm.h).
    fn instruction(&self) -> Option<Vec<u8>> {
        let [flags, first, second, ..] = *self.data.as_slice() else {
            return None;
        };
        let told = flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0;
        if self.suberror != KVM_INTERNAL_ERROR_EMULATION || !told {
            return None;
        }
        let mut bytes = [first, second].into_iter().flat_map(u64::to_le_bytes);
        let count = bytes.next()?;
        Some(bytes.take(count.into()).collect())
    }
}

/// Where the guest was, from the registers that KVM still tells.
pub(super) fn registers(fd: &VcpuFd) -> String {
    let general = fd.get_regs().map(|regs| general(&regs));
    let system = fd.get_sregs().map(|sregs| system(&sregs));
    let told = |part: Result<String, _>| part.unwrap_or_else(|error: kvm_ioctls::Error| format!("(not told: {error})"));
    format!("{} {}", told(general), told(system))
}

fn general(regs: &kvm_regs) -> String {
    let named = [
        ("rip", regs.rip),
        ("rflags", regs.rflags),
        ("rsp", regs.rsp),
        ("rbp", regs.rbp),
        ("rax", regs.rax),
        ("rbx", regs.rbx),
        ("rcx", regs.rcx),
        ("rdx", regs.rdx),
        ("rsi", regs.rsi),
        ("rdi", regs.rdi),
        ("r8", regs.r8),
        ("r9", regs.r9),
        ("r10", regs.r10),
        ("r11", regs.r11),
        ("r12", regs.r12),
        ("r13", regs.r13),
        ("r14", regs.r14),
        ("r15", regs.r15),
    ];
    line(&named)
}

fn system(sregs: &kvm_sregs) -> String {
    let named = [
        ("cs", u64::from(sregs.cs.selector)),
        ("cr0", sregs.cr0),
        ("cr2", sregs.cr2),
        ("cr3", sregs.cr3),
        ("cr4", sregs.cr4),
        ("efer", sregs.efer),
    ];
    line(&named)
}

fn line(named: &[(&str, u64)]) -> String {
    let words: Vec<String> = named.iter().map(|(name, value)| format!("{name}={value:#x}")).collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_internal_error_says_what_kvm_says() {
        let emulation = InternalError {
            suberror: 1,
            data: vec![1, 0x0000_d001_0f03, 0, 7],
        };
        let text = emulation.describe();
        assert!(
            text.contains("suberror 1 (an instruction that it cannot emulate)"),
            "{text}"
        );
        assert!(text.contains("instruction bytes [0f, 01, d0]"), "{text}");
        assert!(text.ends_with("data [1, d0010f03, 0, 7]"), "{text}");
        // Without the flag, or where the error is another, they are data alone; so many bytes there cannot be.
        for (suberror, data) in [(1, vec![0, 3, 0]), (3, vec![1, 3, 0]), (1, vec![1, 3]), (9, vec![])] {
            let text = InternalError { suberror, data }.describe();
            assert!(
                !text.contains("bytes") && text.contains(&format!("suberror {suberror}")),
                "{text}"
            );
        }
        let most = InternalError {
            suberror: 1,
            data: vec![1, u64::MAX, u64::MAX],
        };
        assert_eq!(most.instruction().unwrap().len(), 15);
    }

    #[test]
    fn registers_are_named() {
        let regs = kvm_regs {
            rip: 0x1234,
            r15: 5,
            ..kvm_regs::default()
        };
        let text = general(&regs);
        assert!(text.starts_with("rip=0x1234 ") && text.ends_with(" r15=0x5"), "{text}");
        let sregs = kvm_sregs {
            cr2: 0xdead,
            ..kvm_sregs::default()
        };
        assert!(system(&sregs).contains(" cr2=0xdead "));
    }
}
