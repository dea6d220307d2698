//! The virtio-mmio transport, version 2 (virtio 1.3, 4.2): registers in front of a device.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_bindings::{virtio_config, virtio_mmio};
use virtio_queue::{Queue, QueueT as _};
use vmm_sys_util::eventfd::EventFd;

use super::queue::VirtQueue;
use super::{Activation, Backend, DeviceInfo, Interrupt, feature};
use crate::bus::BusDevice;
use crate::memory::GuestMemory;

/// Offset of the register whose writes are the driver's notifications, for an ioeventfd.
pub const QUEUE_NOTIFY: u64 = virtio_mmio::VIRTIO_MMIO_QUEUE_NOTIFY as u64;

/// Offset of the device's configuration space.
const CONFIG: u64 = virtio_mmio::VIRTIO_MMIO_CONFIG as u64;
/// `virt` in ASCII.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// Ours; no driver looks at it.
const VENDOR: u32 = 0x4b54_5353;

/// Bits of the device status field (virtio 1.3, 2.1).
mod status {
    use super::virtio_config as config;

    pub(super) const ACKNOWLEDGE: u32 = config::VIRTIO_CONFIG_S_ACKNOWLEDGE;
    pub(super) const DRIVER: u32 = config::VIRTIO_CONFIG_S_DRIVER;
    pub(super) const DRIVER_OK: u32 = config::VIRTIO_CONFIG_S_DRIVER_OK;
    pub(super) const FEATURES_OK: u32 = config::VIRTIO_CONFIG_S_FEATURES_OK;
    pub(super) const NEEDS_RESET: u32 = config::VIRTIO_CONFIG_S_NEEDS_RESET;
    pub(super) const FAILED: u32 = config::VIRTIO_CONFIG_S_FAILED;
}

/// The interrupt shared by the transport and its device.
pub struct MmioInterrupt {
    /// `InterruptStatus`.
    pending: AtomicU32,
    needs_reset: AtomicU32,
    line: EventFd,
}

/// The registers of one device.
pub struct MmioTransport<B> {
    info: DeviceInfo,
    backend: B,
    memory: GuestMemory,
    interrupt: Arc<MmioInterrupt>,
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<Queue>,
    /// The backend holds the queues.
    active: bool,
}

// === impl MmioInterrupt ===

impl MmioInterrupt {
    /// An interrupt that writes `line` (an irqfd of an edge-triggered line).
    pub fn new(line: EventFd) -> Self {
        Self {
            pending: AtomicU32::new(0),
            needs_reset: AtomicU32::new(0),
            line,
        }
    }

    fn raise(&self, cause: u32) {
        self.pending.fetch_or(cause, Ordering::AcqRel);
        // A full counter means that the line is being raised anyway.
        let _ = self.line.write(1);
    }

    fn clear(&self) {
        self.pending.store(0, Ordering::Release);
        self.needs_reset.store(0, Ordering::Release);
    }
}

impl Interrupt for MmioInterrupt {
    fn queue_used(&self, _queue: u16) {
        self.raise(virtio_mmio::VIRTIO_MMIO_INT_VRING);
    }

    fn config_changed(&self) {
        self.raise(virtio_mmio::VIRTIO_MMIO_INT_CONFIG);
    }

    fn needs_reset(&self) {
        self.needs_reset.store(status::NEEDS_RESET, Ordering::Release);
        self.raise(virtio_mmio::VIRTIO_MMIO_INT_CONFIG);
    }
}

// === impl MmioTransport ===

impl<B: Backend> MmioTransport<B> {
    /// Registers in front of `backend`, which is the device that `info` tells of.
    pub fn new(info: DeviceInfo, backend: B, memory: GuestMemory, interrupt: Arc<MmioInterrupt>) -> Self {
        info.config.connect(interrupt.clone());
        // Sizes are the devices' own powers of two; one that is not gives a queue that no driver can use.
        let queues = info
            .queue_sizes
            .iter()
            .map(|size| Queue::new(*size).unwrap_or_default())
            .collect();
        Self {
            info,
            backend,
            memory,
            interrupt,
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues,
            active: false,
        }
    }

    /// The device behind the registers.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    fn read_register(&self, offset: u64) -> u32 {
        let queue = self.queues.get(self.queue_select as usize);
        match offset as u32 {
            virtio_mmio::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            virtio_mmio::VIRTIO_MMIO_VERSION => VERSION,
            virtio_mmio::VIRTIO_MMIO_DEVICE_ID => self.info.kind,
            virtio_mmio::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            virtio_mmio::VIRTIO_MMIO_DEVICE_FEATURES => match self.device_features_select {
                0 => self.info.features as u32,
                1 => (self.info.features >> 32) as u32,
                _ => 0,
            },
            virtio_mmio::VIRTIO_MMIO_QUEUE_NUM_MAX => queue.map_or(0, |queue| u32::from(queue.max_size())),
            virtio_mmio::VIRTIO_MMIO_QUEUE_READY => queue.map_or(0, |queue| u32::from(queue.ready())),
            virtio_mmio::VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.pending.load(Ordering::Acquire),
            virtio_mmio::VIRTIO_MMIO_STATUS => self.status | self.interrupt.needs_reset.load(Ordering::Acquire),
            // No shared memory regions: their length and base read as all ones (virtio 1.3, 4.2.2).
            virtio_mmio::VIRTIO_MMIO_SHM_LEN_LOW
            | virtio_mmio::VIRTIO_MMIO_SHM_LEN_HIGH
            | virtio_mmio::VIRTIO_MMIO_SHM_BASE_LOW
            | virtio_mmio::VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            virtio_mmio::VIRTIO_MMIO_CONFIG_GENERATION => self.info.config.generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset as u32 {
            virtio_mmio::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_select = value,
            virtio_mmio::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_select = value,
            virtio_mmio::VIRTIO_MMIO_DRIVER_FEATURES => self.accept_features(value),
            virtio_mmio::VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value,
            virtio_mmio::VIRTIO_MMIO_QUEUE_NOTIFY => {
                if self.active {
                    self.backend.notify();
                }
            }
            virtio_mmio::VIRTIO_MMIO_INTERRUPT_ACK => {
                self.interrupt.pending.fetch_and(!value, Ordering::AcqRel);
            }
            virtio_mmio::VIRTIO_MMIO_STATUS => self.write_status(value),
            _ => self.write_queue(offset as u32, value),
        }
    }

