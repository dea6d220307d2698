//! The ledger: subjects, and what they used.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use aya::maps::{Array, HashMap as BpfHashMap, MapData, MapError, PerCpuArray, PerCpuValues};
use aya::programs::{RawTracePoint, RawTracePointRunOptions, TestRun, TracePoint};
use aya::{Ebpf, EbpfLoader};
use stoker_ebpf_types::{Lost, Resident, Running, Subject, Times};

use crate::cgroup::CgroupId;
use crate::cost::{Measuring, ProgramCost};
use crate::error::{LedgerError, LoadError, errno};
use crate::running::{self, OnCpus};
use crate::slots::{Slot, Slots};
use crate::tracepoint;

/// The compiled programs.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("STOKER_EBPF_OBJECT"));

const EPERM: i32 = 1;
const ENOENT: i32 = 2;
/// What the kernel says when told to run something on a CPU that has gone offline.
const ENXIO: i32 = 6;

/// Raw tracepoints, each the name of its program too.
const RAW: [(&str, &str); 3] = [
    ("sched_wakeup", "sched:sched_wakeup"),
    ("sched_wakeup_new", "sched:sched_wakeup_new"),
    ("sched_switch", "sched:sched_switch"),
];
const RSS_STAT: &str = "rss_stat";
const SETTLE: &str = "settle";

/// How often a subject's sums are read beside what runs, where its threads come and go meanwhile.
const TRIES: u32 = 3;

/// How much a ledger has room for. Its memory is taken when it is loaded: about 100 bytes for each thread, process and
/// cgroup, and for each subject 24 bytes and 24 more a CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Subjects at a time.
    pub subjects: u32,
    /// Cgroups of all subjects.
    pub cgroups: u32,
    /// Threads of all subjects, for the time that they wait.
    pub tasks: u32,
    /// Processes of all subjects, for their memory.
    pub processes: u32,
}

impl Limits {
    /// For a host full of machines.
    pub const HOST: Self = Self {
        subjects: 16_384,
        cgroups: 49_152,
        tasks: 131_072,
        processes: 32_768,
    };

    /// For the containers in a guest: about 1 MiB.
    pub const GUEST: Self = Self {
        subjects: 512,
        cgroups: 1024,
        tasks: 8192,
        processes: 4096,
    };
}

/// What a subject has used since it was added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// CPU time in ns.
    pub cpu_ns: u64,
    /// Time in ns that its threads were runnable and waited for a CPU.
    pub wait_ns: u64,
    /// Resident memory now, in bytes.
    pub memory_bytes: u64,
    /// The most resident memory so far, in bytes.
    pub memory_peak_bytes: u64,
}

/// Counts what subjects use, as long as it lives. Safe to share between threads; each call takes some microseconds,
/// and [`Ledger::read`] about one for each subject and CPU.
pub struct Ledger {
    // Holds the programs and their links: dropping it stops the count.
    ebpf: Ebpf,
    state: Mutex<State>,
}

/// What user space alone changes.
struct State {
    cgroups: BpfHashMap<MapData, u64, Subject>,
    times: PerCpuArray<MapData, Times>,
    resident: Array<MapData, Resident>,
    running: PerCpuArray<MapData, Running>,
    lost: PerCpuArray<MapData, Lost>,
    slots: Slots,
    subjects: HashMap<CgroupId, Counted>,
}

struct Counted {
    slot: Slot,
    /// All that count towards it; its own first.
    cgroups: Vec<CgroupId>,
    /// The most CPU time that [`Ledger::read_one`] has told, in ns: it never tells less than before.
    told_ns: u64,
}

// === impl Ledger ===

