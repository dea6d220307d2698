//! Whether a thread that could run may not, since its cgroup has used its limit (`cpu.max`) up.
//!
//! The scheduler says so nowhere but in its own structures. The loader looks their layout up in the kernel's type information,
//! where there is some; elsewhere all waits are one. The verifier knows the types of what is read here, so no helper is needed.

use crate::maps::throttle_fields;

/// Whether it can be found out.
#[inline(always)]
pub fn is_known() -> bool {
    throttle_fields().cfs_rq != 0
}

/// Whether a thread's cgroup, or one that that is in, is held back on the thread's CPU. The lock of its run queue is held. `task` gets
/// its `task_struct`, as the kernel gives it out: no mere number. A kernel without types refuses who may get it, so nobody does there.
#[inline(always)]
pub fn is_held(task: impl FnOnce() -> *const u8) -> bool {
    if !is_known() {
        return false;
    }
    let (task, at) = (task(), throttle_fields());
    // SAFETY: the verifier sees to it that these are members of those structures; what is not mapped reads as 0.
    unsafe {
        let queue: *const u8 = task
            .wrapping_add(at.cfs_rq as usize)
            .cast::<*const u8>()
            .read_volatile();
        queue
            .wrapping_add(at.throttle_count as usize)
            .cast::<i32>()
            .read_volatile()
            > 0
    }
}
