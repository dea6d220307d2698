//! Guests that drive the memory device and the balloon, or leave them alone.

use std::fs;
use std::time::Instant;

use stoker_proto::vmm::Status;
use stoker_vmm::control::{Client, ClientError};
use stoker_vmm::exit_report::Reason;

use super::{Guest, LOOP, PATIENCE, out, runnable};

const MIB: u32 = 1 << 20;
const COM1: u16 = 0x3f8;
/// The entries of the first vCPU's page table that map the last pages of 2 MiB of its first GiB.
const LAST_ENTRIES: u32 = 0xb000 + 509 * 8;
/// Where a guest then finds the devices' registers, and the first two blocks that can be plugged.
const DEVICES: u32 = 509 << 21;
const BLOCKS: [u32; 2] = [510 << 21, 511 << 21];
/// The guest's address of the first of them, behind all devices.
const PLUGGABLE: u64 = 4 << 30;
/// Where a guest has its rings; and requests, one every 64 bytes, with the answers behind them.
const RINGS: u32 = 2 * MIB;
const AVAILABLE: u32 = 0x1000;
const USED: u32 = 0x2000;
const REQUESTS: u32 = 3 * MIB;

/// Machine code, put together. Addresses are below 2 GiB.
#[derive(Default)]
struct Code(Vec<u8>);

impl Code {
    /// Begins with the devices and blocks mapped.
    fn new() -> Self {
        let mut code = Self::default();
        for (entry, address) in (0u32..).zip([0xd000_0000, PLUGGABLE, PLUGGABLE + u64::from(2 * MIB)]) {
            // Present, writable, 2 MiB.
            code.put(LAST_ENTRIES + entry * 8, &(address | 0x83).to_le_bytes());
        }
        code
    }

    fn add(&mut self, parts: &[&[u8]]) {
        parts.iter().for_each(|part| self.0.extend_from_slice(part));
    }

    /// `mov dword [address], value`
    fn store(&mut self, address: u32, value: u32) {
        self.add(&[&[0xc7, 0x04, 0x25], &address.to_le_bytes(), &value.to_le_bytes()]);
    }

    /// Stores bytes, filled up to whole words.
    fn put(&mut self, address: u32, bytes: &[u8]) {
        for (at, word) in (address..).step_by(4).zip(bytes.chunks(4)) {
            let mut filled = [0; 4];
            filled[..word.len()].copy_from_slice(word);
            self.store(at, u32::from_le_bytes(filled));
        }
    }

    /// `again: cmp dword [address], value; jne again`
    fn wait(&mut self, address: u32, value: u32) {
        self.add(&[&[0x81, 0x3c, 0x25], &address.to_le_bytes(), &value.to_le_bytes()]);
        self.add(&[&[0x75, 0xf3]]);
    }

    /// Says the byte at an address as a digit: `mov al, [address]; add al, '0'; mov dx, port; out dx, al`.
    fn say(&mut self, address: u32) {
        self.add(&[&[0x8a, 0x04, 0x25], &address.to_le_bytes(), &[0x04, b'0']]);
        self.add(&[&[0x66, 0xba], &COM1.to_le_bytes(), &[0xee]]);
    }

    /// Becomes the driver of the device at `index`, with queues of 16 descriptors, each with its rings in a page of three.
    fn drive(&mut self, index: u32, queues: &[u32]) {
        let device = DEVICES + index * 0x1000;
        for (register, value) in [
            (0x70, 1),
            (0x70, 3),
            (0x24, 1),
            (0x20, 1),
            (0x24, 0),
            (0x20, 0),
            (0x70, 11),
        ] {
            self.store(device + register, value);
        }
        for queue in queues {
            let rings = rings(*queue);
            let addresses = [(0x80, rings), (0x90, rings + AVAILABLE), (0xa0, rings + USED)];
            self.store(device + 0x30, *queue);
            self.store(device + 0x38, 16);
            for (register, address) in addresses {
                self.store(device + register, address);
            }
            self.store(device + 0x44, 1);
        }
        self.store(device + 0x70, 15);
    }

