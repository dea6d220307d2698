//! Which places in the arrays of sums are taken.

use std::collections::VecDeque;

/// A place, and which of its owners has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Slot {
    pub(crate) index: u32,
    /// From 1; another for each owner that the place has.
    pub(crate) generation: u32,
}

/// Gives out places. The one given back longest ago is the first to be used again.
#[derive(Debug)]
pub(crate) struct Slots {
    size: u32,
    fresh: u32,
    returned: VecDeque<Slot>,
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

    pub(crate) fn size(&self) -> u32 {
        self.size
    }

    pub(crate) fn take(&mut self) -> Option<Slot> {
        if self.fresh < self.size {
            let index = self.fresh;
            self.fresh += 1;
            return Some(Slot { index, generation: 1 });
        }
        let Slot { index, generation } = self.returned.pop_front()?;
        Some(Slot {
            index,
            // 0 is nobody.
            generation: generation.wrapping_add(1).max(1),
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
        ) {
            let mut slots = Slots::new(size);
            let mut held: Vec<Slot> = Vec::new();
            let mut seen = HashSet::new();
            let mut last: HashMap<u32, u32> = HashMap::new();
            for step in steps {
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
