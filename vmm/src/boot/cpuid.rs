//! What the guest's CPUs say of themselves: what KVM supports, with a topology of one socket and one thread a core, and
//! without what a guest here has no use for. Leaves as in Intel's SDM, volume 2A, CPUID, and AMD's APM, volume 3,
//! appendix E.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Leaves that describe the host's own topology or performance counters: the first would contradict ours, the
/// second would send the guest looking for hardware that it has not.
const DROPPED: [u32; 6] = [0xa, 0x1f, 0x23, 0x8000_001b, 0x8000_0022, 0x8000_0026];

const TOPOLOGY: u32 = 0xb;
/// Level types of leaf 0xb.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// The leaves for the vCPU `index` of `vcpus`. `deadline_timer`: KVM emulates the TSC deadline timer, which spares the
/// guest from calibrating the local APIC's timer against hardware that we do not have.
pub fn leaves(supported: &[kvm_cpuid_entry2], index: u32, vcpus: u32, deadline_timer: bool) -> Vec<kvm_cpuid_entry2> {
    let mut leaves: Vec<_> = supported
        .iter()
        .filter(|leaf| leaf.function != TOPOLOGY && !DROPPED.contains(&leaf.function))
        .copied()
        .collect();
    for leaf in &mut leaves {
        adapt(leaf, index, vcpus, deadline_timer);
    }
    leaves.extend(topology(index, vcpus));
    leaves
}

fn adapt(leaf: &mut kvm_cpuid_entry2, index: u32, vcpus: u32, deadline_timer: bool) {
    match (leaf.function, leaf.index) {
        (0, _) => leaf.eax = leaf.eax.max(TOPOLOGY),
        (1, _) => {
            // Initial APIC id, logical processors in the package, CLFLUSH size as it is.
            leaf.ebx = leaf.ebx & 0xffff | (vcpus & 0xff) << 16 | index << 24;
            set(&mut leaf.ecx, 31, true); // hypervisor
            set(&mut leaf.ecx, 24, deadline_timer);
            set(&mut leaf.ecx, 5, false); // VMX: no machines in machines
            set(&mut leaf.ecx, 3, false); // MONITOR
            set(&mut leaf.edx, 28, vcpus > 1); // more than one logical processor
        }
        // Intel's caches: cores in the package; caches of level 3 shared by all, the others by one.
        (4, _) if leaf.eax & 0x1f != 0 => {
            let level = leaf.eax >> 5 & 7;
            let sharing = if level >= 3 { vcpus - 1 } else { 0 };
            leaf.eax = leaf.eax & 0x3fff | sharing << 14 | (core_ids(vcpus) - 1).min(63) << 26;
        }
        (0x8000_0001, _) => {
            set(&mut leaf.ecx, 1, vcpus > 1); // CmpLegacy
            set(&mut leaf.ecx, 2, false); // SVM
            set(&mut leaf.ecx, 10, false); // instruction-based sampling
            set(&mut leaf.ecx, 23, false); // performance counters: core,
            set(&mut leaf.ecx, 24, false); // northbridge,
            set(&mut leaf.ecx, 28, false); // last-level cache
        }
        (0x8000_0008, _) => {
            // Threads in the package less one, and the bits of an APIC id that count them.
            leaf.ecx = leaf.ecx & 0xffff_0000 | (vcpus - 1) & 0xff | core_bits(vcpus) << 12;
        }
        (0x8000_000a, _) => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
        // AMD's caches, as leaf 4.
        (0x8000_001d, _) if leaf.eax & 0x1f != 0 => {
            let level = leaf.eax >> 5 & 7;
            let sharing = if level >= 3 { vcpus - 1 } else { 0 };
            leaf.eax = leaf.eax & 0x3fff | sharing << 14;
        }
        // AMD's APIC id, core and node: one thread a core, one node.
        (0x8000_001e, _) => {
            (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (index, index & 0xff, 0, 0);
        }
        _ => {}
    }
}

/// Leaf 0xb: the x2APIC id, of which no bit numbers threads and the lower ones number cores.
fn topology(index: u32, vcpus: u32) -> [kvm_cpuid_entry2; 3] {
    let level = |number: u32, eax, ebx, kind: u32| kvm_cpuid_entry2 {
        function: TOPOLOGY,
        index: number,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx: number | kind << 8,
        edx: index,
        ..Default::default()
    };
    [
        level(0, 0, 1, LEVEL_THREAD),
        level(1, core_bits(vcpus), vcpus, LEVEL_CORE),
        level(2, 0, 0, 0),
    ]
}

/// Bits that number `vcpus` cores.
fn core_bits(vcpus: u32) -> u32 {
    vcpus.next_power_of_two().trailing_zeros()
}

/// APIC ids that those bits can name.
fn core_ids(vcpus: u32) -> u32 {
    1 << core_bits(vcpus)
}

fn set(register: &mut u32, bit: u32, value: bool) {
    *register = *register & !(1 << bit) | u32::from(value) << bit;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, value: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax: value,
            ebx: value,
            ecx: value,
            edx: value,
            ..Default::default()
        }
    }

    fn find(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *leaves
            .iter()
            .find(|leaf| (leaf.function, leaf.index) == (function, index))
            .unwrap()
    }

    #[test]
    fn each_cpu_has_its_own_id() {
        let host = [leaf(0, 0, 7), leaf(1, 0, u32::MAX), leaf(0x8000_001e, 0, 99)];
        for index in 0..6 {
            let leaves = leaves(&host, index, 6, true);
            assert_eq!(find(&leaves, 1, 0).ebx, index << 24 | 6 << 16 | 0xffff);
            assert_eq!(find(&leaves, 0xb, 0).edx, index);
            assert_eq!(find(&leaves, 0xb, 1).edx, index);
            assert_eq!(find(&leaves, 0xb, 1).eax, 3, "six cores take three bits");
            assert_eq!(find(&leaves, 0x8000_001e, 0).eax, index);
            assert_eq!(find(&leaves, 0, 0).eax, 0xb);
        }
    }

    #[test]
    fn what_a_guest_must_not_see_is_gone() {
        let host = [
            leaf(1, 0, u32::MAX),
            leaf(0xa, 0, 1),
            leaf(0xb, 0, 1),
            leaf(0x1f, 1, 1),
            leaf(0x8000_0001, 0, u32::MAX),
        ];
        let leaves = leaves(&host, 0, 1, false);
        assert!(!leaves.iter().any(|leaf| DROPPED.contains(&leaf.function)));
        assert_eq!(leaves.iter().filter(|leaf| leaf.function == 0xb).count(), 3);
        let features = find(&leaves, 1, 0);
        assert_eq!(features.ecx & (1 << 5 | 1 << 3 | 1 << 24), 0);
        assert_eq!(features.ecx >> 31, 1);
        assert_eq!(features.edx & 1 << 28, 0);
        assert_eq!(find(&leaves, 0x8000_0001, 0).ecx & 0b110, 0);
    }

    #[test]
    fn caches_are_shared_by_the_machine_alone() {
        // Level 3, type 3 (unified), shared by 64 in a package of 64.
        let host = [leaf(4, 3, 63 << 26 | 63 << 14 | 3 << 5 | 3)];
        let eax = find(&leaves(&host, 0, 8, true), 4, 3).eax;
        assert_eq!((eax >> 14 & 0xfff, eax >> 26), (7, 7));
        assert_eq!(eax & 0x3fff, 3 << 5 | 3);
    }
}
