//! Any order of accesses of any width to the I/O ports is survived: serial console, power, keyboard controller, PCI and panic
//! device behind a bus, as a machine has them. The console keeps what was written, and writes no more than it may.
#![no_main]

use std::sync::{Arc, Mutex};

use libfuzzer_sys::fuzz_target;
use stoker_vmm::bus::{Bus, SharedDevice};
use stoker_vmm::console::{Console, FILE_BYTES, TAIL_BYTES};
use stoker_vmm::devices::pci::{self, HostBridge};
use stoker_vmm::devices::power::{self, I8042, Power};
use stoker_vmm::devices::pvpanic::{self, Pvpanic};
use stoker_vmm::devices::serial::{self, Serial};
use stoker_vmm::devices::{GuestEvent, GuestEvents};
use vmm_sys_util::eventfd::EventFd;

/// Where ports are: mostly those that there are.
const PORTS: [u16; 6] = [
    serial::PORT,
    power::PORT,
    power::I8042_PORT,
    pci::PORT,
    pvpanic::PORT,
    0,
];

fuzz_target!(|data: &[u8]| {
    let file = tempfile::NamedTempFile::new().unwrap();
    let console = Console::file(file.path()).unwrap();
    let events = Arc::new(GuestEvents::new().unwrap());
    let line = EventFd::new(0x800).unwrap();
    let devices: [(u16, u16, SharedDevice); 5] = [
        (
            serial::PORT,
            serial::PORTS,
            Arc::new(Mutex::new(Serial::new(console.clone(), line))),
        ),
        (
            power::PORT,
            power::PORTS,
            Arc::new(Mutex::new(Power::new(events.clone()))),
        ),
        (power::I8042_PORT, 1, Arc::new(Mutex::new(I8042::new(events.clone())))),
        (pci::PORT, pci::PORTS, Arc::new(Mutex::new(HostBridge::default()))),
        (pvpanic::PORT, 1, Arc::new(Mutex::new(Pvpanic::new(events.clone())))),
    ];
    let mut bus = Bus::default();
    for (port, count, device) in devices {
        bus.insert(port.into(), count.into(), device).unwrap();
    }
    let mut rest = data;
    let mut told = None;
    while let [kind, place, value, more @ ..] = rest {
        let port = u64::from(PORTS[usize::from(place % 6)]) + u64::from(place / 6 % 10);
        // One element, or a string of them.
        let width = match kind >> 5 {
            7 => usize::from(*value) * 64,
            width => 1 << (width % 4),
        };
        if kind & 1 == 0 {
            let mut bytes = vec![*value; width];
            let own = more.len().min(width).min(usize::from(kind & 7));
            bytes[..own].copy_from_slice(&more[..own]);
            bus.write(port, &bytes);
        } else {
            bus.read(port, &mut vec![0; width]);
        }
        // What the guest has told first stays.
        let now: Option<GuestEvent> = events.take();
        assert!(told.is_none() || now == told);
        told = now;
        rest = more;
    }
    assert!(console.finish().len() <= 3 * TAIL_BYTES);
    assert!(file.as_file().metadata().unwrap().len() <= FILE_BYTES);
});
