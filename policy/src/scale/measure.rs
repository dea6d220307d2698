//! What is measured of a machine, and what that comes to.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use stoker_credits::Credits;

use super::threshold::Metric;
use crate::Mono;

/// What was measured of a machine that was launched. Times are sums since it started, so that none is lost where it is measured
/// more seldom, and none counts twice where it is measured more often.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Measures {
    /// When, by the clock of `Now::mono`. One that is not after the last is ignored.
    pub at: Mono,
    /// CPU time of its vCPUs in ns, as the host's kernel counts it.
    pub cpu_ns: u64,
    /// Time in ns that its vCPUs were runnable and waited for a CPU of the host.
    pub wait_ns: u64,
    /// What it can spend of its credits; nothing where it has no account.
    pub credits: Option<Credits>,
    /// What its guest says; nothing where that does not answer.
    pub guest: Option<GuestMeasures>,
}

/// What a guest says of itself. It may lie; it can harm nobody by that but its own machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestMeasures {
    /// Memory in bytes that it could not give up: all of it but `MemAvailable` (proc_meminfo(5)).
    pub memory_bytes: u64,
    /// `total` of `some` in `/proc/pressure/cpu`, in us (Documentation/accounting/psi.rst); nothing where its kernel does not count it.
    pub cpu_pressure_us: Option<u64>,
    /// The same of `/proc/pressure/memory`.
    pub memory_pressure_us: Option<u64>,
    /// The same of `/proc/pressure/io`.
    pub io_pressure_us: Option<u64>,
}

/// What a machine uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Use {
    /// CPU in millicores.
    pub cpu_millis: u32,
    /// Memory in MiB that its guest could not give up; nothing where it has not said.
    pub memory_mib: Option<u32>,
}

/// What percentages are of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Has {
    pub(super) cpu_millis: u32,
    pub(super) memory_mib: u32,
    /// What its balloon has of that.
    pub(super) balloon_mib: u32,
}

/// The values of all metrics in a time, in their units; nothing of what was not measured.
pub(super) type Values = [Option<u64>; Metric::ALL.len()];

// === impl Measures ===

impl Measures {
    /// The same of a machine of whose memory its balloon has so many MiB: the guest can't give that up, but does not use it.
    pub(super) fn without(&self, balloon_mib: u32) -> Self {
        let mut measures = *self;
        if let Some(guest) = &mut measures.guest {
            guest.memory_bytes = guest.memory_bytes.saturating_sub(u64::from(balloon_mib) << 20);
        }
        measures
    }

    /// What it comes to since it was measured before. What counts downwards, since the guest started anew or lies, is not known.
    pub(super) fn since(&self, before: &Self, has: Has) -> (Use, Values) {
        let passed = self.at.saturating_sub(before.at);
        let (passed_ns, passed_us) = (ns(passed).max(1), ns(passed).div_ceil(1000).max(1));
        let cpu_ns = self.cpu_ns.checked_sub(before.cpu_ns);
        let wait_ns = self.wait_ns.checked_sub(before.wait_ns);
        let millis = cpu_ns.map(|cpu_ns| cpu_ns.saturating_mul(1000) / passed_ns);
        let cpu_use = millis.map(|millis| part(millis, has.cpu_millis.into()));
        let cpu_wait = cpu_ns
            .zip(wait_ns)
            .map(|(cpu, wait)| part(wait, cpu.saturating_add(wait)));
        let guest = self.guest.as_ref();
        let memory_mib = guest.map(|guest| guest.memory_bytes.div_ceil(1 << 20));
        let pressure = |of: fn(&GuestMeasures) -> Option<u64>| {
            let more = of(guest?)?.checked_sub(of(before.guest.as_ref()?)?)?;
            Some(part(more, passed_us).min(10_000))
        };
        let used = Use {
            cpu_millis: millis.map_or(0, saturated),
            memory_mib: memory_mib.map(saturated),
        };
        let values = [
            cpu_use,
            cpu_wait,
            memory_mib.map(|used| part(used, has.memory_mib.into())),
            pressure(|guest| guest.cpu_pressure_us),
            // What waits may wait for what the host has taken back: to give the machine more would give the host less.
            pressure(|guest| guest.memory_pressure_us).filter(|_| has.balloon_mib == 0),
            pressure(|guest| guest.io_pressure_us),
            self.credits.map(Credits::millis),
        ];
        (used, values)
    }
}

// === impl GuestMeasures ===

impl GuestMeasures {
    /// The metrics that its kernel does not count.
    pub(super) fn unsupported(self) -> impl Iterator<Item = Metric> {
        let all = [
            (Metric::CpuPressure, self.cpu_pressure_us),
            (Metric::MemoryPressure, self.memory_pressure_us),
            (Metric::IoPressure, self.io_pressure_us),
        ];
        all.into_iter()
            .filter_map(|(metric, counted)| counted.is_none().then_some(metric))
    }
}

// === impl Use ===

impl Use {
    /// The more of each.
    pub(super) fn max(self, other: Self) -> Self {
        Self {
            cpu_millis: self.cpu_millis.max(other.cpu_millis),
            memory_mib: self.memory_mib.max(other.memory_mib),
        }
    }
}

/// In hundredths of a percent.
pub(crate) fn part(of: u64, all: u64) -> u64 {
    of.saturating_mul(10_000) / all.max(1)
}

