//! Traditional memory balloon (virtio 1.3, 5.5): the driver gives pages of the guest's to the host and takes them back, tells of pages
//! that are free at the time, and how the guest's memory is.
//!
//! The host asks by [`Inflation`] and never waits. How much the balloon has is counted here, page by page; what the driver says of it
//! is told beside that. The driver takes back what it needs before it kills anything for want of memory (`DEFLATE_ON_OOM`). What the
//! balloon gets, and what is reported free, goes back to the host at once.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use virtio_bindings::virtio_ids;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::buffers::{Buffers, ChainBuffers};
use super::config_space::ConfigSpace;
use super::queue::VirtQueue;
use super::{Activation, DeviceInfo, Progress, VirtioDevice, feature};
use crate::memory::GuestMemory;

mod inflation;
mod pages;
mod statistics;

pub use inflation::Inflation;
pub use statistics::Statistics;

use pages::Pages;

/// Linux reports up to 32 ranges of free pages at a time.
const QUEUE_SIZE: u16 = 32;
/// Requests of a queue served before commands are looked for. One may take the host milliseconds, of many pages.
const BUDGET: usize = 8;
/// Most pages of a request; further ones are left out. Linux has up to 256.
const MAX_PAGES: usize = 1024;
/// Most ranges of a report; further ones are left out. Each may be of 4 GiB, which takes the host a while to look through even where
/// nothing is in it.
const MAX_RANGES: usize = QUEUE_SIZE as usize;
/// Bytes of a page, and of its number in a request.
const PAGE: u64 = 4096;
const NUMBER_BYTES: usize = 4;

const FEATURE_STATS: u64 = 1 << 1;
const FEATURE_DEFLATE_ON_OOM: u64 = 1 << 2;
const FEATURE_REPORTING: u64 = 1 << 5;

/// Queues by index (virtio 1.3, 5.5.2). That of free page hints is not offered; drivers that number the queues that there are have
/// the reporting queue in its place.
mod queue {
    pub(super) const INFLATE: usize = 0;
    pub(super) const DEFLATE: usize = 1;
    pub(super) const STATS: usize = 2;
    pub(super) const COUNT: usize = 5;
}

/// Offsets in `struct virtio_balloon_config` (virtio 1.3, 5.5.4), and its bytes without what is not offered.
mod field {
    pub(super) const NUM_PAGES: usize = 0;
    pub(super) const ACTUAL: usize = 4;
    pub(super) const END: usize = 8;
}

/// Epoll data of the wish for statistics.
const REFRESH: u64 = 0;

/// The device.
pub struct Balloon {
    pages: Pages,
    shared: Arc<Shared>,
    queues: Vec<Option<VirtQueue>>,
    buffers: ChainBuffers,
    /// The driver's buffer for statistics, kept until the host wants new ones.
    held: Option<u16>,
}

/// What the device's thread and the host's end share.
struct Shared {
    config: Arc<ConfigSpace>,
    /// Pages that the balloon has.
    taken: AtomicU64,
    statistics: Mutex<Option<Statistics>>,
    /// Somebody wants new statistics.
    refresh: EventFd,
}

// === impl Balloon ===

impl Balloon {
    /// An empty balloon for the pages of `memory`.
    ///
    /// # Errors
    /// Where no eventfd can be had.
    pub fn new(memory: &GuestMemory) -> io::Result<Self> {
        Ok(Self {
            pages: Pages::of(memory),
            shared: Arc::new(Shared {
                config: ConfigSpace::with_writable(vec![0; field::END], field::ACTUAL..field::END),
                taken: AtomicU64::new(0),
                statistics: Mutex::default(),
                refresh: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            }),
            queues: Vec::new(),
            buffers: ChainBuffers::default(),
            held: None,
        })
    }

    /// The host's end.
    pub fn inflation(&self) -> Inflation {
        Inflation::new(self.shared.clone())
    }

    /// Gives the statistics' buffer back, so that the driver fills it again.
    fn refresh(&mut self) {
        let _ = self.shared.refresh.read();
        if let Some(Some(queue)) = self.queues.get_mut(queue::STATS)
            && let Some(head) = self.held.take()
        {
            queue.push_used(head, 0);
            queue.interrupt();
        }
    }
}

