//! A virtqueue in the device's hands: `virtio-queue`'s rings, the memory they lie in, and the driver's interrupt.

use std::sync::Arc;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT as _, QueueT as _};

use super::{Interrupt, Progress};
use crate::memory::GuestMemory;

/// A chain of descriptors.
pub type Chain = DescriptorChain<GuestMemory>;

/// One queue of an activated device. A driver that breaks its rings loses the queue: the device tells it once that it
/// needs a reset, and looks at the rings no more until then.
pub struct VirtQueue {
    queue: Queue,
    memory: GuestMemory,
    index: u16,
    interrupt: Arc<dyn Interrupt>,
    /// Something was given back since the last interrupt.
    news: bool,
    broken: bool,
}

// === impl VirtQueue ===

impl VirtQueue {
    /// A queue that the transport found valid.
    pub fn new(queue: Queue, memory: GuestMemory, index: u16, interrupt: Arc<dyn Interrupt>) -> Self {
        Self {
            queue,
            memory,
            index,
            interrupt,
            news: false,
            broken: false,
        }
    }

    /// The memory in which it and its buffers lie.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Descriptors in its table.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The next chain that the driver made available.
    pub fn pop(&mut self) -> Option<Chain> {
        if self.broken {
            return None;
        }
        let next = self
            .queue
            .iter(self.memory.clone())
            .map(|mut available| available.next());
        match next {
            Ok(chain) => chain,
            Err(_) => {
                self.fail();
                None
            }
        }
    }

    /// Puts the chain that was popped last back.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a chain back to the driver; `written` bytes of it were written.
    pub fn push_used(&mut self, head: u16, written: u32) {
        if self.broken {
            return;
        }
        match self.queue.add_used(&*self.memory, head, written) {
            Ok(()) => self.news = true,
            Err(_) => self.fail(),
        }
    }

    /// Interrupts the driver where it wants to hear of what was given back since.
    pub fn interrupt(&mut self) {
        if self.broken || !std::mem::take(&mut self.news) {
            return;
        }
        match self.queue.needs_notification(&*self.memory) {
            Ok(true) => self.interrupt.queue_used(self.index),
            Ok(false) => {}
            Err(_) => self.fail(),
        }
    }

    /// Asks the driver to notify again; whether it added something in the meantime.
    pub fn enable_notifications(&mut self) -> bool {
        if self.broken {
            return false;
        }
        match self.queue.enable_notification(&*self.memory) {
            Ok(more) => more,
            Err(_) => {
                self.fail();
                false
            }
        }
    }

    /// Gives up to `budget` chains to `request`, each with the memory it lies in; it answers how many bytes it wrote.
    /// Then interrupts the driver once.
    pub fn serve(&mut self, budget: usize, mut request: impl FnMut(&GuestMemory, Chain) -> u32) -> Progress {
        for _ in 0..budget {
            let Some(chain) = self.pop() else {
                self.interrupt();
                return if self.enable_notifications() {
                    Progress::More
                } else {
                    Progress::Idle
                };
            };
            let head = chain.head_index();
            let written = request(&self.memory, chain);
            self.push_used(head, written);
        }
        self.interrupt();
        Progress::More
    }

    fn fail(&mut self) {
        self.broken = true;
        self.interrupt.needs_reset();
    }
}
