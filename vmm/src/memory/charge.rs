//! What a machine's cgroup is charged with beside the memory of its guest.

/// Page tables of guest memory that is all touched, as a part of it: 8 bytes for each page of 4096, once in the process's own
/// tables and once in KVM's (EPT, NPT or shadow tables). Huge pages need less, which nobody may rely on.
const PAGE_TABLES: u64 = 4096 / 8 / 2;
/// The tables above those, as a part of them.
const UPPER_TABLES: u64 = 512;
/// What KVM keeps of each page where it has no hardware for nested paging: 8 bytes to find its entries by and 2 to count
/// writers (`kvm_arch_memory_slot` in Linux), as a part of guest memory.
const SHADOW_RECORDS: u64 = 4096 / (8 + 2);
/// A vCPU: its thread's stack, in user space and in the kernel, and what KVM keeps of it (registers, FPU, APIC page, `kvm_run`).
const VCPU_BYTES: u64 = 512 << 10;
/// The VMM itself, with all that a guest can have its devices hold: 16 MiB of vsock's windows, buffers, and page cache through
/// which images and boot files are read.
const OWN_BYTES: u64 = 64 << 20;

/// The most in bytes that a machine may be charged with that has `memory_mib` MiB of memory now, at most `max_memory_mib` as long as it
/// runs, and so many vCPUs: its cgroup's `memory.max`. A guest can have all of the memory that it was given, whatever that takes on
/// the host. Tables, once they are there, stay when memory is unplugged.
pub fn most_charged(memory_mib: u32, max_memory_mib: u32, vcpus: u32) -> u64 {
    let bytes = |mib| u64::from(mib) << 20;
    let most = bytes(max_memory_mib.max(memory_mib));
    let tables = most / PAGE_TABLES;
    let records = most / SHADOW_RECORDS;
    bytes(memory_mib) + tables + tables / UPPER_TABLES + records + u64::from(vcpus) * VCPU_BYTES + OWN_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel says that this process's page tables take, in bytes.
    fn page_tables() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmPTE:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    }

    #[test]
    fn page_tables_take_what_is_reckoned_for_them() {
        const MIB: u32 = 256;
        let length = usize::try_from(MIB).unwrap() << 20;
        let before = page_tables();
        // SAFETY: a new mapping at an address of the kernel's choice; it is only read, within its length, and is never taken away.
        unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            let start = libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ, flags, -1, 0);
            assert_ne!(start, libc::MAP_FAILED);
            assert_eq!(libc::madvise(start, length, libc::MADV_NOHUGEPAGE), 0);
            // Reading maps the page of zeroes everywhere: tables without memory.
            for at in (0..length).step_by(4096) {
                start.cast::<u8>().add(at).read_volatile();
            }
        }
        let grown = page_tables() - before;
        // Half of what is reckoned is KVM's. Other tests' threads allocate and free a little meanwhile.
        let reckoned = (u64::from(MIB) << 20) / PAGE_TABLES / 2;
        assert!(grown.abs_diff(reckoned) < 64 << 10, "{grown} of {reckoned}");
    }

    #[test]
    fn a_large_machine_may_use_all_of_its_memory() {
        let beside = |mib, vcpus| most_charged(mib, mib, vcpus) - (u64::from(mib) << 20);
        // 4 MiB of tables for each GiB, and as much again for the VMM as a small machine has.
        for gib in [1, 14, 16, 64, 1024] {
            let tables = u64::from(gib) * (4 << 20);
            assert!(beside(gib << 10, 1) >= tables + OWN_BYTES, "{gib} GiB");
        }
        assert!(beside(128, 1) < 68 << 20, "a small machine is bounded tightly");
        assert_eq!(beside(128, 9) - beside(128, 1), 8 * VCPU_BYTES);
    }

    #[test]
    fn what_may_be_plugged_is_charged_once_it_is() {
        let (small, grown) = (most_charged(256, 4096, 2), most_charged(4096, 4096, 2));
        assert_eq!(grown, most_charged(4096, 4096, 2));
        assert_eq!(grown - small, (4096 - 256) << 20, "its tables are there from the start");
        assert!(small - most_charged(256, 256, 2) < (4096 << 20) / 100);
    }
}
