//! Machines whose devices get requests late, whose guests take what they like, and of which reports are late, out of order or
//! lost.

use std::collections::{BTreeMap, VecDeque};

use super::super::driver::Driver;
use crate::scale::{Size, Taken};
use crate::{Command, Decision, Event, MachineId};

/// The devices of all machines, as they truly are.
#[derive(Default)]
pub(super) struct Fleet {
    machines: BTreeMap<MachineId, Devices>,
    /// On their way to the agent.
    reports: Vec<(MachineId, u64, Taken)>,
}

pub(super) struct Devices {
    /// On their way to the devices, in order.
    requests: VecDeque<(u64, Size)>,
    /// The last that reached them.
    number: u64,
    asked: Size,
    has: Taken,
}

impl Fleet {
    /// Takes what was decided.
    pub(super) fn note(&mut self, decisions: &[Decision]) {
        for decision in decisions {
            match &decision.command {
                Command::LaunchMachine { machine, launch, .. } => {
                    let devices = Devices {
                        requests: VecDeque::new(),
                        number: 0,
                        asked: launch.size,
                        has: Taken {
                            vcpus: launch.size.vcpus,
                            memory_mib: launch.base_mib,
                        },
                    };
                    self.machines.insert(*machine, devices);
                }
                Command::ResizeMachine { machine, number, asked } => {
                    let devices = self.machines.get_mut(machine).unwrap();
                    devices.requests.push_back((*number, *asked));
                }
                _ => {}
            }
        }
    }

    pub(super) fn machines(&self) -> Vec<MachineId> {
        self.machines.keys().copied().collect()
    }

    pub(super) fn ended(&mut self, machine: MachineId) {
        self.machines.remove(&machine);
    }

    /// A request reaches a machine's devices.
    pub(super) fn deliver(&mut self, machine: MachineId) {
        if let Some(devices) = self.machines.get_mut(&machine)
            && let Some((number, asked)) = devices.requests.pop_front()
        {
            (devices.number, devices.asked) = (number, asked);
        }
    }

    /// A guest goes towards what its devices offer, by so many hundredths of the way.
    pub(super) fn take(&mut self, machine: MachineId, hundredths: u32) {
        if let Some(devices) = self.machines.get_mut(&machine) {
            let towards = |has: u32, asked: u32| {
                let by = has.abs_diff(asked) * hundredths.min(100) / 100;
                if has < asked { has + by } else { has - by }
            };
            devices.has.vcpus = towards(devices.has.vcpus, devices.asked.vcpus);
            devices.has.memory_mib = towards(devices.has.memory_mib, devices.asked.memory_mib);
        }
    }

    /// Its devices tell what it has; that is on its way.
    pub(super) fn report(&mut self, machine: MachineId) {
        if let Some(devices) = self.machines.get(&machine) {
            self.reports.push((machine, devices.number, devices.has));
        }
    }

    /// One of those that are on their way arrives, or is lost.
    pub(super) fn arrive(&mut self, n: usize, lost: bool) -> Option<Event> {
        let at = n.checked_rem(self.reports.len())?;
        let (machine, number, taken) = self.reports.swap_remove(at);
        (!lost).then_some(Event::MachineResized { machine, number, taken })
    }

    /// All requests reach their devices, all guests take what they are offered, and all of it is told.
    pub(super) fn settle(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        for (machine, devices) in &mut self.machines {
            if let Some((number, asked)) = devices.requests.drain(..).next_back() {
                (devices.number, devices.asked) = (number, asked);
            }
            devices.has = Taken {
                vcpus: devices.asked.vcpus,
                memory_mib: devices.asked.memory_mib,
            };
            events.push(Event::MachineResized {
                machine: *machine,
                number: devices.number,
                taken: devices.has,
            });
        }
        self.reports.clear();
        events
    }

    /// What guests have is never more than what counts, and all of it is there.
    pub(super) fn check(&self, driver: &Driver) {
        let (world, rules) = (driver.world(), driver.world().rules());
        let (mut millis, mut mib) = (0, 0);
        for machine in world.machines() {
            let (vcpus, memory_mib) = match self.machines.get(&machine.id) {
                Some(devices) => {
                    let has = devices.has;
                    assert!(has.vcpus <= machine.shape.vcpus, "it has more vCPUs than count");
                    assert!(
                        has.memory_mib <= machine.shape.memory_mib,
                        "it has more memory than counts"
                    );
                    (has.vcpus, has.memory_mib)
                }
                None => (machine.shape.vcpus, machine.shape.memory_mib),
            };
            millis += u64::from(vcpus) * 1000;
            mib += u64::from(memory_mib);
        }
        assert!(
            millis <= rules.host_cpu_millis && mib <= rules.host_memory_mib,
            "more than the host has"
        );
    }
}