impl VirtioDevice for Balloon {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            kind: virtio_ids::VIRTIO_ID_BALLOON,
            features: feature::COMMON | FEATURE_STATS | FEATURE_DEFLATE_ON_OOM | FEATURE_REPORTING,
            queue_sizes: vec![QUEUE_SIZE; queue::COUNT],
            config: self.shared.config.clone(),
        }
    }

    fn watch(&mut self, epoll: &Arc<Epoll>) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN, REFRESH);
        epoll.ctl(
            ControlOperation::Add,
            std::os::fd::AsRawFd::as_raw_fd(&self.shared.refresh),
            event,
        )
    }

    fn activate(&mut self, activation: Activation) {
        self.queues = activation.queues;
    }

    fn process(&mut self) -> Progress {
        let Self {
            pages,
            shared,
            queues,
            buffers,
            held,
        } = self;
        let mut progress = Progress::Idle;
        for (index, queue) in queues.iter_mut().enumerate() {
            let Some(queue) = queue else {
                continue;
            };
            let more = match index {
                queue::INFLATE => queue.serve(BUDGET, |memory, chain| {
                    if buffers.fill(chain).is_ok() {
                        pages.inflate(&numbers(&buffers.readable, memory), memory);
                    }
                    0
                }),
                queue::DEFLATE => queue.serve(BUDGET, |memory, chain| {
                    if buffers.fill(chain).is_ok() {
                        pages.deflate(&numbers(&buffers.readable, memory));
                    }
                    0
                }),
                queue::STATS => take_statistics(queue, buffers, held, shared, pages.count()),
                _ => queue.serve(BUDGET, |memory, chain| {
                    if buffers.fill(chain).is_ok() {
                        give_back(&buffers.writable, memory);
                    }
                    0
                }),
            };
            if more == Progress::More {
                progress = Progress::More;
            }
        }
        shared.taken.store(pages.count(), Ordering::Release);
        progress
    }

    fn ready(&mut self, data: u64, _events: EventSet) -> Progress {
        if data == REFRESH {
            self.refresh();
        }
        Progress::Idle
    }

    /// A driver that begins anew has all of its pages.
    fn reset(&mut self) {
        self.queues.clear();
        self.held = None;
        self.pages.clear();
        self.shared.taken.store(0, Ordering::Release);
        self.shared.config.set(field::ACTUAL, &[0; NUMBER_BYTES]);
    }
}

/// The numbers of pages in a request, sorted, up to [`MAX_PAGES`] of them.
fn numbers(request: &Buffers, memory: &GuestMemory) -> Vec<u32> {
    let length = usize::try_from(request.len())
        .unwrap_or(usize::MAX)
        .min(MAX_PAGES * NUMBER_BYTES);
    let mut bytes = vec![0; length];
    if request.read(memory, 0, &mut bytes).is_err() {
        return Vec::new();
    }
    let (numbers, _) = bytes.as_chunks::<NUMBER_BYTES>();
    let mut numbers: Vec<u32> = numbers.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
    numbers.sort_unstable();
    numbers
}

/// Gives back what the driver reports free: the whole pages of each buffer that is guest memory, up to [`MAX_RANGES`] of them.
fn give_back(free: &Buffers, memory: &GuestMemory) {
    for (start, length) in free.ranges().take(MAX_RANGES) {
        let Some(end) = start.checked_add(u64::from(length)) else {
            continue;
        };
        let Some(start) = start.checked_next_multiple_of(PAGE) else {
            continue;
        };
        if let Some(length) = (end / PAGE * PAGE).checked_sub(start).filter(|length| *length > 0) {
            memory.give_back(start, length);
        }
    }
}

/// Reads the statistics that the driver has offered, of a balloon with so many pages. Of several buffers, which no driver has, the last is kept.
fn take_statistics(
    queue: &mut VirtQueue,
    buffers: &mut ChainBuffers,
    held: &mut Option<u16>,
    shared: &Shared,
    pages: u64,
) -> Progress {
    for _ in 0..BUDGET {
        let Some(chain) = queue.pop() else {
            queue.interrupt();
            return if queue.enable_notifications() {
                Progress::More
            } else {
                Progress::Idle
            };
        };
        if let Some(before) = held.replace(chain.head_index()) {
            queue.push_used(before, 0);
        }
        if buffers.fill(chain).is_ok()
            && let Some(statistics) = Statistics::read(&buffers.readable, queue.memory(), Instant::now(), pages)
        {
            *shared.statistics.lock().unwrap_or_else(PoisonError::into_inner) = Some(statistics);
        }
    }
    queue.interrupt();
    Progress::More
}

#[cfg(test)]
mod tests;
