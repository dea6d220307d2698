//! What runs on each CPU, and how much of its time is not charged yet.

use nix::time::{ClockId, clock_gettime};
use stoker_ebpf_types::{PARTS, Running, Subject, is_throttled, woken};

use crate::slots::Slot;
use crate::usage::Time;

/// What each CPU ran at a moment. Possible CPUs are numbered without gaps.
#[derive(Debug)]
pub(crate) struct OnCpus {
    cpus: Vec<OnCpu>,
    /// The CPU on which this was read. It ran the reader.
    own: Option<usize>,
}

/// What one CPU ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OnCpu {
    pub(crate) running: Running,
    /// When another CPU charged its thread last, in ns; 0 where none did or that was not looked at.
    pub(crate) charged_ns: u64,
}

// === impl OnCpus ===

impl OnCpus {
    pub(crate) fn read<E>(read: impl FnOnce() -> Result<Vec<Running>, E>) -> Result<Self, E> {
        let before = nix::sched::sched_getcpu().ok();
        let cpus = read()?
            .into_iter()
            .map(|running| OnCpu { running, charged_ns: 0 })
            .collect();
        let after = nix::sched::sched_getcpu().ok();
        // Who moved meanwhile was read on either.
        let own = before.filter(|_| before == after);
        Ok(Self { cpus, own })
    }

    /// Finds out whose the threads are that were not charged yet since they came, as far as that is known of an earlier time.
    pub(crate) fn find(&mut self, subject: impl Fn(u64) -> Option<Subject>) {
        for OnCpu { running, .. } in &mut self.cpus {
            if running.is_charged == 0
                && running.subject.cgroup == 0
                && !running.is_idle()
                && let Some(subject) = subject(running.thread)
            {
                running.subject = subject;
            }
        }
    }

    /// CPUs that run a thread of which is not known whose it is.
    pub(crate) fn unknown(&self) -> impl Iterator<Item = u32> {
        (0..)
            .zip(self.cpus.iter().enumerate())
            .filter_map(|(number, (cpu, OnCpu { running, .. }))| {
                (Some(cpu) != self.own && running.subject.cgroup == 0 && !running.is_idle()).then_some(number)
            })
    }

    /// Whether a subject's thread runs that was not charged since it was found out whose it is.
    pub(crate) fn is_settled(&self) -> bool {
        self.cpus
            .iter()
            .any(|OnCpu { running, .. }| running.is_settled != 0 && running.subject.cgroup != 0)
    }

    /// The CPUs that run a thread of this subject's.
    pub(crate) fn of_mut(&mut self, slot: Slot) -> impl Iterator<Item = &mut OnCpu> {
        self.cpus.iter_mut().filter(move |cpu| slot.has(&cpu.running))
    }

    /// The numbers of those CPUs.
    pub(crate) fn cpus_of(&self, slot: Slot) -> impl Iterator<Item = usize> {
        let cpus = self.cpus.iter().enumerate();
        cpus.filter_map(move |(number, cpu)| slot.has(&cpu.running).then_some(number))
    }

    /// Whether a thread of this subject's runs.
    pub(crate) fn runs(&self, slot: Slot) -> bool {
        self.cpus_of(slot).next().is_some()
    }

    /// What is not charged of this subject's at `now_ns`, a moment between this reading and the one `after`, by part; `None` where
    /// one of its threads was charged or left its CPU meanwhile, or another came.
    pub(crate) fn uncharged(&self, after: &Self, slot: Slot, now_ns: u64) -> Option<[Time; PARTS as usize]> {
        let mut sums = [Time::default(); PARTS as usize];
        for (before, after) in self.cpus.iter().zip(&after.cpus) {
            if !slot.has(&before.running) && !slot.has(&after.running) {
                continue;
            }
            if before != after {
                return None;
            }
            let Running {
                subject,
                since_ns,
                waits,
                ..
            } = before.running;
            let part = usize::try_from(subject.place % PARTS).ok()?;
            let sum = sums.get_mut(part)?;
            sum.cpu_ns += now_ns.saturating_sub(since_ns.max(before.charged_ns));
            if waits != 0 {
                let waited = since_ns.saturating_sub(woken(waits));
                sum.wait_ns += waited;
                sum.throttled_ns += if is_throttled(waits) { waited } else { 0 };
            }
        }
        Some(sums)
    }
}