    /// Sends the `number`th request of a queue, counted from 0: bytes to read, and room for as many to write.
    fn send(&mut self, index: u32, queue: u32, number: u32, request: &[u8], room: u32) {
        let at = request_at(queue, number);
        let rings = rings(queue);
        let head = number * 2;
        let descriptor = |address: u32, length: u32, flags: u32| {
            [
                u64::from(address).to_le_bytes(),
                (u64::from(flags) << 32 | u64::from(length)).to_le_bytes(),
            ]
            .concat()
        };
        self.put(at, request);
        let next = u32::from(room > 0) | (head + 1) << 16;
        self.put(rings + head * 16, &descriptor(at, request.len() as u32, next));
        // 2: for the device to write.
        self.put(rings + head * 16 + 16, &descriptor(answer(queue, number), room, 2));
        // Ring entries are 2 bytes: a word has this one, and the next that is not there yet.
        let pair = match number % 2 {
            0 => head,
            _ => head << 16 | (head - 2),
        };
        self.store(rings + AVAILABLE + 4 + number / 2 * 4, pair);
        self.store(rings + AVAILABLE, (number + 1) << 16);
        self.store(DEVICES + index * 0x1000 + 0x50, queue);
    }

    /// Waits for so many requests to be given back.
    fn wait_used(&mut self, queue: u32, count: u32) {
        // Its flags are 0.
        self.wait(rings(queue) + USED, count << 16);
    }

    /// Sends a request of the memory device, and says the type of the answer.
    fn mem(&mut self, index: u32, number: u32, kind: u16, block: u64, blocks: u16) {
        let request = [
            u64::from(kind),
            PLUGGABLE + block * u64::from(2 * MIB),
            u64::from(blocks),
        ];
        self.send(index, 0, number, &request.map(u64::to_le_bytes).concat(), 10);
        self.wait_used(0, number + 1);
        self.say(answer(0, number));
    }

    fn off(mut self) -> Vec<u8> {
        self.add(&[&out(0x600, 0x34), &LOOP]);
        self.0
    }
}

fn rings(queue: u32) -> u32 {
    RINGS + queue * 0x4000
}

fn request_at(queue: u32, number: u32) -> u32 {
    REQUESTS + queue * 0x1_0000 + number * 0x1000
}

fn answer(queue: u32, number: u32) -> u32 {
    request_at(queue, number) + 0x800
}

fn start(code: &[u8], max_mib: Option<u32>, balloon: bool) -> Guest {
    Guest::start_with(code, |config| {
        config.max_memory_mib = max_mib;
        config.balloon = balloon;
    })
}

/// Asks how the machine is until it is so.
fn wait_until(control: &mut Client, is_so: impl Fn(&Status) -> bool) -> Status {
    let start = Instant::now();
    loop {
        let status = control.query().unwrap();
        if is_so(&status) {
            return status;
        }
        assert!(start.elapsed() < PATIENCE, "{status:?}");
        std::thread::yield_now();
    }
}

/// What was asked for and what was taken, of memory.
fn memory(status: &Status) -> (u32, u32) {
    let amounts = status.amounts.as_ref().unwrap();
    (amounts.memory_asked_mib, amounts.memory_taken_mib)
}

