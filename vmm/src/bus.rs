//! Addresses and the devices behind them: one bus for I/O ports, one for memory-mapped registers.

use std::sync::{Arc, Mutex, PoisonError};

/// What a bus needs of a device: registers at offsets from the device's own start.
pub trait BusDevice: Send {
    /// The guest reads `data.len()` bytes (1, 2, 4 or 8; more where a string instruction repeats) at `offset`.
    /// `data` holds all ones, what a bus without a device answers, and may be left so.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// The guest writes `data` at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device as several vCPUs share it.
pub type SharedDevice = Arc<Mutex<dyn BusDevice>>;

/// A map from address ranges to devices, complete before the first vCPU runs.
#[derive(Default)]
pub struct Bus {
    /// Sorted by `start`, never overlapping.
    ranges: Vec<Range>,
}

struct Range {
    start: u64,
    length: u64,
    device: SharedDevice,
}

/// Two devices claim one address.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the range {start:#x}+{length:#x} is empty, wraps, or overlaps another device's")]
pub struct Overlap {
    start: u64,
    length: u64,
}

// === impl Bus ===

impl Bus {
    /// Puts `device` at `start`, `length` bytes long.
    ///
    /// # Errors
    /// Where the range is empty or overlaps another.
    pub fn insert(&mut self, start: u64, length: u64, device: SharedDevice) -> Result<(), Overlap> {
        let refuse = Overlap { start, length };
        let end = start.checked_add(length).ok_or(Overlap { ..refuse })?;
        let at = self.ranges.partition_point(|range| range.start < start);
        let before = at.checked_sub(1).and_then(|index| self.ranges.get(index));
        if length == 0
            || before.is_some_and(|range| range.start + range.length > start)
            || self.ranges.get(at).is_some_and(|next| next.start < end)
        {
            return Err(refuse);
        }
        self.ranges.insert(at, Range { start, length, device });
        Ok(())
    }

    /// Reads for the guest; all ones where there is no device.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((offset, device)) = self.find(address, data.len()) {
            device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
        }
    }

    /// Writes for the guest; nothing happens where there is no device.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address, data.len()) {
            device
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .write(offset, data);
        }
    }

    /// The device that holds the first byte of an access. Accesses are let run over a device's end, since for a string
    /// instruction `length` is that of all its elements, which go to one address; devices check offsets themselves.
    fn find(&self, address: u64, length: usize) -> Option<(u64, &SharedDevice)> {
        if length == 0 {
            return None;
        }
        let after = self.ranges.partition_point(|range| range.start <= address);
        let range = self.ranges.get(after.checked_sub(1)?)?;
        let offset = address - range.start;
        (offset < range.length).then_some((offset, &range.device))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Recorder(Vec<(u64, Vec<u8>)>);

    impl BusDevice for Recorder {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0.push((offset, data.to_vec()));
        }
    }

    #[test]
    fn accesses_reach_the_device_at_their_address() {
        let mut bus = Bus::default();
        let high = Arc::new(Mutex::new(Recorder::default()));
        let low = Arc::new(Mutex::new(Recorder::default()));
        bus.insert(0x200, 0x10, high.clone()).unwrap();
        bus.insert(0x100, 0x10, low.clone()).unwrap();
        bus.write(0x203, &[1, 2]);
        bus.write(0x10f, &[3]);
        bus.write(0x110, &[4]);
        bus.write(u64::MAX, &[5]);
        bus.write(0x100, &[]);
        assert_eq!(high.lock().unwrap().0, [(3, vec![1, 2])]);
        assert_eq!(low.lock().unwrap().0, [(15, vec![3])]);

        let mut data = [0; 2];
        bus.read(0x204, &mut data);
        assert_eq!(data, [4, 4]);
        bus.read(0x210, &mut data);
        assert_eq!(data, [0xff, 0xff]);
    }

    #[test]
    fn overlaps_are_refused() {
        let mut bus = Bus::default();
        let device = || Arc::new(Mutex::new(Recorder::default()));
        bus.insert(0x100, 0x10, device()).unwrap();
        for (start, length) in [
            (0x100, 1),
            (0xff, 2),
            (0x10f, 1),
            (0x90, 0x100),
            (0x300, 0),
            (u64::MAX, 2),
        ] {
            assert!(bus.insert(start, length, device()).is_err(), "{start:#x}+{length:#x}");
        }
        bus.insert(0x110, 0x10, device()).unwrap();
        bus.insert(0xf0, 0x10, device()).unwrap();
    }
}
