//! A driver that writes what it likes into its ring cannot hurt the entropy device, nor have it write where it may not.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stoker_vmm::devices::virtio::rng::Rng;
use stoker_vmm::devices::virtio::testing::Driver;
use stoker_vmm::devices::virtio::{Progress, VirtioDevice as _, feature};

const QUEUE_SIZE: u16 = 16;
/// Where tables of further descriptors may be.
const TABLES: u64 = 0x1000;

fuzz_target!(|data: &[u8]| {
    let mut rng = Rng::default();
    let mut driver = Driver::new(&[QUEUE_SIZE]);
    rng.activate(driver.activation(feature::COMMON));
    driver.put(TABLES, &data[..data.len().min(4096)]);
    let mut heads = 0usize;
    for part in data.chunks_exact(10).take(256) {
        let word = |at: usize| u32::from_le_bytes([part[at], part[at + 1], part[at + 2], part[at + 3]]);
        let address = match word(0) {
            wild if wild % 16 == 0 => u64::from(wild) << 32 | u64::from(word(4)),
            tame if tame % 2 == 0 => TABLES + u64::from(tame % 4096),
            tame => u64::from(tame % (33 << 20)),
        };
        let (length, flags) = (word(4) >> (part[8] % 32), u16::from(part[8] & 7));
        let index = u16::from(part[9]) % (QUEUE_SIZE + 1);
        driver.descriptor(0, index, address, length, flags, index + 1);
        if part[9] & 0x80 != 0 {
            driver.offer(0, index);
            heads += 1;
        }
        if part[9] & 0x40 != 0 {
            rng.process();
        }
    }
    let mut rounds = 0;
    while rng.process() == Progress::More {
        rounds += 1;
        assert!(rounds <= 256, "no end for {heads} requests");
    }
});
