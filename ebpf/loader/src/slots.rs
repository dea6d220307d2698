//! Which places in the arrays of sums are taken.

use std::collections::VecDeque;

use stoker_ebpf_types::{Part, Running, Subject};

/// A place, and which of its owners has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Slot {
    pub(crate) index: u32,
    /// From 1; another for each owner that the place has.
    pub(crate) generation: u32,
}

/// What is known of a place that has had owners.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// The generation of its last owner.
    pub(crate) last: u32,
    /// Whether that one still has it.
    pub(crate) taken: bool,
}

/// Gives out places: those that were given back first, the longest ago before others, so that no more have had owners than had
/// some at once; else in order.
#[derive(Debug)]
pub(crate) struct Slots {
    size: u32,
    fresh: u32,
    returned: VecDeque<Slot>,
}

// === impl Slot ===

impl Slot {
    /// What maps hold for a cgroup that leads to one of its parts.
    pub(crate) fn subject(self, part: Part, cgroup: u64) -> Subject {
        Subject {
            place: Subject::place_of(self.index, part),
            generation: self.generation,
            cgroup,
        }
    }

    /// Whether a CPU runs a thread of its owner's.
    pub(crate) fn has(self, running: &Running) -> bool {
        running.subject.cgroup != 0 && Self::from(running.subject) == self
    }
}

impl From<Subject> for Slot {
    fn from(subject: Subject) -> Self {
        Self {
            index: subject.slot(),
            generation: subject.generation,
        }
    }
}

// === impl Slots ===

impl Slots {
    pub(crate) fn new(size: u32) -> Self {
        Self {
            size,
            fresh: 0,
            returned: VecDeque::new(),
        }
    }

    /// Goes on where others ended, with the places that have had owners.
    pub(crate) fn resume(size: u32, places: &[Place]) -> Self {
        let returned = (0..)
            .zip(places)
            .filter(|(_, place)| !place.taken)
            .map(|(index, place)| Slot {
                index,
                generation: place.last,
            })
            .collect();
        Self {
            size,
            // As many as fit in the array of a map, of which a u32 is the index.
            fresh: u32::try_from(places.len()).unwrap_or(u32::MAX),
            returned,
        }
    }

    pub(crate) fn size(&self) -> u32 {
        self.size
    }

    pub(crate) fn take(&mut self) -> Option<Slot> {
        if let Some(Slot { index, generation }) = self.returned.pop_front() {
            return Some(Slot {
                index,
                // 0 is nobody.
                generation: generation.wrapping_add(1).max(1),
            });
        }
        let index = self.fresh;
        (index < self.size).then(|| {
            self.fresh += 1;
            Slot { index, generation: 1 }
        })
    }

    pub(crate) fn give_back(&mut self, slot: Slot) {
        self.returned.push_back(slot);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_place_has_two_owners_and_no_owner_comes_twice(
            size in 0u32..8,
            steps in prop::collection::vec(any::<Option<prop::sample::Index>>(), 0..200),
            // Before which of them it ends and another goes on.
            restarts in prop::collection::hash_set(0usize..200, 0..5),
        ) {
            let mut slots = Slots::new(size);
            let mut held: Vec<Slot> = Vec::new();
            let mut seen = HashSet::new();
            let mut last: HashMap<u32, u32> = HashMap::new();
            let mut most = 0;
            for (number, step) in steps.into_iter().enumerate() {
                if restarts.contains(&number) {
                    let places: Vec<Place> = (0..size)
                        .map_while(|index| {
                            Some(Place {
                                last: *last.get(&index)?,
                                taken: held.iter().any(|slot| slot.index == index),
                            })
                        })
                        .collect();
                    // Where that ends there are none behind.
                    prop_assert_eq!(places.len(), last.len());
                    prop_assert!(places.len() <= most);
                    slots = Slots::resume(size, &places);
                }
                match step {
                    Some(which) if !held.is_empty() => {
                        slots.give_back(held.swap_remove(which.index(held.len())));
                    }
                    _ => match slots.take() {
                        Some(slot) => {
                            prop_assert!(slot.index < size && slot.generation > 0);
                            prop_assert!(held.iter().all(|other| other.index != slot.index));
                            prop_assert!(seen.insert(slot));
                            let before = last.insert(slot.index, slot.generation);
                            prop_assert!(before.is_none_or(|before| before < slot.generation));
                            held.push(slot);
                            most = most.max(held.len());
                        }
                        None => prop_assert_eq!(held.len(), size as usize),
                    },
                }
            }
        }
    }

    #[test]
    fn the_generation_never_becomes_nobodys() {
        let mut slots = Slots::new(0);
        slots.give_back(Slot {
            index: 3,
            generation: u32::MAX,
        });
        assert_eq!(
            slots.take(),
            Some(Slot {
                index: 3,
                generation: 1
            })
        );
    }
}
