//! QEMU's panic device (docs/specs/pvpanic.rst in QEMU): one I/O port by which a guest's kernel tells that it
//! panicked. Linux finds it through ACPI as `QEMU0001` (`CONFIG_PVPANIC_MMIO`).

use std::sync::Arc;

use super::{GuestEvent, GuestEvents};
use crate::bus::BusDevice;

/// Its I/O port, as QEMU has it.
pub const PORT: u16 = 0x505;

/// The guest panicked and leaves the rest to its host.
const PANICKED: u8 = 1 << 0;
/// The guest panicked and goes on into its own crash kernel.
const CRASH_LOADED: u8 = 1 << 1;

/// The device.
pub struct Pvpanic(Arc<GuestEvents>);

// === impl Pvpanic ===

impl Pvpanic {
    /// A device that tells `events`.
    pub fn new(events: Arc<GuestEvents>) -> Self {
        Self(events)
    }
}

impl BusDevice for Pvpanic {
    /// The events that the guest may tell.
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = PANICKED | CRASH_LOADED;
        }
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        // A crash kernel ends by a reset of its own, which tells the machine's owner.
        if data.first().is_some_and(|value| value & PANICKED != 0) {
            self.0.tell(GuestEvent::Panic);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_told() {
        let events = Arc::new(GuestEvents::new().unwrap());
        let mut device = Pvpanic::new(events.clone());
        let mut data = [0xff; 2];
        device.read(0, &mut data);
        assert_eq!(data, [3, 0]);
        device.write(0, &[]);
        device.write(0, &[CRASH_LOADED]);
        assert_eq!(events.take(), None);
        device.write(0, &[PANICKED]);
        assert_eq!(events.take(), Some(GuestEvent::Panic));
    }
}
