//! Counts, at the source, what each subject uses: a machine on the host, a container in the guest.
//!
//! | program | on | does |
//! |---|---|---|
//! | [`cpu::sched_stat_runtime`] | the scheduler charges a thread | charges time run to its subject |
//! | [`cpu::sched_switch`] | a thread leaves a CPU for another | charges time waited |
//! | [`cpu::sched_wakeup`], [`cpu::sched_wakeup_new`] | a thread becomes runnable | notes since when it waits |
//! | [`cpu::settle`] | run by user space on each CPU | finds out whose the thread is that runs |
//! | [`memory::rss_stat`] | an address space grows or shrinks | keeps the sum and its peak |
//! | [`memory::adopt`] | run by user space for an address space | takes its sizes over from earlier programs |
//!
//! They need no BTF and read no kernel structure. The raw tracepoints' arguments are those of kernels 5.18 and later
//! (`include/trace/events/sched.h`): `sched_switch(preempt, prev, next, prev_state)`, `sched_wakeup(task)`,
//! `sched_stat_runtime(task, ns)`. Pointers to threads serve as names and are never followed.
#![no_std]
#![no_main]
// The target has atomic operations (kernel 5.12), but core offers none of its atomic types' methods for it.
#![feature(core_intrinsics)]
#![allow(internal_features)]

mod cpu;
mod maps;
mod memory;

/// The programs may be had under GPL-2.0 (see `Cargo.toml`), which is what the kernel asks for.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 4] = *b"GPL\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}