#[test]
fn memory_is_plugged_used_and_unplugged_by_a_guest() {
    if !runnable() {
        return;
    }
    // The first device is the random number generator.
    const MEM: u32 = 1;
    let requested = DEVICES + MEM * 0x1000 + 0x100 + 48;
    let mut code = Code::new();
    code.drive(MEM, &[0]);
    code.mem(MEM, 0, 0, 0, 1); // not asked for: 1
    code.wait(requested, 4 * MIB);
    code.mem(MEM, 1, 0, 0, 2); // 0
    code.store(BLOCKS[1], 7);
    code.say(BLOCKS[1]); // 7
    code.wait(requested, 2 * MIB);
    code.mem(MEM, 2, 0, 5, 1); // more than asked for: 1
    code.mem(MEM, 3, 1, 1, 1); // 0
    code.say(BLOCKS[1]); // it is gone: 0
    code.store(BLOCKS[0], 8);
    code.say(BLOCKS[0]); // 8
    code.wait(requested, 0);
    code.mem(MEM, 4, 2, 0, 0); // 0
    code.wait(requested, 6 * MIB);
    let guest = start(&code.off(), Some(32 + 64), false);
    let mut control = guest.control();
    let start = Instant::now();
    while fs::read(guest.folder.path().join("console")).unwrap() != b"1" {
        assert!(start.elapsed() < PATIENCE);
        std::thread::yield_now();
    }
    assert_eq!(memory(&control.query().unwrap()), (32, 32));
    control.resize(None, Some(36)).unwrap();
    wait_until(&mut control, |status| memory(status) == (36, 36));
    // It is told whether it stands still or not.
    control.pause().unwrap();
    assert_eq!(memory(&control.resize(None, Some(34)).unwrap()), (34, 36));
    control.resume().unwrap();
    wait_until(&mut control, |status| memory(status) == (34, 34));
    control.resize(None, Some(32)).unwrap();
    wait_until(&mut control, |status| memory(status) == (32, 32));
    control.resize(None, Some(38)).unwrap();
    let report = guest.end();
    assert_eq!(
        (report.reason, report.console_tail.as_str()),
        (Reason::GuestOff, "10710080"),
        "{report:?}"
    );
}

/// Either it ends, or, where KVM emulates what writes, nothing is written (`lab_boot` has the first alone).
#[test]
fn a_guest_cannot_write_to_memory_that_is_not_plugged() {
    if !runnable() {
        return;
    }
    let mut code = Code::new();
    code.say(BLOCKS[0]);
    code.say(BLOCKS[1] + 2 * MIB - 1);
    code.store(BLOCKS[0], 1);
    code.say(BLOCKS[0]);
    let report = start(&code.off(), Some(96), false).end();
    match report.reason {
        Reason::GuestOff => assert_eq!(report.console_tail, "000", "{report:?}"),
        _ => {
            assert_eq!(
                (report.reason, report.console_tail.as_str()),
                (Reason::Error, "00"),
                "{report:?}"
            );
            assert!(report.detail.contains("memory that is not plugged"), "{report:?}");
        }
    }
}

#[test]
fn a_device_is_not_had_to_write_to_memory_that_is_not_plugged() {
    if !runnable() {
        return;
    }
    const RNG: u32 = 0;
    let mut code = Code::new();
    code.drive(RNG, &[0]);
    // A request of the random number generator's is room alone.
    code.send(RNG, 0, 0, &[], 0);
    let rings = rings(0);
    code.put(
        rings,
        &[PLUGGABLE.to_le_bytes(), (2u64 << 32 | 64).to_le_bytes()].concat(),
    );
    code.store(rings + AVAILABLE, 2 << 16);
    code.store(DEVICES + 0x50, 0);
    code.wait_used(0, 2);
    // How much was written, in the second element of the used ring.
    code.say(rings + USED + 4 + 8 + 4);
    code.say(BLOCKS[0]);
    let report = start(&code.off(), Some(96), false).end();
    assert_eq!(
        (report.reason, report.console_tail.as_str()),
        (Reason::GuestOff, "00"),
        "{report:?}"
    );
}

