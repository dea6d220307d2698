//! Virtio entropy device (virtio 1.3, 5.4): fills the driver's buffers with the host's random bytes.

use std::sync::Arc;

use super::buffers::ChainBuffers;
use super::queue::VirtQueue;
use super::{Activation, DeviceInfo, Progress, VirtioDevice, feature};
use crate::memory::GuestMemory;

const QUEUE_SIZE: u16 = 16;
/// Most bytes given for one request; a driver that wants more asks again.
const MAX_BYTES: u64 = 4096;
/// Most requests served at a time.
const BUDGET: usize = QUEUE_SIZE as usize;

/// The device.
#[derive(Default)]
pub struct Rng {
    queue: Option<VirtQueue>,
    buffers: ChainBuffers,
}

// === impl Rng ===

impl VirtioDevice for Rng {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            kind: virtio_bindings::virtio_ids::VIRTIO_ID_RNG,
            features: feature::COMMON,
            queue_sizes: vec![QUEUE_SIZE],
            config: Arc::default(),
        }
    }

    fn activate(&mut self, activation: Activation) {
        self.queue = activation.queues.into_iter().next().flatten();
    }

    fn process(&mut self) -> Progress {
        let Some(queue) = &mut self.queue else {
            return Progress::Idle;
        };
        let buffers = &mut self.buffers;
        queue.serve(BUDGET, |memory, chain| match buffers.fill(chain) {
            Ok(()) => serve(buffers, memory),
            Err(_) => 0,
        })
    }

    fn reset(&mut self) {
        self.queue = None;
    }
}

/// Fills the buffers, up to [`MAX_BYTES`]; returns how many bytes were written.
fn serve(buffers: &ChainBuffers, memory: &GuestMemory) -> u32 {
    let length = buffers.writable.len().min(MAX_BYTES);
    let mut block = [0u8; 256];
    let mut done = 0;
    while done < length {
        let want = (length - done).min(block.len() as u64) as usize;
        // SAFETY: the call fills the first `want` bytes of `block`, which has at least as many.
        let got = unsafe { libc::getrandom(block.as_mut_ptr().cast(), want, 0) };
        let Some(random) = block.get(..want) else {
            break;
        };
        if usize::try_from(got) != Ok(want) || buffers.writable.write(memory, done, random).is_err() {
            break;
        }
        done += want as u64;
    }
    done as u32
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Driver, Part};
    use super::*;

    #[test]
    fn buffers_are_filled_with_random_bytes() {
        let mut driver = Driver::new(&[QUEUE_SIZE]);
        let mut rng = Rng::default();
        rng.activate(driver.activation(feature::COMMON));
        driver.send(0, &[Part::write(0x1000, 300), Part::write(0x2000, 20)]);
        driver.send(0, &[Part::write(0x10_0000, 1 << 16)]);
        assert_eq!(rng.process(), Progress::Idle);
        assert_eq!(driver.used(0), [(0, 320), (2, 4096)]);
        let first = driver.read(0x1000, 300);
        assert!(first.iter().any(|byte| *byte != 0));
        assert_ne!(first.get(..20).unwrap(), driver.read(0x2000, 20));
    }

    #[test]
    fn bad_buffers_are_given_back_empty() {
        let mut driver = Driver::new(&[QUEUE_SIZE]);
        let mut rng = Rng::default();
        rng.activate(driver.activation(feature::COMMON));
        driver.send(0, &[Part::read(0x1000, 16)]);
        driver.send(0, &[Part::write(u64::MAX - 8, 64)]);
        driver.send(0, &[Part::write(0x1000, 16), Part::read(0x2000, 16)]);
        assert_eq!(rng.process(), Progress::Idle);
        assert_eq!(driver.used(0), [(0, 0), (1, 0), (2, 0)]);
    }
}