impl Ledger {
    /// Loads the programs and starts to count; nothing is counted before a subject is added.
    ///
    /// # Errors
    ///
    /// Where rights are missing or the kernel lacks something; the message says what to do.
    pub fn load(limits: Limits) -> Result<Self, LoadError> {
        let fields = tracepoint::rss_stat()?;
        let mut ebpf = EbpfLoader::new()
            // Nothing here needs the kernel's types, and to parse them takes longer than all else.
            .btf(None)
            .map_max_entries("CGROUPS", limits.cgroups)
            .map_max_entries("TIMES", limits.subjects)
            .map_max_entries("RESIDENT", limits.subjects)
            .map_max_entries("TASKS", limits.tasks)
            .map_max_entries("PROCESSES", limits.processes)
            .override_global("RSS_STAT", &fields, true)
            .load(OBJECT)
            .map_err(refused)?;
        let state = State {
            cgroups: take(&mut ebpf, "CGROUPS", BpfHashMap::try_from)?,
            times: take(&mut ebpf, "TIMES", PerCpuArray::try_from)?,
            resident: take(&mut ebpf, "RESIDENT", Array::try_from)?,
            running: take(&mut ebpf, "RUNNING", PerCpuArray::try_from)?,
            lost: take(&mut ebpf, "LOST", PerCpuArray::try_from)?,
            slots: Slots::new(limits.subjects),
            subjects: HashMap::new(),
        };
        raw(&mut ebpf, SETTLE)?.load().map_err(refused)?;
        for (program, name) in RAW {
            let raw = raw(&mut ebpf, program)?;
            raw.load().map_err(refused)?;
            raw.attach(program).map_err(|source| attach_failed(name, source))?;
        }
        let rss_stat: &mut TracePoint = ebpf
            .program_mut(RSS_STAT)
            .ok_or(LoadError::Part(RSS_STAT))?
            .try_into()
            .map_err(refused)?;
        rss_stat.load().map_err(refused)?;
        rss_stat
            .attach("kmem", RSS_STAT)
            .map_err(|source| attach_failed("kmem:rss_stat", source))?;
        let ledger = Self {
            ebpf,
            state: Mutex::new(state),
        };
        // From now on each CPU knows since when what it runs runs.
        ledger.settle(&ledger.lock()).map_err(LoadError::Start)?;
        Ok(ledger)
    }

    /// Begins to count what the threads of this cgroup use, from now on and from zero.
    ///
    /// # Errors
    ///
    /// Where it is the root cgroup or is counted already, where all places are taken, or where the kernel refuses.
    pub fn add(&self, subject: CgroupId) -> Result<(), LedgerError> {
        let mut state = self.lock();
        let state = &mut *state;
        let slot = state.slots.take().ok_or(LedgerError::Full {
            subjects: state.slots.size(),
        })?;
        let added = state
            .clear(slot, slot.generation.into())
            .and_then(|()| self.direct(state, subject, slot));
        if let Err(error) = added {
            state.slots.give_back(slot);
            return Err(error);
        }
        let cgroups = vec![subject];
        let told_ns = 0;
        state.subjects.insert(subject, Counted { slot, cgroups, told_ns });
        Ok(())
    }

    /// Lets one more cgroup count towards a subject, from now on: threads of child cgroups are not their parent's.
    ///
    /// # Errors
    ///
    /// As [`Ledger::add`], and where `subject` is unknown.
    pub fn add_cgroup(&self, subject: CgroupId, cgroup: CgroupId) -> Result<(), LedgerError> {
        let mut state = self.lock();
        let slot = state.subject(subject)?.slot;
        self.direct(&mut state, cgroup, slot)?;
        if let Some(subject) = state.subjects.get_mut(&subject) {
            subject.cgroups.push(cgroup);
        }
        Ok(())
    }

    /// Ends the count of a subject and returns all that it used.
    ///
    /// # Errors
    ///
    /// Where it is unknown or the kernel refuses; in the latter case it may be tried again.
    pub fn remove(&self, subject: CgroupId) -> Result<Usage, LedgerError> {
        let mut state = self.lock();
        let state = &mut *state;
        state.subject(subject)?;
        self.settle(state)?;
        let Some(known) = state.subjects.get(&subject) else {
            return Err(LedgerError::Unknown(subject));
        };
        for cgroup in &known.cgroups {
            match state.cgroups.remove(&cgroup.get()) {
                Ok(()) | Err(MapError::KeyNotFound) => {}
                // Gone already, by an earlier try.
                Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(ENOENT) => {}
                Err(source) => {
                    return Err(LedgerError::Map {
                        doing: "writing",
                        map: "CGROUPS",
                        source,
                    });
                }
            }
        }
        let slot = known.slot;
        // A CPU may be in the middle of charging this slot. It does so with interrupts off, so once each has answered
        // none is, and none will be: the slot may have another owner.
        self.settle(state)?;
        let usage = state.usage(slot)?;
        // Processes that live on keep the generation, and with it lose their say.
        state.clear(slot, 0)?;
        state.subjects.remove(&subject);
        state.slots.give_back(slot);
        Ok(usage)
    }

