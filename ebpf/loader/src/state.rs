//! Which subjects there are, and their places in the maps. All of it is in the maps too, for the process that goes on with
//! them.

use std::collections::{HashMap, HashSet};

use aya::maps::{MapError, PerCpuValues};
use stoker_ebpf_types::{Owner, Resident, Times};

use crate::cgroup::CgroupId;
use crate::error::{ENOENT, LedgerError, reading, writing};
use crate::ledger::Usage;
use crate::objects::Maps;
use crate::running::OnCpus;
use crate::slots::{Place, Slot, Slots};

/// What user space alone changes.
pub(crate) struct State {
    pub(crate) maps: Maps,
    slots: Slots,
    pub(crate) subjects: HashMap<CgroupId, Counted>,
    /// The cgroups of all of them. Those in the maps may be fewer, where a removal failed half-way.
    cgroups: HashSet<CgroupId>,
}

/// A subject.
#[derive(Clone, Debug)]
pub(crate) struct Counted {
    pub(crate) slot: Slot,
    /// All that count towards it; its own first.
    pub(crate) cgroups: Vec<CgroupId>,
    /// The most CPU time in ns that [`crate::Ledger::read_one`] has told before it was in the sums: it never tells less
    /// than before.
    pub(crate) told_ns: u64,
    /// What earlier programs counted, which is not in the sums.
    pub(crate) earlier: Time,
}

/// What a subject's threads have used of CPUs, in ns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Time {
    pub(crate) cpu_ns: u64,
    pub(crate) wait_ns: u64,
}

// === impl State ===

impl State {
    /// Of maps that are new.
    pub(crate) fn new(maps: Maps) -> Self {
        Self {
            slots: Slots::new(maps.owners.len()),
            maps,
            subjects: HashMap::new(),
            cgroups: HashSet::new(),
        }
    }

    /// Of maps that another process has left, at any moment: a subject of which it had not said that it was added, or
    /// removed, is there, with what it used so far, or is not.
    pub(crate) fn resume(maps: Maps) -> Result<Self, LedgerError> {
        let mut state = Self::new(maps);
        let mut places = Vec::new();
        let mut ids = HashMap::new();
        for index in 0..state.maps.owners.len() {
            let owner = state.maps.owners.get(&index, 0).map_err(reading("OWNERS"))?;
            let slot = Slot {
                index,
                generation: owner.subject.generation,
            };
            // Places are used in order: neither this nor those behind it have had an owner.
            if slot.generation == 0 {
                break;
            }
            let taken = owner.subject.cgroup != 0;
            // What was cut short before its sums were set, or after they were cleared, was not added, or is removed.
            let counted = taken && state.is_counted(slot)?;
            if counted {
                let id = CgroupId::from(owner.subject.cgroup);
                ids.insert(slot, id);
                let counted = Counted {
                    slot,
                    cgroups: vec![id],
                    told_ns: owner.told_ns,
                    earlier: Time {
                        cpu_ns: owner.earlier_cpu_ns,
                        wait_ns: owner.earlier_wait_ns,
                    },
                };
                state.insert(id, counted);
            } else if taken {
                state.end(slot)?;
            }
            places.push(Place {
                last: slot.generation,
                taken: counted,
            });
        }
        state.slots = Slots::resume(state.maps.owners.len(), &places);
        let mut undirected: HashSet<CgroupId> = state.subjects.keys().copied().collect();
        let directed: Result<Vec<_>, MapError> = state.maps.cgroups.iter().collect();
        for (cgroup, subject) in directed.map_err(reading("CGROUPS"))? {
            let cgroup = CgroupId::from(cgroup);
            match ids.get(&Slot::from(subject)) {
                Some(id) if *id == cgroup => {
                    undirected.remove(&cgroup);
                }
                Some(&id) => state.insert_cgroup(id, cgroup),
                None => state.undirect(cgroup)?,
            }
        }
        for id in undirected {
            let slot = state.subject(id)?.slot;
            state.direct(id, slot)?;
        }
        Ok(state)
    }

    pub(crate) fn subject(&self, subject: CgroupId) -> Result<&Counted, LedgerError> {
        self.subjects.get(&subject).ok_or(LedgerError::Unknown(subject))
    }

