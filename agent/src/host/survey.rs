//! What there is on this host at a moment, in numbers.

mod credits;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use stoker_credits::Class;
use stoker_ebpf::CgroupId;
use stoker_policy::{ContainerState, MachineId, MachineState, Purpose, Shape, World};
use stoker_proto::v1;

pub use self::credits::{Credits, Sums};
use super::listing;
use crate::telemetry::credits::Standing;

/// What there is. To find out all machines and containers are looked at, as for a sample of use.
#[derive(Debug, Default)]
pub struct Survey {
    /// Machines by state, those with none too.
    pub machines: Vec<(v1::machine::State, u64)>,
    /// Containers by state, likewise.
    pub containers: Vec<(v1::container::State, u64)>,
    /// The warming pool of each runtime.
    pub pools: Vec<Pool>,
    /// Invocations that wait for a place.
    pub waiting: u64,
    /// How many may.
    pub waiting_limit: u64,
    /// Invocations that run, or for which a container is made.
    pub running: u64,
    /// What machines were given.
    pub given: Room,
    /// What balloons have of that, in MiB.
    pub balloon_mib: u64,
    /// What they may be given.
    pub limit: Room,
    /// What all machines have used since the agent's start, and those that are there before it too; nothing where it could not
    /// be read.
    pub used: Option<Used>,
    /// Machines by the class that they run as, those of which there is none too.
    pub classes: Vec<(Class, u64)>,
    /// Their accounts of credits; nothing where they could not be read.
    pub credits: Option<Credits>,
    /// What the loop has yet to hear.
    pub messages: u64,
}

/// The warming pool of a runtime.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Of which runtime.
    pub runtime: Arc<str>,
    /// Machines that are ready and of no account.
    pub warming: u64,
    /// Machines that boot, for whomever.
    pub booting: u64,
    /// How many should be ready.
    pub target: u64,
}

/// A part of the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// Machines.
    pub machines: u64,
    /// Their memory in MiB.
    pub memory_mib: u64,
    /// Their vCPUs, in thousandths.
    pub cpu_millis: u64,
    /// Their scratch disks in MiB.
    pub scratch_mib: u64,
    /// Their baselines, in thousandths of a CPU.
    pub baseline_millis: u64,
}

/// What machines have used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Used {
    /// CPU time in ns.
    pub cpu_ns: u64,
    /// Time in ns that they waited for a CPU.
    pub wait_ns: u64,
    /// Resident memory now, in bytes.
    pub memory_bytes: u64,
}

/// What the loop knows of it.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) survey: Survey,
    /// By what the use of the machines that are there is counted.
    pub(super) counted: Vec<CgroupId>,
    /// What those have used that are there no more.
    pub(super) ended: Used,
    /// The machines that have accounts of credits.
    pub(super) accounted: Vec<MachineId>,
    /// The sums of accounts that are closed.
    pub(super) closed: Sums,
}

// === impl Survey ===

