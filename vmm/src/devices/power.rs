//! Power-off and reset, as ACPI's hardware-reduced FADT describes them (ACPI 6.5, 4.8.3.7 and 4.8.4), and the reset
//! line of the PC's keyboard controller, which Linux pulls where it is told `reboot=k`.

use std::sync::Arc;

use super::{GuestEvent, GuestEvents};
use crate::bus::BusDevice;

/// I/O port of the first of this device's registers.
pub const PORT: u16 = 0x600;
/// Number of ports.
pub const PORTS: u16 = 3;
/// Offset of the sleep control register: `SLP_TYP` in bits 2 to 4, `SLP_EN` in bit 5.
pub const SLEEP_CONTROL: u16 = 0;
/// Offset of the sleep status register: bit 7 says that the machine woke up, which ours never does.
pub const SLEEP_STATUS: u16 = 1;
/// Offset of the reset register.
pub const RESET: u16 = 2;
/// What resets the machine when it is written to the reset register.
pub const RESET_VALUE: u8 = 1;
/// `SLP_TYP` of the state S5 (soft off), as the DSDT's `\_S5` says it.
pub const SLEEP_TYPE_S5: u8 = 5;

const SLEEP_ENABLE: u8 = 1 << 5;

/// I/O port of the keyboard controller's command register.
pub const I8042_PORT: u16 = 0x64;
const I8042_PULSE_RESET: u8 = 0xfe;

/// Sleep control, sleep status and reset register.
pub struct Power(Arc<GuestEvents>);

/// A keyboard controller that can do nothing but reset the machine.
pub struct I8042(Arc<GuestEvents>);

// === impl Power ===

impl Power {
    /// A device that tells `events`.
    pub fn new(events: Arc<GuestEvents>) -> Self {
        Self(events)
    }
}

impl BusDevice for Power {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let [value] = *data else { return };
        if offset == u64::from(SLEEP_CONTROL) && value == SLEEP_TYPE_S5 << 2 | SLEEP_ENABLE {
            self.0.tell(GuestEvent::Off);
        } else if offset == u64::from(RESET) && value == RESET_VALUE {
            self.0.tell(GuestEvent::Reset("the ACPI reset register"));
        }
    }
}

// === impl I8042 ===

impl I8042 {
    /// A device that tells `events`.
    pub fn new(events: Arc<GuestEvents>) -> Self {
        Self(events)
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        // Status: no output waiting, ready for a command.
        data.fill(0);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if *data == [I8042_PULSE_RESET] {
            self.0.tell(GuestEvent::Reset("the keyboard controller's reset line"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events() -> Arc<GuestEvents> {
        Arc::new(GuestEvents::new().unwrap())
    }

    #[test]
    fn only_s5_with_the_enable_bit_powers_off() {
        let events = events();
        let mut power = Power::new(events.clone());
        for value in 0..=255 {
            if value != 0x34 {
                power.write(0, &[value]);
            }
        }
        power.write(0, &[0x34, 0]);
        power.write(1, &[0x34]);
        assert_eq!(events.take(), None);
        power.write(0, &[0x34]);
        assert_eq!(events.take(), Some(GuestEvent::Off));
    }

    #[test]
    fn resets_are_told_apart_and_the_first_is_kept() {
        let events = events();
        let mut power = Power::new(events.clone());
        power.write(2, &[0]);
        assert_eq!(events.take(), None);
        power.write(2, &[1]);
        I8042::new(events.clone()).write(0, &[0xfe]);
        assert_eq!(events.take(), Some(GuestEvent::Reset("the ACPI reset register")));

        let events = super::tests::events();
        let mut i8042 = I8042::new(events.clone());
        i8042.write(0, &[0xf0]);
        i8042.write(0, &[0xfe, 0xfe]);
        assert_eq!(events.take(), None);
        i8042.write(0, &[0xfe]);
        assert!(matches!(events.take(), Some(GuestEvent::Reset(_))));
    }
}
