//! Virtio socket device (virtio 1.3, 5.10): streams between the guest's vsock ports and Unix sockets on the host.
//!
//! [`muxer`] knows the connections, [`slots`] keeps them, [`connection`] is one of them, [`credit`] the arithmetic of its
//! flow control, [`packet`] the header; [`host`] is the sockets and the clock. This file moves packets between them and the
//! queues.

use std::io;
use std::path::Path;
use std::sync::Arc;

use virtio_bindings::virtio_ids;
use vmm_sys_util::epoll::{Epoll, EventSet};

use super::buffers::ChainBuffers;
use super::config_space::ConfigSpace;
use super::queue::VirtQueue;
use super::{Activation, DeviceInfo, Progress, VirtioDevice, feature};
use crate::socket::ListenError;

pub mod connection;
pub mod credit;
pub mod host;
pub mod muxer;
pub mod packet;
pub mod slots;

#[cfg(any(test, feature = "testing"))]
pub mod simulation;

use host::{Host, UnixHost};
use muxer::Muxer;

const QUEUE_SIZE: u16 = 128;
/// Packets moved in each direction before commands are looked for.
const BUDGET: usize = QUEUE_SIZE as usize;

/// The device.
pub struct Vsock<H: Host = UnixHost> {
    guest_cid: u32,
    muxer: Muxer<H>,
    queues: Option<Queues>,
    buffers: ChainBuffers,
}

/// Its queues (virtio 1.3, 5.10.2); the third, for events, has none to tell yet.
struct Queues {
    to_guest: VirtQueue,
    from_guest: VirtQueue,
    /// Held so that it lives as long as the driver expects.
    _events: Option<VirtQueue>,
}

// === impl Vsock ===

impl Vsock {
    /// A device for the guest `cid`, reached through the Unix socket `socket`.
    ///
    /// # Errors
    /// Where the socket is in use or cannot be made.
    pub fn listen(cid: u32, socket: &Path) -> Result<Self, ListenError> {
        Ok(Self::new(cid, UnixHost::listen(socket)?))
    }
}

impl<H: Host> Vsock<H> {
    /// A device for the guest `cid` on this host.
    pub fn new(cid: u32, host: H) -> Self {
        Self {
            guest_cid: cid,
            muxer: Muxer::new(host, cid),
            queues: None,
            buffers: ChainBuffers::default(),
        }
    }

    /// Connections, and clients that are to become some.
    pub fn connections(&self) -> usize {
        self.muxer.len()
    }

    /// Gives the guest what there is for it, as far as it has buffers.
    fn deliver(&mut self) -> Progress {
        let Some(Queues { to_guest, .. }) = &mut self.queues else {
            return Progress::Idle;
        };
        let mut progress = Progress::More;
        for _ in 0..BUDGET {
            if !self.muxer.has_packet() {
                progress = Progress::Idle;
                break;
            }
            let Some(chain) = to_guest.pop() else {
                if to_guest.enable_notifications() {
                    continue;
                }
                progress = Progress::Idle;
                break;
            };
            let head = chain.head_index();
            let usable = self.buffers.fill(chain).is_ok() && self.buffers.writable.len() >= packet::HEADER_BYTES as u64;
            if !usable {
                to_guest.push_used(head, 0);
                continue;
            }
            match self.muxer.next_packet(to_guest.memory(), &self.buffers.writable) {
                Some(written) => to_guest.push_used(head, written),
                None => to_guest.undo_pop(),
            }
        }
        to_guest.interrupt();
        progress
    }
}

impl<H: Host> VirtioDevice for Vsock<H> {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            kind: virtio_ids::VIRTIO_ID_VSOCK,
            features: feature::COMMON,
            queue_sizes: vec![QUEUE_SIZE; 3],
            config: ConfigSpace::new(u64::from(self.guest_cid).to_le_bytes().to_vec()),
        }
    }

    fn watch(&mut self, epoll: &Arc<Epoll>) -> io::Result<()> {
        self.muxer.watch(epoll)
    }

    fn activate(&mut self, activation: Activation) {
        let mut queues = activation.queues.into_iter();
        let mut next = || queues.next().flatten();
        if let (Some(to_guest), Some(from_guest)) = (next(), next()) {
            self.queues = Some(Queues {
                to_guest,
                from_guest,
                _events: next(),
            });
        }
    }

    fn process(&mut self) -> Progress {
        let Some(Queues { from_guest, .. }) = &mut self.queues else {
            return Progress::Idle;
        };
        let (muxer, buffers) = (&mut self.muxer, &mut self.buffers);
        let received = from_guest.serve(BUDGET, |memory, chain| {
            if buffers.fill(chain).is_ok() {
                muxer.guest_packet(memory, &buffers.readable);
            }
            0
        });
        match self.deliver() {
            Progress::Idle => received,
            Progress::More => Progress::More,
        }
    }

    fn ready(&mut self, data: u64, events: EventSet) -> Progress {
        self.muxer.ready(data, events, self.queues.is_some());
        self.deliver()
    }

    fn reset(&mut self) {
        self.queues = None;
        self.muxer.clear();
    }
}

#[cfg(test)]
mod tests;
