//! A scheduler for the threads of machines (`sched_ext`), for kernels that have it. Threads that are not in `SCHED_EXT` know nothing
//! of it, and run before all that are.
//!
//! | queue | who waits there | taken |
//! |---|---|---|
//! | [`URGENT`] | threads of machines of the class high, which used little | first, and at once: one that is ordinary makes way |
//! | [`ORDINARY`] | all others, by what their machines ran | next |
//! | [`LIMITED`] | threads of vCPUs that used their limit up, from when on they may run | last, but before ordinary ones once they waited for long: a baseline is had in any case |
//!
//! A vCPU that has used its limit up waits in [`LIMITED`] for the period in which there is something left, and a timer wakes a CPU
//! that is idle then. Threads of devices, which have another nice value, are not limited.
//!
//! Nothing is kept by thread: who a thread is, is known by its process. All rules are in `stoker_ebpf_types::scheduler`.
#![no_std]
#![no_main]
// The target has atomic operations (kernel 5.12), but core offers none of its atomic types' methods for it.
#![feature(core_intrinsics)]
#![allow(internal_features)]

mod kernel;
mod machine;

use core::{ffi::c_void, mem::MaybeUninit, ptr};

use aya_ebpf::{
    bindings::bpf_timer,
    helpers::generated::{
        bpf_ktime_get_ns, bpf_map_lookup_elem, bpf_probe_read_kernel_str, bpf_ringbuf_output, bpf_timer_init,
        bpf_timer_set_callback, bpf_timer_start,
    },
};
use kernel::{Task, map, number};
use machine::{Turn, field, host, progress, runs, turn};
use stoker_ebpf_types::scheduler::{CPUS, Ended, Kind, LAG_NS, PATIENCE_NS, SLICE_NS};

const URGENT: u64 = 0;
const LIMITED: u64 = 1;
const ORDINARY: u64 = 2;

/// `CLOCK_MONOTONIC`.
const MONOTONIC: u64 = 1;

/// The most CPUs that are looked at at a time.
const LOOKS: u32 = 64;

/// A thread is woken: which CPU it goes to.
#[unsafe(no_mangle)]
#[unsafe(link_section = "struct_ops/select_cpu")]
extern "C" fn select_cpu(context: *const u64) -> i32 {
    // SAFETY: the arguments are a thread, a CPU and flags; what is passed on lives for the length of the call.
    unsafe {
        let (task, before) = (argument(context, 0) as Task, argument(context, 1) as i32);
        let mut is_idle = false;
        let cpu = kernel::scx_bpf_select_cpu_dfl(task, before, argument(context, 2), &raw mut is_idle);
        if ptr::read_volatile(&raw const is_idle) {
            if let Some(slice) = turn(task, bpf_ktime_get_ns(), SLICE_NS).slice() {
                kernel::scx_bpf_dsq_insert(task, number!(SCX_DSQ_LOCAL), slice, 0);
            }
        }
        cpu
    }
}

/// A thread can run, and no CPU was found idle for it.
#[unsafe(no_mangle)]
#[unsafe(link_section = "struct_ops/enqueue")]
extern "C" fn enqueue(context: *const u64) {
    // SAFETY: the arguments are a thread and flags.
    unsafe {
        let (task, flags) = (argument(context, 0) as Task, argument(context, 1));
        let now = bpf_ktime_get_ns();
        let is_woken = flags & number!(SCX_ENQ_WAKEUP) != 0;
        let turn = turn(task, now, if is_woken { SLICE_NS } else { LAG_NS });
        // Nothing else wants the CPU that it has just run on.
        if flags & number!(SCX_ENQ_LAST) != 0
            && let Some(slice) = turn.slice()
        {
            kernel::scx_bpf_dsq_insert(task, number!(SCX_DSQ_LOCAL), slice, 0);
            return kernel::scx_bpf_kick_cpu(kernel::scx_bpf_task_cpu(task), 0);
        }
        match turn {
            Turn::Urgent => kernel::scx_bpf_dsq_insert(task, URGENT, SLICE_NS, 0),
            Turn::Ordinary { vtime, slice } => kernel::scx_bpf_dsq_insert_vtime(task, ORDINARY, slice, vtime, 0),
            Turn::Later { at } => {
                kernel::scx_bpf_dsq_insert_vtime(task, LIMITED, SLICE_NS, at, 0);
                return wake_at(at, now);
            }
        }
        let idle = kernel::scx_bpf_pick_idle_cpu(field(task, number!(TASK_CPUS_PTR)) as *const c_void, 0);
        if idle >= 0 {
            kernel::scx_bpf_kick_cpu(idle, number!(SCX_KICK_IDLE));
        } else if matches!(turn, Turn::Urgent) {
            make_way(kernel::scx_bpf_task_cpu(task));
        }
    }
}

