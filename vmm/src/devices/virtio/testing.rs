//! A driver for tests and fuzzing: it writes rings and descriptors into guest memory as a guest would.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "only tests and fuzz targets compile it, and there a panic is a finding"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_queue::{Queue, QueueT as _};
use vm_memory::{Bytes as _, GuestAddress};

use super::queue::VirtQueue;
use super::{Activation, Interrupt, feature};
use crate::memory::{self, GuestMemory};

/// MiB of its memory.
pub const MEMORY_MIB: u32 = 32;
/// Where its rings begin; 64 KiB each queue.
const RINGS: u64 = 0x100_0000;
const RING_BYTES: u64 = 0x1_0000;
const AVAILABLE: u64 = 0x8000;
const USED: u64 = 0xc000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// One descriptor of a chain.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    address: u64,
    length: u32,
    flags: u16,
}

/// Counts what a device interrupts for.
#[derive(Default, Debug)]
pub struct CountingInterrupt {
    used: AtomicU32,
    config_changed: AtomicU32,
    needs_reset: AtomicU32,
}

/// The driver.
pub struct Driver {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// What the device interrupted for.
    pub interrupt: Arc<CountingInterrupt>,
    sizes: Vec<u16>,
    next_descriptor: Vec<u16>,
    available: Vec<u16>,
    seen: Vec<u16>,
}

// === impl Part ===

impl Part {
    /// Bytes that the device reads.
    pub fn read(address: u64, length: u32) -> Self {
        Self {
            address,
            length,
            flags: 0,
        }
    }

    /// Bytes that the device writes.
    pub fn write(address: u64, length: u32) -> Self {
        Self {
            address,
            length,
            flags: WRITE,
        }
    }

    /// A table of further descriptors.
    pub fn indirect(address: u64, length: u32) -> Self {
        Self {
            address,
            length,
            flags: INDIRECT,
        }
    }
}

// === impl CountingInterrupt ===

impl CountingInterrupt {
    /// Interrupts for used buffers so far.
    pub fn used(&self) -> u32 {
        self.used.load(Ordering::Relaxed)
    }

    /// Changes of the configuration space so far.
    pub fn config_changed_count(&self) -> u32 {
        self.config_changed.load(Ordering::Relaxed)
    }

    /// Calls for a reset so far.
    pub fn needs_reset_count(&self) -> u32 {
        self.needs_reset.load(Ordering::Relaxed)
    }
}

impl Interrupt for CountingInterrupt {
    fn queue_used(&self, _queue: u16) {
        self.used.fetch_add(1, Ordering::Relaxed);
    }

    fn config_changed(&self) {
        self.config_changed.fetch_add(1, Ordering::Relaxed);
    }

    fn needs_reset(&self) {
        self.needs_reset.fetch_add(1, Ordering::Relaxed);
    }
}

// === impl Driver ===

impl Driver {
    /// A driver with queues of these sizes.
    pub fn new(sizes: &[u16]) -> Self {
        Self::with_pluggable(sizes, 0)
    }

    /// The same with as many MiB more that can be plugged.
    pub fn with_pluggable(sizes: &[u16], mib: u32) -> Self {
        Self {
            memory: memory::allocate_up_to(MEMORY_MIB, MEMORY_MIB + mib).unwrap(),
            interrupt: Arc::default(),
            sizes: sizes.to_vec(),
            next_descriptor: vec![0; sizes.len()],
            available: vec![0; sizes.len()],
            seen: vec![0; sizes.len()],
        }
    }

    fn ring(&self, queue: usize) -> u64 {
        RINGS + queue as u64 * RING_BYTES
    }

    /// What a transport would hand to the device.
    pub fn activation(&self, features: u64) -> Activation {
        let queues = self.sizes.iter().enumerate().map(|(index, size)| {
            let ring = self.ring(index);
            let mut queue = Queue::new(*size).unwrap();
            queue.set_size(*size);
            queue.set_desc_table_address(Some(ring as u32), Some(0));
            queue.set_avail_ring_address(Some((ring + AVAILABLE) as u32), Some(0));
            queue.set_used_ring_address(Some((ring + USED) as u32), Some(0));
            queue.set_event_idx(features & feature::EVENT_IDX != 0);
            queue.set_ready(true);
            assert!(queue.is_valid(&*self.memory));
            Some(VirtQueue::new(
                queue,
                self.memory.clone(),
                index as u16,
                self.interrupt.clone(),
            ))
        });
        Activation {
            features,
            queues: queues.collect(),
        }
    }

    /// Writes one descriptor.
    pub fn descriptor(&self, queue: usize, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let at = self.ring(queue) + u64::from(index) * 16;
        self.put_descriptor(at, address, length, flags, next);
    }

    /// Writes one descriptor anywhere, for an indirect table.
    pub fn put_descriptor(&self, at: u64, address: u64, length: u32, flags: u16, next: u16) {
        self.put(at, &address.to_le_bytes());
        self.put(at + 8, &length.to_le_bytes());
        self.put(at + 12, &flags.to_le_bytes());
        self.put(at + 14, &next.to_le_bytes());
    }

    /// Makes the chain that begins at `head` available.
    pub fn offer(&mut self, queue: usize, head: u16) {
        let ring = self.ring(queue) + AVAILABLE;
        let slot = u64::from(self.available[queue] % self.sizes[queue]);
        self.put(ring + 4 + slot * 2, &head.to_le_bytes());
        self.available[queue] = self.available[queue].wrapping_add(1);
        self.set_available_index(queue, self.available[queue]);
    }

    /// Writes the available ring's index.
    pub fn set_available_index(&self, queue: usize, index: u16) {
        self.put(self.ring(queue) + AVAILABLE + 2, &index.to_le_bytes());
    }

    /// Writes a chain of these parts and makes it available; returns its head.
    pub fn send(&mut self, queue: usize, parts: &[Part]) -> u16 {
        let size = self.sizes[queue];
        let head = self.next_descriptor[queue] % size;
        for (at, part) in parts.iter().enumerate() {
            let index = self.next_descriptor[queue] % size;
            let last = at + 1 == parts.len();
            let flags = part.flags | if last { 0 } else { NEXT };
            self.descriptor(queue, index, part.address, part.length, flags, (index + 1) % size);
            self.next_descriptor[queue] = self.next_descriptor[queue].wrapping_add(1);
        }
        self.offer(queue, head);
        head
    }

    /// What the device has given back since the last call: heads and bytes written.
    pub fn used(&mut self, queue: usize) -> Vec<(u32, u32)> {
        let ring = self.ring(queue) + USED;
        let index: u16 = self.memory.read_obj(GuestAddress(ring + 2)).unwrap();
        let mut used = Vec::new();
        while self.seen[queue] != index {
            let slot = u64::from(self.seen[queue] % self.sizes[queue]);
            let at = GuestAddress(ring + 4 + slot * 8);
            let element: [u32; 2] = self.memory.read_obj(at).unwrap();
            used.push((element[0], element[1]));
            self.seen[queue] = self.seen[queue].wrapping_add(1);
        }
        used
    }

    /// Writes guest memory.
    pub fn put(&self, address: u64, data: &[u8]) {
        self.memory.write_slice(data, GuestAddress(address)).unwrap();
    }

    /// Reads guest memory.
    pub fn read(&self, address: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.memory.read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }
}
