use std::collections::{BTreeMap, BTreeSet};

use crate::{Amount, MachineId};

/// Machines by what they have free. A search looks at one entry for each distinct CPU amount that is large enough.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rooms {
    by_cpu: BTreeMap<u32, BTreeSet<(u32, MachineId)>>,
    len: usize,
}

// === impl Rooms ===

impl Rooms {
    pub(crate) fn insert(&mut self, free: Amount, machine: MachineId) {
        let set = self.by_cpu.entry(free.cpu_millis).or_default();
        if set.insert((free.memory_mib, machine)) {
            self.len += 1;
        }
    }

    pub(crate) fn remove(&mut self, free: Amount, machine: MachineId) {
        let Some(set) = self.by_cpu.get_mut(&free.cpu_millis) else {
            return;
        };
        if set.remove(&(free.memory_mib, machine)) {
            self.len -= 1;
        }
        if set.is_empty() {
            self.by_cpu.remove(&free.cpu_millis);
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The machine with the least room of those that have this much: by memory, then CPU, then age. `not` are left out.
    pub(crate) fn tightest(&self, amount: Amount, not: &[MachineId]) -> Option<MachineId> {
        let lowest = (amount.memory_mib, MachineId(ulid::Ulid::nil()));
        let fitting = self.by_cpu.range(amount.cpu_millis..).filter_map(|(cpu, set)| {
            let (memory, machine) = set.range(lowest..).find(|(_, machine)| !not.contains(machine))?;
            Some((*memory, *cpu, *machine))
        });
        fitting.min().map(|(_, _, machine)| machine)
    }

    /// Those with the most room first.
    pub(crate) fn roomiest(&self) -> impl Iterator<Item = MachineId> {
        let sets = self.by_cpu.values().rev();
        sets.flat_map(|set| set.iter().rev().map(|(_, machine)| *machine))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = MachineId> {
        self.by_cpu.values().flatten().map(|(_, machine)| *machine)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn amount(cpu_millis: u32, memory_mib: u32) -> Amount {
        Amount { cpu_millis, memory_mib }
    }

    #[test]
    fn the_tightest_that_fits_is_found() {
        let id = |n: u128| MachineId(ulid::Ulid(n));
        let mut rooms = Rooms::default();
        rooms.insert(amount(1000, 512), id(1));
        rooms.insert(amount(500, 256), id(2));
        rooms.insert(amount(2000, 128), id(3));
        assert_eq!(rooms.tightest(amount(250, 128), &[]), Some(id(3)));
        assert_eq!(rooms.tightest(amount(250, 129), &[]), Some(id(2)));
        assert_eq!(rooms.tightest(amount(250, 129), &[id(2)]), Some(id(1)));
        assert_eq!(rooms.tightest(amount(501, 257), &[]), Some(id(1)));
        assert_eq!(rooms.tightest(amount(2001, 1), &[]), None);
        rooms.remove(amount(2000, 128), id(3));
        assert_eq!((rooms.len(), rooms.tightest(amount(1500, 1), &[])), (2, None));
    }
}