/// A CPU has nothing to do, or what it did has had its time.
#[unsafe(no_mangle)]
#[unsafe(link_section = "struct_ops/dispatch")]
extern "C" fn dispatch(context: *const u64) {
    // SAFETY: the first argument is a CPU; the queues were made by `init`.
    unsafe {
        // Where another CPU took the one that this was to make way for, what runs here may run on without beginning anew.
        if let Some(runs) = runs(argument(context, 0) as i32) {
            let kind = &raw mut (*runs).kind;
            if kind.read_volatile() == Kind::Leaving as u64 {
                kind.write_volatile(Kind::Ordinary as u64);
            }
        }
        if kernel::scx_bpf_dsq_move_to_local(URGENT) {
            return;
        }
        if kernel::scx_bpf_dsq_nr_queued(LIMITED) <= 0 {
            kernel::scx_bpf_dsq_move_to_local(ORDINARY);
            return;
        }
        let (now, first) = (bpf_ktime_get_ns(), first_at());
        if first < now.saturating_sub(PATIENCE_NS) && kernel::scx_bpf_dsq_move_to_local(LIMITED) {
            return;
        }
        if kernel::scx_bpf_dsq_move_to_local(ORDINARY) {
            return;
        }
        if first <= now {
            kernel::scx_bpf_dsq_move_to_local(LIMITED);
        } else if first != u64::MAX {
            wake_at(first, now);
        }
    }
}

/// A thread begins to run.
#[unsafe(no_mangle)]
#[unsafe(link_section = "struct_ops/running")]
extern "C" fn running(context: *const u64) {
    // SAFETY: the argument is a thread; elements of arrays live as long as the maps.
    unsafe {
        let task = argument(context, 0) as Task;
        let Some(runs) = runs(kernel::scx_bpf_task_cpu(task)) else {
            return;
        };
        let now = bpf_ktime_get_ns();
        let kind = match turn(task, now, LAG_NS) {
            Turn::Urgent => Kind::Urgent,
            Turn::Ordinary { vtime, .. } => {
                if let Some(progress) = progress() {
                    let reached = (&raw const (*progress).vtime).read_volatile();
                    if (vtime.wrapping_sub(reached) as i64) > 0 {
                        (&raw mut (*progress).vtime).write_volatile(vtime);
                    }
                }
                Kind::Ordinary
            }
            Turn::Later { .. } => Kind::Ordinary,
        };
        (*runs).from_ns = field(task, number!(TASK_CPU_TIME));
        (&raw mut (*runs).kind).write_volatile(kind as u64);
    }
}

/// A thread does not run any more.
#[unsafe(no_mangle)]
#[unsafe(link_section = "struct_ops/stopping")]
extern "C" fn stopping(context: *const u64) {
    // SAFETY: the argument is a thread; elements of arrays live as long as the maps.
    unsafe {
        let task = argument(context, 0) as Task;
        let Some(runs) = runs(kernel::scx_bpf_task_cpu(task)) else {
            return;
        };
        let kind = &raw mut (*runs).kind;
        let was_urgent = kind.read_volatile() == Kind::Urgent as u64;
        kind.write_volatile(Kind::Other as u64);
        let used = field(task, number!(TASK_CPU_TIME)).wrapping_sub((*runs).from_ns);
        machine::spend(task, used, was_urgent);
    }
}

/// A CPU was taken by a thread that is not in `SCHED_EXT`: what waits for it may run on others. For kernels that do so of themselves
/// (`SCX_OPS_ALWAYS_ENQ_IMMED`) it is not there.
#[unsafe(no_mangle)]
#[unsafe(link_section = "struct_ops/cpu_release")]
extern "C" fn cpu_release(_: *const u64) {
    // SAFETY: it takes nothing.
    unsafe { kernel::scx_bpf_reenqueue_local() };
}

/// Makes the queues and the timer.
#[unsafe(no_mangle)]
#[unsafe(link_section = "struct_ops.s/init")]
extern "C" fn init(_: *const u64) -> i32 {
    // SAFETY: elements of arrays live as long as the maps.
    unsafe {
        let timer = timer();
        if timer.is_null() {
            return -1;
        }
        bpf_timer_init(timer, map!(TIMER), MONOTONIC);
        bpf_timer_set_callback(timer, fired as *mut c_void);
        let made = kernel::scx_bpf_create_dsq(URGENT, -1);
        if made < 0 {
            return made;
        }
        let made = kernel::scx_bpf_create_dsq(LIMITED, -1);
        if made < 0 {
            return made;
        }
        kernel::scx_bpf_create_dsq(ORDINARY, -1)
    }
}

