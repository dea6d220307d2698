//! What the loader links the scheduler with, each by its name: functions and types of the kernel that runs, and its maps.
//!
//! A number (a value of an enumeration, where a member of a structure lies) is the *address* of a symbol, so that it is a constant
//! to the verifier. To the compiler an address is never 0, so none is compared with that.

use core::ffi::c_void;

/// A thread: the kernel's `task_struct`.
pub type Task = *const c_void;

/// An iterator over a queue (`struct bpf_iter_scx_dsq`).
pub type Queued = [u64; 6];

unsafe extern "C" {
    // Functions (`kernel/sched/ext*` of the kernel). Some have other names in other series: the loader knows them.
    pub fn scx_bpf_create_dsq(queue: u64, node: i32) -> i32;
    pub fn scx_bpf_select_cpu_dfl(task: Task, before: i32, wake_flags: u64, is_idle: *mut bool) -> i32;
    pub fn scx_bpf_pick_idle_cpu(allowed: *const c_void, flags: u64) -> i32;
    pub fn scx_bpf_dsq_insert(task: Task, queue: u64, slice: u64, flags: u64);
    pub fn scx_bpf_dsq_insert_vtime(task: Task, queue: u64, slice: u64, vtime: u64, flags: u64);
    pub fn scx_bpf_dsq_move_to_local(queue: u64) -> bool;
    pub fn scx_bpf_dsq_nr_queued(queue: u64) -> i32;
    pub fn scx_bpf_kick_cpu(cpu: i32, flags: u64);
    pub fn scx_bpf_task_cpu(task: Task) -> i32;
    pub fn scx_bpf_reenqueue_local() -> u32;
    pub fn bpf_iter_scx_dsq_new(iterator: *mut Queued, queue: u64, flags: u64) -> i32;
    pub fn bpf_iter_scx_dsq_next(iterator: *mut Queued) -> Task;
    pub fn bpf_iter_scx_dsq_destroy(iterator: *mut Queued);

    // Maps.
    pub static MACHINES: u8;
    pub static HOST: u8;
    pub static PROGRESS: u8;
    pub static RUNS: u8;
    pub static TIMER: u8;
    pub static ENDED: u8;
    /// The ledger's.
    pub static ACCOUNTS: u8;

    // Numbers.
    pub static SCX_DSQ_LOCAL: u8;
    pub static SCX_ENQ_LAST: u8;
    pub static SCX_ENQ_WAKEUP: u8;
    pub static SCX_KICK_IDLE: u8;
    pub static SCX_KICK_PREEMPT: u8;
    pub static TASK_TGID: u8;
    pub static TASK_STATIC_PRIO: u8;
    pub static TASK_CPUS_PTR: u8;
    pub static TASK_CPU_TIME: u8;
    pub static TASK_VTIME: u8;
    pub static EXIT_KIND: u8;
    pub static EXIT_REASON: u8;
    pub static EXIT_MESSAGE: u8;
}

/// The number that a symbol stands for.
macro_rules! number {
    ($symbol:ident) => {
        &raw const $crate::kernel::$symbol as u64
    };
}

/// A map, as helpers take it.
macro_rules! map {
    ($symbol:ident) => {
        (&raw const $crate::kernel::$symbol).cast_mut().cast()
    };
}

pub(crate) use {map, number};
