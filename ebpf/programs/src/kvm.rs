//! What KVM does for machines: how long vCPUs are in their guests, and why they leave them.
//!
//! Loaded where the kernel has these tracepoints. The reason is in the record of `kvm:kvm_exit` alone, not among its arguments.

use core::intrinsics::{AtomicOrdering::Relaxed, atomic_xadd};

use aya_ebpf::{
    macros::{raw_tracepoint, tracepoint},
    programs::{RawTracePointContext, TracePointContext},
};
use stoker_ebpf_types::{EXITS, Guest, KvmExitFields, Running, exit_index};

use crate::cpu::{charge, current, now, this_cpu};
use crate::maps::{EXIT_REASONS, GUESTS};

/// Set by the loader from the tracepoint's `format` file.
#[unsafe(no_mangle)]
static KVM_EXIT: KvmExitFields = KvmExitFields { reason: 0, isa: 0 };

/// The current thread enters its guest. Interrupts are off.
#[raw_tracepoint(tracepoint = "kvm_entry")]
pub fn kvm_entry(_: RawTracePointContext) -> i32 {
    let now = now();
    if let Some(running) = this_cpu() {
        if running.is_charged == 0 && running.subject.cgroup == 0 {
            // It is new, and who it is is not known yet.
            charge(running, current(), 0);
        }
        running.guest_ns = now;
    }
    0
}

/// The current thread has left its guest. Some kernels tell that when interrupts are on again.
#[tracepoint(category = "kvm", name = "kvm_exit")]
pub fn kvm_exit(event: TracePointContext) -> u32 {
    let now = now();
    let Some(running) = this_cpu() else { return 0 };
    let index = reason(&event).and_then(|index| EXIT_REASONS.get(index));
    let Some(guest) = guest_of(running) else { return 0 };
    let exit = index.map_or(0, |&exit| exit) as usize;
    // SAFETY: elements of an array live as long as the map, and their sums are changed by atomic operations alone; `exit` is
    // checked.
    unsafe {
        if exit < EXITS {
            let exits = (&raw mut (*guest).exits).cast::<u64>().add(exit);
            atomic_xadd::<u64, u64, { Relaxed }>(exits, 1);
        }
    }
    leave(running, now);
    0
}

/// The current thread is no longer in its guest.
#[inline(always)]
pub fn leave(running: &mut Running, now: u64) {
    let entered = core::mem::take(&mut running.guest_ns);
    if entered != 0
        && let Some(guest) = guest_of(running)
    {
        // SAFETY: as in `kvm_exit`.
        unsafe { atomic_xadd::<u64, u64, { Relaxed }>(&raw mut (*guest).guest_ns, now.saturating_sub(entered)) };
    }
}

#[inline(always)]
fn reason(event: &TracePointContext) -> Option<u32> {
    // SAFETY: a constant that the loader may set before the load; volatile keeps the compiler from taking it for the default.
    let at = unsafe { (&raw const KVM_EXIT).read_volatile() };
    // SAFETY: the offsets are the kernel's own, and the helper reads kernel memory safely wherever it is.
    unsafe {
        let isa = event.read_at::<u32>(at.isa as usize).ok()?;
        Some(exit_index(isa, event.read_at::<u32>(at.reason as usize).ok()?))
    }
}

/// What is kept of the subject whose thread is current, if it is one's.
#[inline(always)]
fn guest_of(running: &Running) -> Option<*mut Guest> {
    if running.subject.cgroup == 0 {
        return None;
    }
    let guest = GUESTS.get_ptr_mut(running.subject.slot())?;
    // SAFETY: as in `kvm_exit`; volatile, since user space changes it.
    let generation = unsafe { (&raw const (*guest).generation).read_volatile() };
    (generation == u64::from(running.subject.generation)).then_some(guest)
}