    /// Whether a cgroup may be directed to a subject.
    pub(crate) fn check(&self, cgroup: CgroupId) -> Result<(), LedgerError> {
        if !cgroup.is_countable() {
            return Err(LedgerError::Root(cgroup));
        }
        if self.cgroups.contains(&cgroup) {
            return Err(LedgerError::Known(cgroup));
        }
        Ok(())
    }

    /// There is a subject from now on, with its cgroups.
    pub(crate) fn insert(&mut self, id: CgroupId, counted: Counted) {
        self.cgroups.extend(&counted.cgroups);
        self.subjects.insert(id, counted);
    }

    /// One more cgroup is a subject's.
    pub(crate) fn insert_cgroup(&mut self, id: CgroupId, cgroup: CgroupId) {
        if let Some(counted) = self.subjects.get_mut(&id) {
            counted.cgroups.push(cgroup);
            self.cgroups.insert(cgroup);
        }
    }

    /// A subject, and what is its, is no more.
    pub(crate) fn remove(&mut self, id: CgroupId) {
        for cgroup in self
            .subjects
            .remove(&id)
            .into_iter()
            .flat_map(|counted| counted.cgroups)
        {
            self.cgroups.remove(&cgroup);
        }
    }

    pub(crate) fn take(&mut self) -> Result<Slot, LedgerError> {
        self.slots.take().ok_or(LedgerError::Full {
            subjects: self.slots.size(),
        })
    }

    pub(crate) fn give_back(&mut self, slot: Slot) {
        self.slots.give_back(slot);
    }

    /// Makes a subject the owner of a slot, with sums of zero. Its cgroups are to be directed to it yet.
    pub(crate) fn begin(&mut self, id: CgroupId, counted: &Counted, peak_bytes: i64) -> Result<(), LedgerError> {
        self.set_owner(id, counted)?;
        let resident = Resident {
            peak_bytes,
            generation: counted.slot.generation.into(),
            ..Resident::default()
        };
        self.set_sums(counted.slot, resident)
    }

    /// Makes a slot nobody's. No cgroup may be directed to it any more.
    pub(crate) fn end(&mut self, slot: Slot) -> Result<(), LedgerError> {
        // Processes that live on keep the generation, and with it lose their say.
        self.set_sums(slot, Resident::default())?;
        let free = Owner {
            subject: slot.subject(0),
            ..Owner::default()
        };
        self.maps.owners.set(slot.index, free, 0).map_err(writing("OWNERS"))
    }

    /// Notes in its map what is known of a subject.
    fn set_owner(&mut self, id: CgroupId, counted: &Counted) -> Result<(), LedgerError> {
        let owner = Owner {
            subject: counted.slot.subject(id.get()),
            told_ns: counted.told_ns,
            earlier_cpu_ns: counted.earlier.cpu_ns,
            earlier_wait_ns: counted.earlier.wait_ns,
        };
        let index = counted.slot.index;
        self.maps.owners.set(index, owner, 0).map_err(writing("OWNERS"))
    }

    /// Notes how much CPU time of a subject is told though it is not in the sums yet, in ns.
    pub(crate) fn tell(&mut self, id: CgroupId, told_ns: u64) -> Result<(), LedgerError> {
        self.change(id, |counted| counted.told_ns = told_ns.max(counted.told_ns))
    }

    /// Notes what earlier programs counted of a subject.
    pub(crate) fn set_earlier(&mut self, id: CgroupId, earlier: Time) -> Result<(), LedgerError> {
        self.change(id, |counted| counted.earlier = earlier)
    }

    fn change(&mut self, id: CgroupId, change: impl FnOnce(&mut Counted)) -> Result<(), LedgerError> {
        let counted = self.subjects.get_mut(&id).ok_or(LedgerError::Unknown(id))?;
        change(counted);
        let counted = counted.clone();
        self.set_owner(id, &counted)
    }

    /// Charges a cgroup's threads to a slot from now on, with the time since what runs was charged last.
    pub(crate) fn direct(&mut self, cgroup: CgroupId, slot: Slot) -> Result<(), LedgerError> {
        let cgroups = &mut self.maps.cgroups;
        cgroups
            .insert(cgroup.get(), slot.subject(cgroup.get()), 0)
            .map_err(writing("CGROUPS"))
    }

