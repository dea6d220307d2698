//! Whatever a driver asks a memory device for, from wherever its rings and requests lie: no more is plugged than the host asked for,
//! and what is not plugged is found by nobody.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stoker_vmm::devices::virtio::mem::Mem;
use stoker_vmm::devices::virtio::testing::{Driver, Part};
use stoker_vmm::devices::virtio::{Progress, VirtioDevice as _, feature};
use stoker_vmm::memory::BLOCK;

const QUEUE_SIZE: u16 = 32;
const PLUGGABLE_MIB: u32 = 128;
const REQUESTS: u64 = 0x1000;
const ANSWERS: u64 = 0x10_0000;

fuzz_target!(|data: &[u8]| {
    let mut driver = Driver::with_pluggable(&[QUEUE_SIZE], PLUGGABLE_MIB);
    let memory = driver.memory.pluggable().unwrap().clone();
    let mut mem = Mem::new(memory.clone());
    let mut plugging = mem.plugging();
    mem.activate(driver.activation(feature::COMMON));
    let mut most = 0;
    for step in data.chunks_exact(12).take(256) {
        let [kind, place, count, flags, rest @ ..] = <[u8; 12]>::try_from(step).unwrap();
        let wild = u64::from_le_bytes(rest);
        if flags & 3 == 3 {
            if plugging.ask(u32::from(count)).is_ok() {
                most = u64::from(count) << 20;
            }
            continue;
        }
        // Blocks mostly; sometimes anywhere.
        let address = match flags & 4 {
            0 => memory.start() + u64::from(place % 80) * BLOCK,
            _ => memory.start().wrapping_add(wild),
        };
        let mut request = [0; 24];
        request[..2].copy_from_slice(&u16::from(kind % 6).to_le_bytes());
        request[8..16].copy_from_slice(&address.to_le_bytes());
        request[16..18].copy_from_slice(&u16::from(count).to_le_bytes());
        driver.put(REQUESTS, &request);
        // The request and the room for its answer may lie in what it unplugs, or nowhere.
        let within = memory.start() + u64::from(place % 80) * BLOCK;
        let from = if flags & 8 == 0 { REQUESTS } else { within };
        let to = match flags & 0x30 {
            0 => ANSWERS,
            0x10 => within,
            _ => wild,
        };
        let before = memory.plugged() * BLOCK;
        driver.send(0, &[Part::read(from, 24), Part::write(to, u32::from(flags >> 6) * 5)]);
        let mut rounds = 0;
        while mem.process() == Progress::More {
            rounds += 1;
            assert!(rounds <= 64, "no end");
        }
        let after = memory.plugged() * BLOCK;
        assert!(after <= most.max(before), "{after} of {most}");
        assert_eq!(memory.plugged_of(0, memory.blocks()) * BLOCK, after);
        assert_eq!(u64::from(plugging.taken_mib()) << 20, after);
    }
    // What can be written, by the kernel's word, is what is plugged: anything else would end this process here.
    for block in 0..memory.blocks() {
        if memory.plugged_of(block, 1) == 1 {
            driver.put(memory.start() + block * BLOCK, &[1]);
        }
    }
});
