//! The last decisions, by what they are about.

use std::collections::VecDeque;

use stoker_policy::{Command, IdMap};
use ulid::Ulid;

use super::Entry;

/// How many things a decision is about at most: a machine, a container and a request.
const LINKS: usize = 3;

/// The last decisions. Each knows the one before it about the same thing, so a question costs what it touches.
#[derive(Debug)]
pub(super) struct Ring {
    capacity: usize,
    /// The place of the oldest; places are never given twice.
    first: u64,
    entries: VecDeque<Linked>,
    /// The place of the last decision about each thing.
    last: IdMap<Ulid, u64>,
}

#[derive(Debug)]
struct Linked {
    entry: Entry,
    /// The place of the one before it, for each thing that it is about.
    before: [Option<u64>; LINKS],
}

// === impl Ring ===

impl Ring {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            capacity,
            first: 0,
            entries: VecDeque::new(),
            last: IdMap::default(),
        }
    }

    /// Adds a decision; the oldest goes where there are too many.
    pub(super) fn push(&mut self, entry: Entry) {
        let place = self.first + to_u64(self.entries.len());
        let before = about(&entry.decision.command).map(|id| id.and_then(|id| self.last.insert(id, place)));
        self.entries.push_back(Linked { entry, before });
        if self.entries.len() > self.capacity
            && let Some(oldest) = self.entries.pop_front()
        {
            for id in about(&oldest.entry.decision.command).into_iter().flatten() {
                if self.last.get(&id) == Some(&self.first) {
                    self.last.remove(&id);
                }
            }
            self.first += 1;
        }
    }

    /// The number of the oldest decision; the highest that there can be where there is none.
    pub(super) fn since(&self) -> u64 {
        self.entries.front().map_or(u64::MAX, |oldest| oldest.entry.sequence)
    }

    /// The first decisions about a thing, or all, whose number is higher, in order.
    pub(super) fn after(&self, id: Option<Ulid>, sequence: u64, limit: usize) -> Vec<&Entry> {
        let Some(id) = id else {
            let from = self.entries.partition_point(|linked| linked.entry.sequence <= sequence);
            return self
                .entries
                .range(from..)
                .take(limit)
                .map(|linked| &linked.entry)
                .collect();
        };
        let mut found = Vec::new();
        let mut next = self.last.get(&id).copied();
        while let Some(linked) = next.and_then(|place| self.at(place))
            && linked.entry.sequence > sequence
        {
            found.push(&linked.entry);
            let ids = about(&linked.entry.decision.command);
            let link = ids.iter().position(|about| *about == Some(id));
            next = link.and_then(|link| *linked.before.get(link)?);
        }
        found.reverse();
        found.truncate(limit);
        found
    }

    fn at(&self, place: u64) -> Option<&Linked> {
        let index = place.checked_sub(self.first)?;
        self.entries.get(usize::try_from(index).ok()?)
    }
}

/// What a command is about.
fn about(command: &Command) -> [Option<Ulid>; LINKS] {
    [
        command.machine().map(|id| id.0),
        command.container().map(|id| id.0),
        command.request().map(|id| id.0),
    ]
}

fn to_u64(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use stoker_policy::{ContainerId, Decision, MachineId, Reason, RequestId};

    use super::*;

    fn dispatch(sequence: u64, machine: u128, request: u128) -> Entry {
        Entry {
            sequence,
            wall: Duration::ZERO,
            decision: Decision {
                command: Command::Dispatch {
                    machine: MachineId(Ulid(machine)),
                    container: ContainerId(Ulid(machine + 1)),
                    request: RequestId(Ulid(request)),
                },
                reason: Reason::MadeForIt,
            },
        }
    }

    fn numbers(found: Vec<&Entry>) -> Vec<u64> {
        found.into_iter().map(|entry| entry.sequence).collect()
    }

    #[test]
    fn what_is_about_one_thing_is_found_in_order() {
        let mut ring = Ring::new(6);
        assert_eq!(ring.since(), u64::MAX);
        for n in 0..10_u64 {
            // Two machines in turn, a request for each.
            ring.push(dispatch(100 + n, 10 * u128::from(n % 2 + 1), 1000 + u128::from(n)));
        }
        assert_eq!(ring.since(), 104);
        assert_eq!(numbers(ring.after(Some(Ulid(10)), 0, 9)), [104, 106, 108]);
        assert_eq!(
            numbers(ring.after(Some(Ulid(21)), 0, 9)),
            [105, 107, 109],
            "a container"
        );
        assert_eq!(numbers(ring.after(Some(Ulid(10)), 104, 1)), [106]);
        assert_eq!(numbers(ring.after(Some(Ulid(1007)), 0, 9)), [107]);
        assert_eq!(numbers(ring.after(Some(Ulid(1003)), 0, 9)), [0; 0], "too long ago");
        assert_eq!(numbers(ring.after(None, 106, 2)), [107, 108]);
    }

    #[test]
    fn what_is_forgotten_leaves_nothing() {
        let mut ring = Ring::new(4);
        for n in 0..1000 {
            ring.push(dispatch(n, 10, 1000 + u128::from(n)));
        }
        assert_eq!(ring.entries.len(), 4);
        assert_eq!(ring.last.len(), 2 + 4);
    }
}
