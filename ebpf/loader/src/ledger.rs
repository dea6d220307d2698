//! The ledger: subjects, and what they used.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use stoker_ebpf_types::{Lost, Part};

use crate::carry::carry;
use crate::cgroup::CgroupId;
use crate::cost::{Measuring, ProgramCost};
use crate::error::{LedgerError, LoadError, PinsError, reading};
use crate::kernel::{Kernel, Lack};
use crate::objects::{self, Maps, Programs};
use crate::pins::{Pins, Version};
use crate::running::{self, OnCpus};
use crate::slots::Slot;
use crate::state::{Counted, State};
use crate::usage::{GuestUse, Preempted, Time, Usage};

/// How often a subject's sums are read beside what runs, where its threads come and go meanwhile.
const TRIES: u32 = 3;

/// What a ledger is for, and how much it has room for. Its memory is taken when it is loaded: 72 bytes for each thread, about 100
/// for each process and cgroup, for each subject 250, for each machine 500 more, and 64 KiB for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Limits {
    /// Whether subjects are machines. Of these more is kept than of containers: accounts of credits, who takes CPUs from whom, and
    /// what this kernel tells of throttling and of KVM.
    pub machines: bool,
    /// Subjects at a time.
    pub subjects: u32,
    /// Cgroups of all subjects.
    pub cgroups: u32,
    /// Places for threads, which find theirs by chance: a few of all threads go without where half of the places are taken.
    pub tasks: u32,
    /// Processes of all subjects, for their memory.
    pub processes: u32,
}

impl Limits {
    /// For a host full of machines.
    pub const HOST: Self = Self {
        machines: true,
        subjects: 16_384,
        cgroups: 49_152,
        tasks: 131_072,
        processes: 32_768,
    };

    /// For the containers in a guest: about 1 MiB.
    pub const GUEST: Self = Self {
        machines: false,
        subjects: 512,
        cgroups: 1024,
        tasks: 8192,
        processes: 4096,
    };
}

/// Counts what subjects use, as long as it lives; where it is pinned, until it is [unpinned](Ledger::unpin) and dropped. Safe
/// to share between threads; each call takes some microseconds, and those that read all subjects less than one more for each.
pub struct Ledger {
    // Dropping them stops the count, unless they are pinned.
    programs: Programs,
    state: Mutex<State>,
    /// Readable where `CROSSINGS` has something to read.
    pub(crate) crossings: OwnedFd,
    /// The same of `NEAR`.
    pub(crate) near: OwnedFd,
    /// For how long a thread may run on without being charged, in ns; 0 where that is short.
    pub(crate) uncharged_ns: u32,
    lacks: Vec<Lack>,
    pinned: Option<(Pins, Version)>,
}

// === impl Ledger ===

impl Ledger {
    /// Loads the programs and starts to count; nothing is counted before a subject is added.
    ///
    /// # Errors
    ///
    /// Where rights are missing or the kernel lacks something; the message says what to do.
    pub fn load(limits: Limits) -> Result<Self, LoadError> {
        let (kernel, lacks) = Kernel::look(limits.machines)?;
        let ledger = Self::start(objects::load(limits, &kernel, None)?, |maps| Ok(State::new(maps)))?;
        Ok(Self {
            lacks,
            uncharged_ns: kernel.uncharged_ns,
            ..ledger
        })
    }

