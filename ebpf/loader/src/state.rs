//! Which subjects there are, and their places in the maps. All of it is in the maps too, for the process that goes on with
//! them.

use std::collections::{HashMap, HashSet};
use std::mem::offset_of;

use aya::maps::MapError;
use stoker_ebpf_types::{AccountEntry, Guest, Owner, PARTS, Part, Resident, Thread, Times, WAYS, home_of};

use crate::cgroup::CgroupId;
use crate::error::{ENOENT, LedgerError, reading, writing};
use crate::objects::Maps;
use crate::running::OnCpus;
use crate::slots::{Place, Slot, Slots};
use crate::usage::{Time, Usage};

/// What user space alone changes.
pub(crate) struct State {
    pub(crate) maps: Maps,
    slots: Slots,
    pub(crate) subjects: HashMap<CgroupId, Counted>,
    /// Whose each slot is that has an owner.
    owners: HashMap<Slot, CgroupId>,
    /// The cgroups of all of them. Those in the maps may be fewer, where a removal failed half-way.
    cgroups: HashSet<CgroupId>,
}

/// A subject.
#[derive(Clone, Debug)]
pub(crate) struct Counted {
    pub(crate) slot: Slot,
    /// All that count towards it, and towards which part; its own first.
    pub(crate) cgroups: Vec<(CgroupId, Part)>,
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
            owners: HashMap::new(),
            cgroups: HashSet::new(),
        }
    }

    /// Of maps that another process has left, at any moment: a subject of which it had not said that it was added, or
    /// removed, is there, with what it used so far, or is not.
    pub(crate) fn resume(maps: Maps) -> Result<Self, LedgerError> {
        let mut state = Self::new(maps);
        let mut places = Vec::new();
        for index in 0..state.maps.owners.len() {
            let owner = state.maps.owners.get(&index, 0).map_err(reading("OWNERS"))?;
            // Places are used in order: neither this nor those behind it have had an owner.
            let Some(generation) = u32::try_from(owner.generation).ok().filter(|&of| of != 0) else {
                break;
            };
            let slot = Slot { index, generation };
            let taken = owner.cgroup != 0;
            // What was cut short before its sums were set, or after they were cleared, was not added, or is removed.
            let counted = taken && state.is_counted(slot)?;
            if counted {
                let id = CgroupId::from(owner.cgroup);
                let told_ns = owner.told_ns;
                let counted = Counted {
                    told_ns,
                    ..Counted::new(id, slot)
                };
                state.insert(id, counted);
            } else if taken {
                state.end(slot)?;
            }
            places.push(Place {
                last: generation,
                taken: counted,
            });
        }
        state.slots = Slots::resume(state.maps.owners.len(), &places);
        let mut undirected: HashSet<CgroupId> = state.subjects.keys().copied().collect();
        let directed: Result<Vec<_>, MapError> = state.maps.cgroups.iter().collect();
        for (cgroup, subject) in directed.map_err(reading("CGROUPS"))? {
            let cgroup = CgroupId::from(cgroup);
            match state.owner(Slot::from(subject)) {
                Some(id) if id == cgroup => {
                    undirected.remove(&cgroup);
                }
                Some(id) => {
                    let parts = Part::ALL.into_iter().enumerate();
                    let own = |&(number, _): &(usize, Part)| subject.place % PARTS == number as u32;
                    let (_, part) = parts.into_iter().find(own).unwrap_or((0, Part::Own));
                    state.insert_cgroup(id, cgroup, part);
                }
                None => state.undirect(cgroup)?,
            }
        }
        for id in undirected {
            let slot = state.subject(id)?.slot;
            state.direct(id, slot, Part::Own)?;
        }
        Ok(state)
    }

    pub(crate) fn subject(&self, subject: CgroupId) -> Result<&Counted, LedgerError> {
        self.subjects.get(&subject).ok_or(LedgerError::Unknown(subject))
    }

    /// Whose a slot is, if that one is there still.
    pub(crate) fn owner(&self, slot: Slot) -> Option<CgroupId> {
        self.owners.get(&slot).copied()
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
        self.cgroups.extend(counted.cgroups.iter().map(|(cgroup, _)| cgroup));
        self.owners.insert(counted.slot, id);
        self.subjects.insert(id, counted);
    }

    /// One more cgroup is a subject's.
    pub(crate) fn insert_cgroup(&mut self, id: CgroupId, cgroup: CgroupId, part: Part) {
        if let Some(counted) = self.subjects.get_mut(&id) {
            counted.cgroups.push((cgroup, part));
            self.cgroups.insert(cgroup);
        }
    }

    /// A subject, and what is its, is no more.
    pub(crate) fn remove(&mut self, id: CgroupId) {
        let Some(counted) = self.subjects.remove(&id) else {
            return;
        };
        self.owners.remove(&counted.slot);
        for (cgroup, _) in counted.cgroups {
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
            generation: slot.generation.into(),
            ..Owner::default()
        };
        self.maps.owners.set(slot.index, free, 0).map_err(writing("OWNERS"))
    }

    /// Notes in its map what is known of a subject.
    fn set_owner(&mut self, id: CgroupId, counted: &Counted) -> Result<(), LedgerError> {
        let owner = Owner {
            cgroup: id.get(),
            generation: counted.slot.generation.into(),
            told_ns: counted.told_ns,
        };
        let index = counted.slot.index;
        self.maps.owners.set(index, owner, 0).map_err(writing("OWNERS"))
    }

    /// Notes how much CPU time of a subject is told though it is not in the sums yet, in ns.
    pub(crate) fn tell(&mut self, id: CgroupId, told_ns: u64) -> Result<(), LedgerError> {
        let counted = self.subjects.get_mut(&id).ok_or(LedgerError::Unknown(id))?;
        counted.told_ns = counted.told_ns.max(told_ns);
        let counted = counted.clone();
        self.set_owner(id, &counted)
    }

    /// Charges a cgroup's threads to a part of a slot from now on, with the time since what runs was charged last.
    pub(crate) fn direct(&mut self, cgroup: CgroupId, slot: Slot, part: Part) -> Result<(), LedgerError> {
        let cgroups = &mut self.maps.cgroups;
        cgroups
            .insert(cgroup.get(), slot.subject(part, cgroup.get()), 0)
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
        let mut running = OnCpus::read(read).map_err(reading("RUNNING"))?;
        running.find(|thread| self.thread(thread).map(|kept| kept.subject));
        Ok(running)
    }

    /// The same, where it is also known since when the threads of one subject are not charged.
    pub(crate) fn running_of(&self, slot: Slot) -> Result<OnCpus, LedgerError> {
        let mut running = self.running()?;
        for cpu in running.of_mut(slot) {
            // It ended, or there was no room for it.
            let Some(thread) = self.thread(cpu.running.thread) else {
                continue;
            };
            cpu.charged_ns = thread.waits;
        }
        Ok(running)
    }

    /// What is kept of a thread.
    fn thread(&self, thread: u64) -> Option<Thread> {
        let set = home_of(thread, self.maps.keys.len()) / WAYS;
        let keys = self.maps.keys.get(set)?;
        let way = keys.iter().position(|&key| key == thread)?;
        let place = set * WAYS + u32::try_from(way).ok()?;
        self.maps.threads.get(place).filter(|kept| kept.thread == thread)
    }

    /// What a subject used but for what runs.
    pub(crate) fn usage(&self, counted: &Counted) -> Result<Usage, LedgerError> {
        let resident = self.resident(counted.slot)?;
        // Events that cross on two CPUs may leave a sum a few pages below zero for a moment.
        let bytes = |bytes: i64| u64::try_from(bytes).unwrap_or(0);
        let memory = Usage {
            memory_bytes: bytes(resident.bytes),
            memory_peak_bytes: bytes(resident.peak_bytes.max(resident.bytes)),
            ..Usage::default()
        };
        Ok(memory.with(self.times(counted.slot)?))
    }

    /// The same; not less CPU time than was told of it before.
    pub(crate) fn told(&self, id: CgroupId) -> Result<Usage, LedgerError> {
        let counted = self.subject(id)?;
        let usage = self.usage(counted)?;
        Ok(Usage {
            cpu_ns: usage.cpu_ns.max(counted.told_ns),
            ..usage
        })
    }

    /// A slot's times by part.
    pub(crate) fn times(&self, slot: Slot) -> Result<[Time; PARTS as usize], LedgerError> {
        let mut parts = [Time::default(); PARTS as usize];
        for (part, sum) in Part::ALL.into_iter().zip(&mut parts) {
            let times = self.times_of(slot, part)?;
            *sum = Time {
                cpu_ns: times.cpu_ns,
                wait_ns: times.wait_ns,
                throttled_ns: times.throttled_ns,
            };
        }
        Ok(parts)
    }

    fn times_of(&self, slot: Slot, part: Part) -> Result<Times, LedgerError> {
        let times = &self.maps.times;
        let place = slot.subject(part, 0).place;
        times
            .get(place)
            .ok_or_else(|| out_of_bounds("TIMES", place, times.len()))
    }

    pub(crate) fn resident(&self, slot: Slot) -> Result<Resident, LedgerError> {
        let resident = &self.maps.resident;
        let found = resident.get(slot.index);
        found.ok_or_else(|| out_of_bounds("RESIDENT", slot.index, resident.len()))
    }

    /// The account that a slot's owner has, if it has one.
    pub(crate) fn account(&self, slot: Slot) -> Result<Option<AccountEntry>, Busy> {
        let accounts = &self.maps.accounts;
        let is_own = |entry: &AccountEntry| entry.generation == u64::from(slot.generation);
        if !accounts.get(slot.index).is_some_and(|entry| is_own(&entry)) {
            return Ok(None);
        }
        let entry = accounts.get_whole(slot.index).ok_or(Busy)?;
        Ok(Some(entry).filter(is_own))
    }

    /// What KVM did for a slot's owner.
    pub(crate) fn guest(&self, slot: Slot) -> Option<Guest> {
        let guest = self.maps.guests.get(slot.index)?;
        (guest.generation == u64::from(slot.generation)).then_some(guest)
    }

    /// Whether a slot's sums are those of this owner.
    fn is_counted(&self, slot: Slot) -> Result<bool, LedgerError> {
        let generation = u64::from(slot.generation);
        for part in Part::ALL {
            if self.times_of(slot, part)?.generation != generation {
                return Ok(false);
            }
        }
        Ok(self.resident(slot)?.generation == generation)
    }

    /// Looks for a subject's peak of memory anew, from what it has now; answers with the one before.
    pub(crate) fn begin_peak(&self, counted: &Counted) -> Result<u64, LedgerError> {
        const PEAK: usize = offset_of!(Resident, peak_bytes) / 8;
        let (index, all) = (counted.slot.index, &self.maps.resident);
        let resident = self.resident(counted.slot)?;
        if !all.write_word(index, PEAK, resident.bytes.cast_unsigned()) {
            return Err(out_of_bounds("RESIDENT", index, all.len()));
        }
        Ok(u64::try_from(resident.peak_bytes.max(resident.bytes)).unwrap_or(0))
    }

    /// Sets a slot's times to zero and its memory to this, for the owner of this generation or for nobody (0).
    fn set_sums(&mut self, slot: Slot, resident: Resident) -> Result<(), LedgerError> {
        let generation = resident.generation;
        let maps = &mut self.maps;
        if slot.index < maps.guests.len() {
            let guest = Guest {
                generation,
                ..Guest::default()
            };
            maps.guests.set(slot.index, guest).map_err(writing("GUESTS"))?;
        }
        for part in Part::ALL {
            let times = Times {
                generation,
                ..Times::default()
            };
            let place = slot.subject(part, 0).place;
            maps.times.set(place, times).map_err(writing("TIMES"))?;
        }
        maps.resident.set(slot.index, resident).map_err(writing("RESIDENT"))
    }
}

/// An account is changed at this moment.
pub(crate) struct Busy;

fn out_of_bounds(map: &'static str, index: u32, max_entries: u32) -> LedgerError {
    reading(map)(MapError::OutOfBounds { index, max_entries })
}

// === impl Counted ===

impl Counted {
    /// One that is new and has used nothing.
    pub(crate) fn new(id: CgroupId, slot: Slot) -> Self {
        Self {
            slot,
            cgroups: vec![(id, Part::Own)],
            told_ns: 0,
        }
    }
}
