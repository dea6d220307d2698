//! Counts, at the source, what each subject uses: a machine on the host, a container in the guest; keeps the accounts of machines,
//! and tells of containers when they have used so much ([`alarms`]).
//!
//! | program | on | does |
//! |---|---|---|
//! | [`cpu::sched_stat_runtime`] | the scheduler charges a thread | charges time run to its subject, and settles its account |
//! | [`cpu::sched_switch`] | a thread leaves a CPU for another | notes who runs |
//! | [`waits::sched_wakeup_held`] | a thread becomes runnable | notes where it may not run |
//! | [`waits::sched_wakeup`], [`waits::sched_wakeup_new`] | the same, where there is no BTF | note since when it waits |
//! | [`cpu::settle`] | run by user space on each CPU | finds out whose the thread is that runs |
//! | [`memory::rss_stat`] | an address space grows or shrinks | keeps the sum and its peak |
//! | [`kvm::kvm_entry`], [`kvm::kvm_exit`] | a vCPU enters and leaves its guest | adds up how long it was there, and why it left |
//! | [`accounts::account`] | run by user space for an account | changes it |
//! | [`memory::adopt`], [`cpu::adopt_times`] | run by user space | takes over what earlier programs counted |
//!
//! They need no BTF, but are cheaper where there is some. The raw tracepoints' arguments are those of kernels 5.18 and later
//! (`include/trace/events/sched.h`): `sched_switch(preempt, prev, next, prev_state)`, `sched_wakeup(task)`,
//! `sched_stat_runtime(task, ns)`. Pointers to threads serve as names. They are followed in two cases alone, where the loader found
//! the layout: to see how long a thread has waited ([`waits`]), and whether its cgroup has used its limit up ([`throttle`]).
#![no_std]
#![no_main]
// The target has atomic operations (kernel 5.12), but core offers none of its atomic types' methods for it.
#![feature(core_intrinsics)]
#![allow(internal_features)]

mod accounts;
mod alarms;
mod cpu;
mod kvm;
mod maps;
mod memory;
mod threads;
mod throttle;
mod waits;

/// The programs may be had under GPL-2.0 (see `Cargo.toml`), which is what the kernel asks for.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 4] = *b"GPL\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}
