//! The maps, and who is charged.

use aya_ebpf::{
    bindings::BPF_F_MMAPABLE,
    helpers::bpf_get_current_cgroup_id,
    macros::map,
    maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf},
};
use stoker_ebpf_types::{
    AccountEntry, Alarm, Change, EXIT_CODES, Guest, Lost, Owner, Preemption, Process, Resident, Running, Settings,
    Subject, Thread, ThrottleFields, Times, WAYS, WaitFields,
};

// The loader sets the number of entries of all but RUNNING, NEAR, NEAR_COUNT, LOST, CHANGE, RANG and EXIT_REASONS. What can be
// mapped into memory is read there by user space; it begins at a page, so that what fills a cache line lies in one.

/// Cgroup id to whom it is charged to. A cgroup that is not here is not counted.
#[map]
pub static CGROUPS: HashMap<u64, Subject> = HashMap::with_max_entries(1, 0);

/// Who has each slot. User space alone reads and writes it.
#[map]
pub static OWNERS: Array<Owner> = Array::with_max_entries(1, 0);

/// CPU times by part of a slot.
#[map]
pub static TIMES: Array<Times> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Resident memory by slot.
#[map]
pub static RESIDENT: Array<Resident> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Accounts of credits by slot.
#[map]
pub static ACCOUNTS: Array<AccountEntry> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// When user space is told of a container, by slot.
#[map]
pub static ALARMS: Array<Alarm> = Array::with_max_entries(1, 0);

/// Containers whose alarms were due: records of `Rang`.
#[map]
pub static RANG: RingBuf = RingBuf::with_byte_size(4096, 0);

/// What KVM does, by slot.
#[map]
pub static GUESTS: Array<Guest> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// The thread on each CPU.
#[map]
pub static RUNNING: PerCpuArray<Running> = PerCpuArray::with_max_entries(1, 0);

/// The keys of `THREADS`, by set: addresses of `task_struct`, 0 where a place is free.
#[map]
pub static KEYS: Array<[u64; WAYS as usize]> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Threads of subjects, and those of which that is to be found out.
#[map]
pub static THREADS: Array<Thread> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Address spaces of subjects, by `mm_id`.
#[map]
pub static PROCESSES: HashMap<u32, Process> = HashMap::with_max_entries(1, 0);

/// How often a subject's thread that could have run on lost its CPU to another's. Rare pairs make way for others.
#[map]
pub static PREEMPTIONS: LruHashMap<Preemption, u64> = LruHashMap::with_max_entries(1, 0);

/// Accounts that went to another level: records of `Crossed`.
#[map]
pub static CROSSINGS: RingBuf = RingBuf::with_byte_size(4096, 0);

/// Accounts whose level may fall before their threads are charged: records of `Near`.
#[map]
pub static NEAR: RingBuf = RingBuf::with_byte_size(4096, 0);

/// How many such accounts there are.
#[map]
pub static NEAR_COUNT: Array<u64> = Array::with_max_entries(1, 0);

/// What user space wants of an account, and what came of it.
#[map]
pub static CHANGE: Array<Change> = Array::with_max_entries(1, 0);

/// What the codes of exits come to: the numbers of `Exit`, by `exit_index`.
#[map]
pub static EXIT_REASONS: Array<u32> = Array::with_max_entries(EXIT_CODES, 0);

/// What found no room.
#[map]
pub static LOST: PerCpuArray<Lost> = PerCpuArray::with_max_entries(1, 0);

/// Set by the loader.
#[unsafe(no_mangle)]
static SETTINGS: Settings = Settings {
    sets: 1,
    machines: 0,
    uncharged_ns: 0,
    throttle: ThrottleFields {
        cfs_rq: 0,
        throttle_count: 0,
    },
    waits: WaitFields {
        run_delay: 0,
        pcount: 0,
    },
};

// The verifier knows these, and leaves out what is never done. They are constants that the loader may set before the load;
// volatile keeps the compiler from taking them for the defaults.

/// How many sets `THREADS` has.
#[inline(always)]
pub fn sets() -> u32 {
    // SAFETY: a constant.
    unsafe { (&raw const SETTINGS.sets).read_volatile() }
}

/// Whether subjects are machines.
#[inline(always)]
pub fn of_machines() -> bool {
    // SAFETY: a constant.
    unsafe { (&raw const SETTINGS.machines).read_volatile() != 0 }
}

/// For how long the kernel lets a thread run on without charging it; 0 where that is short.
#[inline(always)]
pub fn uncharged_ns() -> u32 {
    // SAFETY: a constant.
    unsafe { (&raw const SETTINGS.uncharged_ns).read_volatile() }
}

/// Where the kernel keeps whether a thread is held back; all 0 where that is not known.
#[inline(always)]
pub fn throttle_fields() -> ThrottleFields {
    // SAFETY: a constant.
    unsafe { (&raw const SETTINGS.throttle).read_volatile() }
}

/// Where the kernel counts how long a thread waits; all 0 where that is not known.
#[inline(always)]
pub fn wait_fields() -> WaitFields {
    // SAFETY: a constant.
    unsafe { (&raw const SETTINGS.waits).read_volatile() }
}

/// The cgroup of the current thread.
#[inline(always)]
pub fn current_cgroup() -> u64 {
    // SAFETY: the helper takes nothing and has no precondition.
    unsafe { bpf_get_current_cgroup_id() }
}

/// Whom a cgroup's use is charged to; `None` where it is not counted.
#[inline(always)]
pub fn subject_of(cgroup: u64) -> Option<Subject> {
    let subject = CGROUPS.get_ptr(cgroup)?;
    // SAFETY: the verifier holds the element alive; volatile keeps the order, so that the id is read last: see
    // `Subject::cgroup`.
    let subject = unsafe {
        Subject {
            place: (&raw const (*subject).place).read_volatile(),
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
