//! Memory that is plugged and unplugged while the guest runs, in blocks.
//!
//! All of it is mapped from the start, at the guest's addresses too. A block that is not plugged takes no memory: it reads as zeros, and
//! nobody can write to it. A guest that tries all the same has no way to go on (KVM tells its vCPU's thread `EFAULT`), and
//! devices don't find such blocks when they look up what the guest points them at. So a guest has what it has plugged, whatever it says.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::mapping::{HUGE_PAGE, Mapping};

/// Bytes of a block: what Linux and the host's huge pages need to give memory back whole.
pub const BLOCK: u64 = HUGE_PAGE as u64;

/// Held by a thread for as long as it works with guest memory that it has looked up. Who waits for a turn to end waits for that one
/// alone: another does not begin before.
#[derive(Debug, Default, Clone)]
pub struct Turn(Arc<Places>);

#[derive(Debug, Default)]
struct Places {
    /// Held while the other is waited for.
    next: Mutex<()>,
    /// Held in a turn.
    turn: Mutex<()>,
}

/// The memory. One thread plugs and unplugs, any number look.
#[derive(Debug)]
pub struct Pluggable {
    mapping: Mapping,
    start: u64,
    /// A bit for each block: it is plugged.
    plugged: Box<[AtomicU64]>,
    count: AtomicU64,
    /// Of all threads that look guest memory up, but for the one that unplugs.
    turns: Mutex<Vec<Turn>>,
}

// === impl Turn ===

impl Turn {
    /// Begins a turn; it is over when what this returns is dropped.
    pub fn begin(&self) -> MutexGuard<'_, ()> {
        let Places { next, turn } = &*self.0;
        // A mutex by itself may be had again and again by the thread that has just given it back, whoever waits.
        let _next = lock(next);
        lock(turn)
    }
}

// === impl Pluggable ===

impl Pluggable {
    /// Maps `length` bytes for the guest's addresses from `start` on, both multiples of [`BLOCK`]. Nothing is plugged.
    ///
    /// # Errors
    /// Where the host refuses the mapping.
    pub(super) fn new(start: u64, length: u64) -> io::Result<Self> {
        let mapping = Mapping::new(usize::try_from(length).map_err(io::Error::other)?)?;
        mapping.protect(0, length, false)?;
        let words = (length / BLOCK).div_ceil(u64::BITS.into());
        Ok(Self {
            mapping,
            start,
            plugged: (0..words).map(|_| AtomicU64::new(0)).collect(),
            count: AtomicU64::new(0),
            turns: Mutex::default(),
        })
    }

    pub(super) fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// The guest's address of its first byte.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Its bytes, plugged or not.
    pub fn length(&self) -> u64 {
        self.mapping.length() as u64
    }

    /// Its blocks, plugged or not.
    pub fn blocks(&self) -> u64 {
        self.length() / BLOCK
    }

    /// How many blocks are plugged.
    pub fn plugged(&self) -> u64 {
        self.count.load(Ordering::SeqCst)
    }

    /// How many of the `count` blocks from block `first` on are plugged; none beyond the last there is.
    pub fn plugged_of(&self, first: u64, count: u64) -> u64 {
        let bits = self.words(first, count);
        bits.map(|(word, mask)| u64::from((word.load(Ordering::Acquire) & mask).count_ones()))
            .sum()
    }

    /// Whether all of a range of bytes, from its first byte on, is plugged.
    pub fn holds(&self, offset: u64, length: u64) -> bool {
        let Some(end) = offset.checked_add(length).filter(|end| *end <= self.length()) else {
            return false;
        };
        let first = offset / BLOCK;
        let count = end.div_ceil(BLOCK) - first;
        self.plugged_of(first, count) == count
    }

    /// Plugs blocks, none of which is plugged. They are zeros.
    ///
    /// # Errors
    /// Where there are no such blocks or the host refuses; then nothing has changed.
    pub fn plug(&self, first: u64, count: u64) -> io::Result<()> {
        let (offset, length) = range(first, count)?;
        self.mapping.protect(offset, length, true).inspect_err(|_| {
            // A part of it may be writable by now, and written to.
            let _ = self.mapping.protect(offset, length, false);
            let _ = self.mapping.discard(offset, length);
        })?;
        for (word, mask) in self.words(first, count) {
            word.fetch_or(mask, Ordering::SeqCst);
        }
        self.count.fetch_add(count, Ordering::SeqCst);
        Ok(())
    }