    /// Goes on with what is pinned in a folder, of whoever ended without [`Ledger::unpin`]: its subjects are there, and what
    /// they used meanwhile was counted. Where nothing is pinned, or only a part, it loads the programs, and pins them.
    ///
    /// The folder is on a BPF file system, and this process's alone as long as the ledger lives. It is made where it is not
    /// there, for its owner alone. What is in it and was not pinned by a ledger is left alone.
    ///
    /// Where what is pinned was loaded by another version, or with other limits, this one's programs are loaded beside it and
    /// go on with its sums, and it is removed. What a subject used is not less than before; it lacks waits that had not ended.
    /// A version whose maps mean something else gives no subjects.
    ///
    /// # Errors
    ///
    /// As [`Ledger::load`]; where the folder can't be used; where the subjects of another version do not fit into these limits.
    /// What was pinned goes on counting then.
    pub fn open(limits: Limits, folder: &Path) -> Result<Self, LoadError> {
        let (kernel, lacks) = Kernel::look(limits.machines)?;
        let pins = Pins::open(folder)?;
        let version = Version::new(limits, &kernel);
        let mut ledger = match Self::resume(objects::open(&pins.of(&version), limits, &kernel)?)? {
            Some(ledger) => ledger,
            None => Self::succeed(limits, &kernel, &pins, &version).inspect_err(|_| {
                // The error that is told is the first one; the next to open the folder removes what is left.
                let _ = pins.remove_unfinished();
            })?,
        };
        for other in pins.versions()? {
            if other != version {
                pins.discard(&other)?;
            }
        }
        ledger.pinned = Some((pins, version));
        ledger.lacks = lacks;
        ledger.uncharged_ns = kernel.uncharged_ns;
        Ok(ledger)
    }

    /// Removes the pins, and their folder where nothing else is in it: the count ends with this ledger.
    ///
    /// # Errors
    ///
    /// Where the kernel does not let it remove them.
    pub fn unpin(&self) -> Result<(), PinsError> {
        match &self.pinned {
            Some((pins, version)) => {
                pins.discard(version)?;
                pins.remove()
            }
            None => Ok(()),
        }
    }

