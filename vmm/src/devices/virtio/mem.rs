//! Virtio memory device (virtio 1.3, 5.15): by it the driver plugs and unplugs blocks of [`Pluggable`] memory, up to as much as the
//! host asks for at the time.
//!
//! The host asks by [`Plugging`] and never waits: what the driver has plugged so far is there to be read. What it unplugs goes back to
//! the host at once. A reset leaves blocks as they are (5.15.5), since their content is the guest's.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_bindings::virtio_ids;

use super::buffers::ChainBuffers;
use super::config_space::ConfigSpace;
use super::queue::VirtQueue;
use super::{Activation, DeviceInfo, Progress, VirtioDevice, feature};
use crate::memory::{BLOCK, Pluggable};

mod plugging;

pub use plugging::{AskError, Plugging};

const QUEUE_SIZE: u16 = 32;
/// Requests served before commands are looked for. One may take the host milliseconds, of many blocks.
const BUDGET: usize = 8;

/// The driver leaves unplugged memory alone, reading too (virtio 1.3, 5.15.3). Without it the driver may read there, and reads zeros.
const FEATURE_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// Bytes of a request: type, address, number of blocks, each with padding (virtio 1.3, 5.15.6).
const REQUEST_BYTES: usize = 24;
/// Types of requests.
mod request {
    pub(super) const PLUG: u16 = 0;
    pub(super) const UNPLUG: u16 = 1;
    pub(super) const UNPLUG_ALL: u16 = 2;
    pub(super) const STATE: u16 = 3;
}

/// What a request is answered with (virtio 1.3, 5.15.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Response {
    /// It is done.
    Ack,
    /// It was asked to tell how blocks are.
    State(State),
    /// More than the host asks for.
    Nack,
    /// Not now: the host could not.
    Busy,
    /// No such blocks, or they are not as they must be.
    Error,
}

/// How blocks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Plugged,
    Unplugged,
    Mixed,
}

/// Offsets in `struct virtio_mem_config` (virtio 1.3, 5.15.4).
mod field {
    pub(super) const PLUGGED_SIZE: usize = 40;
    pub(super) const REQUESTED_SIZE: usize = 48;
}

/// The device.
pub struct Mem {
    blocks: Blocks,
    queue: Option<VirtQueue>,
    buffers: ChainBuffers,
}

/// The blocks and what the host wants of them.
struct Blocks {
    memory: Arc<Pluggable>,
    /// Bytes that the host asks for.
    requested: Arc<AtomicU64>,
    config: Arc<ConfigSpace>,
}

// === impl Mem ===

impl Mem {
    /// A device for `memory`, of which the host asks for nothing yet.
    pub fn new(memory: Arc<Pluggable>) -> Self {
        let config = ConfigSpace::new(config(&memory));
        Self {
            blocks: Blocks {
                memory,
                requested: Arc::default(),
                config,
            },
            queue: None,
            buffers: ChainBuffers::default(),
        }
    }

    /// The host's end.
    pub fn plugging(&self) -> Plugging {
        let Blocks {
            memory,
            requested,
            config,
        } = &self.blocks;
        Plugging::new(memory.clone(), requested.clone(), config.clone())
    }
}

/// `struct virtio_mem_config` (virtio 1.3, 5.15.4) with nothing plugged nor asked for. All of the region may be used: how much of it is
/// bounded by what is asked for.
fn config(memory: &Pluggable) -> Vec<u8> {
    let (node_id, plugged, requested) = (0, 0, 0);
    let usable = memory.length();
    [
        BLOCK,
        node_id,
        memory.start(),
        memory.length(),
        usable,
        plugged,
        requested,
    ]
    .map(u64::to_le_bytes)
    .concat()
}

