//! Plugs vCPUs while the machine runs, and takes back what the guest gives: the hot-plug device beside the vCPUs' threads.
//!
//! Nothing waits for the guest. What was asked for is written down; what the guest does about it wakes the machine's owner.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use super::build::BuildError;
use super::vcpu_maker::VcpuMaker;
use crate::devices::cpu_hotplug::{CpuHotplug, Ejected, GSI, Line};
use crate::vcpu::Vcpus;

/// The vCPUs of a machine that may have more, or fewer, than it started with.
pub struct Plug {
    device: Arc<Mutex<CpuHotplug>>,
    maker: VcpuMaker,
    wake: Arc<EventFd>,
    ceiling: u32,
    asked: u32,
    /// Those that are to be plugged again once their threads have ended: they were asked for after the guest had been asked to
    /// give them back.
    again: BTreeSet<u32>,
    /// What went wrong since the last resize.
    trouble: Option<String>,
}

/// An interrupt line of KVM's I/O APIC.
struct IoApicPin {
    vm: Arc<VmFd>,
    gsi: u32,
}

impl Line for IoApicPin {
    fn set(&mut self, raised: bool) {
        // A pin that there is KVM does not refuse (api.rst, `KVM_IRQ_LINE`).
        let _ = self.vm.set_irq_line(self.gsi, raised);
    }
}

// === impl Plug ===

impl Plug {
    /// Of a machine that starts with `vcpus` and may have up to `ceiling`, which `maker` makes.
    pub(super) fn new(vcpus: u32, ceiling: u32, maker: VcpuMaker, vm: Arc<VmFd>, wake: EventFd) -> Self {
        let wake = Arc::new(wake);
        let line = Box::new(IoApicPin { vm, gsi: GSI });
        let device = CpuHotplug::new(vcpus, ceiling, line, wake.clone());
        Self {
            device: Arc::new(Mutex::new(device)),
            maker,
            wake,
            ceiling,
            asked: vcpus,
            again: BTreeSet::new(),
            trouble: None,
        }
    }

    /// The registers, for a bus.
    pub(super) fn device(&self) -> Arc<Mutex<CpuHotplug>> {
        self.device.clone()
    }

    /// Readable when [`Self::settle`] has something to do.
    pub(super) fn wake(&self) -> &Arc<EventFd> {
        &self.wake
    }

    /// How many vCPUs the guest is to have.
    pub(super) fn asked(&self) -> u32 {
        self.asked
    }

    /// Why it has another number of them, as far as anybody has said so since the last resize. Empty where nobody has.
    pub(super) fn refused(&self) -> String {
        let refusal = lock(&self.device).refusal();
        let said = refusal.map(|refusal| refusal.to_string());
        said.or_else(|| self.trouble.clone()).unwrap_or_default()
    }

    /// Whether a machine may have so many vCPUs.
    ///
    /// # Errors
    /// In words for a person.
    pub(super) fn check(&self, asked: u32) -> Result<(), String> {
        let ceiling = self.ceiling;
        if (1..=ceiling).contains(&asked) {
            return Ok(());
        }
        Err(format!(
            "`vcpus` is {asked}; this machine may have 1 to {ceiling} (`max_vcpus`)"
        ))
    }

    /// Gives the guest as many vCPUs, or asks it to give some back. Those that are to go are the last.
    ///
    /// # Errors
    /// In words for a person; nothing has changed then.
    pub(super) fn resize(&mut self, vcpus: &mut Vcpus, asked: u32) -> Result<(), String> {
        self.check(asked)?;
        self.settle(vcpus);
        let missing = (0..asked).filter(|number| !vcpus.is_running(*number));
        let (later, now): (Vec<u32>, Vec<u32>) = missing.partition(|number| vcpus.is_leaving(*number));
        self.start(vcpus, &now).map_err(|error| error.to_string())?;
        let mut device = lock(&self.device);
        device.forget_refusal();
        for number in now {
            device.plug(number);
        }
        for number in 0..self.ceiling {
            match number < asked {
                true => device.keep(number),
                false => device.take_back(number),
            }
        }
        drop(device);
        self.again = later.into_iter().collect();
        self.asked = asked;
        self.trouble = None;
        Ok(())
    }

    /// Follows what the guest has given back, and plugs again what it was to keep after all.
    pub(super) fn settle(&mut self, vcpus: &mut Vcpus) {
        let _ = self.wake.read();
        // Taken out of its lock first: the guest's vCPUs wait for that.
        let ejected = lock(&self.device).take_ejected();
        for Ejected { number, asked_for } in ejected {
            vcpus.dismiss(number);
            if number < self.asked && asked_for {
                self.again.insert(number);
            } else if number < self.asked {
                self.trouble = Some(format!("the guest gave back vCPU {number}, which nobody asked for"));
            }
        }
        vcpus.take_left();
        let ended = self.again.extract_if(.., |number| !vcpus.is_leaving(*number));
        let ended: Vec<u32> = ended.collect();
        for number in ended {
            match self.start(vcpus, &[number]) {
                Ok(()) => lock(&self.device).plug(number),
                Err(error) => self.trouble = Some(error.to_string()),
            }
        }
    }

    /// Makes those that are absent and starts the threads of all.
    fn start(&self, vcpus: &mut Vcpus, numbers: &[u32]) -> Result<(), BuildError> {
        for &number in numbers {
            if vcpus.is_absent(number) {
                vcpus.add(number, self.maker.make_later(number)?);
            }
        }
        Ok(vcpus.start(numbers)?)
    }
}

fn lock(device: &Mutex<CpuHotplug>) -> MutexGuard<'_, CpuHotplug> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}
