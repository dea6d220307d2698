//! The configuration space of a device (virtio 1.3, 2.5), as the device, which may change it, and the transport, by which
//! the driver reads it, share it. A driver may write to the fields of which the device says so.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::Interrupt;

/// The fields, and how often they have changed.
#[derive(Default)]
pub struct ConfigSpace {
    content: Mutex<Content>,
    /// What the driver may write.
    writable: Range<usize>,
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
        Self::with_writable(bytes, 0..0)
    }

    /// The same where the driver may write to a range of the fields' bytes.
    pub fn with_writable(bytes: Vec<u8>, writable: Range<usize>) -> Arc<Self> {
        Arc::new(Self {
            content: Mutex::new(Content { bytes, generation: 0 }),
            writable,
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

    /// Writes for the driver from `offset` bytes into the fields; what it may not write stays as it is.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let mut content = self.content();
        for at in self.writable.clone() {
            let written = (at as u64)
                .checked_sub(offset)
                .and_then(|from| usize::try_from(from).ok());
            if let Some(byte) = written.and_then(|from| data.get(from))
                && let Some(field) = content.bytes.get_mut(at)
            {
                *field = *byte;
            }
        }
    }

    /// Sets the field at `offset` without telling the driver. One that ends behind the fields' bytes is none.
    pub fn set(&self, offset: usize, field: &[u8]) {
        let mut content = self.content();
        let end = offset.saturating_add(field.len());
        if let Some(bytes) = content.bytes.get_mut(offset..end) {
            bytes.copy_from_slice(field);
            content.generation = content.generation.wrapping_add(1);
        }
    }

    /// Tells the driver to look.
    pub fn tell(&self) {
        if let Some(driver) = self.driver.get() {
            driver.config_changed();
        }
    }

    /// Replaces all fields at once and tells the driver.
    pub fn replace(&self, bytes: Vec<u8>) {
        {
            let mut content = self.content();
            content.bytes = bytes;
            content.generation = content.generation.wrapping_add(1);
        }
        self.tell();
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
    fn a_driver_writes_what_it_may() {
        let config = ConfigSpace::with_writable(vec![1, 2, 3, 4], 1..3);
        let generation = config.generation();
        config.write(0, &[9; 8]);
        config.write(2, &[8]);
        for offset in [4, u64::MAX, 3] {
            config.write(offset, &[7; 2]);
        }
        let mut fields = [0; 4];
        config.read(0, &mut fields);
        assert_eq!((fields, config.generation()), ([1, 9, 8, 4], generation));
        let fixed = ConfigSpace::new(vec![1]);
        fixed.write(0, &[2]);
        fixed.read(0, &mut fields[..1]);
        assert_eq!(fields[0], 1);
    }

    #[test]
    fn a_field_is_set_without_a_word() {
        let config = ConfigSpace::new(vec![0; 4]);
        let interrupt = Arc::new(CountingInterrupt::default());
        config.connect(interrupt.clone());
        let generation = config.generation();
        config.set(2, &[5, 6]);
        for (offset, field) in [(3, &[9, 9][..]), (usize::MAX, &[9])] {
            config.set(offset, field);
        }
        let mut fields = [0xff; 4];
        config.read(0, &mut fields);
        assert_eq!(fields, [0, 0, 5, 6]);
        assert_eq!(config.generation(), generation + 1);
        assert_eq!(interrupt.config_changed_count(), 0);
        config.tell();
        assert_eq!(interrupt.config_changed_count(), 1);
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
