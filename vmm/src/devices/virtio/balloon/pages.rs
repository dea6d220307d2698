//! Which pages of the guest's a balloon has.

use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _};

use super::PAGE;
use crate::memory::GuestMemory;

const BITS: u64 = u64::BITS as u64;

/// The pages. A bit for each page of the guest's, in memory that is touched where one is set.
#[derive(Debug)]
pub(super) struct Pages {
    /// The guest's ranges: the number of its first page, how many there are, and at which bit they begin.
    ranges: Vec<(u64, u64, u64)>,
    bits: Vec<u64>,
    words: usize,
    count: u64,
}

// === impl Pages ===

impl Pages {
    /// None of the pages of `memory`.
    pub(super) fn of(memory: &GuestMemory) -> Self {
        let (mut ranges, mut all) = (Vec::new(), 0);
        for region in memory.iter() {
            let pages = region.len() / PAGE;
            ranges.push((region.start_addr().0 / PAGE, pages, all));
            all += pages;
        }
        Self {
            ranges,
            bits: Vec::new(),
            words: all.div_ceil(BITS) as usize,
            count: 0,
        }
    }

    /// How many there are.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// Takes the pages with these numbers, which are sorted, and gives what they hold back to the host. Those that are no guest
    /// memory, or that the balloon has, are left as they are.
    pub(super) fn inflate(&mut self, numbers: &[u32], memory: &GuestMemory) {
        for run in numbers.chunk_by(|one, next| *next - *one <= 1) {
            let (Some(first), Some(last)) = (run.first(), run.last()) else {
                continue;
            };
            let (first, end) = (u64::from(*first), u64::from(*last) + 1);
            if memory.give_back(first * PAGE, (end - first) * PAGE) {
                (first..end).for_each(|number| self.mark(number, true));
            }
        }
    }

    /// Gives pages back to the driver.
    pub(super) fn deflate(&mut self, numbers: &[u32]) {
        numbers.iter().for_each(|number| self.mark(u64::from(*number), false));
    }

    /// Has none of them any more.
    pub(super) fn clear(&mut self) {
        self.bits = Vec::new();
        self.count = 0;
    }

    fn mark(&mut self, number: u64, taken: bool) {
        let bit = self.ranges.iter().find_map(|(first, pages, bit)| {
            let index = number.checked_sub(*first).filter(|index| index < pages)?;
            Some(bit + index)
        });
        let Some(bit) = bit else {
            return;
        };
        if self.bits.is_empty() {
            // Zeros from the kernel, which are no memory until they are written.
            self.bits = vec![0; self.words];
        }
        let mask = 1 << (bit % BITS);
        let Some(word) = self.bits.get_mut((bit / BITS) as usize) else {
            return;
        };
        match (*word & mask != 0, taken) {
            (false, true) => self.count += 1,
            (true, false) => self.count -= 1,
            _ => return,
        }
        *word ^= mask;
    }
}