#[test]
fn a_balloon_is_filled_emptied_and_tells() {
    if !runnable() {
        return;
    }
    const BALLOON: u32 = 1;
    let config = DEVICES + BALLOON * 0x1000 + 0x100;
    let pages: Vec<u8> = (0x1000u32..0x1100).flat_map(u32::to_le_bytes).collect();
    let statistics = |free: u64| [&4u16.to_le_bytes()[..], &free.to_le_bytes()].concat();
    let mut code = Code::new();
    code.drive(BALLOON, &[0, 1, 2, 4]);
    code.send(BALLOON, 2, 0, &statistics(11), 0);
    code.store(0x100_0000, 9);
    code.wait(config, 256);
    code.send(BALLOON, 0, 0, &pages, 0);
    code.wait_used(0, 1);
    code.store(config + 4, 256);
    code.say(0x100_0000); // given away: 0
    code.wait_used(2, 1);
    code.send(BALLOON, 2, 1, &statistics(12), 0);
    code.wait(config, 0);
    code.send(BALLOON, 1, 0, &pages, 0);
    code.wait_used(1, 1);
    code.wait(config, 512);
    let guest = start(&code.off(), None, true);
    let mut control = guest.control();
    assert_eq!(control.query().unwrap().balloon.unwrap().asked_mib, 0);
    control.set_balloon(1).unwrap();
    let is_full = |status: &Status| {
        let balloon = status.balloon.unwrap();
        let free = balloon.statistics.and_then(|statistics| statistics.free_bytes);
        (balloon.asked_mib, balloon.taken_mib, balloon.told_mib, free) == (1, 1, 1, Some(12))
    };
    let told = wait_until(&mut control, is_full).balloon.unwrap().statistics.unwrap();
    assert_eq!(told.total_bytes, None);
    assert!(told.age_us < PATIENCE.as_micros() as u64);
    control.set_balloon(0).unwrap();
    // It still says that it has given a MiB.
    wait_until(&mut control, |status| {
        let balloon = status.balloon.unwrap();
        (balloon.asked_mib, balloon.taken_mib, balloon.told_mib) == (0, 0, 1)
    });
    control.set_balloon(2).unwrap();
    let report = guest.end();
    assert_eq!(
        (report.reason, report.console_tail.as_str()),
        (Reason::GuestOff, "0"),
        "{report:?}"
    );
}

#[test]
fn a_guest_that_ignores_what_it_is_asked_is_told_of_and_not_waited_for() {
    if !runnable() {
        return;
    }
    let guest = start(&LOOP, Some(96), true);
    let mut control = guest.control();
    assert_eq!(memory(&control.resize(Some(2), Some(96)).unwrap()), (96, 32));
    let balloon = control.set_balloon(96).unwrap().balloon.unwrap();
    assert_eq!(
        (balloon.asked_mib, balloon.taken_mib, balloon.statistics),
        (96, 0, None)
    );
    let refused = |control: &mut Client, asked: Result<Status, ClientError>, word: &str| {
        let message = asked.unwrap_err().to_string();
        assert!(message.contains(word), "{message}");
        assert_eq!(memory(&control.query().unwrap()), (96, 32), "nothing has changed");
    };
    for (mib, word) in [
        (31, "32 MiB, which it started with, to 96 MiB"),
        (98, "to 96 MiB"),
        (35, "blocks of 2 MiB"),
        (0, "`memory_mib` is 0"),
    ] {
        let asked = control.resize(None, Some(mib));
        refused(&mut control, asked, word);
    }
    let asked = control.resize(Some(3), Some(34));
    refused(&mut control, asked, "this machine has 2");
    let asked = control.resize(None, None);
    refused(&mut control, asked, "names `vcpus`, `memory_mib` or both");
    let asked = control.set_balloon(97);
    refused(&mut control, asked, "this machine has 96 MiB");
    assert_eq!(control.query().unwrap().balloon.unwrap().asked_mib, 96);
    control.stop().unwrap();
    assert_eq!(guest.end().reason, Reason::Stopped);

    let guest = start(&LOOP, None, false);
    let mut control = guest.control();
    let status = control.resize(None, Some(32)).unwrap();
    assert_eq!((memory(&status), status.balloon), ((32, 32), None));
    let message = control.resize(None, Some(34)).unwrap_err().to_string();
    assert!(message.contains("to 32 MiB"), "{message}");
    let message = control.set_balloon(1).unwrap_err().to_string();
    assert!(message.contains("no balloon"), "{message}");
    control.stop().unwrap();
    guest.end();
}
