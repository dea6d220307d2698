//! A driver that writes what it likes into its rings cannot hurt the block device, be it on an image or on a scratch drive,
//! which grows meanwhile.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stoker_vmm::devices::virtio::block::{Block, Disk};
use stoker_vmm::devices::virtio::testing::Driver;
use stoker_vmm::devices::virtio::{Progress, VirtioDevice as _};

const QUEUE_SIZE: u16 = 128;
const REQUESTS: u64 = 0x1000;

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else {
        return;
    };
    let disk = match kind % 3 {
        2 => Disk::scratch(&std::env::temp_dir(), 1).unwrap(),
        read_only => {
            let image = tempfile::NamedTempFile::new().unwrap();
            image.as_file().set_len(64 << 10).unwrap();
            Disk::open(image.path(), read_only == 1).unwrap()
        }
    };
    let mut block = Block::new(disk, "fuzz");
    let mut growth = block.growth();
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
        if part[11] & 0x18 == 0x18
            && let Some(growth) = &mut growth
        {
            let before = growth.size_mib();
            let grown = growth.grow(u32::from(part[10]) << (part[9] % 16));
            assert!(growth.size_mib() >= before);
            assert!(grown.is_ok() || growth.size_mib() == before);
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
