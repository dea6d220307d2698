//! Whether a thread that could run may not, since its cgroup has used its limit (`cpu.max`) up.
//!
//! The scheduler says so nowhere but in its own structures. The loader looks their layout up in the kernel's type information,
//! where there is some; elsewhere all waits are one.

use aya_ebpf::helpers::bpf_probe_read_kernel;

use crate::maps::throttle_fields;

/// Whether it can be found out.
#[inline(always)]
pub fn is_known() -> bool {
    throttle_fields().cfs_rq != 0
}

/// Whether a thread's cgroup, or one that that is in, is held back on the thread's CPU. The lock of its run queue is held.
#[inline(always)]
pub fn is_held(thread: u64) -> bool {
    if !is_known() {
        return false;
    }
    let at = throttle_fields();
    // SAFETY: the helper reads kernel memory safely wherever it is.
    let count = unsafe {
        let Ok(queue) = bpf_probe_read_kernel((thread.wrapping_add(at.cfs_rq.into())) as *const u64) else {
            return false;
        };
        bpf_probe_read_kernel((queue.wrapping_add(at.throttle_count.into())) as *const i32)
    };
    matches!(count, Ok(count) if count > 0)
}