impl VirtioDevice for Mem {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            kind: virtio_ids::VIRTIO_ID_MEM,
            features: feature::COMMON | FEATURE_UNPLUGGED_INACCESSIBLE,
            queue_sizes: vec![QUEUE_SIZE],
            config: self.blocks.config.clone(),
        }
    }

    fn activate(&mut self, activation: Activation) {
        self.queue = activation.queues.into_iter().next().flatten();
    }

    fn process(&mut self) -> Progress {
        let Some(queue) = &mut self.queue else {
            return Progress::Idle;
        };
        let (blocks, buffers) = (&self.blocks, &mut self.buffers);
        queue.serve(BUDGET, |memory, chain| {
            let mut request = [0; REQUEST_BYTES];
            if buffers.fill(chain).is_err() || buffers.readable.read(memory, 0, &mut request).is_err() {
                return 0;
            }
            let response = blocks.execute(request).to_bytes();
            match buffers.writable.write(memory, 0, &response) {
                Ok(()) => response.len() as u32,
                Err(_) => 0,
            }
        })
    }

    fn reset(&mut self) {
        self.queue = None;
    }
}

// === impl Blocks ===

impl Blocks {
    fn execute(&self, request: [u8; REQUEST_BYTES]) -> Response {
        let [k0, k1, _, _, _, _, _, _, rest @ ..] = request;
        let (address, count) = rest.split_at(size_of::<u64>());
        let address = address.try_into().map_or(0, u64::from_le_bytes);
        let count = count
            .first_chunk()
            .map_or(0, |count| u64::from(u16::from_le_bytes(*count)));
        let kind = u16::from_le_bytes([k0, k1]);
        if kind == request::UNPLUG_ALL {
            return self.unplug(0, self.memory.blocks());
        }
        let Some(first) = self.range(address, count) else {
            return Response::Error;
        };
        let plugged = self.memory.plugged_of(first, count);
        match kind {
            request::PLUG if plugged > 0 => Response::Error,
            request::PLUG => self.plug(first, count),
            request::UNPLUG if plugged < count => Response::Error,
            request::UNPLUG => self.unplug(first, count),
            request::STATE if plugged == count => Response::State(State::Plugged),
            request::STATE if plugged == 0 => Response::State(State::Unplugged),
            request::STATE => Response::State(State::Mixed),
            _ => Response::Error,
        }
    }

    /// The first of `count` blocks from `address` on, where all of them are there.
    fn range(&self, address: u64, count: u64) -> Option<u64> {
        let offset = address.checked_sub(self.memory.start())?;
        let first = offset / BLOCK;
        let is_there = offset.is_multiple_of(BLOCK) && count > 0 && first.checked_add(count)? <= self.memory.blocks();
        is_there.then_some(first)
    }

    fn plug(&self, first: u64, count: u64) -> Response {
        let after = (self.memory.plugged() + count) * BLOCK;
        if after > self.requested.load(Ordering::SeqCst) {
            return Response::Nack;
        }
        let response = self.done(self.memory.plug(first, count));
        if response == Response::Ack && self.memory.plugged() * BLOCK > self.requested.load(Ordering::SeqCst) {
            // The host has asked for less meanwhile, and may not have seen these blocks among those that are plugged: it does not
            // reckon with them.
            return match self.unplug(first, count) {
                Response::Ack => Response::Nack,
                other => other,
            };
        }
        response
    }

    fn unplug(&self, first: u64, count: u64) -> Response {
        if self.memory.plugged() == 0 {
            return Response::Ack;
        }
        self.done(self.memory.unplug(first, count))
    }

    fn done(&self, outcome: std::io::Result<()>) -> Response {
        let plugged = self.memory.plugged() * BLOCK;
        self.config.set(field::PLUGGED_SIZE, &plugged.to_le_bytes());
        match outcome {
            Ok(()) => Response::Ack,
            Err(_) => Response::Busy,
        }
    }
}

// === impl Response ===

impl Response {
    /// `struct virtio_mem_resp`: the type and, after padding, what was asked for.
    fn to_bytes(self) -> [u8; 10] {
        let (kind, state) = match self {
            Self::Ack => (0, 0),
            Self::State(State::Plugged) => (0, 0),
            Self::State(State::Unplugged) => (0, 1),
            Self::State(State::Mixed) => (0, 2),
            Self::Nack => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
        };
        [kind, 0, 0, 0, 0, 0, 0, 0, state, 0]
    }
}

#[cfg(test)]
mod tests;