    /// Unplugs those blocks of a range that are plugged, and gives their memory back to the host. It waits for threads that are in
    /// the middle of work with guest memory.
    ///
    /// # Errors
    /// Where there are no such blocks or the host refuses; then they are plugged as before.
    pub fn unplug(&self, first: u64, count: u64) -> io::Result<()> {
        let (offset, length) = range(first, count)?;
        let were: Vec<u64> = self
            .words(first, count)
            .map(|(word, mask)| word.fetch_and(!mask, Ordering::SeqCst) & mask)
            .collect();
        // Who looks from now on finds them no more; who has found them is waited for.
        let turns = self.turns().clone();
        for turn in turns {
            drop(turn.begin());
        }
        // The guest's writes are ended first: what it wrote in between would stay.
        let done = self.mapping.protect(offset, length, false);
        let done = done.and_then(|()| self.mapping.discard(offset, length));
        if done.is_ok() {
            let count = were.iter().map(|bits| u64::from(bits.count_ones())).sum();
            self.count.fetch_sub(count, Ordering::SeqCst);
            return done;
        }
        for ((word, _), bits) in self.words(first, count).zip(were) {
            word.fetch_or(bits, Ordering::SeqCst);
        }
        for block in (first..first + count).filter(|block| self.plugged_of(*block, 1) == 1) {
            // Where the host refuses this too, who writes there ends.
            let _ = self.mapping.protect(block * BLOCK, BLOCK, true);
        }
        done
    }

    /// The turn of one more thread that looks guest memory up.
    pub(super) fn turn(&self) -> Turn {
        let turn = Turn::default();
        self.turns().push(turn.clone());
        turn
    }

