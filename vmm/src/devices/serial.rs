//! The serial console: a 16550 by `vm-superio` whose output goes to the [`Console`]. It has no input.

use std::io;

use vm_superio::serial::NoEvents;
use vm_superio::{Serial as Uart, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::console::Console;

/// First I/O port of COM1.
pub const PORT: u16 = 0x3f8;
/// Number of its ports.
pub const PORTS: u16 = 8;
/// Its interrupt.
pub const GSI: u32 = 4;

/// COM1.
pub struct Serial(Uart<Line, NoEvents, Console>);

/// Its interrupt line.
struct Line(EventFd);

// === impl Serial ===

impl Serial {
    /// A port that writes to `console` and interrupts by `line`.
    pub fn new(console: Console, line: EventFd) -> Self {
        Self(Uart::new(Line(line), console))
    }
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let ([value], Ok(offset)) = (data, u8::try_from(offset)) {
            *value = self.0.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let Ok(offset) = u8::try_from(offset) else {
            return;
        };
        // More than one byte is a string instruction: each goes to the same register. An interrupt that cannot be
        // delivered because its eventfd is full is pending all the same.
        for value in data {
            let _ = self.0.write(offset, *value);
        }
    }
}

// === impl Line ===

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRANSMIT: u64 = 0;
    const INTERRUPT_ENABLE: u64 = 1;
    const LINE_STATUS: u64 = 5;

    fn serial() -> (Serial, Console, EventFd) {
        let console = Console::nowhere();
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let serial = Serial::new(console.clone(), line.try_clone().unwrap());
        (serial, console, line)
    }

    #[test]
    fn what_the_guest_transmits_is_on_the_console() {
        let (mut serial, console, _line) = serial();
        let mut status = [0];
        serial.read(LINE_STATUS, &mut status);
        assert_eq!(status[0] & 0x60, 0x60, "ready to transmit");
        serial.write(TRANSMIT, b"h");
        serial.write(TRANSMIT, b"ello");
        assert_eq!(console.tail(), "hello");
    }

    #[test]
    fn an_empty_transmitter_interrupts_where_it_is_enabled() {
        let (mut serial, _console, line) = serial();
        serial.write(TRANSMIT, b"x");
        assert!(line.read().is_err());
        serial.write(INTERRUPT_ENABLE, &[2]);
        serial.write(TRANSMIT, b"x");
        assert!(line.read().is_ok());
    }

    #[test]
    fn any_offset_and_width_is_survived() {
        let (mut serial, _console, _line) = serial();
        for offset in [0, 1, 7, 8, 255, 256, u64::MAX] {
            for width in [0, 1, 2, 4, 8] {
                serial.write(offset, &vec![0xff; width]);
                serial.read(offset, &mut vec![0; width]);
            }
        }
    }
}
