//! A driver that writes what it likes into a balloon's rings has no more pages in it than it has memory, and hurts nobody.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stoker_vmm::devices::virtio::balloon::Balloon;
use stoker_vmm::devices::virtio::testing::{Driver, MEMORY_MIB};
use stoker_vmm::devices::virtio::{Progress, VirtioDevice as _};
use vmm_sys_util::epoll::EventSet;

const QUEUES: usize = 5;
const QUEUE_SIZE: u16 = 32;
const PLUGGABLE_MIB: u32 = 128;
/// Where numbers of pages, statistics and tables of further descriptors may be.
const TABLES: u64 = 0x1000;

fuzz_target!(|data: &[u8]| {
    let mut driver = Driver::with_pluggable(&[QUEUE_SIZE; QUEUES], PLUGGABLE_MIB);
    let memory = driver.memory.pluggable().unwrap().clone();
    let mut balloon = Balloon::new(&driver.memory).unwrap();
    let mut inflation = balloon.inflation();
    let config = balloon.info().config;
    balloon.activate(driver.activation(balloon.info().features));
    driver.put(TABLES, &data[..data.len().min(4096)]);
    let mut heads = 0usize;
    for part in data.chunks_exact(11).take(256) {
        let word = |at: usize| u32::from_le_bytes([part[at], part[at + 1], part[at + 2], part[at + 3]]);
        let address = match word(0) {
            wild if wild % 16 == 0 => u64::from(wild) << 32 | u64::from(word(4)),
            plugged if plugged % 16 == 1 => memory.start() + u64::from(plugged % (8 << 20)),
            tame if tame % 2 == 0 => TABLES + u64::from(tame % 4096),
            // Mostly free memory behind the rings.
            tame => u64::from(tame % (33 << 20)).max(24 << 20),
        };
        let (length, flags) = (word(4) >> (part[8] % 32), u16::from(part[8] & 7));
        let queue = usize::from(part[10]) % QUEUES;
        let index = u16::from(part[9]) % (QUEUE_SIZE + 1);
        driver.descriptor(queue, index, address, length, flags, index + 1);
        if part[9] & 0x80 != 0 {
            driver.offer(queue, index);
            heads += 1;
        }
        match part[10] >> 5 {
            0 => {
                balloon.process();
            }
            1 => {
                balloon.ready(0, EventSet::IN);
            }
            2 => config.write(u64::from(part[0] % 12), &part[1..5]),
            3 => inflation.ask(word(0)),
            4 if memory.plugged() == 0 => memory.plug(1, 2).unwrap(),
            5 => memory.unplug(0, memory.blocks()).unwrap(),
            6 => {
                balloon.reset();
                balloon.activate(driver.activation(balloon.info().features));
            }
            _ => {}
        }
        assert!(inflation.taken_mib() <= MEMORY_MIB + PLUGGABLE_MIB);
    }
    let mut rounds = 0;
    while balloon.process() == Progress::More {
        rounds += 1;
        assert!(rounds <= 4096, "no end for {heads} requests");
    }
    let _ = inflation.statistics();
});