fn ns(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn saturated(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HAS: Has = Has {
        cpu_millis: 2000,
        memory_mib: 1024,
        balloon_mib: 0,
    };

    /// Of a guest whose kernel counts pressure, of which there was none.
    const CALM: GuestMeasures = GuestMeasures {
        memory_bytes: 0,
        cpu_pressure_us: Some(0),
        memory_pressure_us: Some(0),
        io_pressure_us: Some(0),
    };

    fn value(values: &Values, metric: Metric) -> Option<u64> {
        values[metric.index()]
    }

    #[test]
    fn sums_become_parts() {
        let before = Measures {
            guest: Some(CALM),
            ..Measures::default()
        };
        let after = Measures {
            at: Duration::from_secs(2),
            cpu_ns: 3_000_000_000,
            wait_ns: 1_000_000_000,
            credits: Some(Credits::new(7)),
            guest: Some(GuestMeasures {
                memory_bytes: 768 << 20,
                cpu_pressure_us: Some(500_000),
                memory_pressure_us: Some(1),
                io_pressure_us: Some(2_000_000),
            }),
        };
        let (used, values) = after.since(&before, HAS);
        assert_eq!((used.cpu_millis, used.memory_mib), (1500, Some(768)));
        let expected = [
            (Metric::CpuUse, 7500),
            (Metric::CpuWait, 2500),
            (Metric::MemoryUse, 7500),
            (Metric::CpuPressure, 2500),
            (Metric::MemoryPressure, 0),
            (Metric::IoPressure, 10_000),
            (Metric::Credits, 7000),
        ];
        for (metric, expected) in expected {
            assert_eq!(value(&values, metric), Some(expected), "{metric}");
        }
    }

    #[test]
    fn what_was_not_measured_or_counts_downwards_is_not_known() {
        let guest = GuestMeasures {
            cpu_pressure_us: Some(9),
            ..CALM
        };
        let before = Measures {
            cpu_ns: 5,
            guest: Some(guest),
            ..Measures::default()
        };
        let after = Measures {
            at: Duration::from_secs(1),
            cpu_ns: 4,
            guest: Some(CALM),
            ..Measures::default()
        };
        let (_, values) = after.since(&before, HAS);
        for metric in [Metric::CpuUse, Metric::CpuWait, Metric::CpuPressure, Metric::Credits] {
            assert_eq!(value(&values, metric), None, "{metric}");
        }
        assert_eq!(value(&values, Metric::IoPressure), Some(0));
        let silent = Measures { guest: None, ..after };
        let (used, values) = silent.since(&before, HAS);
        assert_eq!((used.memory_mib, value(&values, Metric::MemoryUse)), (None, None));
    }

    #[test]
    fn what_waits_for_memory_is_not_known_while_the_host_has_some_of_it() {
        let before = Measures {
            guest: Some(CALM),
            ..Measures::default()
        };
        let waits = GuestMeasures {
            memory_pressure_us: Some(500_000),
            io_pressure_us: Some(500_000),
            ..CALM
        };
        let after = Measures {
            at: Duration::from_secs(1),
            guest: Some(waits),
            ..Measures::default()
        };
        for (balloon_mib, known) in [(0, Some(5000)), (16, None)] {
            let (_, values) = after.since(&before, Has { balloon_mib, ..HAS });
            assert_eq!(value(&values, Metric::MemoryPressure), known);
            assert_eq!(value(&values, Metric::IoPressure), Some(5000));
        }
    }

    #[test]
    fn what_a_kernel_does_not_count_is_not_known() {
        let before = Measures {
            guest: Some(CALM),
            ..Measures::default()
        };
        let without = GuestMeasures {
            memory_bytes: 1 << 20,
            io_pressure_us: Some(0),
            ..GuestMeasures::default()
        };
        let after = Measures {
            at: Duration::from_secs(1),
            guest: Some(without),
            ..Measures::default()
        };
        let (_, values) = after.since(&before, HAS);
        assert_eq!(value(&values, Metric::CpuPressure), None);
        assert_eq!(value(&values, Metric::IoPressure), Some(0));
        let unsupported: Vec<_> = without.unsupported().collect();
        assert_eq!(unsupported, [Metric::CpuPressure, Metric::MemoryPressure]);
        assert_eq!(CALM.unsupported().count(), 0);
    }

    #[test]
    fn no_lie_is_too_large() {
        let lies = Measures {
            at: Duration::from_nanos(1),
            cpu_ns: u64::MAX,
            wait_ns: u64::MAX,
            credits: Some(Credits::from_millis(u64::MAX)),
            guest: Some(GuestMeasures {
                memory_bytes: u64::MAX,
                cpu_pressure_us: Some(u64::MAX),
                memory_pressure_us: Some(u64::MAX),
                io_pressure_us: Some(u64::MAX),
            }),
        };
        let before = Measures {
            guest: Some(CALM),
            ..Measures::default()
        };
        let none = Has {
            cpu_millis: 0,
            memory_mib: 0,
            balloon_mib: 0,
        };
        let (used, values) = lies.since(&before, none);
        assert_eq!(used.cpu_millis, u32::MAX);
        assert_eq!(
            value(&values, Metric::IoPressure),
            Some(10_000),
            "no more than all the time"
        );
    }
}