    /// Charges a cgroup's threads to nobody, but for those that run and were charged before.
    pub(crate) fn undirect(&mut self, cgroup: CgroupId) -> Result<(), LedgerError> {
        match self.maps.cgroups.remove(&cgroup.get()) {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            // Gone already, by an earlier try.
            Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(ENOENT) => Ok(()),
            Err(source) => Err(writing("CGROUPS")(source)),
        }
    }

    /// What each CPU runs.
    pub(crate) fn running(&self) -> Result<OnCpus, LedgerError> {
        let read = || self.maps.running.get(&0, 0).map(|running| running.to_vec());
        OnCpus::read(read).map_err(reading("RUNNING"))
    }

    /// The same, where it is also known since when the threads of one subject are not charged.
    pub(crate) fn running_of(&self, slot: Slot) -> Result<OnCpus, LedgerError> {
        let mut running = self.running()?;
        for cpu in running.of_mut(slot) {
            match self.maps.tasks.get(&cpu.thread, 0) {
                Ok(task) => cpu.since_ns = cpu.since_ns.max(task.waits),
                // It ended, or there was no room for it.
                Err(MapError::KeyNotFound) => {}
                Err(source) => return Err(reading("TASKS")(source)),
            }
        }
        Ok(running)
    }

    /// What a subject used but for what runs.
    pub(crate) fn usage(&self, counted: &Counted) -> Result<Usage, LedgerError> {
        let times = self.times(counted)?;
        let resident = self.resident(counted.slot)?;
        // Events that cross on two CPUs may leave a sum a few pages below zero for a moment.
        let bytes = |bytes: i64| u64::try_from(bytes).unwrap_or(0);
        Ok(Usage {
            cpu_ns: times.cpu_ns,
            wait_ns: times.wait_ns,
            memory_bytes: bytes(resident.bytes),
            memory_peak_bytes: bytes(resident.peak_bytes.max(resident.bytes)),
        })
    }

    /// What a subject used but for what runs; not less than was told of it before.
    pub(crate) fn told(&self, id: CgroupId) -> Result<Usage, LedgerError> {
        let counted = self.subject(id)?;
        let usage = self.usage(counted)?;
        Ok(Usage {
            cpu_ns: usage.cpu_ns.max(counted.told_ns),
            ..usage
        })
    }

    /// The sums over all CPUs.
    pub(crate) fn times(&self, counted: &Counted) -> Result<Time, LedgerError> {
        let times = self.times_by_cpu(counted.slot)?;
        Ok(times.iter().fold(counted.earlier, |sum, cpu| Time {
            cpu_ns: sum.cpu_ns + cpu.cpu_ns,
            wait_ns: sum.wait_ns + cpu.wait_ns,
        }))
    }

    pub(crate) fn resident(&self, slot: Slot) -> Result<Resident, LedgerError> {
        self.maps.resident.get(&slot.index, 0).map_err(reading("RESIDENT"))
    }

    /// Whether a slot's sums are those of this owner.
    fn is_counted(&self, slot: Slot) -> Result<bool, LedgerError> {
        let generation = u64::from(slot.generation);
        let times = self.times_by_cpu(slot)?;
        Ok(times.iter().all(|cpu| cpu.generation == generation) && self.resident(slot)?.generation == generation)
    }

    fn times_by_cpu(&self, slot: Slot) -> Result<PerCpuValues<Times>, LedgerError> {
        self.maps.times.get(&slot.index, 0).map_err(reading("TIMES"))
    }

    /// Sets a slot's times to zero and its memory to this, for the owner of this generation or for nobody (0).
    fn set_sums(&mut self, slot: Slot, resident: Resident) -> Result<(), LedgerError> {
        let cpus = aya::util::nr_cpus().map_err(|(path, source)| LedgerError::Cpus { path, source })?;
        let times = Times {
            generation: resident.generation,
            ..Times::default()
        };
        let times =
            PerCpuValues::try_from(vec![times; cpus]).map_err(|source| writing("TIMES")(MapError::IoError(source)))?;
        self.maps.times.set(slot.index, times, 0).map_err(writing("TIMES"))?;
        self.maps
            .resident
            .set(slot.index, resident, 0)
            .map_err(writing("RESIDENT"))
    }
}

// === impl Counted ===

impl Counted {
    /// One that is new and has used nothing.
    pub(crate) fn new(id: CgroupId, slot: Slot) -> Self {
        Self {
            slot,
            cgroups: vec![id],
            told_ns: 0,
            earlier: Time::default(),
        }
    }
}
