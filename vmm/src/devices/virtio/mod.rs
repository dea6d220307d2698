//! Virtio devices (virtio 1.3), whatever transport is in front of them.
//!
//! A device is a [`VirtioDevice`]: what it offers ([`DeviceInfo`]) and what it does with its queues. A [`worker`] gives
//! it a thread, so that a slow disk stalls nothing but itself. A transport ([`mmio`]) is the registers by which the
//! driver finds the device, negotiates, and hands over queues; it speaks to the device through [`Backend`] alone, and the
//! device interrupts through [`Interrupt`] alone, so that another transport can take its place.

use std::sync::Arc;

use vmm_sys_util::epoll::{Epoll, EventSet};

pub mod balloon;
pub mod block;
pub mod buffers;
pub mod config_space;
pub mod mem;
pub mod mmio;
pub mod queue;
pub mod rng;
pub mod vsock;
pub mod worker;

#[cfg(any(test, feature = "testing"))]
pub mod testing;

use config_space::ConfigSpace;
use queue::VirtQueue;

/// Bits of features that every device here offers.
pub mod feature {
    use virtio_bindings::{virtio_config, virtio_ring};

    /// The device follows virtio 1 (a driver that does not is refused).
    pub const VERSION_1: u64 = 1 << virtio_config::VIRTIO_F_VERSION_1;
    /// Buffers may be described by indirect tables.
    pub const INDIRECT_DESC: u64 = 1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
    /// Both sides say at which index they want to be notified.
    pub const EVENT_IDX: u64 = 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX;
    /// All of them.
    pub const COMMON: u64 = VERSION_1 | INDIRECT_DESC | EVENT_IDX;
}

/// What a driver can learn of a device before it uses it. But for what is in its configuration space, it stays as it is for
/// the device's life.
#[derive(Clone)]
pub struct DeviceInfo {
    /// The virtio device id (virtio 1.3, section 5).
    pub kind: u32,
    /// The features offered.
    pub features: u64,
    /// The largest size of each queue; powers of two.
    pub queue_sizes: Vec<u16>,
    /// The device's configuration space.
    pub config: Arc<ConfigSpace>,
}

/// What a device gets when its driver is ready.
pub struct Activation {
    /// The features that the driver accepted, a subset of those offered.
    pub features: u64,
    /// The queues by index; `None` where the driver did not set one up.
    pub queues: Vec<Option<VirtQueue>>,
}

/// Whether a device has done all there was to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It waits for its driver or its other end.
    Idle,
    /// It stopped at its budget and wants to go on at once. So one call is bounded, and a guest that adds work as fast
    /// as it is done cannot keep a device from hearing a reset.
    More,
}

/// A device's behaviour. Every method is called from one thread at a time, and none blocks but for I/O on files.
pub trait VirtioDevice: Send {
    /// What it offers.
    fn info(&self) -> DeviceInfo;

    /// Registers its own file descriptors, once, before anything else; their data must not be [`u64::MAX`] nor
    /// `u64::MAX - 1`.
    ///
    /// # Errors
    /// Where the kernel refuses.
    fn watch(&mut self, _epoll: &Arc<Epoll>) -> std::io::Result<()> {
        Ok(())
    }

    /// The driver is ready: from now on, queues may be used. Called at most once between resets.
    fn activate(&mut self, activation: Activation);

    /// The driver notified: looks at every queue.
    fn process(&mut self) -> Progress;

    /// A descriptor of its own is ready; `data` is what it was registered with.
    fn ready(&mut self, _data: u64, _events: EventSet) -> Progress {
        Progress::Idle
    }

    /// Forgets its queues and all that hung on them. Nothing is in flight and guest memory is not touched afterwards.
    fn reset(&mut self);
}

/// What a transport needs of the device behind it.
pub trait Backend: Send {
    /// Hands over the queues.
    fn activate(&mut self, activation: Activation);
    /// The driver notified, and no ioeventfd has told the device yet.
    fn notify(&mut self);
    /// Takes the queues away; returns when the device touches them no more.
    fn reset(&mut self);
}

/// How a device reaches its driver.
pub trait Interrupt: Send + Sync {
    /// Buffers of the queue were used.
    fn queue_used(&self, queue: u16);
    /// The configuration space has changed.
    fn config_changed(&self);
    /// The device met something that it cannot go on from (`DEVICE_NEEDS_RESET`, virtio 1.3, 2.1.2).
    fn needs_reset(&self);
}
