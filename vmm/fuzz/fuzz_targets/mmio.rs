//! Any order of register accesses of any width, with a real device behind them whose configuration changes, is survived.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use stoker_vmm::bus::BusDevice as _;
use stoker_vmm::devices::virtio::mmio::{MmioInterrupt, MmioTransport};
use stoker_vmm::devices::virtio::rng::Rng;
use stoker_vmm::devices::virtio::{Activation, Backend, VirtioDevice as _};
use stoker_vmm::memory::allocate;
use vmm_sys_util::eventfd::EventFd;

/// The device in the same thread.
struct Inline(Rng);

impl Backend for Inline {
    fn activate(&mut self, activation: Activation) {
        self.0.activate(activation);
    }
    fn notify(&mut self) {
        self.0.process();
    }
    fn reset(&mut self) {
        self.0.reset();
    }
}

fuzz_target!(|data: &[u8]| {
    let device = Rng::default();
    let interrupt = Arc::new(MmioInterrupt::new(EventFd::new(0x800).unwrap()));
    let info = device.info();
    let config = info.config.clone();
    let mut transport = MmioTransport::new(info, Inline(device), allocate(32).unwrap(), interrupt);
    let (steps, rest) = data.split_at(data.len().min(4096));
    let _ = rest;
    for step in steps.chunks_exact(6) {
        let [kind, offset, value @ ..] = <[u8; 6]>::try_from(step).unwrap();
        if kind == 0xff {
            config.replace(vec![offset; usize::from(value[0])]);
        }
        // Registers mostly; sometimes anything.
        let offset = match kind & 0x80 {
            0 => u64::from(offset & 0xfc),
            _ => u64::from(offset) << (kind % 58),
        };
        let width = [4, 4, 4, 4, 1, 2, 8, 3][usize::from(kind >> 1 & 7)];
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&value);
        if kind & 1 == 0 {
            transport.write(offset, &bytes[..width]);
        } else {
            transport.read(offset, &mut bytes[..width]);
        }
    }
});
