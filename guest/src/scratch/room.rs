//! What a drive holds and what of it is taken. Taken is what somebody may fill, filled or not, so that whoever was given
//! room finds it.

use std::ops::{AddAssign, SubAssign};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use stoker_proto::limits::ROOM_WAIT;

/// An amount of a file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Space {
    pub(crate) bytes: u64,
    /// Files, folders and links.
    pub(crate) inodes: u64,
}

/// It does not fit.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{} bytes and {} files are needed on the machine's drive, and {} and {} are free",
    needed.bytes, needed.inodes, free.bytes, free.inodes
)]
pub(crate) struct NoRoom {
    needed: Space,
    free: Space,
}

/// The room of one drive. Clones are the same.
#[derive(Clone, Default)]
pub(super) struct Room(Arc<Inner>);

#[derive(Default)]
struct Inner {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    all: Space,
    taken: Space,
    /// The part of `taken` that is being removed.
    leaving: Space,
}

/// Space that is taken until this is dropped.
pub(crate) struct Reservation {
    room: Room,
    space: Space,
    leaving: bool,
}

// === impl Space ===

impl Space {
    fn holds(self, other: Self) -> bool {
        other.bytes <= self.bytes && other.inodes <= self.inodes
    }

    fn less(self, other: Self) -> Self {
        Self {
            bytes: self.bytes.saturating_sub(other.bytes),
            inodes: self.inodes.saturating_sub(other.inodes),
        }
    }
}

impl AddAssign for Space {
    fn add_assign(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.inodes += other.inodes;
    }
}

impl SubAssign for Space {
    fn sub_assign(&mut self, other: Self) {
        *self = self.less(other);
    }
}

// === impl State ===

impl State {
    fn free(&self) -> Space {
        self.all.less(self.taken)
    }

    /// What is free once all is removed that is being removed.
    fn free_soon(&self) -> Space {
        self.all.less(self.taken.less(self.leaving))
    }
}

// === impl Room ===

impl Room {
    /// The drive holds so much now.
    pub(super) fn resize(&self, all: Space) {
        self.state().all = all;
        self.0.changed.notify_all();
    }

    /// Takes space. Where there is not enough, `let_go` is called to have something removed that nobody uses, until it
    /// finds nothing (`false`); what is being removed is waited for. Blocks.
    pub(super) fn reserve(&self, space: Space, mut let_go: impl FnMut() -> bool) -> Result<Reservation, NoRoom> {
        let deadline = Instant::now() + ROOM_WAIT;
        let mut exhausted = false;
        let mut state = self.state();
        loop {
            if state.free().holds(space) {
                state.taken += space;
                return Ok(Reservation {
                    room: self.clone(),
                    space,
                    leaving: false,
                });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.free_soon().holds(space) && !left.is_zero() {
                let waited = self.0.changed.wait_timeout(state, left);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            } else if exhausted || left.is_zero() {
                return Err(NoRoom {
                    needed: space,
                    free: state.free(),
                });
            } else {
                // What is let go of is told here.
                drop(state);
                exhausted = !let_go();
                state = self.state();
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Reservation ===

impl Reservation {
    /// What it is for is being removed: who wants room may wait for it.
    pub(super) fn leave(&mut self) {
        if !std::mem::replace(&mut self.leaving, true) {
            self.room.state().leaving += self.space;
            self.room.0.changed.notify_all();
        }
    }

    /// It stays taken for good: nobody waits for it.
    pub(super) fn stay(self) {
        if self.leaving {
            self.room.state().leaving -= self.space;
            self.room.0.changed.notify_all();
        }
        std::mem::forget(self);
    }

    pub(super) fn space(&self) -> Space {
        self.space
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut state = self.room.state();
        state.taken -= self.space;
        if self.leaving {
            state.leaving -= self.space;
        }
        drop(state);
        self.room.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space(bytes: u64, inodes: u64) -> Space {
        Space { bytes, inodes }
    }

    fn room() -> Room {
        let room = Room::default();
        room.resize(space(100, 10));
        room
    }

    #[test]
    fn no_more_is_taken_than_there_is() {
        let room = room();
        let first = room.reserve(space(60, 2), || false).unwrap();
        let error = room.reserve(space(41, 1), || false).err().unwrap();
        assert_eq!((error.needed, error.free), (space(41, 1), space(40, 8)));
        assert!(room.reserve(space(1, 9), || false).is_err(), "there are 8 files left");
        let second = room.reserve(space(40, 8), || false).unwrap();
        drop(first);
        room.resize(space(130, 10));
        assert!(room.reserve(space(91, 0), || false).is_err());
        drop(room.reserve(space(90, 2), || false).unwrap());
        drop(second);
        assert_eq!(room.state().taken, Space::default());
    }

    #[test]
    fn what_can_not_be_removed_is_not_waited_for() {
        let room = room();
        let mut first = room.reserve(space(60, 2), || false).unwrap();
        first.leave();
        let other = room.clone();
        let waits = std::thread::spawn(move || other.reserve(space(50, 2), || false).err());
        first.stay();
        let error = waits.join().unwrap().unwrap();
        assert_eq!(error.free, space(40, 8));
    }

    #[test]
    fn what_nobody_uses_goes_first_and_no_more_of_it_than_is_needed() {
        let room = room();
        let mut unused: Vec<_> = (0..5).map(|_| room.reserve(space(20, 1), || false).unwrap()).collect();
        let mut leaving = Vec::new();
        let (sender, removed) = std::sync::mpsc::channel();
        let remover = std::thread::spawn(move || removed.into_iter().for_each(drop::<Reservation>));
        let taken = room
            .reserve(space(35, 1), || {
                let Some(mut one) = unused.pop() else { return false };
                one.leave();
                leaving.push(one.space());
                sender.send(one).unwrap();
                true
            })
            .unwrap();
        assert_eq!((taken.space(), leaving.len()), (space(35, 1), 2));
        drop(sender);
        remover.join().unwrap();
        assert_eq!(room.state().taken, space(95, 4));
        assert_eq!(room.state().leaving, Space::default());
        let error = room.reserve(space(70, 1), || unused.pop().is_some()).err().unwrap();
        assert_eq!(error.free, space(65, 9), "all that was unused is gone");
    }
}