    fn turns(&self) -> MutexGuard<'_, Vec<Turn>> {
        lock(&self.turns)
    }

    /// The words that have the bits of blocks, and which bits of each.
    fn words(&self, first: u64, count: u64) -> impl Iterator<Item = (&AtomicU64, u64)> {
        const BITS: u64 = u64::BITS as u64;
        let end = first.saturating_add(count).min(self.blocks());
        let words = first / BITS..end.div_ceil(BITS).max(first / BITS);
        words.filter_map(move |index| {
            let word = self.plugged.get(usize::try_from(index).ok()?)?;
            let (from, to) = (first.max(index * BITS), end.min((index + 1) * BITS));
            let length = to.checked_sub(from).filter(|length| *length > 0)?;
            Some((word, (u64::MAX >> (BITS - length)) << (from % BITS)))
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The bytes of blocks.
fn range(first: u64, count: u64) -> io::Result<(u64, u64)> {
    let range = first.checked_mul(BLOCK).zip(count.checked_mul(BLOCK));
    range.ok_or(io::ErrorKind::InvalidInput.into())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::fd::AsRawFd as _;
    use std::sync::atomic::AtomicBool;
    use std::sync::mpsc;
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;

    const BLOCKS: u64 = 200;

    fn pluggable() -> Pluggable {
        Pluggable::new(1 << 32, BLOCKS * BLOCK).unwrap()
    }

    #[test]
    fn blocks_are_counted_across_words() {
        let memory = pluggable();
        assert_eq!(memory.blocks(), BLOCKS);
        memory.plug(60, 80).unwrap();
        memory.plug(199, 1).unwrap();
        assert_eq!(memory.plugged(), 81);
        for (first, count, plugged) in [
            (0, 60, 0),
            (60, 80, 80),
            (0, BLOCKS, 81),
            (63, 2, 2),
            (139, 2, 1),
            (199, 1, 1),
            (199, 100, 1),
            (200, 1, 0),
            (7, 0, 0),
            (u64::MAX, u64::MAX, 0),
        ] {
            assert_eq!(memory.plugged_of(first, count), plugged, "{first}+{count}");
        }
        memory.unplug(64, 64).unwrap();
        assert_eq!((memory.plugged(), memory.plugged_of(0, BLOCKS)), (17, 17));
        // Whatever of it is plugged.
        memory.unplug(0, BLOCKS).unwrap();
        assert_eq!((memory.plugged(), memory.plugged_of(0, BLOCKS)), (0, 0));
    }

    #[test]
    fn a_range_is_held_where_all_its_blocks_are() {
        let memory = pluggable();
        memory.plug(1, 2).unwrap();
        assert!(memory.holds(BLOCK, 2 * BLOCK) && memory.holds(2 * BLOCK - 1, 2) && memory.holds(0, 0));
        for (offset, length) in [
            (BLOCK - 1, 1),
            (BLOCK - 1, 2),
            (2 * BLOCK, BLOCK + 1),
            (3 * BLOCK, 1),
            (BLOCKS * BLOCK, 1),
            (u64::MAX, 2),
        ] {
            assert!(!memory.holds(offset, length), "{offset:#x}+{length:#x}");
        }
    }

    #[test]
    fn blocks_that_are_not_there_are_refused() {
        let memory = pluggable();
        for (first, count) in [(BLOCKS, 1), (BLOCKS - 1, 2), (0, u64::MAX), (u64::MAX, 1)] {
            assert!(memory.plug(first, count).is_err(), "{first}+{count}");
            assert!(memory.unplug(first, count).is_err(), "{first}+{count}");
        }
        assert_eq!(memory.plugged(), 0);
    }

    #[test]
    fn who_has_looked_a_block_up_may_use_it_to_the_end_of_its_turn() {
        let memory = pluggable();
        memory.plug(0, 1).unwrap();
        let turn = memory.turn();
        let (tell, unplugged) = mpsc::channel();
        thread::scope(|scope| {
            let guard = turn.begin();
            assert!(memory.holds(0, BLOCK));
            scope.spawn(|| {
                memory.unplug(0, 1).unwrap();
                tell.send(()).unwrap();
            });
            // From when it is found no more, only the turn keeps it.
            while memory.holds(0, BLOCK) {
                thread::yield_now();
            }
            // SAFETY: within the mapping, which this turn keeps as it is.
            unsafe { memory.mapping.start().write_volatile(1) };
            assert!(unplugged.try_recv().is_err());
            drop(guard);
            unplugged.recv().unwrap();
        });
        // SAFETY: within the mapping, which can be read.
        assert_eq!(unsafe { memory.mapping.start().read_volatile() }, 0);
    }

    #[test]
    fn who_waits_for_a_turn_does_not_wait_for_the_next() {
        let turn = Turn::default();
        let (count, ends) = (AtomicU64::new(0), AtomicBool::new(false));
        let begun = || count.load(Ordering::SeqCst);
        let mut waited = Vec::new();
        thread::scope(|scope| {
            // One that always has more to do.
            scope.spawn(|| {
                while !ends.load(Ordering::SeqCst) {
                    let _guard = turn.begin();
                    count.fetch_add(1, Ordering::SeqCst);
                    let start = Instant::now();
                    while start.elapsed() < Duration::from_micros(200) {
                        std::hint::spin_loop();
                    }
                }
            });
            for _ in 0..51 {
                let before = begun();
                while begun() == before {
                    thread::yield_now();
                }
                let before = begun();
                drop(turn.begin());
                waited.push(begun() - before);
            }
            ends.store(true, Ordering::SeqCst);
        });
        // Where this thread has no CPU others begin before it waits, and after it.
        waited.sort_unstable();
        assert!(waited[waited.len() / 2] <= 2, "{waited:?}");
    }

    /// What a child process that is forked here makes of this memory: 0 where it says so.
    fn in_a_child(what: impl FnOnce() -> bool) -> i32 {
        // SAFETY: the child does nothing that allocates or takes a lock, and ends without going back.
        match unsafe { libc::fork() } {
            0 => {
                let code = i32::from(!what());
                // SAFETY: ends the child.
                unsafe { libc::_exit(code) }
            }
            child => {
                let mut status = 0;
                // SAFETY: waits for the child, whose status has a place.
                assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
                status
            }
        }
    }

    #[test]
    fn what_is_plugged_halfway_is_not_plugged() {
        let memory = pluggable();
        let start = memory.mapping.start();
        let (rest, length) = (start.wrapping_add(BLOCK as usize), (BLOCKS - 1) * BLOCK);
        // The kernel has two ranges to change now, one after the other.
        // SAFETY: within the mapping; the advice does not change what is in it.
        let advised = unsafe { libc::madvise(rest.cast(), length as usize, libc::MADV_DODUMP) };
        assert_eq!(advised, 0);
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        let data: u64 = statm.split(' ').nth(5).unwrap().trim().parse().unwrap();
        let (reader, writer) = io::pipe().unwrap();
        (&writer).write_all(&[1]).unwrap();
        let fd = reader.as_raw_fd();
        let status = in_a_child(|| {
            // Enough for the first range alone.
            let most = data * 4096 + BLOCKS * BLOCK / 2;
            let limit = libc::rlimit {
                rlim_cur: most,
                rlim_max: most,
            };
            // SAFETY: `limit` is there for the call.
            let limited = unsafe { libc::setrlimit(libc::RLIMIT_DATA, &limit) } == 0;
            let refused = memory.plug(0, BLOCKS).is_err() && memory.plugged() == 0;
            // SAFETY: the kernel writes a byte to the mapping, or refuses to.
            let written = unsafe { libc::read(fd, start.cast(), 1) };
            limited && refused && written == -1
        });
        assert_eq!(status, 0);
    }
}