    fn start(
        (programs, maps): (Programs, Maps),
        state: impl FnOnce(Maps) -> Result<State, LedgerError>,
    ) -> Result<Self, LoadError> {
        // From now on each CPU knows since when what it runs runs.
        programs.settle_all().map_err(LoadError::Start)?;
        let open = |map: BorrowedFd<'_>| {
            let opened = map.try_clone_to_owned();
            opened.map_err(|error| LoadError::Start(LedgerError::Crossings(error)))
        };
        Ok(Self {
            programs,
            crossings: open(maps.crossings.as_fd())?,
            near: open(maps.near.as_fd())?,
            uncharged_ns: 0,
            lacks: Vec::new(),
            state: Mutex::new(state(maps).map_err(LoadError::Start)?),
            pinned: None,
        })
    }

    /// Goes on with what was pinned, where it is whole.
    fn resume(pinned: Option<(Programs, Maps)>) -> Result<Option<Self>, LoadError> {
        pinned.map(|objects| Self::start(objects, State::resume)).transpose()
    }

    /// Pins a version anew. It goes on with the sums of another, where there is one.
    fn succeed(limits: Limits, kernel: &Kernel, pins: &Pins, version: &Version) -> Result<Self, LoadError> {
        // A part of it may be there.
        pins.discard(version)?;
        let objects = objects::load(limits, kernel, Some(&pins.begin()?))?;
        let ledger = Self::start(objects, |maps| Ok(State::new(maps)))?;
        for other in pins.versions()? {
            if other.is_readable()
                && let Some(old) = Self::resume(objects::open_other(&pins.of(&other))?)?
            {
                carry(&old, &ledger).map_err(LoadError::Carry)?;
                break;
            }
        }
        pins.publish(version)?;
        Ok(ledger)
    }

    /// What is not counted here, since this kernel does not tell it: for a log.
    pub fn lacks(&self) -> &[Lack] {
        &self.lacks
    }

    /// The map of accounts, for another program that goes by them.
    pub(crate) fn accounts_map(&self) -> io::Result<OwnedFd> {
        self.lock().maps.accounts_map.try_clone()
    }

    /// Begins to count what the threads of this cgroup use, from now on and from zero: as [`Part::Own`].
    ///
    /// # Errors
    ///
    /// Where it is the root cgroup or is counted already, where all places are taken, or where the kernel refuses.
    pub fn add(&self, subject: CgroupId) -> Result<(), LedgerError> {
        let mut state = self.lock();
        state.check(subject)?;
        let slot = state.take()?;
        let counted = Counted::new(subject, slot);
        let begun = state.begin(subject, &counted, 0);
        if let Err(error) = begun.and_then(|()| self.direct(&mut state, subject, slot, Part::Own)) {
            // The first error is the one to tell.
            let _ = state.end(slot);
            state.give_back(slot);
            return Err(error);
        }
        state.insert(subject, counted);
        Ok(())
    }

    /// Lets one more cgroup count towards a part of a subject, from now on: threads of child cgroups are not their parent's.
    ///
    /// # Errors
    ///
    /// As [`Ledger::add`], and where `subject` is unknown.
    pub fn add_cgroup(&self, subject: CgroupId, cgroup: CgroupId, part: Part) -> Result<(), LedgerError> {
        let mut state = self.lock();
        let slot = state.subject(subject)?.slot;
        state.check(cgroup)?;
        self.direct(&mut state, cgroup, slot, part)?;
        state.insert_cgroup(subject, cgroup, part);
        Ok(())
    }

    /// The subjects that are counted, in no order.
    pub fn subjects(&self) -> Vec<CgroupId> {
        self.lock().subjects.keys().copied().collect()
    }

    /// Ends the count of a subject and returns all that it used. An account that it has ends with it.
    ///
    /// # Errors
    ///
    /// Where it is unknown or the kernel refuses; in the latter case it may be tried again.
    pub fn remove(&self, subject: CgroupId) -> Result<Usage, LedgerError> {
        let mut state = self.lock();
        let counted = state.subject(subject)?.clone();
        let before = match state.running()?.runs(counted.slot) {
            true => self.usage_now(&mut state, subject)?,
            false => Usage::default(),
        };
        for &(cgroup, _) in &counted.cgroups {
            state.undirect(cgroup)?;
        }
        // A CPU may be in the middle of charging this slot. It does so with interrupts off, so once each has answered
        // none is, and none will be: the slot may have another owner.
        self.settle(&state)?;
        let usage = state.usage(&counted)?;
        self.end_account(&mut state, subject)?;
        state.end(counted.slot)?;
        state.remove(subject);
        state.give_back(counted.slot);
        let parts = usage.parts.into_iter().zip(before.parts);
        let mut most = [Time::default(); Part::ALL.len()];
        for (most, (usage, before)) in most.iter_mut().zip(parts) {
            *most = usage.most(before);
        }
        let all = usage.with(most);
        Ok(Usage {
            cpu_ns: usage.cpu_ns.max(before.cpu_ns),
            ..all
        })
    }

    /// What each subject has used up to now.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn read(&self) -> Result<HashMap<CgroupId, Usage>, LedgerError> {
        let mut state = self.lock();
        let running = self.running(&state)?;
        let subjects: Vec<_> = state.subjects.iter().map(|(&id, counted)| (id, counted.slot)).collect();
        subjects
            .into_iter()
            .map(|(id, slot)| {
                let usage = match running.runs(slot) {
                    true => self.usage_now(&mut state, id)?,
                    false => state.told(id)?,
                };
                Ok((id, usage))
            })
            .collect()
    }

    /// What one subject has used up to now. It interrupts only CPUs that run a thread of which is not known whose it is: none
    /// where the subject sleeps or its threads have run before, whoever else is busy. A thread that came from another
    /// subject's cgroup is charged when the scheduler looks at it next, at a tick at the latest.
    ///
    /// # Errors
    ///
    /// Where it is unknown or the kernel refuses.
    pub fn read_one(&self, subject: CgroupId) -> Result<Usage, LedgerError> {
        let mut state = self.lock();
        state.subject(subject)?;
        self.running(&state)?;
        self.usage_now(&mut state, subject)
    }

    /// Tells from now on the most memory that a subject has had since this moment, and now the most that it had before. What grows
    /// on another CPU meanwhile may be told of with its next change alone.
    ///
    /// # Errors
    ///
    /// Where it is unknown.
    pub fn begin_peak(&self, subject: CgroupId) -> Result<u64, LedgerError> {
        let state = self.lock();
        state.begin_peak(state.subject(subject)?)
    }

    /// What the scheduler has charged a subject with: all that it used, where none of its threads runs. It may be less than was
    /// told of one that ran, by what turned out to have been stolen from it.
    ///
    /// # Errors
    ///
    /// Where it is unknown or the kernel refuses.
    pub fn charged(&self, subject: CgroupId) -> Result<Usage, LedgerError> {
        let state = self.lock();
        state.usage(state.subject(subject)?)
    }

    /// What each CPU runs. It is known then whose each thread is.
    fn running(&self, state: &State) -> Result<OnCpus, LedgerError> {
        let running = state.running()?;
        let mut settled = false;
        // One that is offline is refused, and passed over.
        for cpu in running.unknown() {
            self.programs.settle(cpu)?;
            settled = true;
        }
        if settled { state.running() } else { Ok(running) }
    }

    /// What a subject has used, with what its threads that run have run since they were charged last. That is told where
    /// they are seen to run on while the sums are read.
    fn usage_now(&self, state: &mut State, subject: CgroupId) -> Result<Usage, LedgerError> {
        let slot = state.subject(subject)?.slot;
        let mut running = state.running_of(slot)?;
        for _ in 0..TRIES {
            if !running.runs(slot) {
                break;
            }
            let usage = state.usage(state.subject(subject)?)?;
            let now_ns = running::now_ns().map_err(LedgerError::Clock)?;
            let after = state.running_of(slot)?;
            if let Some(uncharged) = running.uncharged(&after, slot, now_ns) {
                let mut parts = usage.parts;
                for (part, uncharged) in parts.iter_mut().zip(uncharged) {
                    *part = part.plus(uncharged);
                }
                let now = usage.with(parts);
                state.tell(subject, now.cpu_ns)?;
                let told_ns = state.subject(subject)?.told_ns;
                return Ok(Usage {
                    cpu_ns: now.cpu_ns.max(told_ns),
                    ..now
                });
            }
            running = after;
        }
        state.told(subject)
    }

    /// What KVM has done for a machine; `None` where this kernel does not tell it ([`Ledger::lacks`]).
    ///
    /// # Errors
    ///
    /// Where the machine is unknown.
    pub fn guest(&self, subject: CgroupId) -> Result<Option<GuestUse>, LedgerError> {
        let state = self.lock();
        let slot = state.subject(subject)?.slot;
        if self.lacks.iter().any(|lack| matches!(lack, Lack::Guest { .. })) {
            return Ok(None);
        }
        Ok(state.guest(slot).map(|guest| GuestUse {
            guest_ns: guest.guest_ns,
            exits: guest.exits,
        }))
    }

    /// Who took CPUs from whom, as often as each pair of machines was seen. Of very many pairs the rare ones are forgotten.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn preemptions(&self) -> Result<Vec<Preempted>, LedgerError> {
        let state = self.lock();
        let slot = |index, generation| Slot { index, generation };
        let mut preemptions = Vec::new();
        for entry in state.maps.preemptions.iter() {
            let (pair, times) = entry.map_err(reading("PREEMPTIONS"))?;
            if let Some(subject) = state.owner(slot(pair.slot, pair.generation)) {
                preemptions.push(Preempted {
                    subject,
                    by: state.owner(slot(pair.by_slot, pair.by_generation)),
                    times,
                });
            }
        }
        Ok(preemptions)
    }

    /// What went uncounted since there was no room, since the programs were loaded.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn lost(&self) -> Result<Lost, LedgerError> {
        let state = self.lock();
        let lost = state.maps.lost.get(&0, 0).map_err(reading("LOST"))?;
        Ok(lost.iter().fold(Lost::default(), |sum, cpu| Lost {
            tasks: sum.tasks + cpu.tasks,
            charges: sum.charges + cpu.charges,
            processes: sum.processes + cpu.processes,
            crossings: sum.crossings + cpu.crossings,
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
        self.programs.cost()
    }

    /// Finds out whose the thread is that runs on each CPU. The lock keeps two from doing so at once.
    fn settle(&self, _: &State) -> Result<(), LedgerError> {
        self.programs.settle_all()
    }

    /// Makes a cgroup count towards a part of a slot, from now on.
    fn direct(&self, state: &mut State, cgroup: CgroupId, slot: Slot, part: Part) -> Result<(), LedgerError> {
        // What its threads that run now ran before is not this subject's.
        self.settle(state)?;
        state.direct(cgroup, slot, part)
    }

    pub(crate) fn programs(&self) -> &Programs {
        &self.programs
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
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
