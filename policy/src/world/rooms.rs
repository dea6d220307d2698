use std::collections::BTreeMap;

use super::LOOKED_AT;
use crate::{Amount, MachineId};

/// What a machine has free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Room {
    pub(crate) free: Amount,
    /// Of its drive as that is, in MiB. Less than nothing where more was given away than it holds.
    pub(crate) scratch_mib: i64,
    /// How much larger the drive may be made, in MiB.
    pub(crate) growth_mib: u32,
}

/// Machines by what they have free. A search looks at one entry for each distinct CPU amount that is large enough, and at some
/// more where drives are full.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rooms {
    by_cpu: BTreeMap<u32, BTreeMap<(u32, MachineId), Room>>,
    len: usize,
}

// === impl Room ===

impl Room {
    /// What is free once the drive is as much larger as it may be made, where the host has `spare_mib` for that.
    pub(crate) fn with(self, spare_mib: u32) -> Amount {
        let scratch_mib = self.scratch_mib + i64::from(self.growth_mib.min(spare_mib));
        Amount {
            scratch_mib: u32::try_from(scratch_mib.max(0)).unwrap_or(u32::MAX),
            ..self.free
        }
    }

    /// By how much the drive is too small for so much more, in MiB.
    pub(crate) fn lacks(self, scratch_mib: u32) -> u32 {
        // What needs nothing needs no larger one.
        let lacks = i64::from(scratch_mib) - self.scratch_mib;
        u32::try_from(lacks.max(0)).map_or(u32::MAX, |lacks| if scratch_mib == 0 { 0 } else { lacks })
    }
}

// === impl Rooms ===

impl Rooms {
    /// Adds a machine, or changes what can be said of one that is there with as much CPU and memory.
    pub(crate) fn insert(&mut self, room: Room, machine: MachineId) {
        let machines = self.by_cpu.entry(room.free.cpu_millis).or_default();
        if machines.insert((room.free.memory_mib, machine), room).is_none() {
            self.len += 1;
        }
    }

    pub(crate) fn remove(&mut self, free: Amount, machine: MachineId) {
        let Some(machines) = self.by_cpu.get_mut(&free.cpu_millis) else {
            return;
        };
        if machines.remove(&(free.memory_mib, machine)).is_some() {
            self.len -= 1;
        }
        if machines.is_empty() {
            self.by_cpu.remove(&free.cpu_millis);
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The machine with the least room of those that have this much, where the host has `spare_mib` for their drives: by
    /// memory, then CPU, then age. `not` are left out. Of those with as much CPU that lack nothing but scratch disk only so many
    /// are looked at.
    pub(crate) fn tightest(&self, amount: Amount, spare_mib: u32, not: &[MachineId]) -> Option<MachineId> {
        let lowest = (amount.memory_mib, MachineId(ulid::Ulid::nil()));
        let fitting = self.by_cpu.range(amount.cpu_millis..).filter_map(|(cpu, machines)| {
            let mut machines = machines.range(lowest..).take(LOOKED_AT);
            let fits = |room: Room| amount.scratch_mib <= room.with(spare_mib).scratch_mib;
            let ((memory, machine), _) = machines.find(|((_, id), room)| fits(**room) && !not.contains(id))?;
            Some((*memory, *cpu, *machine))
        });
        fitting.min().map(|(_, _, machine)| machine)
    }

    /// What is known of a machine.
    #[cfg(test)]
    pub(crate) fn get(&self, machine: MachineId) -> Option<Room> {
        let mut machines = self.by_cpu.values().flatten();
        machines.find(|((_, id), _)| *id == machine).map(|(_, room)| *room)
    }

    /// Those with the most room first.
    pub(crate) fn roomiest(&self) -> impl Iterator<Item = MachineId> {
        let sets = self.by_cpu.values().rev();
        sets.flat_map(|machines| machines.keys().rev().map(|(_, machine)| *machine))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = MachineId> {
        self.by_cpu
            .values()
            .flat_map(|machines| machines.keys().map(|(_, machine)| *machine))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn amount(cpu_millis: u32, memory_mib: u32, scratch_mib: u32) -> Amount {
        Amount {
            cpu_millis,
            memory_mib,
            scratch_mib,
        }
    }

    fn room(free: Amount, growth_mib: u32) -> Room {
        Room {
            free,
            scratch_mib: free.scratch_mib.into(),
            growth_mib,
        }
    }

    fn id(n: u128) -> MachineId {
        MachineId(ulid::Ulid(n))
    }

    #[test]
    fn the_tightest_that_fits_is_found() {
        let mut rooms = Rooms::default();
        for (n, free) in [(1, (1000, 512)), (2, (500, 256)), (3, (2000, 128))] {
            rooms.insert(room(amount(free.0, free.1, 0), 0), id(n));
        }
        let tightest = |rooms: &Rooms, (cpu, memory), not: &[_]| rooms.tightest(amount(cpu, memory, 0), 0, not);
        assert_eq!(tightest(&rooms, (250, 128), &[]), Some(id(3)));
        assert_eq!(tightest(&rooms, (250, 129), &[]), Some(id(2)));
        assert_eq!(tightest(&rooms, (250, 129), &[id(2)]), Some(id(1)));
        assert_eq!(tightest(&rooms, (501, 257), &[]), Some(id(1)));
        assert_eq!(tightest(&rooms, (2001, 1), &[]), None);
        rooms.remove(amount(2000, 128, 7), id(3));
        assert_eq!((rooms.len(), tightest(&rooms, (1500, 1), &[])), (2, None));
    }

    #[test]
    fn a_drive_is_as_large_as_the_host_and_its_own_most_let_it_become() {
        let mut rooms = Rooms::default();
        rooms.insert(room(amount(1000, 100, 50), 30), id(1));
        rooms.insert(room(amount(1000, 200, 10), 100), id(2));
        let tightest = |rooms: &Rooms, scratch, spare| rooms.tightest(amount(1000, 100, scratch), spare, &[]);
        assert_eq!(tightest(&rooms, 50, 0), Some(id(1)));
        assert_eq!(tightest(&rooms, 51, 0), None);
        assert_eq!(tightest(&rooms, 80, 30), Some(id(1)));
        assert_eq!(tightest(&rooms, 81, 70), None);
        assert_eq!(tightest(&rooms, 81, 71), Some(id(2)));
        assert_eq!(tightest(&rooms, 111, 1000), None);
        // It was made larger.
        rooms.insert(room(amount(1000, 200, 110), 0), id(2));
        assert_eq!((rooms.len(), tightest(&rooms, 110, 0)), (2, Some(id(2))));
    }

    #[test]
    fn what_more_was_given_away_is_made_up_for_first() {
        let over = Room {
            scratch_mib: -20,
            ..room(amount(0, 0, 0), 100)
        };
        assert_eq!((over.with(0).scratch_mib, over.with(50).scratch_mib), (0, 30));
        assert_eq!((over.lacks(30), over.lacks(0)), (50, 0));
    }
}