impl Survey {
    /// Of all that there is.
    pub(super) fn of(world: &World) -> Self {
        let mut machines = [
            v1::machine::State::Booting,
            v1::machine::State::Warming,
            v1::machine::State::Active,
            v1::machine::State::Stopping,
        ]
        .map(|state| (state, 0));
        let mut containers = [
            v1::container::State::Starting,
            v1::container::State::Idle,
            v1::container::State::Busy,
            v1::container::State::Stopping,
        ]
        .map(|state| (state, 0));
        let rules = world.rules();
        let target = |(runtime, target): (&Arc<str>, &usize)| (runtime.clone(), (0, 0, count(*target)));
        let mut pools: BTreeMap<Arc<str>, (u64, u64, u64)> = rules.warming.iter().map(target).collect();
        let (mut given, mut balloon_mib) = (Room::default(), 0);
        for machine in world.machines() {
            add(&mut machines, listing::machine_state(machine.state));
            given.add(machine.shape);
            if let Some(launched) = &machine.launched {
                // One that ends has had all back.
                if machine.state == MachineState::Active {
                    balloon_mib += u64::from(launched.balloon.taken_mib);
                }
                continue;
            }
            let (warming, booting, _) = pools.entry(machine.runtime.clone()).or_default();
            match machine.state {
                MachineState::Warming => *warming += 1,
                MachineState::Booting => *booting += 1,
                _ => {}
            }
        }
        let mut running = 0;
        for container in world.containers() {
            add(&mut containers, listing::container_state(container.state));
            let serves = matches!(
                container.state,
                ContainerState::Busy(_) | ContainerState::Starting(Purpose::Serve(_))
            );
            running += u64::from(serves);
        }
        let pool = |(runtime, (warming, booting, target))| Pool {
            runtime,
            warming,
            booting,
            target,
        };
        Self {
            machines: machines.into(),
            containers: containers.into(),
            pools: pools.into_iter().map(pool).collect(),
            waiting: world.waiting().into(),
            waiting_limit: count(rules.queue_limit),
            running,
            given,
            balloon_mib,
            limit: Room {
                machines: count(rules.max_machines),
                memory_mib: rules.host_memory_mib,
                cpu_millis: rules.host_cpu_millis,
                scratch_mib: rules.host_scratch_mib,
                baseline_millis: rules.host_baseline_millis,
            },
            used: None,
            classes: credits::classes(world),
            credits: None,
            messages: 0,
        }
    }
}

fn count(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}

fn add<S: PartialEq>(counts: &mut [(S, u64)], state: S) {
    if let Some((_, count)) = counts.iter_mut().find(|(known, _)| *known == state) {
        *count += 1;
    }
}

// === impl Known ===

impl Known {
    /// With what is counted of the machines that are there, and their accounts; nothing of either where it could not be read.
    pub(super) fn with(self, usage: &HashMap<CgroupId, v1::Usage>, accounts: &HashMap<MachineId, Standing>) -> Survey {
        let readable = !usage.is_empty() || self.counted.is_empty();
        let used = readable.then(|| {
            let there = self.counted.iter().filter_map(|id| usage.get(id));
            there.fold(self.ended, |mut sum, usage| {
                sum.add(usage);
                sum.memory_bytes = sum.memory_bytes.saturating_add(usage.memory_bytes);
                sum
            })
        });
        Survey {
            used,
            credits: Credits::of(&self.accounted, self.closed, accounts),
            ..self.survey
        }
    }
}

// === impl Used ===

impl Used {
    /// With the times of one machine more.
    pub(super) fn add(&mut self, usage: &v1::Usage) {
        self.cpu_ns = self.cpu_ns.saturating_add(usage.cpu_ns);
        self.wait_ns = self.wait_ns.saturating_add(usage.wait_ns);
    }
}

// === impl Room ===

impl Room {
    fn add(&mut self, shape: Shape) {
        self.machines += 1;
        self.memory_mib += u64::from(shape.memory_mib);
        self.cpu_millis += u64::from(shape.vcpus) * 1000;
        self.scratch_mib += u64::from(shape.drive_mib);
        self.baseline_millis += u64::from(shape.baseline_millis);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ended_machines_used_counts_on() {
        let known = |counted: &[u64]| Known {
            survey: Survey::default(),
            counted: counted.iter().copied().map(CgroupId::from).collect(),
            ended: Used {
                cpu_ns: 100,
                wait_ns: 10,
                memory_bytes: 0,
            },
            accounted: Vec::new(),
            closed: Sums::default(),
        };
        let none = HashMap::new();
        let usage = v1::Usage {
            cpu_ns: 7,
            wait_ns: 1,
            memory_bytes: 4096,
            ..Default::default()
        };
        let read = HashMap::from([1, 2].map(|id| (CgroupId::from(id), usage)));
        // One that nobody lists any more is not counted twice.
        let used = known(&[1]).with(&read, &none).used.unwrap();
        assert_eq!((used.cpu_ns, used.wait_ns, used.memory_bytes), (107, 11, 4096));
        let used = known(&[]).with(&HashMap::new(), &none).used.unwrap();
        assert_eq!((used.cpu_ns, used.memory_bytes), (100, 0));
        assert_eq!(known(&[1]).with(&HashMap::new(), &none).used, None);
    }
}