    fn accept_features(&mut self, value: u32) {
        if self.status & (status::DRIVER | status::FEATURES_OK) != status::DRIVER {
            return;
        }
        let (shift, value) = match self.driver_features_select {
            0 => (0, u64::from(value)),
            1 => (32, u64::from(value)),
            _ => return,
        };
        self.driver_features &= !(u64::from(u32::MAX) << shift);
        self.driver_features |= value << shift;
    }

    fn write_queue(&mut self, offset: u32, value: u32) {
        // A queue is set up between FEATURES_OK and DRIVER_OK (virtio 1.3, 3.1.1).
        if self.status & (status::FEATURES_OK | status::DRIVER_OK) != status::FEATURES_OK {
            return;
        }
        let Some(queue) = self.queues.get_mut(self.queue_select as usize) else {
            return;
        };
        if queue.ready() && offset != virtio_mmio::VIRTIO_MMIO_QUEUE_READY {
            return;
        }
        match offset {
            // A size that is no power of two or too large leaves the queue as it is.
            virtio_mmio::VIRTIO_MMIO_QUEUE_NUM => {
                queue.set_size(u16::try_from(value).unwrap_or(0));
            }
            virtio_mmio::VIRTIO_MMIO_QUEUE_READY => queue.set_ready(value == 1),
            virtio_mmio::VIRTIO_MMIO_QUEUE_DESC_LOW => {
                queue.set_desc_table_address(Some(value), None);
            }
            virtio_mmio::VIRTIO_MMIO_QUEUE_DESC_HIGH => {
                queue.set_desc_table_address(None, Some(value));
            }
            virtio_mmio::VIRTIO_MMIO_QUEUE_AVAIL_LOW => {
                queue.set_avail_ring_address(Some(value), None);
            }
            virtio_mmio::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => {
                queue.set_avail_ring_address(None, Some(value));
            }
            virtio_mmio::VIRTIO_MMIO_QUEUE_USED_LOW => {
                queue.set_used_ring_address(Some(value), None);
            }
            virtio_mmio::VIRTIO_MMIO_QUEUE_USED_HIGH => {
                queue.set_used_ring_address(None, Some(value));
            }
            _ => {}
        }
    }

    /// Follows the driver through its initialisation (virtio 1.3, 3.1.1): bits are set in order, and none is cleared but
    /// all by a reset.
    fn write_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        if value & self.status != self.status {
            return;
        }
        let new = value & !self.status;
        self.status |= value & (status::ACKNOWLEDGE | status::DRIVER | status::FAILED);
        if new & status::FEATURES_OK != 0
            && self.status & status::DRIVER != 0
            && self.driver_features & !self.info.features == 0
            && self.driver_features & feature::VERSION_1 != 0
        {
            self.status |= status::FEATURES_OK;
        }
        if new & status::DRIVER_OK != 0 && self.status & status::FEATURES_OK != 0 {
            self.status |= status::DRIVER_OK;
            self.activate();
        }
    }

    fn activate(&mut self) {
        if self.active || self.status & status::FAILED != 0 {
            return;
        }
        let ready = |queue: &&Queue| queue.ready();
        let valid = self
            .queues
            .iter()
            .filter(ready)
            .all(|queue| queue.is_valid(&*self.memory));
        if !valid || !self.queues.iter().any(|queue| queue.ready()) {
            self.interrupt.needs_reset();
            return;
        }
        let event_idx = self.driver_features & feature::EVENT_IDX != 0;
        let queues = self.queues.iter().zip(0u16..).map(|(queue, index)| {
            let mut queue = queue.ready().then(|| Queue::try_from(queue.state()).ok()).flatten()?;
            queue.set_event_idx(event_idx);
            Some(VirtQueue::new(
                queue,
                self.memory.clone(),
                index,
                self.interrupt.clone(),
            ))
        });
        let activation = Activation {
            features: self.driver_features,
            queues: queues.collect(),
        };
        self.backend.activate(activation);
        self.active = true;
    }

    fn reset(&mut self) {
        if self.active {
            self.backend.reset();
            self.active = false;
        }
        self.interrupt.clear();
        self.status = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        for queue in &mut self.queues {
            queue.reset();
        }
    }
}

impl<B: Backend> BusDevice for MmioTransport<B> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(start) = offset.checked_sub(CONFIG) {
            self.info.config.read(start, data);
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        } else {
            // Registers are 32 bits wide and aligned (virtio 1.3, 4.2.2.2).
            data.fill(0);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(start) = offset.checked_sub(CONFIG) {
            self.info.config.write(start, data);
        } else if offset.is_multiple_of(4)
            && let Ok(value) = data.try_into()
        {
            self.write_register(offset, u32::from_le_bytes(value));
        }
    }
}

#[cfg(test)]
mod tests;