    /// What each subject has used up to now.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn read(&self) -> Result<HashMap<CgroupId, Usage>, LedgerError> {
        let state = self.lock();
        self.settle(&state)?;
        state
            .subjects
            .iter()
            .map(|(&id, subject)| Ok((id, state.usage(subject.slot)?)))
            .collect()
    }

    /// What one subject has used up to now. It interrupts only CPUs that run a thread of which is not known whose it is: none
    /// where the subject sleeps or its threads have run before, whoever else is busy. A thread that came from another
    /// subject's cgroup is charged when it leaves its CPU.
    ///
    /// # Errors
    ///
    /// Where it is unknown or the kernel refuses.
    pub fn read_one(&self, subject: CgroupId) -> Result<Usage, LedgerError> {
        let mut state = self.lock();
        let slot = state.subject(subject)?.slot;
        let mut running = state.running()?;
        // One that is offline is refused, and passed over.
        for cpu in running.unknown() {
            self.settle_cpu(cpu)?;
        }
        // What runs is charged when it leaves its CPU. Until then its time is what it has had since it came, where it is seen
        // not to have left while the sums were read.
        let mut tries = 0;
        let mut usage = loop {
            let usage = state.usage(slot)?;
            if !running.runs(slot) {
                break usage;
            }
            let now_ns = running::now_ns().map_err(LedgerError::Clock)?;
            let after = state.running()?;
            if let Some(uncharged) = running.uncharged(&after, slot, now_ns) {
                break Usage {
                    cpu_ns: usage.cpu_ns + uncharged.cpu_ns,
                    wait_ns: usage.wait_ns + uncharged.wait_ns,
                    ..usage
                };
            }
            tries += 1;
            if tries == TRIES {
                self.settle(&state)?;
                break state.usage(slot)?;
            }
            running = after;
        };
        // The switch to a thread that takes a CPU at once is charged from its wake-up, a little before now.
        if let Some(counted) = state.subjects.get_mut(&subject) {
            counted.told_ns = usage.cpu_ns.max(counted.told_ns);
            usage.cpu_ns = counted.told_ns;
        }
        Ok(usage)
    }

    /// What went uncounted since a map was full.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn lost(&self) -> Result<Lost, LedgerError> {
        let state = self.lock();
        let lost = state.lost.get(&0, 0).map_err(|source| LedgerError::Map {
            doing: "reading",
            map: "LOST",
            source,
        })?;
        Ok(lost.iter().fold(Lost::default(), |sum, cpu| Lost {
            tasks: sum.tasks + cpu.tasks,
            processes: sum.processes + cpu.processes,
        }))
    }

    /// Lets the kernel measure the programs until the result is dropped. It does so for all programs of the system.
    ///
    /// # Errors
    ///
    /// Where rights are missing.
    pub fn measure(&self) -> Result<Measuring, LedgerError> {
        let enabled =
            aya::sys::enable_stats(aya::sys::Stats::RunTime).map_err(|source| LedgerError::Cost(source.into()))?;
        Ok(Measuring { _enabled: enabled })
    }

    /// What each program has cost, as far as it was [measured](Ledger::measure).
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn cost(&self) -> Result<Vec<ProgramCost>, LedgerError> {
        RAW.iter()
            .map(|(program, _)| *program)
            .chain([RSS_STAT, SETTLE])
            .filter_map(|name| Some((name, self.ebpf.program(name)?)))
            .map(|(program, loaded)| {
                let info = loaded.info().map_err(|source| LedgerError::Cost(source.into()))?;
                Ok(ProgramCost {
                    program,
                    runs: info.run_count(),
                    run_time: info.run_time(),
                })
            })
            .collect()
    }

    /// Charges what runs on each CPU up to now. The lock keeps two from charging the same CPU at once.
    fn settle(&self, _: &State) -> Result<(), LedgerError> {
        let cpus = aya::util::online_cpus().map_err(|(path, source)| LedgerError::Cpus { path, source })?;
        cpus.into_iter().try_for_each(|cpu| self.settle_cpu(cpu))
    }

    fn settle_cpu(&self, cpu: u32) -> Result<(), LedgerError> {
        let Some(settle) = self
            .ebpf
            .program(SETTLE)
            .and_then(|program| <&RawTracePoint>::try_from(program).ok())
        else {
            return Ok(());
        };
        let options = RawTracePointRunOptions {
            cpu: Some(cpu),
            ..RawTracePointRunOptions::new()
        };
        match settle.test_run(options) {
            Ok(_) => Ok(()),
            // Nothing runs on a CPU that went offline.
            Err(error) if errno(&error) == Some(ENXIO) => Ok(()),
            Err(source) => {
                let source = Box::new(source);
                Err(LedgerError::Settle { cpu, source })
            }
        }
    }

    /// Makes a cgroup count towards a slot, from now on.
    fn direct(&self, state: &mut State, cgroup: CgroupId, slot: Slot) -> Result<(), LedgerError> {
        if !cgroup.is_countable() {
            return Err(LedgerError::Root(cgroup));
        }
        if state.subjects.values().any(|subject| subject.cgroups.contains(&cgroup)) {
            return Err(LedgerError::Known(cgroup));
        }
        // What its threads that run now ran before is not this subject's.
        self.settle(state)?;
        let target = Subject {
            slot: slot.index,
            generation: slot.generation,
            cgroup: cgroup.get(),
        };
        state
            .cgroups
            .insert(cgroup.get(), target, 0)
            .map_err(|source| LedgerError::Map {
                doing: "writing",
                map: "CGROUPS",
                source,
            })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No step leaves the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ledger")
            .field("subjects", &self.lock().subjects.len())
            .finish_non_exhaustive()
    }
}

