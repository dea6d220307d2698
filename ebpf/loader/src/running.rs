//! What runs on each CPU, and how much of its time is not charged yet.

use nix::time::{ClockId, clock_gettime};
use stoker_ebpf_types::Running;

use crate::slots::Slot;

/// What each CPU ran at a moment. Possible CPUs are numbered without gaps.
#[derive(Debug)]
pub(crate) struct OnCpus {
    cpus: Vec<Running>,
    /// The CPU on which this was read. It ran the reader.
    own: Option<usize>,
}

/// Time of a subject that is not charged yet, in ns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Uncharged {
    pub(crate) cpu_ns: u64,
    pub(crate) wait_ns: u64,
}

// === impl OnCpus ===

impl OnCpus {
    pub(crate) fn read<E>(read: impl FnOnce() -> Result<Vec<Running>, E>) -> Result<Self, E> {
        let before = nix::sched::sched_getcpu().ok();
        let cpus = read()?;
        let after = nix::sched::sched_getcpu().ok();
        // Who moved meanwhile was read on either.
        let own = before.filter(|_| before == after);
        Ok(Self { cpus, own })
    }

    /// CPUs that run a thread of which is not known whose it is.
    pub(crate) fn unknown(&self) -> impl Iterator<Item = u32> {
        (0..)
            .zip(self.cpus.iter().enumerate())
            .filter_map(|(number, (cpu, running))| {
                (Some(cpu) != self.own && running.subject.cgroup == 0 && !running.is_idle()).then_some(number)
            })
    }

    /// Whether a subject's thread runs that was not charged since it was found out whose it is.
    pub(crate) fn is_settled(&self) -> bool {
        self.cpus
            .iter()
            .any(|running| running.settled != 0 && running.subject.cgroup != 0)
    }

    /// The CPUs that run a thread of this subject's.
    pub(crate) fn of_mut(&mut self, slot: Slot) -> impl Iterator<Item = &mut Running> {
        self.cpus.iter_mut().filter(move |running| is_of(running, slot))
    }

    /// Whether a thread of this subject's runs.
    pub(crate) fn runs(&self, slot: Slot) -> bool {
        self.cpus.iter().any(|running| is_of(running, slot))
    }

    /// What is not charged of this subject's at `now_ns`, a moment between this reading and the one `after`; `None` where one of
    /// its threads was charged or left its CPU meanwhile, or another came.
    pub(crate) fn uncharged(&self, after: &Self, slot: Slot, now_ns: u64) -> Option<Uncharged> {
        let mut sum = Uncharged::default();
        for (before, after) in self.cpus.iter().zip(&after.cpus) {
            if !is_of(before, slot) && !is_of(after, slot) {
                continue;
            }
            if before != after {
                return None;
            }
            sum.cpu_ns += now_ns.saturating_sub(before.since_ns);
            sum.wait_ns += before.wait_ns;
        }
        Some(sum)
    }
}

fn is_of(running: &Running, slot: Slot) -> bool {
    running.subject.slot == slot.index && running.subject.generation == slot.generation
}

/// The time that the programs go by, in ns.
pub(crate) fn now_ns() -> Result<u64, nix::Error> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
    let ns = now.tv_sec() * 1_000_000_000 + now.tv_nsec();
    Ok(u64::try_from(ns).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use stoker_ebpf_types::Subject;

    use super::*;

    const SLOT: Slot = Slot {
        index: 3,
        generation: 7,
    };

    fn runs(slot: Slot, since_ns: u64) -> Running {
        Running {
            since_ns,
            wait_ns: 5,
            known: 1,
            settled: 0,
            subject: Subject {
                slot: slot.index,
                generation: slot.generation,
                cgroup: 99,
            },
            thread: 1000,
            idle: 2000,
        }
    }

    fn idle() -> Running {
        Running {
            thread: 2000,
            idle: 2000,
            ..Running::default()
        }
    }

    fn on(cpus: &[Running], own: Option<usize>) -> OnCpus {
        OnCpus {
            cpus: cpus.to_vec(),
            own,
        }
    }

    #[test]
    fn what_runs_on_is_told_up_to_now() {
        let before = on(&[runs(SLOT, 100), idle(), runs(SLOT, 140)], None);
        let sum = before.uncharged(&before, SLOT, 150).unwrap();
        assert_eq!((sum.cpu_ns, sum.wait_ns), (60, 10));
        let other = Slot { generation: 8, ..SLOT };
        assert!(before.runs(SLOT) && !before.runs(other));
        assert_eq!(before.uncharged(&before, other, 150), Some(Uncharged::default()));
    }

    #[test]
    fn one_that_left_or_came_meanwhile_is_not_told() {
        let (ran, slept) = (on(&[runs(SLOT, 100)], None), on(&[idle()], None));
        assert_eq!(ran.uncharged(&slept, SLOT, 150), None);
        assert_eq!(slept.uncharged(&ran, SLOT, 150), None);
        // It left and came back.
        assert_eq!(ran.uncharged(&on(&[runs(SLOT, 120)], None), SLOT, 150), None);
    }

    #[test]
    fn only_cpus_with_a_stranger_are_unknown() {
        let stranger = Running {
            thread: 1,
            idle: 2000,
            ..Running::default()
        };
        let cpus = on(&[runs(SLOT, 1), idle(), stranger, stranger], Some(2));
        assert_eq!(cpus.unknown().collect::<Vec<_>>(), [3]);
    }
}
