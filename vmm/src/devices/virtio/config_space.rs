//! The configuration space of a device (virtio 1.3, 2.5), as the device, which may change it, and the transport, by which
//! the driver reads it, share it.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::Interrupt;

/// The fields, and how often they have changed.
#[derive(Default)]
pub struct ConfigSpace {
    content: Mutex<Content>,
    /// Told of changes, from when a transport is there.
    driver: OnceLock<Arc<dyn Interrupt>>,
}

#[derive(Default)]
struct Content {
    bytes: Vec<u8>,
    generation: u32,
}

// === impl ConfigSpace ===

impl ConfigSpace {
    /// A configuration space with these fields.
    pub fn new(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self {
            content: Mutex::new(Content { bytes, generation: 0 }),
            driver: OnceLock::new(),
        })
    }

    /// Changes are told by this interrupt from now on. A device has one transport: another call does nothing.
    pub fn connect(&self, driver: Arc<dyn Interrupt>) {
        let _ = self.driver.set(driver);
    }

    /// Reads from `offset` bytes into the fields; behind them are zeros.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let content = self.content();
        let rest = usize::try_from(offset)
            .ok()
            .and_then(|offset| content.bytes.get(offset..))
            .unwrap_or_default();
        for (to, from) in data.iter_mut().zip(rest) {
            *to = *from;
        }
    }

    /// Different after each change, so that a driver notices one between two of its reads.
    pub fn generation(&self) -> u32 {
        self.content().generation
    }

    /// Replaces all fields at once and tells the driver.
    pub fn replace(&self, bytes: Vec<u8>) {
        {
            let mut content = self.content();
            content.bytes = bytes;
            content.generation = content.generation.wrapping_add(1);
        }
        if let Some(driver) = self.driver.get() {
            driver.config_changed();
        }
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::CountingInterrupt;
    use super::*;

    #[test]
    fn fields_are_read_from_any_offset_and_zeros_follow() {
        let config = ConfigSpace::new(vec![1, 2, 3]);
        let read = |offset| {
            let mut data = [0xff; 2];
            config.read(offset, &mut data);
            data
        };
        assert_eq!([read(0), read(1), read(2), read(3)], [[1, 2], [2, 3], [3, 0], [0, 0]]);
        assert_eq!([read(u64::MAX - 1), read(u64::MAX)], [[0, 0]; 2]);
    }

    #[test]
    fn a_change_is_told_once_a_transport_is_there() {
        let config = ConfigSpace::new(vec![1]);
        config.replace(vec![2]);
        let interrupt = Arc::new(CountingInterrupt::default());
        config.connect(interrupt.clone());
        assert_eq!(interrupt.config_changed_count(), 0);
        let before = config.generation();
        config.replace(vec![3]);
        assert_eq!(interrupt.config_changed_count(), 1);
        assert_ne!(config.generation(), before);
    }

    #[test]
    fn two_reads_of_one_generation_are_of_one_value() {
        const CHANGES: u8 = 200;
        let config = ConfigSpace::new(vec![0; 8]);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for value in 1..=CHANGES {
                    config.replace(vec![value; 8]);
                    std::thread::yield_now();
                }
            });
            let (mut low, mut high) = ([0; 4], [0; 4]);
            while high[0] < CHANGES {
                let generation = config.generation();
                config.read(0, &mut low);
                std::thread::yield_now();
                config.read(4, &mut high);
                if config.generation() == generation {
                    assert_eq!(low, high);
                }
            }
        });
    }
}