// === impl State ===

impl State {
    fn running(&self) -> Result<OnCpus, LedgerError> {
        let read = || self.running.get(&0, 0).map(|running| running.to_vec());
        OnCpus::read(read).map_err(|source| LedgerError::Map {
            doing: "reading",
            map: "RUNNING",
            source,
        })
    }

    fn subject(&self, subject: CgroupId) -> Result<&Counted, LedgerError> {
        self.subjects.get(&subject).ok_or(LedgerError::Unknown(subject))
    }

    /// Sets a slot's sums to zero, for the owner of this generation or for nobody (0).
    fn clear(&mut self, slot: Slot, generation: u64) -> Result<(), LedgerError> {
        let failed = |map| {
            move |source| LedgerError::Map {
                doing: "writing",
                map,
                source,
            }
        };
        let cpus = aya::util::nr_cpus().map_err(|(path, source)| LedgerError::Cpus { path, source })?;
        let times = Times {
            generation,
            ..Times::default()
        };
        let times =
            PerCpuValues::try_from(vec![times; cpus]).map_err(|source| failed("TIMES")(MapError::IoError(source)))?;
        self.times.set(slot.index, times, 0).map_err(failed("TIMES"))?;
        let resident = Resident {
            generation,
            ..Resident::default()
        };
        self.resident.set(slot.index, resident, 0).map_err(failed("RESIDENT"))
    }

    fn usage(&self, slot: Slot) -> Result<Usage, LedgerError> {
        let failed = |map| {
            move |source| LedgerError::Map {
                doing: "reading",
                map,
                source,
            }
        };
        let times = self.times.get(&slot.index, 0).map_err(failed("TIMES"))?;
        let resident = self.resident.get(&slot.index, 0).map_err(failed("RESIDENT"))?;
        // Events that cross on two CPUs may leave a sum a few pages below zero for a moment.
        let bytes = |bytes: i64| u64::try_from(bytes).unwrap_or(0);
        Ok(Usage {
            cpu_ns: times.iter().map(|cpu| cpu.cpu_ns).sum(),
            wait_ns: times.iter().map(|cpu| cpu.wait_ns).sum(),
            memory_bytes: bytes(resident.bytes),
            memory_peak_bytes: bytes(resident.peak_bytes.max(resident.bytes)),
        })
    }
}

// === helpers of load ===

fn take<T>(
    ebpf: &mut Ebpf,
    name: &'static str,
    typed: impl FnOnce(aya::maps::Map) -> Result<T, MapError>,
) -> Result<T, LoadError> {
    let map = ebpf.take_map(name).ok_or(LoadError::Part(name))?;
    typed(map).map_err(refused)
}

fn raw<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut RawTracePoint, LoadError> {
    ebpf.program_mut(name)
        .ok_or(LoadError::Part(name))?
        .try_into()
        .map_err(refused)
}

fn refused(error: impl std::error::Error + Send + Sync + 'static) -> LoadError {
    if errno(&error) == Some(EPERM) {
        LoadError::Permission(error.into())
    } else {
        LoadError::Object(error.into())
    }
}

fn attach_failed(name: &'static str, source: aya::programs::ProgramError) -> LoadError {
    match errno(&source) {
        Some(EPERM) => LoadError::Permission(source.into()),
        Some(ENOENT) => LoadError::NoTracepoint {
            name,
            source: std::io::Error::from_raw_os_error(ENOENT),
        },
        _ => LoadError::Attach {
            name,
            source: Box::new(source),
        },
    }
}
