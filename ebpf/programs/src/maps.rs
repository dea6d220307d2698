//! The maps, and who is charged.

use aya_ebpf::{
    helpers::bpf_get_current_cgroup_id,
    macros::map,
    maps::{Array, HashMap, LruHashMap, PerCpuArray},
};
use stoker_ebpf_types::{Lost, Owner, Process, Resident, Running, Subject, Task, Times};

// The loader sets the number of entries of all but RUNNING and LOST.

/// Cgroup id to the subject that it is charged to. A cgroup that is not here is not counted.
#[map]
pub static CGROUPS: HashMap<u64, Subject> = HashMap::with_max_entries(1, 0);

/// Who has each slot. User space alone reads and writes it.
#[map]
pub static OWNERS: Array<Owner> = Array::with_max_entries(1, 0);

/// CPU times by slot.
#[map]
pub static TIMES: PerCpuArray<Times> = PerCpuArray::with_max_entries(1, 0);

/// Resident memory by slot.
#[map]
pub static RESIDENT: Array<Resident> = Array::with_max_entries(1, 0);

/// The thread on each CPU.
#[map]
pub static RUNNING: PerCpuArray<Running> = PerCpuArray::with_max_entries(1, 0);

/// Threads of subjects, by the address of their `task_struct`.
#[map]
pub static TASKS: HashMap<u64, Task> = HashMap::with_max_entries(1, 0);

/// CPU time in ns, by the same, with which other CPUs charged threads of which was not known whose they are. Each goes when its
/// thread leaves its CPU, but for some of the kernel's own: those make way for others.
#[map]
pub static UNCHARGED: LruHashMap<u64, u64> = LruHashMap::with_max_entries(1, 0);

/// Address spaces of subjects, by `mm_id`.
#[map]
pub static PROCESSES: HashMap<u32, Process> = HashMap::with_max_entries(1, 0);

/// What found no room.
#[map]
pub static LOST: PerCpuArray<Lost> = PerCpuArray::with_max_entries(1, 0);

/// The cgroup of the current thread.
#[inline(always)]
pub fn current_cgroup() -> u64 {
    // SAFETY: the helper takes nothing and has no precondition.
    unsafe { bpf_get_current_cgroup_id() }
}

/// The subject that a cgroup's use is charged to; `None` where it is not counted.
#[inline(always)]
pub fn subject_of(cgroup: u64) -> Option<Subject> {
    let subject = CGROUPS.get_ptr(cgroup)?;
    // SAFETY: the verifier holds the element alive; volatile keeps the order, so that the id is read last: see
    // `Subject::cgroup`.
    let subject = unsafe {
        Subject {
            slot: (&raw const (*subject).slot).read_volatile(),
            generation: (&raw const (*subject).generation).read_volatile(),
            cgroup: (&raw const (*subject).cgroup).read_volatile(),
        }
    };
    (subject.cgroup == cgroup).then_some(subject)
}

/// Counts what found no room.
#[inline(always)]
pub fn lost(add: impl FnOnce(&mut Lost)) {
    if let Some(lost) = LOST.get_ptr_mut(0) {
        // SAFETY: an element of a per-CPU array is this CPU's alone, and programs are not preempted; an interrupt
        // that counts in the middle costs one count of a diagnostic.
        add(unsafe { &mut *lost });
    }
}
