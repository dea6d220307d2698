//! The configuration ports of a PCI bus with nothing on it but its host bridge (PCI Local Bus Specification 3.0, 3.2.2.3.2,
//! "Software Generation of Configuration Transactions"; 6.1 for the header).
//!
//! Our devices are not on PCI. But Linux asks these ports whether there is a bus at all, and where nobody answers it says
//! "PCI: Fatal" on the console, of which each character costs two exits.

use crate::bus::BusDevice;

/// The first of its I/O ports, `CONFIG_ADDRESS`; `CONFIG_DATA` is four further.
pub const PORT: u16 = 0xcf8;
/// How many ports it has.
pub const PORTS: u16 = 8;

/// `CONFIG_ADDRESS`: configuration is spoken to; bits 23 to 16 are the bus, 15 to 8 device and function, 7 to 2 the register.
const ENABLE: u32 = 1 << 31;
const ADDRESS_BITS: u32 = ENABLE | 0x00ff_fffc;
const DATA: u64 = 4;

/// The header of the bridge, little endian, as far as it is not zero: vendor and device as QEMU's generic host bridge has
/// them; class 06 (bridge), subclass 00 (host).
const HEADER: [u8; 12] = [0x36, 0x1b, 0x08, 0x00, 0, 0, 0, 0, 0, 0, 0x00, 0x06];

/// The ports.
#[derive(Debug, Default)]
pub struct HostBridge {
    address: u32,
}

// === impl HostBridge ===

impl HostBridge {
    /// A byte of the configuration that `CONFIG_ADDRESS` names; all ones where there is no device.
    fn byte(&self, offset: u64) -> u8 {
        let function = (self.address & !ENABLE) >> 8;
        if self.address & ENABLE == 0 || function != 0 || offset >= 4 {
            return 0xff;
        }
        let register = u64::from(self.address & 0xfc) + offset;
        let byte = usize::try_from(register).ok().and_then(|register| HEADER.get(register));
        byte.copied().unwrap_or(0)
    }
}

impl BusDevice for HostBridge {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(DATA) {
            for (byte, at) in data.iter_mut().zip(offset..) {
                *byte = self.byte(at);
            }
        } else if offset == 0 && data.len() == 4 {
            data.copy_from_slice(&self.address.to_le_bytes());
        }
    }

    /// Nothing of the bridge can be set. Only a whole word is for `CONFIG_ADDRESS`; other accesses are for ports of old
    /// machines that lie in its place.
    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (0, Ok(word)) = (offset, data.try_into()) {
            self.address = u32::from_le_bytes(word) & ADDRESS_BITS;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read<const LENGTH: usize>(device: &mut HostBridge, offset: u64) -> [u8; LENGTH] {
        let mut data = [0xff; LENGTH];
        device.read(offset, &mut data);
        data
    }

    fn select(device: &mut HostBridge, address: u32) {
        device.write(0, &address.to_le_bytes());
    }

    #[test]
    fn linux_finds_a_bus_with_a_host_bridge() {
        // As `pci_check_type1` and `pci_sanity_check` in arch/x86/pci/direct.c do it.
        let mut device = HostBridge::default();
        device.write(3, &[1]);
        select(&mut device, 0x8000_0000);
        assert_eq!(u32::from_le_bytes(read(&mut device, 0)), 0x8000_0000);
        select(&mut device, 0x8000_0008);
        assert_eq!(u16::from_le_bytes(read(&mut device, 6)), 0x0600);
    }

    #[test]
    fn there_is_nothing_else_on_it() {
        let mut device = HostBridge::default();
        for address in [0, 0x8000_0800, 0x8001_0000, 0x8000_0100] {
            select(&mut device, address);
            assert_eq!(read(&mut device, 4), [0xff; 4], "{address:#x}");
        }
        select(&mut device, 0xffff_ffff);
        assert_eq!(u32::from_le_bytes(read(&mut device, 0)), 0x80ff_fffc);
    }

    #[test]
    fn accesses_of_any_width_and_place_are_harmless() {
        let mut device = HostBridge::default();
        for offset in 0..u64::from(PORTS) {
            for length in [0, 1, 2, 4, 8, 64] {
                device.write(offset, &vec![0x80; length]);
                let mut data = vec![0xff; length];
                device.read(offset, &mut data);
            }
        }
        select(&mut device, 0x8000_00fc);
        assert_eq!(read(&mut device, 7), [0, 0xff, 0xff, 0xff]);
        assert_eq!(read(&mut device, 4), [0; 4]);
        assert_eq!(read(&mut device, 1), [0xff; 2]);
    }
}
