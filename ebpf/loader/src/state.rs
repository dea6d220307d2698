//! Which subjects there are, and their places in the maps. All of it is in the maps too, for the process that goes on with
//! them.

use std::collections::{HashMap, HashSet};

use aya::maps::{MapError, PerCpuValues};
use stoker_ebpf_types::{Owner, Resident, Subject, Times};

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
}

/// A subject.
pub(crate) struct Counted {
    pub(crate) slot: Slot,
    /// All that count towards it; its own first.
    pub(crate) cgroups: Vec<CgroupId>,
    /// The most CPU time in ns that [`crate::Ledger::read_one`] has told before it was in the sums: it never tells less
    /// than before.
    pub(crate) told_ns: u64,
}

// === impl State ===

impl State {
    /// Of maps that are new.
    pub(crate) fn new(maps: Maps) -> Self {
        Self {
            slots: Slots::new(maps.owners.len()),
            maps,
            subjects: HashMap::new(),
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
            let taken = owner.subject.cgroup != 0;
            // What was cut short before its sums were set, or after they were cleared, was not added, or is removed.
            let counted = taken && state.is_counted(slot)?;
            if counted {
                let id = CgroupId::from(owner.subject.cgroup);
                ids.insert(slot, id);
                state.insert(id, slot, vec![id], owner.told_ns);
            } else if taken {
                state.end(slot)?;
            }
            places.push(Place {
                last: slot.generation,
                taken: counted,
            });
        }
        state.slots = Slots::resume(&places);
        let mut undirected: HashSet<CgroupId> = state.subjects.keys().copied().collect();
        let directed: Result<Vec<_>, MapError> = state.maps.cgroups.iter().collect();
        for (cgroup, subject) in directed.map_err(reading("CGROUPS"))? {
            let slot = Slot {
                index: subject.slot,
                generation: subject.generation,
            };
            let cgroup = CgroupId::from(cgroup);
            let id = ids.get(&slot);
            match id.and_then(|id| state.subjects.get_mut(id)) {
                Some(_) if id == Some(&cgroup) => {
                    undirected.remove(&cgroup);
                }
                Some(counted) => counted.cgroups.push(cgroup),
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
        if self.subjects.values().any(|subject| subject.cgroups.contains(&cgroup)) {
            return Err(LedgerError::Known(cgroup));
        }
        Ok(())
    }

    pub(crate) fn take(&mut self) -> Result<Slot, LedgerError> {
        self.slots.take().ok_or(LedgerError::Full {
            subjects: self.slots.size(),
        })
    }

    pub(crate) fn give_back(&mut self, slot: Slot) {
        self.slots.give_back(slot);
    }

    pub(crate) fn insert(&mut self, id: CgroupId, slot: Slot, cgroups: Vec<CgroupId>, told_ns: u64) {
        self.subjects.insert(id, Counted { slot, cgroups, told_ns });
    }

    /// Makes a slot a subject's, with these sums to begin with. Its cgroups are to be directed to it yet.
    pub(crate) fn begin(
        &mut self,
        id: CgroupId,
        slot: Slot,
        times: Times,
        resident: Resident,
        told_ns: u64,
    ) -> Result<(), LedgerError> {
        self.set_owner(slot, id.get(), told_ns)?;
        self.set_sums(slot, slot.generation.into(), times, resident)
    }

    /// Makes a slot nobody's. No cgroup may be directed to it any more.
    pub(crate) fn end(&mut self, slot: Slot) -> Result<(), LedgerError> {
        // Processes that live on keep the generation, and with it lose their say.
        self.set_sums(slot, 0, Times::default(), Resident::default())?;
        self.set_owner(slot, 0, 0)
    }

    /// Notes how much CPU time of a subject is told though it is not in the sums yet, in ns.
    pub(crate) fn tell(&mut self, subject: CgroupId, told_ns: u64) -> Result<(), LedgerError> {
        let counted = self.subjects.get_mut(&subject).ok_or(LedgerError::Unknown(subject))?;
        counted.told_ns = told_ns.max(counted.told_ns);
        let (slot, told_ns) = (counted.slot, counted.told_ns);
        self.set_owner(slot, subject.get(), told_ns)
    }

    /// Charges a cgroup's threads to a slot from now on, with the time since what runs was charged last.
    pub(crate) fn direct(&mut self, cgroup: CgroupId, slot: Slot) -> Result<(), LedgerError> {
        let target = Subject {
            slot: slot.index,
            generation: slot.generation,
            cgroup: cgroup.get(),
        };
        let cgroups = &mut self.maps.cgroups;
        cgroups.insert(cgroup.get(), target, 0).map_err(writing("CGROUPS"))
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

    pub(crate) fn running(&self) -> Result<OnCpus, LedgerError> {
        let read = || self.maps.running.get(&0, 0).map(|running| running.to_vec());
        OnCpus::read(read).map_err(reading("RUNNING"))
    }

    pub(crate) fn usage(&self, slot: Slot) -> Result<Usage, LedgerError> {
        let times = self.times(slot)?;
        let resident = self.resident(slot)?;
        // Events that cross on two CPUs may leave a sum a few pages below zero for a moment.
        let bytes = |bytes: i64| u64::try_from(bytes).unwrap_or(0);
        Ok(Usage {
            cpu_ns: times.cpu_ns,
            wait_ns: times.wait_ns,
            memory_bytes: bytes(resident.bytes),
            memory_peak_bytes: bytes(resident.peak_bytes.max(resident.bytes)),
        })
    }

    /// The sum over all CPUs.
    pub(crate) fn times(&self, slot: Slot) -> Result<Times, LedgerError> {
        let times = self.maps.times.get(&slot.index, 0).map_err(reading("TIMES"))?;
        Ok(times.iter().fold(Times::default(), |sum, cpu| Times {
            cpu_ns: sum.cpu_ns + cpu.cpu_ns,
            wait_ns: sum.wait_ns + cpu.wait_ns,
            generation: cpu.generation,
        }))
    }

    pub(crate) fn resident(&self, slot: Slot) -> Result<Resident, LedgerError> {
        self.maps.resident.get(&slot.index, 0).map_err(reading("RESIDENT"))
    }

    /// Notes who has a slot: the subject with this cgroup, or nobody (0).
    fn set_owner(&mut self, slot: Slot, cgroup: u64, told_ns: u64) -> Result<(), LedgerError> {
        let owner = Owner {
            subject: Subject {
                slot: slot.index,
                generation: slot.generation,
                cgroup,
            },
            told_ns,
        };
        self.maps.owners.set(slot.index, owner, 0).map_err(writing("OWNERS"))
    }

    /// Whether a slot's sums are those of this owner.
    fn is_counted(&self, slot: Slot) -> Result<bool, LedgerError> {
        let generation = u64::from(slot.generation);
        Ok(self.times(slot)?.generation == generation && self.resident(slot)?.generation == generation)
    }

    /// Sets a slot's sums, for the owner of this generation or for nobody (0).
    fn set_sums(&mut self, slot: Slot, generation: u64, times: Times, resident: Resident) -> Result<(), LedgerError> {
        let cpus = aya::util::nr_cpus().map_err(|(path, source)| LedgerError::Cpus { path, source })?;
        let zero = Times {
            generation,
            ..Times::default()
        };
        let mut values = vec![zero; cpus];
        if let Some(first) = values.first_mut() {
            *first = Times { generation, ..times };
        }
        let values = PerCpuValues::try_from(values).map_err(|source| writing("TIMES")(MapError::IoError(source)))?;
        self.maps.times.set(slot.index, values, 0).map_err(writing("TIMES"))?;
        let resident = Resident { generation, ..resident };
        self.maps
            .resident
            .set(slot.index, resident, 0)
            .map_err(writing("RESIDENT"))
    }
}
