//! A driver that writes what it likes into its rings cannot hurt the block device.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stoker_vmm::devices::virtio::block::{Block, Disk};
use stoker_vmm::devices::virtio::testing::Driver;
use stoker_vmm::devices::virtio::{Progress, VirtioDevice as _};

const QUEUE_SIZE: u16 = 128;
const REQUESTS: u64 = 0x1000;

fuzz_target!(|data: &[u8]| {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(64 << 10).unwrap();
    let (read_only, data) = match data.split_first() {
        Some((first, rest)) => (first & 1 != 0, rest),
        None => return,
    };
    let mut block = Block::new(Disk::open(image.path(), read_only).unwrap(), "fuzz");
    let mut driver = Driver::new(&[QUEUE_SIZE]);
    block.activate(driver.activation(block.info().features));
    // What is left over serves as the requests' headers and indirect tables.
    driver.put(REQUESTS, &data[..data.len().min(4096)]);
    let mut heads = 0u16;
    for (index, part) in data.chunks_exact(12).take(usize::from(QUEUE_SIZE)).enumerate() {
        let word = |at: usize| u32::from_le_bytes(part[at..at + 4].try_into().unwrap());
        // Mostly within 33 MiB, the last of which is no memory.
        let address = match word(0) {
            wild if wild % 16 == 0 => u64::from(wild) << 32 | u64::from(word(4)),
            tame if tame % 2 == 0 => REQUESTS + u64::from(tame % 4096),
            tame => u64::from(tame % (33 << 20)),
        };
        let next = u16::from(part[8]) % (QUEUE_SIZE + 2);
        driver.descriptor(
            0,
            index as u16,
            address,
            word(4) >> (part[9] % 32),
            u16::from(part[10] & 7),
            next,
        );
        if part[11] & 1 != 0 {
            driver.offer(0, index as u16);
            heads += 1;
        }
        if part[11] == 0xff {
            driver.set_available_index(0, word(4) as u16);
        }
        if part[11] & 6 == 6 {
            block.process();
        }
    }
    let mut rounds = 0;
    while block.process() == Progress::More {
        rounds += 1;
        assert!(rounds <= 256, "no end for {heads} requests");
    }
    block.reset();
});