/// The scheduler has ended, for whatever reason.
#[unsafe(no_mangle)]
#[unsafe(link_section = "struct_ops/exit")]
extern "C" fn exit(context: *const u64) {
    // SAFETY: the argument is the kernel's `scx_exit_info`; the record is read for the length of the call.
    unsafe {
        let info = argument(context, 0) as Task;
        let mut ended = Ended {
            kind: field32(info, number!(EXIT_KIND)).into(),
            reason: [0; 64],
            message: [0; 128],
        };
        let reason = field(info, number!(EXIT_REASON)) as *const c_void;
        bpf_probe_read_kernel_str((&raw mut ended.reason).cast(), 64, reason);
        let message = field(info, number!(EXIT_MESSAGE)) as *const c_void;
        bpf_probe_read_kernel_str((&raw mut ended.message).cast(), 128, message);
        bpf_ringbuf_output(map!(ENDED), (&raw mut ended).cast(), size_of::<Ended>() as u64, 0);
    }
}

/// Somebody waits no longer: wakes CPUs that are idle. Not just one, for periods of many end at once; to count how many are wanted, the
/// verifier would follow each way to each number.
#[unsafe(no_mangle)]
#[unsafe(link_section = "callback")]
extern "C" fn fired(_: *mut c_void, _: *mut c_void, _: *mut c_void) -> i32 {
    // SAFETY: elements of arrays live as long as the maps.
    unsafe {
        let cpus = host().map_or(0, |host| (*host).cpus.min(CPUS.into()) as u32);
        for cpu in 0..LOOKS {
            if cpu >= cpus {
                break;
            }
            let Some(runs) = runs(cpu as i32) else { break };
            if (&raw const (*runs).kind).read_volatile() == Kind::Other as u64 {
                kernel::scx_bpf_kick_cpu(cpu as i32, number!(SCX_KICK_IDLE));
            }
        }
    }
    0
}

/// Has a CPU look for something else to run that runs what is not urgent: this one, or one after it.
///
/// # Safety
/// From a program that may.
#[inline(always)]
unsafe fn make_way(first: i32) {
    // SAFETY: elements of arrays live as long as the maps.
    unsafe {
        let Some(host) = host() else { return };
        let cpus = ((*host).cpus as u32).clamp(1, CPUS);
        let mut cpu = first as u32;
        for look in 0..LOOKS {
            if look >= cpus {
                break;
            }
            if cpu >= cpus {
                cpu = 0;
            }
            let Some(runs) = runs(cpu as i32) else { break };
            let kind = &raw mut (*runs).kind;
            if kind.read_volatile() == Kind::Ordinary as u64 {
                // Another that is woken at this moment takes another CPU.
                kind.write_volatile(Kind::Leaving as u64);
                kernel::scx_bpf_kick_cpu(cpu as i32, number!(SCX_KICK_PREEMPT));
                break;
            }
            cpu += 1;
        }
    }
}

/// From when on the first in [`LIMITED`] may run; never, where there is none.
///
/// # Safety
/// From a program that may.
#[inline(always)]
unsafe fn first_at() -> u64 {
    let mut iterator = MaybeUninit::uninit();
    // SAFETY: the iterator is made, and ended whatever it finds.
    unsafe {
        let mut at = u64::MAX;
        if kernel::bpf_iter_scx_dsq_new(iterator.as_mut_ptr(), LIMITED, 0) == 0 {
            let task = kernel::bpf_iter_scx_dsq_next(iterator.as_mut_ptr());
            if !task.is_null() {
                at = field(task, number!(TASK_VTIME));
            }
        }
        kernel::bpf_iter_scx_dsq_destroy(iterator.as_mut_ptr());
        at
    }
}

/// Sees to it that the timer fires by then.
///
/// # Safety
/// From a program that may.
#[inline(always)]
unsafe fn wake_at(at: u64, now: u64) {
    // SAFETY: elements of arrays live as long as the maps.
    unsafe {
        let Some(progress) = progress() else { return };
        let due = (&raw const (*progress).timer_at).read_volatile();
        if due > now && due <= at {
            return;
        }
        (&raw mut (*progress).timer_at).write_volatile(at);
        let timer = timer();
        if !timer.is_null() {
            bpf_timer_start(timer, at.saturating_sub(now), 0);
        }
    }
}

#[inline(always)]
unsafe fn timer() -> *mut bpf_timer {
    let key = 0_u32;
    // SAFETY: the key is read for the length of the call.
    unsafe { bpf_map_lookup_elem(map!(TIMER), (&raw const key).cast()).cast() }
}

/// An argument of the function that a program stands for.
#[inline(always)]
unsafe fn argument(context: *const u64, index: usize) -> u64 {
    // SAFETY: programs are called with as many as the function has.
    unsafe { context.add(index).read() }
}

/// A member of 32 bits of one of the kernel's structures, which lies there.
#[inline(always)]
unsafe fn field32(of: Task, at: u64) -> u32 {
    // SAFETY: the loader told where it lies.
    unsafe { of.byte_add(at as usize).cast::<u32>().read_volatile() }
}

/// The programs may be had under GPL-2.0 (see `Cargo.toml`), which is what the kernel asks for.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 4] = *b"GPL\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}