/// The time that the programs go by, in ns.
pub(crate) fn now_ns() -> Result<u64, nix::Error> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
    let ns = now.tv_sec() * 1_000_000_000 + now.tv_nsec();
    Ok(u64::try_from(ns).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use stoker_ebpf_types::Part;

    use super::*;

    const SLOT: Slot = Slot {
        index: 3,
        generation: 7,
    };

    fn runs(slot: Slot, part: Part, since_ns: u64) -> Running {
        Running {
            since_ns,
            waits: woken(92),
            subject: slot.subject(part, 99),
            thread: 1000,
            idle: 2000,
            ..Running::default()
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
        let cpus = cpus.iter().map(|&running| OnCpu { running, charged_ns: 0 }).collect();
        OnCpus { cpus, own }
    }

    #[test]
    fn what_runs_on_is_told_up_to_now() {
        let cpus = [runs(SLOT, Part::Vcpus, 100), idle(), runs(SLOT, Part::Vmm, 140)];
        let mut before = on(&cpus, None);
        let [own, vcpus, vmm] = before.uncharged(&before, SLOT, 150).unwrap();
        assert_eq!(own, Time::default());
        assert_eq!((vcpus.cpu_ns, vcpus.wait_ns), (50, 8));
        assert_eq!((vmm.cpu_ns, vmm.wait_ns), (10, 48));
        let other = Slot { generation: 8, ..SLOT };
        assert!(before.runs(SLOT) && !before.runs(other));
        assert_eq!(before.uncharged(&before, other, 150), Some([Time::default(); 3]));
        // Charged by another CPU, it still waited as long before it came.
        before.of_mut(SLOT).next().unwrap().charged_ns = 130;
        let [_, vcpus, _] = before.uncharged(&before, SLOT, 150).unwrap();
        assert_eq!((vcpus.cpu_ns, vcpus.wait_ns), (20, 8));
    }

    #[test]
    fn one_that_left_or_came_meanwhile_is_not_told() {
        let runs = |since_ns| on(&[runs(SLOT, Part::Own, since_ns)], None);
        let (ran, slept) = (runs(100), on(&[idle()], None));
        assert_eq!(ran.uncharged(&slept, SLOT, 150), None);
        assert_eq!(slept.uncharged(&ran, SLOT, 150), None);
        // It left and came back.
        assert_eq!(ran.uncharged(&runs(120), SLOT, 150), None);
    }

    #[test]
    fn one_that_is_known_of_an_earlier_time_is_no_stranger() {
        let came = Running {
            thread: 1000,
            idle: 2000,
            ..Running::default()
        };
        let charged = Running { is_charged: 1, ..came };
        let mut cpus = on(&[came, charged, idle()], None);
        cpus.find(|thread| (thread == 1000).then_some(SLOT.subject(Part::Vcpus, 99)));
        assert!(cpus.runs(SLOT));
        // One that was charged is known by that: it is nobody's now.
        assert_eq!(cpus.unknown().collect::<Vec<_>>(), [1]);
    }

    #[test]
    fn only_cpus_with_a_stranger_are_unknown() {
        let stranger = Running {
            thread: 1,
            idle: 2000,
            ..Running::default()
        };
        let cpus = on(&[runs(SLOT, Part::Own, 1), idle(), stranger, stranger], Some(2));
        assert_eq!(cpus.unknown().collect::<Vec<_>>(), [3]);
    }
}
